"""The graders of docs/lab.md: python -m pytest docs/lab -rs. They know the questions; the answers stand elsewhere."""

import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "math"), str(ROOT)]   # the shared tests, and svmini where pytest is called alone

import exercises
import test_contract
import test_counts
import test_gradients
from layers import assert_close, layer_of, linear, tokens, specs
from svmini import METHODS
from svmini.methods.svd import thin_svd
from svmini.methods.svft import SVFT

SHAPES = [(12, 12), (20, 12), (12, 20), (15, 13)]


def graded(grade):
    """test_X grades exercises.X, which is handed to it; an X that says ToDo is skipped with its question."""
    def test():
        answer = getattr(exercises, grade.__name__.removeprefix("test_"))
        try:
            grade(answer)
        except exercises.ToDo:
            pytest.skip(" ".join(answer.__doc__.split("?")[0].split()) + "?")
    test.__name__, test.grade = grade.__name__, grade
    return test


def right(is_right, hint):
    """Fail with the hint alone: pytest's own comparison would print the answer."""
    if not is_right:
        pytest.fail(hint, pytrace=False)


def problem(shape, seed):
    """W0, its factors, and an M in a band of 2: float64."""
    W0, g = linear(shape, seed=seed).weight.detach(), torch.Generator().manual_seed(seed)
    U, S, Vt = thin_svd(W0)
    M = torch.randn(len(S), len(S), generator=g, dtype=torch.float64).triu(-2).tril(2)
    sign = torch.randint(2, (len(S),), generator=g).double() * 2 - 1
    return W0, U, S, Vt, M, sign


@graded
def test_counts_of_a_matrix(count):
    for d_out, d_in in SHAPES:
        D = min(d_out, d_in)
        lora, vera = (sum(p.numel() for p in layer_of(f"{method}:rank=3", (d_out, d_in), moved=False).parameters())
                      for method in ("lora", "vera"))
        for d in range(D):
            k = sum(abs(i - j) <= d for i in range(D) for j in range(D))
            for name, got, n in zip(("SVFT", "LoRA", "VeRA"), count(d_out, d_in, d, 3), (k, lora, vera)):
                right(got == n and type(got) is int, f"d_out={d_out}, d_in={d_in}, d={d}, r=3: {got!r} is not what "
                                                     f"{name} trains: let the loop count")


@graded
def test_vit_b16(count):
    table = {(row["model"], row["method"], row["options"]): int(row["computed"]) for row in test_counts.ROWS}
    rows = {"svft": ("ViT-B/16", "svft", "pattern=banded d=2"), "lora": ("ViT-B/16", "lora", "rank=8"),
            "vera": ("DeBERTaV3-base", "vera", "rank=1024")}
    for name, row in rows.items():
        right(count()[name] == table[row], f"{name}: {count()[name]:,} is not what the paper prints, with two digits, "
                                           "rounded or cut off")


def test_columns(tmp_path):
    """Exercise 2 is no stub but svmini/methods/columns.py and its line in METHODS."""
    if "columns" not in METHODS:
        pytest.skip("2. Can you add a method, W = W0 diag(g), by one file and one line of METHODS, spec \"columns\"?")
    assert "columns:" in specs(), 'examples = ("",): a method without options has one example, the empty spec'
    for shape in SHAPES:
        assert METHODS["columns"].count(*shape) == shape[1]
        layer = layer_of("columns:", shape)
        trained = list(layer.parameters())
        right(len(trained) == 1 and trained[0].shape == shape[1:],
              "the one Parameter is g (d_in,): W0 is kept by `register_frozen`")
        right(torch.allclose(layer.weight, linear(shape).weight @ torch.diag(trained[0])),
              "weight is not W0 diag(g) of the trained g, which starts at 1")
    for check in test_contract.CHECKS:
        test_contract.run(check, "columns:", tmp_path)
    test_gradients.check_layer("columns:")


@graded
def test_gradient_of_M(gradient):
    for seed, shape in enumerate(SHAPES):
        W0, U, S, Vt, M, sign = problem(shape, seed)
        G, where, M = tokens(*shape), M.nonzero(), M.requires_grad_()
        slope, = torch.autograd.grad((G * (U @ (torch.diag(S) + M) @ Vt)).sum(), M)
        assert_close(gradient(U, Vt, G, where), torch.stack([slope[i, j] for i, j in where.tolist()]))


@graded
def test_wrong_gradient(wrong):
    for factor in (1.0, 1.01, -2.0, 0.0):
        x = tokens(5, 4).requires_grad_()
        y = wrong(3 * x, factor)
        assert torch.equal(y, 3 * x), "the values have changed"
        assert torch.allclose(torch.autograd.grad(y.sum(), x)[0], torch.full_like(x, 3 * factor)), f"factor {factor}"


def planted(place):
    """SVFT with a gradient that is 1 % too large from one place on."""
    def wrong(y, here):
        return test_gradients.Times.apply(y, 1.01) if here == place else y
    return type("Planted", (SVFT,), {
        "forward": lambda self, x: wrong(SVFT.forward(self, x), "forward"),
        "weight": property(lambda self: wrong(SVFT.weight.fget(self), "weight")),
        "core": lambda self: wrong(SVFT.core(self), "core")})


@graded
def test_caught(caught, spec="svft:off_diagonals=3"):
    checks = {"start": lambda: test_contract.run(test_contract.check_start, spec, None),
              "two roads": lambda: test_contract.run(test_contract.check_two_paths, spec, None),
              "finite differences": lambda: test_gradients.check_layer(spec),
              "closed form": lambda: test_gradients.test_closed_form(spec)}
    for place in ("forward", "weight", "core"):
        answer, seen = set(caught(place)), set()
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(METHODS, "svft", planted(place))
            for name, check in checks.items():
                try:
                    check()
                except AssertionError:
                    seen.add(name)
        right(answer == seen, f"{place}: plant it in svft.py and run the checks of svft:off_diagonals=3")


@graded
def test_train_both(train):
    for shape in SHAPES:
        x, y, bias = tokens(40, shape[1]), tokens(40, shape[0], seed=3), linear(shape).bias.detach()
        s, M = train(linear(shape), x, y, 20, 1e-2)
        U, S, Vt = thin_svd(linear(shape).weight)
        p = torch.zeros_like(S, requires_grad=True)
        optimizer = torch.optim.AdamW([p], lr=1e-2, weight_decay=0)
        for _ in range(20):
            optimizer.zero_grad()
            (x @ (U @ torch.diag(S + p) @ Vt).t() + bias - y).square().mean().backward()
            optimizer.step()
        assert_close(M, p, 1e-10)
        assert_close(s, S + p, 1e-10)


@graded
def test_weight_stats(learned):
    for seed, shape in enumerate([*SHAPES, (33, 64)]):
        start = linear(shape, seed=seed).weight.detach()
        W = ((seed - 2) * start + tokens(*shape, seed=9)) * 3
        cosine = (W * start).sum() / ((W * W).sum() * (start * start).sum()).sqrt()
        squares = torch.linalg.eigvalsh(W @ W.t() if shape[0] <= shape[1] else W.t() @ W).flip(0)
        energy = squares[:len(squares) // 4].sum() / squares.sum()
        for name, got, number in zip(("cosine", "energy"), learned(W, start), (cosine, energy)):
            right(math.isclose(got, number, rel_tol=1e-8), f"W of {shape}: {got} is not the {name}")


@graded
def test_band_share(share):
    for seed, shape in enumerate(SHAPES):
        W0, U, S, Vt, M, sign = problem(shape, seed)
        for dW in (tokens(*shape), U @ M @ Vt):
            C = [[(U[:, i] @ dW @ Vt[j]).item() for j in range(len(S))] for i in range(len(S))]
            for d in (0, 2, len(S) - 1):
                inside = sum(c * c for i, row in enumerate(C) for j, c in enumerate(row) if abs(i - j) <= d)
                right(math.isclose(share(W0, W0 + dW, d), inside / dW.square().sum(), rel_tol=1e-8),
                      f"W of {shape}, d={d}: not the share that the loop gives")


@graded
def test_rank_k_and_rank_1(two):
    for D, k in [(D, k) for D in (1, 2, 5, 16) for k in {1, (D + 1) // 2, D}]:
        for M, rank in zip(two(D, k), (k, 1)):
            assert M.shape == (D, D) and int((M != 0).sum()) == k, f"D={D}: {k} entries are asked for"
            assert torch.linalg.matrix_rank(M.double()) == rank, f"D={D}, k={k}: rank {rank} is asked for"


@graded
def test_after_flip(flipped):
    for seed, shape in enumerate(SHAPES):
        W0, U, S, Vt, M, sign = problem(shape, seed)
        W = (U * sign) @ (torch.diag(S) + flipped(M, sign)) @ (Vt * sign[:, None])
        assert_close(W, U @ (torch.diag(S) + M) @ Vt, 1e-10)


@graded
def test_TinyFile(file):
    for seed, shape in enumerate(SHAPES):
        W0, U, S, Vt, M, sign = problem(shape, seed)
        content = {name: tensor.clone() for name, tensor in file.write(U, S, Vt, M).items()}
        beside = sum(tensor.numel() for tensor in content.values()) - M.numel()
        assert torch.equal(content["M"], M) and beside <= 2 * sum(shape), f"the file holds {beside} numbers beside M"
        for sign in (sign, -sign, sign.flip(0)):
            W = file.read(content, U * sign, S, Vt * sign[:, None])
            assert_close(W, U @ (torch.diag(S) + M) @ Vt, 1e-10)
        noise = tokens(*shape)
        noise -= noise.mean()                                  # the sum of all entries stays what it was
        turned_U, turned_V = (torch.linalg.qr(Q + 0.01 * tokens(*Q.shape)).Q for Q in (U, Vt.t()))
        for other in (thin_svd(W0 + 0.01 * W0.norm() / noise.norm() * noise), (turned_U, S, Vt), (U, S, turned_V.t()),
                      (U, 1.01 * S, Vt)):
            with pytest.raises(ValueError):
                file.read(content, *other)
