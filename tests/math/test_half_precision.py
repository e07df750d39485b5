"""bf16 and fp16 base layers: frozen tensors in the base's dtype, parameters in float32, the base itself at the start."""

import copy

import pytest
import torch

from layers import assert_close, linear, move, shapes_of, specs, tokens
from svmini import METHODS
from svmini.methods import parse_spec

HALF = {torch.bfloat16: 2.0 ** -8, torch.float16: 2.0 ** -11}   # half a unit in the last place of 1


def half_layer(spec, shape, dtype):
    method, options, _ = parse_spec(spec)
    torch.manual_seed(0)
    return METHODS[method](linear(shape, dtype), **options)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("spec", specs())
def test_a_half_precision_layer_starts_as_the_base_and_trains_in_float32(spec, dtype):
    for shape in shapes_of(spec):
        base, layer = linear(shape, dtype), half_layer(spec, shape, dtype)
        frozen = [t for name, t in layer.named_buffers() if name in layer.frozen and t.dim() == 2]
        assert layer.base_dtype == dtype and frozen and all(t.dtype == dtype for t in frozen)
        assert all(p.dtype == torch.float32 for p in layer.parameters())
        for T in (3, 200):                                      # few and many tokens take different orders of products
            x = tokens(T, shape[1], dtype)
            y = layer(x)
            assert y.dtype == dtype
            if "pissa" in spec or spec.startswith("dora"):      # a rounded residual; a bias that is added after m / ‖V‖
                assert_close(y, base(x), 4 * HALF[dtype])
            else:
                assert torch.equal(y, base(x))
        W = layer.weight.to(dtype)
        assert torch.equal(W, base.weight) if "pissa" not in spec else (W - base.weight).abs().max() <= 2 * HALF[dtype]
        before = [p.detach().clone() for p in move(layer).parameters()]
        layer(tokens(30, shape[1], dtype)).float().square().mean().backward()
        torch.optim.AdamW(layer.parameters(), lr=1e-2, weight_decay=0).step()
        assert all((p != b).all() for p, b in zip(layer.parameters(), before))


@pytest.mark.parametrize("spec", specs())
def test_gradients_of_a_bf16_layer_equal_exact_ones_up_to_rounding(spec):
    for shape in shapes_of(spec):
        half = move(half_layer(spec, shape, torch.bfloat16))
        exact = copy.deepcopy(half).double()                    # the same frozen tensors and parameters
        for T in (20, 200):
            x, y = tokens(T, shape[1], torch.bfloat16), tokens(T, shape[0], torch.bfloat16, 3)
            got = torch.autograd.grad((half(x) * y).sum(), list(half.parameters()))
            expected = torch.autograd.grad((exact(x.double()) * y.double()).sum(), list(exact.parameters()))
            for a, b in zip(got, expected):
                assert (a - b).norm() <= 0.03 * b.norm(), f"off by {((a - b).norm() / b.norm()).item():.1e}"
