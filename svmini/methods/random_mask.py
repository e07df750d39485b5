"""Random entries: train k numbers of the weight itself, at positions drawn once. A control, from no paper.

    W = W0 + E,   E zero but for k entries

Trained: those k numbers; as many as SVFT trains with a band of `off_diagonals`, D(2d + 1) − d(d + 1) a matrix with
D = min(d_out, d_in).  Start: E = 0, so W = W0.
Beside SVFT it tells what the count alone does: here no singular vectors, nor any others, take part.
"""

import torch
import torch.nn as nn

from .adapter import Adapter, check_int
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
        self.register_buffer("indices", drawn.sort().values.to(linear.weight.device))   # (k,): i d_in + j, stored
        self.e = nn.Parameter(linear.weight.new_zeros(k))

    @property
    def weight(self):
        return self.W0.flatten().scatter_add(0, self.indices, self.e).view_as(self.W0)   # (d_out, d_in)

    @staticmethod
    def count(d_out, d_in, *, off_diagonals=2, seed=0):
        return SVFT.count(d_out, d_in, off_diagonals=off_diagonals)

    @staticmethod
    def check(d_out, d_in, *, off_diagonals=2, seed=0):
        check_int("off_diagonals", off_diagonals, 0, min(d_out, d_in) - 1)
        check_int("seed", seed, 0)
