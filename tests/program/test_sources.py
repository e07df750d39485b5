"""Sources of published weights: files, names that are downloaded, recognized formats, published sizes, a real file."""

import os
import sys
import urllib.error
from pathlib import Path

import pytest
import torch
import torchvision

from published_states import as_hugging_face, timm_state
from helpers import SMALL_VIT, move as perturb, noise as images, refused, same as same_tensors, small_gpt as gpt
from svmini import GPT, GPTConfig, ViT
from svmini.model_file import load_base, save_model
from svmini.models.published import FORMATS, GPT2_URLS, IMAGENET, detect_format, key_pairs

GPT2_SIZES = {   # layers, heads, width, parameters as published by Hugging Face's models
    "gpt2": (12, 12, 768, 124_439_808), "gpt2-medium": (24, 16, 1024, 354_823_168),
    "gpt2-large": (36, 20, 1280, 774_030_080), "gpt2-xl": (48, 25, 1600, 1_557_611_200)}
VIT_HEADS = {"vit_b_16": 12, "vit_b_32": 12, "vit_l_16": 16, "vit_l_32": 16, "vit_h_14": 16}
OTHER_VITS = {   # layers, width, patch, image size, classes, layer scales, parameters as published, rule of positions
    "dinov2_vits14": (12, 384, 14, 518, 0, True, 22_056_576, "dino"),
    "dinov2_vitb14": (12, 768, 14, 518, 0, True, 86_580_480, "dino"),
    "dino_vitb16": (12, 768, 16, 224, 0, False, 85_798_656, "dino"),
    "vit_base_patch16_224.augreg_in21k": (12, 768, 16, 224, 21843, False, 102_595_923, "timm"),
    "google/vit-base-patch16-224-in21k": (12, 768, 16, 224, 0, False, 85_798_656, "huggingface"),
    "google/vit-large-patch16-224-in21k": (24, 1024, 16, 224, 0, False, 303_301_632, "huggingface")}


def vit_state():
    return perturb(ViT(SMALL_VIT)).to_torchvision()


# ---- files ----

def test_a_source_that_is_neither_a_file_nor_a_name():
    for cls, source, known in ((GPT, "gpt3", "gpt2"), (ViT, ".", "vit_b_16"), (ViT, "gpt2", "vit_b_16")):
        with refused(f"neither a file nor one of {known}"):
            cls.from_pretrained(source)


@pytest.mark.parametrize("content, message", [
    ([torch.ones(2)], "holds a list"), ({"model": {}}, "is not a state dict of"),
    ({1: torch.ones(2)}, "none of wte.weight, conv_proj.weight"),
    ("cut", "cut.pt is not a file of weights that torch can read"),
    ("svmini", "a file of svmini's own: read it with svmini.model_file.load_model")])
def test_files_that_hold_no_published_weights(content, message, tmp_path):
    path = tmp_path / "cut.pt"
    if content == "svmini":
        save_model(path, ViT(SMALL_VIT), {})
    else:
        torch.save(vit_state() if content == "cut" else content, path)
    if content == "cut":
        path.write_bytes(path.read_bytes()[:-500])
    for cls in (GPT, ViT):
        with refused(message):
            cls.from_pretrained(path)


def test_safetensors(tmp_path, monkeypatch):
    (tmp_path / "x.safetensors").touch()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "safetensors.torch", None)   # makes the import fail
        with refused("pip install safetensors"):
            GPT.from_pretrained(tmp_path / "x.safetensors")
    state = vit_state()
    pytest.importorskip("safetensors.torch").save_file(state, tmp_path / "x.safetensors")
    assert same_tensors(ViT.from_pretrained(tmp_path / "x.safetensors", n_head=3).to_torchvision(), state)


def test_formats_are_recognized_with_any_prefix_and_those_of_another_model_are_rejected():
    states = {"torchvision": vit_state(), "timm": timm_state(), "GPT-2": gpt().to_gpt2(),
              "Hugging Face ViT": as_hugging_face(timm_state(), dinov2=False),
              "Hugging Face DINOv2": as_hugging_face(timm_state(), dinov2=True)}
    assert states.keys() == FORMATS.keys()
    for name, state in states.items():
        assert detect_format(state)[0] == detect_format({f"module.{k}": v for k, v in state.items()})[0] == name
        right, wrong = (GPT, ViT) if name == "GPT-2" else (ViT, GPT)
        with refused(f"the weights of a {right.__name__} in {name}'s format, not of a {wrong.__name__}"):
            wrong.from_pretrained(state)


# ---- names ----

def test_names():
    assert GPT.urls() == GPT2_URLS and GPT.urls().keys() == GPT2_SIZES.keys()
    assert ViT.urls().keys() == VIT_HEADS.keys() | OTHER_VITS.keys()
    assert all(ViT.urls()[name] == torchvision.models.get_model_weights(name).DEFAULT.url for name in VIT_HEADS)


@pytest.mark.parametrize("cls, make, name, file", [   # file: its name in the cache
    (GPT, lambda: gpt().to_gpt2(), "gpt2-medium", "gpt2-medium-pytorch_model.bin"),
    (ViT, vit_state, "vit_b_16", "vit_b_16-c867db91.pth"),
    (ViT, lambda: as_hugging_face(timm_state(scales=False), False), "google/vit-base-patch16-224-in21k",
     "google--vit-base-patch16-224-in21k-pytorch_model.bin"),
    (ViT, timm_state, "dino_vitb16", "dino_vitbase16_pretrain.pth")])
def test_a_name_is_downloaded(cls, make, name, file, monkeypatch):
    asked, url, state = [], cls.urls()[name], make()
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **kw: asked.append((a, kw)) or state)
    cls.from_pretrained(name, n_head=1)
    assert type(load_base(name, n_head=1)[0]) is cls and asked.pop() == asked[0]
    assert asked == [((url,), {"map_location": "cpu", "weights_only": True, "file_name": file})]

    def offline(*arguments, **options):
        raise urllib.error.URLError("no route\nto host")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with refused(f"cannot download {url}", "no route to host", f"'{name}'",
                 str(Path(torch.hub.get_dir()) / "checkpoints" / file)):
        cls.from_pretrained(name)


# ---- published sizes, without memory ----

def test_sizes_of_gpt2():
    for n_layer, n_head, d, count in GPT2_SIZES.values():
        config = GPTConfig(50257, 1024, 2, n_head, d)              # two of the layers, which are alike
        with torch.device("meta"):
            model = GPT(config)
        layer = sum(p.numel() for p in model.blocks[0].parameters())
        assert sum(p.numel() for p in model.parameters()) + (n_layer - 2) * layer == count
        state = model.to_gpt2()
        assert len(state) == 12 * 2 + 5
        del state["lm_head.weight"]
        assert GPT.from_pretrained(state).config == config, "including n_head, which the weights do not tell"
        assert state["transformer.h.1.attn.c_attn.weight"].shape == (d, 3 * d)


@pytest.mark.parametrize("name", ["vit_b_16", "vit_h_14"])
def test_sizes_of_torchvisions_vits(name):
    weights = torchvision.models.get_model_weights(name).DEFAULT
    with torch.device("meta"):
        model = torchvision.models.get_model(name, image_size=weights.meta["min_size"][0])
    state = model.state_dict()
    assert state.keys() == {key for key, _ in key_pairs(FORMATS["torchvision"], len(model.encoder.layers))}
    ours = ViT.from_pretrained(state)
    assert ours.config.n_head == VIT_HEADS[name] == model.encoder.layers[0].num_heads
    assert ours.config.image_size == weights.meta["min_size"][0]
    assert sum(p.numel() for p in ours.parameters()) == weights.meta["num_params"]
    assert {k: v.shape for k, v in ours.to_torchvision().items()} == {k: v.shape for k, v in state.items()}


@pytest.mark.parametrize("name", OTHER_VITS)
def test_sizes_of_other_vits(name, monkeypatch):
    n_layer, d, patch, size, classes, scales, count, rule = OTHER_VITS[name]
    with torch.device("meta"):
        state = timm_state(n_layer, d, 4 * d, patch, size, classes, scales, torch.float32)
        state |= {"mask_token": torch.empty(1, d)} if scales else {}
        assert sum(v.numel() for v in state.values()) == count
        state = as_hugging_face(state, dinov2=False) if rule == "huggingface" else state
        monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **kw: state)
        c = ViT.from_pretrained(name).config
    assert (c.image_size, c.patch_size, c.n_layer, c.num_classes) == (size, patch, n_layer, classes or 1)
    assert c.n_head == d // 64 and c.d_mlp == 4 * d
    assert c.position_interpolation == rule and (c.mean == IMAGENET["mean"]) is (rule == "dino")


def test_a_real_file():
    path = Path(os.environ.get("SVMINI_SHARED", "")) / "weights" / "dinov2_vits14.pt"
    if not path.is_file():
        pytest.skip("SVMINI_SHARED names no folder with weights/dinov2_vits14.pt")
    model = ViT.from_pretrained(path, n_head=6, num_classes=3, image_size=98).eval()
    c = model.config
    assert (c.image_size, c.patch_size, c.n_layer, c.d_model, c.mean) == (98, 14, 12, 384, IMAGENET["mean"])
    model.head = torch.nn.Identity()
    with torch.no_grad():
        features = model(images(2, 3, 98, 98))   # (2, d), after the last norm
    assert features.isfinite().all() and (features[0] - features[1]).abs().max() > 0.1
