"""What both scripts share: the machine, the schedule, one training loop with checkpoints and resume, model files."""

import json
import math
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Callable

import torch
from tqdm import tqdm

from . import files
from .adapter import head_of, merge
from .tasks import NO_LOSS
from .weights import read_source


@dataclass
class Task:
    """Data and a measure of success.

    batch(size, seed, step) -> (x, y), a function of its arguments alone; loss(model, x, y) -> scalar; and
    evaluate(model, split) -> {"loss": float or None, "metric": float} for split "val" or "test".
    """
    name: str
    metric_name: str
    higher_is_better: bool
    batch: Callable
    loss: Callable
    evaluate: Callable


@dataclass
class Settings:
    """How to train. lr: of everything but a head of its own, which takes head_lr (None: lr). warmup: share of steps.
    schedule: "cosine" or "linear" decay to 0 after the warm-up. accumulate: parts in which a batch goes through the
    model, to save memory. eval_every, save_every: in steps, 0: at the end."""
    steps: int
    lr: float
    batch_size: int
    head_lr: float | None = None
    warmup: float = 0.1
    schedule: str = "linear"
    weight_decay: float = 0.0
    betas: tuple = (0.9, 0.999)
    clip: float = 1.0
    accumulate: int = 1
    seed: int = 0
    eval_every: int = 0
    save_every: int = 0

    def flags(self):
        """As plain values, without what does not decide the result: how often it is written, how a batch is cut."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()
                if k not in ("save_every", "eval_every", "accumulate")}


@dataclass
class Machine:
    """device: where the work runs.  dtype: of autocast, float32 for none.  reason: why, in a line for the reader.
    compile: whether training steps go through torch.compile."""
    device: torch.device
    dtype: torch.dtype
    reason: str
    compile: bool = False

    def autocast(self):
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)


class Diverged(ArithmeticError):
    """The loss is not finite any more."""


class Stopped(Exception):
    """Ctrl-C: the run has written its checkpoint and ended."""


def pick_machine(device="auto", dtype="auto", compile=False):
    """Resolve --device, --dtype and --compile to a Machine. Raises ValueError for a device that is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(d for d, ok in there.items() if ok) if device == "auto" else device
    if not there.get(name):
        raise ValueError(f"device {name!r} is not there: use auto or {' or '.join(d for d, ok in there.items() if ok)}")
    # emulated bf16 is slower than float32: only cards of compute capability 8 on do it themselves
    native = name == "cuda" and torch.cuda.get_device_capability()[0] >= 8
    if dtype == "auto":
        dtype = "float32" if name != "cuda" else "bfloat16" if native else "float16"
    why = "asked for" if device != "auto" else "the first of cuda, mps, cpu that is there"
    what = torch.cuda.get_device_name() if name == "cuda" else f"{torch.get_num_threads()} threads"
    reason = f"device {name} ({what}; {why}), {dtype}" + (" autocast" if dtype != "float32" else "")
    reason += ", compiled" if compile else ""
    return Machine(torch.device(name), getattr(torch, dtype), reason, compile)


def rate(step, s):
    """Factor on the learning rate at a step: a linear warm-up to 1, then the decay to 0."""
    warmup = max(1, round(s.warmup * s.steps))
    if step < warmup:
        return (step + 1) / warmup
    left = (s.steps - step) / max(1, s.steps - warmup)
    return left if s.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left))


def make_optimizer(model, s):
    """Fused AdamW over what is trained; tensors of two dimensions or more decay; a head of its own has its rate."""
    head = {id(p) for p in head_of(model).parameters()} if head_of(model) is not None else set()
    groups = {}
    for p in model.parameters():
        if p.requires_grad:
            lr = s.head_lr if id(p) in head and s.head_lr is not None else s.lr
            groups.setdefault((lr, s.weight_decay if p.dim() > 1 else 0.0), []).append(p)
    if not groups:
        raise ValueError("there is nothing to train: every parameter is frozen")
    fused = next(model.parameters()).device.type in ("cuda", "cpu")
    return torch.optim.AdamW([{"params": ps, "lr": lr, "base_lr": lr, "weight_decay": wd}
                              for (lr, wd), ps in groups.items()], betas=s.betas, fused=fused)


def train(model, task, s, machine, folder=None, flags=None, resume=False, label="train"):
    """Train in place for s.steps steps; returns {"ms_per_step", "log"}.

    folder: where last.pt, best.pt and metrics.jsonl go, None for nowhere.  flags: what the run was started with; a
    checkpoint remembers them.  resume: go on from folder/last.pt, where there is one; on a CPU the result equals the
    uninterrupted run's to the last bit.  Raises Diverged, Stopped, and ValueError where resume meets other flags.
    """
    model.to(machine.device).train()
    optimizer = make_optimizer(model, s)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
    run = Run(model, task, optimizer, scaler, folder, flags or {})
    stepping = torch.compile(model) if machine.compile else model   # the same parameters
    start = run.restore() if resume else 0
    seconds = 0.0
    with interrupts() as stop, tqdm(total=s.steps, initial=start, desc=label, leave=False, disable=None) as bar:
        for step in range(start, s.steps):
            began = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * rate(step, s)
            x, y = (t.to(machine.device, non_blocking=True) for t in task.batch(s.batch_size, s.seed, step))
            loss = torch.zeros((), device=machine.device)
            for part_x, part_y in zip(x.chunk(s.accumulate), y.chunk(s.accumulate)):
                targets = (part_y != NO_LOSS).sum()   # a loss is a mean over them, of a part as of the whole
                if s.accumulate > 1 and targets == 0:
                    continue   # and a mean over none is no number
                with machine.autocast():
                    part = task.loss(stepping, part_x, part_y)
                part = part * (targets.to(part.dtype) / (y != NO_LOSS).sum())
                scaler.scale(part).backward()
                loss += part.detach()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(trained, s.clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            done = step + 1
            stopping = stop.is_set()   # asked once a step: what is said to be written below must be written
            due = [every and done % every == 0 or done == s.steps for every in (s.eval_every, s.save_every)]
            if done % 10 == 0 or any(due) or stopping:   # reading the loss waits for a GPU: not at every step
                # a step can also ruin the weights with a loss that was finite before it
                value = loss.item() if all(p.isfinite().all() for p in trained) else math.nan
                if not math.isfinite(value):
                    raise Diverged(f"{label}: the loss is {value} at step {done}, learning rate "
                                   f"{s.lr * rate(step, s):.2g}: try a lower --lr")
                bar.set_postfix(loss=f"{value:.3f}", lr=f"{s.lr * rate(step, s):.1e}")
            seconds += time.perf_counter() - began
            bar.update()
            if due[0]:
                run.evaluate(done, s.lr * rate(step, s), machine)
            if (due[1] or stopping) and folder is not None:
                run.save("last.pt", done)
            if stopping or done == s.steps and stop.is_set():   # the last evaluation may be where Ctrl-C came
                raise Stopped(f"{label}: stopped at step {done} of {s.steps}; the same command with --resume goes on"
                              + (f" from {run.folder / 'last.pt'}" if folder is not None else ""))
    return {"ms_per_step": 1000 * seconds / max(1, s.steps - start), "log": run.log}


class Run:
    """What a training run writes: its log, last.pt to resume from, and best.pt, the best by validation metric, which
    is for the reader: tables and adapter files hold the last state."""

    def __init__(self, model, task, optimizer, scaler, folder, flags):
        self.model, self.task, self.optimizer, self.scaler, self.flags = model, task, optimizer, scaler, flags
        self.folder = None if folder is None else Path(folder)
        self.log, self.best = [], None

    def evaluate(self, step, lr, machine):
        with machine.autocast():
            scores = evaluate(self.model, self.task, "val")
        self.log.append({"step": step, "split": "val", **scores, "lr": lr})
        if self.folder is None:
            return
        files.write_text(self.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.log))
        sign = 1 if self.task.higher_is_better else -1
        if self.best is None or sign * scores["metric"] > sign * self.best:
            self.best = scores["metric"]
            self.save("best.pt", step)

    def save(self, name, step):
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        files.save(self.folder / name, "run", {
            "step": step, "model": trained_state(self.model), "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(), "random": [torch.get_rng_state(), *cuda], "flags": self.flags,
            "log": self.log, "best": self.best})

    def restore(self):
        """Go back to last.pt where there is one; returns the step to go on from, 0 where there is none."""
        if self.folder is None or not (self.folder / "last.pt").is_file():
            return 0
        content = files.load(self.folder / "last.pt", "run")
        other = [f"{k} was {content['flags'].get(k)!r} and is {self.flags.get(k)!r}"
                 for k in sorted(content["flags"].keys() | self.flags.keys())
                 if content["flags"].get(k) != self.flags.get(k)]
        if other:
            raise ValueError(f"{self.folder / 'last.pt'} cannot be resumed with other settings: " + "; ".join(other))
        put_trained_state(self.model, content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        torch.set_rng_state(content["random"][0])
        if torch.cuda.is_available() and len(content["random"]) > 1:
            torch.cuda.set_rng_state_all(content["random"][1:])
        self.log, self.best = content["log"], content["best"]
        # lines that were written after the checkpoint are cut: the steps behind them are done again
        files.write_text(self.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.log))
        return content["step"]


@torch.inference_mode()
def evaluate(model, task, split):
    """task.evaluate in eval mode and without autograd. Raises Diverged where a score is not finite."""
    was_training = model.training
    model.eval()
    scores = task.evaluate(model, split)
    model.train(was_training)
    for name, value in scores.items():
        if value is not None and not math.isfinite(value):
            raise Diverged(f"{task.name}: the {name} on {split} is {value}: try a lower --lr")
    return scores


def trained_state(model):
    """{name: tensor} of what training changes, on the CPU: a run's base can be made again and is not stored."""
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}


def put_trained_state(model, state):
    """The inverse of trained_state. Raises ValueError where the names or shapes are not those of this model."""
    ours = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if {k: v.shape for k, v in ours.items()} != {k: v.shape for k, v in state.items()}:
        raise ValueError("the checkpoint belongs to another model or method: its trained parameters differ")
    with torch.no_grad():
        for name, p in ours.items():
            p.copy_(state[name])


def save_model(path, model, **about):
    """Write a whole model, its config and plain values `about` it (tokenizer, classes, how it was trained)."""
    state = {k: v.cpu() for k, v in model.state_dict().items()}
    files.save(path, "model", {"class": type(model).__name__, "config": asdict(model.config), "state": state,
                               "about": about})


def load_model(path, model_class):
    """(model, about) from save_model's file. Raises FileNotFoundError, or ValueError for another kind of file."""
    content = files.load(path, "model")
    if content["class"] != model_class.__name__:
        raise ValueError(f"{path} holds a {content['class']}, not a {model_class.__name__}")
    model = model_class(model_class.Config(**content["config"]))
    model.load_state_dict(content["state"])
    return model, content["about"]


def load_base(source, model_class, urls, from_theirs, n_head=None):
    """(model, about) of a model file of ours, or of weights from elsewhere: a name in urls, or a file in their naming,
    which from_theirs turns into a model, with n_head heads where they are not of width 64; about["published"] tells
    the two apart. Raises as read_source and load_model do."""
    state = read_source(source, urls)
    if "kind" in state:   # ours, or an adapter or a run, which load_model refuses
        if n_head is not None:
            raise ValueError(f"{source} says itself how many heads it has: leave out --n-head")
        model, about = load_model(source, model_class)
        return model, {"published": False} | about
    return from_theirs(state, n_head=n_head).float(), {"data": Path(source).stem, "published": True}


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


def pretrain(model, task, s, machine, folder, about, resume=False):
    """The base model that folder/model.pt holds, or else this model, trained now and kept there, and its `about`.

    about: plain values that belong to the model (its data, tokenizer, classes). Raises ValueError where the kept
    model was made with other settings.
    """
    path = Path(folder) / "model.pt"
    flags = {"data": about["data"], "model": asdict(model.config), "dtype": str(machine.dtype), **s.flags()}
    if path.is_file():
        model, about = load_model(path, type(model))
        other = [f"{k} was {about['flags'].get(k)!r} and is {v!r}" for k, v in flags.items()
                 if about["flags"].get(k) != v and k != "dtype"]
        if other:
            raise ValueError(f"{path} was pretrained with other settings: {'; '.join(other)}: "
                             "give the same flags, another --out, or that file as --init")
        print(f"base: {path} is there and is reused, {about['result']}")
        return model, about
    print(f"base: pretraining on {task.name}, {sum(p.numel() for p in model.parameters()):,} parameters, "
          f"{s.steps} steps")
    began = time.perf_counter()
    train(model, task, s, machine, folder, flags, resume, "pretrain")
    with machine.autocast():
        metric = evaluate(model, task, "test")["metric"]
    about = about | {"flags": flags, "result": f"test {task.metric_name} {metric:.4g} on {task.name}"}
    save_model(path, model.cpu(), **about)
    print(f"base: {path}, {about['result']}, {time.perf_counter() - began:.0f} s")
    return model, about


def save_merged(model, about, out, form, to_theirs):
    """Merge an adapted model and write it to a folder: as a model file of ours, or in the naming of its origin."""
    merge(model)
    path = Path(out) / ("merged.pt" if form == "svmini" else f"merged-{form}.pt")
    if form == "svmini":
        save_model(path, model, **about)
    else:
        files.write_whole(path, lambda file: torch.save(to_theirs(model), file))
    print(f"{path} holds the merged model: plain weights, as fast as the base"
          + (f", in {form}'s naming, which does not tell its {model.config.n_head} heads" if form != "svmini" else ""))
