"""Published weights: find them, recognize their state-dict format, convert it to svmini's and back.

`FORMATS` is the table of all formats. In its keys, * stands for weight and bias, and # for the index of a block.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..errors import InputError, MissingFile
from ..files import one_line


@dataclass(frozen=True)
class Format:
    """A state-dict format: its keys with ours, and what its models have in common."""
    model: str         # "GPT" or "ViT"
    marks: tuple       # keys that identify it
    keys: dict         # {their key: our key}
    block: str         # the beginning of their keys of a block
    block_keys: dict   # {their key in a block: our key, or the keys of ours that theirs stacks along the first axis}
    config: dict = field(default_factory=dict)   # fields of ViTConfig
    dropped: str = ""                            # pattern of keys that svmini has no use for


QKV = "attention.query.* attention.key.* attention.value.*"
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HF = {"embeddings.cls_token": "class_token", "embeddings.position_embeddings": "position_embedding",
      "embeddings.patch_embeddings.projection.*": "patch_embed.*", "layernorm.*": "norm.*", "classifier.*": "head.*"}
HF_ATTENTION = {"attention.attention.query.*": "attention.query.*", "attention.attention.key.*": "attention.key.*",
                "attention.attention.value.*": "attention.value.*", "attention.output.dense.*": "attention.out.*"}

FORMATS = {
    "GPT-2": Format(
        "GPT", ("wte.weight",),
        {"wte.weight": "token_embedding.weight", "wpe.weight": "position_embedding.weight", "ln_f.*": "norm.*",
         "lm_head.weight": "head.weight"},
        "h.#.", {"ln_1.*": "norm1.*", "attn.c_attn.*": QKV, "attn.c_proj.*": "attention.out.*",
                 "ln_2.*": "norm2.*", "mlp.c_fc.*": "mlp.up.*", "mlp.c_proj.*": "mlp.down.*"},
        dropped=r"h\.\d+\.attn\.(masked_)?bias"),   # causal masks, which older files contain
    "torchvision": Format(
        "ViT", ("conv_proj.weight",),
        {"class_token": "class_token", "encoder.pos_embedding": "position_embedding", "conv_proj.*": "patch_embed.*",
         "encoder.ln.*": "norm.*", "heads.head.*": "head.*"},
        "encoder.layers.encoder_layer_#.",
        {"ln_1.*": "norm1.*", "self_attention.in_proj_*": QKV, "self_attention.out_proj.*": "attention.out.*",
         "ln_2.*": "norm2.*", "mlp.0.*": "mlp.up.*", "mlp.3.*": "mlp.down.*"},
        {"position_interpolation": "torchvision", **IMAGENET}),
    "timm": Format(   # also DeiT, DINO and DINOv2
        "ViT", ("patch_embed.proj.weight",),
        {"cls_token": "class_token", "pos_embed": "position_embedding", "patch_embed.proj.*": "patch_embed.*",
         "norm.*": "norm.*", "head.*": "head.*"},
        "blocks.#.", {"norm1.*": "norm1.*", "attn.qkv.*": QKV, "attn.proj.*": "attention.out.*", "ls1.gamma": "ls1",
                      "norm2.*": "norm2.*", "mlp.fc1.*": "mlp.up.*", "mlp.fc2.*": "mlp.down.*", "ls2.gamma": "ls2"},
        {"position_interpolation": "timm", **IMAGENET}, r"mask_token"),
    "Hugging Face ViT": Format(
        "ViT", ("embeddings.patch_embeddings.projection.weight", "encoder.layer.0.layernorm_before.weight"), HF,
        "encoder.layer.#.", {
            "layernorm_before.*": "norm1.*", **HF_ATTENTION, "layernorm_after.*": "norm2.*",
            "intermediate.dense.*": "mlp.up.*", "output.dense.*": "mlp.down.*"},
        {"position_interpolation": "huggingface", "layer_norm_eps": 1e-12}, r"pooler\..*|embeddings\.mask_token"),
    "Hugging Face DINOv2": Format(
        "ViT", ("embeddings.patch_embeddings.projection.weight", "encoder.layer.0.norm1.weight"), HF,
        "encoder.layer.#.", {
            "norm1.*": "norm1.*", **HF_ATTENTION, "layer_scale1.lambda1": "ls1",
            "norm2.*": "norm2.*", "mlp.fc1.*": "mlp.up.*", "mlp.fc2.*": "mlp.down.*", "layer_scale2.lambda1": "ls2"},
        {"position_interpolation": "huggingface", **IMAGENET}, r"embeddings\.mask_token"),
}
TRANSFORMERS_5 = {   # transformers 5 renamed its modules, but not the keys in its files: {new name: name in files}
    r"\battention\.q_proj\.": "attention.attention.query.", r"\battention\.k_proj\.": "attention.attention.key.",
    r"\battention\.v_proj\.": "attention.attention.value.", r"\battention\.o_proj\.": "attention.output.dense.",
    r"\blayers\.(\d+)\.mlp\.fc1\.": r"layers.\1.intermediate.dense.",
    r"\blayers\.(\d+)\.mlp\.fc2\.": r"layers.\1.output.dense.", r"\blayers\.(\d+)\.": r"encoder.layer.\1."}
UNSUPPORTED = {   # pattern of a key: what a ViT with such a key has
    r"reg_token|register_tokens": "register tokens",
    r"q_norm\.": "qk_norm (normalized queries and keys)",
    r"fc_norm\.": "fc_norm (a normalization after average pooling)",
    r"mlp\.(w12|weights_in|fc1_g|gate_proj)\.": "a SwiGLU MLP",
    r"dist_token|distillation_token": "a distillation token"}

GPT2_URLS = {name: f"https://huggingface.co/{name}/resolve/main/pytorch_model.bin"
             for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
FACEBOOK = "https://dl.fbaipublicfiles.com"
DINO_URLS = {
    "dinov2_vits14": f"{FACEBOOK}/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth",
    "dinov2_vitb14": f"{FACEBOOK}/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth",
    "dino_vitb16": f"{FACEBOOK}/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth"}
IN21K_URLS = {   # trained on ImageNet-21k, as the base models of the SVFT paper
    name.removeprefix("timm/"): f"https://huggingface.co/{name}/resolve/main/pytorch_model.bin"
    for name in ("timm/vit_base_patch16_224.augreg_in21k", "google/vit-base-patch16-224-in21k",
                 "google/vit-large-patch16-224-in21k")}


def vit_urls():
    from torchvision.models import get_model_weights
    names = ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14")
    return {name: get_model_weights(name).DEFAULT.url for name in names} | DINO_URLS | IN21K_URLS


# ---- read a name or a file ----

def read_source(source, urls):
    """Return the state dict behind a name in `urls` (downloaded once into torch's hub cache), a file or a state dict.

    Files are what torch.load opens with weights_only=True and, if the package safetensors is installed, .safetensors.
    Raises MissingFile or InputError.
    """
    if isinstance(source, dict):
        state = source
    elif str(source) in urls:
        state = download(str(source), urls[str(source)])
    else:
        state = read_file(Path(source), urls)
    for key in ("model", "state_dict"):   # DeiT's files and timm's checkpoints hold the state dict among other things
        if isinstance(state.get(key), dict):
            return state[key]
    return state


def read_file(path, urls):
    if not path.is_file():
        if path.suffix in (".pt", ".pth", ".bin", ".safetensors"):
            raise MissingFile(f"{path} does not exist (a training run writes its base model to "
                              "OUT/pretrain/model.pt)")
        raise MissingFile(f"{str(path)!r} is neither a file nor one of {', '.join(urls)}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise InputError(f"reading {path} needs the package safetensors: pip install safetensors") from None
    except Exception as error:   # unpickling fails in many ways, all of which mean that this is no such file
        raise InputError(f"{path} is not a file of weights that torch can read "
                         f"({one_line(error).split('. ')[0]})") from None
    if not isinstance(state, dict):
        raise InputError(f"{path} holds a {type(state).__name__}, not a state dict")
    return state


def download(name, url):
    file = url.rsplit("/", 1)[-1]
    if file == "pytorch_model.bin":   # the name of every model on Hugging Face's hub; torch.hub keeps the others' names
        file = f"{name.replace('/', '--')}-{file}"
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True, file_name=file)
    except OSError as error:
        raise MissingFile(f"cannot download {url} ({one_line(error)}): download it elsewhere and give the path of that "
                          f"file instead of {name!r}, or put it at {path}") from None
    except Exception as error:   # as in read_file
        raise InputError(f"{path} is damaged ({one_line(error)}): delete it to download it again") from None


# ---- recognize and convert ----

def detect_format(state):
    """Return (name of the format, state dict with the keys that FORMATS has). A common prefix of the keys is removed.

    Raises InputError if the state dict is in none of the formats.
    """
    if "kind" in state:
        raise InputError("this is a file of svmini's own: read it with svmini.model_file.load_model or load_adapter")
    renamed = {}
    for key, value in state.items():
        for new, old in TRANSFORMERS_5.items():
            key = re.sub(new, old, str(key))
        renamed[key] = value
    for name, format in FORMATS.items():
        for key in renamed:
            prefix, mark, rest = key.rpartition(format.marks[0])
            if mark and not rest and prefix[-1:] in ("", ".") and all(prefix + m in renamed for m in format.marks):
                return name, {k.removeprefix(prefix): v for k, v in renamed.items()}
    raise InputError("this is not a state dict of a GPT-2 of Hugging Face, nor of a ViT of torchvision, timm, DINO or "
                     f"Hugging Face: none of {', '.join({f.marks[0]: 0 for f in FORMATS.values()})} is in it")


def read_pretrained(source, urls, model):
    """Return (state dict in svmini's format, fields of ViTConfig) of published weights for a "GPT" or a "ViT".

    The tensors are copies in float32, or in float64 if the source has float64. Raises InputError.
    """
    name, state = detect_format(read_source(source, urls))
    format = FORMATS[name]
    if format.model != model:
        raise InputError(f"these are the weights of a {format.model} in {name}'s format, not of a {model}: "
                         f"use {format.model}.from_pretrained")
    if model == "ViT":
        for pattern, what in UNSUPPORTED.items():
            if any(re.search(pattern, key) for key in state):
                raise InputError(f"this ViT has {what}, which svmini does not support")
        if not any(key.endswith(("cls_token", "class_token")) for key in state):
            raise InputError("this ViT has no class token, which svmini does not support")
    if any(key.startswith("pooler.") for key in state):
        print("the pooler of these weights is left out: the classifier of svmini's ViT reads the class token directly")
    dino = "mask_token" in state or not isinstance(source, dict) and str(source) in DINO_URLS
    return convert_from(state, format), format.config | ({"position_interpolation": "dino"} if dino else {})


def key_pairs(format, n_layer):
    """Return [(their key, our keys)] for every tensor of a model with n_layer blocks."""
    patterns = list(format.keys.items())
    for i in range(n_layer):
        patterns += [(format.block.replace("#", str(i)) + theirs, " ".join(f"blocks.{i}.{o}" for o in ours.split()))
                     for theirs, ours in format.block_keys.items()]
    return [(theirs.replace("*", kind), ours.replace("*", kind).split()) for theirs, ours in patterns
            for kind in (("weight", "bias") if "*" in theirs else ("",))]


def count_blocks(state, start="blocks."):
    """Return how many block indices follow `start` in the keys."""
    return len({key[len(start):].split(".")[0] for key in state if key.startswith(start)})


def is_transposed(key):
    """Whether a key is a weight of GPT-2's Conv1D, which is the transpose of nn.Linear's."""
    return ".c_" in key and key.endswith(".weight")


def convert_from(state, format):
    """Return their state dict in svmini's format. Raises InputError that lists the keys that do not fit."""
    state = {key: value for key, value in state.items() if not re.fullmatch(format.dropped, key)}
    pairs = key_pairs(format, count_blocks(state, format.block.split("#")[0]))
    for optional in ("head.", ".ls1", ".ls2"):
        group = [pair for pair in pairs if optional in pair[1][0]]
        if not any(theirs in state for theirs, _ in group):
            pairs = [pair for pair in pairs if pair not in group]
    missing, surplus = compare_keys({theirs for theirs, _ in pairs}, state)
    if missing or surplus:
        raise InputError(f"the state dict does not fit: missing {missing or 'nothing'}, surplus {surplus or 'nothing'}")
    ours = {}
    for theirs, keys in pairs:
        value = state[theirs]
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dim() == 0:
            raise InputError(f"the state dict does not fit: {theirs} is not a tensor of floating-point weights")
        value = value.detach().transpose(0, -1) if is_transposed(theirs) else value.detach()
        value = value.float() if value.itemsize < 4 else value
        ours |= {key: part.clone(memory_format=torch.contiguous_format)
                 for key, part in zip(keys, value.chunk(len(keys)))}
    for key in [key for key in ours if key.endswith((".ls1", ".ls2"))]:   # layer scales: γ * (W x + b)
        linear = key.replace("ls1", "attention.out").replace("ls2", "mlp.down")
        gamma, W, b = ours.pop(key), ours[f"{linear}.weight"], ours[f"{linear}.bias"]
        if not gamma.shape == W.shape[:1] == b.shape:
            raise InputError(f"the state dict does not fit: {key} has the shape {tuple(gamma.shape)}")
        ours |= {f"{linear}.weight": gamma[:, None] * W, f"{linear}.bias": gamma * b}
    return ours


def convert_to(state, name):
    """Return svmini's state dict in the format called `name`: the inverse of convert_from, to the last bit.

    Raises InputError that lists every tensor for which the format has no key, and every one that it needs.
    """
    pairs = key_pairs(FORMATS[name], count_blocks(state))
    missing, surplus = compare_keys({key for _, keys in pairs for key in keys}, state)
    if missing or surplus:
        raise InputError(f"the model does not fit into {name}'s format: no place for {surplus or 'nothing'}, missing "
                         f"{missing or 'nothing'}" + (" (merge an adapted model first)" if missing else ""))
    theirs = {}
    for key, ours in pairs:
        value = torch.cat([state[k] for k in ours]).detach()
        theirs[key] = value.T.contiguous() if is_transposed(key) else value
    return theirs


def compare_keys(expected, state):
    """Return (missing, surplus): sorted keys, at most twenty of each."""
    return sorted(expected - state.keys())[:20], sorted(state.keys() - expected)[:20]


def shape_of(state, key, axes):
    """Return the shape of a tensor in svmini's format. Raises InputError unless it has that many axes."""
    if state[key].dim() != axes:
        raise InputError(f"the state dict does not fit: {key} has the shape {tuple(state[key].shape)}, not {axes} axes")
    return state[key].shape


def infer_n_head(d_model, n_head):
    """Return n_head or, if it is None, the number of heads of width 64. Raises InputError if d_model has no such."""
    if n_head is None and d_model % 64:
        raise InputError(f"weights do not tell how many heads they have, and the width {d_model} is not a multiple of "
                         "64, the usual width of a head: give n_head")
    return d_model // 64 if n_head is None else n_head


def build(model_class, config, state):
    """Return a model whose parameters are the tensors in `state`. Raises InputError that lists those of wrong shape."""
    with torch.device("meta"):   # no memory for parameters that are replaced
        model = model_class(config)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise InputError(f"the state dict does not fit: {one_line(error)}") from None
    return model.requires_grad_(True)
