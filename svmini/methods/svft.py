"""SVFT (Lingam et al., arXiv 2405.19597): train a sparse matrix M between the frozen singular vectors.

    W = U (Σ + M) Vᵀ                                                       (section 3)
    W = W0 + U_r M V_rᵀ        with rank=r: M between the first r singular vectors

Trained: M at the positions of a pattern.  Start: M = 0, so W = W0.  With D = min(d_out, d_in), or D = r with a rank,
and d off-diagonals on each side:
    plain    the diagonal (off_diagonals has no say)             D numbers a matrix
    banded   |i − j| ≤ d                                         k = D(2d + 1) − d(d + 1)
    random   as many, k distinct positions, drawn once from a seed (the same for all matrices of one D)
    topk     the k positions of largest |u_iᵀ v_j|, which exists only where d_out = d_in (else their lengths differ)
basis="random" is a control that the paper does not have: orthonormal columns drawn from the seed in place of U and V,
    W = W0 + Q_1 M Q_2ᵀ,       so that M is trained at the same places, between directions that W0 knows nothing of.

Where this leaves the paper: its U and V are full and square; here they are thin, as in its authors' code. A matrix
that is not square then cannot become every matrix, even with a dense M: outside U's columns (or V's) nothing changes.
Its truncation study drops the residual, U_r (Σ_r + M) V_rᵀ, and so starts from a damaged model; rank=r keeps it.
Where the authors' code leaves the paper: a trained sigmoid gate on M, M drawn from a Kaiming normal (so the model
changes before the first step), random positions that can repeat, a top-k that ranks u·v without the transpose and
takes U itself where the matrix is not square. Here it is as the paper has it; topk ranks the absolute value, since
without it the choice would depend on arbitrary signs.
"""

from functools import lru_cache

import torch
import torch.nn as nn

from .adapter import Adapter, check_int
from .svd import apply_beside, apply_factors, thin_svd

PATTERNS = ("plain", "banded", "random", "topk")


class SVFT(Adapter):
    examples = ("pattern=plain", "off_diagonals=2", "off_diagonals=8", "pattern=random",
                "pattern=topk@query,key,value,out", "rank=8,off_diagonals=7", "off_diagonals=2,basis=random")
    test_options = ("pattern=random,off_diagonals=4,seed=7", "rank=5,pattern=plain", "rank=6,pattern=topk",
                    "pattern=plain,basis=random,seed=3", "rank=4,off_diagonals=1,basis=random")
    lr = 2e-2

    def __init__(self, linear, *, pattern="banded", off_diagonals=2, rank=None, basis="singular", seed=0):
        options = dict(pattern=pattern, off_diagonals=off_diagonals, rank=rank, basis=basis, seed=seed)
        super().__init__(linear, **options)
        U, S, Vt = thin_svd(linear.weight) if basis == "singular" else random_basis(linear.weight, seed)
        r = rank or len(S)
        # U Σ Vᵀ stands for W0, which is then not kept
        self.register_frozen("W0", None if r == len(S) and basis == "singular" else linear.weight)
        if r < len(S):
            U, S, Vt = U[:, :r].clone(), S[:r].clone(), Vt[:r].clone()  # a slice would keep the whole alive
        self.register_frozen("U", U)                                       # (d_out, r)
        self.register_frozen("S", S)                                       # (r,)
        self.register_frozen("Vt", Vt)                                     # (r, d_in)
        k = self.count(*linear.weight.shape, **options)
        self.M = nn.Parameter(torch.zeros(k, dtype=S.dtype, device=S.device))
        if pattern != "plain":
            indices = positions(pattern, U, Vt, off_diagonals, k, seed)          # (k,): i r + j
            if pattern == "banded":
                self.register_frozen("indices", indices)
            else:
                self.register_buffer("indices", indices)            # stored: another torch may draw or rank otherwise

    def core(self):
        """Σ + M, or M alone beside W0: (r,) where it is diagonal, else (r, r)."""
        start = self.S if self.W0 is None else torch.zeros_like(self.S)
        if self.options["pattern"] == "plain":
            return start + self.M
        return torch.diag(start).flatten().scatter_add(0, self.indices, self.M).view(len(start), -1)

    @property
    def weight(self):
        core = self.core()
        inner = (self.U * core if core.dim() == 1 else self.U @ core) @ self.Vt     # (d_out, d_in)
        return inner if self.W0 is None else self.W0 + inner

    def forward(self, x):
        """The same as F.linear(x, self.weight, self.bias), in the order of products that costs least."""
        if self.W0 is None:
            return apply_factors(x, self.U, self.core(), self.Vt, self.bias)
        return apply_beside(x, self.W0, self.U, self.core(), self.Vt, self.bias)

    @staticmethod
    def count(d_out, d_in, *, pattern="banded", off_diagonals=2, rank=None, basis="singular", seed=0):
        D, d = rank or min(d_out, d_in), off_diagonals
        return D if pattern == "plain" else D * (2 * d + 1) - d * (d + 1)

    @staticmethod
    def check(d_out, d_in, *, pattern="banded", off_diagonals=2, rank=None, basis="singular", seed=0):
        if pattern not in PATTERNS:
            raise ValueError(f"pattern must be one of {', '.join(PATTERNS)}, not {pattern!r}")
        if basis not in ("singular", "random"):
            raise ValueError(f"basis must be singular or random, not {basis!r}")
        if pattern == "topk" and d_out != d_in:
            raise ValueError("topk ranks u_iᵀ v_j, which exists only for a square matrix: "
                             "target query, key, value and out, or take another pattern")
        if rank is not None:
            check_int("rank", rank, 1, min(d_out, d_in))
        check_int("off_diagonals", off_diagonals, 0, None if pattern == "plain" else (rank or min(d_out, d_in)) - 1)
        check_int("seed", seed, 0)


def positions(pattern, U, Vt, off_diagonals, k, seed):
    """Where M is trained: k distinct positions i r + j of M (r, r), ascending (k,) int64."""
    r, device = Vt.shape[0], U.device
    if pattern == "banded":
        i = torch.arange(r, device=device)
        return ((i[:, None] - i).abs() <= off_diagonals).flatten().nonzero()[:, 0]
    if pattern == "random":
        drawn = torch.randperm(r * r, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")[:k]
        return drawn.sort().values.to(device)
    alike = (U.t() @ Vt.t()).abs()                              # (r, r): |u_iᵀ v_j|
    return alike.flatten().topk(k).indices.sort().values


def random_basis(weight, seed):
    """(Q_1 (d_out, D), zeros (D,), Q_2ᵀ (D, d_in)) in the shapes that thin_svd gives: the control."""
    (d_out, d_in), D = weight.shape, min(weight.shape)
    return (orthonormal(d_out, D, 2 * seed).to(weight), weight.new_zeros(D),
            orthonormal(d_in, D, 2 * seed + 1).t().contiguous().to(weight))


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def orthonormal(n, D, seed):
    """D orthonormal columns of n numbers, drawn from a seed: (n, D) float64, the same for all matrices of a shape."""
    g = torch.Generator("cpu").manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, D, generator=g, dtype=torch.float64, device="cpu")).Q
