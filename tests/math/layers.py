"""What the tests of the methods share: specs, shapes that fit them, and a way to move away from the start."""

import torch
import torch.nn as nn

from svmini import METHODS
from svmini.methods import parse_spec
from svmini.methods.adapter import Adapter

EPS = {torch.float32: 1e-5, torch.float64: 1e-10}   # relative to the largest entry
SHAPES = {"square": (16, 16), "wide": (16, 24), "tall": (24, 16)}
OWN = ("svfit", "svft", "lora", "dora", "vera", "boft", "random_mask")  # other methods were added by a reader
TOKENS = (3, 20, 200)                               # few and many, so that every order of products is taken


def specs():
    """Return every example and test option of every registered method, as specs such as "lora:rank=8"."""
    return [f"{name}:{options}" for name, method in METHODS.items()
            for options in (*method.examples, *method.test_options)]


def fits(spec, shape):
    method, options, _ = parse_spec(spec)
    try:
        METHODS[method].check(*shape, **options)
    except ValueError:
        return False
    return True


def shapes_of(spec):
    """Return those of a square, a wide and a tall shape that the options fit, larger ones if these are too small."""
    for size in (1, 4, 16):
        fitting = [(size * d_out, size * d_in) for d_out, d_in in SHAPES.values()
                   if fits(spec, (size * d_out, size * d_in))]
        if fitting:
            return fitting
    raise AssertionError(f"{spec} fits no shape of this file: give shapes_of one that it fits")


def linear(shape="square", dtype=torch.float64, seed=0):
    d_out, d_in = SHAPES[shape] if isinstance(shape, str) else shape
    torch.manual_seed(seed)
    return nn.Linear(d_in, d_out, dtype=dtype)


def adapter(spec, base):
    """Return a new adapter of this spec on an nn.Linear."""
    method, options, _ = parse_spec(spec)
    return METHODS[method](base, **options)


def layer_of(spec, shape="square", dtype=torch.float64, moved=True, seed=0):
    """Return an adapter on linear(shape, dtype, seed), moved away from its start unless moved=False."""
    layer = adapter(spec, linear(shape, dtype, seed))
    return move(layer) if moved else layer


def weight_of(layer):
    return layer.weight.detach()


def positions_of(layer):
    """Return the positions (i, j) of the trained entries of SVFT's M or of random masking's E."""
    if "indices" not in dict(layer.named_buffers()):                # plain
        return [(i, i) for i in range(layer.M.numel())]
    return [divmod(n, layer.Vt.shape[0] if hasattr(layer, "Vt") else layer.in_features) for n in layer.indices.tolist()]


def tokens(T, d, dtype=torch.float64, seed=1):
    return torch.randn(T, d, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def noise(model, seed=2, share=0.3):
    """Return a random tensor for every trainable parameter of a model or adapter, in order. Those of an adapter have
    the scale that moves its weight by at most `share` of its norm: a step of 1 is large for one method and small for
    another."""
    generator, drawn = torch.Generator().manual_seed(seed), {}
    for part in model.modules():
        own = trained(part) if isinstance(part, Adapter) else []
        unscaled = [torch.randn(p.shape, generator=generator).to(p) for p in own]
        size = size_that_moves(part, own, unscaled, share) if own else 0
        drawn |= {id(p): size * d for p, d in zip(own, unscaled)}
    return [drawn[id(p)] if id(p) in drawn else 0.1 * torch.randn(p.shape, generator=generator).to(p)
            for p in trained(model)]


@torch.no_grad()
def size_that_moves(layer, parameters, direction, share):
    """Return the power of two by which a direction moves the layer's weight by `share` to half a `share` of its
    norm."""
    start, W, size, moved = [p.clone() for p in parameters], layer.weight.clone(), 2.0 ** -12, 0
    while moved <= share:                                   # from below: a large Q of BOFT is the identity again
        size *= 2
        for p, s, d in zip(parameters, start, direction):
            p.copy_(s + size * d)
        moved = (layer.weight - W).norm() / W.norm()
        assert size < 1e6, f"the weight of {type(layer).__name__} hardly changes, however far its parameters are moved"
    for p, s in zip(parameters, start):
        p.copy_(s)
    return size / 2


@torch.no_grad()
def move(model, seed=2, share=0.3):
    """Move every trainable parameter away from the start, which hides most mistakes. Returns the model."""
    for p, d in zip(trained(model), noise(model, seed, share)):
        p += d
    return model


def assert_close(got, expected, eps=1e-12, hint=""):
    """Assert equality up to eps times the largest expected entry, and equal shapes and dtypes."""
    got, expected = got.detach(), expected.detach()
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype), \
        f"{tuple(got.shape)} {got.dtype} instead of {tuple(expected.shape)} {expected.dtype}{hint}"
    error = (got - expected).abs().max() / expected.abs().max() if got.numel() else 0
    assert error <= eps, f"off by {error:.1e} of the largest entry, {eps:.0e} allowed{hint}"
