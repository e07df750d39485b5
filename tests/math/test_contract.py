"""The contract of a method, which methods/adapter.py states in words, for all specs and shapes."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import svmini.methods
from layers import EPS, OWN, TOKENS, adapter, assert_close, layer_of, linear, move, shapes_of, specs, tokens
from svmini import METHODS, adapt, count_trainable, load_adapter, merge, save_adapter
from svmini.adapting import adapters_of
from svmini.methods import parse_spec
from svmini.methods.adapter import Adapter

HALF = {torch.bfloat16: 3e-2, torch.float16: 5e-3}   # base layers in half precision: rounding of a few products


class Net(nn.Module):
    """Two target layers, one without bias, frozen modules around them, and a head that is trained. No normalization
    follows a target and the head does not start at zero, so nothing hides what an adapter does."""

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
    """Take one step of AdamW on a loss that weighs every output differently."""
    y = model(x)
    (y * torch.linspace(1, 2, y.shape[-1], dtype=y.dtype, device=y.device)).square().mean().backward()
    torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, fused=False).step()


def all_tensors(model):
    return {name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}


# each check takes (spec, (d_out, d_in), dtype, a folder)

def check_start(spec, shape, dtype, folder):
    """At the start the adapter computes what the nn.Linear that it replaces computes."""
    base, layer = linear(shape, dtype), layer_of(spec, shape, dtype, moved=False)
    assert (layer.out_features, layer.in_features) == shape and torch.equal(layer.bias, base.bias)
    assert_close(layer.weight, base.weight, EPS[dtype], "; at the start, weight must equal W0")
    x = tokens(5, shape[1], dtype)
    assert_close(layer(x), base(x), EPS[dtype])


def check_two_paths(spec, shape, dtype, folder):
    """weight and forward are one function with one gradient, for few tokens, many and none, in any memory layout."""
    (d_out, d_in), layer = shape, layer_of(spec, shape, dtype)
    for T in TOKENS:
        paths = []
        for path in (layer, lambda x: F.linear(x, layer.weight, layer.bias)):
            x = tokens(T, d_in, dtype).requires_grad_()
            y = path(x.view(1, T, d_in))                        # leading dimensions are kept: (1, T, d_out)
            paths.append((y, *torch.autograd.grad((y[0] * tokens(T, d_out, dtype, 3)).sum(), [x, *layer.parameters()])))
        assert_close(paths[0][0], paths[1][0], EPS[dtype], "; does forward add the bias exactly once?")
        for got, expected in zip(*paths):
            assert_close(got, expected, 10 * EPS[dtype])        # a gradient is a sum over up to 200 tokens
    for lead in ((0,), (2, 0)):
        x = torch.zeros(*lead, d_in, dtype=dtype, requires_grad=True)
        y = layer(x)
        assert y.shape == (*lead, d_out) and y.dtype == dtype
        y.sum().backward()
    x = tokens(6, d_in, dtype).view(2, 3, d_in).transpose(0, 1)     # not contiguous, as nn.Transformer passes it
    assert_close(layer(x), layer(x.contiguous()), EPS[dtype])


def check_training(spec, shape, dtype, folder):
    """The trainable parameters are as many as count returns. A step moves every one, in the dtype of W0, and nothing
    of the base."""
    model = move(adapted(spec, shape, dtype))
    counted = sum(type(a).count(*shape, **a.options) for a in adapters_of(model).values())
    head = shape[0] ** 2 + shape[0]
    assert counted > 0 and count_trainable(model) == {"adapter": counted, "head": head, "total": counted + head}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if n.startswith(("query.", "value.", "head."))}
    assert all(p.dtype == dtype for p in model.parameters())
    before = all_tensors(model)
    step(model, tokens(30, shape[1], dtype))
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trained
    for name, now in all_tensors(model).items():
        if name in trained:
            assert (now != before[name]).all(), f"{name} has entries that a step does not move"
        else:
            assert torch.equal(now, before[name]), f"{name} belongs to the base and has moved"


def check_merge(spec, shape, dtype, folder):
    """A merged model is plain and trainable, and computes what the adapted model computed."""
    base, model, x = Net(*shape, dtype), move(adapted(spec, shape, dtype)), tokens(5, shape[1], dtype)
    expected = model(x)
    assert (expected - base(x)).norm() > 0.01 * base(x).norm()  # else there is nothing to merge
    assert merge(model) is model and [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in base.state_dict().items()}
    assert all(p.requires_grad for p in model.parameters())
    assert_close(model(x), expected, EPS[dtype])


def check_files(spec, shape, dtype, folder):
    """Saving and loading on a fresh base gives back the model, whatever the state of torch's global generator."""
    model, fresh, x = move(adapted(spec, shape, dtype)), Net(*shape, dtype), tokens(5, shape[1], dtype)
    save_adapter(model, folder / "adapter.pt")
    torch.manual_seed(12345)
    assert load_adapter(fresh, folder / "adapter.pt") is fresh
    assert_close(fresh(x), model(x), EPS[dtype])
    assert {n: a.options for n, a in adapters_of(fresh).items()} == {n: a.options
                                                                     for n, a in adapters_of(model).items()}
    assert count_trainable(fresh) == count_trainable(model)


def check_state_dict(spec, shape, dtype, folder):
    """state_dict() restores a layer completely, also on top of another base."""
    base, x = linear(shape, dtype), tokens(5, shape[1], dtype)
    layer = move(adapter(spec, base))
    other = METHODS[parse_spec(spec)[0]](linear(shape, dtype, seed=7), **layer.options)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x)) and torch.equal(other.weight, layer.weight)


class OnMeta(TorchFunctionMode):
    """Fail if a tensor on another device takes part, which torch permits in some products with meta tensors."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in (*args, *(kwargs or {}).values(), out):
            assert not isinstance(t, torch.Tensor) or t.is_meta or t.dim() == 0, f"{func.__name__} met a CPU tensor"
        return out


def check_meta(spec, shape, dtype, folder):
    """A step without values runs, so on a GPU a step neither waits for a value nor creates anything on the CPU."""
    model = adapted(spec, shape, dtype).to("meta")
    x = torch.empty(30, shape[1], dtype=dtype, device="meta")
    with OnMeta():
        model(x)
    step(model, x)
    assert all(p.grad.is_meta for p in model.parameters() if p.requires_grad)


def check_autocast(spec, shape, dtype, folder):
    """Autocast rounds products and nothing else: values and gradients are close, and a step stays in float32."""
    layer, results = layer_of(spec, shape, dtype), []           # on the CPU: torch has no autocast on the meta device
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


def check_half(spec, shape, dtype, folder):
    """On a bf16 or fp16 layer, frozen tensors keep its dtype and parameters are float32. Values and gradients are those
    of the same layer in float32 up to rounding, and a step moves every parameter. A method that does not support this
    raises torch's error about mixed dtypes; test_half_precision.py allows that to none of svmini's own methods."""
    base, (d_out, d_in) = linear(shape, torch.float32).to(dtype), shape
    layers = []
    for part in (base, copy.deepcopy(base).float()):
        torch.manual_seed(1)
        layers.append(adapter(spec, part))
    layer, twin = layers
    try:
        layer(tokens(3, d_in).to(dtype))
    except RuntimeError as error:
        return warnings.warn(f"{spec} does not support {dtype} layers: {error}")
    assert layer.base_dtype == dtype and all(p.dtype == torch.float32 for p in layer.parameters())
    for name, b in layer.named_buffers():
        assert b.dim() < 2 or b.dtype in (dtype, torch.int64), f"{name} is {b.dtype}, not the {dtype} of the base layer"
    assert_close(layer.weight, base.weight, HALF[dtype], "; does weight end with .to(self.base_dtype)?")
    start = [p.detach().clone() for p in twin.parameters()]
    move(twin)
    with torch.no_grad():
        for p, now, before in zip(layer.parameters(), twin.parameters(), start):
            p += now - before
    for T in TOKENS:
        x, g, results = tokens(T, d_in).to(dtype), tokens(T, d_out, seed=3).to(dtype), []
        for part, x in ((layer, x), (twin, x.float())):
            y = part(x)
            assert y.dtype == x.dtype
            gradients = torch.autograd.grad(y, list(part.parameters()), g.to(x.dtype))
            results.append((y.float(), part.weight.float(), *gradients))
        for got, expected in zip(*results):
            assert_close(got, expected, HALF[dtype])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(layer(x).float(), y, HALF[torch.bfloat16])         # x in float32
    before = all_tensors(layer)
    step(layer, tokens(30, d_in).to(dtype))
    for name, p in layer.named_parameters():
        assert (p != before[name]).all(), f"{name} has entries that a step does not move"


CHECKS = (check_start, check_two_paths, check_training, check_merge, check_files, check_state_dict, check_meta,
          check_autocast, check_half)
FLOAT32 = dict.fromkeys((check_files, check_state_dict, check_meta, check_autocast), (torch.float32,))
DTYPES = {check_half: HALF, **FLOAT32}


def run(check, spec, folder):
    """Run a check for both dtypes and all shapes, or where these matter less, for one kind and the last two shapes."""
    for shape in shapes_of(spec)[-2 if check in DTYPES else 0:]:
        for dtype in DTYPES.get(check, EPS):
            check(spec, shape, dtype, folder)


@pytest.mark.parametrize("spec", specs())
@pytest.mark.parametrize("check", CHECKS)
def test_contract(check, spec, tmp_path):
    run(check, spec, tmp_path)


def test_a_method_without_examples_is_rejected():
    """Nothing would test it, so the package does not import with it."""
    source = Path(svmini.methods.__file__).read_text(encoding="utf-8")
    module = {"__name__": "svmini.methods", "__package__": "svmini.methods"}
    exec(source, module)
    with pytest.raises(TypeError, match='Adapter needs examples, such as examples = '):
        exec(source.replace("METHODS = {", 'from .adapter import Adapter\nMETHODS = {"new": Adapter,'), module)


def test_adapter_files_skip_what_can_be_recomputed():
    for spec in specs():
        if parse_spec(spec)[0] in OWN:
            layer = layer_of(spec, shapes_of(spec)[0])
            drawn = "pattern=random" in spec or "topk" in spec or spec.startswith("random_mask")
            stored = layer.state_dict().keys() - layer.frozen - dict(layer.named_parameters()).keys()
            assert stored == ({"indices"} if drawn else set())


def test_a_weight_that_lacks_an_attribute_names_it():
    """nn.Module alone would report that there is no `weight`."""
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
