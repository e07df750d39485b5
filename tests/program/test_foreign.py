"""Models that are not ours: adapt, three steps, evaluation, merge, save, load on a fresh copy.

torch's and torchvision's always; those of transformers and timm where these are installed."""

import copy
import warnings

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from adapted import ONE_EACH, assert_close, fit, numbers, refused, train

from svmini import GPT, adapt, count_trainable, load_adapter, merge, save_adapter
from svmini.adapting import adapters_of
from svmini.errors import InputError


def go(spec, make, loss, outputs, targets, path, eps=1e-5, **more):
    """The whole way of one model. make() -> the model; loss(model) -> scalar; outputs(model) -> tensor. Returns the
    merged model and what it gives."""
    torch.manual_seed(0)
    base = make().eval()
    fresh = copy.deepcopy(base)
    start = quiet(outputs, base)
    model = fit(spec, base, targets, **more)
    assert model is base and len(adapters_of(model)) == len(model.adaptation["layers"]) > 0
    assert_close(quiet(outputs, model), start, eps)                     # the start is the base
    counts = count_trainable(model)
    train(model.train(), loss)
    model.eval()
    expected = quiet(outputs, model)
    assert (expected - start).abs().max() > 1e-4 * start.abs().max()    # it has learned something
    save_adapter(model, path)
    loaded = load_adapter(fresh, path)
    assert count_trainable(loaded) == counts
    assert_close(quiet(outputs, loaded), expected, eps)
    train(loaded.train(), loss)                                          # and can be trained on
    assert_close(quiet(outputs, merge(model)), expected, eps)
    assert {type(model.get_submodule(name)) for name in loaded.adaptation["layers"]} == {nn.Linear}
    return model, expected


@torch.no_grad()
def quiet(outputs, model):
    was = model.training
    out = outputs(model.eval()).clone()
    model.train(was)
    return out


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapter.pt"


# ---------------------------------------------------------------- torch


def encoder():
    """Two layers whose fast path is taken in evaluation: it reads the weights and calls no layer."""
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2)


TARGETS = ("out_proj", "linear1", "linear2")


@pytest.mark.parametrize("spec", ONE_EACH)
def test_transformer_encoder(spec, path):
    x, padded = numbers(3, 5, 16), torch.arange(5).expand(3, 5) >= torch.tensor([[5], [3], [4]])

    def outputs(model):
        return torch.cat([model(x), model(x, src_key_padding_mask=padded).masked_fill(padded[..., None], 0)])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                  # nested tensors are a prototype, torch says
        go(spec, encoder, lambda m: m(x).square().mean(), outputs, TARGETS, path)


def test_the_fast_path_is_taken_and_is_right(path, monkeypatch):
    """In evaluation without gradients: by its own call, with the same outputs as the slow path."""
    x, calls, fast = numbers(3, 5, 16), [], torch._transformer_encoder_layer_fwd

    def spy(*arguments):
        calls.append(arguments)
        return fast(*arguments)

    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", spy)
    model = train(adapt(encoder(), "svft", targets=TARGETS), lambda m: m(x).square().mean()).eval()
    assert not calls
    slow = model(x)                                                      # with gradients: the slow one
    assert not calls
    with torch.no_grad():
        assert_close(model(x), slow)
    assert len(calls) == 2


@pytest.mark.parametrize("spec", ONE_EACH)
def test_out_proj_of_multihead_attention(spec, path):
    """The attention reads its weight and never calls it: in training and in evaluation."""
    x = numbers(3, 5, 16)

    def outputs(model):
        return model[0](x, x, x, need_weights=False)[0]

    go(spec, lambda: nn.Sequential(nn.MultiheadAttention(16, 2)), lambda m: outputs(m).square().mean(), outputs,
       ("out_proj",), path)


# ---------------------------------------------------------------- torchvision


@pytest.mark.parametrize("spec", ONE_EACH)
def test_torchvision_vit_with_its_classifier(spec, path):
    from torchvision.models import VisionTransformer

    def make():
        vit = VisionTransformer(8, 4, 2, 2, 16, 32, num_classes=5)
        nn.init.normal_(vit.heads.head.weight)                           # theirs is zero, and all outputs with it
        return vit

    x, y = numbers(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    model, _ = go(spec, make, lambda m: F.cross_entropy(m(x), y), lambda m: m(x), ("out_proj", "mlp.0", "mlp.3"), path,
                  also_train=("heads",))
    made = make()
    made.load_state_dict(model.state_dict())                             # it is a plain torchvision model again
    assert_close(made.eval()(x), model(x))


def test_torchvision_says_what_it_has():
    from torchvision.models import VisionTransformer, resnet18

    vit = VisionTransformer(8, 4, 1, 2, 16, 32, num_classes=5)
    with refused(vit, InputError, "one bare parameter", "targets can be: out_proj", "head"):
        adapt(vit, "svft", targets=("in_proj",))
    resnet = resnet18(num_classes=3)
    with refused(resnet, InputError, "targets can be: fc"):
        adapt(resnet, "svft")
    with refused(resnet, InputError, "conv1", "no plain nn.Linear but Conv2d", "fc"):
        adapt(resnet, "svft", targets=("conv1",))


def test_a_resnet_in_training_mode_moves_its_statistics(path):
    from torchvision.models import resnet18

    x = numbers(4, 3, 32, 32)
    model = train(adapt(resnet18(num_classes=3), "svft", targets=("fc",)), lambda m: m(x).square().mean(), steps=1)
    with pytest.raises(InputError, match="bn1.*has changed since adapt.*eval mode"):
        save_adapter(model, path)


# ---------------------------------------------------------------- transformers


TOKENS, Y = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]]), torch.tensor([0, 2])
SMALL = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VIT = {"image_size": 8, "patch_size": 4, "num_labels": 3, **SMALL}
T5 = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2,
      "decoder_start_token_id": 0}
LLAMA_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HUGGING_FACE = {   # the model's class: its configuration, inputs, targets, also_train
    "LlamaForCausalLM": ("LlamaConfig", {"num_key_value_heads": 1, **SMALL}, {"input_ids": TOKENS, "labels": TOKENS},
                         LLAMA_LAYERS, ()),
    "BertForSequenceClassification": ("BertConfig", {"num_labels": 3, **SMALL}, {"input_ids": TOKENS, "labels": Y},
                                      ("query", "value", "intermediate.dense"), ("classifier",)),
    "ViTForImageClassification": ("ViTConfig", VIT, {"pixel_values": numbers(2, 3, 8, 8), "labels": Y}, None,
                                  ("classifier",)),
    "T5ForConditionalGeneration": ("T5Config", T5, {"input_ids": TOKENS, "labels": TOKENS},
                                   ("q", "v", "o", "wi", "wo"), ()),   # its feed-forward reads wo.weight.dtype
}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face(name, path, tmp_path):
    transformers = pytest.importorskip("transformers")
    config, sizes, inputs, targets, also_train = HUGGING_FACE[name]
    model_class, config = getattr(transformers, name), getattr(transformers, config)(**sizes)
    targets = targets or [layer for layer, part in model_class(config).named_modules()   # names differ by version
                          if isinstance(part, nn.Linear) and layer not in also_train]

    def outputs(model):
        return model(**inputs).logits

    for spec in ONE_EACH:
        merged, expected = go(spec, lambda: model_class(config), lambda m: m(**inputs).loss, outputs, targets, path,
                              also_train=also_train)
    merged.save_pretrained(tmp_path / "merged")
    assert_close(quiet(outputs, model_class.from_pretrained(tmp_path / "merged").eval()), expected)


def test_llamas_tied_head_is_refused():
    transformers = pytest.importorskip("transformers")
    for tied in (True, False):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(tie_word_embeddings=tied, **SMALL))
        if tied:
            with refused(model, InputError, "lm_head shares its weight", "targets can be: q_proj"):
                adapt(model, "svft", targets=("lm_head",))
        else:
            adapt(model, "svft", targets=("lm_head",))


def test_huggingface_gpt2_is_sent_to_ours():
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=1,
                                                                 n_head=2))
    with refused(model, InputError, "c_attn", "Conv1D", "GPT.from_pretrained(model.state_dict())"):
        adapt(model, "svft", targets=("c_attn",))
    ours = GPT.from_pretrained(model.state_dict(), n_head=2)                   # and what is suggested works
    assert_close(ours.eval()(TOKENS), model.eval()(TOKENS).logits)


# ---------------------------------------------------------------- timm


def test_timm_vit(path):
    """attn.proj is reached beside patch_embed.proj, which is a convolution."""
    timm = pytest.importorskip("timm")

    def make():
        return timm.models.vision_transformer.VisionTransformer(
            img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3)

    x, y = numbers(2, 3, 8, 8), torch.tensor([0, 2])
    model = make()
    with refused(model, InputError, "patch_embed.proj", "Conv2d", "qkv, attn.proj, fc1, fc2"):
        adapt(model, "svft", targets=("proj",), also_train=("head",))
    for spec in ONE_EACH:
        go(spec, make, lambda m: F.cross_entropy(m(x), y), lambda m: m(x), ("qkv", "attn.proj", "fc1", "fc2"), path,
           also_train=("head",))
