"""Training on a device: no waits between printed steps, fp16 with overflow, resumed runs, both scripts."""

import json
import shutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train_gpt
import train_vit
from helpers import (Toy, interrupt_at, little, run_folder, same, tiny_gpt, token_loss,   # noqa: F401
                     train_config)
from svmini import GPT, GPTConfig, ViT, ViTConfig, adapt, files
from svmini.data.arithmetic import Arithmetic
from svmini.data.image_datasets import open_images
from svmini.data.images import ImageClassification
from svmini.model_file import save_model
from svmini.training.device import resolve_device
from svmini.training.loop import Stopped, train


class NoWaits(TorchDispatchMode):
    """Reject reading a tensor's value: what a CPU can show of torch.cuda.set_sync_debug_mode("error")."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), f"{func} waits"
        return func(*args, **(kwargs or {}))


def on(device, task):
    """A task whose batches are on the device."""
    def batch(*key):
        return tuple(t.to(device, non_blocking=True) for t in task.batch(*key))
    return Toy(batch=batch, evaluate=lambda model, split: {"loss": 1.0, "metric": 1.0})


@pytest.mark.parametrize("kind, dtype", [("images", "float32"), ("arithmetic", "float16")])
def test_steps_between_printed_ones_do_not_wait(kind, dtype, device):
    """Steps 2 to 9 of 10. On CUDA the batches are made under the debug mode too; on a CPU their indices are read."""
    if kind == "images":
        config = ViTConfig(24, 6, 1, 26, n_layer=1, n_head=2, d_model=16)
        model, task = ViT(config), ImageClassification(open_images("glyphs B", None, 0), 0, config, device)
    else:
        task = Arithmetic("+", device)
        model = GPT(GPTConfig(task.vocab_size, task.length, n_layer=1, n_head=2, d_model=16))
    guard, entered, batch = NoWaits(), [], task.batch

    def guarded_batch(size, seed, step):
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error" if 0 < step < 9 else "default")
            return batch(size, seed, step)
        if entered:
            entered.pop().__exit__(None, None, None)
        x, y = batch(size, seed, step)
        if 0 < step < 9:
            entered.append(guard.__enter__())
        return x, y

    task.batch = guarded_batch
    try:
        train(adapt(model, "svft"), task, train_config(steps=10), resolve_device(device.type, dtype),
              run_folder(eval_every=0, save_every=0))
    finally:
        while entered:
            entered.pop().__exit__(None, None, None)
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def test_a_step_that_overflows_in_float16_is_skipped_and_training_continues(device):
    model, task, seen = adapt(tiny_gpt(), "svft"), on(device, Toy()), []

    def loss(model, x, y):
        seen.append([p.detach().cpu().clone() for p in model.parameters() if p.requires_grad])   # before each step
        return 100 * token_loss(model, x, y)

    task.loss = loss
    train(model, task, train_config(steps=12), resolve_device(device.type, "float16"), run_folder(eval_every=0))
    moved = [not same(before, after) for before, after in zip(seen, seen[1:])]
    assert not moved[0] and any(moved) and all(p.isfinite().all() for p in seen[-1])


def test_a_resumed_run_equals_the_uninterrupted_one(device, tmp_path, monkeypatch):
    def run(task, **options):
        model = adapt(tiny_gpt(dropout=0.1), "svft")
        torch.manual_seed(5)
        train(model, on(device, task), train_config(), resolve_device(device.type, "float32"), run_folder(**options))
        return {name: p.detach().cpu() for name, p in model.named_parameters()}

    torch.use_deterministic_algorithms(True)
    try:
        whole = run(Toy())
        with pytest.raises(Stopped):
            run(interrupt_at(6), folder=tmp_path)
        assert same(run(Toy(), folder=tmp_path, resume=True), whole)
    finally:
        torch.use_deterministic_algorithms(False)


def run_script(script, device, out, dtype, *more):
    """Train a tiny base model with svft for a few steps; return its row and its adapter's layers."""
    torch.manual_seed(0)
    model = (ViT(ViTConfig(24, 6, 1, 34, 1, 2, 16)) if script is train_vit else
             GPT(GPTConfig(Arithmetic.vocab_size, Arithmetic.length, 1, 2, 16)))
    save_model(out / "base.pt", model, {"data": "arithmetic +", "tokenizer": "arithmetic"})
    data = [] if script is train_vit else ["--data", "arithmetic"]
    argv = ["--quick", "--methods", "svft", "--steps", "3", "--init", str(out / "base.pt"), *data, "--out", str(out),
            "--device", device.type, "--dtype", dtype, *more]
    assert script.main(argv) == 0
    row = json.loads((out / "results.json").read_text(encoding="utf-8"))["rows"][-1]
    return row, files.load(out / "runs" / "svft-seed0" / "adapter.pt", "adapter")["layers"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("script", [train_vit, train_gpt])
def test_both_scripts_train_under_autocast(script, dtype, device, tmp_path):
    row, _ = run_script(script, device, tmp_path, dtype)
    assert row["method"] == "svft" and row["metric"] is not None
    assert (row["peak_mb"] or 0) > 0 if device.type == "cuda" else row["peak_mb"] is None


@pytest.mark.parametrize("script", [train_vit, train_gpt])
@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param(
    "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA is not available"))], indirect=True)
def test_both_scripts_train_alike_with_compile(script, device, tmp_path):
    """On a CPU it takes minutes: tests/program/test_loop.py tests compiled steps without a compiler."""
    if device.type == "cpu" and not shutil.which("g++"):
        pytest.skip("there is no g++")
    plain, compiled = (run_script(script, device, tmp_path / str(len(more)), "float32", *more)[1]
                       for more in ((), ("--compile",)))
    for name, layer in plain.items():
        M = layer["state"]["M"]
        assert (compiled[name]["state"]["M"] - M).norm() < 0.1 * M.norm(), name
