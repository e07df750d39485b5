"""SVFit (Sun et al., arXiv 2409.05926): train the singular values, keep the singular vectors.

    W = U_r diag(s) V_rᵀ + W_e,   W_e = W0 − U_r Σ_r V_rᵀ frozen          (section 3)

Trained: s, the r largest singular values, r numbers a matrix.  Start: s = σ_1 .. σ_r, so W = W0 (to rounding).
The order of products is that of svd.apply_factors with all ranks (as SVFT plain), else of svd.apply_beside.
The paper takes r = all, or the smallest r that holds 99 % of the energy Σ σ_i². There is no public code.
"""

import torch.nn as nn

from .adapter import Adapter, is_number, check_int
from .svd import apply_beside, apply_factors, thin_svd


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
        self.options = {"rank": r, "energy": None}              # resolved: what a file stores for this layer
        # with all ranks W_e is zero and the factors stand for W0, which is then not kept
        self.register_frozen("W0", None if r == len(S) else linear.weight)
        if r < len(S):
            U, S, Vt = U[:, :r].clone(), S[:r], Vt[:r].clone()  # a slice would keep the whole alive
        self.register_frozen("U", U)
        self.register_frozen("S", S)
        self.register_frozen("Vt", Vt)
        self.s = nn.Parameter(S.clone())

    @property
    def weight(self):
        if self.W0 is None:
            return (self.U * self.s) @ self.Vt                  # (d_out, d_in)
        # U_r diag(s) V_rᵀ + W_e with W_e written out: exactly W0 at the start
        return self.W0 + (self.U * (self.s - self.S)) @ self.Vt

    def forward(self, x):
        if self.W0 is None:
            return apply_factors(x, self.U, self.s, self.Vt, self.bias)
        return apply_beside(x, self.W0, self.U, self.s - self.S, self.Vt, self.bias)

    @staticmethod
    def count(d_out, d_in, *, rank=None, energy=None):
        """r, or D = min(d_out, d_in) without a rank. Raises ValueError for energy, whose r depends on the weights."""
        if energy is not None:
            raise ValueError("how many singular values hold an energy depends on the weights: give a rank to count")
        return rank or min(d_out, d_in)

    @staticmethod
    def check(d_out, d_in, *, rank=None, energy=None):
        if rank is not None and energy is not None:
            raise ValueError("give rank or energy, not both")
        if rank is not None:
            check_int("rank", rank, 1, min(d_out, d_in))
        if energy is not None and not (is_number(energy) and 0 < energy <= 1):
            raise ValueError(f"energy must lie in (0, 1], not {energy!r}")
