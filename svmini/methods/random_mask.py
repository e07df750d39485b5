"""Random masking (Xu and Zhang, arXiv 2405.02596, ICML 2024): train entries of the weight itself at random positions.

    W = W0 + E,   E zero except at k positions

Trained: those k entries; as many as SVFT trains with a band of `off_diagonals`, D(2d + 1) − d(d + 1) per matrix with
D = min(d_out, d_in).  Start: E = 0, so W = W0.
The paper draws one mask per matrix; here the seed fixes it, and matrices of one shape share it. Compared with SVFT at
equal count, no singular vectors take part. peft has a relative, SHiRA (arXiv 2406.13175).
"""

import torch
import torch.nn as nn

from .adapter import MAX_SEED, Adapter, check_int
from .svft import SVFT


class RandomMask(Adapter):
    examples = ("off_diagonals=2",)
    test_options = ("off_diagonals=0,seed=3",)
    lr = 5e-3

    def __init__(self, linear, *, off_diagonals=2, seed=0):
        super().__init__(linear, off_diagonals=off_diagonals, seed=seed)
        self.register_frozen("W0", linear.weight)
        k = self.count(*linear.weight.shape, off_diagonals=off_diagonals)
        g = torch.Generator("cpu").manual_seed(seed)
        drawn = torch.randperm(linear.weight.numel(), generator=g, device="cpu")[:k]
        self.register_buffer("indices", drawn.sort().values.to(linear.weight.device))   # (k,): i d_in + j, in the file
        self.e = nn.Parameter(linear.weight.new_zeros(k))

    @property
    def weight(self):
        W = self.W0.to(self.e.dtype).flatten()
        return W.scatter_add(0, self.indices, self.e).view_as(self.W0).to(self.base_dtype)  # (d_out, d_in)

    @staticmethod
    def count(d_out, d_in, *, off_diagonals=2, seed=0):
        return SVFT.count(d_out, d_in, off_diagonals=off_diagonals)

    @staticmethod
    def check(d_out, d_in, *, off_diagonals=2, seed=0):
        check_int("off_diagonals", off_diagonals, 0, min(d_out, d_in) - 1)
        check_int("seed", seed, 0, MAX_SEED)
