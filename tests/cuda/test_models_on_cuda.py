"""Methods and models on a device: the same results as on the CPU, in float32 and under autocast."""

import copy

import pytest
import torch

from layers import layer_of, linear, move, shapes_of, specs, tokens
from svmini import GPT, METHODS, GPTConfig, adapt, load_adapter, merge, save_adapter
from svmini.adapting import adapters_of
from test_kv_cache import prompts_of, reference_generate

ONE_EACH = {"lora": {"rank": 2}, "dora": {"rank": 2}, "vera": {"rank": 4}}   # others: their defaults


def specs_of(method):
    return [spec for spec in specs() if spec.split(":")[0] == method]


def relative(got, expected):
    """Return the error of a tensor on any device, relative to the largest expected entry."""
    got, expected = got.detach().cpu().double(), expected.detach().cpu().double()
    return ((got - expected).abs().max() / expected.abs().max()).item()


def step(layer, x):
    """Take a step of AdamW; return the output, the gradients and the new parameters. The eps is large, because the sign
    of a gradient near 0, which rounding decides, would otherwise decide about a whole learning rate."""
    y = layer(x)
    (y * torch.linspace(1, 2, y.shape[-1], dtype=y.dtype, device=y.device)).square().mean().backward()
    gradients = [p.grad.clone() for p in layer.parameters()]
    torch.optim.AdamW(layer.parameters(), lr=1e-2, eps=1e-2).step()
    return [y, *gradients, *layer.parameters()]


@pytest.mark.parametrize("method", METHODS)
def test_a_step_in_float32_is_that_of_float64_on_the_cpu(method, device):
    for spec in specs_of(method):
        for shape in shapes_of(spec):
            layer, x = layer_of(spec, shape, torch.float32), tokens(20, shape[1])
            expected = step(copy.deepcopy(layer).double(), x)
            for got, right in zip(step(layer.to(device), x.float().to(device)), expected, strict=True):
                assert got.device.type == device.type and relative(got, right) < 1e-4, spec


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_autocast_costs_at_most_twice_the_error_of_the_base_layer(method, dtype, device):
    for spec in specs_of(method):
        shape, errors = shapes_of(spec)[0], []
        x = tokens(64, shape[1], torch.float32).to(device)
        for layer in (linear(shape, torch.float32), layer_of(spec, shape, torch.float32, moved=False)):
            layer.to(device)
            with torch.autocast(device.type, dtype=dtype):
                y = layer(x)
            assert y.dtype in (dtype, torch.float32)            # DoRA scales the rounded product in float32
            assert all(p.dtype == torch.float32 for p in layer.parameters())
            errors.append((y - layer(x)).norm() / layer(x).norm())
        assert 0 < errors[1] < 2 * errors[0], (spec, errors)


@pytest.mark.parametrize("method", METHODS)
def test_an_adapted_model_moves_between_devices(method, device, tmp_path):
    """Adapted on the device; saved there and loaded on the CPU; saved there and loaded on the device; merged there."""
    def fresh(at):
        torch.manual_seed(0)
        return GPT(GPTConfig(vocab_size=11, block_size=8, n_layer=1, n_head=2, d_model=16)).to(at).eval()

    options, x = ONE_EACH.get(method, {}), torch.arange(8)[None]
    torch.manual_seed(1)
    model = adapt(fresh(device), method, **options)
    torch.manual_seed(1)
    for part, other in zip(adapters_of(model).values(), adapters_of(adapt(fresh("cpu"), method, **options)).values()):
        for (name, a), b in zip(part.named_buffers(), other.buffers(), strict=True):   # factors, random matrices
            assert a.device.type == device.type and torch.equal(a.cpu(), b), name
    expected = move(model)(x.to(device))
    assert relative(fresh(device)(x.to(device)), expected) > 1e-3, "the adapters change the outputs"
    save_adapter(model, tmp_path / "a.pt")
    on_cpu = load_adapter(fresh("cpu"), tmp_path / "a.pt").eval()
    assert relative(on_cpu(x), expected) < 1e-4
    save_adapter(on_cpu, tmp_path / "b.pt")
    again = load_adapter(fresh(device), tmp_path / "b.pt").eval()
    assert relative(again(x.to(device)), expected) < 1e-4
    assert relative(merge(again)(x.to(device)), expected) < 1e-4
    assert {p.device.type for p in again.parameters()} == {device.type}


def test_generation_with_a_cache_in_bfloat16_gives_the_same_tokens_as_without(device):
    torch.manual_seed(80)   # of 150 seeds, one with well-separated logits
    model = GPT(GPTConfig(vocab_size=31, block_size=40, n_layer=2, n_head=2, d_model=16))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
        model = model.eval().to(device, torch.bfloat16)
        x = torch.stack(prompts_of(5, 5)).to(device)
        got = model.generate(x, 12, temperature=0)
        assert torch.equal(got, reference_generate(model, x, 12, 0)) and len(got[:, 5:].unique()) > 5
        rounded = model(got[:, :-1])[:, 4:].double()
        exact = model.double()(got[:, :-1])[:, 4:]
    best = exact.topk(2).values
    assert (best[..., 0] - best[..., 1]).min() > 2 * (rounded - exact).abs().max(), "the logits are well separated"
