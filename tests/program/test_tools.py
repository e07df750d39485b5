"""generate and export: a model with its adapter is used again, and goes back to the format of its base model."""

import io
import sys

import pytest
import torch

from helpers import BYTES, assert_close, call, move, noise, small_gpt, small_vit, tokens
from svmini import GPT, GPTConfig, ViT, adapt, cli, export, generate, load_adapter, save_adapter
from svmini.data.arithmetic import decode, encode
from svmini.model_file import load_adapted, load_base, load_model, save_model


# ---- generate ----

def greedy(model, prompt, n):
    """The text of a model whose tokens are bytes, up to byte 0, which ends an answer."""
    start = torch.tensor([list(prompt.encode())])
    new = bytes(model.generate(start, n, temperature=0)[0, start.shape[1]:].tolist())
    return prompt + new.split(b"\0")[0].decode("utf-8", "replace")


def test_generate_prints_the_text_of_the_adapted_model(folder):
    """The prompt has characters of several bytes, each of which is a token. The base model prints another text."""
    prompt = "Größe: "
    argv = ["--init", folder / "text.pt", "--prompt", prompt, "--max-new-tokens", 12, "--device", "cpu"]
    model = load_adapter(load_model(folder / "text.pt", GPT)[0], folder / "text-adapter.pt")
    expected = greedy(model, prompt, 12) + "\n"
    assert call(generate, *argv, "--adapter", folder / "text-adapter.pt", "--temperature", 0) == expected
    assert call(generate, *argv, "--temperature", 0) != expected
    first = call(generate, *argv)
    assert first.startswith(prompt) and call(generate, *argv) == first
    assert call(generate, *argv, "--seed", 1) != first
    assert call(generate, *argv, "--top-k", 1) == call(generate, *argv, "--temperature", 0)


def test_generate_answers_a_problem_and_stops(folder):
    printed = call(generate, "--init", folder / "arithmetic.pt", "--prompt", "417+259=", "--temperature", 0)
    model = load_model(folder / "arithmetic.pt", GPT)[0]
    assert printed == decode(model.generate(encode("417+259=")[None], 4, temperature=0)[0]) + "\n"


def test_generate_stops_at_the_end_of_an_answer(folder, monkeypatch):
    new = torch.tensor([[65, 0, 66]])
    monkeypatch.setattr(GPT, "generate", lambda self, prompt, *a: torch.cat([prompt, new], dim=1))
    assert call(generate, "--init", folder / "text.pt", "--prompt", "x") == "xA\n"


def test_generate_prints_in_any_encoding(folder, monkeypatch):
    """An ASCII terminal cannot show the umlauts of the prompt."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert cli.run_command(generate.command, ["--init", str(folder / "text.pt"), "--prompt", "ab Größe"]) == 0
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue().startswith(b"ab Gr??")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_generate_and_export_use_the_dtype_of_training(dtype, tmp_path):
    """The base model's file holds bfloat16. The training scripts load it in float32; Python code may keep it."""
    torch.manual_seed(0)
    save_model(tmp_path / "base.pt", move(GPT(GPTConfig(256, 16, 1, 2, 16))).bfloat16(), {"tokenizer": BYTES})
    model = load_model(tmp_path / "base.pt", GPT)[0]
    model = load_base(tmp_path / "base.pt", GPT)[0] if dtype == torch.float32 else model
    assert {p.dtype for p in model.parameters()} == {dtype}
    save_adapter(move(adapt(model, "svft")), tmp_path / "adapter.pt")
    argv = ["--init", tmp_path / "base.pt", "--adapter", tmp_path / "adapter.pt"]
    printed = call(generate, *argv, "--prompt", "ab", "--max-new-tokens", 9, "--temperature", 0)
    assert printed == greedy(model, "ab", 9) + "\n"
    call(export, *argv)
    assert {p.dtype for p in load_model(tmp_path / "merged.pt", GPT)[0].parameters()} == {dtype}


# ---- export ----

@pytest.mark.parametrize("base, adapter", [("arithmetic", "arithmetic-adapter"), ("vit", "vit-adapter"),
                                           ("raw-vit", "raw-vit-adapter"), ("raw-text", "text-adapter")])
def test_a_merged_model_computes_what_base_and_adapter_compute(base, adapter, folder, tmp_path):
    """In svmini's format and in GPT-2's or torchvision's."""
    source, n_head, kind = folder / f"{base}.pt", 2 if "raw" in base else None, ViT if "vit" in base else GPT
    argv = ["--init", source, "--adapter", folder / f"{adapter}.pt", *(["--n-head", 2] if n_head else [])]
    expected, before = load_adapted(source, folder / f"{adapter}.pt", n_head=n_head)
    config = expected.config
    x = noise(3, config.in_channels, 24, 24) if kind is ViT else torch.arange(12)[None] % config.vocab_size
    format, y = "torchvision" if kind is ViT else "gpt2", expected.eval()(x)
    assert "the merged model\n" in call(export, *argv, "--out", tmp_path / "ours.pt")
    assert f"in {format}'s format" in call(export, *argv, "--format", format, "--out", tmp_path / "theirs.pt")
    ours, metadata = load_model(tmp_path / "ours.pt", kind)
    for model in (ours, load_base(tmp_path / "theirs.pt", kind, 2)[0]):
        assert_close(model.eval()(x), y)
    if kind is GPT:
        start = load_base(source, kind, n_head)[0].eval()(x)
        assert (start - y).abs().max() > 1e-3 * y.abs().max(), "it is the adapted model, not the base"
    assert ours.config == config and metadata["published"] is ("raw" in base)
    assert all(metadata.get(key) == before.get(key) for key in ("data", "tokenizer"))


def test_export_writes_into_the_folder_of_the_adapter_and_never_over_its_input(folder, tmp_path):
    (tmp_path / "merged.pt").write_bytes((folder / "text-adapter.pt").read_bytes())
    argv = ["--init", folder / "text.pt", "--adapter", tmp_path / "merged.pt"]
    assert "would overwrite" in call(export, *argv, code=2)
    assert "would overwrite" in call(export, *argv, "--out", folder / "text.pt", code=2)
    (tmp_path / "merged.pt").rename(tmp_path / "a.pt")
    argv = ["--init", folder / "text.pt", "--adapter", tmp_path / "a.pt"]
    assert call(export, *argv).startswith(str(tmp_path / "merged.pt"))


# ---- model files ----

def test_a_model_file_restores_the_model(tmp_path):
    for model, x in ((small_gpt(), tokens(1, 6)), (small_vit(mean=(0.1, 0.2, 0.3)), noise(2, 3, 12, 12))):
        save_model(tmp_path / "m.pt", model, {"data": "ä", "list": [1, "x"]})
        again, metadata = load_model(tmp_path / "m.pt", type(model))
        assert metadata == {"data": "ä", "list": [1, "x"]} and again.config == model.config
        assert torch.equal(model.eval()(x), again.eval()(x))
        assert load_base(tmp_path / "m.pt", type(model))[1] == metadata | {"published": False}
    torch.save({key: value.double() for key, value in model.to_torchvision().items()}, tmp_path / "weights.pt")
    published, metadata = load_base(tmp_path / "weights.pt", ViT, n_head=3)
    assert {p.dtype for p in published.parameters()} == {torch.float32}
    assert metadata == {"data": "weights", "published": True}
