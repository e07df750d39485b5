"""The training loop: learning rate, batch, loss, backward, clip, step."""

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

SCHEDULES = {   # factor on the learning rate, given the fraction of steps that remain after the warm-up
    "linear": lambda remaining: remaining,
    "cosine": lambda remaining: 0.5 * (1 - math.cos(math.pi * remaining)),
    "constant": lambda remaining: 1.0,
}


@dataclass(frozen=True)
class TrainConfig:
    """Everything that determines the result of a training run besides the model and the data.

    lr: peak learning rate of every trained parameter outside the head.
    head_lr: peak learning rate of the modules in also_train (default: lr).
    warmup_ratio: fraction of the steps in which the learning rate rises linearly from 0 to its peak.
    schedule: "linear" or "cosine" decay to 0 after the warm-up, or "constant".
    grad_clip: largest norm of the gradient; a larger gradient is scaled down to it.
    grad_accum_steps: number of micro-batches that each batch is split into, to save memory.

    Raises InputError if the schedule is unknown.
    """
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
    """The loss, a metric or a weight is not finite."""


class Stopped(Exception):
    """Ctrl-C ended the run after its checkpoint was written."""


def train(model, task, train_config, device_config, run_folder, label="train"):
    """Train a model in place.

    task: see svmini/data. run_folder: a checkpoint.RunFolder, which evaluates, logs and saves at the steps that are
    due, and restores an interrupted run. On a CPU, a resumed run equals the uninterrupted one to the last bit.
    label: name of the run in the progress bar and in errors.

    Returns the mean milliseconds per step, or None if no step was left to do. Raises Diverged and Stopped.
    """
    config, device = train_config, device_config.device
    model.to(device).train()
    optimizer = make_optimizer(model, config)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    scaler = torch.amp.GradScaler(device.type, enabled=device_config.dtype == torch.float16)
    forward = torch.compile(model) if device_config.compile else model     # the same parameters
    first, seconds = run_folder.restore(model, optimizer, scaler), 0.0
    with catch_ctrl_c() as stop, tqdm(total=config.steps, initial=first, desc=label, leave=False, disable=None) as bar:
        for step in range(first, config.steps):
            started = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr_multiplier(step, config)
            x, y = task.batch(config.batch_size, config.seed, step)
            loss = add_gradients(forward, task, x, y, config.grad_accum_steps, scaler, device_config)
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(trained, config.grad_clip)
            scaler.step(optimizer)   # in fp16, a step whose gradient overflowed is skipped
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            done, lr, stopping = step + 1, config.lr * lr_multiplier(step, config), stop.is_set()
            if done % 10 == 0 or stopping or run_folder.is_due(done, config.steps):   # here the host waits for a GPU
                bar.set_postfix(loss=f"{check_finite(loss, trained, label, done, lr):.3f}", lr=f"{lr:.1e}")
            seconds += time.perf_counter() - started
            bar.update()
            run_folder.after_step(done, config.steps, stopping, model, task, device_config, optimizer, scaler, lr)
            if stopping or done == config.steps and stop.is_set():   # Ctrl-C may arrive in the last evaluation
                where = "" if run_folder.folder is None else f" at step {done} of {config.steps}"
                raise Stopped(f"{label}: stopped{where}. Continue with the same command and --resume")
    return 1000 * seconds / (config.steps - first) if first < config.steps else None


def lr_multiplier(step, config):
    """Factor on the learning rate at a step (from 0): linear warm-up to 1, then the schedule."""
    warmup = max(1, round(config.warmup_ratio * config.steps))
    if step < warmup:
        return (step + 1) / warmup
    return SCHEDULES[config.schedule]((config.steps - step) / max(1, config.steps - warmup))


def make_optimizer(model, config):
    """Return a fused AdamW over the parameters that require gradients.

    The modules in also_train use head_lr. Weight decay applies to parameters of two or more dimensions (W, LoRA's A and
    B), but not to vectors (M, s, biases, LayerNorm). Raises InputError if every parameter is frozen.
    """
    inner = unwrap(model)
    also_train = getattr(inner, "adaptation", {}).get("also_train", getattr(inner, "also_train", ()))
    head = {id(p) for part in heads_of(inner, also_train) for p in part.parameters()}
    groups = {}
    for p in model.parameters():
        if p.requires_grad:
            lr = config.head_lr if id(p) in head and config.head_lr is not None else config.lr
            groups.setdefault((lr, config.weight_decay if p.dim() > 1 else 0.0), []).append(p)
    if not groups:
        raise InputError("there is nothing to train: every parameter is frozen")
    fused = next(model.parameters()).device.type in ("cuda", "cpu")
    return torch.optim.AdamW([{"params": ps, "lr": lr, "peak_lr": lr, "weight_decay": wd}
                              for (lr, wd), ps in groups.items()], betas=config.betas, fused=fused)


def add_gradients(forward, task, x, y, grad_accum_steps, scaler, device_config):
    """Add a batch's gradients to the parameters, micro-batch by micro-batch; returns the loss, a scalar tensor.

    A loss is a mean over labels, so each micro-batch is weighted by its fraction of the labels. Everything stays on the
    device: a GPU is never waited for.
    """
    loss = torch.zeros((), device=device_config.device)
    total = (y != IGNORE_INDEX).sum()
    for micro_x, micro_y in zip(x.chunk(grad_accum_steps), y.chunk(grad_accum_steps)):
        n_labels = (micro_y != IGNORE_INDEX).sum()
        with device_config.autocast():
            micro_loss = task.loss(forward, micro_x, micro_y)
        if grad_accum_steps > 1:   # a mean over no labels is not a number
            micro_loss = torch.where(n_labels > 0, micro_loss, 0.0)
        micro_loss = micro_loss * (n_labels.to(micro_loss.dtype) / total)
        scaler.scale(micro_loss).backward()
        loss += micro_loss.detach()
    return loss


def check_finite(loss, trained, label, step, lr):
    """Return the loss as a float, after one wait for the device. Raises Diverged if the loss is not finite, or if the
    step made a weight infinite or nan."""
    finite = torch.stack([p.isfinite().all() for p in trained]).all()
    value = torch.where(finite, loss, math.nan).item()
    if not math.isfinite(value):
        raise Diverged(f"{label}: the loss is {value} at step {step}, learning rate {lr:.2g}: try a lower --lr")
    return value


@torch.inference_mode()
def evaluate(model, task, split, device_config):
    """Return task.evaluate(model, split), in eval mode and without autograd. Raises Diverged if a score is not
    finite."""
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
def catch_ctrl_c():
    """Yield an event that the first Ctrl-C sets, so that a step is never interrupted halfway. A second Ctrl-C raises
    KeyboardInterrupt."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():   # other threads may not set signal handlers
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
