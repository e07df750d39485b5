"""The graders of docs/lab.md: python -m pytest docs/lab. They contain the questions; tests/lab has the answers."""

import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "math"), str(ROOT)]   # the shared tests, and svmini if it is not installed

import exercises
import test_contract
import test_counts
import test_gradients
from layers import adapter, assert_close, layer_of, linear, specs, tokens
from svmini import METHODS
from svmini.methods.svd import thin_svd
from svmini.methods.svft import SVFT

SHAPES = [(12, 12), (20, 12), (12, 20), (15, 13)]


def right(is_right, hint):
    """Fail with the hint alone, because pytest's own comparison would print the answer."""
    if not is_right:
        pytest.fail(hint, pytrace=False)


def problem(shape, seed):
    """Return W0, its factors, an M in a band with d = 2, and random signs, in float64."""
    W0, g = linear(shape, seed=seed).weight.detach(), torch.Generator().manual_seed(seed)
    U, S, Vt = thin_svd(W0)
    M = torch.randn(len(S), len(S), generator=g, dtype=torch.float64).triu(-2).tril(2)
    sign = torch.randint(2, (len(S),), generator=g).double() * 2 - 1
    return W0, U, S, Vt, M, sign


def test_count_parameters():
    for d_out, d_in in SHAPES:
        for d in range(min(d_out, d_in)):
            specs = f"svft:off_diagonals={d}", "lora:rank=3", "vera:rank=3"
            for spec, got in zip(specs, exercises.count_parameters(d_out, d_in, d, 3), strict=True):
                k = sum(p.numel() for p in layer_of(spec, (d_out, d_in), moved=False).parameters())
                right(got == k and type(got) is int, f"{got!r} is not the int that {spec} trains in {d_out} x {d_in}")


def test_counts_in_the_paper():
    counts = exercises.counts_in_the_paper()
    table = {(row["model"], row["method"], row["options"]): int(row["computed"]) for row in test_counts.ROWS}
    for name, row in {"svft": ("ViT-B/16", "svft", "pattern=banded d=2"), "lora": ("ViT-B/16", "lora", "rank=8"),
                      "vera": ("DeBERTaV3-base", "vera", "rank=1024")}.items():
        right(counts[name] == table[row], f"{name}: {counts[name]:,} does not agree with what the paper prints")


def grade_method(name, examples, equation, tmp_path):
    """Grade a method of the reader's own: its parameter and weight by `equation`, and all shared tests."""
    if name not in METHODS:
        pytest.skip(f'the method "{name}" is not in METHODS')
    for spec in (f"{name}:{example}" for example in examples):
        right(spec in specs(), f"{spec} is missing in the examples of the class")
        for shape in SHAPES:
            layer = layer_of(spec, shape)
            right([p.dtype for p in layer.parameters()] == [torch.float64],
                  "train one nn.Parameter, in the dtype of linear.weight, and pass W0 to register_frozen")
            expected = equation(linear(shape).weight, *layer.parameters())
            right(torch.allclose(layer.weight, expected), f"{spec.rstrip(':')}: weight is not what the equation gives")
        for check in test_contract.CHECKS:
            test_contract.run(check, spec, tmp_path)
        test_gradients.check_layer(spec)


def test_columns(tmp_path):
    """Exercise 2."""
    grade_method("columns", [""], lambda W0, g: W0 @ torch.diag(g.flatten()), tmp_path)


def test_lora_xs(tmp_path):
    """Exercise 11."""
    def equation(W0, R):
        U, S, Vt = thin_svd(W0)
        return W0 + U[:, :len(R)] * S[:len(R)] @ R @ Vt[:len(R)]

    grade_method("lora_xs", ["rank=8", "rank=1"], equation, tmp_path)


def test_gradient_of_M():
    for seed, shape in enumerate(SHAPES):
        W0, U, S, Vt, M, sign = problem(shape, seed)
        G, positions, M = tokens(*shape), M.nonzero(), M.requires_grad_()
        slope, = torch.autograd.grad((G * (U @ (torch.diag(S) + M) @ Vt)).sum(), M)
        expected = torch.stack([slope[i, j] for i, j in positions.tolist()])
        assert_close(exercises.gradient_of_M(U, Vt, G, positions), expected)


def test_wrong_gradient():
    for factor in (1.0, 1.01, -2.0, 0.0):
        x = tokens(5, 4).requires_grad_()
        y = exercises.wrong_gradient(3 * x, factor)
        assert torch.equal(y, 3 * x), "the values have changed"
        assert torch.allclose(torch.autograd.grad(y.sum(), x)[0], torch.full_like(x, 3 * factor)), f"factor {factor}"
        with torch.no_grad():
            try:
                y = exercises.wrong_gradient(3 * x, factor)
            except RuntimeError as error:
                right(False, f"under torch.no_grad(): {error}")
            assert torch.equal(y, 3 * x), "the values change under no_grad"


def planted(place):
    """Return SVFT with a gradient that is 1 % too large from one place on."""
    def wrong(y, here):
        return test_gradients.Times.apply(y, 1.01) if here == place else y
    return type("Planted", (SVFT,), {
        "forward": lambda self, x: wrong(SVFT.forward(self, x), "forward"),
        "weight": property(lambda self: wrong(SVFT.weight.fget(self), "weight")),
        "core": lambda self: wrong(SVFT.core(self), "core")})


def test_caught_by(spec="svft:off_diagonals=3"):
    checks = {"start": lambda: test_contract.run(test_contract.check_start, spec, None),
              "two paths": lambda: test_contract.run(test_contract.check_two_paths, spec, None),
              "finite differences": lambda: test_gradients.check_layer(spec),
              "closed form": lambda: test_gradients.test_closed_form(spec)}
    for place in ("forward", "weight", "core"):
        answer, failed = set(exercises.caught_by(place)), set()
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(METHODS, "svft", planted(place))
            for name, check in checks.items():
                try:
                    check()
                except AssertionError:
                    failed.add(name)
        right(answer == failed, f"{place}: your answer lacks {len(failed - answer)} checks and has "
                                f"{len(answer - failed)} too many. Which functions does each check call?")


def test_train_both():
    for shape in SHAPES:
        x, y, bias = tokens(40, shape[1]), tokens(40, shape[0], seed=3), linear(shape).bias.detach()
        s, M = exercises.train_both(linear(shape), x, y, 20, 1e-2)
        U, S, Vt = thin_svd(linear(shape).weight)
        p = torch.zeros_like(S, requires_grad=True)
        optimizer = torch.optim.AdamW([p], lr=1e-2, weight_decay=0)
        for _ in range(20):
            optimizer.zero_grad()
            (x @ (U @ torch.diag(S + p) @ Vt).t() + bias - y).square().mean().backward()
            optimizer.step()
        for got, expected in ((M, p), (s, S + p)):
            assert_close(got, expected, 1e-10, "; did you set weight_decay=0, which is not AdamW's default?")


def test_weight_stats():
    for seed, shape in enumerate([*SHAPES, (33, 64)]):
        start = linear(shape, seed=seed).weight.detach()
        W = ((seed - 2) * start + tokens(*shape, seed=9)) * 3
        cosine = torch.cosine_similarity(W.flatten(), start.flatten(), dim=0)
        squares = torch.linalg.svdvals(W).square()
        energy = squares[:len(squares) // 4].sum() / squares.sum()
        for name, got, expected in zip(("cosine", "energy"), exercises.weight_stats(W, start), (cosine, energy)):
            right(math.isclose(got, expected, rel_tol=1e-8), f"W of shape {shape}: {got} is not the {name}")


def test_band_share():
    for seed, shape in enumerate(SHAPES):
        W0, U, S, Vt, M, sign = problem(shape, seed)
        for dW in (tokens(*shape), U @ M @ Vt):
            C = [[(U[:, i] @ dW @ Vt[j]).item() for j in range(len(S))] for i in range(len(S))]
            for d in (0, 2, len(S) - 1):
                inside = sum(c * c for i, row in enumerate(C) for j, c in enumerate(row) if abs(i - j) <= d)
                got, expected = exercises.band_share(W0, W0 + dW, d), inside / dW.square().sum().item()
                right(math.isclose(got, expected, rel_tol=1e-8),
                      f"W of shape {shape}, d={d}: {got:.6f}, but the loop returns {expected:.6f}")


def test_rank_k_and_rank_1():
    for D, k in [(D, k) for D in (1, 2, 5, 16) for k in {1, (D + 1) // 2, D}]:
        for which, M, rank in zip(("first", "second"), exercises.rank_k_and_rank_1(D, k), (k, 1)):
            right(M.shape == (D, D) and int((M != 0).sum()) == k, f"D={D}: the {which} M must have {k} nonzero entries")
            right(torch.linalg.matrix_rank(M.double()) == rank, f"D={D}, k={k}: the {which} M must have rank {rank}")


def test_after_flip():
    for seed, shape in enumerate(SHAPES):
        W0, U, S, Vt, M, sign = problem(shape, seed)
        W = (U * sign) @ (torch.diag(S) + exercises.after_flip(M, sign)) @ (Vt * sign[:, None])
        assert_close(W, U @ (torch.diag(S) + M) @ Vt, 1e-10)


def test_TinyFile():
    for seed, shape in enumerate(SHAPES):
        W0, U, S, Vt, M, sign = problem(shape, seed)
        content = {name: tensor.clone() for name, tensor in exercises.TinyFile.write(U, S, Vt, M).items()}
        more = sum(tensor.numel() for tensor in content.values()) - M.numel()
        right(torch.equal(content["M"], M), 'content["M"] must be M itself, unchanged')
        right(more <= 2 * sum(shape), f"the file has {more} numbers in addition to M, {2 * sum(shape)} are allowed")
        for sign in (sign, -sign, sign.flip(0)):
            try:
                W = exercises.TinyFile.read(content, U * sign, S, Vt * sign[:, None])
            except ValueError:
                right(False, "u_i and v_i changed their signs together: such a reader must get W")
            assert_close(W, U @ (torch.diag(S) + M) @ Vt, 1e-10)
        noise = tokens(*shape)
        noise -= noise.mean()                                  # the sum of all entries stays the same
        turned_U, turned_V = (torch.linalg.qr(Q + 0.01 * tokens(*Q.shape)).Q for Q in (U, Vt.t()))
        others = {"W0 with noise of 1 %": thin_svd(W0 + 0.01 * W0.norm() / noise.norm() * noise),
                  "U turned": (turned_U, S, Vt), "V turned": (U, S, turned_V.t()), "1.01 S": (U, 1.01 * S, Vt),
                  "U with its rows reversed": (U.flip(0), S, Vt), "V with its rows reversed": (U, S, Vt.flip(1))}
        for change, other in others.items():
            try:
                exercises.TinyFile.read(content, *other)
            except ValueError:
                continue
            right(False, f"read accepted another base model: {change}")


def test_same_matrices():
    U, S, Vt = thin_svd(linear((20, 12)).weight)
    for rank in (1, 3, 8):
        layer = adapter(exercises.same_matrices(rank), linear((20, 12)))
        right(layer.M.numel() == rank ** 2, f"rank {rank}: svft trains {layer.M.numel()} parameters, not {rank ** 2}")
        right(layer.core().numel() == rank ** 2 and torch.equal(layer.U, U[:, :rank]),
              f"rank {rank}: M must be dense between the first {rank} singular vectors")
