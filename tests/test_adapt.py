"""adapt refuses what cannot work in one sentence, and leaves the model as it was; it works on any nn.Module."""

from collections import OrderedDict

import pytest
import torch
import torch.nn as nn

from conftest import Net, move, refused, tokens
from svmini import GPT, METHODS, GPTConfig, ViT, ViTConfig, adapt, count_trainable, merge
from svmini.adapter import TARGETS, adapters


def gpt():
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, d_model=16))


def vit():
    torch.manual_seed(0)
    return ViT(ViTConfig(image_size=8, patch_size=4, in_channels=1, num_classes=3, n_layer=2, n_head=2, d_model=16))


@pytest.mark.parametrize("method, options, words", [
    ("svtf", {}, ["'svtf'", "did you mean 'svft'?", "lora", "full", "head"]),
    ("", {}, ["there is no method ''", "boft"]),
    ("lora", {"rnk": 4}, ["lora has no option 'rnk'", "did you mean 'rank'?", "alpha"]),
    ("svfit", {"alpha": 4}, ["svfit has no option 'alpha'", "energy"]),
    ("full", {"rank": 4}, ["full has no option 'rank'"]),
    ("svft", {"pattern": "bnded"}, ["blocks.0.attention.query", "16x16", "plain, banded, random, topk"]),
    ("svft", {"pattern": "topk"}, ["blocks.0.mlp.up", "64x16", "square"]),     # the layers before it do fit
    ("svft", {"off_diagonals": 16}, ["blocks.0.attention.query", "0 to 15"]),
    ("svft", {"off_diagonals": -1}, ["0 to 15", "-1"]),
    ("svft", {"off_diagonals": 1.0}, ["whole number", "1.0"]),
    ("svft", {"pattern": "random", "seed": -1}, ["seed", "at least 0"]),
    ("svfit", {"rank": 17}, ["blocks.0.attention.query", "1 to 16", "17"]),
    ("svfit", {"rank": 0}, ["1 to 16"]),
    ("svfit", {"rank": 4, "energy": 0.9}, ["not both"]),
    ("svfit", {"energy": 1.1}, ["(0, 1]", "1.1"]),
    ("svfit", {"energy": 0.0}, ["(0, 1]"]),
    ("svfit", {"energy": float("nan")}, ["(0, 1]"]),
    ("lora", {"rank": 17}, ["blocks.0.attention.query", "1 to 16"]),
    ("lora", {"rank": True}, ["whole number", "True"]),
    ("lora", {"rank": 4, "alpha": 0}, ["alpha", "above 0"]),
    ("lora", {"init": "zeros"}, ["kaiming or pissa"]),
    ("lora", {"rank": 4, "init": "pissa", "alpha": 8}, ["alpha = rank"]),
    ("dora", {"rank": 17}, ["blocks.0.attention.query", "1 to 16"]),
    ("dora", {"detach_norm": "no"}, ["True or False"]),
    ("vera", {"rank": 0}, ["rank", "at least 1"]),
    ("vera", {"d_init": 0}, ["d_init", "nothing would learn"]),
    ("boft", {"block_size": 3}, ["even", "3"]),
    ("boft", {"block_size": 6}, ["blocks.0.attention.query", "d_in=16", "not divisible"]),
    ("boft", {"block_size": 4, "factors": 4}, ["= 32"]),                        # 16 coordinates carry three factors
    ("boft", {"factors": 0}, ["factors", "at least 1"]),
])
def test_bad_methods_and_options(method, options, words):
    for model in (gpt(), vit()):
        with refused(model, ValueError, *words):
            adapt(model, method, **options)


@pytest.mark.parametrize("targets, error, words", [
    (("quary",), ValueError, ["'quary'", "did you mean 'query'?", "down"]),
    (("query", "nothing"), ValueError, ["'nothing' matches no layer"]),
    (("nothing", "query"), ValueError, ["'nothing' matches no layer"]),
    (("query", "attention"), ValueError, ["blocks.0.attention is a Attention", "nn.Linear"]),
    (("norm1",), ValueError, ["blocks.0.norm1", "LayerNorm"]),
    (("0",), ValueError, ["Block"]),
    ("query", TypeError, ["list of names", "'query'"]),
    ((), TypeError, ["list of names"]),
    ((1,), TypeError, ["list of names"]),
])
def test_bad_targets(targets, error, words):
    for model in (gpt(), vit()):
        with refused(model, error, *words):
            adapt(model, "svft", targets=targets)


def test_a_tied_head_is_no_target():
    model = gpt()
    with refused(model, ValueError, "head is tied", "query"):
        adapt(model, "svft", targets=("query", "head"))
    with refused(model, ValueError, "no head of its own"):
        adapt(model, "head")


def test_a_head_of_its_own_is_no_target_but_trained():
    model = vit()
    with refused(model, ValueError, "head is trained whole"):
        adapt(model, "lora", targets=("query", "head"), rank=2)
    adapt(model, "lora", rank=2)
    assert count_trainable(model)["head"] == 16 * 3 + 3 and model.head.weight.requires_grad


@pytest.mark.parametrize("again", [*METHODS, "full", "head"])
def test_adapted_twice(again):
    model = move(adapt(Net(16, 16), "lora", targets=("query",)))
    for targets in (("query",), ("value",)):
        with refused(model, ValueError, "query is already adapted with lora", "merge"):
            adapt(model, again, targets=targets)


def test_merge_needs_something_to_merge():
    model = Net(16, 16)
    with refused(model, ValueError, "not adapted"):
        merge(model)


def test_weights_that_cannot_be_adapted():
    model = Net(16, 16)
    model.value.weight.data[3, 4] = float("inf")
    with refused(model, ValueError, "value", "not finite"):
        adapt(model, "svft", targets=("query", "value"))
    with refused(model := Net(16, 16, torch.bfloat16), ValueError, "query", "bfloat16", "float32"):
        adapt(model, "svft", targets=("query",))


def test_any_module_with_linears():
    def make():
        torch.manual_seed(0)
        return nn.Sequential(OrderedDict(first=nn.Linear(16, 24), act=nn.Tanh(), deep=nn.Sequential(
            OrderedDict(second=nn.Linear(24, 16, bias=False), first=nn.Linear(16, 16))), last=nn.Linear(16, 2))).double()

    x = tokens(5, 16)
    for method in METHODS:
        model = adapt(make(), method, targets=["first"])
        assert list(adapters(model)) == ["first", "deep.first"]
        assert type(model.deep.second) is nn.Linear and not model.last.weight.requires_grad
        assert (model(x) - make()(x)).abs().max() < 1e-10
        expected = move(model)(x)
        assert (merge(model)(x) - expected).abs().max() < 1e-10
        assert [type(m) for m in model.modules()] == [type(m) for m in make().modules()]


def test_all_six_by_default_and_the_rest_is_frozen():
    for model in (gpt(), vit()):
        model.eval()
        assert adapt(model, "svfit") is model
        assert list(adapters(model)) == [f"blocks.{i}.{part}" for i in range(2) for part in (
            "attention.query", "attention.key", "attention.value", "attention.out", "mlp.up", "mlp.down")]
        assert not any(a.training for a in adapters(model).values())
        assert all(p.requires_grad == (name.endswith(".s") or isinstance(model, ViT) and name.startswith("head."))
                   for name, p in model.named_parameters())
        assert model.adaptation["targets"] == list(TARGETS)


def test_a_merged_model_is_adapted_again():
    model, x = Net(16, 24), tokens(5, 24)
    merge(move(adapt(model, "svft", targets=("query",))))
    expected = model(x)
    adapt(model, "lora", targets=("query", "value"), rank=2)
    assert (model(x) - expected).abs().max() < 1e-10 and count_trainable(model)["adapter"] == 2 * 2 * (16 + 24)
