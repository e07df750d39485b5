"""Base models in bf16 and fp16: what may be rounded and what may not. test_foreign.py runs whole models in bf16."""

import copy

import pytest
import torch
from helpers import (ONE_EACH, SQUARE, TARGETS, Net, adapt_spec, all_tensors, assert_close, move, noise, rejected,
                     same, take_steps)

from svmini import load_adapter, merge, save_adapter
from svmini.adapting import exact_weight


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


def test_an_update_below_half_a_unit_in_the_last_place_is_kept_only_in_float32():
    model = Net().bfloat16()
    model.query.weight.data.fill_(1.0)
    adapt_spec("random_mask:off_diagonals=15", model, also_train=()).query.e.data.fill_(2.0 ** -9)
    assert set(merge(copy.deepcopy(model)).query.weight.flatten().tolist()) == {1.0}
    assert set(merge(model, torch.float32).query.weight.flatten().tolist()) == {1.0 + 2.0 ** -9}


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
    before, model = make().head.weight, take_steps(adapt_spec("svft", make()), loss, lr=1e-5)   # steps that bf16 would lose
    assert (model.head.weight != before).all() and model.adaptation["dtype"] == "bfloat16, float32"
    save_adapter(model, tmp_path / "a.pt")
    assert torch.equal(loss(load_adapter(make(), tmp_path / "a.pt")), loss(model))
    merged = merge(model)
    assert [layer.weight.dtype for layer in (merged.query, merged.value, merged.head)] == [
        torch.bfloat16, torch.float32, torch.float32]
