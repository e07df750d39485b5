"""SVFT (Lingam et al., arXiv 2405.19597): train a sparse matrix M between the frozen singular vectors.

    W = U (Σ + M) Vᵀ                                                       (section 3)
    W = W0 + U_r M V_rᵀ        with rank=r: M between the first r singular vectors

Trained: the entries of M at the positions of a pattern; U, Σ and V are frozen.  Start: M = 0, so W = W0.
With D = min(d_out, d_in), or D = r with a rank, and d off-diagonals on each side, the patterns are
    plain    the diagonal (off_diagonals is ignored)             D parameters per matrix
    banded   |i − j| ≤ d                                         k = D(2d + 1) − d(d + 1)
    random   k distinct positions, drawn once from a seed (the same for all matrices with the same D)
    topk     the k positions of largest |u_iᵀ v_j|, which exists only if d_out = d_in
Plain M is the same optimization as SVFit with all singular values.
basis="random" is a control that the paper does not have: orthonormal columns drawn from the seed replace U and V,
    W = W0 + Q_1 M Q_2ᵀ,       so M is trained at the same positions, between directions that are unrelated to W0.
basis="random_U" and basis="random_V" replace one side and keep the singular vectors of the other.

Differences from the paper: its U and V are full and square; here they are thin, as in the authors' code. An update of a
non-square matrix therefore stays in the span of U (or V), even with a dense M. The paper's truncation study drops the
residual, U_r (Σ_r + M) V_rᵀ, and so starts from a damaged model; rank=r keeps it.
Differences from the authors' code: it multiplies M by a trained sigmoid gate and draws M from a Kaiming normal
distribution, so the model changes before the first step; its random positions can repeat; its top-k ranks u·v without
the transpose and uses U itself if the matrix is not square. Here topk ranks the absolute value, because without it the
choice would depend on arbitrary signs.

On a bf16 or fp16 base model, U Σ Vᵀ would differ from W0 by rounding (relative error 3e-3). The layer then keeps W0 and
computes W0 + U M Vᵀ for every rank, which is W0 exactly at the start; W0, U and V in two bytes per entry need less
memory than U and V in four. In a float32 layer without a rank, the factors replace W0, and bf16 autocast rounds them
one by one: the output error of a layer, measured on a real ViT, is 1.2 to 1.5 times that of the base layer.
"""

from functools import lru_cache

import torch
import torch.nn as nn

from .adapter import HALF_DTYPES, MAX_SEED, Adapter, check_int
from .svd import apply_factors, apply_with_residual, thin_svd

PATTERNS = ("plain", "banded", "random", "topk")
BASES = ("singular", "random", "random_U", "random_V")


class SVFT(Adapter):
    examples = ("pattern=plain", "off_diagonals=2", "off_diagonals=8", "pattern=random",
                "pattern=topk@query,key,value,out", "rank=8,off_diagonals=7", "off_diagonals=2,basis=random")
    test_options = ("pattern=random,off_diagonals=4,seed=7", "rank=5,pattern=plain", "rank=6,pattern=topk",
                    "pattern=plain,basis=random,seed=3", "rank=4,off_diagonals=1,basis=random", "basis=random_U",
                    "pattern=random,basis=random_V")
    lr = 2e-2

    def __init__(self, linear, *, pattern="banded", off_diagonals=2, rank=None, basis="singular", seed=0):
        options = dict(pattern=pattern, off_diagonals=off_diagonals, rank=rank, basis=basis, seed=seed)
        super().__init__(linear, **options)
        U, S, Vt = factors(linear.weight, basis, seed)
        r = rank or len(S)
        # with all singular vectors, the factors replace W0
        factors_only = r == len(S) and basis == "singular" and linear.weight.dtype not in HALF_DTYPES
        self.register_frozen("W0", None if factors_only else linear.weight)
        if r < len(S):
            U, S, Vt = U[:, :r].clone(), S[:r].clone(), Vt[:r].clone()      # a slice would keep the full tensor alive
        self.register_frozen("U", U.to(linear.weight.dtype))    # (d_out, r)
        self.register_frozen("S", S)                            # (r,)
        self.register_frozen("Vt", Vt.to(linear.weight.dtype))  # (r, d_in)
        k = self.count(*linear.weight.shape, **options)
        # The paper's M is a matrix (r, r). This parameter is the vector of its k trained entries; all others are zero.
        self.M = nn.Parameter(torch.zeros(k, dtype=S.dtype, device=S.device))
        if pattern != "plain":
            indices = positions(pattern, U, Vt, off_diagonals, k, seed)        # (k,): M's entry (i, j) at i r + j
            if pattern == "banded":
                self.register_frozen("indices", indices)
            else:
                self.register_buffer("indices", indices)        # in the file: another torch may draw or rank otherwise

    def core(self):
        """Return Σ + M, or M alone if W0 is kept: (r,) if it is diagonal, else (r, r)."""
        start = self.S if self.W0 is None else torch.zeros_like(self.S)
        if self.options["pattern"] == "plain":
            return start + self.M
        return torch.diag(start).flatten().scatter_add(0, self.indices, self.M).view(len(start), -1)

    @property
    def weight(self):
        core = self.core()
        U, Vt = self.U.to(core.dtype), self.Vt.to(core.dtype)
        inner = (U * core if core.dim() == 1 else U @ core) @ Vt                    # (d_out, d_in)
        return inner if self.W0 is None else (self.W0 + inner).to(self.base_dtype)

    def forward(self, x):
        """x (..., d_in) -> x weightᵀ + b (..., d_out), in the order of products that costs least."""
        if self.W0 is None:
            return apply_factors(x, self.U, self.core(), self.Vt, self.bias)
        return apply_with_residual(x, self.W0, self.U, self.core(), self.Vt, self.bias)

    @staticmethod
    def count(d_out, d_in, *, pattern="banded", off_diagonals=2, rank=None, basis="singular", seed=0):
        D, d = rank or min(d_out, d_in), off_diagonals
        return D if pattern == "plain" else D * (2 * d + 1) - d * (d + 1)

    @staticmethod
    def check(d_out, d_in, *, pattern="banded", off_diagonals=2, rank=None, basis="singular", seed=0):
        if pattern not in PATTERNS:
            raise ValueError(f"pattern must be one of {', '.join(PATTERNS)}, not {pattern!r}")
        if basis not in BASES:
            raise ValueError(f"basis must be one of {', '.join(BASES)}, not {basis!r}")
        if pattern == "topk" and d_out != d_in:
            raise ValueError("topk ranks u_iᵀ v_j, which exists only for a square matrix: "
                             "choose square targets such as query, key, value and out, or another pattern")
        if rank is not None:
            check_int("rank", rank, 1, min(d_out, d_in))
        check_int("off_diagonals", off_diagonals, 0, None if pattern == "plain" else (rank or min(d_out, d_in)) - 1)
        check_int("seed", seed, 0, MAX_SEED)


def positions(pattern, U, Vt, off_diagonals, k, seed):
    """Return the k trained positions of M (r, r) as ascending indices i r + j: (k,) int64."""
    r, device = Vt.shape[0], U.device
    if pattern == "banded":
        i = torch.arange(r, device=device)
        return ((i[:, None] - i).abs() <= off_diagonals).flatten().nonzero()[:, 0]
    if pattern == "random":
        drawn = torch.randperm(r * r, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")[:k]
        return drawn.sort().values.to(device)
    similarity = (U.t() @ Vt.t()).abs()                         # (r, r): |u_iᵀ v_j|
    return similarity.flatten().topk(k).indices.sort().values


def factors(weight, basis, seed):
    """Return U (d_out, D), S (D,) and Vᵀ (D, d_in) of the weight, with the columns of `basis` drawn from the seed."""
    (d_out, d_in), D = weight.shape, min(weight.shape)
    U, S, Vt = thin_svd(weight)
    if basis in ("random", "random_U"):
        U = orthonormal(d_out, D, 2 * seed).to(U, copy=True)
    if basis in ("random", "random_V"):
        Vt = orthonormal(d_in, D, 2 * seed + 1).t().contiguous().to(Vt, copy=True)
    return U, S, Vt


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def orthonormal(n, D, seed):
    """Draw D orthonormal columns of length n from a seed: (n, D) float64, the same for all matrices of a shape."""
    g = torch.Generator("cpu").manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, D, generator=g, dtype=torch.float64, device="cpu")).Q
