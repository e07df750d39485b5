"""The training loop: schedule, optimizer, clipping, a batch in parts, what is not finite, evaluation, devices."""

import math
import shutil
import signal
import threading

import pytest
import torch
import torch.nn.functional as F

from svmini import adapt
from svmini.data import IGNORE_INDEX
from svmini.errors import InputError
from svmini.rng import generator
from svmini.training import loop
from svmini.training.loop import Diverged, evaluate, make_optimizer, lr_multiplier, train
from svmini.training.device import resolve_device
from toy import CPU, Toy, log_of, run, train_config, tiny_gpt, tiny_vit, token_loss, walk


def test_the_key_alone_decides_what_is_drawn():
    def draw(*key):
        return torch.randint(2**62, (4,), generator=generator(*key)).tolist()

    before = torch.get_rng_state()
    assert generator("batch", 0, 7).initial_seed() == 26639363565562997   # in every process: results depend on it
    assert draw("batch", 0, 7) == draw("batch", 0, 7)
    keys = [("batch", 0, 7), ("batch", 7, 0), ("batch", 0, 8), ("batch", 1, 7), ("other", 0, 7), ("batch", 0)]
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)
    assert torch.equal(before, torch.get_rng_state()), "the global generator is left alone"


# ---- the schedule, step by step ----

# ten steps, two of them warm-up; cosine: (1 + cos(π (1 − left))) / 2
@pytest.mark.parametrize("schedule, expected", [
    ("linear", [0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
    ("cosine", [0.5, 1, 1, 0.961939766255643, 0.853553390593274, 0.691341716182545, 0.5, 0.308658283817455,
                0.146446609406726, 0.038060233744357]),
    ("constant", [0.5] + 9 * [1]),
])
def test_every_step_has_the_rate_worked_out_by_hand(schedule, expected, monkeypatch):
    s, used, step = train_config(steps=10, lr=0.25, head_lr=0.5, warmup_ratio=0.2, schedule=schedule), [], torch.optim.AdamW.step
    assert [lr_multiplier(i, s) for i in range(10)] == pytest.approx(expected, abs=1e-12)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: (
        used.append(sorted(g["lr"] for g in self.param_groups)), step(self, *a, **k))[1])
    model, x = adapt(tiny_vit(), "svfit"), torch.randn(4, 1, 4, 4)
    task = Toy(batch=lambda *key: (x, torch.tensor([0, 1, 2, 0])), loss=lambda m, x, y: F.cross_entropy(m(x), y),
               evaluate=lambda m, split: {"loss": None, "metric": 1.0})
    train(model, task, s, CPU, run(None))
    assert used == [pytest.approx([0.25 * e, 0.5 * e]) for e in expected], "of every group"


def test_the_log_has_the_rate_of_its_step(tmp_path):
    train(tiny_gpt(), Toy(), train_config(steps=10, warmup_ratio=0.2), CPU, run(tmp_path, eval_every=4))
    assert [(line["step"], line["lr"]) for line in log_of(tmp_path)] == [
        (4, pytest.approx(0.875e-2)), (8, pytest.approx(0.375e-2)), (10, pytest.approx(0.125e-2))]


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_runs_have_a_rate(steps):
    rates = [lr_multiplier(i, train_config(steps=steps)) for i in range(steps)]
    assert rates[0] == 1 and all(0 < r <= 1 for r in rates)


def test_an_unknown_schedule_is_an_error():
    with pytest.raises(InputError, match="schedule must be one of linear, cosine, constant, not 'cosin'"):
        train_config(schedule="cosin")


# ---- the optimizer ----

def test_the_groups_have_their_rate_and_decay():
    model = adapt(tiny_vit(), "lora", rank=2)
    optimizer = make_optimizer(model, train_config(lr=1e-3, head_lr=1e-2, weight_decay=0.1, betas=(0.5, 0.7)))
    found = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    expected = {id(p): (1e-2 if name.startswith("head") else 1e-3, 0.1 if p.dim() > 1 else 0.0)
                for name, p in model.named_parameters() if p.requires_grad}
    assert found == expected and len(expected) < len(list(model.parameters()))
    assert {g["betas"] for g in optimizer.param_groups} == {(0.5, 0.7)}
    optimizer = make_optimizer(model, train_config(lr=1e-3))
    assert {g["lr"] for g in optimizer.param_groups} == {1e-3}, "without head_lr the head has lr"
    svft = make_optimizer(adapt(tiny_gpt(), "svft"), train_config(weight_decay=0.1))
    assert {g["weight_decay"] for g in svft.param_groups} == {0.0}, "M is a vector"
    with pytest.raises(InputError, match="nothing to train"):
        make_optimizer(model.requires_grad_(False), train_config())


@pytest.fixture
def descent(monkeypatch):
    """In place of Adam, SGD of rate 1: it moves a weight by its gradient itself."""
    monkeypatch.setattr(loop, "make_optimizer", lambda model, s: torch.optim.SGD(
        [{"params": list(model.parameters()), "lr": 1.0, "peak_lr": 1.0}]))


class Plain(torch.nn.Module):
    """A weight of two numbers; each step's loss gives it the gradient (3, 4) times `size`, of norm 5 size."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))

    @staticmethod
    def task(size):
        return Toy(batch=lambda *key: (torch.ones(2, 1), torch.zeros(2, 1)), evaluate=lambda m, s: {"metric": 1.0},
                   loss=lambda m, x, y: size * (m.weight * torch.tensor([3.0, 4.0])).sum())


@pytest.mark.parametrize("size, clip, expected", [
    (2.0, 1.0, (0.6, 0.8)), (2.0, 20.0, (6.0, 8.0)), (0.1, 1.0, (0.3, 0.4))])
@pytest.mark.parametrize("scale", [1.0, 2.0 ** 10])
def test_the_gradient_is_clipped_to_its_norm_after_it_is_unscaled(size, clip, expected, scale, descent, monkeypatch):
    """scale: of a GradScaler, as float16 has it."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: scaler)
    model = Plain()
    train(model, Plain.task(size), train_config(steps=1, grad_clip=clip), CPU, run(None))
    assert (-model.weight).tolist() == pytest.approx(expected, rel=1e-5)


def test_gradients_do_not_pile_up(descent):
    model = Plain()
    train(model, Plain.task(1.0), train_config(steps=3, grad_clip=100, schedule="constant"), CPU, run(None))
    assert model.weight.tolist() == pytest.approx([-9, -12])


# ---- a batch in parts, compiled steps ----

def some_targets(size, seed, step):
    """The walk with few targets, unequally many a text: 1 of 8 in the first text, 2 in the second, and so on."""
    x, y = walk(size, seed, step)
    return x, y.masked_fill(torch.arange(8) > torch.arange(size).unsqueeze(1), IGNORE_INDEX)


def no_targets_in_front(size, seed, step):
    x, y = walk(size, seed, step)
    return x, y.masked_fill(torch.arange(size).unsqueeze(1) < 2, IGNORE_INDEX)


def in_parts(parts, batch, loss=token_loss, method=None):
    """(the weights after three steps of a batch of 7 that goes through in parts, the sizes of the parts)"""
    sizes, model = [], tiny_gpt().double()
    model = adapt(model, method) if method else model
    task = Toy(batch=batch, loss=lambda m, x, y: sizes.append(len(x)) or loss(m, x, y))
    train(model, task, train_config(steps=3, batch_size=7, grad_accum_steps=parts, warmup_ratio=0, lr=1e-3, grad_clip=0.5), CPU, run(None))
    return torch.cat([p.detach().flatten() for p in model.parameters()]), sizes


@pytest.mark.parametrize("batch, method", [(walk, None), (some_targets, None), (no_targets_in_front, None),
                                           (some_targets, "svft")])
@pytest.mark.parametrize("parts, sizes", [(2, [4, 3]), (3, [3, 3, 1]), (7, [1] * 7), (20, [1] * 7)])
def test_a_batch_in_parts_makes_the_step_of_the_whole(batch, method, parts, sizes):
    if batch is no_targets_in_front and parts > 3:
        sizes = sizes[2:]   # a part without a target is left out
    (whole, one), (got, seen) = (in_parts(n, batch, method=method) for n in (1, parts))
    assert one == 3 * [7] and seen == 3 * sizes
    assert (got - whole).abs().max() <= 1e-10


def test_the_share_of_each_part_matters_here():
    """The test above would see parts that all count the same."""
    def equal(model, x, y):   # what train multiplies by is divided out
        whole = some_targets(7, 0, 0)[1] != IGNORE_INDEX
        return token_loss(model, x, y) / ((y != IGNORE_INDEX).sum() / whole.sum()) / 2

    assert (in_parts(2, some_targets, equal)[0] - in_parts(1, some_targets)[0]).abs().max() > 1e-6


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_steps_train_to_the_same_weights(backend, monkeypatch):
    """By tracing alone, which takes seconds; the slow one also through the C++ compiler of this device_config."""
    if backend == "inductor" and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        pytest.skip("there is no C++ compiler")
    start, *models = [adapt(tiny_gpt(), "lora", rank=2) for _ in range(3)]
    compiled = resolve_device("cpu", compile=True)
    assert compiled.compile and compiled.reason.endswith(", compiled") and not CPU.compile
    calls, real = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: calls.append(model) or real(model, backend=backend))
    for model, device_config in zip(models, (CPU, compiled)):
        train(model, Toy(), train_config(steps=4), device_config, run(None, eval_every=2))
    assert calls == [models[1]]
    for a, b, before in zip(*(m.parameters() for m in (*models, start)), strict=True):
        assert torch.allclose(a, b, atol=1e-6) and (not a.requires_grad or not torch.equal(a, before))


# ---- what is not finite ----

def test_divergence_is_said_with_its_step_and_rate_and_nothing_of_it_is_written(tmp_path):
    def loss(model, x, y):
        return token_loss(model, x, y) * (math.nan if model.now == 7 else 1)

    def batch(size, seed, step):
        model.now = step
        return walk(size, seed, step)

    model = tiny_gpt()
    with pytest.raises(Diverged) as caught:
        train(model, Toy(batch=batch, loss=loss), train_config(steps=40, warmup_ratio=0), CPU,
              run(tmp_path, eval_every=1, save_every=1), label="lora:rank=8")
    for spec in ("lora:rank=8", "nan", "step 8", "0.0085", "--lr"):     # 1e-2 * (40 - 7) / 39
        assert spec in str(caught.value), f"{spec!r} is not in {str(caught.value)!r}"
    kept = torch.load(tmp_path / "last.pt", weights_only=True)["content"]
    assert kept["step"] == 7 and all(t.isfinite().all() for t in kept["model"].values())
    assert len(log_of(tmp_path)) == 7 and "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_divergence_is_seen_within_ten_steps_where_nothing_is_written():
    seen = []
    with pytest.raises(Diverged):
        train(tiny_gpt(), Toy(batch=lambda *key: seen.append(key) or walk(*key)), train_config(steps=500, lr=1e30), CPU,
              run(None, eval_every=0, save_every=0))
    assert len(seen) == 10


def test_a_finite_loss_whose_step_ruins_the_weights(tmp_path):
    """The loss is read before the step: a gradient that is not finite shows in the weights only."""
    def loss(model, x, y):
        return token_loss(model, x, y) + (0 * model.norm.weight.sum()).sqrt()   # 0, with a gradient of 0 * inf

    task = Toy(loss=loss, evaluate=lambda model, split: {"loss": None, "metric": 3.8})   # an accuracy, of any weights
    with pytest.raises(Diverged):
        train(tiny_gpt(), task, train_config(steps=1, lr=1e-3), CPU, run(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_score_that_is_not_finite_is_no_result(split):
    with pytest.raises(Diverged, match=f"walk: the loss on {split} is nan"):
        evaluate(tiny_gpt(), Toy(evaluate=lambda model, split: {"loss": math.nan, "metric": 3.8}), split, CPU)


# ---- evaluation, devices, signals ----

@pytest.mark.parametrize("training", [True, False])
def test_evaluation_is_in_eval_mode_under_autocast_and_without_autograd(training):
    model, seen = tiny_gpt(0.5).train(training), []

    def look(m, split):
        seen.append((split, m.training, m.blocks[0].training, torch.is_grad_enabled(),
                     torch.is_autocast_enabled("cpu")))
        return {"loss": None, "metric": 1.0}

    half = resolve_device("cpu", "bfloat16")
    assert evaluate(model, Toy(evaluate=look), "test", half) == {"loss": None, "metric": 1.0}
    assert seen == [("test", False, False, False, True)]
    assert model.training is training and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def test_training_goes_on_in_training_mode_after_an_evaluation():
    modes, model = [], tiny_gpt(0.5).eval()
    task = Toy(loss=lambda m, x, y: modes.append(m.training) or token_loss(m, x, y))
    train(model, task, train_config(steps=3), CPU, run(None, eval_every=1))
    assert modes == [True] * 3


def test_steps_run_in_the_dtype_of_the_machine():
    seen = []
    task = Toy(loss=lambda m, x, y: seen.append(m(x).dtype) or token_loss(m, x, y))
    train(tiny_gpt(), task, train_config(steps=1), resolve_device("cpu", "bfloat16"), run(None))
    assert seen == [torch.bfloat16]


def test_machine():
    assert CPU.device.type == "cpu" and CPU.dtype == torch.float32 and "asked for" in CPU.reason
    auto = resolve_device()
    assert auto.device.type == ("cuda" if torch.cuda.is_available() else
                                "mps" if torch.backends.mps.is_available() else "cpu")
    for name, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())):
        if not there:
            with pytest.raises(InputError, match=f"device '{name}' is not there: use auto or .*cpu"):
                resolve_device(name)


@pytest.mark.parametrize("capability, dtype", [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_a_card_takes_the_half_precision_that_it_can_do(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    device_config = resolve_device()
    assert device_config.device.type == "cuda" and device_config.dtype == dtype and "a card" in device_config.reason


def test_the_handler_of_before_comes_back_and_threads_can_train():
    before = signal.getsignal(signal.SIGINT)
    train(tiny_gpt(), Toy(), train_config(), CPU, run(None))
    assert signal.getsignal(signal.SIGINT) is before
    there = run(None)
    thread = threading.Thread(target=lambda: train(tiny_gpt(), Toy(), train_config(), CPU, there))
    thread.start()
    thread.join()
    assert [line["step"] for line in there.log] == [3, 6, 9, 12]
