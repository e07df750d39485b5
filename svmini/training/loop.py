"""The training loop: a learning rate, a batch, a loss, backward, clip, step."""

import math
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from tqdm import tqdm

from ..adapting import heads_of, unwrap
from ..data import IGNORE_INDEX
from ..errors import InputError

SCHEDULES = {   # factor on the learning rate, by the share of steps that are left after the warm-up
    "linear": lambda left: left,
    "cosine": lambda left: 0.5 * (1 - math.cos(math.pi * left)),
    "constant": lambda left: 1.0,
}


@dataclass(frozen=True)
class TrainConfig:
    """All that decides how a run trains. lr: of everything but the head, which takes head_lr (None: lr).  warmup: share
    of the steps.  clip: largest norm of the gradient.  grad_accum_steps: parts in which a batch goes through the model, to
    save memory.  Raises InputError for an unknown schedule."""
    steps: int
    lr: float
    batch_size: int
    head_lr: float | None = None
    warmup_ratio: float = 0.1
    schedule: str = "linear"
    weight_decay: float = 0.0
    betas: tuple = (0.9, 0.999)
    grad_clip: float = 1.0
    grad_accum_steps: int = 1
    seed: int = 0

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise InputError(f"schedule must be one of {', '.join(SCHEDULES)}, not {self.schedule!r}")


class Diverged(ArithmeticError):
    """The loss or a weight is not finite any more."""


class Stopped(Exception):
    """Ctrl-C: the run has written its checkpoint and ended."""


def train(model, task, train_config, device_config, run, label="train"):
    """Train a model in place; returns the mean milliseconds of a step, None where no step was left to do.

    task: see data/.  run: a checkpoint.RunFolder, which holds the folder, the log and what an interrupted run left. On a CPU
    a resumed run equals the uninterrupted one to the last bit. Raises Diverged and Stopped.
    """
    s = train_config
    model.to(device_config.device).train()
    optimizer = make_optimizer(model, s)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    scaler = torch.amp.GradScaler(device_config.device.type, enabled=device_config.dtype == torch.float16)
    forward = torch.compile(model) if device_config.compile else model     # the same parameters
    first, seconds = run.restore(model, optimizer, scaler), 0.0
    with interrupts() as stop, tqdm(total=s.steps, initial=first, desc=label, leave=False, disable=None) as bar:
        for step in range(first, s.steps):
            began = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr_multiplier(step, s)
            x, y = task.batch(s.batch_size, s.seed, step)
            loss = add_gradients(forward, task, x, y, s.grad_accum_steps, scaler, device_config)
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(trained, s.grad_clip)
            scaler.step(optimizer)   # optimizer.step(); in fp16 unless a gradient overflowed
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            done, lr, stopping = step + 1, s.lr * lr_multiplier(step, s), stop.is_set()
            if done % 10 == 0 or stopping or run.is_due(done, s.steps):   # reading the loss waits for a GPU
                bar.set_postfix(loss=f"{finite(loss, trained, label, done, lr):.3f}", lr=f"{lr:.1e}")
            seconds += time.perf_counter() - began
            bar.update()
            run.after_step(done, s.steps, stopping, model, task, device_config, optimizer, scaler, lr)
            if stopping or done == s.steps and stop.is_set():   # Ctrl-C may come in the last evaluation
                raise Stopped(f"{label}: stopped at step {done} of {s.steps}; the same command with --resume goes on")
    return 1000 * seconds / (s.steps - first) if first < s.steps else None


def lr_multiplier(step, s):
    """Factor on the learning rate at a step: a linear warm-up to 1, then the schedule, to 0 after the last step."""
    warmup = max(1, round(s.warmup_ratio * s.steps))
    if step < warmup:
        return (step + 1) / warmup
    return SCHEDULES[s.schedule]((s.steps - step) / max(1, s.steps - warmup))


def make_optimizer(model, s):
    """Fused AdamW over what is trained. The modules of also_train have the head's rate.

    Weight decay falls on parameters of two or more dimensions: on W, on LoRA's A and B, never on M, s, biases and
    norms, which are vectors.
    """
    inner = unwrap(model)
    also_train = getattr(inner, "adaptation", {}).get("also_train", getattr(inner, "also_train", ()))
    head = {id(p) for part in heads_of(inner, also_train) for p in part.parameters()}
    groups = {}
    for p in model.parameters():
        if p.requires_grad:
            lr = s.head_lr if id(p) in head and s.head_lr is not None else s.lr
            groups.setdefault((lr, s.weight_decay if p.dim() > 1 else 0.0), []).append(p)
    if not groups:
        raise InputError("there is nothing to train: every parameter is frozen")
    fused = next(model.parameters()).device.type in ("cuda", "cpu")
    return torch.optim.AdamW([{"params": ps, "lr": lr, "peak_lr": lr, "weight_decay": wd}
                              for (lr, wd), ps in groups.items()], betas=s.betas, fused=fused)


def add_gradients(forward, task, x, y, grad_accum_steps, scaler, device_config):
    """Loss and backward of a batch, in `grad_accum_steps` parts whose gradients add up; returns the loss, a scalar."""
    loss = torch.zeros((), device=device_config.device)
    for part_x, part_y in zip(x.chunk(grad_accum_steps), y.chunk(grad_accum_steps)):
        targets = (part_y != IGNORE_INDEX).sum()   # a loss is a mean over them, of a part as of the whole
        if grad_accum_steps > 1 and targets == 0:
            continue                          # and a mean over none is no number
        with device_config.autocast():
            part = task.loss(forward, part_x, part_y)
        part = part * (targets.to(part.dtype) / (y != IGNORE_INDEX).sum())
        scaler.scale(part).backward()
        loss += part.detach()
    return loss


def finite(loss, trained, label, step, lr):
    """The loss as a float. Raises Diverged where it is not finite, or where the step has ruined a weight."""
    value = loss.item() if all(p.isfinite().all() for p in trained) else math.nan
    if not math.isfinite(value):
        raise Diverged(f"{label}: the loss is {value} at step {step}, learning rate {lr:.2g}: try a lower --lr")
    return value


@torch.inference_mode()
def evaluate(model, task, split, device_config):
    """task.evaluate in eval mode and without autograd. Raises Diverged where a score is not finite."""
    was_training = model.training
    model.eval()
    with device_config.autocast():
        scores = task.evaluate(model, split)
    model.train(was_training)
    for name, value in scores.items():
        if value is not None and not math.isfinite(value):
            raise Diverged(f"{task.name}: the {name} on {split} is {value}: try a lower --lr")
    return scores


@contextmanager
def interrupts():
    """Within it, a first Ctrl-C only sets the event, so that a step is never cut in two; a second one interrupts."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():   # only that one may set signal handlers
        yield stop
        return

    def handler(number, frame):
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
