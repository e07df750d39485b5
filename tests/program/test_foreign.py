"""Models of other libraries in float32 and bf16: adapt, three steps, evaluation, merge, save, and load on a fresh copy.

Those of torch and torchvision always; those of transformers and timm if these are installed."""

import copy

import pytest
import torch
import torch.nn as nn
from helpers import ONE_EACH, adapt_spec, assert_close, noise, rejected, take_steps

from svmini import GPT, adapt, count_trainable, load_adapter, merge, save_adapter
from svmini.adapting import adapters_of


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
    """Everything that a user does with one model. outputs(model) -> tensor. Returns the merged model."""
    base, eps = base.to(dtype).eval(), EPS[dtype]
    fresh = copy.deepcopy(base)
    start = evaluate(base, outputs)
    model = adapt_spec(spec, base, targets, **more)
    assert model is base and len(adapters_of(model)) == len(model.adaptation["layers"]) > 0
    assert_close(evaluate(model, outputs), start, eps)                   # it starts from the base
    counts = count_trainable(model)
    take_steps(model.train(), lambda m: outputs(m).square().mean())
    expected = evaluate(model, outputs)
    assert (expected - start).abs().max() > 1e-4 * start.abs().max()     # it has learned something
    save_adapter(model, path)
    loaded = load_adapter(fresh, path)
    assert count_trainable(loaded) == counts
    assert_close(evaluate(loaded, outputs), expected, min(eps, 1e-5))
    take_steps(loaded.train(), lambda m: outputs(m).square().mean())          # training can continue
    assert_close(evaluate(merge(model), outputs), expected, eps)
    assert {type(model.get_submodule(name)) for name in loaded.adaptation["layers"]} == {nn.Linear}
    return model


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapter.pt"


# ---------------------------------------------------------------- torch and torchvision


def encoder():
    """Two layers whose fast path, in evaluation, reads the weights and calls no layer."""
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2)


def attend(model):
    """nn.MultiheadAttention reads the weight of out_proj and never calls it, in training and in evaluation."""
    x = like(model, 3, 5, 16)
    return model[0](x, x, x, need_weights=False)[0]


def vision_transformer():
    vit = pytest.importorskip("torchvision").models.VisionTransformer(8, 4, 1, 2, 16, 32, num_classes=5)
    nn.init.normal_(vit.heads.head.weight)                               # zero by default, and with it all outputs
    return vit


TARGETS = ("out_proj", "linear1", "linear2")
PADDED = torch.arange(5).expand(3, 5) >= torch.tensor([[5], [3], [4]])
TORCH = {   # the model, its outputs, targets, also_train
    "encoder": (encoder, lambda m: torch.cat([m(like(m, 3, 5, 16)), m(like(m, 3, 5, 16), src_key_padding_mask=PADDED)
                                              .masked_fill(PADDED[..., None], 0)]), TARGETS, ()),
    "attention": (lambda: nn.Sequential(nn.MultiheadAttention(16, 2)), attend, ("out_proj",), ()),
    "vit": (vision_transformer, lambda m: m(like(m, 4, 3, 8, 8)), ("out_proj", "mlp.0", "mlp.3"), ("heads",)),
}


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("spec", ONE_EACH)
@pytest.mark.parametrize("name", TORCH)
@pytest.mark.filterwarnings("ignore:half precision loses small steps", "ignore:The PyTorch API of nested tensors")
def test_torch(name, spec, dtype, path):
    make, outputs, targets, also_train = TORCH[name]
    torch.manual_seed(0)
    merged = run(spec, make(), outputs, targets, path, dtype, also_train=also_train)
    plain = make().to(dtype)
    plain.load_state_dict(merged.state_dict())                           # it is a plain model again
    assert_close(evaluate(plain, outputs), evaluate(merged, outputs))


def test_the_fast_path_is_taken_and_is_right(monkeypatch):
    """In evaluation without gradients, by its own call, with the same outputs as the slow path."""
    x, calls, fast = noise(3, 5, 16), [], torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: calls.append(args) or fast(*args))
    model = take_steps(adapt(encoder(), "svft", targets=TARGETS), lambda m: m(x).square().mean()).eval()
    slow = model(x)                                                      # with gradients: the slow one
    assert not calls
    with torch.no_grad():
        assert_close(model(x), slow)
    assert len(calls) == 2


def test_torchvision_models_get_a_list_of_possible_targets():
    with rejected(vit := vision_transformer(), "in one parameter", "targets can be: out_proj", "head"):
        adapt(vit, "svft", targets=("in_proj",))
    from torchvision.models import resnet18
    with rejected(resnet := resnet18(num_classes=3), "targets can be: fc"):
        adapt(resnet, "svft")
    with rejected(resnet, "conv1", "not a plain nn.Linear but Conv2d", "fc"):
        adapt(resnet, "svft", targets=("conv1",))


# ---------------------------------------------------------------- transformers


TOKENS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
SMALL = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VIT = {"image_size": 8, "patch_size": 4, "num_labels": 3, **SMALL}
T5 = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2,
      "decoder_start_token_id": 0}
LLAMA_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HUGGING_FACE = {   # the model's class: its configuration, inputs, targets, also_train
    "LlamaForCausalLM": ("LlamaConfig", {"num_key_value_heads": 1, **SMALL}, {"input_ids": TOKENS}, LLAMA_LAYERS, ()),
    "BertForSequenceClassification": ("BertConfig", {"num_labels": 3, **SMALL}, {"input_ids": TOKENS},
                                      ("query", "value", "intermediate.dense"), ("classifier",)),
    "ViTForImageClassification": ("ViTConfig", VIT, {"pixel_values": noise(2, 3, 8, 8)}, None, ("classifier",)),
    "T5ForConditionalGeneration": ("T5Config", T5, {"input_ids": TOKENS, "decoder_input_ids": TOKENS},
                                   ("q", "v", "o", "wi", "wo"), ()),   # its feed-forward reads wo.weight.dtype
}


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("name", HUGGING_FACE)
@pytest.mark.filterwarnings("ignore:half precision loses small steps")
def test_hugging_face(name, dtype, path, tmp_path):
    transformers = pytest.importorskip("transformers")
    config, sizes, inputs, targets, also_train = HUGGING_FACE[name]
    model_class, config = getattr(transformers, name), getattr(transformers, config)(**sizes)
    targets = targets or [layer for layer, module in model_class(config).named_modules()   # names differ by version
                          if isinstance(module, nn.Linear) and layer not in also_train]
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}

    def outputs(model):
        return model(**inputs).logits

    torch.manual_seed(0)
    for spec in ONE_EACH:
        merged = run(spec, model_class(config), outputs, targets, path, dtype, also_train=also_train)
    merged.save_pretrained(tmp_path / "merged")
    again = model_class.from_pretrained(tmp_path / "merged", dtype=dtype)
    assert_close(evaluate(again, outputs), evaluate(merged, outputs))


@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_hugging_faces_gpt2_is_redirected_to_ours(dtype, path):
    """Its layers are no nn.Linear. The model that the error suggests is the same, and can be adapted."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=1,
                                                                 n_head=2)).to(dtype).eval()
    with rejected(model, "c_attn", "Conv1D", "GPT.from_pretrained(model.state_dict())"):
        adapt(model, "svft", targets=("c_attn",))
    ours = GPT.from_pretrained(model.state_dict(), n_head=2).to(dtype).eval()
    assert_close(ours(TOKENS), model(TOKENS).logits, EPS[dtype])
    for spec in ONE_EACH:
        run(spec, copy.deepcopy(ours), lambda m: m(TOKENS), GPT.targets, path, dtype)


def test_timm_vit(path):
    """attn.proj is reached although patch_embed.proj is a convolution."""
    timm = pytest.importorskip("timm")
    for spec in ONE_EACH:
        model = timm.models.vision_transformer.VisionTransformer(
            img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3)
        with rejected(model, "patch_embed.proj", "Conv2d", "qkv, attn.proj, fc1, fc2"):
            adapt(model, "svft", targets=("proj",), also_train=("head",))
        run(spec, model, lambda m: m(noise(2, 3, 8, 8)), ("qkv", "attn.proj", "fc1", "fc2"), path, also_train=("head",))
