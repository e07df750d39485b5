"""The contract that every method keeps (methods/adapter.py says it in specs), for all its specs and shapes."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from layers import EPS, SHAPES, TOKENS, assert_close, fits, layer_of, linear, move, noise, shapes_of, tokens, specs
from svmini import METHODS, adapt, count_trainable, load_adapter, merge, save_adapter
from svmini.adapting import adapters_of
from svmini.methods import parse_spec
from svmini.methods.adapter import Adapter


class Net(nn.Module):
    """Two target layers, one without bias, something frozen around them, and a head that is trained whole. No
    normalisation follows a target, and the head does not start at zero: nothing that an adapter does cancels."""

    def __init__(self, d_out, d_in, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(d_in)
        self.query = nn.Linear(d_in, d_out)
        self.value = nn.Linear(d_in, d_out, bias=False)
        self.register_buffer("shift", torch.randn(d_out))
        self.head = nn.Linear(d_out, d_out)
        self.to(dtype)

    def forward(self, x):
        x = self.norm(x)
        return self.head(torch.tanh(self.query(x) + self.value(x) + self.shift))


def adapted(spec, shape, dtype):
    method, options, _ = parse_spec(spec)
    return adapt(Net(*shape, dtype), method, targets=("query", "value"), also_train=("head",), **options)


def step(model, x):
    """One step of AdamW on a loss that sees every output in its own measure."""
    y = model(x)
    (y * torch.linspace(1, 2, y.shape[-1], dtype=y.dtype, device=y.device)).square().mean().backward()
    torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, fused=False).step()


def all_tensors(model):
    return {name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}


# each check: (spec, (d_out, d_in), dtype, a folder)

def check_start(spec, shape, dtype, folder):
    """At the start the adapter is the nn.Linear whose place it takes."""
    base, layer = linear(shape, dtype), layer_of(spec, shape, dtype, moved=False)
    assert (layer.out_features, layer.in_features) == shape and torch.equal(layer.bias, base.bias)
    assert_close(layer.weight, base.weight, EPS[dtype])
    x = tokens(5, shape[1], dtype)
    assert_close(layer(x), base(x), EPS[dtype])


def check_two_roads(spec, shape, dtype, folder):
    """weight and forward are one function with one gradient, for few and many tokens, for none, in any layout."""
    (d_out, d_in), layer = shape, layer_of(spec, shape, dtype)
    for T in TOKENS:
        roads = []
        for road in (layer, lambda x: F.linear(x, layer.weight, layer.bias)):
            x = tokens(T, d_in, dtype).requires_grad_()
            y = road(x.view(1, T, d_in))                        # leading dimensions are kept: (1, T, d_out)
            roads.append((y, *torch.autograd.grad((y[0] * tokens(T, d_out, dtype, 3)).sum(), [x, *layer.parameters()])))
        assert_close(roads[0][0], roads[1][0], EPS[dtype])
        for got, expected in zip(*roads):
            assert_close(got, expected, 10 * EPS[dtype])        # a gradient is a sum over up to 200 tokens
    for lead in ((0,), (2, 0)):
        x = torch.zeros(*lead, d_in, dtype=dtype, requires_grad=True)
        y = layer(x)
        assert y.shape == (*lead, d_out) and y.dtype == dtype
        y.sum().backward()
    x = tokens(6, d_in, dtype).view(2, 3, d_in).transpose(0, 1)     # as nn.Transformer hands it on: not contiguous
    assert_close(layer(x), layer(x.contiguous()), EPS[dtype])


def check_training(spec, shape, dtype, folder):
    """A step moves every number of the adapters and the head, in W0's dtype, and nothing of the base."""
    model = move(adapted(spec, shape, dtype))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if n.startswith(("query.", "value.", "head."))}
    assert all(p.dtype == dtype for p in model.parameters())
    before = all_tensors(model)
    step(model, tokens(30, shape[1], dtype))
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trained
    for name, now in all_tensors(model).items():
        if name in trained:
            assert (now != before[name]).all(), f"{name} has numbers that do not move"
        else:
            assert torch.equal(now, before[name]), f"{name} is of the base and moved"


def check_count(spec, shape, dtype, folder):
    """count is what the modules hold."""
    model = adapted(spec, shape, dtype)
    expected = sum(type(a).count(*shape, **a.options) for a in adapters_of(model).values())
    head = shape[0] ** 2 + shape[0]
    assert expected > 0 and count_trainable(model) == {"adapter": expected, "head": head, "total": expected + head}


def check_merge(spec, shape, dtype, folder):
    """A merged model is plain, all of it trainable, and computes what the adapted one computed."""
    base, model, x = Net(*shape, dtype), move(adapted(spec, shape, dtype)), tokens(5, shape[1], dtype)
    expected = model(x)
    assert (expected - base(x)).norm() > 0.01 * base(x).norm()  # or nothing was there to merge
    assert merge(model) is model and [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in base.state_dict().items()}
    assert all(p.requires_grad for p in model.parameters())
    assert_close(model(x), expected, EPS[dtype])


def check_files(spec, shape, dtype, folder):
    """save -> fresh base -> load gives back the model, with torch's global generator in another state."""
    model, fresh, x = move(adapted(spec, shape, dtype)), Net(*shape, dtype), tokens(5, shape[1], dtype)
    save_adapter(model, folder / "adapter.pt")
    torch.manual_seed(12345)
    assert load_adapter(fresh, folder / "adapter.pt") is fresh
    assert_close(fresh(x), model(x), EPS[dtype])
    assert {n: a.options for n, a in adapters_of(fresh).items()} == {n: a.options
                                                                     for n, a in adapters_of(model).items()}
    assert count_trainable(fresh) == count_trainable(model)


class OnMeta(TorchFunctionMode):
    """Fails where a tensor of another device takes part, which torch lets pass in some products with meta tensors."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in (*args, *(kwargs or {}).values(), out):
            assert not isinstance(t, torch.Tensor) or t.is_meta or t.dim() == 0, f"{func.__name__} met a CPU tensor"
        return out


def check_meta(spec, shape, dtype, folder):
    """A step without values: where it passes, it waits for no GPU and makes nothing on the CPU."""
    model = adapted(spec, shape, dtype).to("meta")
    x = torch.empty(30, shape[1], dtype=dtype, device="meta")
    with OnMeta():
        model(x)
    step(model, x)
    assert all(p.grad.is_meta for p in model.parameters() if p.requires_grad)


def check_autocast(spec, shape, dtype, folder):
    """Autocast rounds the products and nothing else: values and gradients are near, a step keeps float32."""
    if dtype == torch.float64:
        return                                                  # which autocast leaves alone
    layer, results = layer_of(spec, shape, dtype), []           # torch has no autocast on the meta device: on the CPU
    for rounded in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=rounded):
            y = layer(tokens(30, shape[1], dtype))
        gradients = torch.autograd.grad((y.float() * tokens(30, shape[0], dtype, 3)).sum(), list(layer.parameters()))
        results.append((y.float(), *gradients))
    for got, expected in zip(*results):
        assert_close(got, expected, 0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step(layer, tokens(30, shape[1], dtype))
    assert all(t.dtype == dtype for t in (*layer.parameters(), *layer.buffers()) if t.is_floating_point())


CHECKS = (check_start, check_two_roads, check_training, check_count, check_merge, check_files, check_meta,
          check_autocast)


def run(check, spec, folder):
    for shape in shapes_of(spec):
        for dtype in EPS:
            check(spec, shape, dtype, folder)


@pytest.mark.parametrize("spec", specs())
@pytest.mark.parametrize("check", CHECKS)
def test_contract(check, spec, tmp_path):
    run(check, spec, tmp_path)


def test_no_method_is_missing():
    for name, method in METHODS.items():
        assert method.examples, f"{name} gives no examples: nothing of it would be tested"
        assert method.lr > 0
    parametrised = [mark.args[1] for mark in test_contract.pytestmark if mark.args[0] == "spec"][0]
    assert parametrised == specs() and {parse_spec(spec)[0] for spec in specs()} == set(METHODS)


def test_what_check_refuses_is_refused_by_adapt_which_names_the_layer():
    refused = [(spec, shape) for spec in specs() for shape in SHAPES.values() if not fits(spec, shape)]
    assert ("svft:rank=6,pattern=topk", SHAPES["wide"]) in refused
    for spec, shape in refused:
        with pytest.raises(ValueError, match="query"):
            adapted(spec, shape, torch.float32)


WRONG = {   # options that are ours to refuse, and a spec of the reason
    "svfit": [("rank=0", "rank"), ("rank=17", "16"), ("rank=2.0", "integer"), ("rank=True", "rank"),
              ("energy=0", "energy"), ("energy=1.1", "energy"), ("energy=x", "energy"), ("rank=2,energy=0.5", "both")],
    "svft": [("pattern=dense", "pattern"), ("off_diagonals=16", "15"), ("off_diagonals=-1", "off_diagonals"),
             ("rank=17", "16"), ("rank=4,off_diagonals=4", "3"), ("basis=fourier", "basis"), ("seed=-1", "seed"),
             ("off_diagonals=1.5", "integer"), ("pattern=plain,off_diagonals=-1", "off_diagonals")],
    "lora": [("rank=0", "rank"), ("rank=17", "16"), ("alpha=0", "alpha"), ("alpha=x", "alpha"), ("init=svd", "init"),
             ("rank=4,alpha=8,init=pissa", "alpha")],
    "dora": [("rank=0", "rank"), ("rank=17", "16"), ("alpha=-1", "alpha"), ("detach_norm=1", "detach_norm")],
    "vera": [("rank=0", "rank"), ("seed=-1", "seed"), ("seed=1.5", "seed"), ("d_init=0", "d_init"),
             ("d_init=x", "d_init")],
    "boft": [("block_size=3", "even"), ("block_size=0", "block_size"), ("block_size=32", "16"),
             ("factors=0", "factors"), ("block_size=4,factors=4", "32")],
    "random_mask": [("off_diagonals=16", "15"), ("off_diagonals=-1", "off_diagonals"), ("seed=-1", "seed")],
}


@pytest.mark.parametrize("spec, reason", [(f"{m}:{o}", reason) for m, cases in WRONG.items() for o, reason in cases])
def test_wrong_options(spec, reason):
    """Refused before anything is built, by the class as well as by adapt."""
    method, options, _ = parse_spec(spec)
    for refuse in (lambda: METHODS[method].check(16, 16, **options), lambda: METHODS[method](linear(), **options),
                   lambda: adapted(spec, (16, 16), torch.float32)):
        with pytest.raises(ValueError, match=reason):
            refuse()


def test_ours_store_positions_and_nothing_that_can_be_made_again():
    for spec in specs():
        if parse_spec(spec)[0] in WRONG:
            layer = layer_of(spec, shapes_of(spec)[0])
            drawn = "pattern=random" in spec or "topk" in spec or spec.startswith("random_mask")
            stored = set(layer.state_dict()) - layer.frozen - dict(layer.named_parameters()).keys()
            assert stored == ({"indices"} if drawn else set())


def test_a_weight_that_lacks_something_names_it():
    """nn.Module alone would say that there is no `weight`."""
    class Lacking(Adapter):
        @property
        def weight(self):
            return self.W0 + self.forgotten

    layer = Lacking(linear())
    layer.register_frozen("W0", linear().weight)
    for use in (lambda: layer.weight, lambda: layer(tokens(3, 16))):
        with pytest.raises(AttributeError, match="forgotten"):
            use()
    with pytest.raises(NotImplementedError, match="Adapter must define weight"):
        Adapter(linear()).weight


def test_trained_numbers_are_not_rounded():
    layer = layer_of("lora:rank=2")
    for lower in (layer.half, layer.bfloat16, lambda: layer.to(torch.bfloat16)):
        with pytest.raises(ValueError, match="autocast"):
            lower()
    torch.set_default_dtype(torch.bfloat16)                     # which has no say in it
    try:
        layer.float()
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.A.dtype == layer.W0.dtype == layer.bias.dtype == torch.float32


def test_full_trains_everything_and_head_the_head_alone(tmp_path):
    """Two specs without an adapter; merging lets go of what was frozen."""
    x, head = tokens(5, 24, torch.float32), 16 * 16 + 16
    for spec in ("full", "head"):
        model = adapt(Net(16, 24, torch.float32), spec, also_train=("head",))
        total = sum(p.numel() for p in model.parameters()) if spec == "full" else head
        assert count_trainable(model) == {"adapter": total - head, "head": head, "total": total}
        before = all_tensors(model)
        step(model, x)
        moved = {name for name, t in all_tensors(model).items() if not torch.equal(t, before[name])}
        assert moved == {name for name in before if name != "shift" and (spec == "full" or name.startswith("head."))}
        if spec == "head":
            save_adapter(model, tmp_path / "head.pt")
            assert_close(load_adapter(Net(16, 24, torch.float32), tmp_path / "head.pt")(x), model(x), 0)
        expected = model(x)
        assert all(p.requires_grad for p in merge(model).parameters()) and torch.equal(model(x), expected)


def test_a_move_is_small_on_the_methods_own_scale():
    for spec in specs():
        for shape in shapes_of(spec):
            layer = layer_of(spec, shape, moved=False)
            W0 = layer.weight.detach()
            moved = (move(layer).weight - W0).norm() / W0.norm()
            assert 0.07 < moved <= 0.3 + 1e-6 and len(noise(layer)) == len(list(layer.parameters()))
