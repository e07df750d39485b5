"""The training loop: schedule, optimizer, clipping, micro-batches, waiting for the device, divergence, evaluation."""

import math
import os
import signal
import threading

import pytest
import torch

from helpers import (CPU, Toy, image_task, log_of, refused, run_folder, tiny_gpt, tiny_vit, token_loss, train_config,
                     walk)
from svmini import adapt
from svmini.data import IGNORE_INDEX
from svmini.rng import generator
from svmini.training import loop
from svmini.training.device import DeviceConfig, prepare_device, resolve_device
from svmini.training.loop import Diverged, evaluate, lr_multiplier, make_optimizer, train


def test_a_generator_depends_on_its_key_alone():
    before = torch.get_rng_state()
    assert generator("batch", 0, 7).initial_seed() == 26639363565562997   # the same in every process
    keys = [("batch", 0, 7), ("batch", 7, 0), ("batch", 0, 8), ("batch", 1, 7), ("other", 0, 7), ("batch", 0)]
    assert len({generator(*key).initial_seed() for key in keys}) == len(keys)
    assert torch.equal(before, torch.get_rng_state()), "the global generator must not change"


# ---- schedule ----

# ten steps, two of them warm-up; cosine: (1 + cos(π (1 − remaining))) / 2
@pytest.mark.parametrize("schedule, expected", [
    ("linear", [0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
    ("cosine", [0.5, 1, 1, 0.961939766255643, 0.853553390593274, 0.691341716182545, 0.5, 0.308658283817455,
                0.146446609406726, 0.038060233744357]),
    ("constant", [0.5] + 9 * [1]),
])
def test_every_step_uses_the_scheduled_learning_rate_in_every_group(schedule, expected, monkeypatch):
    config, used = train_config(steps=10, lr=0.25, head_lr=0.5, warmup_ratio=0.2, schedule=schedule), []
    assert [lr_multiplier(i, config) for i in range(10)] == pytest.approx(expected, abs=1e-12)
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: (
        used.append(sorted(g["lr"] for g in self.param_groups)), step(self, *a, **k))[1])
    train(adapt(tiny_vit(), "svfit"), image_task(), config, CPU, folder := run_folder(eval_every=4))
    assert used == [pytest.approx([0.25 * e, 0.5 * e]) for e in expected]
    assert [(line["step"], line["lr"]) for line in folder.log] == [
        (step, pytest.approx(0.25 * expected[step - 1])) for step in (4, 8, 10)]


def test_the_shortest_runs_have_positive_learning_rates_and_an_unknown_schedule_is_an_error():
    for steps in (1, 2, 3):
        multipliers = [lr_multiplier(i, train_config(steps=steps)) for i in range(steps)]
        assert multipliers[0] == 1 and all(0 < m <= 1 for m in multipliers)
    with refused("schedule must be one of linear, cosine, constant, not 'cosin'"):
        train_config(schedule="cosin")


# ---- optimizer ----

def test_each_optimizer_group_has_its_learning_rate_and_weight_decay():
    model = adapt(tiny_vit(), "lora", rank=2)
    optimizer = make_optimizer(model, train_config(lr=1e-3, head_lr=1e-2, weight_decay=0.1, betas=(0.5, 0.7)))
    found = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    expected = {id(p): (1e-2 if name.startswith("head") else 1e-3, 0.1 if p.dim() > 1 else 0.0)
                for name, p in model.named_parameters() if p.requires_grad}
    assert found == expected and len(expected) < len(list(model.parameters()))
    assert {g["betas"] for g in optimizer.param_groups} == {(0.5, 0.7)}
    optimizer = make_optimizer(adapt(tiny_vit(), "svfit", also_train=()), train_config(lr=1e-3, weight_decay=0.1))
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(1e-3, 0.0)], "s is a vector"
    with refused("nothing to train"):
        make_optimizer(model.requires_grad_(False), train_config())


@pytest.mark.parametrize("changes, scale, expected", [
    ({"steps": 1, "grad_clip": 1.0}, 1.0, (-0.6, -0.8)), ({"steps": 1, "grad_clip": 1.0}, 2.0 ** 10, (-0.6, -0.8)),
    ({"steps": 1, "grad_clip": 20.0}, 2.0 ** 10, (-6, -8)), ({"steps": 3, "grad_clip": 20.0}, 1.0, (-18, -24))])
def test_gradients_are_unscaled_then_clipped_and_reset_in_every_step(changes, scale, expected, monkeypatch):
    """Steps of SGD with learning rate 1 and the gradient (6, 8). scale: of the GradScaler, as in float16."""
    scaler, model = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1), torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: scaler)
    monkeypatch.setattr(loop, "make_optimizer", lambda model, config: torch.optim.SGD(
        [{"params": [model.weight], "lr": 1.0, "peak_lr": 1.0}]))
    task = Toy(batch=lambda *key: (torch.ones(2, 1), torch.zeros(2, 1)), evaluate=lambda m, split: {"metric": 1.0},
               loss=lambda m, x, y: m(torch.tensor([6.0, 8.0])).sum())
    train(model, task, train_config(schedule="constant", **changes), CPU, run_folder())
    assert model.weight.flatten().tolist() == pytest.approx(expected, rel=1e-5)


# ---- micro-batches, compiled steps ----

def few_labels(size, seed, step):
    """The walk with an unequal number of labels per text: none in the first two, 1 of 8 in the third, and so on."""
    x, y = walk(size, seed, step)
    return x, y.masked_fill(torch.arange(8) > torch.arange(size).unsqueeze(1) - 2, IGNORE_INDEX)


def weights_after(n, method):
    """Return the weights after three steps of a batch of 7 in n micro-batches, and the sizes of the micro-batches."""
    sizes, model = [], adapt(tiny_gpt().double(), method)
    task = Toy(batch=few_labels, loss=lambda m, x, y: sizes.append(len(x)) or token_loss(m, x, y))
    config = train_config(steps=3, batch_size=7, grad_accum_steps=n, warmup_ratio=0, lr=1e-3, grad_clip=0.5)
    train(model, task, config, CPU, run_folder())
    return torch.cat([p.detach().flatten() for p in model.parameters()]), sizes


@pytest.mark.parametrize("method", ["full", "svft"])
def test_micro_batches_give_the_step_of_the_undivided_batch(method):
    expected, sizes = weights_after(1, method)
    assert sizes == 3 * [7]
    for n, sizes in ((3, [3, 3, 1]), (20, [1] * 7)):
        found, seen = weights_after(n, method)
        assert seen == 3 * sizes and (found - expected).abs().max() <= 1e-10


def test_compiled_steps_train_to_the_same_weights(monkeypatch):
    """The eager backend only traces the model; tests/cuda compiles it."""
    models, compiled = [adapt(tiny_gpt(), "svft") for _ in range(2)], resolve_device("cpu", compile=True)
    assert compiled.reason.endswith(", compiled")
    calls, real = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: calls.append(model) or real(model, backend="eager"))
    for model, device_config in zip(models, (CPU, compiled)):
        train(model, Toy(), train_config(steps=4), device_config, run_folder(eval_every=2))
    assert calls == [models[1]]
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


# ---- waiting for the device ----

@pytest.mark.parametrize("n", [1, 2])
def test_a_step_needs_no_value(n, monkeypatch):
    """Tensors on the meta device have no values: all nine steps run, and the first read of the loss fails."""
    monkeypatch.setattr(DeviceConfig, "autocast", lambda self: torch.autocast("cpu", enabled=False))
    steps = []
    task = Toy(batch=lambda size, seed, step: (steps.append(step), [t.to("meta") for t in walk(size, seed, step)])[1])
    with pytest.raises(RuntimeError, match="meta tensors"):
        train(tiny_gpt(), task, train_config(steps=9, grad_accum_steps=n),
              DeviceConfig(torch.device("meta"), torch.float32, ""), run_folder(eval_every=0, save_every=0))
    assert steps == list(range(9))


def test_the_check_for_finite_weights_reads_one_value(monkeypatch):
    """Also see tests/cuda/test_training_on_cuda.py: between printed steps, no value is read."""
    reads = []
    for name in ("item", "__bool__", "__float__"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, real=real: reads.append(self) or real(self))
    assert loop.check_finite(torch.tensor(2.5), list(tiny_gpt().parameters()), "x", 1, 0.1) == 2.5 and len(reads) == 1


# ---- divergence ----

def test_divergence_names_step_and_learning_rate_and_writes_nothing(tmp_path):
    steps = []
    task = Toy(batch=lambda *key: steps.append(key) or walk(*key),
               loss=lambda m, x, y: token_loss(m, x, y) * (math.nan if len(steps) == 8 else 1))
    with pytest.raises(Diverged) as caught:
        train(tiny_gpt(), task, train_config(steps=40, warmup_ratio=0), CPU,
              run_folder(tmp_path, eval_every=1, save_every=1), label="lora:rank=8")
    assert str(caught.value).startswith("lora:rank=8: the loss is nan at step 8, learning rate 0.0085")   # 33/39 of lr
    assert torch.load(tmp_path / "last.pt", weights_only=True)["content"]["step"] == 7
    assert len(log_of(tmp_path)) == 7 and "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_divergence_is_noticed_within_ten_steps():
    seen = []
    with pytest.raises(Diverged):
        train(tiny_gpt(), Toy(batch=lambda *key: seen.append(key) or walk(*key)), train_config(steps=500, lr=1e30), CPU,
              run_folder(eval_every=0, save_every=0))
    assert len(seen) == 10


def test_a_step_that_ruins_the_weights_is_a_divergence_even_if_the_loss_is_finite(tmp_path):
    """The loss is computed before the step, so a gradient that is not finite only shows in the weights."""
    task = Toy(loss=lambda m, x, y: (0 * m.norm.weight.sum()).sqrt(),   # 0, with a gradient of 0 * inf
               evaluate=lambda m, split: {"metric": 3.8})
    with pytest.raises(Diverged):
        train(tiny_gpt(), task, train_config(steps=1, lr=1e-3), CPU, run_folder(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_score_that_is_not_finite_is_a_divergence():
    with pytest.raises(Diverged, match="walk: the loss on val is nan"):
        evaluate(tiny_gpt(), Toy(evaluate=lambda model, split: {"loss": math.nan, "metric": 3.8}), "val", CPU)


# ---- evaluation, devices, signals ----

def test_steps_and_evaluations_use_their_mode_and_the_dtype_of_the_device_config():
    """Training continues in training mode after an evaluation, which has no autograd."""
    seen = []

    def state(model, name):
        return name, model.training, model.blocks[0].training, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")

    task = Toy(loss=lambda m, x, y: seen.append(state(m, "loss")) or token_loss(m, x, y),
               evaluate=lambda m, split: seen.append(state(m, split)) or {"metric": 1.0})
    train(tiny_gpt().eval(), task, train_config(steps=2), resolve_device("cpu", "bfloat16"), run_folder(eval_every=1))
    assert seen == 2 * [("loss", True, True, True, True), ("val", False, False, False, True)]
    evaluate(model := tiny_gpt().eval(), task, "test", CPU)
    assert not model.training and torch.is_grad_enabled()


def test_a_device_is_resolved_with_its_reason_and_the_half_precision_of_its_hardware(monkeypatch):
    assert CPU.reason == "cpu (1 thread, set by --device), float32" and CPU.dtype == torch.float32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve_device().reason == "cpu (1 thread, auto-selected), float32"
    for name in ("cuda", "mps"):
        with refused(f"device '{name}' is not available: use auto or "):
            resolve_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    for capability, dtype in (((7, 5), torch.float16), ((8, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        found = resolve_device()
        assert found.device.type == "cuda" and found.dtype == dtype and found.reason.startswith("cuda (a card, auto-")


@pytest.mark.parametrize("device, by_user, size, threads", [
    ("cpu", {}, 7, 1), ("cpu", {"OMP_NUM_THREADS": "4"}, 7, 4), ("cpu", {}, 2_000_000, 4), ("meta", {}, 7, 4)])
def test_a_small_model_uses_one_thread_without_omp_num_threads(device, by_user, size, threads, monkeypatch, capsys):
    monkeypatch.setattr(os, "environ", by_user)
    used = [4]
    monkeypatch.setattr(torch, "get_num_threads", lambda: used[-1])
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    start = DeviceConfig(torch.device(device), torch.float32, f"{device} (4 threads, auto-selected), float32")
    found = prepare_device(start, torch.nn.Linear(1, size, bias=False, device="meta"))
    assert used[-1] == threads and capsys.readouterr().out == f"device: {found.reason}\n"
    assert found == start if threads == 4 else found.reason == (
        "cpu (1 thread of 4 because the model is small, auto-selected), float32")


def test_training_restores_the_signal_handler_and_works_in_other_threads():
    before, here, there = signal.getsignal(signal.SIGINT), run_folder(), run_folder()
    train(tiny_gpt(), Toy(), train_config(), CPU, here)
    assert signal.getsignal(signal.SIGINT) is before
    thread = threading.Thread(target=train, args=(tiny_gpt(), Toy(), train_config(), CPU, there))
    thread.start()
    thread.join()
    assert there.log == here.log and len(here.log) == 4
