"""LoRA (Hu et al., arXiv 2106.09685), and PiSSA (Meng et al., arXiv 2404.02948) as another initialization of it.

    W = W0 + (α/r) B A        with α = r by default                        (LoRA, section 4.1)

Trained: A (r, d_in) and B (d_out, r), r (d_in + d_out) parameters per matrix.
Start:  kaiming  A uniform in ±1/√d_in as in the authors' code (the paper says Gaussian), B = 0, so W = W0
        pissa    B = U_r Σ_r^½, A = Σ_r^½ V_rᵀ, and W_res = W0 − B A replaces W0 (α = r only), so W = W0 again
On a bf16 or fp16 base model, W_res is rounded to the base's dtype, so PiSSA starts from W0 plus a rounding error. Its
norm, measured on 96 x 96 and 384 x 384 matrices, is 1.4e-3 to 1.6e-3 of that of W0 in bf16 and 2e-4 in fp16.
"""

import torch.nn as nn
import torch.nn.functional as F

from .adapter import Adapter, add_update, check_int, is_number
from .svd import thin_svd


class LoRA(Adapter):
    examples = ("rank=8", "rank=2", "rank=1", "rank=8,init=pissa")
    test_options = ("rank=4,alpha=8",)
    lr = 5e-3

    def __init__(self, linear, *, rank=8, alpha=None, init="kaiming"):
        super().__init__(linear, rank=rank, alpha=alpha, init=init)
        W0 = linear.weight.detach()
        self.scale = (rank if alpha is None else alpha) / rank
        if init == "pissa":
            U, S, Vt = thin_svd(W0)                             # (d_out, D), (D,), (D, d_in)
            root = S[:rank].sqrt()
            self.B = nn.Parameter(U[:, :rank] * root)           # (d_out, r)
            self.A = nn.Parameter(root[:, None] * Vt[:rank])    # (r, d_in)
            self.register_frozen("W_res", (W0 - self.B @ self.A).to(W0.dtype))
        else:
            self.A = nn.Parameter(W0.new_empty(rank, self.in_features))
            nn.init.uniform_(self.A, -self.in_features ** -0.5, self.in_features ** -0.5)
            self.B = nn.Parameter(W0.new_zeros(self.out_features, rank))
            self.register_frozen("W0", W0)

    @property
    def frozen_weight(self):
        """W0, or W_res for PiSSA (d_out, d_in)."""
        return self.W_res if self.options["init"] == "pissa" else self.W0

    @property
    def weight(self):
        return (self.frozen_weight + self.scale * self.B @ self.A).to(self.base_dtype)      # (d_out, d_in)

    def forward(self, x):
        W = self.frozen_weight
        return add_update(x, W, self.bias, F.linear(x, self.A.to(W.dtype)), self.scale * self.B)

    @staticmethod
    def count(d_out, d_in, *, rank=8, alpha=None, init="kaiming"):
        return rank * (d_in + d_out)

    @staticmethod
    def check(d_out, d_in, *, rank=8, alpha=None, init="kaiming"):
        check_int("rank", rank, 1, min(d_out, d_in))
        if alpha is not None and not (is_number(alpha) and alpha > 0):
            raise ValueError(f"alpha must be a number above 0, not {alpha!r}")
        if init not in ("kaiming", "pissa"):
            raise ValueError(f"init must be kaiming or pissa, not {init!r}")
        if init == "pissa" and alpha not in (None, rank):
            raise ValueError("pissa splits W0 exactly only if alpha = rank: leave out alpha")
