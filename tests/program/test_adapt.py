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


# ---------------------------------------------------------------- what is rejected


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


def next_to(bad):
    """A model with a layer that can be adapted, and one that cannot."""
    return lambda: chain(good=Named(16, 16), bad=bad())


def tied():
    shared, block = lin(), chain(inner=lin())
    return nn.ModuleDict({"a": shared, "b": shared, "c": block, "d": block, "e": lin()})


def case(make, *parts, **arguments):
    return pytest.param(make, {"method": "svft", "targets": TARGETS} | arguments, parts, id=str(parts or arguments))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("make, arguments, parts", [
    case(Net, "'svtf'", "'svft'", *METHODS, "full", "head", method="svtf"),
    case(Net, "'rnak'", "did you mean 'rank'", "alpha", "init", method="lora", rnak=3),
    case(Net, "full", "no options", method="full", rank=3),
    case(tiny_gpt, "blocks.0.mlp.up (32x8)", "topk", "square", targets=None, pattern="topk"),   # after four that fit
    *(case(Net, pattern="random", **options) for options in (   # options that a file could not hold
        {"seed": 2**80}, {"seed": np.array([1, 2])}, {"off_diagonals": torch.tensor(2)}, {"rank": 8 + 0j})),
    *(case(Net, f"{target!r} matches no layer", "targets can be: query, value", targets=["query", target])
      for target in ("valeu", "uery", "query.", ".query")),
    case(Net, "did you mean 'query'", targets=["querry"]),
    *(case(Net, key, "list of names", **{key: names}) for key in ("targets", "also_train")
      for names in ("query", ["query", 3], [""], 5)),
    *(case(Net, "give targets", "targets can be: query, value", targets=targets) for targets in (None, ())),
    case(lambda: chain(nn.Conv2d(3, 4, 1), nn.ReLU()), "no nn.Linear that can be adapted", targets=None),
    case(lambda: chain(*(lin(2, 2) for _ in range(30))), "targets can be: 0, 1, ", "19, ...", targets=None),
    *(case(next_to(bad), "bad ", "; targets can be: good", *parts, targets=("good", "bad")) for bad, *parts in (
        (Conv1D, "Conv1D", "GPT.from_pretrained(model.state_dict())"),
        (lambda: Twice(16, 16), "not a plain nn.Linear but Twice"), (lambda: chain(lin()), "but Sequential"),
        (lambda: compiled(lin()), "not a plain nn.Linear but"),
        (lambda: nn.utils.parametrizations.weight_norm(lin()), "not a plain nn.Linear but ParametrizedLinear"),
        (lambda: with_hook("forward_pre_hook"), "hooks, which an adapter would lose: remove them first"),
        (lambda: with_hook("forward_hook"), "hooks"), (lambda: with_hook("full_backward_hook"), "hooks"),
        (lambda: lin(dtype=torch.complex64), "torch.complex64", "float32"), (half_finite, "not finite"),
        (lambda: nn.Linear(0, 4), "a weight of size zero, (4, 0)"))),
    case(tied, "d.inner shares its weight with another module", "targets can be: e", targets=("e", "d.inner")),
    case(tied, "also_train: c shares a weight", targets=("e",), also_train=("c",)),
    case(tiny_gpt, "head shares its weight", targets=("query", "head")),
    case(tiny_gpt, "there is no head to train", method="head"),
    case(Net, "also_train", "'haed'", "did you mean 'head'", also_train=("haed",)),
    case(Net, "value is trained in full by also_train", also_train=("value",))])
def test_what_cannot_be_adapted_is_rejected(make, arguments, parts):
    """In one sentence that names the layer and those that can be adapted, before anything is changed."""
    with rejected(model := make(), *parts):
        adapt(model, **arguments)


MODELS = {   # and the targets that are offered
    "GPT": (tiny_gpt, (), "query, key, value, out, up, down"),
    "ViT": (tiny_vit, ("head",), "query, key, value, out, up, down"),
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


# ---------------------------------------------------------------- what is adapted


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


def test_values_from_numpy_can_be_saved(tmp_path):
    options = {"rank": np.array(2), "alpha": np.float32(4), "detach_norm": np.bool_(False)}
    model = adapt(Net(), "dora", targets=np.array(TARGETS), also_train=[np.str_("head")], **options)
    save_adapter(model, tmp_path / "a.pt", {"accuracy": np.float64(0.5), "classes": np.arange(3)})
    assert files.load(tmp_path / "a.pt", "adapter")["metadata"] == {"accuracy": 0.5, "classes": [0, 1, 2]}
    assert load_adapter(Net(), tmp_path / "a.pt").adaptation == model.adaptation


def test_also_train_names_modules():
    model = adapt(Net(), "svft", targets=("query",), also_train=("value", "norm"))
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
