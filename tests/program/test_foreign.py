"""Models of other libraries in float32 and bf16: adapt, three steps, evaluation, merge, save, and load on a fresh copy.

Those of torch and torchvision always; those of transformers and timm if these are installed."""

import copy

import pytest
import torch
import torch.nn as nn

from helpers import ONE_EACH, adapt_spec, assert_close, noise, rejected, take_steps
from svmini import GPT, adapt, load_adapter, merge, save_adapter

EPS = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def like(model, *shape):
    """Noise in the model's dtype."""
    return noise(*shape).to(next(model.parameters()).dtype)


@torch.no_grad()
def evaluate(model, outputs):
    training = model.training
    out = outputs(model.eval()).clone()
    model.train(training)
    return out


def run(spec, base, outputs, targets, path, dtype=torch.float32, **more):
    """Everything that a user does with one model. outputs(model) -> tensor."""
    base, eps = base.to(dtype).eval(), EPS[dtype]
    fresh, start = copy.deepcopy(base), evaluate(base, outputs)
    model = adapt_spec(spec, base, targets, **more)
    assert_close(evaluate(model, outputs), start, eps)                   # it starts from the base
    take_steps(model.train(), lambda m: outputs(m).square().mean())
    expected = evaluate(model, outputs)
    assert (expected - start).abs().max() > 1e-4 * start.abs().max()     # it has learned something
    save_adapter(model, path)
    loaded = load_adapter(fresh, path)
    assert_close(evaluate(loaded, outputs), expected, min(eps, 1e-5))
    take_steps(loaded.train(), lambda m: outputs(m).square().mean())          # training can continue
    assert_close(evaluate(merge(model), outputs), expected, eps)
    assert {type(model.get_submodule(name)) for name in loaded.adaptation["layers"]} == {nn.Linear}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapter.pt"


# ---------------------------------------------------------------- torch and torchvision


def encoder():
    """Two layers whose fast path, in evaluation, reads the weights and calls no layer. out_proj is never called."""
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2)


def vision_transformer():
    vit = pytest.importorskip("torchvision").models.VisionTransformer(8, 4, 1, 2, 16, 32, num_classes=5)
    nn.init.normal_(vit.heads.head.weight)                               # zero by default, and with it all outputs
    return vit


TARGETS = ("out_proj", "linear1", "linear2")
PADDED = torch.arange(5).expand(3, 5) >= torch.tensor([[5], [3], [4]])
TORCH = {   # the model, its outputs, targets, also_train
    "encoder": (encoder, lambda m: torch.cat([m(like(m, 3, 5, 16)), m(like(m, 3, 5, 16), src_key_padding_mask=PADDED)
                                              .masked_fill(PADDED[..., None], 0)]), TARGETS, ()),
    "vit": (vision_transformer, lambda m: m(like(m, 4, 3, 8, 8)), ("out_proj", "mlp.0", "mlp.3"), ("heads",)),
}


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("spec", ONE_EACH)
@pytest.mark.parametrize("name", TORCH)
@pytest.mark.filterwarnings("ignore:half precision loses small steps", "ignore:The PyTorch API of nested tensors")
def test_torch(name, spec, dtype, path):
    make, outputs, targets, also_train = TORCH[name]
    torch.manual_seed(0)
    run(spec, make(), outputs, targets, path, dtype, also_train=also_train)


def test_torchvision_models_get_a_list_of_possible_targets():
    with rejected(vit := vision_transformer(), "in one parameter", "targets can be: out_proj", "head"):
        adapt(vit, "svft", targets=("in_proj",))
    with rejected(vit, "conv_proj", "not a plain nn.Linear but Conv2d"):
        adapt(vit, "svft", targets=("conv_proj",))


# ---------------------------------------------------------------- transformers and timm


TOKENS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
SMALL = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def hugging_face(name, config, **sizes):
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, name)(getattr(transformers, config)(**sizes))


def t5():
    return hugging_face("T5ForConditionalGeneration", "T5Config", vocab_size=32, d_model=16, d_kv=8, d_ff=32,
                        num_layers=2, num_heads=2, decoder_start_token_id=0)


def gpt2():
    return hugging_face("GPT2LMHeadModel", "GPT2Config", vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2)


def timm_vit():
    return pytest.importorskip("timm").models.vision_transformer.VisionTransformer(
        img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3)


OTHERS = {   # as TORCH
    "llama": (lambda: hugging_face("LlamaForCausalLM", "LlamaConfig", num_key_value_heads=1, **SMALL),
              lambda m: m(TOKENS).logits, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
              ()),
    "t5": (t5, lambda m: m(input_ids=TOKENS, decoder_input_ids=TOKENS).logits, ("q", "v", "o", "wi", "wo"), ()),
    "gpt2": (lambda: GPT.from_pretrained(gpt2().state_dict(), n_head=2), lambda m: m(TOKENS), GPT.targets, ()),
    "timm": (timm_vit, lambda m: m(like(m, 2, 3, 8, 8)), ("qkv", "attn.proj", "fc1", "fc2"), ("head",)),
}


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.filterwarnings("ignore:half precision loses small steps")
def test_transformers_and_timm(name, dtype, path):
    """T5's feed-forward reads wo.weight.dtype. timm's attn.proj is reached although patch_embed.proj is a Conv2d."""
    make, outputs, targets, also_train = OTHERS[name]
    torch.manual_seed(0)
    for spec in ONE_EACH:
        run(spec, make(), outputs, targets, path, dtype, also_train=also_train)


def test_hugging_faces_gpt2_is_redirected_to_ours():
    """Its layers are no nn.Linear. The model that the error suggests computes the same."""
    model = gpt2().eval()
    with rejected(model, "c_attn", "Conv1D", "GPT.from_pretrained(model.state_dict())"):
        adapt(model, "svft", targets=("c_attn",))
    assert_close(GPT.from_pretrained(model.state_dict(), n_head=2)(TOKENS), model(TOKENS).logits)
