"""Small models, tasks that take no time, scripts with few steps, and assertions for the tests of the program."""

import contextlib
import copy
import functools
import io
import json
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import train_gpt  # noqa: E402
import train_vit  # noqa: E402
from svmini import GPT, METHODS, GPTConfig, ViT, ViTConfig, adapt, analyze, cli  # noqa: E402
from svmini.data import glyphs, text  # noqa: E402
from svmini.data.arithmetic import Arithmetic  # noqa: E402
from svmini.errors import InputError  # noqa: E402
from svmini.methods import parse_spec  # noqa: E402
from svmini.rng import generator  # noqa: E402
from svmini.training.checkpoint import RunFolder  # noqa: E402
from svmini.training.device import resolve_device  # noqa: E402
from svmini.training.loop import TrainConfig  # noqa: E402

CPU = resolve_device("cpu")
TARGETS = ("query", "value")
FIRST = {"lora": "lora:rank=2", "dora": "dora:rank=2", "vera": "vera:rank=4"}   # the default is too large for 16x16
ONE_EACH = [FIRST.get(method, method) for method in METHODS]      # one spec of every method
SMALL_GPT = GPTConfig(vocab_size=31, block_size=10, n_layer=2, n_head=3, d_model=12)
SMALL_VIT = ViTConfig(image_size=12, patch_size=4, in_channels=3, num_classes=5, n_layer=2, n_head=3, d_model=12)
SIZES = {"n_layer": 1, "n_head": 2, "d_model": 16}                # of the models of the scripts
BYTES = [f"{b:02x}" for b in range(256)]                          # a tokenizer whose tokens are the bytes


def fits(spec, d_out, d_in):
    method, options, _ = parse_spec(spec)
    try:
        METHODS[method].check(d_out, d_in, **options)
    except ValueError:
        return False
    return True


SQUARE = [spec for name, method in METHODS.items() for options in (*method.examples, *method.test_options)
          if fits(spec := f"{name}:{options.partition('@')[0]}", 16, 16)]   # specs of the shared tests that fit Net


# ---- models and tensors ----

class Net(nn.Module):
    """Two target layers, one without bias, a frozen LayerNorm, a buffer, and a head that is trained in full."""
    also_train = ("head",)

    def __init__(self, classes=3, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.query = nn.Linear(16, 16)
        self.value = nn.Linear(16, 16, bias=False)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, classes)
        self.register_buffer("shift", torch.randn(16))

    def forward(self, x):
        return self.head(self.norm(self.query(x) + self.value(x) + self.shift))


def tiny_gpt(dropout=0.0, seed=0, n_layer=1):
    """Return the smallest GPT, at its initialization."""
    torch.manual_seed(seed)
    return GPT(GPTConfig(7, 8, n_layer, 2, 8, dropout))


def tiny_vit(classes=3, n_layer=1):
    """Return the smallest ViT, at its initialization."""
    torch.manual_seed(0)
    return ViT(ViTConfig(4, 2, 1, classes, n_layer, 2, 8))


def small_gpt(**changes):
    """Return a GPT of two blocks and three heads whose parameters all matter, in evaluation mode."""
    return move(GPT(replace(SMALL_GPT, **changes)), 0.3).eval()


def small_vit(**changes):
    return move(ViT(replace(SMALL_VIT, **changes)), 0.3).eval()


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=seeded(seed))


def tokens(*shape, seed=0):
    return torch.randint(SMALL_GPT.vocab_size, shape, generator=seeded(seed))


@torch.no_grad()
def move(model, size=0.1, seed=2):
    """Move all trainable parameters away from the initialization, which hides most bugs. Returns the model."""
    g = seeded(seed)
    for p in model.parameters():
        if p.requires_grad:
            p += size * torch.randn(p.shape, generator=g)
    return model


def adapt_spec(spec, model, targets=TARGETS, **more):
    """Adapt the model with a spec such as "svft:pattern=topk"."""
    method, options, _ = parse_spec(spec)
    return adapt(model, method, targets=targets, **more, **options)


def take_steps(model, loss, steps=3, lr=1e-2):
    """Take a few steps as a user would; every trainable parameter must have a gradient. Returns the model."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        optimizer.step()
    return model


# ---- tasks and training ----

def walk(size, seed, step):
    """Return texts of seven tokens that walk with a constant stride: x and y, (size, 8)."""
    g = generator("walk", seed, step)
    start, stride = torch.randint(7, (2, size, 1), generator=g)
    path = (start + stride * torch.arange(9)) % 7               # (size, 9)
    return path[:, :-1], path[:, 1:]


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


def image_task():
    """Return a task of four random images for tiny_vit."""
    x, y = torch.randn(4, 1, 4, 4), torch.tensor([0, 1, 2, 0])
    return Toy(batch=lambda *key: (x, y), loss=lambda m, x, y: F.cross_entropy(m(x), y),
               evaluate=lambda m, split: {"loss": None, "metric": 1.0})


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


def train_config(**changes):
    return TrainConfig(**{"steps": 12, "lr": 1e-2, "batch_size": 4, "seed": 3, **changes})


def run_folder(folder=None, resume=False, run_config=None, eval_every=3, save_every=5):
    return RunFolder(folder, run_config or {}, resume, save_every, eval_every)


# ---- scripts and tools ----

def make_little(patch):
    """Set few steps of small models, a few images per class, the first pages of the texts, and forty problems."""
    patch.setattr(train_vit, "PRETRAIN", replace(train_vit.PRETRAIN, steps=24))
    patch.setitem(train_vit.ADAPT, "steps", 8)
    for key, config in train_gpt.PRETRAIN.items():
        patch.setitem(train_gpt.PRETRAIN, key, replace(config, steps=24, batch_size=4))
    for key in train_gpt.ADAPT:
        patch.setitem(train_gpt.ADAPT, key, {"steps": 8, "batch_size": 4})
    patch.setattr(train_vit, "MODEL", SIZES)
    patch.setattr(train_gpt, "MODEL", {"text": SIZES, "arithmetic": SIZES})
    for which in "AB":
        patch.setitem(glyphs.GLYPHS[which], "sizes", {"train": 4, "val": 2, "test": 3})
    library, topics = text.stdlib_source()[:20_000], text.reference_topics()[:15_000]
    patch.setattr(text, "stdlib_source", lambda: library)
    patch.setattr(text, "reference_topics", lambda: topics)
    patch.setattr(text, "TEXT_EVAL_SIZE", 4)
    patch.setattr(train_gpt, "train_bpe", functools.cache(train_gpt.train_bpe))
    patch.setattr(analyze, "draw_best", lambda *a: None)   # most of the time of a little run
    problems, known = Arithmetic.problems, {}

    def few_problems(self, split, n):
        key = self.operation, split
        known[key] = known.get(key) or problems(self, split, 40)
        return known[key]

    patch.setattr(Arithmetic, "problems", few_problems)


@pytest.fixture(scope="module", autouse=True)
def little(tmp_path_factory):
    """Make both scripts little; returns a folder with a text and question-answer pairs."""
    folder = tmp_path_factory.mktemp("data ü")
    (folder / "prose.txt").write_text("\n\n".join(
        f"On day {i} the cat sees {i * i} birds\nand number {7 * i % 11} sings." for i in range(260)))
    (folder / "pairs.jsonl").write_text("".join(
        json.dumps({"question": f"Ann has {i} pears.", "answer": f"So {i}.\n#### {i}"}) + "\n" for i in range(20)))
    with pytest.MonkeyPatch.context() as patch:
        make_little(patch)
        yield folder


def call(program, *argv, code=0):
    """Return what a script (on the CPU) or a tool prints on stdout; if `code` is 2 or 130, its one line on stderr."""
    out, error, argv = io.StringIO(), io.StringIO(), [str(a) for a in argv]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        got = (program.main([*argv, "--device", "cpu"]) if hasattr(program, "main") else
               cli.run_command(program.command, argv))
    assert got == code, error.getvalue()
    assert code == 0 or error.getvalue().count("\n") == 1
    return error.getvalue() if code > 1 else out.getvalue()


def read(out):
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def rows(out):
    return [timeless(row) for row in read(out)["rows"]]


def timeless(row):
    """Return a row without the times that were measured."""
    return {key: value for key, value in row.items() if key not in ("seconds", "ms_per_step")}


def log_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


# ---- assertions ----

def assert_close(got, expected, eps=1e-5):
    """Assert equality up to eps times the largest expected value, and equal shapes and dtypes."""
    got, expected = got.detach(), expected.detach()
    assert got.shape == expected.shape and got.dtype == expected.dtype
    error = (got - expected).abs().max() / expected.abs().max()
    assert error <= eps, f"off by {error:.1e} of the largest value, {eps:.0e} allowed"


def same(a, b):
    """Return True if dicts, lists, tensors or plain values are equal to the last bit; nan equals nan in tensors."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a.nan_to_num(7, 8, 9), b.nan_to_num(7, 8, 9))
    return a == b


def all_tensors(model):
    """Return copies of every parameter and buffer by name, also of buffers that no file holds."""
    return {name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}


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


@contextlib.contextmanager
def refused(*parts):
    """Assert that the block raises an InputError of one line that contains all `parts`."""
    with pytest.raises(InputError) as caught:
        yield
    message = str(caught.value)
    assert message and "\n" not in message
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"


@contextlib.contextmanager
def rejected(model, *parts):
    """Assert the same as `refused`, and that the block leaves the model as it was."""
    def state():
        return ([(name, type(module), module.training) for name, module in model.named_modules()],
                [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
                copy.copy(vars(model).get("adaptation")))

    tensors, seen = all_tensors(model), state()
    with refused(*parts):
        yield
    assert state() == seen and same(all_tensors(model), tensors)
