"""The shared harness: every example of every registered method keeps the contract, on every shape and dtype."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import svmini.svd
from conftest import (EPS, SHAPES, TOKENS, Net, all_tensors, assert_close, cases, method_of_the_readme, move, parse,
                      tokens)
from svmini import GPT, METHODS, GPTConfig, adapt, count_trainable, load_adapter, merge, save_adapter
from svmini.adapter import adapters
from svmini.svd import apply_factors, thin_svd

TARGETS = ("query", "value")


def check_identity(make, d_in, eps, tmp_path):
    """At the start the adapted model computes what the base computes."""
    base, model = make(), make(adapted=True)
    for T in TOKENS:
        x = tokens(T, d_in, base.shift.dtype)
        for name, layer in adapters(model).items():
            assert_close(layer(x), base.get_submodule(name)(x), eps)
        assert_close(model(x), base(x), eps)
    for name, layer in adapters(model).items():
        assert_close(layer.weight(), base.get_submodule(name).weight, eps)


def check_two_roads(make, d_in, eps, tmp_path):
    """weight() and forward are one function with one gradient, for few and many tokens."""
    model = move(make(adapted=True))
    for layer in adapters(model).values():
        for T in TOKENS:
            results = []
            for road in (layer, lambda x: F.linear(x, layer.weight(), layer.bias)):
                x = tokens(T, d_in, model.shift.dtype).requires_grad_()
                y = road(x.view(1, T, d_in))                    # leading dimensions are kept
                assert y.shape == (1, T, layer.d_out)
                slope = tokens(T, layer.d_out, y.dtype, seed=3)
                results.append((y[0], *torch.autograd.grad((y[0] * slope).sum(), [x, *layer.parameters()])))
            for got, expected in zip(*results):
                assert_close(got, expected, 10 * eps)           # a gradient sums over up to 200 tokens
            assert_close(results[0][0], results[1][0], eps)


def check_merge(make, d_in, eps, tmp_path):
    """A merged model is plain, whole, trainable, and computes what the adapted one computed."""
    base, model, x = make(), move(make(adapted=True)), tokens(5, d_in, make().shift.dtype)
    expected = model(x)
    assert (expected - base(x)).abs().max() > 1e-2              # or nothing was there to merge
    assert merge(model) is model
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in base.state_dict().items()}
    assert all(p.requires_grad for p in model.parameters()) and not hasattr(model, "adaptation")
    assert_close(model(x), expected, eps)


def check_files(make, d_in, eps, tmp_path):
    """save -> fresh base -> load gives back the model, with every generator in another state."""
    model, x = move(make(adapted=True)), tokens(5, d_in, make().shift.dtype)
    save_adapter(model, tmp_path / "adapter.pt")
    fresh = make()
    torch.manual_seed(12345)
    assert load_adapter(fresh, tmp_path / "adapter.pt") is fresh
    assert_close(fresh(x), model(x), eps)
    assert fresh.adaptation == model.adaptation and count_trainable(fresh) == count_trainable(model)
    assert [(n, a.options) for n, a in adapters(fresh).items()] == [(n, a.options) for n, a in adapters(model).items()]


def check_training(make, d_in, eps, tmp_path):
    """A step moves every number of the adapters and the head, and nothing of the base."""
    model, base = move(make(adapted=True)), make()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if n.startswith(("query.", "value.", "head."))}
    for layer in adapters(model).values():
        assert list(layer.parameters()) and all(p.dtype == model.shift.dtype for p in layer.parameters())
    before = all_tensors(model)
    loss = F.cross_entropy(model(tokens(30, d_in, model.shift.dtype)), torch.arange(30) % 3)
    loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trained
    torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0).step()
    after = all_tensors(model)
    for name in before:
        if name in trained:
            assert (after[name] != before[name]).all(), f"{name} has numbers that do not move"
        else:
            assert torch.equal(after[name], before[name]), f"{name} is of the base and moved"
    assert torch.equal(model.norm.weight, base.norm.weight) and torch.equal(model.query.bias, base.query.bias)


def check_count(make, d_in, eps, tmp_path):
    """count() is what real modules hold."""
    model = make(adapted=True)
    expected = sum(type(a).count(a.d_out, a.d_in, **a.options) for a in adapters(model).values())
    head = sum(p.numel() for p in model.head.parameters())
    assert count_trainable(model) == {"adapter": expected, "head": head, "total": expected + head}
    assert len(adapters(model)) == 2 and expected > 0


CHECKS = (check_identity, check_two_roads, check_merge, check_files, check_training, check_count)


def run(check, method, example, shape, dtype, tmp_path):
    """One check on one case; a shape that the method's own check refuses is passed by, and adapt must refuse it."""
    (d_out, d_in), options = SHAPES[shape], parse(example)

    def make(adapted=False):
        model = Net(d_out, d_in, dtype)
        return adapt(model, method, targets=TARGETS, **options) if adapted else model

    try:
        METHODS[method].check(d_out, d_in, **options)
    except ValueError as reason:
        with pytest.raises(ValueError, match="query"):
            make(adapted=True)
        pytest.skip(str(reason))
    check(make, d_in, EPS[dtype], tmp_path)


# options that no example moves from their default: a scale of 1 or a seed of 0 would hide its own loss
BESIDES = [("lora", "rank=4,alpha=8"), ("dora", "rank=4,alpha=2,detach_norm=False"),
           ("vera", "rank=16,seed=3,d_init=0.5"), ("svft", "pattern=random,off_diagonals=4,seed=7"),
           ("boft", "block_size=2,factors=3")]


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method, example", cases() + BESIDES)
@pytest.mark.parametrize("check", CHECKS)
def test_contract(check, method, example, shape, dtype, tmp_path):
    run(check, method, example, shape, dtype, tmp_path)


def test_no_method_is_missing_from_the_harness():
    for method in METHODS:
        assert METHODS[method].examples, f"{method} gives no examples: nothing of it would be tested"
    parametrised = [m for m in test_contract.pytestmark if m.args[0] == "method, example"][0].args[1]
    assert parametrised == cases() + BESIDES and {method for method, _ in parametrised} == set(METHODS)


@pytest.mark.parametrize("method, example", cases())
def test_every_example_fits_a_shape(method, example):
    def fits(shape):
        try:
            METHODS[method].check(*shape, **parse(example))
            return True
        except ValueError:
            return False
    assert any(map(fits, SHAPES.values()))


LoRAXS = method_of_the_readme()


@pytest.mark.parametrize("check", CHECKS)
def test_a_method_that_is_dropped_in_is_tested(check, monkeypatch, tmp_path):
    monkeypatch.setitem(METHODS, "loraxs", LoRAXS)
    new = [case for case in cases() if case[0] == "loraxs"]
    assert new == [("loraxs", "rank=8")]
    for method, example in new:
        for shape in SHAPES:
            for dtype in EPS:
                run(check, method, example, shape, dtype, tmp_path)


class Forgetful(LoRAXS):
    """Does everything wrong that the harness is there to see, one mistake at a time."""
    mistake = None

    def __init__(self, linear, *, rank=8):
        super().__init__(linear, rank=rank)
        if self.mistake == "start":
            self.R.data += 1e-3
        if self.mistake == "base trained":
            self.V = nn.Parameter(self.Vt.clone())
            self.Vt = self.V
        if self.mistake == "number that is never used":
            self.unused = nn.Parameter(self.R.new_zeros(1))
        if self.mistake == "another stream for each model":
            self.freeze("U", torch.linalg.qr(torch.randn_like(self.U)).Q)

    def weight(self):
        return self.W0 - self.U @ self.R @ self.Vt if self.mistake == "sign" else super().weight()

    def forward(self, x):
        y = super().forward(x)
        return y if self.mistake != "many tokens" or x.numel() < 100 * self.d_in else y - 0.1 * (y - y.detach())


@pytest.mark.parametrize("mistake, check", [
    ("start", check_identity), ("sign", check_two_roads), ("sign", check_merge), ("many tokens", check_two_roads),
    ("base trained", check_count), ("number that is never used", check_training),
    ("another stream for each model", check_files)])
def test_the_harness_sees_a_mistake(mistake, check, monkeypatch, tmp_path):
    monkeypatch.setitem(METHODS, "loraxs", LoRAXS)
    run(check, "loraxs", "rank=4", "tall", torch.float64, tmp_path)
    monkeypatch.setitem(METHODS, "loraxs", type("Wrong", (Forgetful,), {"mistake": mistake}))
    with pytest.raises(ValueError if check is check_files else AssertionError):
        run(check, "loraxs", "rank=4", "tall", torch.float64, tmp_path)


# how many F.linear calls a path takes: 1 the weight is built, 2 a factor is folded (or the core is a diagonal), 3 none
PATHS = {("plain", "square"): (2, 2, 1), ("plain", "wide"): (2, 2, 1), ("plain", "tall"): (2, 2, 1),
         ("banded", "square"): (3, 1, 1), ("banded", "wide"): (3, 2, 1), ("banded", "tall"): (3, 2, 1)}


@pytest.mark.parametrize("pattern, shape", PATHS)
def test_the_harness_takes_every_path_of_apply_factors(pattern, shape, monkeypatch):
    d_out, d_in = SHAPES[shape]
    layer = METHODS["svft"](nn.Linear(d_in, d_out), pattern=pattern)
    calls = []

    def linear(x, weight, bias=None):
        calls.append(weight.shape)
        return F.linear(x, weight, bias)

    monkeypatch.setattr(svmini.svd, "F", type("Recorder", (), {"linear": staticmethod(linear)}))
    taken = []
    for T in TOKENS:
        calls.clear()
        layer(torch.randn(T, d_in))
        taken.append(len(calls))
    assert tuple(taken) == PATHS[pattern, shape]


def flops_of_a_step(forward, T, d_in, core):
    x, core = torch.randn(T, d_in, requires_grad=True), core.clone().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        forward(x, core).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("T", (4, 12, 16, 17, 24, 32, 33, 64, 100, 500))
@pytest.mark.parametrize("shape", [(16, 16), (16, 64), (64, 16), (16, 20), (20, 16), (24, 16), (16, 40)], ids=str)
@pytest.mark.parametrize("kind", ("diagonal", "any"))
def test_no_exact_order_is_cheaper_than_apply_factors(kind, shape, T):
    d_out, d_in = shape
    U, S, Vt = thin_svd(torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(0)))
    core = S if kind == "diagonal" else torch.diag(S) + 0.1
    if kind == "diagonal":
        orders = [lambda x, s: F.linear(x, (U * s) @ Vt), lambda x, s: F.linear(F.linear(x, Vt) * s, U)]
    else:
        orders = [lambda x, C: F.linear(x, U @ (C @ Vt)), lambda x, C: F.linear(x, (U @ C) @ Vt),
                  lambda x, C: F.linear(F.linear(F.linear(x, Vt), C), U),
                  lambda x, C: F.linear(F.linear(x, C @ Vt), U), lambda x, C: F.linear(F.linear(x, Vt), U @ C)]
    cheapest = min(flops_of_a_step(order, T, d_in, core) for order in orders)
    taken = flops_of_a_step(lambda x, c: apply_factors(x, U, c, Vt, None), T, d_in, core)
    assert taken == cheapest


def tiny_gpt():
    return GPT(GPTConfig(vocab_size=11, block_size=8, n_layer=1, n_head=2, d_model=16))


def test_full_trains_everything():
    for model in (Net(16, 24), tiny_gpt()):
        total = sum(p.numel() for p in model.parameters())
        adapt(model, "full")
        assert all(p.requires_grad for p in model.parameters()) and not adapters(model)
        counted = count_trainable(model)
        head = sum(p.numel() for p in model.head.parameters()) if isinstance(model, Net) else 0   # GPT's is tied
        assert counted == {"adapter": total - head, "head": head, "total": total}


def test_head_trains_the_head_alone(tmp_path):
    model, x = Net(16, 24), tokens(5, 24)
    adapt(model, "head")
    before = all_tensors(model)
    assert count_trainable(model) == {"adapter": 0, "head": 16 * 3 + 3, "total": 16 * 3 + 3}
    model(x).square().sum().backward()
    torch.optim.AdamW(model.parameters(), lr=1e-2).step()
    after = all_tensors(model)
    for name in before:
        assert torch.equal(before[name], after[name]) != name.startswith("head.")
    save_adapter(model, tmp_path / "head.pt")
    assert_close(load_adapter(Net(16, 24), tmp_path / "head.pt")(x), model(x), 0)


@pytest.mark.parametrize("method", ("full", "head"))
def test_full_and_head_are_merged_by_letting_go(method):
    model = adapt(Net(16, 24), method)
    before = all_tensors(model)
    merge(model)
    assert all(p.requires_grad for p in model.parameters()) and not hasattr(model, "adaptation")
    assert all(torch.equal(before[name], t) for name, t in all_tensors(model).items())
