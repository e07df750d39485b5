"""State and identity: copies restore an adapted model, and a model that cannot be adapted or merged is refused."""

import copy

import pytest
import torch
import torch.nn as nn

from helpers import (ONE_EACH, SQUARE, TARGETS, Net, adapt_spec, all_tensors, assert_close, move, noise, refused,
                     rejected, same, take_steps)
from svmini import adapt, load_adapter, merge, save_adapter
from svmini.adapting import exact_weight


def test_an_adapter_on_a_base_that_changed_is_not_saved(tmp_path):
    """The file would belong to no base. After a state dict of another base, even if only adapted weights differ."""
    model, other = adapt_spec("svft", Net()), Net()
    other.query.weight.data += 0.1
    model.load_state_dict(adapt_spec("svft", other).state_dict())
    with rejected(model, "query.U has changed since adapt", "state dict", "adapting its own base"):
        save_adapter(model, tmp_path / "a.pt")
    model = adapt_spec("svfit", Net())
    model.value.S[8:] = 0                                # truncation by hand
    with rejected(model, "value.S has changed since adapt"):
        save_adapter(model, tmp_path / "a.pt")


@pytest.mark.parametrize("spec", ONE_EACH)
def test_copies_are_complete_and_independent(spec, tmp_path):
    """deepcopy and torch.save of the whole model. The check of .half() follows into the copy."""
    model = move(adapt_spec(spec, Net()))
    torch.save(model, tmp_path / "model.pt")
    tensors = all_tensors(model)
    for clone in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert same(all_tensors(clone), tensors) and clone.adaptation == model.adaptation
        with rejected(clone, "cannot become torch.float16"):
            clone.half()
        assert {p.dtype for p in clone.double().parameters()} == {torch.float64}
        merge(move(clone)).half()
        assert same(all_tensors(model), tensors)         # the original is not touched
    save_adapter(copy.deepcopy(model), tmp_path / "a.pt")
    assert_close(load_adapter(Net(), tmp_path / "a.pt")(noise(5, 16)), model(noise(5, 16)))


@pytest.mark.parametrize("lower", [lambda m: m.bfloat16(), lambda m: m.to("cpu", torch.float16),
                                   lambda m: m.encoder.half(), lambda m: m.encoder.query.half()])
def test_a_lower_precision_is_rejected_before_anything_is_converted(lower):
    """Whatever comes before the first adapter; a merged model can be converted."""
    model = nn.Sequential()
    model.first, model.encoder = nn.Linear(16, 16), Net()
    adapt_spec("boft", model)
    with rejected(model, "cannot become torch.", "autocast", "merge"):
        lower(model)
    assert {t.dtype for t in all_tensors(model.double()).values()} == {torch.float64}
    assert {t.dtype for t in all_tensors(merge(model).half()).values()} == {torch.float16}


def test_parameters_that_cannot_have_a_gradient_stay_frozen(tmp_path):
    """Such as int8 weights of a quantized layer."""
    def make():
        model = Net()
        model.norm.codes = nn.Parameter(torch.arange(3, dtype=torch.int8), requires_grad=False)
        return model

    for method in ("head", "svft"):
        model = move(adapt(make(), method, targets=TARGETS, also_train=("head", "norm")))
        save_adapter(model, tmp_path / "a.pt")
        for other in (load_adapter(make(), tmp_path / "a.pt"), merge(copy.deepcopy(model))):
            assert_close(other(noise(5, 16)), model(noise(5, 16)))
    for model in (merge(model), adapt(make(), "full")):
        assert {n for n, p in model.named_parameters() if not p.requires_grad} == {"norm.codes"}


def test_a_layer_with_hooks_is_not_merged():
    model = adapt_spec("svft", Net())
    model.query.register_forward_hook(lambda layer, x, y: None)
    with rejected(model, "query has hooks", "remove them first"):
        merge(model)


def in_inference_mode():
    with torch.inference_mode():
        return Net()


@pytest.mark.parametrize("make, part", [
    (lambda: nn.Sequential(nn.Linear(4, 4), nn.LazyBatchNorm1d()), "1.weight is not initialized yet: run one batch"),
    (lambda: Net().to("meta"), "query.weight is on the meta device"), (in_inference_mode, "created in inference mode")])
def test_a_model_without_usable_tensors_is_rejected(make, part, tmp_path):
    save_adapter(adapt_spec("svft", Net()), tmp_path / "a.pt")
    for call in (lambda m: adapt(m, "full"), lambda m: load_adapter(m, tmp_path / "a.pt")):
        with refused(part):
            call(model := make())
        assert not hasattr(model, "adaptation")


# ---- base models in bf16 and fp16: what may be rounded and what may not. test_foreign.py runs whole models ----

@pytest.mark.parametrize("spec, dtype", [*((spec, torch.bfloat16) for spec in SQUARE),
                                         *((spec, torch.float16) for spec in ONE_EACH)], ids=str)
def test_frozen_tensors_keep_the_dtype_and_merge_rounds_once_or_not_at_all(spec, dtype, tmp_path):
    model, x = move(adapt_spec(spec, Net().to(dtype), also_train=())), noise(5, 16).to(dtype)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    save_adapter(model, tmp_path / "a.pt")
    loaded = load_adapter(Net().to(dtype), tmp_path / "a.pt")
    assert same(all_tensors(loaded), all_tensors(model)) and torch.equal(loaded(x), model(x))
    wide, narrow = merge(copy.deepcopy(model), torch.float32), merge(copy.deepcopy(model))
    assert {t.dtype for t in all_tensors(narrow).values()} == {dtype}
    for name in TARGETS:
        adapter, W = model.get_submodule(name), exact_weight(model.get_submodule(name))
        assert W.dtype == torch.float32 and torch.equal(wide.get_submodule(name).weight, W)
        assert torch.equal(narrow.get_submodule(name).weight, W.to(dtype)) and torch.equal(adapter.weight, W.to(dtype))
    assert_close(wide(x.float()), model(x).float(), 0.02)


@pytest.mark.parametrize("spec", SQUARE)
def test_a_float32_base_is_the_same_base_if_its_values_are_equal(spec, tmp_path):
    model = move(adapt_spec(spec, Net().bfloat16(), also_train=()), 0.02)
    save_adapter(model, tmp_path / "a.pt")
    with rejected(original := Net(), "another base", "was in bfloat16", "is in float32"):
        load_adapter(original, tmp_path / "a.pt")
    equal = load_adapter(Net().bfloat16().float(), tmp_path / "a.pt")
    assert_close(equal(noise(5, 16)), model(noise(5, 16).bfloat16()).float(), 0.03)
    save_adapter(equal, tmp_path / "b.pt")                                  # and the other way round
    load_adapter(Net().bfloat16(), tmp_path / "b.pt")


def test_mixed_dtypes_and_a_head_in_float32(tmp_path):
    """The head is trained in float32 under autocast, as the warning suggests. merge keeps the dtype of every layer."""
    def make():
        model = Net().bfloat16()
        model.value.float(), model.head.float()
        return model

    def loss(model):
        with torch.autocast("cpu", torch.bfloat16):
            return model(noise(8, 16)).float().square().sum()

    with pytest.warns(UserWarning, match="half precision loses small steps"):
        adapt_spec("svft", Net().bfloat16())
    before, model = make().head.weight, take_steps(adapt_spec("svft", make()), loss, lr=1e-5)   # bf16 loses such steps
    assert (model.head.weight != before).all() and model.adaptation["dtype"] == "bfloat16, float32"
    save_adapter(model, tmp_path / "a.pt")
    assert torch.equal(loss(load_adapter(make(), tmp_path / "a.pt")), loss(model))
    merged = merge(model)
    assert [layer.weight.dtype for layer in (merged.query, merged.value, merged.head)] == [
        torch.bfloat16, torch.float32, torch.float32]
