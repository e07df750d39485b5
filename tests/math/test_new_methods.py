"""The shared tests on new methods: a correct one passes at once, and every mistake that a check is for fails it."""

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
    """W = W0 + U_r R V_rᵀ, R trained from zero, r² parameters (after Bałazy et al., arXiv 2405.17604)."""
    examples = ("rank=8",)

    def __init__(self, linear, *, rank=8):
        super().__init__(linear, rank=rank)
        U, S, Vt = thin_svd(linear.weight)
        self.register_frozen("W0", linear.weight)
        self.register_frozen("U", U[:, :rank].to(linear.weight.dtype))
        self.register_frozen("Vt", Vt[:rank].to(linear.weight.dtype))
        self.R = nn.Parameter(S.new_zeros(rank, rank))

    @property
    def weight(self):
        return (self.W0 + self.U.to(self.R.dtype) @ self.R @ self.Vt.to(self.R.dtype)).to(self.base_dtype)

    def forward(self, x):
        h = F.linear(F.linear(x, self.Vt), self.R.to(self.Vt.dtype))
        return F.linear(x, self.W0, self.bias) + F.linear(h, self.U)

    @staticmethod
    def count(d_out, d_in, *, rank=8):
        return rank ** 2

    @staticmethod
    def check(d_out, d_in, *, rank=8):
        check_int("rank", rank, 1, min(d_out, d_in))


def fourierft():
    """The class in docs/add_a_method.md, as svmini/methods/fourierft.py would define it."""
    page = (Path(__file__).parents[2] / "docs" / "add_a_method.md").read_text(encoding="utf-8")
    code, = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    module = {"__name__": "svmini.methods.fourierft", "__package__": "svmini.methods"}
    exec(code, module)
    return module["FourierFT"]


@pytest.mark.parametrize("new", (lambda: LoRAXS, fourierft), ids=("loraxs", "fourierft"))
def test_a_new_method_passes_all_checks(new, monkeypatch, tmp_path):
    monkeypatch.setitem(METHODS, "new", new())
    own = [spec for spec in specs() if spec.startswith("new:")]
    assert own
    for spec in own:
        for check in test_contract.CHECKS:
            test_contract.run(check, spec, tmp_path)
        test_gradients.check_layer(spec)
        test_gradients.check_model(spec, "vit")


def test_fourierft_is_its_equation(monkeypatch):
    """ΔW_pq = 300 / (d_out d_in) Σ c cos(2π (p j / d_out + q k / d_in)), summed over its n positions (j, k)."""
    monkeypatch.setitem(METHODS, "new", fourierft())
    layer = layer_of("new:n=5,seed=3", "wide")
    p, q = torch.arange(16.0, dtype=torch.float64)[:, None], torch.arange(24.0, dtype=torch.float64)
    expected = linear("wide").weight.detach().clone()
    for c, n in zip(layer.c.detach(), layer.indices.tolist()):
        expected += 300 / (16 * 24) * c * torch.cos(2 * torch.pi * (p * (n // 24) / 16 + q * (n % 24) / 24))
    assert_close(layer.weight, expected, 1e-10)


class Mistaken(LoRAXS):
    """LoRA-XS with one mistake at a time."""
    mistake = None

    def __init__(self, linear, *, rank=8):
        super().__init__(linear, rank=rank)
        if self.mistake == "start":
            self.R.data += 1e-3
        if self.mistake == "base trained":
            self.V = nn.Parameter(self.Vt.clone())
            self.Vt = self.V
        if self.mistake == "a parameter that is never used":
            self.unused = nn.Parameter(self.R.new_zeros(1))
        if self.mistake == "another draw for each model":
            self.U = torch.linalg.qr(torch.randn_like(self.U)).Q
        if self.mistake == "left out of state_dict":
            self.register_buffer("U", self.U, persistent=False)
        if self.mistake == "left on the CPU":
            self.__dict__["U"] = self._buffers.pop("U")     # a plain attribute, which .to() does not move

    @property
    def weight(self):
        if self.mistake == "sign":
            return 2 * self.W0 - super().weight
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
        if self.mistake == "output in float32":
            return y.float()
        if self.mistake == "bias twice":
            return y + self.bias
        return y


SEEN_BY = {
    "start": "check_start", "bias twice": "check_start", "sign": "check_two_paths", "many tokens": "check_two_paths",
    "no tokens": "check_two_paths", "dimensions lost": "check_two_paths", "base trained": "check_count",
    "a parameter that is never used": "check_training",
    "left out of state_dict": "check_state_dict", "output in float32": "check_half",
    "another draw for each model": "check_files", "a value is asked for": "check_meta",
    "made on the CPU": "check_meta", "left on the CPU": "check_meta"}


@pytest.mark.parametrize("mistake", SEEN_BY)
def test_a_mistake_fails_its_check(mistake, monkeypatch, tmp_path):
    check = getattr(test_contract, SEEN_BY[mistake])
    monkeypatch.setitem(METHODS, "new", LoRAXS)
    test_contract.run(check, "new:rank=4", tmp_path)
    monkeypatch.setitem(METHODS, "new", type("Wrong", (Mistaken,), {"mistake": mistake}))
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        test_contract.run(check, "new:rank=4", tmp_path)
