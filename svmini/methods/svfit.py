"""SVFit (Sun et al., arXiv 2409.05926): train the top singular values and freeze the singular vectors.

    W = U_r diag(s) V_rᵀ + W_e,   W_e = W0 − U_r Σ_r V_rᵀ frozen          (section 3)

Trained: s, the r largest singular values, r parameters per matrix.  Start: s = σ_1 .. σ_r, so W = W0 (up to rounding).
With r = D = min(d_out, d_in), the default, W_e is zero and SVFit is the same optimization as plain SVFT.
The paper uses all singular values, or the smallest r that holds 99 % of the energy Σ σ_i². There is no public code.

On a bf16 or fp16 base model, U Σ Vᵀ would differ from W0 by rounding (relative error 3e-3). The layer then keeps W0 for
every r and computes W0 + U diag(s − σ) Vᵀ, which is W0 exactly at the start.
"""

import torch.nn as nn

from .adapter import HALF_DTYPES, Adapter, check_int, is_number
from .svd import apply_factors, apply_with_residual, thin_svd


class SVFit(Adapter):
    examples = ("", "rank=8", "energy=0.9")
    lr = 1e-1

    def __init__(self, linear, *, rank=None, energy=None):
        super().__init__(linear, rank=rank, energy=energy)
        U, S, Vt = thin_svd(linear.weight)                      # (d_out, D), (D,), (D, d_in)
        if energy is not None:
            share = (S.double() ** 2).cumsum(0) / (S.double() ** 2).sum()
            rank = min(int((share < energy).sum()) + 1, len(S))
        r = rank or len(S)
        self.options = {"rank": r, "energy": None}              # resolved, as the adapter file stores it for this layer
        # with all singular values, the factors replace W0
        factors_only = r == len(S) and linear.weight.dtype not in HALF_DTYPES
        self.register_frozen("W0", None if factors_only else linear.weight)
        if r < len(S):
            U, S, Vt = U[:, :r].clone(), S[:r].clone(), Vt[:r].clone()      # a slice would keep the full tensor alive
        self.register_frozen("U", U.to(linear.weight.dtype))
        self.register_frozen("S", S)
        self.register_frozen("Vt", Vt.to(linear.weight.dtype))
        self.s = nn.Parameter(S.clone())

    @property
    def weight(self):
        if self.W0 is None:
            return (self.U * self.s) @ self.Vt                  # (d_out, d_in)
        # U_r diag(s) V_rᵀ + W_e with W_e written out, which is exactly W0 at the start
        U, Vt = self.U.to(self.s.dtype), self.Vt.to(self.s.dtype)
        return (self.W0 + (U * (self.s - self.S)) @ Vt).to(self.base_dtype)

    def forward(self, x):
        if self.W0 is None:
            return apply_factors(x, self.U, self.s, self.Vt, self.bias)
        return apply_with_residual(x, self.W0, self.U, self.s - self.S, self.Vt, self.bias)

    @staticmethod
    def count(d_out, d_in, *, rank=None, energy=None):
        """Return r, or D = min(d_out, d_in) without a rank. Raises ValueError for energy, whose r depends on W0."""
        if energy is not None:
            raise ValueError("the number of singular values that hold an energy depends on the weights: give a rank")
        return rank or min(d_out, d_in)

    @staticmethod
    def check(d_out, d_in, *, rank=None, energy=None):
        if rank is not None and energy is not None:
            raise ValueError("give rank or energy, not both")
        if rank is not None:
            check_int("rank", rank, 1, min(d_out, d_in))
        if energy is not None and not (is_number(energy) and 0 < energy <= 1):
            raise ValueError(f"energy must be in (0, 1], not {energy!r}")
