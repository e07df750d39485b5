"""adapt: what it rejects, in one sentence and with the model untouched, and what it does with any nn.Module."""

from collections import OrderedDict
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
import torch.nn as nn

from helpers import (ONE_EACH, TARGETS, Net, adapt_spec, all_tensors, assert_close, noise, rejected, same, take_steps,
                     tiny_gpt, tiny_vit)
from svmini import METHODS, adapt, count_trainable, files, load_adapter, merge, save_adapter
from svmini.adapting import adapters_of, offers
from svmini.methods.svd import clear_svd_cache


def chain(*layers, **named):
    """nn.Sequential of layers with indices or names."""
    return nn.Sequential(*layers) if layers else nn.Sequential(OrderedDict(named))


def lin(d_in=16, d_out=16, **more):
    return nn.Linear(d_in, d_out, **more)


def compiled(model):
    return torch.compile(model, backend="eager")


# ---------------------------------------------------------------- methods and options


def test_an_unknown_method_or_option_is_rejected():
    with rejected(model := Net(), "'svtf'", "'svft'", *METHODS, "full", "head"):
        adapt(model, "svtf", targets=TARGETS)
    with rejected(model, "'rnak'", "did you mean 'rank'", "alpha", "init"):
        adapt(model, "lora", targets=TARGETS, rnak=3)
    with rejected(model, "full", "no options"):
        adapt(model, "full", rank=3)
    with rejected(model := tiny_gpt(), "blocks.0.mlp.up (32x8)", "topk", "square", "query"):   # after four that fit
        adapt(model, "svft", pattern="topk")


def test_values_from_numpy_can_be_saved(tmp_path):
    options = {"rank": np.array(2), "alpha": np.float32(4), "detach_norm": np.bool_(False)}
    model = adapt(Net(), "dora", targets=np.array(TARGETS), also_train=[np.str_("head")], **options)
    save_adapter(model, tmp_path / "a.pt", {"accuracy": np.float64(0.5), "classes": np.arange(3)})
    assert files.load(tmp_path / "a.pt", "adapter")["metadata"] == {"accuracy": 0.5, "classes": [0, 1, 2]}
    assert load_adapter(Net(), tmp_path / "a.pt").adaptation == model.adaptation


def test_options_that_could_not_be_saved_are_rejected_at_once():
    for options in ({"seed": 2**80}, {"seed": np.array([1, 2])}, {"off_diagonals": torch.tensor(2)}, {"rank": 8 + 0j}):
        with rejected(model := Net()):
            adapt(model, "svft", targets=TARGETS, pattern="random", **options)


# ---------------------------------------------------------------- targets


def test_targets_are_a_list_of_names_that_all_match():
    """A target that matches nothing is rejected even if another one matches."""
    model = Net()
    for target in ("valeu", "uery", "query.", ".query"):
        with rejected(model, f"{target!r} matches no layer", "targets can be: query, value"):
            adapt(model, "svft", targets=["query", target])
    for names in ("query", ["query", 3], [""], 5):
        with rejected(model, "list of names"):
            adapt(model, "svft", targets=names)
        with rejected(model, "also_train", "list of names"):
            adapt(model, "svft", targets=TARGETS, also_train=names)


def test_a_target_is_the_end_of_a_path_at_a_dot():
    for target, found in (("up", ["a.up", "b.c.up"]), ("c.up", ["b.c.up"]), ("1", ["b.list.1"])):
        model = chain(a=chain(up=lin(), backup=lin()), b=chain(c=chain(up=lin()), list=chain(lin(), lin())))
        assert adapt(model, "svft", targets=[target]) is model
        assert list(adapters_of(model)) == model.adaptation["layers"] == found


def test_adapt_records_which_layers_it_adapted():
    """So that nobody overlooks a layer: a gate that was added to the MLP is not among the default targets."""
    model = tiny_gpt()
    model.blocks[0].mlp.gate = lin(8, 32)
    assert adapt(model, "lora", rank=2).adaptation["layers"] == [
        *(f"blocks.0.attention.{part}" for part in ("query", "key", "value", "out")), "blocks.0.mlp.up",
        "blocks.0.mlp.down"]
    record = adapt(Net(), "lora", targets=("value", "query"), rank=4).adaptation
    assert record | {"base": 0, "frozen": 0} == {
        "method": "lora", "options": {"rank": 4, "alpha": None, "init": "kaiming"}, "targets": ["value", "query"],
        "layers": ["query", "value"], "also_train": ["head"], "dtype": "float32", "base": 0, "frozen": 0}


def test_lora_draws_in_the_order_of_the_targets():
    """Not in the order of the model's layers: published results with a seed depend on it."""
    models = []
    for targets in (("value", "query"), ("query", "value")):
        model = Net()
        torch.manual_seed(5)
        models.append(adapt(model, "lora", targets=targets, rank=2))
    assert torch.equal(models[0].value.A, models[1].query.A) and torch.equal(models[0].query.A, models[1].value.A)


def test_a_model_without_default_targets_gets_a_list_of_possible_targets():
    model = Net()
    for targets in (None, ()):
        with rejected(model, "give targets", "targets can be: query, value"):
            adapt(model, "lora", targets=targets)
    with rejected(conv := chain(nn.Conv2d(3, 4, 1), nn.ReLU()), "no nn.Linear that can be adapted"):
        adapt(conv, "lora")
    with rejected(many := nn.ModuleDict({f"layer{i}": lin(2, 2) for i in range(30)}), "layer19, ..."):
        adapt(many, "lora")


class Twice(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Named(nn.Linear):
    """A subclass that computes what nn.Linear computes."""


Conv1D = type("Conv1D", (nn.Module,), {})   # the name of the layers in Hugging Face's GPT-2, which store W transposed


def with_hook(kind):
    getattr(layer := lin(), f"register_{kind}")(lambda *parts: None)
    return layer


def half_finite():
    layer = lin()
    layer.weight.data[3, 5] = float("nan")
    return layer


@pytest.mark.parametrize("layer, parts", [
    (Conv1D, ("Conv1D", "GPT.from_pretrained(model.state_dict())")),
    (lambda: Twice(16, 16), ("not a plain nn.Linear but Twice",)), (lambda: chain(lin()), ("but Sequential",)),
    (lambda: compiled(lin()), ("not a plain nn.Linear but",)),
    (lambda: nn.utils.parametrizations.weight_norm(lin()), ("not a plain nn.Linear but ParametrizedLinear",)),
    *((lambda kind=kind: with_hook(kind), ("hooks", "remove them first"))
      for kind in ("forward_pre_hook", "forward_hook", "full_backward_hook")),
    (lambda: lin(dtype=torch.complex64), ("torch.complex64", "float32")), (half_finite, ("not finite",))])
def test_a_layer_that_cannot_be_adapted_is_rejected(layer, parts):
    """In one sentence that names the layer and those that can be adapted."""
    model = chain(good=Named(16, 16), bad=layer())
    with rejected(model, "bad ", "; targets can be: good", *parts):
        adapt(model, "svft", targets=("good", "bad"))


def test_a_shared_layer_is_no_target():
    with rejected(model := tiny_gpt(), "head shares its weight"):
        adapt(model, "lora", targets=("query", "head"), rank=2)
    with rejected(model, "also_train: head shares a weight"):
        adapt(model, "lora", also_train=("head",), rank=2)
    shared, block = lin(), chain(inner=lin())
    model = nn.ModuleDict({"a": shared, "b": shared, "c": block, "d": block, "e": lin()})
    with rejected(model, "d.inner shares its weight with another module", "targets can be: e"):
        adapt(model, "svft", targets=("e", "d.inner"))
    with rejected(model, "also_train: c shares a weight"):
        adapt(model, "svft", targets=("e",), also_train=("c",))


MODELS = {   # and the targets that are offered
    "GPT": (tiny_gpt, (), "query, key, value, out, up, down"), "ViT": (tiny_vit, ("head",), "query, key, value, out, up, down"),
    "a name twice": (lambda: chain(fc=lin(), deep=chain(fc=nn.Conv2d(3, 3, 1), proj=lin())), (), "proj"),
    "indices": (lambda: chain(lin(), nn.ReLU(), chain(lin(), lin(16, 8))), (), "0, 2.0, 2.1"),
    "attention": (lambda: nn.TransformerEncoderLayer(16, 2, 32), (), "out_proj, linear1, linear2"),
    "one bad": (lambda: chain(a=chain(fc=lin()), b=chain(fc=half_finite()), c=chain(fc=lin())), (), "a.fc, c.fc"),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_an_error_suggests_is_accepted(name):
    """Every offered target, alone and together with the others. No layer that can be adapted is left out."""
    make, also_train, expected = MODELS[name]
    ends = offers(make(), also_train).removeprefix("targets can be: ").split(", ")
    assert ends == expected.split(", ")
    for targets in [[end] for end in ends] + [ends]:
        assert adapt(make(), "lora", rank=1, targets=targets, also_train=also_train).adaptation["layers"]


# ---------------------------------------------------------------- heads, and what is unfrozen by hand


def test_also_train_names_modules():
    with rejected(model := tiny_gpt(), "there is no head to train"):
        adapt(model, "head")
    model = Net()
    with rejected(model, "also_train", "'haed'", "did you mean 'head'"):
        adapt(model, "svft", targets=TARGETS, also_train=("haed",))
    with rejected(model, "value is trained in full by also_train"):
        adapt(model, "svft", targets=TARGETS, also_train=("value",))
    adapt(model, "svft", targets=("query",), also_train=("value", "norm"))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "query.M", "value.weight", "norm.weight", "norm.bias"}


def test_count_trainable_separates_adapters_from_the_rest():
    model = adapt(Net(), "svft", targets=TARGETS, pattern="plain", also_train=("head", "norm"))
    assert count_trainable(model) == {"adapter": 32, "head": 51 + 32, "total": 115}
    model = adapt(Net(), "svft", targets=TARGETS, pattern="plain", also_train=())
    assert count_trainable(model) == {"adapter": 32, "head": 0, "total": 32}
    model.norm.requires_grad_(True)                                       # by hand
    model.query.requires_grad_(False)
    assert count_trainable(model) == {"adapter": 16, "head": 32, "total": 48}
    for full in (Net(), adapt(Net(), "full")):
        assert count_trainable(full) == {"adapter": 16 * 17 + 16 * 16 + 32, "head": 51, "total": 611}
    assert count_trainable(tied := tiny_gpt())["total"] == sum(p.numel() for p in tied.parameters())   # a tied one once


# ---------------------------------------------------------------- models that are adapted already


def test_an_adapted_model_its_parts_and_a_model_with_an_adapted_part_are_not_adapted_again(tmp_path):
    """Neither the same layers nor others, until it is merged."""
    for first in ("svft", "full"):
        model = adapt(Net(), first, targets=("query",))
        with rejected(model, "already adapted", "merge the model first"):
            adapt(model, "svfit", targets=("value",))
        assert adapt(merge(model), "svfit", targets=TARGETS).adaptation["method"] == "svfit"
    model = chain(encoder=Net(), last=lin(3, 3))
    adapt(model.encoder, "svft", targets=TARGETS)
    with rejected(model, "encoder", "already adapted", "merge encoder first"):
        adapt(model, "svft", targets=("last",))
    with rejected(model, "nothing to merge", "not adapted"):
        merge(model)
    with rejected(model, "no adapter to save", "not adapted"):
        save_adapter(model, tmp_path / "a.pt")
    merge(model.encoder)
    adapt(model, "svft", targets=TARGETS)
    with rejected(model.encoder, "query is already adapted", "the model that it is part of"):
        adapt(model.encoder, "svft", targets=TARGETS)


# ---------------------------------------------------------------- modes, wrappers, devices


@contextmanager
def float64_by_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("spec", [*ONE_EACH, "lora:rank=2,init=pissa", "svft:pattern=random"])
def test_modes_and_defaults_around_a_call_change_nothing(spec, tmp_path):
    """No autocast rounds what adapt, merge, save and load compute; tensors that are created in inference mode can be
    trained; draws follow the CPU and the dtype of the weight, not the defaults."""
    def run(mode, path):
        models, x = [Net(), Net()], noise(4, 16)
        torch.manual_seed(3)
        clear_svd_cache()
        with mode():
            adapt_spec(spec, models[0])
        take_steps(models[0], lambda m: m(x).square().sum())
        with mode():
            save_adapter(models[0], path)
            load_adapter(models[1], path)
            merge(models[0])
        return [all_tensors(m) for m in models] + [all_tensors(take_steps(m, lambda m: m(x).square().sum()))
                                                   for m in models]

    expected = run(nullcontext, tmp_path / "a.pt")
    for mode in (lambda: torch.autocast("cpu", torch.bfloat16), torch.inference_mode, torch.no_grad,
                 lambda: torch.device("meta"), float64_by_default):
        assert same(run(mode, tmp_path / "b.pt"), expected)
        assert same(*(files.load(tmp_path / name, "adapter") for name in ("a.pt", "b.pt")))


def test_wrappers_are_looked_through(tmp_path):
    """Those of torch.compile and DataParallel, around the model before and after, in any order."""
    x, path, parallel = noise(4, 16), tmp_path / "a.pt", nn.DataParallel
    for wrap in (lambda m: parallel(compiled(m)), lambda m: compiled(parallel(m))):
        wrapped, plain = wrap(Net()), Net()
        assert adapt_spec("svft", wrapped) is wrapped
        take_steps(wrapped, lambda m: m(x).square().sum())
        assert count_trainable(wrapped) == count_trainable(adapt_spec("svft", Net()))
        with rejected(wrapped, "query is already adapted"):
            adapt_spec("svft", wrapped)
        with rejected(wrapped, "cannot become torch.float16"):
            wrapped.half()
        save_adapter(wrapped, path)
        assert_close(load_adapter(plain, path)(x), wrapped(x))           # into a plain one
        assert_close(load_adapter(wrap(Net()), path)(x), plain(x))       # and into a wrapped one
        assert_close(merge(wrapped)(x), plain(x))


def test_train_and_eval_mode_stay():
    for model in (adapt_spec("svft", Net().eval()), merge(adapt_spec("svft", Net().eval()))):
        assert not any(m.training for m in model.modules())
