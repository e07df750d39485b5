"""BOFT (Liu et al., arXiv 2311.06243): rotate the weight by a product of sparse butterfly factors.

    W = W0 R,   R = F_m … F_1,   every block of a factor (I + Q)(I − Q)⁻¹ with Qᵀ = −Q        (section 4)

F_i cuts the d_in coordinates into chunks of b 2^(i−1), views a chunk as (2, 2^(i−1), b/2), and mixes the b numbers at
each index of the middle axis: neighbours in F_1, ever further apart after it. m = 1 is block-diagonal OFT.
Trained: the entries of every Q above its diagonal, m · d_in · (b − 1) / 2 numbers a matrix.
Start: Q = 0, so R = I.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from .adapter import Adapter, whole


class BOFT(Adapter):
    examples = ("block_size=4,factors=2", "block_size=2,factors=1")
    lr = 2e-2

    def __init__(self, linear, *, block_size=4, factors=2):
        super().__init__(linear, block_size=block_size, factors=factors)
        b = self.b = block_size
        self.freeze("W0", linear.weight)
        self.Q = nn.Parameter(linear.weight.new_zeros(factors, self.d_in // b, b * (b - 1) // 2))

    def blocks(self):
        """The rotations of all factors (m, d_in / b, b, b), by the Cayley transform."""
        i, j = torch.triu_indices(self.b, self.b, 1, device=self.Q.device)
        Q = self.Q.new_zeros(*self.Q.shape[:2], self.b, self.b)
        Q[..., i, j] = self.Q
        Q = Q - Q.mT                                                    # skew: Qᵀ = −Q
        I = torch.eye(self.b, dtype=Q.dtype, device=Q.device)
        return torch.linalg.solve(I - Q, I + Q)                         # (I − Q)⁻¹ and I + Q commute

    def rotate(self, x):
        """R x for every row of x (..., d_in)."""
        shape, b = x.shape, self.b
        for i, block in enumerate(self.blocks()):                       # (d_in / b, b, b); F_1 first, at i = 0
            x = x.reshape(-1, self.d_in // (b * 2 ** i), 2, 2 ** i, b // 2).transpose(2, 3)
            x = x.reshape(-1, self.d_in // b, b)                        # (T, d_in / b, b)
            x = torch.einsum("tnj,nij->tni", x, block)
            x = x.reshape(-1, self.d_in // (b * 2 ** i), 2 ** i, 2, b // 2).transpose(2, 3)
        return x.reshape(shape)

    def weight(self):
        R = self.rotate(torch.eye(self.d_in, dtype=self.W0.dtype, device=self.W0.device)).t()
        return self.W0 @ R                                              # (d_out, d_in)

    def forward(self, x):
        return F.linear(self.rotate(x), self.W0, self.bias)             # W0 (R x) + b

    @staticmethod
    def count(d_out, d_in, *, block_size=4, factors=2):
        return factors * d_in * (block_size - 1) // 2

    @staticmethod
    def check(d_out, d_in, *, block_size=4, factors=2):
        whole("block_size", block_size, 2, d_in)
        whole("factors", factors, 1)
        if block_size % 2:
            raise ValueError(f"block_size must be even, not {block_size}: a factor mixes two halves of a block")
        chunk = block_size * 2 ** (factors - 1)
        if d_in % chunk:
            raise ValueError(f"d_in={d_in} is not divisible by block_size * 2^(factors - 1) = {chunk}: "
                             "take fewer factors or smaller blocks")
