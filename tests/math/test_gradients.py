"""Gradients of every method: against finite differences, and against the closed forms that follow from its equation."""

import pytest
import torch
import torch.nn.functional as F

from layers import SHAPES, TOKENS, assert_close, layer_of, linear, move, noise, shapes_of, tokens, trained, specs
from svmini import GPT, METHODS, GPTConfig, ViT, ViTConfig, adapt
from svmini.adapting import adapters_of
from svmini.methods import parse_spec
from svmini.methods.svd import thin_svd


def gradient_specs():
    """Every spec, DoRA's with the norm in the backward pass: held constant it is no gradient, by design."""
    every = [spec + ",detach_norm=False" if spec.startswith("dora:") and "detach_norm" not in spec else spec
             for spec in specs()]
    return every + ["boft:block_size=4,factors=1", "svft:off_diagonals=0"]


def check_gradient(function, inputs, directions, seed=0, step=3e-4, eps=1e-8):
    """The slope of function() along one direction of all inputs, by autograd and by a central difference of fourth
    order; eps is relative to the size that such a slope has.

    function: no arguments, returns any tensor.  inputs: leaves that it reads.  directions: random tensors of their
    shapes, each in its input's own measure. A wrong gradient of any one input shows, since a random direction is at a
    right angle to no error. Raises AssertionError.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(function().shape, generator=generator, dtype=torch.float64)
    gradients = torch.autograd.grad((function() * weights).sum(), inputs)
    slope = sum((g * d).sum() for g, d in zip(gradients, directions))
    length = sum((g * d).square().sum() for g, d in zip(gradients, directions)).sqrt()
    assert length > 1e-6, "the gradient sees nothing"

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
    """Of each trained tensor alone, of x and of all at once, for few and many tokens; number by number where few."""
    for shape in shapes_of(spec):
        layer = layer_of(spec, shape)
        own, directions = list(layer.parameters()), noise(layer, seed=5)
        check_gradient(lambda: layer.weight, own, directions)
        for T in TOKENS:
            x = tokens(T, shape[1]).requires_grad_()
            inputs, along = [x, *own], [tokens(T, shape[1], seed=6), *directions]
            check_gradient(lambda: layer(x), inputs, along)
            for one, d in zip(inputs, along):
                check_gradient(lambda: layer(x), [one], [d])
        if sum(p.numel() for p in own) <= 100:
            x = tokens(2, shape[1]).requires_grad_()
            torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *own), eps=1e-6, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("spec", gradient_specs())
def test_layer(spec):
    check_layer(spec)


def whole_model(kind):
    """A model in float64, and a function of it: the mean loss of next tokens, or of one class a picture."""
    torch.manual_seed(0)
    if kind == "gpt":
        model = GPT(GPTConfig(vocab_size=11, block_size=6, n_layer=2, n_head=2, d_model=16)).double()
        x = torch.randint(11, (3, 6), generator=torch.Generator().manual_seed(1))
        return model, lambda: F.cross_entropy(model(x).flatten(0, 1), x.roll(-1, dims=1).flatten())
    model = ViT(ViTConfig(image_size=8, patch_size=4, in_channels=3, num_classes=4, n_layer=2, n_head=2, d_model=16))
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return model.double(), lambda: F.cross_entropy(model(x), torch.arange(3))


def check_whole_model(spec, kind):
    """Along one direction of all trained numbers at once; and every adapted layer has a gradient."""
    model, loss = whole_model(kind)
    method, options, targets = parse_spec(spec)
    square = "pattern=topk" in spec
    adapt(model, method, targets=("query", "key", "value", "out") if square else targets, **options)
    move(model)
    layers = adapters_of(model).values()
    assert len(layers) == (0 if method in ("full", "head") else 8 if square else 12)
    check_gradient(loss, trained(model), noise(model, seed=5))
    loss().backward()
    assert all((p.grad != 0).any() for layer in layers for p in layer.parameters())


@pytest.mark.parametrize("spec", gradient_specs() + ["full", "head"])
def test_vit(spec):
    check_whole_model(spec, "vit")


@pytest.mark.parametrize("spec", ["full", "svfit:", "svft:", "lora:", "dora:detach_norm=False", "vera:", "boft:"])
def test_gpt(spec):
    check_whole_model(spec, "gpt")


# ---- closed forms: what ∂L/∂W = G gives for each trained number; layer.indices names the places of M and of E ----

def svfit(layer, G):
    """∂L/∂s_i = u_iᵀ G v_i."""
    U, S, Vt = thin_svd(linear(tuple(G.shape)).weight)
    return {"s": torch.stack([U[:, i] @ G @ Vt[i] for i in range(len(layer.s))])}


def svft(layer, G):
    """∂L/∂M_ij = u_iᵀ G v_j."""
    U, S, Vt = thin_svd(linear(tuple(G.shape)).weight)
    if layer.options["basis"] == "random":
        U, Vt = layer.U, layer.Vt
    r = layer.options["rank"] or len(S)
    if layer.options["pattern"] == "plain":
        where = [(i, i) for i in range(r)]
    elif layer.options["pattern"] == "banded":
        d = layer.options["off_diagonals"]
        where = [(i, j) for i in range(r) for j in range(r) if abs(i - j) <= d]
    else:
        where = [divmod(n, r) for n in layer.indices.tolist()]
    return {"M": torch.stack([U[:, i] @ G @ Vt[j] for i, j in where])}


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


def entries(layer, G):
    """∂L/∂E_ij = G_ij."""
    return {"e": torch.stack([G[divmod(n, G.shape[1])] for n in layer.indices.tolist()])}


CLOSED = {"svfit:": svfit, "svfit:rank=5": svfit, "svfit:energy=0.9": svfit, "svft:pattern=plain": svft,
          "svft:off_diagonals=3": svft, "svft:pattern=random,seed=4": svft, "svft:pattern=topk": svft,
          "svft:rank=5,off_diagonals=1": svft, "svft:rank=5,pattern=plain": svft, "svft:rank=5,pattern=topk": svft,
          "svft:basis=random": svft, "svft:basis=random,rank=5": svft, "lora:rank=3": lora, "lora:rank=3,alpha=7": lora,
          "lora:rank=3,init=pissa": lora, "dora:rank=3": dora, "dora:rank=3,alpha=7": dora, "vera:rank=5": vera,
          "vera:rank=40,seed=2": vera, "random_mask:": entries}


@pytest.mark.parametrize("spec", CLOSED)
def test_closed_form(spec):
    for shape in shapes_of(spec):
        layer = layer_of(spec, shape)
        for T in TOKENS:
            x, g = tokens(T, shape[1]), tokens(T, shape[0], seed=3)
            layer.zero_grad()
            (layer(x) * g).sum().backward()
            expected = CLOSED[spec](layer, g.t() @ x)               # G = gᵀ x (d_out, d_in), as for a plain layer
            assert expected.keys() == dict(layer.named_parameters()).keys()
            for name, p in layer.named_parameters():
                assert_close(p.grad, expected[name])


@pytest.mark.parametrize("shape", SHAPES)
def test_doras_constant_norm_is_no_gradient_of_a_and_b_and_one_of_x_and_m(shape):
    layer = layer_of("dora:rank=3", shape)
    x = tokens(20, layer.in_features).requires_grad_()
    m, A, B = noise(layer, seed=5)
    check_gradient(lambda: layer(x), [x, layer.m], [tokens(20, layer.in_features, seed=6), m])
    with pytest.raises(AssertionError, match="off by"):
        check_gradient(lambda: layer(x), [layer.A, layer.B], [A, B])


# ---- the check itself ----

class Times(torch.autograd.Function):
    """The identity, with a gradient that is `factor` times the right one."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return ctx.factor * g, None


def one_number_detached(y):
    mask = torch.ones_like(y)
    mask.view(-1)[7] = 0
    return y * mask + (y * (1 - mask)).detach()


WRONG = {"1 % off": lambda y: Times.apply(y, 1.01), "0.01 % off": lambda y: Times.apply(y, 1.0001),
         "half detached": lambda y: 0.5 * y + 0.5 * y.detach(), "one number detached": one_number_detached}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("method", METHODS)
def test_the_check_sees_a_wrong_gradient(method, wrong):
    """The same values with a wrong gradient."""
    spec = method + (":detach_norm=False" if method == "dora" else ":")
    layer, x = layer_of(spec, "tall"), tokens(5, 16).requires_grad_()
    inputs, along = [x, *layer.parameters()], [tokens(5, 16, seed=6), *noise(layer, seed=5)]
    assert torch.equal(WRONG[wrong](layer(x)), layer(x))
    check_gradient(lambda: Times.apply(layer(x), 1.0), inputs, along)
    with pytest.raises(AssertionError, match="off by"):
        check_gradient(lambda: WRONG[wrong](layer(x)), inputs, along)


@pytest.mark.parametrize("wrong", WRONG)
def test_the_check_sees_it_in_one_layer_of_twelve(wrong, monkeypatch):
    model, loss = whole_model("vit")
    move(adapt(model, "svft"))
    along = noise(model, seed=5)
    check_gradient(loss, trained(model), along)
    last = model.blocks[1].mlp.down
    monkeypatch.setattr(last, "forward", lambda x, forward=last.forward: WRONG[wrong](forward(x)))
    with pytest.raises(AssertionError, match="off by"):
        check_gradient(loss, trained(model), along)


def test_the_check_sees_one_wrong_input_among_many():
    """A factor on one parameter's gradient, all others right."""
    layer, x = layer_of("lora:rank=3,alpha=7"), tokens(5, 16).requires_grad_()
    inputs, along = [x, layer.A, layer.B], [tokens(5, 16, seed=6), *noise(layer, seed=5)]

    def forward(wrong_A=1.0, wrong_B=1.0):
        return F.linear(x, layer.W0 + 7 / 3 * Times.apply(layer.B, wrong_B) @ Times.apply(layer.A, wrong_A), layer.bias)

    assert_close(forward(), layer(x))
    check_gradient(forward, inputs, along)
    for wrong in ({"wrong_A": 1.001}, {"wrong_B": 0.999}, {"wrong_A": 3 / 7}, {"wrong_B": -1.0}):
        with pytest.raises(AssertionError, match="off by"):
            check_gradient(lambda: forward(**wrong), inputs, along)


def test_the_check_leaves_no_trace_and_does_not_pass_where_there_is_nothing():
    layer, x = layer_of("svfit:"), tokens(5, 16).requires_grad_()
    inputs, along = [x, layer.s], [tokens(5, 16, seed=6), *noise(layer, seed=5)]
    before = [t.detach().clone() for t in inputs]
    check_gradient(lambda: layer(x), inputs, along)
    assert all(torch.equal(a, b) for a, b in zip(before, inputs))
    with pytest.raises(AssertionError, match="sees nothing"):
        check_gradient(lambda: layer(x) * 0, inputs, along)
