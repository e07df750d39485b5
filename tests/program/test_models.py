"""GPT and ViT: attention, which tokens a token attends to, dropout, initialization, generation, error messages."""

import math
from dataclasses import replace

import pytest
import torch

from helpers import SMALL_GPT, SMALL_VIT, seeded, small_gpt, small_vit, tokens
from svmini import GPT, GPTConfig, ViT, ViTConfig
from svmini.errors import InputError
from svmini.models.transformer import Attention

# ---- attention and blocks ----


@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_softmax_of_scaled_products(causal):
    torch.manual_seed(0)
    attention = Attention(12, 3, causal).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    q, k, v = attention.query(x), attention.key(x), attention.value(x)
    parts = []
    for h in range(3):                                               # head h has the columns 4h to 4h + 3
        at = slice(4 * h, 4 * h + 4)
        scores = q[..., at] @ k[..., at].transpose(1, 2) / math.sqrt(4)
        if causal:
            scores = scores + torch.full((5, 5), -math.inf, dtype=torch.float64).triu(1)
        parts.append(scores.softmax(-1) @ v[..., at])
    assert torch.allclose(attention(x), attention.out(torch.cat(parts, -1)), atol=1e-12)


def test_a_token_of_a_gpt_depends_on_earlier_tokens_of_its_row_only():
    model, x = small_gpt(), tokens(3, 10)
    logits = model(x)
    changed = x.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 31
    after = model(changed)
    assert torch.equal(logits[:, :6], after[:, :6]) and (logits[:, 6:] != after[:, 6:]).any(-1).all()
    assert torch.allclose(model(x[1:2]), logits[1:2], atol=1e-5)
    assert torch.allclose(model(x[:, :4]), logits[:, :4], atol=1e-5)


def test_the_logits_of_a_vit_depend_on_all_patches_of_its_own_image_only():
    model, x = small_vit(), torch.randn(3, 3, 12, 12)
    logits = model(x)
    assert logits.shape == (3, 5) and torch.allclose(model(x[1:2]), logits[1:2], atol=1e-5)
    for row in (0, 4, 8):
        for column in (0, 4, 8):
            changed = x.clone()
            changed[:, :, row + 1, column + 2] += 1
            assert (model(changed) != logits).any(-1).all()


@pytest.mark.parametrize("make, x", [
    (lambda p: small_gpt(dropout=p), tokens(2, 8)),
    (lambda p: small_vit(dropout=p), torch.ones(2, 3, 12, 12)),
    (lambda p: Attention(12, 3, False, p), torch.ones(2, 5, 12).cumsum(1))])
def test_dropout_is_active_in_training_mode_only(make, x):
    model, without = make(0.5), make(0.0).eval()
    without.load_state_dict(model.state_dict())
    model.train()
    assert not torch.allclose(model(x), model(x), atol=1e-3)
    model.eval()
    assert torch.equal(model(x), model(x)) and torch.equal(model(x), without(x))
    without.train()
    assert torch.equal(without(x), without(x))


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
    for model, rest in ((GPT(SMALL_GPT), {"head"}), (ViT(SMALL_VIT), {"head"})):
        linears = {n.split(".")[-1] for n, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
        assert linears == {*model.targets} | rest
    assert GPT.also_train == () and ViT.also_train == ("head",)


# ---- sizes ----

@pytest.mark.parametrize("config", [SMALL_GPT, SMALL_VIT])
def test_invalid_sizes_are_rejected(config):
    for name in vars(config).keys() - {"dropout", "mean", "std", "position_interpolation", "layer_norm_eps"}:
        for value in (0, 2.0, "4"):
            with pytest.raises(InputError, match=f"{name} must be an integer of at least 1, not {value!r}"):
                replace(config, **{name: value})
    with pytest.raises(InputError, match="d_model=12 is not divisible by n_head=5"):
        replace(config, n_head=5)


def test_image_size_and_normalization_of_a_vit():
    assert ViTConfig(12, 4, 3, 5, 2, 3, 12).d_mlp == 48 and SMALL_VIT.mean == SMALL_VIT.std == (0.5, 0.5, 0.5)
    given = replace(SMALL_VIT, mean=[0.1, 0.2, 0.3], std=[1, 2, 3])
    model = ViT(given)
    assert model.reset_classifier(3).set_input_size(8).config == replace(given, num_classes=3, image_size=8)
    assert given.num_classes == 5 and given.image_size == 12, "the config that was passed is unchanged"
    with pytest.raises(InputError, match="image_size=14 is not divisible by patch_size=4: the patches must tile"):
        model.set_input_size(14)
    with pytest.raises(InputError, match="they need one value for each of the 3 channels"):
        replace(SMALL_VIT, std=(0.5,) * 4)


def test_inputs_of_the_wrong_shape_are_rejected():
    for shape in ((2, 1, 12, 12), (2, 3, 13, 13), (3, 12, 12)):
        with pytest.raises(ValueError, match=r"this ViT takes \(B, 3, 12, 12\)"):
            ViT(SMALL_VIT)(torch.zeros(shape))
    assert small_gpt()(tokens(1, 10)).shape == (1, 10, 31)
    with pytest.raises(ValueError, match="11 tokens do not fit .* block_size=10"):
        small_gpt()(tokens(1, 11))

# ---- generation ----

def test_logits_at_one_position_of_each_row():
    model, x, at = small_gpt(), tokens(4, 10), torch.tensor([9, 0, 4, 7])
    expected = torch.stack([model(x)[i, t] for i, t in enumerate(at)])
    assert expected.shape == (4, 31) and (model(x, last_positions=at) - expected).abs().max() < 1e-12


def test_greedy_decoding_takes_the_most_likely_token():
    model, x = small_gpt(), tokens(3, 4)
    out = model.generate(x, 5, temperature=0)
    assert out.shape == (3, 9) and torch.equal(out[:, :4], x)
    for t in range(4, 9):
        assert torch.equal(out[:, t], model(out[:, :t])[:, -1].argmax(-1))
    assert torch.equal(model.generate(x, 5, top_k=1, generator=seeded(0)), out)
    assert torch.equal(model.generate(x, 0), x)


@pytest.mark.parametrize("temperature, top_k", [(2.0, None), (0.5, 4), (1.0, 1000)])
def test_sampling_follows_the_probabilities(temperature, top_k):
    model, n = small_gpt(), 4000
    with torch.no_grad():
        logits = model(tokens(1, 4))[0, -1] / temperature
    if top_k is not None and top_k < 31:
        logits[logits.argsort(descending=True)[top_k:]] = -math.inf
    p = logits.softmax(-1)
    drawn = model.generate(tokens(1, 4).expand(n, -1), 1, temperature, top_k, seeded(3))[:, -1]
    shares = drawn.bincount(minlength=31) / n
    assert ((shares - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1e-6).all()


@pytest.mark.parametrize("training", [True, False])
def test_generation_restores_the_mode_and_does_not_use_the_global_generator(training):
    model, x, before = small_gpt(dropout=0.5), tokens(1, 3), torch.get_rng_state()
    model.train(training)
    one, same, other = (model.generate(x, 12, temperature=5.0, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other), "generation has no dropout"
    assert torch.equal(model.generate_greedy(x, 7)[0], model.generate(x, 7, temperature=0)[0, 3:])
    assert all(part.training is training for part in model.modules()) and not one.requires_grad
    assert torch.equal(before, torch.get_rng_state())
