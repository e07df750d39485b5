"""What the tests of adapting and of adapter files share: a small model with all that an adapter meets, how to leave the
start, and what a refusal must leave alone."""

import copy
from contextlib import contextmanager

import pytest
import torch
import torch.nn as nn

from svmini import GPT, METHODS, GPTConfig, ViT, ViTConfig, adapt
from svmini.methods import parse_spec

OURS = ("query", "value")
FIRST = {"lora": "lora:rank=2", "dora": "dora:rank=2", "vera": "vera:rank=4"}   # whose default rank is large for 16x16
ONE_EACH = [FIRST.get(method, method) for method in METHODS]      # a spec of every method
SPECS = [f"{name}:{options.partition('@')[0]}" for name, method in METHODS.items()
         for options in (*method.examples, *method.test_options)]   # and all that its shared tests try


class Net(nn.Module):
    """Two target layers, one without bias, a frozen LayerNorm and buffer, and a head that is trained whole."""
    also_train = ("head",)

    def __init__(self, classes=3):
        super().__init__()
        torch.manual_seed(0)
        self.query = nn.Linear(16, 16)
        self.value = nn.Linear(16, 16, bias=False)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, classes)
        self.register_buffer("shift", torch.randn(16))

    def forward(self, x):
        return self.head(self.norm(self.query(x) + self.value(x) + self.shift))


def gpt():
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, d_model=16))


def vit():
    torch.manual_seed(0)
    return ViT(ViTConfig(image_size=8, patch_size=4, in_channels=3, num_classes=4, n_layer=2, n_head=2, d_model=16))


def fit(spec, model, targets=OURS, **more):
    """The model, adapted by a spec such as "svft:pattern=topk"."""
    method, options, _ = parse_spec(spec)
    return adapt(model, method, targets=targets, **more, **options)


def fits(spec, d_out, d_in):
    method, options, _ = parse_spec(spec)
    try:
        METHODS[method].check(d_out, d_in, **options)
    except ValueError:
        return False
    return True


def numbers(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def move(model, size=0.1):
    """Move every trained number away from the start, where most mistakes cannot be seen; returns the model."""
    generator = torch.Generator().manual_seed(2)
    for p in model.parameters():
        if p.requires_grad:
            p += size * torch.randn(p.shape, generator=generator)
    return model


def train(model, loss, steps=3, lr=1e-2):
    """A few steps as a user would write them; every trained number has a gradient. Returns the model."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        optimizer.step()
    return model


def assert_close(got, expected, eps=1e-5):
    """Equal to eps of the largest expected number."""
    got, expected = got.detach(), expected.detach()
    assert got.shape == expected.shape and got.dtype == expected.dtype
    error = (got - expected).abs().max() / expected.abs().max()
    assert error <= eps, f"off by {error:.1e} of the largest number, {eps:.0e} allowed"


def all_tensors(model):
    """Copies of every parameter and buffer, also of those that no file holds, by name."""
    return {name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}


def same(a, b):
    """Whether two dicts of tensors are equal; nan is nan."""
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and (
        torch.equal(a[k].nan_to_num(7, 8, 9), b[k].nan_to_num(7, 8, 9))) for k in a)


@contextmanager
def refused(model, error, *specs):
    """The block must raise `error` in one sentence that has all `specs`, and leave the model as it was."""
    def picture():
        return ([(name, type(part), part.training) for name, part in model.named_modules()],
                [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
                copy.copy(vars(model).get("adaptation")))

    before, seen = all_tensors(model), picture()
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    assert type(caught.value) is error and message and "\n" not in message
    for spec in specs:
        assert spec in message, f"{spec!r} is not in {message!r}"
    assert picture() == seen and same(all_tensors(model), before)
