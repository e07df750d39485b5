"""Shared by the tests of adapting and adapter files: small models, leaving the initialization, rejected calls."""

import copy
from contextlib import contextmanager

import pytest
import torch
import torch.nn as nn

from svmini import GPT, METHODS, GPTConfig, ViT, ViTConfig, adapt
from svmini.errors import InputError
from svmini.methods import parse_spec

TARGETS = ("query", "value")
FIRST = {"lora": "lora:rank=2", "dora": "dora:rank=2", "vera": "vera:rank=4"}   # the default is too large for 16x16
ONE_EACH = [FIRST.get(method, method) for method in METHODS]      # one spec of every method
SPECS = [f"{name}:{options.partition('@')[0]}" for name, method in METHODS.items()
         for options in (*method.examples, *method.test_options)]   # all specs of the shared tests


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


def gpt():
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, d_model=16))


def vit():
    torch.manual_seed(0)
    return ViT(ViTConfig(image_size=8, patch_size=4, in_channels=3, num_classes=4, n_layer=2, n_head=2, d_model=16))


def fit(spec, model, targets=TARGETS, **more):
    """Adapt the model with a spec such as "svft:pattern=topk"."""
    method, options, _ = parse_spec(spec)
    return adapt(model, method, targets=targets, **more, **options)


def fits(spec, d_out, d_in):
    method, options, _ = parse_spec(spec)
    try:
        METHODS[method].check(d_out, d_in, **options)
    except ValueError:
        return False
    return True


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def move(model, size=0.1):
    """Move all trainable parameters away from the initialization, which hides most bugs. Returns the model."""
    generator = torch.Generator().manual_seed(2)
    for p in model.parameters():
        if p.requires_grad:
            p += size * torch.randn(p.shape, generator=generator)
    return model


def train(model, loss, steps=3, lr=1e-2):
    """Take a few steps as a user would; every trainable parameter must have a gradient. Returns the model."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        optimizer.step()
    return model


def assert_close(got, expected, eps=1e-5):
    """Equal within eps of the largest expected value."""
    got, expected = got.detach(), expected.detach()
    assert got.shape == expected.shape and got.dtype == expected.dtype
    error = (got - expected).abs().max() / expected.abs().max()
    assert error <= eps, f"off by {error:.1e} of the largest value, {eps:.0e} allowed"


def all_tensors(model):
    """Copies of every parameter and buffer by name, also of buffers that no file holds."""
    return {name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}


def same(a, b):
    """Return True if two dicts of tensors are equal; nan equals nan."""
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and (
        torch.equal(a[k].nan_to_num(7, 8, 9), b[k].nan_to_num(7, 8, 9))) for k in a)


@contextmanager
def rejected(model, *parts):
    """The block must raise a one-line InputError that contains all `parts`, and leave the model as it was."""
    def state():
        return ([(name, type(module), module.training) for name, module in model.named_modules()],
                [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
                copy.copy(vars(model).get("adaptation")))

    tensors, seen = all_tensors(model), state()
    with pytest.raises(InputError) as caught:
        yield
    message = str(caught.value)
    assert type(caught.value) is InputError and message and "\n" not in message
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"
    assert state() == seen and same(all_tensors(model), tensors)
