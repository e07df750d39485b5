"""What the tests of training share: a task that takes no time, tiny models, Ctrl-C, and what two runs left."""

import json
import signal

import torch
import torch.nn.functional as F

from svmini import GPT, GPTConfig, ViT, ViTConfig
from svmini.rng import generator
from svmini.training import checkpoint
from svmini.training.loop import TrainConfig
from svmini.training.device import resolve_device

CPU = resolve_device("cpu")


def walk(size, seed, step):
    """Texts of seven tokens that are a walk of constant step: x and y, (size, 8)."""
    g = generator("walk", seed, step)
    start, stride = torch.randint(7, (2, size, 1), generator=g)
    tokens = (start + stride * torch.arange(9)) % 7             # (size, 9)
    return tokens[:, :-1], tokens[:, 1:]


def token_loss(model, x, y):
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def score(model, split):
    value = token_loss(model, *walk(16, split, 0)).item()
    return {"loss": value, "metric": value}


class Toy:
    """The task to predict a walk's next token; any of its parts can be changed."""
    name, metric, higher_is_better = "walk", "loss", False

    def __init__(self, **changes):
        self.data_config, self.batch, self.loss, self.evaluate = {"data": "walk"}, walk, token_loss, score
        self.show = lambda model: ["shown"]
        vars(self).update(changes)


def tiny_gpt(dropout=0.0, seed=0):
    torch.manual_seed(seed)
    return GPT(GPTConfig(7, 8, 1, 2, 8, dropout))


def tiny_vit(classes=3):
    torch.manual_seed(0)
    return ViT(ViTConfig(4, 2, 1, classes, 1, 2, 8))


def train_config(**changes):
    return TrainConfig(**{"steps": 12, "lr": 1e-2, "batch_size": 4, "seed": 3, **changes})


def interrupt_at(step, stage="batch"):
    """A toy that gets Ctrl-C while it makes the batch of a step (0-based), or at its n-th evaluation (from 1)."""
    evaluations = []

    def batch(size, seed, now):
        if stage == "batch" and now == step:
            signal.raise_signal(signal.SIGINT)
        return walk(size, seed, now)

    def evaluate(model, split):
        evaluations.append(split)
        if stage == "evaluate" and len(evaluations) == step:
            signal.raise_signal(signal.SIGINT)
        return score(model, split)

    return Toy(batch=batch, evaluate=evaluate)


def run(folder, resume=False, run_config=None, eval_every=3, save_every=5):
    return checkpoint.RunFolder(folder, run_config or {}, resume, save_every, eval_every)


def same(a, b):
    """Equal to the last bit: dicts, lists, tensors and plain values."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_same_folder(a, b):
    """Two folders hold the same: every tensor and plain value, every line, but for what the clock says."""
    names = {str(p.relative_to(a)) for p in a.rglob("*") if p.is_file()}
    assert names and names == {str(p.relative_to(b)) for p in b.rglob("*") if p.is_file()}
    for name in names:
        if name.endswith(".pt"):
            assert same(*(torch.load(f / name, weights_only=True) for f in (a, b))), f"{name} differs"
        elif name.endswith("row.json"):
            one, other = (json.loads((f / name).read_text(encoding="utf-8")) for f in (a, b))
            assert one["run_config"] == other["run_config"] and timeless(one["row"]) == timeless(other["row"])
        elif name.endswith("metrics.jsonl"):
            assert (a / name).read_bytes() == (b / name).read_bytes(), f"{name} differs"


def timeless(row):
    """A row without what the clock says."""
    return {key: value for key, value in row.items() if key not in ("seconds", "ms_per_step")}


def log_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
