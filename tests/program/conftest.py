"""What the tests of generate, predict and export share: files of base models and of their adapters."""

import pytest
import torch

from helpers import BYTES, move
from svmini import GPT, GPTConfig, ViT, ViTConfig, adapt, save_adapter
from svmini.data.arithmetic import Arithmetic
from svmini.model_file import save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Base models and adapters: text, arithmetic and vit in svmini's format, raw-* in GPT-2's or torchvision's."""
    from fake_datasets import build_tree   # imports torchvision

    out = tmp_path_factory.mktemp("tools ü")
    torch.manual_seed(0)
    for name, sizes, tokenizer in (("text", (256, 16), BYTES),
                                   ("arithmetic", (Arithmetic.vocab_size, Arithmetic.length), "arithmetic")):
        model = move(GPT(GPTConfig(*sizes, 1, 2, 16)), 0.3)
        save_model(out / f"{name}.pt", model, {"data": name, "tokenizer": tokenizer})
        torch.save(model.to_gpt2(), out / f"raw-{name}.pt")
        save_adapter(move(adapt(model, "svft"), 0.3), out / f"{name}-adapter.pt", {"data": "another"})
    model = move(ViT(ViTConfig(24, 6, 1, 34, 1, 2, 16)), 0.3)
    save_model(out / "vit.pt", model, {"data": "glyphs A"})
    save_adapter(move(adapt(model.reset_classifier(26), "lora", rank=2), 0.3), out / "vit-adapter.pt",
                 {"data": "glyphs B", "image_size": 24, "classes": list("abcdefghijklmnopqrstuvwxyz")})
    model = move(ViT(ViTConfig(16, 8, 3, 5, 1, 2, 16)), 0.3)
    torch.save(model.to_torchvision(), out / "raw-vit.pt")
    build_tree(out / "images", {"train": 6, "test": 2})
    save_adapter(move(adapt(model.set_input_size(24).reset_classifier(4), "svfit"), 0.3), out / "raw-vit-adapter.pt",
                 {"data": f"folder:{out / 'images'}", "image_size": 24, "classes": [f"class {i}" for i in range(4)]})
    return out
