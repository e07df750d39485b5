"""Weights in timm's naming, of DeiT, DINO and DINOv2: the same features, layer scales folded in, what does not fit."""

import math

import pytest
import torch

from small_models import perturb, pictures, same_tensors, seeded
from svmini import ViT, ViTConfig
from svmini.errors import InputError
from svmini.models.published import IMAGENET


def timm_state(n_layer=2, d=12, mlp=20, patch=4, size=12, classes=5, scales=True, dtype=torch.float64, channels=3):
    """Random weights in timm's naming, written out by hand; classes: 0 for none, as DINO's."""
    shapes = {"cls_token": (1, 1, d), "pos_embed": (1, 1 + (size // patch) ** 2, d), "norm.weight": (d,),
              "norm.bias": (d,), "patch_embed.proj.weight": (d, channels, patch, patch), "patch_embed.proj.bias": (d,)}
    for i in range(n_layer):
        for name, size in (("norm1", (d,)), ("attn.qkv", (3 * d, d)), ("attn.proj", (d, d)),
                           ("norm2", (d,)), ("mlp.fc1", (mlp, d)), ("mlp.fc2", (d, mlp))):
            shapes |= {f"blocks.{i}.{name}.weight": size, f"blocks.{i}.{name}.bias": size[:1]}
        if scales:
            shapes |= {f"blocks.{i}.{name}.gamma": (d,) for name in ("ls1", "ls2")}
    if classes:
        shapes |= {"head.weight": (classes, d), "head.bias": (classes,)}
    g = seeded(1) if torch.get_default_device().type == "cpu" else None   # without values on "meta"
    return {k: torch.randn(shape, generator=g, dtype=dtype) * 0.4 for k, shape in shapes.items()}


def timm_features(s, x, n_layer=2, n_head=2, patch=4):
    """The class token behind the last norm, from timm's own weights, in as few operations as there are."""
    def norm(y, name):
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return y * s[f"{name}.weight"] + s[f"{name}.bias"]

    def linear(y, name):
        return y @ s[f"{name}.weight"].T + s[f"{name}.bias"]

    x = x.unfold(2, patch, patch).unfold(3, patch, patch)                                # (B, C, rows, columns, P, P)
    x = x.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)                             # (B, patches, C * P * P)
    y = x @ s["patch_embed.proj.weight"].flatten(1).T + s["patch_embed.proj.bias"]
    y = torch.cat([s["cls_token"].expand(len(y), -1, -1), y], dim=1) + s["pos_embed"]
    for i in range(n_layer):
        q, k, v = linear(norm(y, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").chunk(3, -1)
        heads = [(qh @ kh.transpose(1, 2) / qh.shape[-1] ** 0.5).softmax(-1) @ vh
                 for qh, kh, vh in zip(*(part.chunk(n_head, -1) for part in (q, k, v)))]
        y = y + s.get(f"blocks.{i}.ls1.gamma", 1) * linear(torch.cat(heads, -1), f"blocks.{i}.attn.proj")
        u = linear(norm(y, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")
        u = u * 0.5 * (1 + torch.erf(u / math.sqrt(2)))
        y = y + s.get(f"blocks.{i}.ls2.gamma", 1) * linear(u, f"blocks.{i}.mlp.fc2")
    return norm(y[:, 0], "norm")


@pytest.mark.parametrize("scales", [True, False])
@pytest.mark.parametrize("classes", [5, 0])
def test_vit_is_timms(scales, classes, tmp_path):
    state, x = timm_state(classes=classes, scales=scales), pictures(4, 3, 12, 12).double()
    copy = {k: v.clone() for k, v in state.items()}
    model = ViT.from_timm(state, n_head=2)
    assert model.config == ViTConfig(12, 4, 3, classes or 1, 2, 2, 12, 20, **IMAGENET)
    features, got = timm_features(state, x), model(x)
    if classes:
        expected = features @ state["head.weight"].T + state["head.bias"]
        assert (got - expected).abs().max() < 1e-11 and expected.std() > 0.1
    else:
        assert not got.any() and got.shape == (4, 1), "a fresh head says nothing"
    model.head = torch.nn.Identity()
    assert (model(x) - features).abs().max() < 1e-11
    perturb(model)
    assert same_tensors(state, copy), "what was given is left alone"
    torch.save({"model": state, "epoch": 3}, tmp_path / "deit.pth")   # as DeiT's own files hold it
    for source in (tmp_path / "deit.pth", state | {"mask_token": torch.ones(1, 12)}):   # the token as in DINOv2's
        assert same_tensors(ViT.from_timm(source, n_head=2).state_dict(), ViT.from_timm(state, n_head=2).state_dict())


def test_a_head_and_a_size_for_another_task():
    state = timm_state()
    kept, new = ViT.from_timm(state, n_head=2), ViT.from_timm(state, num_classes=7, n_head=2, image_size=20)
    assert new.config.num_classes == 7 and new.config.image_size == 20 and not new.head.weight.any()
    assert torch.equal(new.position_embedding, kept.set_input_size(20).position_embedding)
    folded = state["blocks.1.ls2.gamma"][:, None] * state["blocks.1.mlp.fc2.weight"]
    assert torch.equal(new.blocks[1].mlp.down.weight, folded)
    half = ViT.from_timm(timm_state(classes=0, dtype=torch.float16), n_head=2)
    assert {p.dtype for p in half.parameters()} == {torch.float32}


def test_the_pictures_that_it_expects():
    for options, expects in (({}, IMAGENET), ({"channels": 1}, {"mean": (0.5,), "std": (0.5,)}),
                             ({"classes": 21843}, {"mean": (0.5,) * 3, "std": (0.5,) * 3})):
        config = ViT.from_timm(timm_state(**options), n_head=2).config
        assert {"mean": config.mean, "std": config.std} == expects


@pytest.mark.parametrize("change, said", [
    (lambda s: s.update({"reg_token": torch.ones(1, 4, 12), "fc_norm.weight": torch.ones(12)}),
     "surplus ['fc_norm.weight', 'reg_token']"),
    (lambda s: s.pop("blocks.1.ls2.gamma"), "missing ['blocks.1.ls2.gamma']"),
    (lambda s: s.update({"blocks.1.mlp.fc2.weight": torch.ones(12, 1)}), "blocks.1.mlp.down.weight"),
    (lambda s: s.pop("pos_embed"), "missing ['pos_embed']")])
def test_timm_dict_that_does_not_fit(change, said):
    state = timm_state()
    change(state)
    with pytest.raises(InputError) as error:
        ViT.from_timm(state, n_head=2)
    assert said in str(error.value) and "\n" not in str(error.value), error.value


@pytest.mark.parametrize("options", [{"num_classes": 5}, {"num_classes": 5, "init_values": 0.1}, {"num_classes": 0}])
def test_against_timm_itself(options):
    timm = pytest.importorskip("timm")
    sizes = dict(img_size=12, patch_size=4, embed_dim=12, depth=2, num_heads=3)
    model = perturb(timm.models.VisionTransformer(**sizes | options))
    x, ours = pictures(4, 3, 12, 12), ViT.from_timm(model.state_dict(), n_head=3).eval()
    if options["num_classes"] == 0:
        ours.head = torch.nn.Identity()
    expected = model(x)
    assert expected.std() > 0.1 and (ours(x) - expected).abs().max() < 1e-5 * expected.abs().max()
