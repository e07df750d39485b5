"""Gradients of every method, against finite differences and the closed forms that follow from its equation."""

import pytest
import torch
import torch.nn.functional as F

from layers import (TOKENS, assert_close, layer_of, linear, move, noise, positions_of, shapes_of, specs, tokens,
                    trained)
from svmini import METHODS, ViT, ViTConfig, adapt
from svmini.adapting import adapters_of
from svmini.methods import parse_spec
from svmini.methods.svd import thin_svd


def gradient_specs():
    """Return every spec, DoRA's with detach_norm=False: with a constant norm its backward pass is no gradient."""
    every = [spec + ",detach_norm=False" if spec.startswith("dora:") and "detach_norm" not in spec else spec
             for spec in specs()]
    return every + ["boft:block_size=4,factors=1", "svft:off_diagonals=0"]


def check_gradient(function, inputs, directions, seed=0, step=3e-4, eps=1e-8):
    """Compare the slope of function() along one direction of all inputs, by autograd and by a central difference of
    fourth order.

    function: without arguments, returns a tensor.  inputs: leaf tensors that it reads.  directions: random tensors of
    their shapes, each on the scale of its input. A random direction is orthogonal to no error, so a wrong gradient of
    any one input shows.  eps: relative to the size of such a slope. Raises AssertionError.
    """
    generator = torch.Generator().manual_seed(seed)
    y = function()
    weights = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    gradients = torch.autograd.grad((y * weights).sum(), inputs)
    slope = sum((g * d).sum() for g, d in zip(gradients, directions))
    length = sum((g * d).square().sum() for g, d in zip(gradients, directions)).sqrt()
    assert length > 1e-6, "the gradient is zero"

    @torch.no_grad()
    def at(steps):
        start = [t.clone() for t in inputs]
        for t, d in zip(inputs, directions):
            t += steps * step * d
        value = (function() * weights).sum()
        for t, s in zip(inputs, start):
            t.copy_(s)
        return value

    difference = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step)
    error = (slope - difference).abs() / length
    assert error <= eps, f"off by {error:.1e} of the gradient's length, {eps:.0e} allowed"


def check_layer(spec):
    """Check the gradient of x and of every parameter, for few and many tokens, and the gradient of weight."""
    for shape in shapes_of(spec):
        layer = layer_of(spec, shape)
        own, directions = list(layer.parameters()), noise(layer, seed=5)
        check_gradient(lambda: layer.weight, own, directions)
        for T in TOKENS:
            x = tokens(T, shape[1]).requires_grad_()
            for one, d in zip([x, *own], [tokens(T, shape[1], seed=6), *directions]):
                check_gradient(lambda: layer(x), [one], [d])


@pytest.mark.parametrize("spec", gradient_specs())
def test_layer(spec):
    check_layer(spec)


def check_model(spec):
    """Check the gradient of a ViT along one direction of all parameters, and that every layer has a gradient."""
    torch.manual_seed(0)
    config = ViTConfig(image_size=8, patch_size=4, in_channels=3, num_classes=4, n_layer=1, n_head=2, d_model=16)
    model, images = ViT(config).double(), tokens(3, 3 * 8 * 8).view(3, 3, 8, 8)

    def loss():
        return F.cross_entropy(model(images), torch.arange(3))

    method, options, targets = parse_spec(spec)
    square = "pattern=topk" in spec
    adapt(model, method, targets=("query", "key", "value", "out") if square else targets, **options)
    move(model)
    layers = adapters_of(model).values()
    assert len(layers) == (0 if method in ("full", "head") else 4 if square else 6)
    check_gradient(loss, trained(model), noise(model, seed=5))
    loss().backward()
    assert all((p.grad != 0).any() for layer in layers for p in layer.parameters())


@pytest.mark.parametrize("spec", gradient_specs() + ["full", "head"])
def test_vit(spec):
    check_model(spec)


# ---- closed forms: the gradient of every parameter from ∂L/∂W = G ----

def svft(layer, G):
    """∂L/∂M_ij = u_iᵀ G v_j."""
    U, _, Vt = thin_svd(linear(tuple(G.shape)).weight)
    if layer.options["basis"] != "singular":
        U, Vt = layer.U, layer.Vt
    return {"M": torch.stack([U[:, i] @ G @ Vt[j] for i, j in positions_of(layer)])}


def lora(layer, G):
    """∂L/∂A = (α/r) Bᵀ G,  ∂L/∂B = (α/r) G Aᵀ."""
    scale = (layer.options["alpha"] or layer.options["rank"]) / layer.options["rank"]
    return {"A": scale * layer.B.t() @ G, "B": scale * G @ layer.A.t()}


def dora(layer, G):
    """With V = W0 + (α/r) B A and c = m / ‖V‖ held constant: ∂L/∂B = (α/r) diag(c) G Aᵀ,
    ∂L/∂A = (α/r) Bᵀ diag(c) G, ∂L/∂m_i = ⟨G_i, V_i⟩ / ‖V_i‖."""
    scale = (layer.options["alpha"] or layer.options["rank"]) / layer.options["rank"]
    V = linear(tuple(G.shape)).weight + scale * layer.B @ layer.A
    c = (layer.m / V.square().sum(dim=1).sqrt())[:, None]
    return {"B": scale * c * G @ layer.A.t(), "A": scale * layer.B.t() @ (c * G),
            "m": (G * V).sum(dim=1) / V.norm(dim=1)}


def vera(layer, G):
    """∂L/∂b_i = Σ_jk G_ik B_ij d_j A_jk,  ∂L/∂d_j = Σ_ik G_ik b_i B_ij A_jk."""
    return {"b": torch.einsum("ik,ij,j,jk->i", G, layer.B, layer.d, layer.A),
            "d": torch.einsum("ik,i,ij,jk->j", G, layer.b, layer.B, layer.A)}


CLOSED = {"svft:pattern=plain": svft, "svft:off_diagonals=3": svft, "svft:pattern=random,seed=4": svft,
          "svft:pattern=topk": svft, "svft:rank=5,off_diagonals=1": svft, "svft:rank=5,pattern=topk": svft,
          "svft:basis=random,rank=5": svft, "lora:rank=3,alpha=7": lora, "lora:rank=3,init=pissa": lora,
          "dora:rank=3,alpha=7": dora, "vera:rank=40,seed=2": vera}


@pytest.mark.parametrize("spec", CLOSED)
def test_closed_form(spec):
    for shape in shapes_of(spec):
        layer = layer_of(spec, shape)
        for T in TOKENS:
            x, g = tokens(T, shape[1]), tokens(T, shape[0], seed=3)
            layer.zero_grad()
            (layer(x) * g).sum().backward()
            expected = CLOSED[spec](layer, g.t() @ x)               # G = gᵀ x (d_out, d_in), as in nn.Linear
            assert expected.keys() == dict(layer.named_parameters()).keys()
            for name, p in layer.named_parameters():
                assert_close(p.grad, expected[name])


# ---- the check itself ----

class Times(torch.autograd.Function):
    """The identity with a gradient that is `factor` times the correct one."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return ctx.factor * g, None


def one_entry_detached(y):
    mask = torch.ones_like(y)
    mask.view(-1)[7] = 0
    return y * mask + (y * (1 - mask)).detach()


WRONG = {"1 % off": lambda y: Times.apply(y, 1.01), "0.01 % off": lambda y: Times.apply(y, 1.0001),
         "half detached": lambda y: 0.5 * y + 0.5 * y.detach(), "one entry detached": one_entry_detached}


@pytest.mark.parametrize("method", METHODS)
def test_a_wrong_gradient_fails_the_check(method):
    layer, x = layer_of(method + (":detach_norm=False" if method == "dora" else ":"), "tall"), tokens(5, 16)
    inputs, along = [x.requires_grad_(), *layer.parameters()], [tokens(5, 16, seed=6), *noise(layer, seed=5)]
    before = [t.detach().clone() for t in inputs]
    check_gradient(lambda: Times.apply(layer(x), 1.0), inputs, along)
    assert all(torch.equal(a, b) for a, b in zip(before, inputs)), "the check has changed an input"
    for wrong in WRONG.values():
        assert torch.equal(wrong(layer(x)), layer(x))
        with pytest.raises(AssertionError, match="off by"):
            check_gradient(lambda: wrong(layer(x)), inputs, along)
    with pytest.raises(AssertionError, match="is zero"):
        check_gradient(lambda: layer(x) * 0, inputs, along)
