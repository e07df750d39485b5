"""Properties of SVFT and SVFit that their papers state, and where the authors' code differs from the paper."""

import math

import pytest
import torch

from layers import SHAPES, assert_close, layer_of, linear, positions_of, tokens, weight_of
from svmini import METHODS
from svmini.methods.svd import thin_svd


@torch.no_grad()
def set_M(layer, M):
    layer.M.copy_(M.flatten())


# ---- SVFT's lemma ----

def test_lemma_b_a_dense_m_reaches_every_target_of_a_square_matrix():
    """M = Uᵀ (P − W0) V, and no other M."""
    layer, P = layer_of("svft:off_diagonals=15", moved=False), tokens(16, 16, seed=8)
    U, S, Vt = thin_svd(linear().weight)
    M = U.t() @ (P - weight_of(linear())) @ Vt.t()
    set_M(layer, M)
    assert_close(layer.weight, P)
    set_M(layer, M.t())
    assert (layer.weight - P).abs().max() > 0.1


# ---- SVFT: the positions of M, and where the authors' code differs from their paper ----

@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", (None, 1, 5, 15))
def test_m_is_placed_at_its_positions(rank, shape):
    """W = W0 + U_r M V_rᵀ for every pattern, r = D without a rank: u_i v_jᵀ and not u_j v_iᵀ. Nothing multiplies M,
    such as the trained gate of the authors' code."""
    W0, (U, _, Vt), r = weight_of(linear(shape)), thin_svd(linear(shape).weight), rank or 16
    for pattern in ("plain", "banded", "random", "topk"):
        if pattern == "topk" and shape != "square":
            continue
        layer = layer_of(f"svft:pattern={pattern},off_diagonals={min(3, r - 1)},rank={rank}", shape)
        M = torch.zeros(r, r, dtype=torch.float64)
        for (i, j), value in zip(positions_of(layer), layer.M.detach(), strict=True):
            M[i, j] = value
        assert_close(layer.weight, W0 + U[:, :r] @ M @ Vt[:r])
        if pattern == "banded":
            assert positions_of(layer) == [(i, j) for i in range(r) for j in range(r) if abs(i - j) <= min(3, r - 1)]


def test_random_positions_are_distinct_and_follow_the_seed():
    """The authors' code can draw a position twice."""
    def positions(options="", shape="square"):
        return layer_of(f"svft:pattern=random{options}", shape, moved=False).indices.tolist()

    for d, seed in ((0, 0), (2, 1), (7, 2), (7, 3), (15, 4)):
        drawn = positions(f",off_diagonals={d},seed={seed}")
        assert len(set(drawn)) == len(drawn) == METHODS["svft"].count(16, 16, off_diagonals=d)
        assert drawn == sorted(drawn) and 0 <= drawn[0] and drawn[-1] < 256
    assert positions() == positions(",seed=0") == positions(shape="wide") != positions(",seed=1")
    assert positions(",off_diagonals=15") == list(range(256))


@pytest.mark.parametrize("seed", range(2))
def test_topk_chooses_the_largest_products_of_singular_vectors(seed):
    """The authors' code ranks u·v without the transpose."""
    U, S, Vt = (t.tolist() for t in thin_svd(linear(seed=seed).weight))
    chosen = layer_of("svft:pattern=topk", moved=False, seed=seed).indices.tolist()

    def largest(score):
        ranked = sorted(range(256), key=lambda n: -score(*divmod(n, 16)))
        return sorted(ranked[:METHODS["svft"].count(16, 16)])

    assert chosen == largest(lambda i, j: abs(sum(U[n][i] * Vt[j][n] for n in range(16))))     # |u_iᵀ v_j|
    assert chosen != largest(lambda i, j: sum(U[n][i] * Vt[j][n] for n in range(16)))          # the sign is arbitrary
    assert chosen != largest(lambda i, j: abs(sum(U[i][n] * Vt[j][n] for n in range(16))))     # authors' code


@pytest.mark.parametrize("shape", SHAPES)
def test_a_random_basis_replaces_the_singular_vectors(shape):
    """W = W0 + Q_1 M Q_2ᵀ with orthonormal columns from the seed, and as many parameters as between U and V."""
    layer, W0 = layer_of("svft:basis=random", shape), weight_of(linear(shape))
    for Q in (layer.U, layer.Vt.t()):
        assert_close(Q.t() @ Q, torch.eye(16, dtype=torch.float64))
    M = torch.zeros(256, dtype=torch.float64).index_put((layer.indices,), layer.M.detach()).view(16, 16)
    assert_close(layer.weight, W0 + layer.U @ M @ layer.Vt)
    assert_close(layer_of("svft:basis=random", shape, moved=False).weight, W0, 0)
    same, other = layer_of("svft:basis=random", shape, seed=5), layer_of("svft:basis=random,seed=1", shape)
    part = layer_of("svft:basis=random,rank=5", shape)
    assert torch.equal(same.U, layer.U) and torch.equal(same.Vt, layer.Vt)      # the seed alone decides, not W0
    assert (other.U - layer.U).abs().max() > 0.1 and (other.Vt - layer.Vt).abs().max() > 0.1
    assert torch.equal(part.U, layer.U[:, :5]) and torch.equal(part.Vt, layer.Vt[:5])
    if shape == "square":
        assert (layer.U - layer.Vt.t()).abs().max() > 0.1                       # two separate draws
    singular = layer_of("svft:", shape)
    for basis, sides in (("random_U", (layer.U, singular.Vt)), ("random_V", (singular.U, layer.Vt))):
        one = layer_of(f"svft:basis={basis}", shape)
        assert torch.equal(one.U, sides[0]) and torch.equal(one.Vt, sides[1])
        assert_close(layer_of(f"svft:basis={basis}", shape, moved=False).weight, W0, 0)


# ---- SVFit ----

@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", (1, 5, 16))
def test_svfit_keeps_the_residual(shape, rank):
    """W = U_r diag(s) V_rᵀ + W_e with W_e = W0 − U_r Σ_r V_rᵀ, for any s."""
    W0, (U, S, Vt) = weight_of(linear(shape)), thin_svd(linear(shape).weight)
    layer = layer_of(f"svfit:rank={rank}", shape)
    W_e = W0 - U[:, :rank] @ torch.diag(S[:rank]) @ Vt[:rank]
    assert_close(layer.weight, U[:, :rank] @ torch.diag(layer.s) @ Vt[:rank] + W_e)
    assert rank == 16 or W_e.abs().max() > 1e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_energy_chooses_the_smallest_rank_that_contains_it(shape):
    S = torch.linalg.svdvals(weight_of(linear(shape))).tolist()
    total = math.fsum(s * s for s in S)
    for energy in (0.01, 0.5, 0.9, 0.99, 0.999999, 1.0, 1):
        expected = next((r for r in range(1, 17) if math.fsum(s * s for s in S[:r]) >= energy * total), 16)
        layer = layer_of(f"svfit:energy={energy}", shape)
        assert layer.options == {"rank": expected, "energy": None} and layer.s.shape == (expected,), energy
