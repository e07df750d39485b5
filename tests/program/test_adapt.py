"""adapt: what it refuses, in one sentence and with the model untouched, and what it does with any nn.Module."""

from collections import OrderedDict
from contextlib import nullcontext

import pytest
import torch
import torch.nn as nn
from adapted import (ONE_EACH, OURS, Net, all_tensors, assert_close, fit, gpt, numbers, refused, same, train, vit)

import svmini
from svmini import GPT, METHODS, ViT, adapt, count_trainable, files, load_adapter, merge, save_adapter
from svmini.adapting import adapters_of, offers
from svmini.errors import InputError


def chain(*layers, **named):
    """nn.Sequential of layers that are numbered, or named."""
    return nn.Sequential(*layers) if layers else nn.Sequential(OrderedDict(named))


def lin(d_in=16, d_out=16, **more):
    return nn.Linear(d_in, d_out, **more)


def compiled(model):
    return torch.compile(model, backend="eager")


# ---------------------------------------------------------------- specs and options


@pytest.mark.parametrize("method, options, specs", [
    ("svtf", {}, ("'svtf'", "'svft'", *METHODS, "full", "head")), ("fulll", {}, ("'full'",)),
    ("lora", {"rnak": 3}, ("'rnak'", "did you mean 'rank'", "alpha", "init")),
    ("full", {"rank": 3}, ("takes no options",))])
def test_an_unknown_method_or_option(method, options, specs):
    model = Net()
    with refused(model, InputError, method, *specs):
        adapt(model, method, targets=OURS, **options)


def test_every_layer_is_checked_before_one_is_changed():
    """Options that do not fit name the layer; which options those are, tests/math/test_contract.py tests."""
    with refused(model := gpt(), InputError, "blocks.0.mlp.up (64x16)", "topk", "square", "query"):
        adapt(model, "svft", pattern="topk")
    model = chain(first=lin(), second=lin(16, 12), third=lin(12, 4))
    with refused(model, InputError, "third (4x12)", "rank", "from 1 to 4", "8"):
        adapt(model, "lora", targets=("first", "second", "third"), rank=8)


def test_a_row_of_zeros_names_the_layer():
    """Its direction, which DoRA trains, is not there."""
    model = Net()
    with torch.no_grad():
        model.value.weight[4] = 0
    with refused(model, InputError, "dora does not fit value", "row of zeros"):
        adapt(model, "dora", targets=OURS, rank=2)
    fit("lora:rank=2", model)


# ---------------------------------------------------------------- targets


@pytest.mark.parametrize("targets, spec", [
    (["nothing"], "'nothing'"), (["nothing", "query"], "'nothing'"), (["query", "valeu"], "did you mean 'value'"),
    (["query", "uery"], "'uery'"), (["query."], "'query.'"), ([".query"], "'.query'")])
def test_a_target_that_matches_nothing(targets, spec):
    """Also where another one in the list does match."""
    model = Net()
    with refused(model, InputError, "targets can be: query, value", spec):
        adapt(model, "svft", targets=targets)


@pytest.mark.parametrize("targets", ("query", ["query", 3], [""], 5), ids=str)
def test_targets_are_a_list_of_names(targets):
    model = Net()
    with refused(model, InputError, "list of names"):
        adapt(model, "svft", targets=targets)
    with refused(model, InputError, "also_train", "list of names"):
        adapt(model, "svft", targets=OURS, also_train=targets)


@pytest.mark.parametrize("target, found", [("up", ["a.up", "b.c.up"]), ("c.up", ["b.c.up"]), ("b.c.up", ["b.c.up"]),
                                           ("1", ["b.list.1"])])
def test_a_target_is_the_end_of_a_path_at_a_dot(target, found):
    model = nn.ModuleDict({"a": nn.ModuleDict({"up": lin(), "backup": lin()}), "b": nn.ModuleDict({
        "c": nn.ModuleDict({"up": lin()}), "list": nn.ModuleList([lin(), lin()])})})
    assert adapt(model, "svft", targets=[target]) is model
    assert list(adapters_of(model)) == model.adaptation["layers"] == found


def test_adapt_says_which_layers_it_took():
    """So that one is not missed: a gate that was added to the MLP is not among the default targets."""
    assert GPT.targets == ViT.targets == ("query", "key", "value", "out", "up", "down")
    for model in (gpt(), vit()):
        model.blocks[1].mlp.gate = lin(16, 64)
        adapt(model, "lora", rank=2)
        assert model.adaptation["layers"] == list(adapters_of(model)) == [
            f"blocks.{i}.{part}" for i in range(2) for part in (
                "attention.query", "attention.key", "attention.value", "attention.out", "mlp.up", "mlp.down")]
    model = adapt(Net(), "lora", targets=("value", "query"), rank=4)
    assert {k: v for k, v in model.adaptation.items() if k != "before"} == {
        "method": "lora", "options": {"rank": 4, "alpha": None, "init": "kaiming"}, "targets": ["value", "query"],
        "layers": ["query", "value"], "also_train": ["head"]}


def test_lora_draws_in_the_order_of_the_targets():
    """And not in that of the model's layers: results that were published with a seed hang on it."""
    models = []
    for targets in (("value", "query"), ("query", "value")):
        model = Net()
        torch.manual_seed(5)
        models.append(adapt(model, "lora", targets=targets, rank=2))
    assert torch.equal(models[0].value.A, models[1].query.A) and torch.equal(models[0].query.A, models[1].value.A)


def test_a_foreign_model_without_targets_is_told_what_it_has():
    model = Net()
    for targets in (None, ()):
        with refused(model, InputError, "give targets", "targets can be: query, value"):
            adapt(model, "lora", targets=targets)
    with refused(conv := chain(nn.Conv2d(3, 4, 1), nn.ReLU()), InputError, "no nn.Linear inside"):
        adapt(conv, "lora")
    with refused(many := nn.ModuleDict({f"layer{i}": lin(2, 2) for i in range(30)}), InputError, "layer19, ..."):
        adapt(many, "lora")


class Twice(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Named(nn.Linear):
    """A subclass that computes what nn.Linear computes."""


Conv1D = type("Conv1D", (nn.Module,), {})   # a name of Hugging Face's GPT-2: its weight is stored transposed


def with_hook(kind):
    layer = lin()
    getattr(layer, f"register_{kind}")(lambda *parts: None)
    return layer


def half_finite():
    layer = lin()
    layer.weight.data[3, 5] = float("nan")
    return layer


@pytest.mark.parametrize("layer, specs", [
    (Conv1D, ("Conv1D", "GPT.from_pretrained(model.state_dict())")),
    (lambda: Twice(16, 16), ("no plain nn.Linear but Twice",)), (lambda: nn.LayerNorm(16), ("but LayerNorm",)),
    (lambda: chain(lin()), ("but Sequential",)), (lambda: compiled(lin()), ("no plain nn.Linear but",)),
    (lambda: nn.utils.parametrizations.weight_norm(lin()), ("no plain nn.Linear but ParametrizedLinear",)),
    (lambda: with_hook("forward_hook"), ("hooks", "remove them first")),
    (lambda: with_hook("full_backward_hook"), ("hooks",)),
    (lambda: lin(dtype=torch.bfloat16), ("torch.bfloat16", "float32", "autocast")), (half_finite, ("not finite",))])
def test_a_layer_that_cannot_be_adapted(layer, specs):
    """In one sentence that names it, and says which could be; the model is as it was."""
    model = chain(good=lin(), bad=layer())
    with refused(model, InputError, "bad ", "; targets can be: good", *specs):
        adapt(model, "svft", targets=("good", "bad"))


def test_a_subclass_that_computes_as_nn_linear_does_is_taken():
    model, x = chain(a=Named(16, 16), b=Twice(16, 16)), numbers(5, 16)
    expected = model(x)
    assert adapt(model, "svft", targets=("a",)).adaptation["layers"] == ["a"]
    assert_close(model(x), expected)


# ---------------------------------------------------------------- what stands in two places; what is suggested


def test_a_tied_head_is_no_target():
    with refused(model := gpt(), InputError, "head shares its weight"):
        adapt(model, "lora", targets=("query", "head"), rank=2)
    with refused(model, InputError, "also_train: head shares a weight"):
        adapt(model, "lora", also_train=("head",), rank=2)


def test_a_module_that_stands_in_two_places_is_no_target():
    shared, block = lin(), chain(inner=lin())
    model = nn.ModuleDict({"a": shared, "b": shared, "c": block, "d": block, "e": lin()})
    with refused(model, InputError, "d.inner shares its weight with another place", "targets can be: e"):
        adapt(model, "svft", targets=("e", "d.inner"))
    with refused(model, InputError, "also_train: c shares a weight"):
        adapt(model, "svft", targets=("e",), also_train=("c",))


MODELS = {   # and the ends that are offered
    "GPT": (gpt, (), "query, key, value, out, up, down"), "ViT": (vit, ("head",), "query, key, value, out, up, down"),
    "a name twice": (lambda: chain(fc=lin(), deep=chain(fc=nn.Conv2d(3, 3, 1), proj=lin())), (), "proj"),
    "numbers": (lambda: chain(lin(), nn.ReLU(), chain(lin(), nn.Tanh(), lin(16, 8))), (), "0, 2.0, 2.2"),
    "attention": (lambda: nn.TransformerEncoderLayer(16, 2, 32), (), "out_proj, linear1, linear2"),
    "one bad": (lambda: chain(a=chain(fc=lin()), b=chain(fc=half_finite()), c=chain(fc=lin())), (), "a.fc, c.fc"),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_an_error_suggests_is_accepted(name):
    """Every end that is offered, alone and all together; and no layer is forgotten that an end could name."""
    make, also_train, expected = MODELS[name]
    ends = offers(make(), also_train).removeprefix("targets can be: ").split(", ")
    assert ends == expected.split(", ")
    for targets in [[end] for end in ends] + [ends]:
        assert adapt(make(), "lora", rank=1, targets=targets, also_train=also_train).adaptation["layers"]


# ---------------------------------------------------------------- heads, and what is unfrozen by hand


def test_also_train_names_modules():
    with refused(none := gpt(), InputError, "there is no head to train"):
        adapt(none, "head")
    model = Net()
    with refused(model, InputError, "also_train", "'haed'", "did you mean 'head'"):
        adapt(model, "svft", targets=OURS, also_train=("haed",))
    with refused(model, InputError, "value is trained whole, as also_train says"):
        adapt(model, "svft", targets=OURS, also_train=("value",))
    adapt(model, "svft", targets=("query",), also_train=("value", "norm"))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "query.M", "value.weight", "norm.weight", "norm.bias"}


def test_count_tells_adapters_from_what_is_trained_beside_them():
    model = adapt(Net(), "svft", targets=OURS, pattern="plain", also_train=("head", "norm"))
    assert count_trainable(model) == {"adapter": 32, "head": 51 + 32, "total": 115}
    model = adapt(Net(), "svft", targets=OURS, pattern="plain", also_train=())
    assert count_trainable(model) == {"adapter": 32, "head": 0, "total": 32}
    model.norm.requires_grad_(True)                                       # by hand
    model.query.requires_grad_(False)
    assert count_trainable(model) == {"adapter": 16, "head": 32, "total": 48}
    for full in (Net(), adapt(Net(), "full")):
        assert count_trainable(full) == {"adapter": 16 * 17 + 16 * 16 + 32, "head": 51, "total": 611}
    tied = gpt()
    assert count_trainable(tied)["total"] == sum(p.numel() for p in tied.parameters())   # the tied matrix once


# ---------------------------------------------------------------- what is adapted already


def test_an_adapted_model_is_not_adapted_again():
    """Neither the same layers nor others, until it is merged."""
    for first in ("svft", "full", "head"):
        model = adapt(Net(), first, targets=("query",))
        with refused(model, InputError, "already adapted", "merge the model first"):
            adapt(model, "svfit", targets=("value",))
        assert not hasattr(merge(model), "adaptation")
        assert adapt(model, "svfit", targets=OURS).adaptation["method"] == "svfit"


def test_a_part_of_an_adapted_model_and_a_model_with_an_adapted_part(tmp_path):
    model = chain(encoder=Net(), last=lin(3, 3))
    adapt(model.encoder, "svft", targets=OURS)
    with refused(model, InputError, "encoder", "already adapted", "merge encoder first"):
        adapt(model, "svft", targets=("last",))
    with refused(model, InputError, "nothing to merge", "not adapted"):
        merge(model)
    with refused(model, InputError, "no adapter to save", "not adapted"):
        save_adapter(model, tmp_path / "a.pt")
    merge(model.encoder)
    adapt(model, "svft", targets=OURS)
    with refused(model.encoder, InputError, "query is already adapted", "the model that it is part of"):
        adapt(model.encoder, "svft", targets=OURS)


# ---------------------------------------------------------------- surroundings: modes, wrappers, devices


def test_a_layer_with_hooks_is_not_merged_away():
    model = fit("svft", Net())
    model.query.register_forward_hook(lambda layer, x, y: None)
    with refused(model, InputError, "query has hooks", "remove them first"):
        merge(model)


class Default64:
    """A mode in which torch makes float64 where no dtype is named."""

    def __enter__(self):
        torch.set_default_dtype(torch.float64)

    def __exit__(self, *error):
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("spec", [*ONE_EACH, "lora:rank=2,init=pissa", "svft:pattern=random"])
def test_modes_and_defaults_around_it_change_nothing(spec, tmp_path):
    """No autocast rounds what adapt, merge, save and load compute, what they make can be trained, also where it was
    made in inference mode, and draws follow the CPU and the weight's dtype, not the defaults."""
    def run(mode, path):
        made, out, x = [Net(), Net()], [], numbers(4, 16)

        def steps(model):
            return train(model, lambda m: m(x).square().sum())

        torch.manual_seed(3)
        svmini.methods.svd.clear_svd_cache()
        with mode:
            out.append(all_tensors(fit(spec, made[0])))
        steps(made[0])
        with mode:
            save_adapter(made[0], path)
            out.append(all_tensors(load_adapter(made[1], path)))
            out.append(all_tensors(merge(made[0])))
        for model in made:
            out.append(all_tensors(steps(model)))
        return out

    expected = run(nullcontext(), tmp_path / "a.pt")
    for mode in (torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), torch.no_grad(), torch.device("meta"),
                 Default64()):
        assert all(map(same, run(mode, tmp_path / "b.pt"), expected))
        a, b = (files.load(tmp_path / name, "adapter") for name in ("a.pt", "b.pt"))
        assert files.sha256_of(a) == files.sha256_of(b)


def test_lower_precision_after_adapt_is_said_at_once():
    for lower in (lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to("cpu", torch.float16)):
        with pytest.raises(InputError, match="cannot become torch.*float16.*autocast"):
            lower(fit("boft", Net()))
    merge(fit("boft", Net())).bfloat16()


def test_wrappers_are_looked_through(tmp_path):
    """torch.compile's and DataParallel's, around the model before and after, in any order."""
    x, path, parallel = numbers(4, 16), tmp_path / "a.pt", nn.DataParallel
    for wrap in (compiled, parallel, lambda m: parallel(compiled(m)), lambda m: compiled(parallel(m))):
        wrapped, plain = wrap(Net()), Net()
        assert fit("svft", wrapped) is wrapped
        train(wrapped, lambda m: m(x).square().sum())
        assert count_trainable(wrapped) == count_trainable(fit("svft", Net()))
        with refused(wrapped, InputError, "query is already adapted"):
            fit("svft", wrapped)
        save_adapter(wrapped, path)
        assert_close(load_adapter(plain, path)(x), wrapped(x))           # into a plain one
        assert_close(load_adapter(wrap(Net()), path)(x), plain(x))       # and into a wrapped one
        assert_close(merge(wrapped)(x), plain(x))


def test_the_mode_stays():
    for training in (True, False):
        model = fit("svft", Net().train(training))
        assert {m.training for m in model.modules()} == {training}
        assert {m.training for m in merge(model).modules()} == {training}
