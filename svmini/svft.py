"""SVFT (Lingam et al., arXiv 2405.19597): train a sparse matrix M between the frozen singular vectors.

    W = U (Σ + M) Vᵀ                                                       (section 3)

Trained: M at the positions of a pattern.  Start: M = 0, so W = W0.  With D = min(d_out, d_in), d off-diagonals:
    plain    the diagonal (off_diagonals has no say)             D numbers a matrix
    banded   |i − j| ≤ d                                         k = D(2d + 1) − d(d + 1)
    random   k distinct positions, drawn once from a seed (the same for all matrices of one D)
    topk     the k positions of largest |u_iᵀ v_j|, which exists only where d_out = d_in (else their lengths differ)
U and V are square factors of the thin SVD: the paper's full ones add directions of singular value 0 only.
Forward builds W for many tokens and a square matrix (T > 2D plain, T > D else; measured 1.7 D and 0.94 D at D = 768),
and goes through the activations otherwise: svd.apply_factors has the count.

The authors' code departs from the paper: a trained sigmoid gate on M, M drawn from a Kaiming normal (so the model
changes before the first step), random positions that can repeat, a top-k that ranks u·v without the transpose and
takes U itself where the matrix is not square. Here it is as the paper has it; topk ranks the absolute value, since
without it the choice would hang on arbitrary signs.
"""

import torch
import torch.nn as nn

from .adapter import Adapter, whole
from .svd import apply_factors, thin_svd

PATTERNS = ("plain", "banded", "random", "topk")


class SVFT(Adapter):
    examples = ("pattern=plain", "off_diagonals=2", "off_diagonals=8", "pattern=random", "pattern=topk")
    lr = 2e-2

    def __init__(self, linear, *, pattern="banded", off_diagonals=2, seed=0):
        super().__init__(linear, pattern=pattern, off_diagonals=off_diagonals, seed=seed)
        U, S, Vt = thin_svd(linear.weight)                      # (d_out, D), (D,), (D, d_in)
        self.freeze("U", U)
        self.freeze("S", S)
        self.freeze("Vt", Vt)
        k = self.count(self.d_out, self.d_in, pattern=pattern, off_diagonals=off_diagonals)
        self.M = nn.Parameter(torch.zeros(k, dtype=S.dtype, device=S.device))
        if pattern != "plain":
            where = positions(pattern, U, Vt, off_diagonals, k, seed)
            if pattern == "banded":
                self.freeze("where", where)                     # follows from d alone
            else:
                self.register_buffer("where", where)            # stored: another torch may draw or rank otherwise

    def core(self):
        """Σ + M: (D,) where M is diagonal, else (D, D)."""
        if self.options["pattern"] == "plain":
            return self.S + self.M
        return torch.diag(self.S).flatten().scatter_add(0, self.where, self.M).view(len(self.S), -1)

    def weight(self):
        core = self.core()
        return self.U @ (torch.diag(core) if core.dim() == 1 else core) @ self.Vt   # (d_out, d_in)

    def forward(self, x):
        return apply_factors(x, self.U, self.core(), self.Vt, self.bias)

    def learned(self):
        core = self.core().detach()
        after = core.abs().sort(descending=True).values if core.dim() == 1 else torch.linalg.svdvals(core)
        return self.S, after, self.M

    @staticmethod
    def count(d_out, d_in, *, pattern="banded", off_diagonals=2, seed=0):
        D, d = min(d_out, d_in), off_diagonals
        return D if pattern == "plain" else D * (2 * d + 1) - d * (d + 1)

    @staticmethod
    def check(d_out, d_in, *, pattern="banded", off_diagonals=2, seed=0):
        if pattern not in PATTERNS:
            raise ValueError(f"pattern must be one of {', '.join(PATTERNS)}, not {pattern!r}")
        if pattern == "topk" and d_out != d_in:
            raise ValueError("topk ranks u_iᵀ v_j, which exists only for a square matrix: "
                             "target query, key, value and out, or take another pattern")
        whole("off_diagonals", off_diagonals, 0, None if pattern == "plain" else min(d_out, d_in) - 1)
        whole("seed", seed, 0)


def positions(pattern, U, Vt, off_diagonals, k, seed):
    """Where M is trained: k distinct positions i D + j, ascending (k,) int64."""
    D = Vt.shape[0]
    if pattern == "banded":
        i = torch.arange(D)
        return ((i[:, None] - i).abs() <= off_diagonals).flatten().nonzero()[:, 0].to(U.device)
    if pattern == "random":
        drawn = torch.randperm(D * D, generator=torch.Generator().manual_seed(seed))[:k]
        return drawn.sort().values.to(U.device)
    alike = (U.t() @ Vt.t()).abs()                              # (D, D): |u_iᵀ v_j|
    return alike.flatten().topk(k).indices.sort().values
