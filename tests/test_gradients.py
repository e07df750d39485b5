"""Gradients of every method: finite differences, the papers' closed forms, and whole adapted models."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from conftest import SHAPES, TOKENS, assert_close, cases, move, parse, tokens
from svmini import GPT, METHODS, GPTConfig, ViT, ViTConfig, adapt
from svmini.adapter import adapters
from svmini.svd import thin_svd

SMALL = {"square": (8, 8), "wide": (8, 16), "tall": (16, 8)}
EXTRA = [("dora", "rank=3,detach_norm=False,alpha=5"), ("lora", "rank=3,alpha=5"), ("svfit", "rank=3"),
         ("boft", "block_size=2,factors=3"), ("boft", "block_size=4,factors=1"), ("svft", "off_diagonals=0")]


def settings():
    """Every example, DoRA's with the norm in the backward pass: detached it is no gradient, by design."""
    every = [(m, e + ",detach_norm=False" if m == "dora" else e) for m, e in cases()]
    return list(dict.fromkeys(every + EXTRA))


def moved_layer(method, options, shape, size=0.3):
    """One adapter in float64, away from its start; None where the options do not fit the shape."""
    d_out, d_in = shape
    try:
        METHODS[method].check(d_out, d_in, **options)
    except ValueError:
        return None
    torch.manual_seed(0)
    return move(METHODS[method](nn.Linear(d_in, d_out, dtype=torch.float64), **options), size=size)


def check_gradient(function, inputs, seed=0, step=1e-4, eps=1e-8):
    """The slope of function() along one random direction of all inputs, by autograd and by a central difference of
    fourth order; eps is relative to the gradient's length, which is the size that such a slope has.

    function: no arguments, returns any tensor.  inputs: leaves that it reads. A wrong gradient of any one of them
    shows, since a random direction is at a right angle to no error. Raises AssertionError.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(function().shape, generator=generator, dtype=torch.float64)
    directions = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in inputs]
    gradients = torch.autograd.grad((function() * weights).sum(), inputs)
    slope = sum((g * d).sum() for g, d in zip(gradients, directions))
    length = sum((g * g).sum() for g in gradients).sqrt()
    assert length > 1e-3, "the gradient sees nothing"

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


@pytest.mark.parametrize("shape", SMALL)
@pytest.mark.parametrize("method, example", settings())
def test_layer(method, example, shape):
    """Of every trained number alone and of x, for few and many tokens, by autograd's own check as well."""
    options = parse(example)
    if "rank" in options and method != "vera":
        options["rank"] = min(options["rank"], 8)
    if "off_diagonals" in options:
        options["off_diagonals"] = min(options["off_diagonals"], 7)
    layer = moved_layer(method, options, SMALL[shape])
    if layer is None:
        pytest.skip("the options do not fit this shape")
    for T in (2, 13, 40):                                   # every path of apply_factors, D = 8
        x = tokens(T, layer.d_in).requires_grad_()
        inputs = [x, *layer.parameters()]
        check_gradient(lambda: layer(x), inputs)
        check_gradient(lambda: layer.weight(), inputs[1:])
        for one in inputs:
            check_gradient(lambda: layer(x), [one])
    if sum(p.numel() for p in layer.parameters()) <= 150:   # number by number, where they are few
        x = tokens(2, layer.d_in).requires_grad_()
        parameters = tuple(layer.parameters())
        torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *parameters), eps=1e-6, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("T", TOKENS)
def test_every_shape_and_number_of_tokens_of_the_harness(shape, T):
    for method, example in settings():
        layer = moved_layer(method, parse(example), SHAPES[shape])
        if layer is not None:
            x = tokens(T, layer.d_in).requires_grad_()
            check_gradient(lambda: layer(x), [x, *layer.parameters()])


def with_closed_form(layer, T):
    """(gradients by name, G = dL/dW) of one loss, G from the plain linear map of the same weight: gᵀ x."""
    x, g = tokens(T, layer.d_in), tokens(T, layer.d_out, seed=3)
    names, parameters = zip(*layer.named_parameters())
    gradients = torch.autograd.grad((layer(x) * g).sum(), parameters)
    return dict(zip(names, gradients)), g.t() @ x           # (d_out, d_in)


def every(**kinds):
    """One case a shape and number of tokens for each keyword."""
    return pytest.mark.parametrize("shape, T, kind", [(s, T, k) for s in SHAPES for T in TOKENS for k in kinds.items()],
                                   ids=lambda v: v[0] if isinstance(v, tuple) else str(v))


@every(all={}, part={"rank": 5}, energy={"energy": 0.9})
def test_svfit(shape, T, kind):
    """∂L/∂s_i = u_iᵀ G v_i."""
    layer = moved_layer("svfit", kind[1], SHAPES[shape])
    gradients, G = with_closed_form(layer, T)
    U, S, Vt = thin_svd(nn_weight(shape))
    expected = torch.stack([U[:, i] @ G @ Vt[i] for i in range(len(layer.s))])
    assert len(layer.s) == {"all": 16, "part": 5}.get(kind[0], len(layer.s)) and gradients.keys() == {"s"}
    assert_close(gradients["s"], expected, 1e-12)


def nn_weight(shape):
    """The weight that moved_layer starts from."""
    d_out, d_in = SHAPES[shape]
    torch.manual_seed(0)
    return nn.Linear(d_in, d_out, dtype=torch.float64).weight.detach()


@every(plain={"pattern": "plain"}, banded={"off_diagonals": 3}, random={"pattern": "random", "seed": 4},
       topk={"pattern": "topk"})
def test_svft(shape, T, kind):
    """∂L/∂M_ij = u_iᵀ G v_j at the trained positions, in their order."""
    layer = moved_layer("svft", kind[1], SHAPES[shape])
    if layer is None:
        assert kind[0] == "topk" and shape != "square"
        return
    gradients, G = with_closed_form(layer, T)
    U, S, Vt = thin_svd(nn_weight(shape))
    if kind[0] == "plain":
        where = [(i, i) for i in range(16)]
    else:
        where = [divmod(n, 16) for n in layer.where.tolist()]
    if kind[0] == "banded":
        assert where == [(i, j) for i in range(16) for j in range(16) if abs(i - j) <= 3]
    expected = torch.stack([U[:, i] @ G @ Vt[j] for i, j in where])
    assert gradients.keys() == {"M"} and any(i != j for i, j in where) == (kind[0] != "plain")
    assert_close(gradients["M"], expected, 1e-12)


@every(alpha={"rank": 3, "alpha": 7}, default={"rank": 3}, pissa={"rank": 3, "init": "pissa"})
def test_lora(shape, T, kind):
    """∂L/∂B = (α/r) G Aᵀ, ∂L/∂A = (α/r) Bᵀ G."""
    layer = moved_layer("lora", kind[1], SHAPES[shape])
    gradients, G = with_closed_form(layer, T)
    scale = kind[1].get("alpha", 3) / 3
    assert_close(gradients["B"], scale * G @ layer.A.detach().t(), 1e-12)
    assert_close(gradients["A"], scale * layer.B.detach().t() @ G, 1e-12)


@every(alpha={"rank": 3, "alpha": 7}, default={"rank": 3})
def test_dora_with_the_norm_held_constant(shape, T, kind):
    """With V = W0 + (α/r) B A and c = m / ‖V‖: ∂L/∂B = (α/r) diag(c) G Aᵀ, ∂L/∂A = (α/r) Bᵀ diag(c) G,
    ∂L/∂m_i = ⟨G_i, V_i⟩ / ‖V_i‖; of x it is the gradient itself."""
    layer = moved_layer("dora", kind[1], SHAPES[shape])
    gradients, G = with_closed_form(layer, T)
    scale = kind[1].get("alpha", 3) / 3
    A, B, m = layer.A.detach(), layer.B.detach(), layer.m.detach()
    V = nn_weight(shape) + scale * B @ A
    c = m / V.square().sum(dim=1).sqrt()
    assert_close(gradients["B"], scale * c[:, None] * G @ A.t(), 1e-12)
    assert_close(gradients["A"], scale * B.t() @ (c[:, None] * G), 1e-12)
    assert_close(gradients["m"], (G * V).sum(dim=1) / V.norm(dim=1), 1e-12)
    x = tokens(T, layer.d_in).requires_grad_()
    check_gradient(lambda: layer(x), [x])
    with pytest.raises(AssertionError, match="off by"):     # by design: what is held constant is no gradient
        check_gradient(lambda: layer(x), [layer.A, layer.B])


@every(default={"rank": 5}, high={"rank": 40, "seed": 2})
def test_vera(shape, T, kind):
    """∂L/∂b_i = Σ_jk G_ik B_ij d_j A_jk, ∂L/∂d_j = Σ_ik G_ik b_i B_ij A_jk."""
    layer = moved_layer("vera", kind[1], SHAPES[shape])
    gradients, G = with_closed_form(layer, T)
    GA = G @ layer.A.t()                                    # (d_out, r)
    assert_close(gradients["b"], (GA * layer.B * layer.d.detach()).sum(dim=1), 1e-12)
    assert_close(gradients["d"], (GA * layer.B * layer.b.detach()[:, None]).sum(dim=0), 1e-12)


def whole_model(kind):
    torch.manual_seed(0)
    if kind == "gpt":
        model = GPT(GPTConfig(vocab_size=11, block_size=6, n_layer=2, n_head=2, d_model=16))
        x = torch.randint(11, (3, 6), generator=torch.Generator().manual_seed(1))
    else:
        model = ViT(ViTConfig(image_size=8, patch_size=4, in_channels=3, num_classes=4, n_layer=2, n_head=2,
                              d_model=16))
        x = torch.randn(3, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return model.double(), x


def whole_loss(model, x):
    """The mean loss of next tokens, or of one class a picture."""
    logits = model(x)
    y = x.roll(-1, dims=1) if x.dim() == 2 else torch.arange(len(x))
    return F.cross_entropy(logits.flatten(0, -2), y.flatten())


@pytest.mark.parametrize("kind", ("gpt", "vit"))
@pytest.mark.parametrize("method, example", settings() + [("full", ""), ("head", "")])
def test_whole_model(method, example, kind):
    """One random direction in all trained numbers at once, and one in each adapted layer's."""
    model, x = whole_model(kind)
    if (method, kind) == ("head", "gpt"):
        return                                              # test_adapt.py: GPT has no head of its own
    options = parse(example)
    targets = ("query", "key", "value", "out") if options.get("pattern") == "topk" else (
        "query", "key", "value", "out", "up", "down")
    move(adapt(model, method, targets=targets, **options), size=0.2)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(adapters(model)) == (0 if method in ("full", "head") else 2 * len(targets))
    for seed in (0, 1):
        check_gradient(lambda: whole_loss(model, x), trained, seed=seed)
    for layer in adapters(model).values():
        gradients = torch.autograd.grad(whole_loss(model, x), list(layer.parameters()))
        assert all((g != 0).any() for g in gradients)


class Times(torch.autograd.Function):
    """The identity, with a gradient that is `factor` times the right one."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return ctx.factor * g, None


def half_detached(y):
    return 0.5 * y + 0.5 * y.detach()


def one_number_forgotten(y):
    mask = torch.ones_like(y)
    mask.view(-1)[7] = 0
    return y * mask + (y * (1 - mask)).detach()


WRONG = {"1 % off": lambda y: Times.apply(y, 1.01), "0.01 % off": lambda y: Times.apply(y, 1.0001),
         "half detached": half_detached, "one number detached": one_number_forgotten}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("method", METHODS)
def test_the_check_sees_a_wrong_gradient(method, wrong, monkeypatch):
    """The same values with a wrong gradient, in a layer and in one layer of twelve of a whole model."""
    options = {"detach_norm": False} if method == "dora" else {}
    layer = moved_layer(method, options, SHAPES["tall"])
    x = tokens(5, layer.d_in).requires_grad_()
    inputs = [x, *layer.parameters()]
    assert torch.equal(WRONG[wrong](layer(x)), layer(x))
    check_gradient(lambda: Times.apply(layer(x), 1.0), inputs)
    with pytest.raises(AssertionError, match="off by"):
        check_gradient(lambda: WRONG[wrong](layer(x)), inputs)
    model, pictures = whole_model("vit")
    move(adapt(model, method, **options), size=0.2)
    right = lambda: whole_loss(model, pictures)             # noqa: E731
    trained = [p for p in model.parameters() if p.requires_grad]
    check_gradient(right, trained)
    last = model.blocks[1].mlp.down
    monkeypatch.setattr(last, "forward", lambda x, forward=last.forward: WRONG[wrong](forward(x)))
    with pytest.raises(AssertionError, match="off by"):
        check_gradient(right, trained)


def test_the_check_sees_one_wrong_input_among_many():
    """A factor on one parameter's gradient, all others right."""
    layer = moved_layer("lora", {"rank": 3, "alpha": 7}, SHAPES["square"])
    x = tokens(5, 16).requires_grad_()
    A, B, scale = layer.A, layer.B, 7 / 3

    def forward(wrong_A=1.0, wrong_B=1.0):
        return F.linear(x, layer.W + scale * Times.apply(B, wrong_B) @ Times.apply(A, wrong_A), layer.bias)

    assert_close(forward(), layer(x), 1e-12)
    check_gradient(forward, [x, A, B])
    for wrong in ({"wrong_A": 1.001}, {"wrong_B": 0.999}, {"wrong_A": 3 / 7}, {"wrong_B": -1.0}):
        with pytest.raises(AssertionError, match="off by"):
            check_gradient(lambda: forward(**wrong), [x, A, B])


def test_the_check_leaves_no_trace_and_does_not_pass_where_there_is_nothing():
    layer = moved_layer("svfit", {}, SHAPES["square"])
    x = tokens(5, 16).requires_grad_()
    before = [t.detach().clone() for t in (x, layer.s)]
    check_gradient(lambda: layer(x), [x, layer.s])
    assert all(torch.equal(a, b) for a, b in zip(before, (x, layer.s)))
    with pytest.raises(AssertionError, match="sees nothing"):
        check_gradient(lambda: layer(x) * 0, [x, layer.s])
