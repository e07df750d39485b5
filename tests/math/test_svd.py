"""The thin SVD that methods share, the order of products, and that neither depends on the mode they run in."""

from contextlib import contextmanager

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import svmini.methods.svd
from layers import SHAPES, adapter, assert_close, layer_of, linear, shapes_of, tokens, specs
from svmini import adapt
from svmini.methods import parse_spec
from svmini.methods.svd import apply_with_residual, apply_factors, clear_svd_cache, thin_svd


@pytest.mark.parametrize("dtype, eps", [(torch.float32, 3e-6), (torch.float64, 3e-13)], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES.values(), (1, 5), (5, 1), (3, 200)], ids=str)
def test_thin_svd(shape, dtype, eps):
    W, D = tokens(*shape, seed=5).to(dtype), min(shape)
    U, S, Vt = thin_svd(W)
    for single, double in zip((U, S, Vt), thin_svd(W.double())):
        assert_close(single.double(), double, 1e-7)         # computed in float64
    assert (U.shape, S.shape, Vt.shape) == ((shape[0], D), (D,), (D, shape[1]))
    assert {t.dtype for t in (U, S, Vt)} == {dtype} and all(t.is_contiguous() for t in (U, S, Vt))
    assert_close((U * S) @ Vt, W, eps)
    for orthonormal in (U.t() @ U, Vt @ Vt.t()):
        assert_close(orthonormal, torch.eye(D, dtype=dtype), eps)
    assert (S[1:] <= S[:-1]).all() and (S >= 0).all()
    assert (U.gather(0, U.abs().argmax(dim=0, keepdim=True)) > 0).all()


def test_signs_do_not_depend_on_lapack(monkeypatch):
    """The library of another machine may return any of the signs."""
    W, svd = linear("tall").weight, torch.linalg.svd
    expected = thin_svd(W)
    for flip in (-1.0, 1.0):
        def other(W, full_matrices):
            U, S, Vt = svd(W, full_matrices=full_matrices)
            sign = torch.where(torch.arange(len(S)) % 2 == 0, flip, -flip)
            return U * sign, S, sign[:, None] * Vt

        clear_svd_cache()
        monkeypatch.setattr(torch.linalg, "svd", other)
        assert all(torch.equal(a, b) for a, b in zip(thin_svd(W), expected))


def test_a_weight_is_decomposed_once(monkeypatch):
    calls, svd = [], torch.linalg.svd
    clear_svd_cache()
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: calls.append(1) or svd(*a, **k))
    base = linear("wide")
    first = thin_svd(base.weight)
    for again in (thin_svd(base.weight), thin_svd(base.weight.detach().clone())):
        assert all(torch.equal(a, b) for a, b in zip(first, again))
    for spec in ("svfit:", "svfit:energy=0.9", "svft:", "svft:rank=3,off_diagonals=1", "lora:init=pissa"):
        layer_of(spec, "wide")
    assert len(calls) == 1
    clear_svd_cache()                                                # as in a new process
    assert all(torch.equal(a, b) for a, b in zip(first, thin_svd(base.weight))) and len(calls) == 2
    assert thin_svd(base.weight.float())[0].dtype == torch.float32 and len(calls) == 3
    thin_svd(base.weight.view(24, 16))                      # the same bytes in another shape
    with torch.no_grad():
        base.weight[3, 5] += 1e-9                           # and another matrix
    thin_svd(base.weight)
    assert len(calls) == 5


def test_the_cache_is_bounded_and_keeps_the_most_recently_used_factors(monkeypatch):
    clear_svd_cache()
    weights = [linear(seed=seed).weight for seed in range(3)]
    thin_svd(weights[0])
    one = sum(t.nbytes for t in next(iter(svmini.methods.svd._cache.values())))
    monkeypatch.setattr(svmini.methods.svd, "CACHE_BYTES", 2 * one)
    for i in (1, 0, 2):                                     # 0 was used after 1, so 1 is dropped
        thin_svd(weights[i])
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: pytest.fail("computed again"))
    thin_svd(weights[0]), thin_svd(weights[2])
    assert len(svmini.methods.svd._cache) == 2


def test_writing_into_a_frozen_tensor_changes_no_other_layer():
    for spec in ("svfit:", "svft:", "svft:basis=random", "vera:rank=16"):
        first, second = layer_of(spec), layer_of(spec)
        expected = second.weight.clone()
        for name, tensor in first.named_buffers():
            if tensor.is_floating_point():
                tensor.fill_(7)
        assert torch.equal(second.weight, expected) and torch.equal(layer_of(spec).weight, expected)


# ---- the order of products ----

MANY = (4, 16, 17, 32, 33, 64, 500)


def assert_cheapest(forward, orders, d_in, *trained):
    """forward and all orders are one function, and forward needs as few products as the cheapest of them, in a step
    forward and backward to x and the trained tensors."""
    def flops(function, x):
        in_place = {torch.ops.aten.addmm_: lambda y, h, Bt, **rest: 2 * h[0] * h[1] * Bt[1]}   # torch does not count it
        with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
            function(x, *trained).sum().backward()
        return counter.get_total_flops()

    for T in MANY:
        x = tokens(T, d_in).requires_grad_()
        for order in orders:
            assert_close(forward(x, *trained), order(x, *trained), 1e-10)
        assert flops(forward, x) == min(flops(order, x) for order in orders), T


@pytest.mark.parametrize("shape", [(16, 16), (16, 64), (64, 16), (16, 20), (20, 16)], ids=str)
@pytest.mark.parametrize("kind", ("diagonal", "any"))
def test_no_exact_order_is_cheaper_than_apply_factors(kind, shape):
    U, S, Vt = thin_svd(linear(shape).weight)
    core = (S if kind == "diagonal" else torch.diag(S) + 0.1).requires_grad_()
    if kind == "diagonal":
        orders = [lambda x, s: F.linear(x, (U * s) @ Vt), lambda x, s: F.linear(F.linear(x, Vt) * s, U)]
    else:
        orders = [lambda x, C: F.linear(x, U @ (C @ Vt)), lambda x, C: F.linear(x, (U @ C) @ Vt),
                  lambda x, C: F.linear(F.linear(F.linear(x, Vt), C), U),
                  lambda x, C: F.linear(F.linear(x, C @ Vt), U), lambda x, C: F.linear(F.linear(x, Vt), U @ C)]
    assert_cheapest(lambda x, c: apply_factors(x, U, c, Vt, None), orders, shape[1], core)


@pytest.mark.parametrize("shape", [(16, 16), (16, 64), (20, 16)], ids=str)
@pytest.mark.parametrize("kind", ("diagonal", "any"))
def test_no_exact_order_is_cheaper_than_apply_with_residual(kind, shape):
    W0 = linear(shape).weight.detach()
    U, S, Vt = thin_svd(W0)
    for rank in (2, 8, 16):
        u, vt, core = U[:, :rank], Vt[:rank], (S[:rank] if kind == "diagonal" else torch.diag(S[:rank]) + 0.1)
        scaled = (lambda s: u * s) if kind == "diagonal" else (lambda C: u @ C)
        orders = [lambda x, c: F.linear(x, W0 + scaled(c) @ vt),
                  lambda x, c: F.linear(x, W0) + F.linear(
                      F.linear(x, vt) * c if kind == "diagonal" else F.linear(F.linear(x, vt), c), u)]
        assert_cheapest(lambda x, c: apply_with_residual(x, W0, u, c, vt, None), orders, shape[1],
                        core.requires_grad_())


@pytest.mark.parametrize("shape", [(16, 16), (16, 64), (20, 16)], ids=str)
def test_the_two_orders_of_vera_are_equal_and_the_cheaper_one_is_taken(shape):
    for rank in (2, 16, 40):
        layer = layer_of(f"vera:rank={rank}", shape)
        assert_cheapest(layer, [
            lambda x: F.linear(x, layer.weight, layer.bias),
            lambda x: F.linear(x, layer.W0, layer.bias) + layer.b * F.linear(F.linear(x, layer.A) * layer.d, layer.B)],
            shape[1])


# ---- modes ----

@contextmanager
def other_defaults():
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


MODES = {"autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16), "inference": torch.inference_mode,
         "other defaults": other_defaults}


@pytest.mark.parametrize("spec", specs())
def test_a_layer_does_not_depend_on_the_mode_in_which_it_is_built(spec):
    """Autocast must not round a start, draws follow the CPU and the dtype of the weight, and tensors that are created
    in inference mode could not be trained with, neither now nor by another layer that finds them in a cache."""
    shape = shapes_of(spec)[0]

    def build():
        method, options, _ = parse_spec(spec)
        return adapt(nn.ModuleDict({"query": base}), method, targets=("query",), **options).query

    base = linear(shape, torch.float32)
    torch.manual_seed(3)
    expected = build().state_dict()
    for name, mode in MODES.items():
        base = linear(shape, torch.float32)
        clear_svd_cache()
        svmini.methods.svft.orthonormal.cache_clear()
        svmini.methods.vera.uniform.cache_clear()
        torch.manual_seed(3)
        with mode():
            layer = build()
        assert all(torch.equal(t, expected[key]) and t.dtype == expected[key].dtype
                   for key, t in layer.state_dict().items()), name
        for later in (layer, adapter(spec, linear(shape, torch.float32))):
            later(tokens(5, shape[1], torch.float32).requires_grad_()).sum().backward()
            torch.optim.SGD(later.parameters(), lr=0.1).step()
