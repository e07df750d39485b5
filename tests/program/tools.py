"""Shared by the tests of generate, predict and export: base models, their adapters, and how a tool is called."""

import pytest
import torch

from fake_datasets import build_tree
from svmini import GPT, GPTConfig, ViT, ViTConfig, adapt, cli, save_adapter
from svmini.data.arithmetic import Arithmetic
from svmini.model_file import save_model

BYTES = [f"{b:02x}" for b in range(256)]


def moved(model, size=0.3, seed=1):
    """Move every trainable parameter away from its start, which hides most mistakes."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += size * torch.randn(p.shape, generator=g)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Base models and adapters: text, arithmetic and vit in svmini's format, raw-* in GPT-2's or torchvision's."""
    out = tmp_path_factory.mktemp("tools ü")
    torch.manual_seed(0)
    for name, sizes, tokenizer in (("text", (256, 16), BYTES),
                                   ("arithmetic", (Arithmetic.vocab_size, Arithmetic.length), "arithmetic")):
        model = moved(GPT(GPTConfig(*sizes, 1, 2, 16)))
        save_model(out / f"{name}.pt", model, {"data": name, "tokenizer": tokenizer})
        torch.save(model.to_gpt2(), out / f"raw-{name}.pt")
        save_adapter(moved(adapt(model, "svft")), out / f"{name}-adapter.pt", {"data": "another"})
    model = moved(ViT(ViTConfig(24, 6, 1, 34, 1, 2, 16)))
    save_model(out / "vit.pt", model, {"data": "glyphs A"})
    save_adapter(moved(adapt(model.reset_classifier(26), "lora", rank=2)), out / "vit-adapter.pt",
                 {"data": "glyphs B", "image_size": 24, "classes": list("abcdefghijklmnopqrstuvwxyz")})
    model = moved(ViT(ViTConfig(16, 8, 3, 5, 1, 2, 16)))
    torch.save(model.to_torchvision(), out / "raw-vit.pt")
    build_tree(out / "images", {"train": 6, "test": 2})
    save_adapter(moved(adapt(model.set_input_size(24).reset_classifier(4), "svfit")), out / "raw-vit-adapter.pt",
                 {"data": f"folder:{out / 'images'}", "image_size": 24, "classes": [f"class {i}" for i in range(4)]})
    return out


def call(tool, capsys, *argv, code=0):
    assert cli.run_command(tool.command, [str(a) for a in argv]) == code
    said = capsys.readouterr()
    return said.err if code else said.out
