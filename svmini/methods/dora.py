"""DoRA (Liu et al., arXiv 2402.09353): LoRA for the direction of each output row, and a trained magnitude.

    W = m ⊙ V / ‖V‖,   V = W0 + (α/r) B A,   ‖V‖ the norm of each output row   (equation 5)

Trained: m (d_out), A (r, d_in) and B (d_out, r), r (d_in + d_out) + d_out parameters per matrix.
Start: m = ‖W0‖ row by row, A uniform in ±1/√d_in, B = 0, so W = W0.
The backward pass holds the norm constant (section 4.3) unless detach_norm=False. The paper writes columns of its
transposed W; the counts that it prints for Gemma imply rows of the nn.Linear weight.

A row of zeros, or one so small that its norm underflows, has no direction; published checkpoints contain such rows. If
the norm is below EPS, the ratio m / ‖V‖ is 0: the row stays zero in training, and value and gradient are finite.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from .adapter import HALF_DTYPES, Adapter, add_update
from .lora import LoRA

EPS = 1e-12   # as in torch.nn.functional.normalize


class DoRA(Adapter):
    examples = ("rank=8", "rank=1")
    test_options = ("rank=4,alpha=2,detach_norm=False",)
    lr = 5e-3

    def __init__(self, linear, *, rank=8, alpha=None, detach_norm=True):
        super().__init__(linear, rank=rank, alpha=alpha, detach_norm=detach_norm)
        W0 = linear.weight.detach()
        self.scale = (rank if alpha is None else alpha) / rank
        self.register_frozen("W0", W0)
        self.m = nn.Parameter((W0.float() if W0.dtype in HALF_DTYPES else W0).norm(dim=1))      # (d_out,)
        self.A = nn.Parameter(W0.new_empty(rank, self.in_features))
        nn.init.uniform_(self.A, -self.in_features ** -0.5, self.in_features ** -0.5)
        self.B = nn.Parameter(W0.new_zeros(self.out_features, rank))

    def ratio(self):
        """m / ‖W0 + (α/r) B A‖, row by row (d_out,); 0 for a row without direction."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.options["detach_norm"]):
            norm = (self.W0 + self.scale * self.B @ self.A).norm(dim=1)
        return self.m / norm.clamp_min(EPS) * (norm > EPS)

    @property
    def weight(self):
        V = self.W0 + self.scale * self.B @ self.A
        return (self.ratio()[:, None] * V).to(self.base_dtype)                      # (d_out, d_in)

    def forward(self, x):
        A = self.A.to(self.W0.dtype)
        y = add_update(x, self.W0, None, F.linear(x, A), self.scale * self.B)        # V x
        scaled = y * self.ratio() if self.bias is None else torch.addcmul(self.bias, y, self.ratio())
        return scaled.to(self.W0.dtype)     # float32 under autocast, which rounds once; half on a half-precision base

    @staticmethod
    def count(d_out, d_in, *, rank=8, alpha=None, detach_norm=True):
        return rank * (d_in + d_out) + d_out

    @staticmethod
    def check(d_out, d_in, *, rank=8, alpha=None, detach_norm=True):
        LoRA.check(d_out, d_in, rank=rank, alpha=alpha)
        if not isinstance(detach_norm, bool):
            raise ValueError(f"detach_norm must be True or False, not {detach_norm!r}")
