"""Models of other libraries in float32 and bf16: adapt, three steps, evaluation, merge, save, and load on a fresh copy.

Those of torch and torchvision always; those of transformers and timm if these are installed."""

import copy

import pytest
import torch
import torch.nn as nn

from helpers import ONE_EACH, adapt_spec, assert_close, noise, rejected, take_steps
from svmini import GPT, adapt, load_adapter, merge, save_adapter

EPS = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
TOKENS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
PADDED = torch.arange(5).expand(3, 5) >= torch.tensor([[5], [3], [4]])


def like(model, *shape):
    """Noise in the model's dtype."""
    return noise(*shape).to(next(model.parameters()).dtype)


def encoder():
    """Two layers whose fast path, in evaluation, reads the weights and calls no layer. out_proj is never called."""
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2)


def encode(model):
    x = like(model, 3, 5, 16)
    return torch.cat([model(x), model(x, src_key_padding_mask=PADDED).masked_fill(PADDED[..., None], 0)])


def vision_transformer():
    vit = pytest.importorskip("torchvision").models.VisionTransformer(8, 4, 1, 2, 16, 32, num_classes=5)
    nn.init.normal_(vit.heads.head.weight)                               # zero by default, and with it all outputs
    return vit


def hugging_face(name, config, **sizes):
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, name)(getattr(transformers, config)(vocab_size=32, **sizes))


def t5():
    """Its feed-forward reads wo.weight.dtype."""
    return hugging_face("T5ForConditionalGeneration", "T5Config", d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
                        decoder_start_token_id=0)


def llama():
    return hugging_face("LlamaForCausalLM", "LlamaConfig", hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                        num_attention_heads=2, num_key_value_heads=1)


def bert():
    return hugging_face("BertForSequenceClassification", "BertConfig", hidden_size=16, intermediate_size=32,
                        num_hidden_layers=2, num_attention_heads=2, num_labels=3)


def gpt2():
    return hugging_face("GPT2LMHeadModel", "GPT2Config", n_positions=8, n_embd=16, n_layer=1, n_head=2)


def timm_vit():
    """attn.proj is reached although patch_embed.proj is a convolution."""
    return pytest.importorskip("timm").models.vision_transformer.VisionTransformer(
        img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3)


MODELS = {   # the model, its outputs, targets, also_train
    "torch": (encoder, encode, ("out_proj", "linear1", "linear2"), ()),
    "torchvision": (vision_transformer, lambda m: m(like(m, 4, 3, 8, 8)), ("out_proj", "mlp.0", "mlp.3"), ("heads",)),
    "t5": (t5, lambda m: m(input_ids=TOKENS, decoder_input_ids=TOKENS).logits, ("q", "v", "o", "wi", "wo"), ()),
    "llama": (llama, lambda m: m(input_ids=TOKENS).logits, ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj"), ()),
    "bert": (bert, lambda m: m(input_ids=TOKENS).logits, ("query", "value", "intermediate.dense"), ("classifier",)),
    "gpt2": (lambda: GPT.from_pretrained(gpt2().state_dict(), n_head=2), lambda m: m(TOKENS), GPT.targets, ()),
    "timm": (timm_vit, lambda m: m(like(m, 2, 3, 8, 8)), ("qkv", "attn.proj", "fc1", "fc2"), ("head",)),
}


@torch.no_grad()
def evaluate(model, outputs):
    training = model.training
    out = outputs(model.eval()).clone()
    model.train(training)
    return out


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("spec", ONE_EACH)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:half precision loses small steps", "ignore:The PyTorch API of nested tensors")
def test_everything_that_a_user_does_with_a_model(name, spec, dtype, tmp_path):
    make, outputs, targets, also_train = MODELS[name]
    torch.manual_seed(0)
    base, eps = make().to(dtype).eval(), EPS[dtype]
    fresh, start = copy.deepcopy(base), evaluate(base, outputs)
    model = adapt_spec(spec, base, targets, also_train=also_train)
    assert_close(evaluate(model, outputs), start, eps)                   # it starts from the base
    take_steps(model.train(), lambda m: outputs(m).square().mean())
    expected = evaluate(model, outputs)
    assert (expected - start).abs().max() > 1e-4 * start.abs().max()     # it has learned something
    save_adapter(model, tmp_path / "a.pt")
    loaded = load_adapter(fresh, tmp_path / "a.pt")
    assert_close(evaluate(loaded, outputs), expected, min(eps, 1e-5))
    take_steps(loaded.train(), lambda m: outputs(m).square().mean())     # training can continue
    assert_close(evaluate(merge(model), outputs), expected, eps)
    assert {type(model.get_submodule(name)) for name in loaded.adaptation["layers"]} == {nn.Linear}


def test_torchvision_models_get_a_list_of_possible_targets():
    with rejected(vit := vision_transformer(), "in one parameter", "targets can be: out_proj", "head"):
        adapt(vit, "svft", targets=("in_proj",))


def test_hugging_faces_gpt2_is_redirected_to_ours():
    """Its layers are no nn.Linear. The model that the error suggests computes the same."""
    model = gpt2().eval()
    with rejected(model, "c_attn", "Conv1D", "GPT.from_pretrained(model.state_dict())"):
        adapt(model, "svft", targets=("c_attn",))
    ours = GPT.from_pretrained(model.state_dict(), n_head=2)
    assert_close(ours(TOKENS), model(TOKENS).logits)
    model.load_state_dict(ours.to_gpt2(), strict=True)
