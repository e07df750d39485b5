"""What bf16 and fp16 round, as dtypes of the base layer and of autocast, and what they do not."""

import pytest
import torch
import torch.nn.functional as F

from layers import OWN, TOKENS, adapter, fits, linear, shapes_of, specs, tokens
from svmini.methods import parse_spec

HALF = (torch.bfloat16, torch.float16)
OUR_SPECS = [spec for spec in specs() if parse_spec(spec)[0] in OWN]


@pytest.mark.parametrize("dtype", (torch.float32, *HALF), ids=str)
def test_parameters_are_never_rounded(dtype):
    layer = adapter("lora:rank=2", linear(dtype=torch.float32).to(dtype))
    for lower in (layer.half, layer.bfloat16, lambda: layer.to(torch.bfloat16)):
        with pytest.raises(ValueError, match="autocast"):
            lower()
    torch.set_default_dtype(torch.bfloat16)                     # must not matter
    try:
        layer.to("cpu")
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.A.dtype == torch.float32 and layer.W0.dtype == layer.bias.dtype == dtype
    assert {t.dtype for t in (*layer.double().state_dict().values(), layer.weight)} == {torch.float64}


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("spec", [spec for spec in OUR_SPECS if "pissa" not in spec])
def test_a_half_precision_layer_starts_as_its_base_bit_for_bit(spec, dtype):
    """W0 + 0 is exact. Exceptions: PiSSA rounds its residual, and DoRA rounds W x before it adds the bias."""
    for shape in shapes_of(spec):
        base = linear(shape, torch.float32).to(dtype)
        layer = adapter(spec, base)
        assert torch.equal(layer.weight, base.weight)
        for T in (0, *TOKENS):
            x = tokens(T, shape[1], dtype)
            assert torch.equal(layer(x), base(x)) or (spec.startswith("dora:") and T > 0)


@pytest.mark.parametrize("T", (64, 400))
def test_autocast_costs_no_more_precision_than_stated(T):
    """The output error of a layer under bf16 autocast, next to that of the base layer. Only these methods round more:
    SVFit and SVFT if factors replace W0 (each is rounded), PiSSA (W_res and B A), DoRA (before m and the bias)."""
    base, x = linear((128, 128), torch.float32), tokens(T, 128, torch.float32)
    exact = F.linear(x.double(), base.weight.double(), base.bias.double())

    def output(layer):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return layer(x)

    own = (output(base) - exact).norm()
    for spec in OUR_SPECS:
        if fits(spec, (128, 128)):
            layer = adapter(spec, base)
            if "pissa" in spec or spec.startswith("dora") or layer.W0 is None:
                assert (output(layer) - exact).norm() <= 1.55 * own, spec
            else:
                assert torch.equal(output(layer), output(base)), spec
