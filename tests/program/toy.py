"""Shared by the tests of training: a task that takes no time, tiny models, Ctrl-C, and comparisons of run folders."""

import json
import signal

import torch
import torch.nn.functional as F

from svmini import GPT, GPTConfig, ViT, ViTConfig
from svmini.rng import generator
from svmini.training.checkpoint import RunFolder
from svmini.training.device import resolve_device
from svmini.training.loop import TrainConfig

CPU = resolve_device("cpu")


def walk(size, seed, step):
    """Return texts of seven tokens that walk with a constant stride: x and y, (size, 8)."""
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
    """The task of predicting the next token of a walk. Each of its parts can be replaced."""
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


def image_task(**changes):
    """Return a task of four random images for tiny_vit."""
    x, y = torch.randn(4, 1, 4, 4), torch.tensor([0, 1, 2, 0])
    return Toy(**{"batch": lambda *key: (x, y), "loss": lambda m, x, y: F.cross_entropy(m(x), y),
                  "evaluate": lambda m, split: {"loss": None, "metric": 1.0}, **changes})


def train_config(**changes):
    return TrainConfig(**{"steps": 12, "lr": 1e-2, "batch_size": 4, "seed": 3, **changes})


def run_folder(folder=None, resume=False, run_config=None, eval_every=3, save_every=5):
    return RunFolder(folder, run_config or {}, resume, save_every, eval_every)


def interrupt_at(step, stage="batch"):
    """Return a toy that gets Ctrl-C while it makes the batch of a step (from 0), or in its n-th evaluation (from 1)."""
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


def same(a, b):
    """Whether dicts, lists, tensors or plain values are equal to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_same_folder(a, b):
    """Assert that two folders have the same files with the same tensors, values and lines, except for times."""
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
    """Return a row without the times that were measured."""
    return {key: value for key, value in row.items() if key not in ("seconds", "ms_per_step")}


def log_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
