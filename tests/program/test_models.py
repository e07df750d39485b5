"""GPT and ViT: dropout, initialization, sizes, error messages. Outputs: test_published.py; tokens: test_kv_cache.py."""

from dataclasses import replace

import pytest
import torch

from helpers import SMALL_GPT, SMALL_VIT, assert_close, noise, refused, seeded, small_gpt, small_vit, tokens
from svmini import GPT, GPTConfig, ViT, ViTConfig
from svmini.models.transformer import Attention


@pytest.mark.parametrize("make, x", [
    (lambda p: small_gpt(dropout=p), tokens(2, 8)),
    (lambda p: small_vit(dropout=p), torch.ones(2, 3, 12, 12)),
    (lambda p: Attention(12, 3, False, p), noise(2, 5, 12))])
def test_dropout_is_active_in_training_mode_only(make, x):
    model, without = make(0.5), make(0.0).eval()
    without.load_state_dict(model.state_dict())
    model.train()
    assert not torch.allclose(model(x), model(x), atol=1e-3)
    assert torch.equal(model.eval()(x), without(x))


def test_initialization():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=500, block_size=64, n_layer=4, n_head=4, d_model=64))
    wide = 0.02 * 12 ** 0.5      # GPT-2's 0.02 at its width 768, here 64
    for block in model.blocks:   # layers that write to the residual stream start smaller by √(2 * 4)
        for part, std in ((block.attention.query, wide), (block.attention.out, wide / 8 ** 0.5),
                          (block.mlp.up, wide), (block.mlp.down, wide / 8 ** 0.5)):
            assert part.weight.std().item() == pytest.approx(std, rel=0.1) and not part.bias.any()
    assert model.token_embedding.weight.std().item() == pytest.approx(wide, rel=0.1)
    assert not small_vit().reset_classifier(4)(torch.randn(2, 3, 12, 12)).any(), "starts at zero"


def test_the_default_targets_are_all_linear_layers_but_the_head():
    for model in (small_gpt(), small_vit()):
        linears = {n.split(".")[-1] for n, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
        assert linears == {*model.targets, "head"}
    assert GPT.also_train == () and ViT.also_train == ("head",)


# ---- sizes ----

@pytest.mark.parametrize("config", [SMALL_GPT, SMALL_VIT])
def test_invalid_sizes_are_rejected(config):
    for name in vars(config).keys() - {"dropout", "mean", "std", "position_interpolation", "layer_norm_eps"}:
        for value in (0, 2.0):
            with refused(f"{name} must be an integer of at least 1, not {value!r}"):
                replace(config, **{name: value})
    with refused("d_model=12 is not divisible by n_head=5"):
        replace(config, n_head=5)


def test_image_size_and_normalization_of_a_vit():
    assert ViTConfig(12, 4, 3, 5, 2, 3, 12).d_mlp == 48 and SMALL_VIT.mean == SMALL_VIT.std == (0.5, 0.5, 0.5)
    given = replace(SMALL_VIT, mean=[0.1, 0.2, 0.3], std=[1, 2, 3])
    model = ViT(given)
    assert model.reset_classifier(3).set_input_size(8).config == replace(given, num_classes=3, image_size=8)
    assert given.num_classes == 5 and given.image_size == 12, "the config that was passed is unchanged"
    with refused("image_size=14 is not divisible by patch_size=4: the patches must tile"):
        model.set_input_size(14)
    with refused("they need one value for each of the 3 channels"):
        replace(SMALL_VIT, std=(0.5,) * 4)


def test_the_last_block_of_a_vit_computes_the_class_token_alone():
    model, seen = small_vit().eval(), []
    model.blocks[-1].register_forward_hook(lambda block, inputs, output: seen.append((*inputs, output)))
    model(noise(2, 3, 12, 12))
    (x, y), = seen
    assert x.shape[1] == 10 and y.shape[1] == 1
    assert_close(y, model.blocks[-1](x)[:, :1])


def test_inputs_of_the_wrong_shape_are_rejected():
    for shape in ((2, 3, 13, 13), (3, 12, 12)):
        with pytest.raises(ValueError, match=r"this ViT takes \(B, 3, 12, 12\)"):
            ViT(SMALL_VIT)(torch.zeros(shape))
    with pytest.raises(ValueError, match="11 tokens do not fit .* block_size=10"):
        small_gpt()(tokens(1, 11))


# ---- generation ----

def test_logits_at_one_position_of_each_row():
    model, x, at = small_gpt(), tokens(4, 10), torch.tensor([9, 0, 4, 7])
    assert_close(model(x, last_positions=at), model(x)[range(4), at])


@pytest.mark.parametrize("training", [True, False])
def test_generation_restores_the_mode_and_does_not_use_the_global_generator(training):
    model, x, before = small_gpt(dropout=0.5).train(training), tokens(1, 3), torch.get_rng_state()
    one, same, other = (model.generate(x, 12, temperature=5.0, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other), "generation has no dropout"
    assert all(part.training is training for part in model.modules()) and not one.requires_grad
    assert torch.equal(before, torch.get_rng_state())
