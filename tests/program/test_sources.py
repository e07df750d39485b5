"""Where published weights come from: files, names that are downloaded, namings told apart; real sizes; real files."""

import os
import sys
import urllib.error
from pathlib import Path

import pytest
import torch
import torchvision

from small_models import SMALL_GPT, SMALL_VIT, gpt, perturb, pictures, same_tensors
from svmini import GPT, GPTConfig, ViT
from svmini.errors import InputError, MissingFile
from svmini.models.published import GPT2_URLS, IMAGENET, TIMM_URLS, gpt2_format, format_of, torchvision_format
from test_timm import timm_state

GPT2_SIZES = {   # layers, heads, width, parameters as published by Hugging Face's models
    "gpt2": (12, 12, 768, 124_439_808), "gpt2-medium": (24, 16, 1024, 354_823_168),
    "gpt2-large": (36, 20, 1280, 774_030_080), "gpt2-xl": (48, 25, 1600, 1_557_611_200)}
VIT_HEADS = {"vit_b_16": 12, "vit_b_32": 12, "vit_l_16": 16, "vit_l_32": 16, "vit_h_14": 16}


def vit_state():
    return perturb(ViT(SMALL_VIT)).to_torchvision()


# ---- files ----

def test_sources_that_are_no_weights(tmp_path):
    for load, source, names in ((GPT.from_gpt2, "gpt3", "gpt2"), (ViT.from_torchvision, tmp_path, "vit_b_16"),
                                (ViT.from_timm, "vit_b_16", "dinov2_vits14")):
        with pytest.raises(MissingFile, match=f"neither a file nor one of {names}"):
            load(source)
    torch.save(vit_state(), tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:-500])
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    torch.save({"model": {}}, tmp_path / "other.pt")
    for name, said in (("cut.pt", "cut.pt is no file of weights that torch can read"), ("list.pt", "holds a list"),
                       ("other.pt", "is no state dict of")):
        for load in (GPT.from_gpt2, ViT.from_torchvision, ViT.from_timm):
            with pytest.raises(InputError, match=said) as error:
                load(tmp_path / name)
            assert "\n" not in str(error.value)


def test_safetensors_are_asked_for(tmp_path, monkeypatch):
    (tmp_path / "x.safetensors").touch()
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)   # makes the import fail
    with pytest.raises(InputError, match="pip install safetensors"):
        GPT.from_gpt2(tmp_path / "x.safetensors")


def test_safetensors(tmp_path):
    state = vit_state()
    pytest.importorskip("safetensors.torch").save_file(state, tmp_path / "x.safetensors")
    assert same_tensors(ViT.from_torchvision(tmp_path / "x.safetensors", n_head=3).to_torchvision(), state)


def test_namings_are_told_apart_by_their_keys():
    states = {"torchvision": vit_state(), "timm": timm_state(), "gpt2": gpt().to_gpt2()}
    assert {naming: format_of(state) for naming, state in states.items()} == {n: n for n in states}
    bare = {k.removeprefix("transformer."): v for k, v in states["gpt2"].items()}
    assert format_of(bare) == "gpt2" and GPT.from_state(bare, n_head=3).config == SMALL_GPT
    assert same_tensors(ViT.from_state(states["torchvision"], n_head=3).to_torchvision(), states["torchvision"])
    ours = ViT.from_timm(states["timm"], n_head=2)
    assert same_tensors(ViT.from_state(states["timm"], n_head=2).state_dict(), ours.state_dict())
    for model, naming, said in ((ViT, "gpt2", "of a GPT-2, not of a ViT"), (GPT, "timm", "of a ViT, not of a GPT-2")):
        with pytest.raises(InputError, match=said):
            model.from_state(states[naming])
    with pytest.raises(InputError, match="conv_proj.weight, patch_embed.proj.weight, wte.weight were looked for"):
        format_of({"a": torch.ones(2)})


# ---- names ----

def test_names():
    assert GPT.urls() == GPT2_URLS and GPT.urls().keys() == GPT2_SIZES.keys()
    assert ViT.urls().keys() == VIT_HEADS.keys() | TIMM_URLS.keys()
    assert all(ViT.urls()[name] == torchvision.models.get_model_weights(name).DEFAULT.url for name in VIT_HEADS)


@pytest.mark.parametrize("load, state, name, kept", [   # under names as torch.hub gives them, but where all are alike
    (GPT.from_gpt2, gpt().to_gpt2(), "gpt2-medium", "gpt2-medium-pytorch_model.bin"),
    (ViT.from_torchvision, vit_state(), "vit_b_16", ViT.urls()["vit_b_16"].split("/")[-1]),
    (ViT.from_timm, timm_state(), "dino_vitb16", "dino_vitbase16_pretrain.pth")])
def test_a_name_is_downloaded(load, state, name, kept, monkeypatch):
    asked, url = [], (GPT.urls() | ViT.urls())[name]
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **kw: asked.append((a, kw)) or state)
    load(name, n_head=1)
    assert asked == [((url,), {"map_location": "cpu", "weights_only": True, "file_name": kept})]

    def offline(*arguments, **options):
        raise urllib.error.URLError("no route\nto host")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(MissingFile) as error:
        load(name)
    said = str(error.value)
    assert "\n" not in said and f"cannot download {url}" in said and "no route to host" in said
    assert f"'{name}'" in said and said.endswith(str(Path(torch.hub.get_dir()) / "checkpoints" / kept))

# ---- published sizes, without memory ----

@pytest.mark.parametrize("name", GPT2_SIZES)
def test_published_gpt2(name):
    n_layer, n_head, d, count = GPT2_SIZES[name]
    with torch.device("meta"):
        model = GPT(GPTConfig(50257, 1024, n_layer, n_head, d))
    assert sum(p.numel() for p in model.parameters()) == count
    state = model.to_gpt2()
    assert len(state) == len(gpt2_format(n_layer)) + 1 == 12 * n_layer + 5
    del state["lm_head.weight"]
    assert GPT.from_gpt2(state).config == model.config, "heads included, which the weights do not tell"
    assert state[f"transformer.h.{n_layer - 1}.attn.c_attn.weight"].shape == (d, 3 * d)


@pytest.mark.parametrize("name", VIT_HEADS)
def test_published_vit(name):
    weights = torchvision.models.get_model_weights(name).DEFAULT
    with torch.device("meta"):
        model = torchvision.models.get_model(name, image_size=weights.meta["min_size"][0])
    state = model.state_dict()
    assert state.keys() == {key for key, _, _ in torchvision_format(len(model.encoder.layers))}
    ours = ViT.from_torchvision(state)
    assert ours.config.n_head == VIT_HEADS[name] == model.encoder.layers[0].num_heads
    assert ours.config.image_size == weights.meta["min_size"][0]
    assert sum(p.numel() for p in ours.parameters()) == weights.meta["num_params"]
    assert {k: v.shape for k, v in ours.to_torchvision().items()} == {k: v.shape for k, v in state.items()}


@pytest.mark.parametrize("name, d, patch, size, classes, scales, count", [
    ("dinov2_vits14", 384, 14, 518, 0, True, 22_056_576), ("dinov2_vitb14", 768, 14, 518, 0, True, 86_580_480),
    ("dino_vitb16", 768, 16, 224, 0, False, 85_798_656),
    ("vit_base_patch16_224.augreg_in21k", 768, 16, 224, 21843, False, 102_595_923)])
def test_published_timm(name, d, patch, size, classes, scales, count):
    assert name in TIMM_URLS
    with torch.device("meta"):
        state = timm_state(12, d, 4 * d, patch, size, classes, scales, torch.float32)
        state |= {"mask_token": torch.empty(1, d)} if scales else {}
        assert sum(v.numel() for v in state.values()) == count
        model = ViT.from_timm(state)
    c = model.config
    assert (c.image_size, c.patch_size, c.n_head, c.n_layer, c.num_classes) == (size, patch, d // 64, 12, classes or 1)
    assert {"mean": c.mean, "std": c.std} == ({"mean": (0.5,) * 3, "std": (0.5,) * 3} if classes else IMAGENET)


def test_the_real_dinov2():
    path = Path(os.environ.get("SVMINI_SHARED", "")) / "weights" / "dinov2_vits14.pt"
    if not path.is_file():
        pytest.skip("SVMINI_SHARED names no folder with weights/dinov2_vits14.pt")
    model = ViT.from_torchvision(path, n_head=6, num_classes=3, image_size=98).eval()
    c = model.config
    assert (c.image_size, c.patch_size, c.n_layer, c.d_model, c.mean) == (98, 14, 12, 384, IMAGENET["mean"])
    model.head = torch.nn.Identity()
    with torch.no_grad():
        features = model(pictures(2, 3, 98, 98))   # (2, d), after the last norm
    assert features.isfinite().all() and (features[0] - features[1]).abs().max() > 0.1
