"""BOFT (Liu et al., arXiv 2311.06243): rotate the weight by a product of sparse butterfly factors.

    W = W0 Rᵀ,   R = F_m … F_1,   every block of a factor (I + Q)(I − Q)⁻¹ with Qᵀ = −Q       (section 4)

F_i cuts the d_in coordinates into chunks of b 2^(i−1), views a chunk as (2, 2^(i−1), b/2), and mixes the b coordinates
at each index of the middle axis: neighbors in F_1, coordinates that are farther apart in each later factor. m = 1 is
block-diagonal OFT. No factor mixes across chunks of c = b 2^(m−1), so R is block-diagonal with blocks of that size.
They are computed once per step, and one batched product rotates x, instead of m products with copies between them.
The paper and its code rotate the transposed weight, R W0ᵀ, so F_1ᵀ is next to W0. W0 R would be another family if
m ≥ 2.
Trained: the entries of every Q above its diagonal, m · d_in · (b − 1) / 2 parameters per matrix.
Start: Q = 0, so R = I and W = W0.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from .adapter import Adapter, check_int


class BOFT(Adapter):
    examples = ("block_size=4,factors=2", "block_size=2,factors=1")
    test_options = ("block_size=2,factors=3",)
    lr = 2e-2

    def __init__(self, linear, *, block_size=4, factors=2):
        super().__init__(linear, block_size=block_size, factors=factors)
        b = self.b = block_size
        self.c = b * 2 ** (factors - 1)
        self.register_frozen("W0", linear.weight)
        shape = factors, self.in_features // b, b * (b - 1) // 2
        self.Q = nn.Parameter(linear.weight.new_zeros(shape))

    def blocks(self):
        """Return the rotations of all factors (m, d_in / b, b, b), by the Cayley transform."""
        i, j = torch.triu_indices(self.b, self.b, 1, device=self.Q.device)
        Q = self.Q.new_zeros(*self.Q.shape[:2], self.b, self.b)
        Q[..., i, j] = self.Q
        Q = Q - Q.mT                                                    # skew: Qᵀ = −Q
        I = torch.eye(self.b, dtype=Q.dtype, device=Q.device)
        return torch.linalg.solve(I - Q, I + Q)                         # (I − Q)⁻¹ and I + Q commute

    def rotation(self):
        """Return the diagonal blocks of R = F_m … F_1 (d_in / c, c, c)."""
        b, c = self.b, self.c
        R = torch.eye(c, dtype=self.Q.dtype, device=self.Q.device).repeat(self.in_features // c, 1)   # (d_in, c)
        for i, block in enumerate(self.blocks()):                       # (d_in / b, b, b); F_1 first, with i = 0
            R = R.reshape(-1, 2, 2 ** i, b // 2, c).transpose(1, 2).reshape(-1, b, c)
            R = block @ R                                               # (d_in / b, b, c): rows are mixed
            R = R.reshape(-1, 2 ** i, 2, b // 2, c).transpose(1, 2)
        return R.reshape(-1, c, c)

    @property
    def weight(self):
        R = torch.block_diag(*self.rotation())
        return (self.W0.to(self.Q.dtype) @ R.t()).to(self.base_dtype)               # (d_out, d_in)

    def forward(self, x):
        R = self.rotation().to(self.W0.dtype)
        xR = torch.einsum("...ni,nij->...nj", x.unflatten(-1, (-1, self.c)), R)         # (..., d_in / c, c)
        return F.linear(xR.flatten(-2), self.W0, self.bias)             # W0 (Rᵀ x) + b

    @staticmethod
    def count(d_out, d_in, *, block_size=4, factors=2):
        return factors * d_in * (block_size - 1) // 2

    @staticmethod
    def check(d_out, d_in, *, block_size=4, factors=2):
        check_int("block_size", block_size, 2, d_in)
        check_int("factors", factors, 1)
        if block_size % 2:
            raise ValueError(f"block_size must be even, not {block_size}: a factor mixes the two halves of a block")
        chunk = block_size * 2 ** (factors - 1)
        if d_in % chunk:
            raise ValueError(f"d_in={d_in} is not divisible by block_size * 2^(factors - 1) = {chunk}: "
                             "choose fewer factors or smaller blocks")
