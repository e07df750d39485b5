"""The shared tests on the two example methods of the pages: they pass at once, and every planted mistake fails."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import test_contract
import test_gradients
from layers import assert_close, layer_of, linear, specs
from svmini import METHODS
from svmini.methods.adapter import Adapter

ROOT = Path(__file__).parents[2]


def example(page):
    """Return the class that a page defines in a block of Python, as if it were a file in svmini/methods."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    code, = [block for block in blocks if "(Adapter):" in block]
    module = {"__name__": "svmini.methods.new", "__package__": "svmini.methods", "torch": torch, "Adapter": Adapter}
    exec(code, module)
    return module[re.search(r"class (\w+)\(Adapter\):", code)[1]]


FourierFT = example("docs/add_a_method.md")


class Mistaken(FourierFT):
    """FourierFT with a forward of its own and one mistake at a time, or none."""
    examples = ("n=5",)
    mistake = "none"

    def __init__(self, linear, *, n=5, seed=0):
        super().__init__(linear, n=n, seed=seed)
        if self.mistake == "start":
            self.c.data += 1e-3
        if self.mistake in ("a parameter that is not counted", "a parameter that is never used"):
            self.more = nn.Parameter(self.c.new_zeros(1))
        if self.mistake == "a parameter that is never used":    # but counted
            self.c, self.indices = nn.Parameter(self.c[1:].detach()), self.indices[1:]
        if self.mistake == "another draw for each model":
            self.register_frozen("indices", torch.randperm(self.W0.numel())[:n])
        if self.mistake == "left out of state_dict":
            self.register_buffer("W0", self.W0, persistent=False)
        if self.mistake == "left on the CPU":
            self.__dict__["W0"] = self._buffers.pop("W0")   # a plain attribute, which .to() does not move

    @property
    def weight(self):
        return 2 * self.W0 - super().weight if self.mistake == "sign" else super().weight

    def forward(self, x):
        y = F.linear(x, super().weight, self.bias)
        if self.mistake == "many tokens" and x.numel() >= 100 * self.in_features:
            return y - 0.1 * (y - y.detach())
        if self.mistake == "no tokens":
            return y / (1 if x.abs().max() > 0 else 2)
        if self.mistake == "a value is asked for" and self.c.abs().max() > 100:
            return y * 0
        if self.mistake == "made on the CPU":
            return F.linear(y, torch.eye(self.out_features, dtype=y.dtype))
        if self.mistake == "dimensions lost":
            return y.view(-1, self.out_features)
        if self.mistake == "output in float32":
            return y.float()
        if self.mistake == "bias twice":
            return y + self.bias
        return y


@pytest.mark.parametrize("new", (lambda: FourierFT, lambda: example("README.md"), lambda: Mistaken),
                         ids=("add_a_method.md", "README.md", "own forward"))
def test_a_new_method_passes_all_checks(new, monkeypatch, tmp_path):
    monkeypatch.setitem(METHODS, "new", new())
    own = [spec for spec in specs() if spec.startswith("new:")]
    assert own
    for spec in own:
        for check in test_contract.CHECKS:
            test_contract.run(check, spec, tmp_path)
        test_gradients.check_layer(spec)
        test_gradients.check_model(spec)


SEEN_BY = {
    "start": "check_start", "bias twice": "check_start", "sign": "check_two_paths", "many tokens": "check_two_paths",
    "no tokens": "check_two_paths", "dimensions lost": "check_two_paths",
    "a parameter that is not counted": "check_training",
    "a parameter that is never used": "check_training", "left out of state_dict": "check_state_dict",
    "output in float32": "check_half", "another draw for each model": "check_files",
    "a value is asked for": "check_meta", "made on the CPU": "check_meta", "left on the CPU": "check_meta"}


@pytest.mark.parametrize("mistake", SEEN_BY)
def test_a_mistake_fails_its_check(mistake, monkeypatch, tmp_path):
    monkeypatch.setitem(METHODS, "new", type("Wrong", (Mistaken,), {"mistake": mistake}))
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        test_contract.run(getattr(test_contract, SEEN_BY[mistake]), "new:n=5", tmp_path)


def test_a_w0_that_was_not_registered_is_named():
    layer = FourierFT(nn.Linear(8, 6, bias=False), n=5)
    layer.__dict__["W0"] = layer._buffers.pop("W0")     # as `self.W0 = linear.weight.detach()` leaves it
    with pytest.raises(ValueError, match="FourierFT has no frozen tensor: pass W0 to register_frozen"):
        layer(torch.zeros(2, 8))


def test_fourierft_is_its_equation(monkeypatch):
    """ΔW_pq = 300 / (d_out d_in) Σ c cos(2π (p j / d_out + q k / d_in)), summed over its n positions (j, k)."""
    monkeypatch.setitem(METHODS, "new", FourierFT)
    layer = layer_of("new:n=5,seed=3", "wide")
    p, q = torch.arange(16.0, dtype=torch.float64)[:, None], torch.arange(24.0, dtype=torch.float64)
    expected = linear("wide").weight.detach().clone()
    for c, n in zip(layer.c.detach(), layer.indices.tolist()):
        expected += 300 / (16 * 24) * c * torch.cos(2 * torch.pi * (p * (n // 24) / 16 + q * (n % 24) / 24))
    assert_close(layer.weight, expected, 1e-10)
