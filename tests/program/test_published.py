"""Published weights: svmini computes what the published models compute, converts back exactly, and names what fails."""

import copy
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
import torchvision
from torchvision.models.vision_transformer import interpolate_embeddings

from published_states import as_hugging_face, gpt2_forward, gpt2_state, timm_state, vit_features
from helpers import SMALL_GPT, SMALL_VIT, assert_close, move, noise, refused, same, small_gpt, small_vit, tokens
from svmini import GPT, ViT, ViTConfig, adapt
from svmini.model_file import load_model, save_model
from svmini.models.published import IMAGENET

HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3}


def torchvision_vit(**changes):
    sizes = dict(image_size=12, patch_size=4, num_layers=2, num_heads=3, hidden_dim=12, mlp_dim=20, num_classes=5)
    return move(torchvision.models.VisionTransformer(**sizes | changes), 0.3).eval()


STATES = {   # a state dict in each format, made when a test asks for it
    "GPT-2": (GPT, gpt2_state),
    "torchvision": (ViT, lambda: dict(torchvision_vit().state_dict())),
    "timm": (ViT, timm_state),
    "Hugging Face ViT": (ViT, lambda: as_hugging_face(timm_state(scales=False), dinov2=False)),
    "Hugging Face DINOv2": (ViT, lambda: as_hugging_face(timm_state(), dinov2=True)),
}


# ---- the same outputs ----

def test_gpt_computes_what_gpt2_computes_and_its_weights_convert_back_exactly(tmp_path):
    state, x = gpt2_state(), tokens(2, 10)
    model = GPT.from_pretrained(state, n_head=3)
    assert model.config == SMALL_GPT and torch.allclose(model(x), gpt2_forward(state, x), atol=1e-11)
    back = model.to_gpt2()
    prefixed = {f"transformer.{k}": v for k, v in state.items()}
    assert same(back, prefixed | {"lm_head.weight": state["wte.weight"]})
    assert all(v.is_contiguous() and not v.requires_grad for v in back.values())
    masks = {f"h.{i}.attn.{kind}": torch.ones(1) for i in range(2) for kind in ("bias", "masked_bias")}
    torch.save(state | masks, tmp_path / "weights.pt")
    for source in (back, str(tmp_path / "weights.pt"), {"model": state}, {"state_dict": state}):
        assert same(GPT.from_pretrained(source, n_head=3).state_dict(), model.state_dict())
    assert model.float().head.weight is model.token_embedding.weight, "tied"
    model.head.weight = torch.nn.Parameter(model.head.weight + 1)
    with refused("head.weight differs from token_embedding.weight"):
        model.to_gpt2()


@pytest.mark.parametrize("changes", [{}, dict(image_size=16, patch_size=8, num_heads=2, num_layers=1, mlp_dim=48)])
def test_vit_computes_what_torchvisions_computes_and_its_weights_convert_back_exactly(changes):
    model = torchvision_vit(**changes)
    ours = ViT.from_pretrained(model.state_dict(), n_head=changes.get("num_heads", 3)).eval()
    x = noise(4, 3, model.image_size, model.image_size)
    assert model(x).std() > 0.1 and (ours(x) - model(x)).abs().max() < 1e-5
    assert {"mean": ours.config.mean, "std": ours.config.std} == IMAGENET
    assert same(ours.to_torchvision(), dict(model.state_dict()))


@pytest.mark.parametrize("convert, scales, rule, options", [
    (lambda s: s, True, "timm", IMAGENET), (lambda s: s, False, "timm", IMAGENET),
    (lambda s: s | {"mask_token": torch.ones(1, 12)}, True, "dino", IMAGENET),
    (lambda s: as_hugging_face(s, False), False, "huggingface", HALF | {"layer_norm_eps": 1e-12}),
    (lambda s: as_hugging_face(s, False, "vit.") | {"vit.pooler.dense.bias": torch.ones(12)}, False, "huggingface",
     HALF | {"layer_norm_eps": 1e-12}),
    (lambda s: as_hugging_face(s, True) | {"embeddings.mask_token": torch.ones(1, 12)}, True, "huggingface", IMAGENET),
    (lambda s: as_hugging_face(s, True, "dinov2."), True, "huggingface", IMAGENET)])
@pytest.mark.parametrize("classes", [5, 0])
def test_vit_computes_what_the_published_model_computes(convert, scales, rule, options, classes, capsys):
    """Compared with a forward pass that is written out. classes=0: without a classifier, the features are compared."""
    state, x = timm_state(classes=classes, scales=scales), noise(4, 3, 12, 12).double()
    theirs = convert(state)
    model = ViT.from_pretrained(theirs, n_head=2)
    assert model.config == ViTConfig(12, 4, 3, classes or 1, 2, 2, 12, 20, position_interpolation=rule, **options)
    features = vit_features(state, x, eps=model.config.layer_norm_eps)
    if classes:
        expected = features @ state["head.weight"].T + state["head.bias"]
        assert (model(x) - expected).abs().max() < 1e-11 and expected.std() > 0.1
    else:
        model.head = torch.nn.Identity()
        assert (model(x) - features).abs().max() < 1e-11
    assert ("the pooler of these weights is left out" in capsys.readouterr().out) is ("vit.pooler.dense.bias" in theirs)


@pytest.mark.parametrize("name, options", [("ViTModel", {"intermediate_size": 20}), ("Dinov2Model", {})])
def test_vit_computes_what_transformers_computes_at_any_size(name, options, tmp_path):
    """From its files and from its state dict, whose keys differ since transformers 5."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, name.replace("Model", "Config"))(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=3, image_size=12, patch_size=4, **options)
    model = move(getattr(transformers, name)(config), 0.3).eval()
    model.save_pretrained(tmp_path)
    at_any_size = {} if "Dino" in name else {"interpolate_pos_encoding": True}
    for source in (tmp_path / "model.safetensors", model.state_dict()):
        for size in (12, 20):
            ours, x = ViT.from_pretrained(source, n_head=3, image_size=size).eval(), noise(4, 3, size, size)
            ours.head = torch.nn.Identity()
            assert_close(ours(x), model(x, **at_any_size).last_hidden_state[:, 0])


@pytest.mark.parametrize("scales", [None, 0.1])
def test_vit_computes_what_timms_computes_at_any_size(scales):
    timm = pytest.importorskip("timm")
    model = move(timm.models.VisionTransformer(img_size=12, patch_size=4, embed_dim=12, depth=2, num_heads=3, num_classes=5,
                                               init_values=scales, dynamic_img_size=True), 0.3).eval()
    for size in (12, 8, 20):
        ours, x = ViT.from_pretrained(model.state_dict(), n_head=3, image_size=size).eval(), noise(4, 3, size, size)
        assert_close(ours(x), model(x))


# ---- what from_pretrained can change ----

@pytest.mark.parametrize("name", [name for name in STATES if name != "GPT-2"])
def test_a_new_classifier_and_another_image_size(name):
    state = {k: v.double() for k, v in STATES[name][1]().items()}
    kept, new = ViT.from_pretrained(state, n_head=3), ViT.from_pretrained(state, 7, n_head=3, image_size=20)
    assert new.config == replace(kept.config, num_classes=7, image_size=20) and new.head.weight.shape == (7, 12)
    assert new.head.weight.dtype == torch.float64 and not new.head.weight.any() and not new.head.bias.any()
    assert same(kept.set_input_size(20).state_dict() | {"head.weight": 0, "head.bias": 0},
                new.state_dict() | {"head.weight": 0, "head.bias": 0})
    headless = {k: v for k, v in state.items() if not k.startswith(("head", "classifier"))}
    for num_classes, n in ((7, 7), (None, 1)):
        fresh = ViT.from_pretrained(headless, num_classes, n_head=3)
        assert fresh.config.num_classes == n and not fresh.head.weight.any()


@pytest.mark.parametrize("name", STATES)
def test_half_precision_becomes_float32_with_the_same_values(name):
    cls, make = STATES[name]
    for dtype in (torch.float16, torch.bfloat16):
        state = {k: v.to(dtype) for k, v in make().items()}
        exact = cls.from_pretrained({k: v.float() for k, v in state.items()}, n_head=3)
        assert same(cls.from_pretrained(state, n_head=3).state_dict(), exact.state_dict())


def test_images_of_one_channel_have_mean_and_std_one_half():
    config = ViT.from_pretrained(timm_state(channels=1), n_head=2).config
    assert config.mean == config.std == (0.5,)


# ---- position embeddings at another image size ----

@pytest.mark.parametrize("rule, expected", [
    ("timm", (0, 1.7591291666, 2.1775906086, 2.1891422272, 2.0194926262)),
    ("huggingface", (0, 0.4990234375, 3.9384765625, 1.8521575928, 3.4962005615)),   # centers at 5/2 (i + 0.5) - 0.5
    ("dino", (0, 0.7010199428, 3.9160683155, 2.3981986046, 3.9861500263))])         # at 5/2.1 (i + 0.5) - 0.5
def test_position_embeddings_are_resampled_where_the_rule_says(rule, expected):
    """timm: values of resample_abs_pos_embed in timm 1.0.31; the others: a bicubic kernel (a = -0.75) written out."""
    model = ViT(replace(SMALL_VIT, image_size=20, d_model=3, position_interpolation=rule))
    model.position_embedding.data = (torch.arange(26.0) ** 2 % 7).view(1, 26, 1).expand(-1, -1, 3)
    got = model.set_input_size(8).position_embedding
    assert torch.allclose(got[0, :, 1], torch.tensor(expected), atol=1e-6) and got.is_leaf and got.requires_grad


@pytest.mark.parametrize("new", [16, 8, 12])
def test_position_embeddings_are_those_of_torchvision(new):
    state = dict(torchvision_vit().state_dict())
    expected = interpolate_embeddings(new, 4, OrderedDict(copy.deepcopy(state)))["encoder.pos_embedding"]
    model = ViT.from_pretrained(state, n_head=3)
    assert model.set_input_size(new) is model and model.config.image_size == new
    assert_close(model.position_embedding, expected)
    state["encoder.pos_embedding"] = model.position_embedding.detach()
    assert same(model.to_torchvision(), state), "all else is unchanged"


def test_the_rule_of_the_origin_is_kept_in_model_files_and_in_half_precision(tmp_path):
    model = ViT.from_pretrained(timm_state(dtype=torch.float32), n_head=2)
    save_model(tmp_path / "m.pt", model.bfloat16(), {})
    again = load_model(tmp_path / "m.pt", ViT)[0]
    assert again.config == model.config and {p.dtype for p in again.parameters()} == {torch.bfloat16}
    x, expected = noise(2, 3, 24, 24), model.float().set_input_size(24).position_embedding
    assert torch.equal(again.set_input_size(24).position_embedding, expected.bfloat16())
    assert (again(x) - model(x)).abs().max() < 0.05 * model(x).abs().max(), "float32 images are converted"


# ---- what does not fit ----

@pytest.mark.parametrize("name, change, message", [
    ("GPT-2", lambda s: (s.pop("ln_f.bias"), s.pop("h.1.mlp.c_fc.weight")),
     "missing ['h.1.mlp.c_fc.weight', 'ln_f.bias']"),
    ("GPT-2", lambda s: s.update({"extra": torch.ones(1), "h.1.more": torch.ones(1)}), "surplus ['extra', 'h.1.more']"),
    ("GPT-2", lambda s: s.update({"wte.weight": torch.ones(31)}), "token_embedding.weight has the shape (31,)"),
    ("GPT-2", lambda s: s.update({"lm_head.weight": s["wte.weight"] + 1}), "lm_head.weight differs"),
    ("GPT-2", lambda s: s.pop("wte.weight"), "not a state dict of a GPT-2"),
    ("torchvision", lambda s: s.pop("heads.head.bias"), "missing ['heads.head.bias']"),
    ("torchvision", lambda s: s.update({"encoder.pos_embedding": torch.ones(1, 9, 12)}), "position_embedding"),
    ("torchvision", lambda s: s.pop("class_token"), "this ViT has no class token, which svmini does not support"),
    ("timm", lambda s: s.update({"blocks.1.ls2.gamma": torch.ones(3)}), "blocks.1.ls2 has the shape (3,)"),
    ("timm", lambda s: s.update({"blocks.1.mlp.fc2.weight": torch.ones(12, 1)}), "blocks.1.mlp.down.weight"),
    ("timm", lambda s: s.update({"norm.bias": 3}), "norm.bias is not a tensor of floating-point weights"),
    ("timm", lambda s: s.update({"norm.bias": torch.ones(12, dtype=torch.int8)}), "norm.bias is not a tensor of"),
    ("timm", lambda s: s.update({f"blocks.{i}.mlp.fc2.weight": torch.ones(12, 10) for i in range(2)}),   # packed: half
     "this ViT has a SwiGLU MLP, which svmini does not support"),
    ("Hugging Face ViT", lambda s: s.pop("layernorm.bias"), "missing ['layernorm.bias']"),
    ("Hugging Face DINOv2", lambda s: s.update({"classifier.weight": torch.ones(5, 24)}), "head.weight"),
    *(("Hugging Face DINOv2" if key.startswith("e") else "timm", lambda s, key=key: s.update({key: torch.ones(1)}),
       f"this ViT has {what}") for key, what in (
        ("reg_token", "register tokens"), ("embeddings.register_tokens", "register tokens"),
        ("dist_token", "a distillation token"), ("embeddings.distillation_token", "a distillation token"),
        ("blocks.0.attn.q_norm.weight", "qk_norm"), ("fc_norm.weight", "fc_norm"),
        ("blocks.0.mlp.w12.weight", "a SwiGLU MLP"), ("encoder.layer.0.mlp.weights_in.weight", "a SwiGLU MLP")))])
def test_a_state_dict_that_does_not_fit(name, change, message):
    cls, make = STATES[name]
    state = make()
    change(state)
    with refused(message):
        cls.from_pretrained(state, n_head=3)


@pytest.mark.parametrize("cls, make", [(GPT, lambda d: gpt2_state(1, d)), (ViT, lambda d: timm_state(1, d))])
def test_n_head_is_asked_for_if_the_width_does_not_tell(cls, make):
    with refused("the width 96 is not a multiple of 64", "give n_head"):
        cls.from_pretrained(make(96))
    assert [cls.from_pretrained(make(128), n_head=n).config.n_head for n in (None, 4)] == [2, 4]
    with refused("n_head"):
        cls.from_pretrained(make(48), n_head=0)


# ---- there and back ----

@pytest.mark.parametrize("name", STATES)
def test_nothing_is_shared_with_the_source_or_the_converted_weights(name):
    cls, make = STATES[name]
    model = cls.from_pretrained(state := make(), n_head=3)
    taken = model.to_gpt2() if cls is GPT else model.to_torchvision()
    before = copy.deepcopy((state, taken))
    move(model)
    assert same((state, taken), before)
    assert all(p.is_leaf and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("make, back", [(small_gpt, GPT.to_gpt2), (small_vit, ViT.to_torchvision)])
def test_every_tensor_is_converted_or_named(make, back):
    """A student's gate in the MLP was once left out without a word."""
    model = make()
    for block in model.blocks:
        block.mlp.gate = torch.nn.Linear(12, 48)
    names = [f"blocks.{i}.mlp.gate.{kind}" for i in range(2) for kind in ("bias", "weight")]
    with refused(f"no place for {names}", "missing nothing"):
        back(model)
    with refused("no place for ", "blocks.0.attention.key", "merge an adapted model first"):
        back(adapt(make(), "svft"))
    model = make()
    model.blocks[1].mlp.down = torch.nn.Identity()
    with refused("for nothing, missing ['blocks.1.mlp.down.bias', 'blocks.1.mlp.down.w"):
        back(model)
