"""What the papers say of their methods, apart from counts and gradients; where public code departs from them."""

import math
from itertools import combinations

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import svmini.svd
from conftest import SHAPES, Net, assert_close, move, refused, tokens
from svmini import METHODS, adapt, load_adapter, save_adapter
from svmini.adapter import adapters
from svmini.svd import thin_svd


def linear(shape="square", dtype=torch.float64, seed=0):
    d_out, d_in = SHAPES[shape] if isinstance(shape, str) else shape
    torch.manual_seed(seed)
    return nn.Linear(d_in, d_out, dtype=dtype)


def layer_of(method, shape="square", moved=True, seed=0, **options):
    layer = METHODS[method](linear(shape, seed=seed), **options)
    return move(layer) if moved else layer


def rank_of(W):
    return int(torch.linalg.matrix_rank(W, rtol=1e-10))


# ---------------------------------------------------------------- SVFT's lemma


@pytest.mark.parametrize("shape", SHAPES)
def test_lemma_a_a_diagonal_m_keeps_the_singular_vectors(shape):
    """Up to sign and order; and an off-diagonal entry does not."""
    base = linear(shape)
    U, S, Vt = thin_svd(base.weight)
    layer = METHODS["svft"](base, pattern="plain")
    with torch.no_grad():
        layer.M.copy_(torch.linspace(-1, 1, 16) - S)        # so that orders and signs do change
    core = S + layer.M.detach()
    W = layer.weight().detach()
    assert (core < 0).any() and (core.abs().argsort(descending=True) != torch.arange(16)).any()
    assert_close(U.t() @ W @ Vt.t(), torch.diag(core), 1e-12)
    new_U, new_S, new_Vt = torch.linalg.svd(W, full_matrices=False)
    assert_close(new_S, core.abs().sort(descending=True).values, 1e-12)
    order = core.abs().argsort(descending=True)
    for new, old in ((new_U, U), (new_Vt.t(), Vt.t())):
        alike = (new.t() @ old).abs()                       # a permutation: each new vector is one of the old
        pairs = [2 * p for p in range(8)]                   # linspace(-1, 1) holds every size twice: subspaces of two
        for p in pairs:
            block = alike[p:p + 2][:, order[p:p + 2]]
            assert_close(block.square().sum(), torch.tensor(2.0, dtype=torch.float64), 1e-9)
    with torch.no_grad():
        layer.M.copy_(torch.linspace(0.5, 2, 16) ** 2 - S)  # all sizes differ: now the vectors themselves
    new_U, _, new_Vt = torch.linalg.svd(layer.weight().detach(), full_matrices=False)
    backwards = torch.eye(16, dtype=torch.float64).flip(0)
    assert_close((new_U.t() @ U).abs(), backwards, 1e-9)
    assert_close((new_Vt @ Vt.t()).abs(), backwards, 1e-9)
    banded = move(METHODS["svft"](base, off_diagonals=1))
    alike = (torch.linalg.svd(banded.weight().detach(), full_matrices=False)[0].t() @ U).abs()
    assert alike.max(dim=1).values.min() < 0.99


def test_lemma_b_a_dense_m_reaches_every_target():
    """M = Uᵀ (P − W0) V."""
    base = linear()
    U, S, Vt = thin_svd(base.weight)
    target = torch.randn(16, 16, dtype=torch.float64)
    layer = METHODS["svft"](base, off_diagonals=15)
    assert layer.M.shape == (256,)
    M = U.t() @ (target - base.weight.detach()) @ Vt.t()
    with torch.no_grad():
        layer.M.copy_(M.flatten())
    assert_close(layer.weight(), target, 1e-12)
    with torch.no_grad():
        layer.M.copy_(M.t().flatten())                      # and no other M does
    assert (layer.weight() - target).abs().max() > 0.1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", (1, 3, 8, 16, 40))
def test_lemma_c_the_rank_of_an_update_is_at_most_k(shape, k):
    """For any k positions, and D with enough of them; LoRA's is at most r, with many more numbers."""
    base = linear(shape)
    W0, (U, S, Vt) = base.weight.detach(), thin_svd(base.weight)
    layer = METHODS["svft"](base, off_diagonals=2, pattern="random")
    assert len(layer.M) == 16 * 5 - 6
    with torch.no_grad():
        layer.M[:k] = torch.randn(k, dtype=torch.float64)
    rows, columns = layer.where[:k] // 16, layer.where[:k] % 16
    bound = min(k, len(rows.unique()), len(columns.unique()))
    assert rank_of(layer.weight().detach() - W0) <= bound <= min(k, 16)
    diagonal = METHODS["svft"](base, pattern="plain")
    with torch.no_grad():
        diagonal.M[:k] = torch.rand(min(k, 16), dtype=torch.float64) + 0.5
    assert rank_of(diagonal.weight().detach() - W0) == min(k, 16)       # the bound is reached
    if k <= 16:
        lora = move(METHODS["lora"](base, rank=k))
        assert rank_of(lora.weight().detach() - W0) == k and lora.A.numel() + lora.B.numel() > k


# ---------------------------------------------------------------- SVFit


@pytest.mark.parametrize("shape", SHAPES)
def test_svfit_with_all_ranks_and_plain_svft_train_alike(shape):
    x, y = tokens(20, SHAPES[shape][1]), torch.arange(20) % 3
    models = [adapt(Net(*SHAPES[shape]), "svfit", targets=("query", "value")),
              adapt(Net(*SHAPES[shape]), "svft", targets=("query", "value"), pattern="plain")]
    losses = []
    for model in models:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
        losses.append([])
        for _ in range(20):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    a, b = models
    assert losses[0][-1] < 0.8 * losses[0][0]
    assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), 1e-10)
    for name in ("query", "value"):
        fit, svft = a.get_submodule(name), b.get_submodule(name)
        assert (fit.s - fit.S).abs().max() > 0.05           # or nothing was compared
        assert_close(fit.s, svft.S + svft.M, 1e-10)
        assert_close(fit.weight(), svft.weight(), 1e-10)
    assert_close(a(x), b(x), 1e-10)


@pytest.mark.parametrize("d", (4, 16, 768, 1024))
def test_svfit_has_16_times_fewer_numbers_than_lora(d):
    """The abstract: against LoRA of rank 8 on a square matrix."""
    assert METHODS["lora"].count(d, d, rank=8) == 16 * METHODS["svfit"].count(d, d) == 16 * d


def with_singular_values(values, d_out=16, d_in=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    D = len(values)
    Q = [torch.linalg.qr(torch.randn(d, D, dtype=torch.float64, generator=generator)).Q for d in (d_out, d_in)]
    return Q[0] * torch.tensor(values, dtype=torch.float64) @ Q[1].t()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("energy", (0.01, 0.3, 0.5, 0.9, 0.99, 0.999999, 1.0, 1))
def test_energy_takes_the_smallest_rank_that_holds_it(shape, energy):
    base = linear(shape)
    S = torch.linalg.svdvals(base.weight.detach()).tolist()
    total = math.fsum(s * s for s in S)
    expected = next((r for r in range(1, 17) if math.fsum(s * s for s in S[:r]) >= energy * total), 16)
    layer = METHODS["svfit"](base, energy=energy)
    assert layer.options == {"rank": expected, "energy": None} and layer.s.shape == (expected,)
    assert expected == 16 or energy < 1


@pytest.mark.parametrize("energy, expected", [(0.58, 1), (0.63, 1), (0.65, 2), (0.99, 2)])
def test_energy_is_of_squares(energy, expected):
    """σ = 4, 3 holds 16/25 = 0.64 in the first, and 4/7 = 0.57 if it were not squared."""
    base = nn.Linear(16, 16, dtype=torch.float64)
    base.weight = nn.Parameter(with_singular_values([4.0, 3.0]))
    assert METHODS["svfit"](base, energy=energy).options["rank"] == expected


def test_every_layer_stores_its_own_resolved_rank(tmp_path):
    def make():
        model = Net(16, 16)
        model.query.weight = nn.Parameter(with_singular_values([10.0, 1.0, 0.1] + [0.001] * 13))
        return model

    def ranks(model):
        return {name: a.options["rank"] for name, a in adapters(model).items()}

    model = move(adapt(make(), "svfit", targets=("query", "value"), energy=0.99))
    resolved = ranks(model)
    assert resolved["query"] == 1 < resolved["value"] < 16
    assert model.adaptation["options"] == {"rank": None, "energy": 0.99}
    save_adapter(model, tmp_path / "a.pt")
    stored = torch.load(tmp_path / "a.pt", weights_only=True)
    assert {n: s["options"] for n, s in stored["layers"].items()} == {
        n: {"rank": r, "energy": None} for n, r in resolved.items()}
    loaded = load_adapter(make(), tmp_path / "a.pt")
    assert ranks(loaded) == resolved
    for name, a in adapters(loaded).items():
        assert torch.equal(a.s, model.get_submodule(name).s)
        assert METHODS["svfit"].count(16, 16, **a.options) == a.s.numel()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", (1, 5, 15, 16))
def test_svfit_keeps_the_residual(shape, rank):
    """W = U_r diag(s) V_rᵀ + W_e, with W_e = W0 − U_r Σ_r V_rᵀ whatever s is."""
    base = linear(shape)
    W0, (U, S, Vt) = base.weight.detach(), thin_svd(base.weight)
    layer = move(METHODS["svfit"](base, rank=rank))
    W_e = W0 - U[:, :rank] @ torch.diag(S[:rank]) @ Vt[:rank]
    assert_close(layer.weight().detach(), U[:, :rank] @ torch.diag(layer.s.detach()) @ Vt[:rank] + W_e, 1e-12)
    assert rank == 16 or W_e.abs().max() > 1e-3
    x = tokens(5, base.in_features)
    assert_close(layer(x), x @ layer.weight().t() + base.bias, 1e-12)


# ---------------------------------------------------------------- LoRA, PiSSA, DoRA


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", (1, 4, 15))
def test_pissa_takes_the_best_approximation_out_and_gives_it_to_a_and_b(shape, rank):
    base = linear(shape)
    W0 = base.weight.detach()
    layer = METHODS["lora"](base, rank=rank, init="pissa")
    A, B = layer.A.detach(), layer.B.detach()
    assert_close(layer.W + B @ A, W0, 1e-12)
    assert rank_of(B @ A) == rank
    # Eckart and Young: no matrix of rank r is nearer, in either norm
    S = torch.linalg.svdvals(W0)
    assert_close((W0 - B @ A).norm(), S[rank:].norm(), 1e-12)
    assert_close(torch.linalg.matrix_norm(W0 - B @ A, 2), S[rank], 1e-12)
    assert_close(A @ A.t(), B.t() @ B, 1e-12)               # Σ_r^½ on both sides
    assert_close(torch.diag(A @ A.t()), S[:rank], 1e-12)


@pytest.mark.parametrize("alpha, scale", [(None, 1.0), (4, 1.0), (8, 2.0), (1, 0.25), (3.0, 0.75)])
@pytest.mark.parametrize("method", ("lora", "dora"))
def test_the_update_is_scaled_by_alpha_over_rank(method, alpha, scale):
    layer = layer_of(method, "wide", rank=4, alpha=alpha)
    W0, A, B = linear("wide").weight.detach(), layer.A.detach(), layer.B.detach()
    V = W0 + scale * B @ A
    expected = V if method == "lora" else layer.m.detach()[:, None] * V / V.norm(dim=1, keepdim=True)
    assert_close(layer.weight().detach(), expected, 1e-12)


@pytest.mark.parametrize("method", ("lora", "dora"))
def test_a_starts_uniform_within_one_over_the_root_of_d_in(method):
    layer = METHODS[method](nn.Linear(400, 300), rank=50)
    bound = 400 ** -0.5
    assert 0.99 * bound < layer.A.max() <= bound and -bound <= layer.A.min() < -0.99 * bound
    assert abs(layer.A.std() / (bound / 3 ** 0.5) - 1) < 0.02 and abs(layer.A.mean()) < 0.02 * bound
    assert not layer.B.any()


@pytest.mark.parametrize("shape", SHAPES)
def test_dora_starts_at_w0_and_its_row_norms_are_m(shape):
    W0 = linear(shape).weight.detach()
    start = layer_of("dora", shape, moved=False, rank=4)
    assert_close(start.weight().detach(), W0, 1e-12)
    assert_close(start.m.detach(), W0.square().sum(dim=1).sqrt(), 1e-12)
    layer = layer_of("dora", shape, rank=4)
    W = layer.weight().detach()
    assert_close(W.norm(dim=1), layer.m.detach().abs(), 1e-12)
    with torch.no_grad():
        layer.A *= 3                                        # direction and size are apart
    assert_close(layer.weight().detach().norm(dim=1), layer.m.detach().abs(), 1e-12)
    assert (layer.weight() - W).abs().max() > 1e-2


# ---------------------------------------------------------------- VeRA


class Layers(nn.Module):
    """Linears of several shapes."""

    def __init__(self, **shapes):
        super().__init__()
        torch.manual_seed(0)
        for name, (d_out, d_in) in shapes.items():
            setattr(self, name, nn.Linear(d_in, d_out))


def test_veras_pair_does_not_depend_on_which_layers_are_adapted():
    shapes = {"small": (8, 12), "large": (40, 64), "up": (64, 16), "down": (16, 64)}
    together = adapt(Layers(**shapes), "vera", targets=list(shapes), rank=10, seed=3)
    for name in shapes:
        torch.manual_seed(99)
        alone = adapt(Layers(**shapes), "vera", targets=[name], rank=10, seed=3)
        for factor in ("A", "B"):
            assert torch.equal(getattr(getattr(alone, name), factor), getattr(getattr(together, name), factor))
    backwards = adapt(Layers(**dict(reversed(shapes.items()))), "vera", targets=list(shapes), rank=10, seed=3)
    assert all(torch.equal(getattr(backwards, n).A, getattr(together, n).A) for n in shapes)


def test_narrower_layers_take_the_first_columns_and_rows():
    """Of one pair; each scaled by its own fan-in, as Kaiming's bound says."""
    large = METHODS["vera"](nn.Linear(64, 40), rank=10)
    small = METHODS["vera"](nn.Linear(12, 8), rank=10)
    assert large.A.shape == (10, 64) and large.B.shape == (40, 10)
    assert_close(small.A * (12 / 6) ** 0.5, large.A[:, :12] * (64 / 6) ** 0.5, 1e-6)
    assert_close(small.B, large.B[:8], 0)
    assert not torch.equal(METHODS["vera"](nn.Linear(12, 8), rank=10, seed=1).A, small.A)
    assert not torch.equal(METHODS["vera"](nn.Linear(12, 8), rank=10, seed=1).B, small.B)
    square = METHODS["vera"](nn.Linear(10, 10), rank=10)
    assert not torch.equal(square.A, square.B.t()) and not torch.equal(square.A, square.B)   # two streams
    wide = METHODS["vera"](nn.Linear(1000, 500), rank=100)
    for factor, fan_in in ((wide.A, 1000), (wide.B, 100)):
        bound = (6 / fan_in) ** 0.5
        assert 0.999 * bound < factor.abs().max() <= bound and abs(factor.std() / (bound / 3 ** 0.5) - 1) < 0.02


@pytest.mark.parametrize("shape", SHAPES)
def test_vera_is_its_equation(shape):
    """W = W0 + Λ_b B Λ_d A; b = 0 and d = d_init at the start."""
    start = layer_of("vera", shape, moved=False, rank=20, d_init=0.3)
    assert not start.b.any() and (start.d == 0.3).all()
    layer = layer_of("vera", shape, rank=20)
    expected = linear(shape).weight.detach() + torch.diag(layer.b) @ layer.B @ torch.diag(layer.d) @ layer.A
    assert_close(layer.weight().detach(), expected.detach(), 1e-12)


# ---------------------------------------------------------------- BOFT


def butterfly(Q, b, d):
    """R = F_m … F_1 (d, d), written out index by index from the definition; Q (m, d / b, b, b) skew-symmetric."""
    R = torch.eye(d, dtype=Q.dtype)
    for i in range(1, len(Q) + 1):
        stride, chunk = 2 ** (i - 1), b * 2 ** (i - 1)
        factor = torch.zeros(d, d, dtype=Q.dtype)
        for c in range(d // chunk):
            for s in range(stride):                         # the index of the middle axis of (2, stride, b / 2)
                members = [c * chunk + half * (chunk // 2) + s * (b // 2) + t for half in (0, 1) for t in range(b // 2)]
                q = Q[i - 1, c * stride + s]
                identity = torch.eye(b, dtype=Q.dtype)
                block = (identity + q) @ torch.linalg.inv(identity - q)
                for k, row in enumerate(members):
                    for n, column in enumerate(members):
                        factor[row, column] = block[k, n]
        R = factor @ R                                      # F_1 acts first
    return R


def skew(layer):
    """layer.Q (m, d / b, b (b - 1) / 2) as matrices: entry after entry, row after row above the diagonal."""
    b = layer.b
    Q = torch.zeros(*layer.Q.shape[:2], b, b, dtype=torch.float64)
    for n, (i, j) in enumerate(combinations(range(b), 2)):
        Q[..., i, j] = layer.Q.detach()[..., n]
        Q[..., j, i] = -layer.Q.detach()[..., n]
    return Q


@pytest.mark.parametrize("shape", [(8, 16), (16, 16), (20, 32)], ids=str)
@pytest.mark.parametrize("b, m", [(2, 1), (2, 2), (2, 3), (4, 1), (4, 2), (4, 3), (8, 1), (8, 2)])
def test_boft_is_the_dense_product_of_its_factors(b, m, shape):
    layer = layer_of("boft", shape, block_size=b, factors=m)
    W0 = linear(shape).weight.detach()
    R = butterfly(skew(layer), b, shape[1])
    assert_close(R @ R.t(), torch.eye(shape[1], dtype=torch.float64), 1e-12)
    W = layer.weight().detach()
    assert_close(W, W0 @ R, 1e-12)
    x = tokens(7, shape[1])
    assert_close(layer(x).detach(), x @ R.t() @ W0.t() + layer.bias, 1e-12)
    # rotations keep the products of the rows, and do not keep W
    assert_close(W @ W.t(), W0 @ W0.t(), 1e-12)
    assert (W - W0).abs().max() > 1e-2
    if m == 1:                                              # block-diagonal: OFT
        outside = torch.block_diag(*[torch.ones(b, b)] * (shape[1] // b)) == 0
        assert not R[outside].any()
    reached = (R.abs() > 1e-12).sum(dim=1)
    assert (reached == b * 2 ** (m - 1)).all()              # each factor doubles what a number reaches


def test_the_order_of_butterfly_factors_matters():
    layer = layer_of("boft", (8, 16), block_size=4, factors=3)
    Q = skew(layer)
    R = butterfly(Q, 4, 16)
    assert_close(torch.linalg.det(R), torch.tensor(1.0, dtype=torch.float64), 1e-12)
    with torch.no_grad():
        factors = []
        for i in range(3):
            one = METHODS["boft"](linear((8, 16)), block_size=4, factors=3)
            one.Q[i] = layer.Q[i]
            factors.append(torch.block_diag(*one.rotation()))
    assert_close(factors[2] @ factors[1] @ factors[0], R, 1e-12)
    assert (factors[0] @ factors[1] @ factors[2] - R).abs().max() > 1e-2


# ---------------------------------------------------------------- the SVD


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("shape", [*SHAPES.values(), (1, 5), (5, 1), (3, 200)], ids=str)
def test_thin_svd(shape, dtype, monkeypatch):
    monkeypatch.setattr(svmini.svd, "_known", {})
    eps = 1e-6 if dtype == torch.float32 else 1e-13
    W = torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)
    U, S, Vt = thin_svd(W)
    D = min(shape)
    assert (U.shape, S.shape, Vt.shape) == ((shape[0], D), (D,), (D, shape[1]))
    assert {t.dtype for t in (U, S, Vt)} == {dtype} and all(t.is_contiguous() for t in (U, S, Vt))
    assert_close((U * S) @ Vt, W, 3 * eps)
    for orthonormal in (U.t() @ U, Vt @ Vt.t()):
        assert_close(orthonormal, torch.eye(D, dtype=dtype), 3 * eps)
    assert (S[1:] <= S[:-1]).all() and (S >= 0).all()
    largest = U.gather(0, U.abs().argmax(dim=0, keepdim=True))
    assert (largest > 0).all()


@pytest.mark.parametrize("flip", (-1.0, 1.0))
def test_signs_do_not_depend_on_what_lapack_returns(flip, monkeypatch):
    """Another machine's library may return any of the signs."""
    W = linear("tall").weight
    expected = thin_svd(W)
    svd = torch.linalg.svd

    def other(W, full_matrices):
        U, S, Vt = svd(W, full_matrices=full_matrices)
        sign = torch.where(torch.arange(len(S)) % 2 == 0, flip, -flip)
        return U * sign, S, sign[:, None] * Vt

    monkeypatch.setattr(torch.linalg, "svd", other)
    monkeypatch.setattr(svmini.svd, "_known", {})
    assert all(torch.equal(a, b) for a, b in zip(thin_svd(W), expected))


def test_a_weight_is_decomposed_once_and_after_that_not_again(monkeypatch):
    calls, svd = [], torch.linalg.svd
    monkeypatch.setattr(svmini.svd, "_known", {})
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: calls.append(1) or svd(*a, **k))
    base = linear("wide")
    first = thin_svd(base.weight)
    for again in (thin_svd(base.weight), thin_svd(base.weight.detach().clone())):
        assert all(torch.equal(a, b) for a, b in zip(first, again))
    for method, options in (("svfit", {}), ("svfit", {"energy": 0.9}), ("svft", {}), ("lora", {"init": "pissa"})):
        METHODS[method](base, **options)
    assert len(calls) == 1
    svmini.svd._known.clear()                               # as in another process
    assert all(torch.equal(a, b) for a, b in zip(first, thin_svd(base.weight))) and len(calls) == 2
    assert thin_svd(base.weight.float())[0].dtype == torch.float32 and len(calls) == 3
    thin_svd(base.weight.view(24, 16))                      # the same bytes in another shape
    with torch.no_grad():
        base.weight[3, 5] += 1e-9                           # and another matrix
    thin_svd(base.weight)
    assert len(calls) == 5


def test_what_is_trained_does_not_leak_into_the_cache():
    base = linear()
    before = [t.clone() for t in thin_svd(base.weight)]
    for method, options in (("svfit", {}), ("svft", {}), ("lora", {"init": "pissa", "rank": 4})):
        layer = move(METHODS[method](base, **options))
        layer(tokens(3, 16)).sum().backward()
        torch.optim.SGD(layer.parameters(), lr=1.0).step()
    assert all(torch.equal(a, b) for a, b in zip(before, thin_svd(base.weight)))


# ---------------------------------------------------------------- where the SVFT authors' code leaves their paper


SVFT_OPTIONS = [{"pattern": "plain"}, {"off_diagonals": 3}, {"pattern": "random", "off_diagonals": 3},
                {"pattern": "topk", "off_diagonals": 3}]


@pytest.mark.parametrize("options", SVFT_OPTIONS, ids=str)
def test_svft_starts_as_the_identity_and_has_no_gate(options):
    """Theirs draws M and multiplies it by a trained sigmoid."""
    base = linear()
    layer = METHODS["svft"](base, **options)
    assert not layer.M.any() and [name for name, _ in layer.named_parameters()] == ["M"]
    assert layer.M.numel() == METHODS["svft"].count(16, 16, **options)
    x = tokens(5, 16)
    assert_close(layer(x), base(x), 1e-12)
    with torch.no_grad():                                   # twice M is twice the change: nothing stands between
        layer.M.copy_(torch.randn(layer.M.shape, generator=torch.Generator().manual_seed(1)))
        once = layer.weight() - base.weight
        layer.M *= 2
        assert_close(layer.weight() - base.weight, 2 * once, 1e-12)


@pytest.mark.parametrize("options", SVFT_OPTIONS[1:], ids=str)
def test_m_stands_at_its_positions(options):
    """Row and column of each number: u_i v_jᵀ and not u_j v_iᵀ."""
    base = linear()
    U, S, Vt = thin_svd(base.weight)
    layer = METHODS["svft"](base, **options)
    where = [divmod(n, 16) for n in layer.where.tolist()]
    for n in (0, 1, 40, len(where) - 1):
        i, j = where[n]
        with torch.no_grad():
            layer.M.zero_()
            layer.M[n] = 2.0
            assert_close(layer.weight() - base.weight, 2 * torch.outer(U[:, i], Vt[j]), 1e-11)
    if options.get("pattern") is None:
        assert where == [(i, j) for i in range(16) for j in range(16) if abs(i - j) <= 3]


def test_random_positions_are_distinct_and_follow_the_seed():
    """Theirs can draw a position twice."""
    for d in (0, 2, 7, 15):
        for seed in range(5):
            layer = METHODS["svft"](linear(), pattern="random", off_diagonals=d, seed=seed)
            where = layer.where.tolist()
            assert len(where) == len(set(where)) == METHODS["svft"].count(16, 16, off_diagonals=d) == layer.M.numel()
            assert where == sorted(where) and 0 <= where[0] and where[-1] < 256
    drawn = [METHODS["svft"](linear(), pattern="random", seed=seed).where for seed in (0, 1, 0)]
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])
    other = METHODS["svft"](linear("wide", seed=7), pattern="random", seed=0).where
    assert torch.equal(other, drawn[0])                     # the same for all matrices of one D
    everything = METHODS["svft"](linear(), pattern="random", off_diagonals=15).where
    assert everything.tolist() == list(range(256))


def largest(scores, k):
    """The k positions of largest score, one at a time."""
    ranked = sorted(range(256), key=lambda n: -scores[n // 16][n % 16])
    return sorted(ranked[:k])


@pytest.mark.parametrize("seed", range(4))
def test_topk_takes_the_largest_u_i_t_v_j(seed):
    """Theirs ranks u·v without the transpose."""
    base = linear(seed=seed)
    U, S, Vt = (t.tolist() for t in thin_svd(base.weight))
    layer = METHODS["svft"](base, pattern="topk")
    k = METHODS["svft"].count(16, 16)
    alike = [[abs(sum(U[n][i] * Vt[j][n] for n in range(16))) for j in range(16)] for i in range(16)]   # |u_iᵀ v_j|
    # U times V without the transpose
    theirs = [[abs(sum(U[i][n] * Vt[j][n] for n in range(16))) for j in range(16)] for i in range(16)]
    signed = [[sum(U[n][i] * Vt[j][n] for n in range(16)) for j in range(16)] for i in range(16)]
    assert layer.where.tolist() == largest(alike, k)
    assert layer.where.tolist() != largest(theirs, k) and layer.where.tolist() != largest(signed, k)


@pytest.mark.parametrize("shape", ("wide", "tall"))
def test_topk_of_a_matrix_that_is_not_square_is_refused(shape):
    """Theirs falls back to U itself."""
    with pytest.raises(ValueError, match="square"):
        METHODS["svft"](linear(shape), pattern="topk")
    model = Net(*SHAPES[shape])
    with refused(model, ValueError, "topk", "query", "square"):
        adapt(model, "svft", targets=("query",), pattern="topk")
