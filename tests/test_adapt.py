"""adapt: what it refuses, in one sentence and with the model untouched, and what it does with any nn.Module."""

from collections import OrderedDict

import pytest
import torch
import torch.nn as nn

from conftest import SHAPES, Net, all_tensors, assert_close, cases, move, parse, refused, tokens
from svmini import GPT, METHODS, GPTConfig, ViT, ViTConfig, adapt, count_trainable, merge
from svmini.adapter import TARGETS, adapters, options_of

OURS = ("query", "value")


def gpt():
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, d_model=16))


def vit():
    torch.manual_seed(0)
    return ViT(ViTConfig(image_size=8, patch_size=4, in_channels=3, num_classes=4, n_layer=2, n_head=2, d_model=16))


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("word, near", [("svtf", "'svft'"), ("SVFT", ""), ("loraa", "'lora'"), ("bofd", "'boft'"),
                                        ("fulll", "'full'"), ("zzz", ""), ("", "")])
def test_an_unknown_method(word, near):
    model = Net(16, 16)
    with refused(model, ValueError, repr(word), near, *METHODS, "full", "head"):
        adapt(model, word, targets=OURS)


@pytest.mark.parametrize("method, option, words", [
    ("lora", "rnak", ("did you mean 'rank'", "alpha", "init")), ("svft", "off_diagonal", ("'off_diagonals'",)),
    ("vera", "alpha", ("rank", "seed", "d_init")), ("svfit", "pattern", ("rank", "energy")),
    ("full", "rank", ("takes no options",)), ("head", "rank", ("takes no options",))])
def test_an_unknown_option(method, option, words):
    model = Net(16, 16)
    with refused(model, ValueError, method, repr(option), *words):
        adapt(model, method, targets=OURS, **{option: 3})


@pytest.mark.parametrize("targets, words", [
    (["nothing"], ("'nothing'", "query, value")), (["query", "nothing"], ("'nothing'", "query, value")),
    (["nothing", "query"], ("'nothing'", "query, value")), (["query", "valeu"], ("did you mean 'value'",)),
    (["query", "que"], ("'que'",)), (["query."], ("'query.'",)), (["Query"], ("'Query'", "'query'"))])
@pytest.mark.parametrize("method", ("svft", "lora"))
def test_a_target_that_matches_nothing(method, targets, words):
    """Also where another one in the list does match."""
    model = Net(16, 16)
    with refused(model, ValueError, *words):
        adapt(model, method, targets=targets)


@pytest.mark.parametrize("targets", ("query", "query,value", [], (), ["query", 3], [None], [["query"]]), ids=str)
def test_targets_are_a_list_of_names(targets):
    model = Net(16, 16)
    with refused(model, TypeError, "list of names"):
        adapt(model, "svft", targets=targets)


def test_the_default_targets_are_all_six_of_our_models():
    assert TARGETS == ("query", "key", "value", "out", "up", "down")
    for model in (gpt(), vit()):
        names = list(adapters(adapt(model, "lora", rank=2)))
        assert sorted(names) == sorted(f"blocks.{i}.{part}" for i in range(2) for part in (
            "attention.query", "attention.key", "attention.value", "attention.out", "mlp.up", "mlp.down"))
    model = Net(16, 16)                                     # which has two of them only
    with refused(model, ValueError, "'key'"):
        adapt(model, "lora")


@pytest.mark.parametrize("first", [*METHODS])
@pytest.mark.parametrize("second", [*METHODS, "full", "head"])
def test_an_adapted_model_is_not_adapted_again(first, second):
    """Neither the same layers nor others, until it is merged."""
    model = adapt(Net(16, 16), first, targets=("query",))
    for targets in (("query",), ("value",), OURS):
        with refused(model, ValueError, "query", "already adapted", first, "merge"):
            adapt(model, second, targets=targets)
    adapt(merge(model), second, targets=OURS)
    assert model.adaptation["method"] == second


@pytest.mark.parametrize("targets", [("head",), ("query", "head"), ("head", "up")], ids=str)
def test_a_tied_head_is_no_target(targets):
    model = gpt()
    with refused(model, ValueError, "head", "tied"):
        adapt(model, "lora", targets=targets, rank=2)


@pytest.mark.parametrize("targets", [("head",), ("query", "head")], ids=str)
def test_a_head_of_its_own_is_no_target(targets):
    model = vit()
    with refused(model, ValueError, "head", "trained whole"):
        adapt(model, "lora", targets=targets, rank=2)


def test_a_head_that_is_tied_or_missing_cannot_be_trained_alone():
    headless = nn.Sequential(nn.Linear(8, 8))
    for model in (gpt(), headless):
        with refused(model, ValueError, "head"):
            adapt(model, "head")


@pytest.mark.parametrize("targets, word", [(("token_embedding",), "Embedding"), (("norm",), "LayerNorm"),
                                           (("query", "norm1"), "LayerNorm"), (("mlp",), "MLP"),
                                           (("query", "attention"), "Attention"), (("0",), "Block")], ids=str)
def test_a_target_that_is_no_linear(targets, word):
    model = gpt()
    with refused(model, ValueError, word, "plain nn.Linear", "query"):
        adapt(model, "lora", targets=targets, rank=2)


def test_out_proj_of_multihead_attention_is_refused():
    """Its weight is read by the attention itself: an adapter in its place would never be called."""
    model = nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, batch_first=True)
    for targets in (("out_proj",), ("linear1", "out_proj")):
        with refused(model, ValueError, "out_proj", "NonDynamicallyQuantizableLinear", "linear1"):
            adapt(model, "lora", targets=targets, rank=2)
    assert len(adapters(adapt(model, "lora", targets=("linear1", "linear2"), rank=2))) == 2


def test_topk_of_a_matrix_that_is_not_square():
    for model in (gpt(), vit()):
        with refused(model, ValueError, "blocks.0.mlp.up", "64x16", "topk", "square", "query"):
            adapt(model, "svft", pattern="topk")
        assert len(adapters(adapt(model, "svft", targets=TARGETS[:4], pattern="topk"))) == 8


@pytest.mark.parametrize("method", ("svfit", "lora", "dora"))
def test_a_rank_that_is_too_large_names_the_layer(method):
    """Every layer is checked before one is changed: the last of them is too small."""
    model = nn.Sequential()
    for name, d_out in (("first", 16), ("second", 12), ("third", 4)):
        model.add_module(name, nn.Linear(16, d_out))
    with refused(model, ValueError, "third", "4x16", "rank", "from 1 to 4", "8"):
        adapt(model, method, targets=("first", "second", "third"), rank=8)
    adapt(model, method, targets=("first", "second"), rank=8)


WRONG = [
    *((m, {"rank": r}, "rank") for m in ("svfit", "lora", "dora", "vera") for r in (0, -1, 2.0, "4", True)),
    *((m, {"rank": 17}, "rank") for m in ("svfit", "lora", "dora")), ("vera", {"rank": None}, "rank"),
    ("lora", {"rank": None}, "rank"),
    *(("svfit", {"energy": e}, "energy") for e in (0, -0.1, 1.01, "0.9", float("nan"))),
    ("svfit", {"rank": 4, "energy": 0.9}, "not both"),
    *(("svft", {"pattern": p}, "pattern") for p in ("band", "", None, 3)),
    *(("svft", {"pattern": p, "off_diagonals": d}, "off_diagonals")
      for p in ("banded", "random", "topk") for d in (-1, 16, 1.5, None, True)),
    *(("svft", {"pattern": "random", "seed": s}, "seed") for s in (-1, 0.5, None)),
    *((m, {"alpha": a}, "alpha") for m in ("lora", "dora") for a in (0, -2, "8", float("nan"))),
    *(("lora", {"init": i}, "init") for i in ("pisa", None, "")),
    ("lora", {"init": "pissa", "rank": 4, "alpha": 8}, "alpha"),
    *(("dora", {"detach_norm": d}, "detach_norm") for d in (1, None, "no")),
    *(("vera", {"seed": s}, "seed") for s in (-1, 1.0)),
    *(("vera", {"d_init": d}, "d_init") for d in (0, 0.0, None, "0.1")),
    *(("boft", {"block_size": b}, "block_size") for b in (0, 1, 3, 5, -2, 17, 2.0)),
    *(("boft", {"factors": f}, "factors") for f in (0, -1, 1.0, None)),
    *(("boft", {"block_size": b, "factors": f}, "divisible") for b, f in ((4, 4), (2, 5), (6, 1), (16, 2))),
]


@pytest.mark.parametrize("method, options, word", WRONG, ids=str)
def test_options_out_of_range(method, options, word):
    model = Net(16, 16)
    with refused(model, ValueError, method, "query", "16x16", word):
        adapt(model, method, targets=OURS, **options)


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
def test_whole_models_name_the_layer_that_does_not_fit(method, options, words):
    for model in (gpt(), vit()):
        with refused(model, ValueError, *words):
            adapt(model, method, **options)


def test_every_option_of_every_method_is_in_the_table():
    assert {(m, name) for m, options, _ in WRONG for name in options} == {
        (m, name) for m in METHODS for name in options_of(m)}


@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
@pytest.mark.parametrize("method", METHODS)
def test_weights_that_are_not_finite(method, value):
    model = Net(16, 16)
    with torch.no_grad():
        model.value.weight[3, 5] = value
    before = {name: t.nan_to_num(7, 8, 9) for name, t in all_tensors(model).items()}
    with pytest.raises(ValueError, match="^value .*not finite$"):     # not `refused`: nan is not equal to itself
        adapt(model, method, targets=OURS)
    after = {name: t.nan_to_num(7, 8, 9) for name, t in all_tensors(model).items()}
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert not adapters(model) and all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "adaptation")


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_weights_of_less_than_single_precision(method, dtype):
    model = Net(16, 16, dtype)
    with refused(model, ValueError, "query", str(dtype), "float32", "autocast"):
        adapt(model, method, targets=OURS)


def test_there_is_nothing_to_merge():
    model = Net(16, 16)
    with refused(model, ValueError, "nothing to merge"):
        merge(model)


# ---------------------------------------------------------------- what it does


def nested():
    """Made of torch's own containers, where names are numbers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8)))


@pytest.mark.parametrize("method, example", cases())
def test_a_target_is_the_last_part_of_a_name(method, example):
    model, x = nested(), tokens(5, 16, torch.float32)
    expected = model(x)
    with refused(model, ValueError, "2 is no plain nn.Linear but Sequential"):   # "2" is a container here, as well as its last layer
        adapt(model, method, targets=["0", "2"], **parse(example))
    assert adapt(model, method, targets=["0"], **parse(example)) is model
    assert list(adapters(model)) == ["0", "2.0"] and type(model[2][2]) is nn.Linear
    assert_close(model(x), expected, 1e-5)
    moved = move(model)(x)
    assert (moved - expected).abs().max() > 1e-3
    assert_close(merge(model)(x), moved, 1e-5)


def test_shapes_and_names_that_differ():
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


def in_a_dict():
    torch.manual_seed(0)
    return nn.ModuleDict({"encoder": nn.ModuleDict({"proj": nn.Linear(16, 16), "gate": nn.Linear(16, 16, bias=False)}),
                          "decoder": nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(16, 16)}), nn.LayerNorm(16)])})


@pytest.mark.parametrize("method, example", cases())
def test_dicts_and_lists_of_linears(method, example):
    model, x = in_a_dict(), tokens(5, 16, torch.float32)
    plain = in_a_dict()
    assert adapt(model, method, targets=["proj"], **parse(example)) is model
    assert list(adapters(model)) == ["encoder.proj", "decoder.0.proj"]
    assert type(model["encoder"]["gate"]) is nn.Linear
    for name, layer in adapters(model).items():
        assert type(layer) is METHODS[method]
        assert_close(layer(x), plain.get_submodule(name)(x), 1e-5)
    move(model)
    outputs = {name: layer(x) for name, layer in adapters(model).items()}
    merge(model)
    for name, output in outputs.items():
        assert_close(model.get_submodule(name)(x), output, 1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_the_rest_is_frozen(method):
    for model, head in ((gpt(), False), (vit(), True), (Net(16, 16), True), (in_a_dict(), False)):
        targets = ["proj"] if isinstance(model, nn.ModuleDict) else OURS
        adapt(model, method, targets=targets)
        inside = tuple(f"{name}." for name in adapters(model))
        for name, p in model.named_parameters():
            assert p.requires_grad == (name.startswith(inside) or head and name.startswith("head.")), name
        assert (count_trainable(model)["head"] > 0) == head
        for layer in adapters(model).values():
            assert not any(b.requires_grad for b in layer.buffers())


@pytest.mark.parametrize("method, example", cases())
def test_what_draws_nothing_leaves_the_global_generator_alone(method, example):
    """VeRA and svft's random draw from streams of their own; LoRA's and DoRA's A is drawn from the global one."""
    draws = method == "dora" or method == "lora" and "pissa" not in example
    built = []
    for seed in (1, 2):
        model = Net(16, 16)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        adapt(model, method, targets=OURS, **parse(example))
        assert torch.equal(before, torch.get_rng_state()) != draws
        built.append(all_tensors(model))
    same = [torch.equal(built[0][name], built[1][name]) for name in built[0]]
    assert built[0].keys() == built[1].keys() and all(same) != draws


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method, example", cases())
def test_dtype_and_device_follow_the_base(method, example, shape, dtype):
    try:
        model = adapt(Net(*SHAPES[shape], dtype), method, targets=OURS, **parse(example))
    except ValueError:
        assert "topk" in example and shape != "square"
        return
    x = tokens(3, SHAPES[shape][1], dtype)
    for layer in adapters(model).values():
        held = [*layer.parameters(), *(b for b in layer.buffers() if b.is_floating_point())]
        assert {(t.dtype, t.device.type) for t in held} == {(dtype, "cpu")}
        assert layer(x).dtype == layer.weight().dtype == dtype
    moved = model.double().to("meta")                       # and what is kept moves with the module
    for layer in adapters(moved).values():
        held = [*layer.parameters(), *layer.buffers()]
        assert {t.device.type for t in held} == {"meta"} == {layer(x.double().to("meta")).device.type}
        assert {t.dtype for t in held if t.is_floating_point()} == {torch.float64}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method, example", cases())
def test_device_follows_the_base_on_a_gpu(method, example):
    on_cpu, on_gpu = Net(16, 16), Net(16, 16).cuda()
    for model in (on_cpu, on_gpu):
        torch.manual_seed(0)
        adapt(model, method, targets=OURS, **parse(example))
    for layer in adapters(on_gpu).values():
        assert {t.device.type for t in [*layer.parameters(), *layer.buffers()]} == {"cuda"}
    assert_close(on_gpu(tokens(5, 16).cuda()).cpu(), on_cpu(tokens(5, 16)), 1e-10)


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("method", METHODS)
def test_the_mode_stays(method, training):
    model = adapt(Net(16, 16).train(training), method, targets=OURS)
    assert {m.training for m in model.modules()} == {training}
    assert {m.training for m in merge(model).modules()} == {training}


def test_what_was_adapted_is_written_down():
    model = adapt(Net(16, 16), "lora", targets=("query",), rank=4)
    assert {k: v for k, v in model.adaptation.items() if k != "base"} == {
        "method": "lora", "options": {"rank": 4, "alpha": None, "init": "kaiming"}, "targets": ["query"]}


def test_a_merged_model_is_adapted_again():
    model, x = Net(16, 24), tokens(5, 24)
    merge(move(adapt(model, "svft", targets=("query",))))
    expected = model(x)
    adapt(model, "lora", targets=("query", "value"), rank=2)
    assert (model(x) - expected).abs().max() < 1e-10 and count_trainable(model)["adapter"] == 2 * 2 * (16 + 24)
