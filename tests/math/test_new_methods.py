"""The shared tests on methods that are not ours: right ones pass at first, each by a class and one line of METHODS;
each mistake that they are there for is seen."""

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
from svmini.methods.adapter import Adapter, check_int
from svmini.methods.svd import thin_svd


class LoRAXS(Adapter):
    """W = W0 + U_r R V_rᵀ, R trained from zero: r² numbers (in the manner of Bałazy et al., arXiv 2405.17604)."""
    examples = ("rank=8",)

    def __init__(self, linear, *, rank=8):
        super().__init__(linear, rank=rank)
        U, S, Vt = thin_svd(linear.weight)
        self.register_frozen("W0", linear.weight)
        self.register_frozen("U", U[:, :rank])
        self.register_frozen("Vt", Vt[:rank])
        self.R = nn.Parameter(S.new_zeros(rank, rank))

    @property
    def weight(self):
        return self.W0 + self.U @ self.R @ self.Vt

    def forward(self, x):
        return F.linear(x, self.W0, self.bias) + F.linear(F.linear(F.linear(x, self.Vt), self.R), self.U)

    @staticmethod
    def count(d_out, d_in, *, rank=8):
        return rank ** 2

    @staticmethod
    def check(d_out, d_in, *, rank=8):
        check_int("rank", rank, 1, min(d_out, d_in))


class Rows(Adapter):
    """W = diag(g) W0, g trained from one: d_out numbers. It has no options, and takes forward and check as they are."""
    examples = ("",)

    def __init__(self, linear):
        super().__init__(linear)
        self.register_buffer("W0", linear.weight.detach())  # stored with the adapter: not needed, and not wrong
        self.g = nn.Parameter(linear.weight.new_ones(self.out_features, 1))

    @property
    def weight(self):
        return self.W0 * self.g

    @staticmethod
    def count(d_out, d_in):
        return d_out


def fourierft():
    """The class that README.md shows under "how to add a method", as svmini/methods/fourierft.py would define it."""
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    code = [block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "class FourierFT" in block]
    assert len(code) == 1, "README.md must show the method that a reader adds, class FourierFT, once"
    module = {"__name__": "svmini.methods.fourierft", "__package__": "svmini.methods"}
    exec(code[0], module)
    return module["FourierFT"]


@pytest.mark.parametrize("new", (lambda: LoRAXS, lambda: Rows, fourierft), ids=("loraxs", "rows", "fourierft"))
def test_a_method_that_is_dropped_in_passes(new, monkeypatch, tmp_path):
    monkeypatch.setitem(METHODS, "new", new())
    own = [spec for spec in specs() if spec.startswith("new:")]
    assert own
    for spec in own:
        for check in test_contract.CHECKS:
            test_contract.run(check, spec, tmp_path)
        test_gradients.check_layer(spec)
        test_gradients.check_whole_model(spec, "vit")


def test_fourierft_is_its_equation(monkeypatch):
    """ΔW_pq = 300 / (d_out d_in) Σ c cos(2π (p j / d_out + q k / d_in)), summed over its n places (j, k)."""
    monkeypatch.setitem(METHODS, "new", fourierft())
    layer = layer_of("new:n=5,seed=3", "wide")
    p, q = torch.arange(16.0, dtype=torch.float64)[:, None], torch.arange(24.0, dtype=torch.float64)
    expected = linear("wide").weight.detach().clone()
    for c, n in zip(layer.c.detach(), layer.indices.tolist()):
        expected += 300 / (16 * 24) * c * torch.cos(2 * torch.pi * (p * (n // 24) / 16 + q * (n % 24) / 24))
    assert_close(layer.weight, expected, 1e-10)


class Forgetful(LoRAXS):
    """LoRA-XS with one mistake at a time."""
    mistake = None

    def __init__(self, linear, *, rank=8):
        super().__init__(linear, rank=rank)
        if self.mistake == "start":
            self.R.data += 1e-3
        if self.mistake == "base trained":
            self.V = nn.Parameter(self.Vt.clone())
            self.Vt = self.V
        if self.mistake == "a number that is never used":
            self.unused = nn.Parameter(self.R.new_zeros(1))
        if self.mistake == "another draw for each model":
            self.U = torch.linalg.qr(torch.randn_like(self.U)).Q
        if self.mistake == "left on the CPU":
            self.__dict__["U"] = self._buffers.pop("U")     # a plain attribute: .to() does not see it

    @property
    def weight(self):
        if self.mistake == "sign":
            return self.W0 - self.U @ self.R @ self.Vt
        return super().weight

    def forward(self, x):
        y = super().forward(x)
        if self.mistake == "many tokens" and x.numel() >= 100 * self.in_features:
            return y - 0.1 * (y - y.detach())
        if self.mistake == "no tokens":
            return y / (1 if x.abs().max() > 0 else 2)
        if self.mistake == "a value is asked for" and self.R.abs().max() > 100:
            return y * 0
        if self.mistake == "made on the CPU":
            return F.linear(y, torch.eye(self.out_features, dtype=y.dtype))
        if self.mistake == "dimensions lost":
            return y.view(-1, self.out_features)
        if self.mistake == "bias twice":
            return y + self.bias
        return y


SEEN_BY = {
    "start": "check_start", "bias twice": "check_start", "sign": "check_two_roads", "many tokens": "check_two_roads",
    "no tokens": "check_two_roads", "dimensions lost": "check_two_roads", "base trained": "check_count",
    "a number that is never used": "check_training",
    "another draw for each model": "check_files", "a value is asked for": "check_meta",
    "made on the CPU": "check_meta", "left on the CPU": "check_meta"}


@pytest.mark.parametrize("mistake", SEEN_BY)
def test_a_mistake_is_seen(mistake, monkeypatch, tmp_path):
    check = getattr(test_contract, SEEN_BY[mistake])
    monkeypatch.setitem(METHODS, "new", LoRAXS)
    test_contract.run(check, "new:rank=4", tmp_path)
    monkeypatch.setitem(METHODS, "new", type("Wrong", (Forgetful,), {"mistake": mistake}))
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        test_contract.run(check, "new:rank=4", tmp_path)
