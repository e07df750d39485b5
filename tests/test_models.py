"""GPT and ViT: equal to GPT-2 and torchvision, weights in and out, generation, and errors that are sentences."""

import math
import sys
import urllib.error
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
import torchvision
from torchvision.models.vision_transformer import interpolate_embeddings

from svmini.gpt import GPT, GPTConfig, gpt2_names
from svmini.transformer import Attention
from svmini.vit import ViT, ViTConfig, torchvision_names, torchvision_urls

SMALL_GPT = GPTConfig(vocab_size=31, block_size=10, n_layer=2, n_head=3, d_model=12)
SMALL_VIT = ViTConfig(image_size=12, patch_size=4, in_channels=3, num_classes=5, n_layer=2, n_head=3, d_model=12)
GPT2_SIZES = {   # layers, heads, width, parameters as published by Hugging Face's models
    "gpt2": (12, 12, 768, 124_439_808), "gpt2-medium": (24, 16, 1024, 354_823_168),
    "gpt2-large": (36, 20, 1280, 774_030_080), "gpt2-xl": (48, 25, 1600, 1_557_611_200)}
VIT_HEADS = {"vit_b_16": 12, "vit_b_32": 12, "vit_l_16": 16, "vit_l_32": 16, "vit_h_14": 16}


def perturb(model, seed=0):
    """Every parameter off its start (zeros and ones hide mistakes); returns the model, ready for evaluation."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g))
    return model.eval()


def gpt(config=SMALL_GPT, seed=0):
    return perturb(GPT(config), seed)


def tokens(*shape, seed=0):
    return torch.randint(SMALL_GPT.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


# ---- attention and blocks ----

@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_softmax_of_scaled_products(causal):
    torch.manual_seed(0)
    attention = Attention(12, 3, causal).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    q, k, v = attention.query(x), attention.key(x), attention.value(x)
    parts = []
    for h in range(3):                                               # head h has the columns 4h to 4h + 3
        at = slice(4 * h, 4 * h + 4)
        scores = q[..., at] @ k[..., at].transpose(1, 2) / math.sqrt(4)
        if causal:
            scores = scores + torch.full((5, 5), -math.inf, dtype=torch.float64).triu(1)
        parts.append(scores.softmax(-1) @ v[..., at])
    assert torch.allclose(attention(x), attention.out(torch.cat(parts, -1)), atol=1e-12)


def test_gpt_looks_back_only_and_at_one_text_only():
    model, x = gpt(), tokens(3, 10)
    logits = model(x)
    changed = x.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 31
    after = model(changed)
    assert torch.equal(logits[:, :6], after[:, :6]) and (logits[:, 6:] != after[:, 6:]).any(-1).all()
    assert torch.allclose(model(x[1:2]), logits[1:2], atol=1e-5)
    assert torch.allclose(model(x[:, :4]), logits[:, :4], atol=1e-5)


def test_vit_sees_the_whole_picture_and_one_only():
    model, x = perturb(ViT(SMALL_VIT)), torch.randn(3, 3, 12, 12)
    logits = model(x)
    assert logits.shape == (3, 5) and torch.allclose(model(x[1:2]), logits[1:2], atol=1e-5)
    for row in (0, 4, 8):
        for column in (0, 4, 8):
            changed = x.clone()
            changed[:, :, row + 1, column + 2] += 1
            assert (model(changed) != logits).any(-1).all()


@pytest.mark.parametrize("make, x", [
    (lambda p: gpt(replace(SMALL_GPT, dropout=p)), tokens(2, 8)),
    (lambda p: perturb(ViT(replace(SMALL_VIT, dropout=p))), torch.ones(2, 3, 12, 12)),
    (lambda p: Attention(12, 3, False, p), torch.ones(2, 5, 12).cumsum(1))])
def test_dropout_acts_in_training_only(make, x):
    model, without = make(0.5), make(0.0).eval()
    without.load_state_dict(model.state_dict())
    model.train()
    assert not torch.allclose(model(x), model(x), atol=1e-3)
    model.eval()
    assert torch.equal(model(x), model(x)) and torch.equal(model(x), without(x))
    without.train()
    assert torch.equal(without(x), without(x))


def test_start():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=500, block_size=64, n_layer=4, n_head=4, d_model=64))
    wide = 0.02 * 12 ** 0.5      # GPT-2's 0.02 at its width 768, here 64
    for block in model.blocks:   # the maps that end in the residual stream start smaller, by the root of 2 * 4
        for part, std in ((block.attention.query, wide), (block.attention.out, wide / 8 ** 0.5),
                          (block.mlp.up, wide), (block.mlp.down, wide / 8 ** 0.5)):
            assert part.weight.std().item() == pytest.approx(std, rel=0.1) and not part.bias.any()
    assert model.token_embedding.weight.std().item() == pytest.approx(wide, rel=0.1)
    assert not perturb(ViT(SMALL_VIT)).new_head(4)(torch.randn(2, 3, 12, 12)).any(), "a fresh head says nothing"


# ---- GPT-2's weights ----

def gpt2_state(n_layer=2, d=12, vocab=31, block=10, dtype=torch.float64):
    """Random weights in GPT-2's naming, written out by hand."""
    shapes = {"wte.weight": (vocab, d), "wpe.weight": (block, d), "ln_f.weight": (d,), "ln_f.bias": (d,)}
    for i in range(n_layer):
        for name, size in (("ln_1", (d,)), ("attn.c_attn", (d, 3 * d)), ("attn.c_proj", (d, d)),
                           ("ln_2", (d,)), ("mlp.c_fc", (d, 4 * d)), ("mlp.c_proj", (4 * d, d))):
            shapes |= {f"h.{i}.{name}.weight": size, f"h.{i}.{name}.bias": size[-1:]}
    g = torch.Generator().manual_seed(1)
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
    for source in (back, state | masks, tmp_path / "weights.pt", str(tmp_path / "weights.pt")):
        assert same_tensors(GPT.from_gpt2(source, n_head=3).state_dict(), model.state_dict())


def test_published_half_precision_is_computed_in_single():
    state = gpt2_state(dtype=torch.float16)
    model = GPT.from_gpt2(state, n_head=3)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.token_embedding.weight, state["wte.weight"].float())


def test_gpt_shares_nothing_with_what_it_was_given():
    given = gpt2_state()
    copy = {k: v.clone() for k, v in given.items()}
    model = GPT.from_gpt2(given, n_head=3)
    taken = model.to_gpt2()
    before = {k: v.clone() for k, v in taken.items()}
    perturb(model)
    assert same_tensors(given, copy) and same_tensors(taken, before)
    assert all(p.is_leaf and p.requires_grad for p in model.parameters())


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


def test_gpt2_dict_that_does_not_fit():
    def refused(change, *said):
        state = gpt2_state()
        change(state)
        with pytest.raises(ValueError) as error:
            GPT.from_gpt2(state, n_head=3)
        assert all(s in str(error.value) for s in said) and "\n" not in str(error.value)
    refused(lambda s: (s.pop("ln_f.bias"), s.pop("h.1.mlp.c_fc.weight")),
            "missing", "ln_f.bias", "h.1.mlp.c_fc.weight")
    refused(lambda s: s.update({"extra": torch.ones(1), "h.1.more": torch.ones(1)}), "surplus", "extra", "h.1.more")
    refused(lambda s: s.update({"ln_f.bias": torch.ones(3), "h.1.mlp.c_fc.weight": torch.ones(48, 12)}),
            "norm.bias is (3,) and should be (12,)", "blocks.1.mlp.up.weight is (12, 48) and should be (48, 12)")
    refused(lambda s: s.update({"h.0.attn.c_attn.bias": torch.ones(37)}), "h.0.attn.c_attn.bias", "3 parts")
    refused(lambda s: s.update({"wte.weight": torch.ones(31)}), "no GPT-2 state dict", "wte.weight")
    refused(lambda s: [s.pop(k) for k in list(s) if "c_attn" in k], "no GPT-2 state dict", "h.0.attn.c_attn.weight")
    refused(lambda s: s.update({"lm_head.weight": s["wte.weight"] + 1}), "lm_head.weight", "wte.weight")
    with pytest.raises(ValueError, match="no GPT-2 state dict"):
        GPT.from_gpt2(ViT(SMALL_VIT).to_torchvision())
    for n_head in (5, 0):
        with pytest.raises(ValueError, match="n_head"):
            GPT.from_gpt2(gpt2_state(), n_head=n_head)


# ---- sources ----

def test_sources_that_are_no_weights(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="neither a file nor one of gpt2, gpt2-medium, gpt2-large, gpt2-xl"):
        GPT.from_gpt2("gpt3")
    with pytest.raises(FileNotFoundError, match="neither a file nor one of vit_b_16"):
        ViT.from_torchvision(tmp_path)
    (tmp_path / "a.txt").write_text("A text,\nof two lines.\n", encoding="utf-8")
    (tmp_path / "empty.pt").touch()
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    torch.save({"model": {}}, tmp_path / "other.pt")
    for name, said in (("a.txt", "no file of weights"), ("empty.pt", "no file of weights"),
                       ("list.pt", "holds a list"), ("other.pt", "is no .* state dict")):
        for load in (GPT.from_gpt2, ViT.from_torchvision):
            with pytest.raises(ValueError, match=said) as error:
                load(tmp_path / name)
            assert "\n" not in str(error.value)
    (tmp_path / "x.safetensors").touch()
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)   # makes the import fail
    with pytest.raises(ValueError, match="pip install safetensors"):
        GPT.from_gpt2(tmp_path / "x.safetensors")


def test_downloads(monkeypatch):
    def fail(error):
        def load(url, **options):
            raise error
        monkeypatch.setattr(torch.hub, "load_state_dict_from_url", load)
    fail(urllib.error.URLError("no route\nto host"))
    for load, name, part in ((GPT.from_gpt2, "gpt2-xl", "gpt2-xl/resolve/main/pytorch_model.bin"),
                             (ViT.from_torchvision, "vit_l_16", "vit_l_16-")):
        with pytest.raises(FileNotFoundError) as error:
            load(name)
        said = str(error.value)
        assert "\n" not in said and "cannot download https://" in said and part in said and "no route to host" in said
        assert f"'{name}'" in said and torch.hub.get_dir() in said
    fail(urllib.error.URLError("gone"))
    kept = torchvision_urls()["vit_b_16"].rsplit("/", 1)[-1]
    with pytest.raises(FileNotFoundError, match=f"checkpoints/{kept}$"):   # where torchvision itself keeps it
        ViT.from_torchvision("vit_b_16")
    fail(EOFError("Ran out of input"))   # what was downloaded before has been cut
    with pytest.raises(ValueError, match="gpt2-pytorch_model.bin is damaged .* delete it"):
        GPT.from_gpt2("gpt2")
    state, asked = gpt2_state(), []
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **o: asked.append((url, o)) or state)
    assert GPT.from_gpt2("gpt2", n_head=3).config == SMALL_GPT
    [(url, options)] = asked
    assert url == "https://huggingface.co/gpt2/resolve/main/pytorch_model.bin"
    assert options == {"map_location": "cpu", "weights_only": True, "file_name": "gpt2-pytorch_model.bin"}


# ---- torchvision's weights ----

def theirs(seed=0, **changes):
    sizes = dict(image_size=12, patch_size=4, num_layers=2, num_heads=3, hidden_dim=12, mlp_dim=20, num_classes=5)
    return perturb(torchvision.models.VisionTransformer(**sizes | changes), seed)


@pytest.mark.parametrize("changes", [{}, dict(image_size=16, patch_size=8, num_heads=2, num_layers=1, mlp_dim=48)])
def test_vit_is_torchvisions_and_its_weights_return_to_the_last_bit(changes, tmp_path):
    model = theirs(**changes)
    ours = ViT.from_torchvision(model.state_dict(), n_head=changes.get("num_heads", 3)).eval()
    x = torch.randn(4, 3, model.image_size, model.image_size, generator=torch.Generator().manual_seed(2))
    assert model(x).std() > 0.1 and (ours(x) - model(x)).abs().max() < 1e-5
    back = ours.to_torchvision()
    assert same_tensors(back, dict(model.state_dict()))
    other = theirs(seed=1, **changes)
    assert not torch.equal(other(x), model(x))
    other.load_state_dict(back, strict=True)
    assert torch.equal(other(x), model(x))
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    loaded = ViT.from_torchvision(tmp_path / "vit.pth", n_head=ours.config.n_head)
    assert loaded.config == ours.config and same_tensors(loaded.state_dict(), ours.state_dict())


def test_vit_shares_nothing_with_what_it_was_given():
    given = theirs().state_dict()
    copy = {k: v.clone() for k, v in given.items()}
    model = ViT.from_torchvision(given, n_head=3)
    taken = model.to_torchvision()
    perturb(model)
    assert same_tensors(dict(given), copy) and same_tensors(taken, copy)
    assert all(p.is_leaf and p.requires_grad for p in model.parameters())


def test_new_head():
    state = theirs().double().state_dict()
    kept, new = ViT.from_torchvision(state, n_head=3), ViT.from_torchvision(state, num_classes=7, n_head=3)
    assert new.config.num_classes == 7 and new.head.weight.shape == (7, 12)
    assert new.head.weight.dtype == torch.float64 and not new.head.weight.any() and not new.head.bias.any()
    assert new(torch.randn(2, 3, 12, 12, dtype=torch.float64)).shape == (2, 7)
    rest = [{k: v for k, v in m.state_dict().items() if not k.startswith("head.")} for m in (kept, new)]
    assert same_tensors(*rest)
    config = replace(SMALL_VIT)
    ViT(config).new_head(9)
    assert config.num_classes == 5, "the caller's configuration is left alone"
    for wrong in (0, -1, 2.0):
        with pytest.raises(ValueError, match="num_classes must be a whole number of at least 1"):
            new.new_head(wrong)


@pytest.mark.parametrize("old, new", [(12, 16), (16, 12), (12, 32), (12, 4), (12, 12)])
def test_new_size_is_torchvisions(old, new):
    """Its interpolate_embeddings, on the way from their weights and back."""
    state = theirs(image_size=old).state_dict()
    copy = {k: v.clone() for k, v in state.items()}
    expected = interpolate_embeddings(new, 4, OrderedDict(copy))
    model = ViT.from_torchvision(state, n_head=3).eval()
    assert model.new_size(new) is model and model.config == replace(SMALL_VIT, image_size=new, d_mlp=20)
    got = model.to_torchvision()
    assert got.keys() == expected.keys()
    for k, v in got.items():
        assert torch.equal(v, copy[k]) if k != "encoder.pos_embedding" else torch.allclose(v, expected[k], atol=1e-6)
    assert same_tensors(dict(state), copy), "what was given is left alone"
    assert model.position_embedding.is_leaf and model.position_embedding.requires_grad
    with_it = theirs(seed=1, image_size=new)
    with_it.load_state_dict(expected)
    x = torch.randn(2, 3, new, new, generator=torch.Generator().manual_seed(2))
    assert (model(x) - with_it(x)).abs().max() < 1e-5
    if new != old:
        with pytest.raises(ValueError, match=rf"this ViT takes \(B, 3, {new}, {new}\)"):
            model(torch.zeros(2, 3, old, old))
    again = ViT.from_torchvision(state, n_head=3, num_classes=7, image_size=new)
    assert again.config == replace(model.config, num_classes=7)
    assert torch.equal(again.position_embedding, model.position_embedding)


def test_a_size_that_cannot_be_is_refused_and_changes_nothing():
    config = replace(SMALL_VIT)
    model = ViT(config)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="image_size=14 is not divisible by patch_size=4: the patches must tile"):
        model.new_size(14)
    for wrong in (0, -4, 8.0, "8"):
        with pytest.raises(ValueError, match="image_size must be a whole number of at least 1"):
            model.new_size(wrong)
    assert model.config == config and same_tensors(model.state_dict(), before)
    with pytest.raises(ValueError, match="not divisible"):
        ViT.from_torchvision(theirs().state_dict(), n_head=3, image_size=14)
    model.new_size(8)
    assert config.image_size == 12, "the caller's configuration is left alone"


def test_torchvision_dict_that_does_not_fit():
    def refused(change, *said):
        state = dict(theirs().state_dict())
        change(state)
        with pytest.raises(ValueError) as error:
            ViT.from_torchvision(state, n_head=3)
        assert all(s in str(error.value) for s in said) and "\n" not in str(error.value)
    layer = "encoder.layers.encoder_layer_1"
    refused(lambda s: (s.pop("class_token"), s.pop(f"{layer}.ln_1.bias")),
            "missing", "class_token", f"{layer}.ln_1.bias")
    refused(lambda s: s.update({"heads.pre_logits.bias": torch.ones(1)}), "surplus", "heads.pre_logits.bias")
    refused(lambda s: s.update({"class_token": torch.ones(1, 12), f"{layer}.ln_1.bias": torch.ones(3)}),
            "class_token is (1, 12) and should be (1, 1, 12)", "blocks.1.norm1.bias is (3,) and should be (12,)")
    refused(lambda s: s.update({"encoder.pos_embedding": torch.ones(1, 9, 12)}), "position_embedding is (1, 9, 12)")
    refused(lambda s: s.update({"conv_proj.weight": torch.ones(12)}), "no torchvision", "conv_proj.weight")
    refused(lambda s: [s.pop(k) for k in list(s) if "layer_" in k], "no torchvision", "encoder_layer_0")


# ---- published sizes, without memory ----

@pytest.mark.parametrize("name", GPT2_SIZES)
def test_published_gpt2(name):
    n_layer, n_head, d, count = GPT2_SIZES[name]
    with torch.device("meta"):
        model = GPT(GPTConfig(50257, 1024, n_layer, n_head, d))
    assert sum(p.numel() for p in model.parameters()) == count
    state = model.to_gpt2()
    assert len(state) == len(gpt2_names(n_layer)) + 1 == 12 * n_layer + 5
    del state["lm_head.weight"]
    assert GPT.from_gpt2(state).config == model.config, "heads included, which the weights do not tell"
    assert state[f"transformer.h.{n_layer - 1}.attn.c_attn.weight"].shape == (d, 3 * d)


@pytest.mark.parametrize("name", VIT_HEADS)
def test_published_vit(name):
    weights = torchvision.models.get_model_weights(name).DEFAULT
    assert torchvision_urls()[name] == weights.url
    with torch.device("meta"):
        model = torchvision.models.get_model(name, image_size=weights.meta["min_size"][0])
    state = model.state_dict()
    assert state.keys() == {key for key, _, _ in torchvision_names(len(model.encoder.layers))}
    ours = ViT.from_torchvision(state)
    assert ours.config.n_head == VIT_HEADS[name] == model.encoder.layers[0].num_heads
    assert ours.config.image_size == weights.meta["min_size"][0]
    assert sum(p.numel() for p in ours.parameters()) == weights.meta["num_params"]
    assert {k: v.shape for k, v in ours.to_torchvision().items()} == {k: v.shape for k, v in state.items()}


def test_gpt_is_transformers_gpt2():
    transformers = pytest.importorskip("transformers")
    model = perturb(transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=31, n_positions=10, n_embd=12, n_layer=2, n_head=3)))
    ours, x = GPT.from_gpt2(model.state_dict(), n_head=3), tokens(2, 10)
    assert (ours(x) - model(x).logits).abs().max() < 1e-4
    model.load_state_dict(ours.to_gpt2(), strict=True)


# ---- configurations and inputs ----

@pytest.mark.parametrize("config", [SMALL_GPT, SMALL_VIT])
def test_wrong_sizes_are_said(config):
    sizes = {name for name, value in vars(config).items() if name != "dropout"}
    for name in sizes:
        for value in (0, -3, 2.0, True, "4"):
            with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, not {value!r}"):
                replace(config, **{name: value})
    with pytest.raises(ValueError, match="d_model=12 is not divisible by n_head=5"):
        replace(config, n_head=5)
    for value in (-0.1, 1, 1.5, math.nan, "0.1", None):
        with pytest.raises(ValueError, match="dropout must be a number in"):
            replace(config, dropout=value)


def test_patches_must_tile_the_image():
    with pytest.raises(ValueError, match="image_size=12 is not divisible by patch_size=5"):
        replace(SMALL_VIT, patch_size=5)
    assert ViTConfig(12, 4, 3, 5, 2, 3, 12).d_mlp == 48


def test_wrong_inputs_are_said():
    vit, model = ViT(SMALL_VIT), gpt()
    for shape in ((2, 1, 12, 12), (2, 3, 16, 16), (2, 3, 12, 8), (3, 12, 12)):
        with pytest.raises(ValueError, match=r"this ViT takes \(B, 3, 12, 12\)"):
            vit(torch.zeros(shape))
    assert model(tokens(1, 10)).shape == (1, 10, 31)
    with pytest.raises(ValueError, match="11 tokens do not fit .* block_size=10"):
        model(tokens(1, 11))
    for at in (torch.tensor([1]), torch.zeros(2, 1, dtype=torch.int64)):
        with pytest.raises(ValueError, match="at of shape .* one position for each of 2 rows"):
            model(tokens(2, 4), at=at)


# ---- generation ----

def test_logits_at_one_position_of_each_row():
    model, x, at = gpt(), tokens(4, 10), torch.tensor([9, 0, 4, 7])
    expected = torch.stack([model(x)[i, t] for i, t in enumerate(at)])
    assert expected.shape == (4, 31) and (model(x, at=at) - expected).abs().max() < 1e-12

def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_greedy_takes_the_likeliest():
    model, x = gpt(), tokens(3, 4)
    out = model.generate(x, 5, temperature=0)
    assert out.shape == (3, 9) and torch.equal(out[:, :4], x)
    for t in range(4, 9):
        assert torch.equal(out[:, t], model(out[:, :t])[:, -1].argmax(-1))
    assert torch.equal(model.generate(x, 5, top_k=1, generator=seeded(0)), out)
    assert torch.equal(model.generate(x, 0), x)


@pytest.mark.parametrize("temperature, top_k", [(1.0, None), (2.0, None), (1.0, 3), (0.5, 4), (1.0, 1000)])
def test_sampling_follows_the_probabilities(temperature, top_k):
    model, n = gpt(), 4000
    with torch.no_grad():
        logits = model(tokens(1, 4))[0, -1] / temperature
    if top_k is not None and top_k < 31:
        logits[logits.argsort(descending=True)[top_k:]] = -math.inf
    p = logits.softmax(-1)
    drawn = model.generate(tokens(1, 4).expand(n, -1), 1, temperature, top_k, seeded(3))[:, -1]
    shares = drawn.bincount(minlength=31) / n
    assert ((shares - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1e-6).all()


def test_generator_is_its_own():
    model, x = gpt(), tokens(2, 3)
    before = torch.get_rng_state()
    one, same, other = (model.generate(x, 12, temperature=5.0, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(before, torch.get_rng_state()), "the global generator is left alone"


def test_what_lies_too_far_back_is_not_seen():
    model, x = gpt(), tokens(2, 25)
    for temperature in (0, 1.0):
        out = model.generate(x, 6, temperature, generator=seeded(0))
        assert out.shape == (2, 31) and torch.equal(out[:, :25], x)
        assert torch.equal(out[:, 15:], model.generate(x[:, -10:], 6, temperature, generator=seeded(0)))


@pytest.mark.parametrize("training", [True, False])
def test_generate_leaves_the_mode_as_it_was(training):
    model, x = gpt(replace(SMALL_GPT, dropout=0.5)), tokens(1, 3)
    expected = model.generate(x, 8, temperature=0)
    model.train(training)
    assert torch.equal(model.generate(x, 8, temperature=0), expected), "no dropout meanwhile"
    assert model.training is training and not expected.requires_grad
    with pytest.raises(IndexError):
        model.generate(torch.tensor([[31]]), 1)   # no such token
    assert all(part.training is training for part in model.modules())


def test_wrong_generation_is_said():
    model = gpt()
    for empty in (torch.zeros(1, 0, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)):
        with pytest.raises(ValueError, match="a prompt is"):
            model.generate(empty, 1)
    with pytest.raises(ValueError, match="temperature must be 0"):
        model.generate(tokens(1, 2), 1, temperature=-1)
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        model.generate(tokens(1, 2), 1, top_k=0)
