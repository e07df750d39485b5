"""VeRA (Kopiczko et al., arXiv 2310.11454): one random pair of matrices for all layers, scaled by trained vectors.

    W = W0 + Λ_b B Λ_d A                                                   (equation 2)

Trained: b (d_out) and d (r), d_out + r parameters per matrix; r may exceed the matrix's own rank.
Start: b = 0, so W = W0; d = d_init.
A (r, d_in) and B (d_out, r) are random and frozen, Kaiming-uniform in ±√(6/fan_in). Every layer uses the first columns
of one A and the first rows of one B. Both are drawn on the CPU from `seed`, in an order that does not depend on the
other layers, so they can be drawn again and are not in the adapter file. fan_in is the layer's own, so the scale of A
follows the width of the layer. Each layer has a copy of its slice.
"""

from functools import lru_cache

import torch
import torch.nn as nn
import torch.nn.functional as F

from .adapter import MAX_SEED, Adapter, check_int, is_number
from .svd import builds_first


class VeRA(Adapter):
    examples = ("rank=256", "rank=16")
    test_options = ("rank=16,seed=3,d_init=0.5",)
    lr = 5e-2

    def __init__(self, linear, *, rank=256, seed=0, d_init=0.1):
        super().__init__(linear, rank=rank, seed=seed, d_init=d_init)
        W0 = linear.weight.detach()
        self.register_frozen("W0", W0)
        A = uniform(2 * seed, self.in_features, rank).t() * (6 / self.in_features) ** 0.5
        B = uniform(2 * seed + 1, self.out_features, rank) * (6 / rank) ** 0.5
        self.register_frozen("A", A.to(W0).contiguous())                            # (r, d_in)
        self.register_frozen("B", B.to(W0))                                         # (d_out, r)
        self.b = nn.Parameter(W0.new_zeros(self.out_features))
        self.d = nn.Parameter(W0.new_full((rank,), d_init))

    @property
    def weight(self):
        update = (self.b[:, None] * self.B * self.d) @ self.A.to(self.d.dtype)
        return (self.W0 + update).to(self.base_dtype)                               # (d_out, d_in)

    def forward(self, x):
        if builds_first(x, self.W0.shape, len(self.d)):     # if r exceeds the width, as on the teaching models
            return super().forward(x)
        flat = x.reshape(-1, self.in_features)                                      # (T, d_in)
        h = (F.linear(flat, self.A) * self.d).to(self.A.dtype)                      # (T, r)
        y = F.linear(flat, self.W0, self.bias)                                      # (T, d_out)
        y.addcmul_(F.linear(h, self.B), self.b)                                     # in place: see add_update
        return y.view(*x.shape[:-1], self.out_features)

    @staticmethod
    def count(d_out, d_in, *, rank=256, seed=0, d_init=0.1):
        return d_out + rank

    @staticmethod
    def check(d_out, d_in, *, rank=256, seed=0, d_init=0.1):
        check_int("rank", rank, 1)
        check_int("seed", seed, 0, MAX_SEED)
        if not is_number(d_init) or d_init == 0:
            raise ValueError(f"d_init must be a number other than 0, because d = 0 has no gradient, not {d_init!r}")


@lru_cache(maxsize=16)
def uniform(seed, rows, rank):
    """Draw (rows, rank) values in ±1; the first rows of a longer draw are the same."""
    g = torch.Generator("cpu").manual_seed(seed)
    return 2 * torch.rand(rows, rank, generator=g, dtype=torch.float32, device="cpu") - 1
