"""Properties of LoRA, PiSSA, DoRA, VeRA, BOFT and random masking that their papers state."""

from itertools import combinations

import pytest
import torch
import torch.nn as nn

from layers import EPS, SHAPES, assert_close, layer_of, linear, positions_of, tokens, weight_of
from svmini import METHODS, adapt
from svmini.methods import parse_spec


# ---- LoRA, PiSSA, DoRA ----

@pytest.mark.parametrize("alpha, scale", [(None, 1.0), (8, 2.0), (3.0, 0.75)])
@pytest.mark.parametrize("method", ("lora", "dora"))
def test_the_update_is_scaled_by_alpha_over_rank(method, alpha, scale):
    """W0 + (α/r) B A; DoRA: m ⊙ (W0 + (α/r) B A) / its row norms."""
    layer = layer_of(f"{method}:rank=4,alpha={alpha}", "wide")
    V = linear("wide").weight + scale * layer.B @ layer.A
    assert_close(layer.weight, V if method == "lora" else layer.m[:, None] * V / V.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("method", ("lora", "dora"))
def test_a_starts_uniform_within_one_over_the_root_of_d_in(method):
    layer, bound = layer_of(f"{method}:rank=50", (300, 400), moved=False), 400 ** -0.5
    assert 0.99 * bound < layer.A.max() <= bound and -bound <= layer.A.min() < -0.99 * bound
    assert abs(layer.A.std() / (bound / 3 ** 0.5) - 1) < 0.02 and abs(layer.A.mean()) < 0.02 * bound
    assert not layer.B.any()


@pytest.mark.parametrize("shape, rank", [("square", 1), ("wide", 4), ("tall", 15)])
def test_pissa_moves_the_best_approximation_of_w0_into_a_and_b(shape, rank):
    layer, W0 = layer_of(f"lora:rank={rank},init=pissa", shape, moved=False), weight_of(linear(shape))
    A, B = layer.A.detach(), layer.B.detach()
    assert_close(layer.W_res + B @ A, W0)
    # Eckart and Young: no matrix of rank r is closer, in either norm
    S = torch.linalg.svdvals(W0)
    assert_close((W0 - B @ A).norm(), S[rank:].norm())
    assert_close(torch.linalg.matrix_norm(W0 - B @ A, 2), S[rank])
    assert_close(A @ A.t(), torch.diag(S[:rank]))               # Σ_r^½ on both sides
    assert_close(B.t() @ B, torch.diag(S[:rank]))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_row_norms_of_dora_are_m(shape):
    start, layer, W0 = layer_of("dora:rank=4", shape, moved=False), layer_of("dora:rank=4", shape), linear(shape).weight
    assert_close(start.m, W0.square().sum(dim=1).sqrt())
    assert_close(layer.weight.norm(dim=1), layer.m.abs())


@pytest.mark.parametrize("entry", (0.0, 1e-30))
@pytest.mark.parametrize("options", ("rank=4", "rank=4,detach_norm=False"))
def test_dora_keeps_a_row_without_direction_finite(options, entry):
    """A row of zeros, or one whose norm underflows, stays (almost) zero, and values and gradients are finite."""
    base = linear(dtype=torch.float32)
    with torch.no_grad():
        base.weight[3] = entry
    layer, x = METHODS["dora"](base, **parse_spec(f"dora:{options}")[1]), tokens(5, 16, torch.float32)
    assert_close(layer.weight, base.weight, EPS[torch.float32])
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2, weight_decay=0)
    for _ in range(3):
        layer(x).square().mean().backward()
        assert all(p.grad.isfinite().all() for p in layer.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert layer(x).isfinite().all() and layer.weight[3].norm() <= 16 * entry


# ---- VeRA ----

@pytest.mark.parametrize("shape", SHAPES)
def test_vera_is_its_equation(shape):
    """W = W0 + Λ_b B Λ_d A; b = 0 and d = d_init at the start."""
    start, layer = layer_of("vera:rank=20,d_init=0.3", shape, moved=False), layer_of("vera:rank=20", shape)
    assert not start.b.any() and (start.d == 0.3).all()
    assert_close(layer.weight, linear(shape).weight + torch.diag(layer.b) @ layer.B @ torch.diag(layer.d) @ layer.A)


def test_the_random_pair_of_vera_does_not_depend_on_the_targets():
    shapes = {"small": (8, 12), "large": (40, 64), "up": (64, 16)}

    def pairs(*names):
        model = nn.ModuleDict({name: linear(shapes[name]) for name in names})
        adapt(model, "vera", targets=names, rank=10, seed=3)
        return {name: (layer.A, layer.B) for name, layer in model.items()}

    together, backwards = pairs(*shapes), pairs(*reversed(shapes))
    for name in shapes:
        for other in (pairs(name), backwards):
            assert all(map(torch.equal, other[name], together[name]))


def test_narrower_layers_use_the_first_part_of_one_pair():
    """Each is scaled by its own fan-in, as in Kaiming's bound."""
    large, small = layer_of("vera:rank=10", (40, 64)), layer_of("vera:rank=10", (8, 12))
    assert large.A.shape == (10, 64) and large.B.shape == (40, 10)
    assert_close(small.A * (12 / 6) ** 0.5, large.A[:, :12] * (64 / 6) ** 0.5, 1e-6)
    assert_close(small.B, large.B[:8], 0)
    seeded, square = layer_of("vera:rank=10,seed=1", (8, 12)), layer_of("vera:rank=10", (10, 10))
    assert not torch.equal(seeded.A, small.A) and not torch.equal(seeded.B, small.B)
    assert not torch.equal(square.A, square.B.t()) and not torch.equal(square.A, square.B)   # two streams
    wide = layer_of("vera:rank=100", (500, 1000))
    for factor, fan_in in ((wide.A, 1000), (wide.B, 100)):
        bound = (6 / fan_in) ** 0.5
        assert 0.999 * bound < factor.abs().max() <= bound and abs(factor.std() / (bound / 3 ** 0.5) - 1) < 0.02


# ---- BOFT ----

def butterfly(Q, b, d):
    """Return R = F_m … F_1 (d, d), index by index as in the definition; Q (m, d / b, b, b) is skew-symmetric."""
    R = torch.eye(d, dtype=Q.dtype)
    for i in range(1, len(Q) + 1):
        stride, chunk = 2 ** (i - 1), b * 2 ** (i - 1)
        factor = torch.zeros(d, d, dtype=Q.dtype)
        for c in range(d // chunk):
            for s in range(stride):                             # the index of the middle axis of (2, stride, b / 2)
                members = [c * chunk + half * (chunk // 2) + s * (b // 2) + t for half in (0, 1) for t in range(b // 2)]
                q, identity = Q[i - 1, c * stride + s], torch.eye(b, dtype=Q.dtype)
                block = (identity + q) @ torch.linalg.inv(identity - q)
                for k, row in enumerate(members):
                    for n, column in enumerate(members):
                        factor[row, column] = block[k, n]
        R = factor @ R                                          # F_1 acts first
    return R


def skew(layer):
    """Return layer.Q (m, d / b, b (b - 1) / 2) as matrices, filled row by row above the diagonal."""
    b = layer.b
    Q = torch.zeros(*layer.Q.shape[:2], b, b, dtype=torch.float64)
    for n, (i, j) in enumerate(combinations(range(b), 2)):
        Q[..., i, j] = layer.Q.detach()[..., n]
        Q[..., j, i] = -layer.Q.detach()[..., n]
    return Q


@pytest.mark.parametrize("b, m, shape", [(2, 1, (8, 16)), (2, 3, (20, 32)), (4, 1, (16, 16)), (4, 2, (8, 16)),
                                         (4, 3, (8, 16)), (8, 2, (20, 32))], ids=str)
def test_boft_rotates_the_transposed_weight(b, m, shape):
    """R W0ᵀ with R = F_m … F_1, as in the paper and its code: the weight of an nn.Linear becomes W0 Rᵀ."""
    layer, W0 = layer_of(f"boft:block_size={b},factors={m}", shape), weight_of(linear(shape))
    R = butterfly(skew(layer), b, shape[1])
    assert_close(R @ R.t(), torch.eye(shape[1], dtype=torch.float64))
    assert_close(torch.linalg.det(R), torch.tensor(1.0, dtype=torch.float64))
    W, x = weight_of(layer), tokens(7, shape[1])
    assert_close(W, (R @ W0.t()).t())
    assert_close(layer(x), x @ (R @ W0.t()) + layer.bias)
    assert (W - W0).norm() > 0.05 * W0.norm()
    assert (W - W0 @ R).norm() > 0.05 * W0.norm()               # not W0 R
    reached = (R.abs() > 1e-14).sum(dim=1)
    assert (reached == b * 2 ** (m - 1)).all()                  # each factor doubles what a coordinate reaches
    if m == 1:                                                  # block-diagonal: OFT
        assert not R[torch.block_diag(*[torch.ones(b, b)] * (shape[1] // b)) == 0].any()


# ---- random masking ----

@pytest.mark.parametrize("shape", SHAPES)
def test_exactly_k_entries_differ(shape):
    """W = W0 + E, E at k distinct positions from a seed."""
    layer, W0 = layer_of("random_mask:", shape), weight_of(linear(shape))
    E = torch.zeros_like(W0)
    for (i, j), value in zip(positions_of(layer), layer.e.detach()):
        E[i, j] += value
    k = METHODS["svft"].count(*SHAPES[shape], off_diagonals=2)
    assert (weight_of(layer) != W0).sum() == len(set(layer.indices.tolist())) == len(layer.e) == k == 16 * 5 - 6
    assert_close(layer.weight, W0 + E, 0)
    again, other = layer_of("random_mask:", shape, seed=4), layer_of("random_mask:seed=1", shape)
    assert torch.equal(again.indices, layer.indices) and not torch.equal(other.indices, layer.indices)
    assert layer_of("random_mask:off_diagonals=15").indices.tolist() == list(range(256))
