"""GPT-2's and torchvision's weights: the same outputs here and there, back to the last bit, and what does not fit."""

import math
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
import torchvision
from torchvision.models.vision_transformer import interpolate_embeddings

from small_models import SMALL_GPT, SMALL_VIT, gpt, perturb, pictures, same_tensors, seeded, tokens
from svmini import GPT, ViT, adapt, merge
from svmini.errors import InputError
from svmini.models.published import IMAGENET


def refused(load, state, change, said):
    """load must refuse a changed state dict in one sentence."""
    state = dict(state)
    change(state)
    with pytest.raises(InputError) as error:
        load(state, n_head=3)
    assert said in str(error.value) and "\n" not in str(error.value), error.value


# ---- GPT-2's weights ----

def gpt2_state(n_layer=2, d=12, vocab=31, block=10, dtype=torch.float64):
    """Random weights in GPT-2's naming, written out by hand."""
    shapes = {"wte.weight": (vocab, d), "wpe.weight": (block, d), "ln_f.weight": (d,), "ln_f.bias": (d,)}
    for i in range(n_layer):
        for name, size in (("ln_1", (d,)), ("attn.c_attn", (d, 3 * d)), ("attn.c_proj", (d, d)),
                           ("ln_2", (d,)), ("mlp.c_fc", (d, 4 * d)), ("mlp.c_proj", (4 * d, d))):
            shapes |= {f"h.{i}.{name}.weight": size, f"h.{i}.{name}.bias": size[-1:]}
    g = seeded(1)
    return {k: torch.randn(shape, generator=g, dtype=dtype) * 0.4 for k, shape in shapes.items()}


def gpt2_forward(s, x, n_layer=2, n_head=3):
    """GPT-2 from its own weights, in as few operations as there are."""
    def norm(y, name):
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return y * s[f"{name}.weight"] + s[f"{name}.bias"]

    def conv1d(y, name):
        return y @ s[f"{name}.weight"] + s[f"{name}.bias"]
    T = x.shape[1]
    y = s["wte.weight"][x] + s["wpe.weight"][:T]
    hidden = torch.ones(T, T).triu(1).bool()
    for i in range(n_layer):
        q, k, v = conv1d(norm(y, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").chunk(3, -1)
        heads = []
        for qh, kh, vh in zip(*(part.chunk(n_head, -1) for part in (q, k, v))):
            scores = (qh @ kh.transpose(1, 2) / qh.shape[-1] ** 0.5).masked_fill(hidden, -math.inf)
            heads.append(scores.softmax(-1) @ vh)
        y = y + conv1d(torch.cat(heads, -1), f"h.{i}.attn.c_proj")
        u = conv1d(norm(y, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        u = 0.5 * u * (1 + torch.tanh((2 / math.pi) ** 0.5 * (u + 0.044715 * u ** 3)))
        y = y + conv1d(u, f"h.{i}.mlp.c_proj")
    return norm(y, "ln_f") @ s["wte.weight"].T


def test_gpt_is_gpt2_and_its_weights_return_to_the_last_bit(tmp_path):
    state, x = gpt2_state(), tokens(2, 10)
    model = GPT.from_gpt2(state, n_head=3)
    assert model.config == SMALL_GPT and torch.allclose(model(x), gpt2_forward(state, x), atol=1e-11)
    back = model.to_gpt2()
    prefixed = {f"transformer.{k}": v for k, v in state.items()}
    assert same_tensors(back, prefixed | {"lm_head.weight": state["wte.weight"]})
    assert all(v.is_contiguous() and not v.requires_grad for v in back.values())
    masks = {f"h.{i}.attn.{kind}": torch.ones(1) for i in range(2) for kind in ("bias", "masked_bias")}
    torch.save(state | masks, tmp_path / "weights.pt")
    for source in (back, str(tmp_path / "weights.pt"), {"model": state}):
        assert same_tensors(GPT.from_gpt2(source, n_head=3).state_dict(), model.state_dict())
    half = GPT.from_gpt2(gpt2_state(dtype=torch.float16), n_head=3)
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    model.head.weight = torch.nn.Parameter(model.head.weight + 1)
    with pytest.raises(InputError, match="head.weight differs from token_embedding.weight"):
        model.to_gpt2()


def test_head_is_the_embedding():
    fresh, loaded = gpt(), GPT.from_gpt2(gpt2_state(), n_head=3)
    for model in (fresh, loaded, fresh.double(), loaded.float()):
        assert model.head.weight is model.token_embedding.weight
        block = 12 * 12 * 12 + 13 * 12   # 12 d² in matrices; 9 d in biases, 4 d in LayerNorms
        assert sum(p.numel() for p in model.parameters()) == 31 * 12 + 10 * 12 + 2 * block + 2 * 12
    logits = fresh(tokens(1, 4))
    with torch.no_grad():
        fresh.token_embedding.weight[7] *= 2
    assert not torch.allclose(fresh(tokens(1, 4))[..., 7], logits[..., 7])


@pytest.mark.parametrize("change, said", [
    (lambda s: (s.pop("ln_f.bias"), s.pop("h.1.mlp.c_fc.weight")), "missing ['h.1.mlp.c_fc.weight', 'ln_f.bias']"),
    (lambda s: s.update({"extra": torch.ones(1), "h.1.more": torch.ones(1)}), "surplus ['extra', 'h.1.more']"),
    (lambda s: s.update({"ln_f.bias": torch.ones(3)}), "norm.bias"),
    (lambda s: s.update({"h.0.attn.c_attn.bias": torch.ones(37)}), "blocks.0.attention.query.bias"),
    (lambda s: s.update({"lm_head.weight": s["wte.weight"] + 1}), "lm_head.weight differs")])
def test_gpt2_dict_that_does_not_fit(change, said):
    refused(GPT.from_gpt2, gpt2_state(), change, said)


def test_gpt_is_transformers_gpt2():
    transformers = pytest.importorskip("transformers")
    model = perturb(transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=31, n_positions=10, n_embd=12, n_layer=2, n_head=3)))
    ours, x = GPT.from_gpt2(model.state_dict(), n_head=3), tokens(2, 10)
    assert (ours(x) - model(x).logits).abs().max() < 1e-4
    model.load_state_dict(ours.to_gpt2(), strict=True)


# ---- torchvision's weights ----

def theirs(seed=0, **changes):
    sizes = dict(image_size=12, patch_size=4, num_layers=2, num_heads=3, hidden_dim=12, mlp_dim=20, num_classes=5)
    return perturb(torchvision.models.VisionTransformer(**sizes | changes), seed)


@pytest.mark.parametrize("changes", [{}, dict(image_size=16, patch_size=8, num_heads=2, num_layers=1, mlp_dim=48)])
def test_vit_is_torchvisions_and_its_weights_return_to_the_last_bit(changes):
    model = theirs(**changes)
    ours = ViT.from_torchvision(model.state_dict(), n_head=changes.get("num_heads", 3)).eval()
    x = pictures(4, 3, model.image_size, model.image_size)
    assert model(x).std() > 0.1 and (ours(x) - model(x)).abs().max() < 1e-5
    assert {"mean": ours.config.mean, "std": ours.config.std} == IMAGENET
    assert same_tensors(ours.to_torchvision(), dict(model.state_dict()))


def test_new_head():
    state = theirs().double().state_dict()
    kept, new = ViT.from_torchvision(state, n_head=3), ViT.from_torchvision(state, num_classes=7, n_head=3)
    assert new.config.num_classes == 7 and new.head.weight.shape == (7, 12)
    assert new.head.weight.dtype == torch.float64 and not new.head.weight.any() and not new.head.bias.any()
    rest = [{k: v for k, v in m.state_dict().items() if not k.startswith("head.")} for m in (kept, new)]
    assert same_tensors(*rest)
    for k in ("heads.head.weight", "heads.head.bias"):
        del state[k]
    for num_classes, n in ((7, 7), (None, 1)):
        fresh = ViT.from_torchvision(state, num_classes, n_head=3)
        assert fresh.config.num_classes == n and not fresh(torch.randn(2, 3, 12, 12).double()).any()


@pytest.mark.parametrize("old, new", [(12, 16), (16, 12), (12, 4), (12, 12)])
def test_new_size_is_torchvisions(old, new):
    """Its interpolate_embeddings, on the way from their weights and back."""
    state = theirs(image_size=old).state_dict()
    copy = {k: v.clone() for k, v in state.items()}
    expected = interpolate_embeddings(new, 4, OrderedDict(copy))
    model = ViT.from_torchvision(state, n_head=3).eval()
    assert model.set_input_size(new) is model and model.config == replace(SMALL_VIT, image_size=new, d_mlp=20, **IMAGENET)
    got = model.to_torchvision()
    assert got.keys() == expected.keys() and same_tensors(dict(state), copy), "what was given is left alone"
    for k, v in got.items():
        assert torch.equal(v, copy[k]) if k != "encoder.pos_embedding" else torch.allclose(v, expected[k], atol=1e-6)
    assert model.position_embedding.is_leaf and model.position_embedding.requires_grad
    again = ViT.from_torchvision(state, n_head=3, num_classes=7, image_size=new)
    assert again.config == replace(model.config, num_classes=7)
    assert torch.equal(again.position_embedding, model.position_embedding)


LAYER = "encoder.layers.encoder_layer_1"


@pytest.mark.parametrize("change, said", [
    (lambda s: (s.pop("class_token"), s.pop(f"{LAYER}.ln_1.bias")), f"missing ['class_token', '{LAYER}.ln_1.bias']"),
    (lambda s: s.update({"heads.pre_logits.bias": torch.ones(1)}), "surplus ['heads.pre_logits.bias']"),
    (lambda s: s.pop("heads.head.bias"), "missing ['heads.head.bias']"),
    (lambda s: s.update({"encoder.pos_embedding": torch.ones(1, 9, 12)}), "position_embedding"),
    (lambda s: s.pop("conv_proj.weight"), "no state dict of a ViT")])
def test_torchvision_dict_that_does_not_fit(change, said):
    refused(ViT.from_torchvision, theirs().state_dict(), change, said)


# ---- both ----

@pytest.mark.parametrize("load, back, state", [
    (GPT.from_gpt2, GPT.to_gpt2, gpt2_state()),
    (ViT.from_torchvision, ViT.to_torchvision, dict(theirs().state_dict()))])
def test_nothing_is_shared_with_what_was_given_or_taken(load, back, state):
    copy = {k: v.clone() for k, v in state.items()}
    model = load(state, n_head=3)
    taken = back(model)
    before = {k: v.clone() for k, v in taken.items()}
    perturb(model)
    assert same_tensors(state, copy) and same_tensors(taken, before)
    assert all(p.is_leaf and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("make, back", [(gpt, GPT.to_gpt2), (lambda: perturb(ViT(SMALL_VIT)), ViT.to_torchvision)])
def test_every_tensor_finds_its_place_or_is_named(make, back):
    """A student's gate in the MLP was once left out without a word."""
    model = make()
    for block in model.blocks:
        block.mlp.gate = torch.nn.Linear(12, 48)
    names = [f"blocks.{i}.mlp.gate.{kind}" for i in range(2) for kind in ("bias", "weight")]
    with pytest.raises(InputError) as error:
        back(model)
    assert str(names) in str(error.value) and "missing nothing" in str(error.value)
    model = make()
    model.blocks[1].mlp.down = torch.nn.Identity()
    with pytest.raises(InputError, match=r"for nothing, missing \['blocks.1.mlp.down.bias', 'blocks.1.mlp.down.w"):
        back(model)


@pytest.mark.parametrize("load, make", [
    (GPT.from_gpt2, lambda d: gpt2_state(1, d)),
    (ViT.from_torchvision, lambda d: theirs(hidden_dim=d, num_heads=1, num_layers=1).state_dict())])
def test_heads_are_asked_for_where_the_width_does_not_tell(load, make):
    with pytest.raises(InputError, match="a width of 96 is no multiple of 64.* give n_head"):
        load(make(96))
    assert load(make(96), n_head=1).config.n_head == 1
    assert load(make(128)).config.n_head == 2 and load(make(128), n_head=4).config.n_head == 4
    for n_head in (5, 0):
        with pytest.raises(InputError, match="n_head"):
            load(make(48), n_head=n_head)


def test_adapted_and_merged_it_goes_back_where_it_came_from():
    """And in no other way: adapters have no place there."""
    for load, back, state, x, run in (
            (ViT.from_torchvision, ViT.to_torchvision, theirs().state_dict(), pictures(3, 3, 12, 12),
             lambda s, x: (m := theirs(seed=1)).load_state_dict(s, strict=True) and m(x)),
            (GPT.from_gpt2, GPT.to_gpt2, gpt2_state(), tokens(2, 10),
             lambda s, x: gpt2_forward({k.removeprefix("transformer."): v for k, v in s.items()}, x))):
        model = adapt(load(state, n_head=3), "svft", off_diagonals=2)
        with torch.no_grad():
            for p in model.parameters():
                p += 0.1 * torch.randn(p.shape, generator=seeded(3)) if p.requires_grad else 0
            expected = model.eval()(x)
            with pytest.raises(InputError, match="blocks.0.attention.key.*merge an adapted model first"):
                back(model)
            got = run(back(merge(model)), x)
            assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
            assert (load(state, n_head=3)(x) - expected).abs().max() > 0.1, "it is the adapted model, not the base"
