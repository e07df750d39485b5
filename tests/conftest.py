"""What several tests share: a small model with everything an adapter meets, its cases, and how to leave the start."""

import ast
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn as nn

from svmini import METHODS

torch.set_num_threads(1)   # the models are tiny: threads would only wait for one another


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: more of the same, beyond the three minutes: python -m pytest -m slow")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("slow") and "slow" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="slow: python -m pytest -m slow"))


EPS = {torch.float32: 1e-5, torch.float64: 1e-10}   # relative to the largest number
SHAPES = {"square": (16, 16), "wide": (16, 24), "tall": (24, 16)}   # with 3, 20 and 200 tokens: every path there is
TOKENS = (3, 20, 200)


def parse(example):
    """"rank=8,init=pissa" -> {"rank": 8, "init": "pissa"}"""
    options = {}
    for pair in filter(None, example.split(",")):
        name, value = pair.split("=")
        try:
            options[name] = ast.literal_eval(value)
        except ValueError:
            options[name] = value
    return options


def method_of_the_readme():
    """The class that the README shows under "Adding a method", as svmini/loraxs.py would define it."""
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    code, = re.findall(r"```python\n(\"\"\"W = W0 \+ U_r R.*?)```", readme, re.DOTALL)
    module = {"__name__": "svmini.loraxs", "__package__": "svmini"}
    exec(code, module)
    return module["LoRAXS"]


def cases():
    """(method, example) for every example of every method that is registered now."""
    return [(method, example) for method in METHODS for example in METHODS[method].examples]


class Net(nn.Module):
    """Two target layers, one without bias, a frozen LayerNorm and buffer, and a head that is trained whole."""

    def __init__(self, d_out, d_in, dtype=torch.float64, seed=0, classes=3):
        super().__init__()
        torch.manual_seed(seed)
        self.query = nn.Linear(d_in, d_out)
        self.value = nn.Linear(d_in, d_out, bias=False)
        self.norm = nn.LayerNorm(d_out)
        self.head = nn.Linear(d_out, classes)
        self.register_buffer("shift", torch.randn(d_out))
        self.to(dtype)

    def forward(self, x):
        return self.head(self.norm(self.query(x) + self.value(x) + self.shift))


def tokens(T, d_in, dtype=torch.float64, seed=1):
    return torch.randn(T, d_in, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def move(model, seed=2, size=0.3):
    """Move every trained number away from the start, where most mistakes cannot be seen; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p += size * torch.randn(p.shape, generator=generator, dtype=torch.float32)
    return model


def assert_close(got, expected, eps):
    """Equal to eps of the largest expected number."""
    assert got.shape == expected.shape and got.dtype == expected.dtype
    error = (got - expected).abs().max() / expected.abs().max()
    assert error <= eps, f"off by {error:.1e} of the largest number, {eps:.0e} allowed"


def all_tensors(model):
    """Copies of every parameter and buffer, also of those that no file holds, by name."""
    return {name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}


@contextmanager
def refused(model, error, *words):
    """The block must raise `error` in one sentence that has all `words`, and leave the model as it was."""
    def picture():
        return ([(name, type(part), part.training) for name, part in model.named_modules()],
                [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
                getattr(model, "adaptation", None))

    before, seen = all_tensors(model), picture()
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    assert type(caught.value) is error and message and "\n" not in message
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"
    after = all_tensors(model)
    assert picture() == seen and after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
