"""Published weights: read them, and carry them over between their format and ours.

A format is a list of (their key, our keys, transposed): one of their tensors holds ours stacked along the first
axis (after a transpose, where they keep the matrix the other way round).
"""

from pathlib import Path

import torch

from ..errors import InputError, MissingFile
from ..files import one_line

QKV = "attention.query attention.key attention.value"   # which others keep stacked in one matrix
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}   # of its pictures, channel by channel

GPT2_URLS = {name: f"https://huggingface.co/{name}/resolve/main/pytorch_model.bin"
             for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
DINO = "https://dl.fbaipublicfiles.com"
TIMM_URLS = {
    "dinov2_vits14": f"{DINO}/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth",
    "dinov2_vitb14": f"{DINO}/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth",
    "dino_vitb16": f"{DINO}/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
    "vit_base_patch16_224.augreg_in21k":   # trained on ImageNet-21k, as the papers' bases
        "https://huggingface.co/timm/vit_base_patch16_224.augreg_in21k/resolve/main/pytorch_model.bin"}


def torchvision_urls():
    from torchvision.models import get_model_weights
    return {name: get_model_weights(name).DEFAULT.url
            for name in ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14")}


# ---- from a file or a name ----

def read_source(source, urls):
    """A state dict from a state dict, a name in `urls` (downloaded once into torch's hub cache) or a file.

    Files: whatever torch.load opens with weights_only=True, and .safetensors where that package is installed.
    Raises MissingFile or InputError.
    """
    if isinstance(source, dict):
        state = source
    elif str(source) in urls:
        state = downloaded(str(source), urls[str(source)])
    else:
        state = read_file(Path(source), urls)
    inside = isinstance(state.get("model"), dict) and "kind" not in state   # as DeiT's files hold it; ours say a kind
    return state["model"] if inside else state


def read_file(path, urls):
    if not path.is_file():
        raise MissingFile(f"{str(path)!r} is neither a file nor one of {', '.join(urls)}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise InputError(f"reading {path} needs the package safetensors: pip install safetensors") from None
    except Exception as error:   # unpickling fails in many ways; each means that this is not such a file
        said = one_line(error).split(". ")[0]
        raise InputError(f"{path} is no file of weights that torch can read ({said})") from None
    if not isinstance(state, dict):
        raise InputError(f"{path} holds a {type(state).__name__}, not a state dict")
    return state


def downloaded(name, url):
    file = url.rsplit("/", 1)[-1]
    if file == "pytorch_model.bin":   # as all on Hugging Face are called; others are kept as torch.hub keeps them
        file = f"{name}-{file}"
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True, file_name=file)
    except OSError as error:
        raise MissingFile(f"cannot download {url} ({one_line(error)}): fetch it elsewhere and give that file's path "
                          f"instead of {name!r}, or put it at {path}") from None
    except Exception as error:   # unpickling fails in many ways
        raise InputError(f"{path} is damaged ({one_line(error)}): delete it to download it again") from None


def format_of(state):
    """"torchvision", "timm" or "gpt2": whose format a state dict is in. Raises InputError where it is in none."""
    marks = {"torchvision": "conv_proj.weight", "timm": "patch_embed.proj.weight", "gpt2": "wte.weight"}
    for format, mark in marks.items():
        if mark in state or f"transformer.{mark}" in state:
            return format
    raise InputError("this is no state dict of a ViT as torchvision or timm name it, nor of a GPT-2: "
                     f"{', '.join(marks.values())} were looked for and are not in it")


def check_format(state, wanted):
    """Raise InputError unless a state dict is in the wanted format."""
    found = format_of(state)
    if found != wanted:
        kinds = {"torchvision": "a ViT", "timm": "a ViT", "gpt2": "a GPT-2"}
        raise InputError(f"these are weights of {kinds[found]}, not of {kinds[wanted]}")


def heads_of(d_model, n_head):
    """n_head; where it is None, heads of width 64. Raises InputError where such do not fill the width."""
    if n_head is None and d_model % 64:
        raise InputError(f"weights do not say how many heads they have, and a width of {d_model} is no multiple of "
                         "64, the usual width of a head: give n_head")
    return d_model // 64 if n_head is None else n_head


# ---- in and out ----

def convert_from(state, names):
    """Their state dict in our format, as float tensors of our own. Raises InputError that lists what does not fit."""
    expected = {theirs for theirs, _, _ in names}
    missing, surplus = sorted(expected - state.keys()), sorted(state.keys() - expected)
    if missing or surplus:
        raise InputError(f"the state dict does not fit: missing {missing or 'nothing'}, surplus {surplus or 'nothing'}")
    ours = {}
    for theirs, keys, transposed in names:
        value = state[theirs].t() if transposed else state[theirs]
        if value.dtype in (torch.float16, torch.bfloat16):
            value = value.float()
        ours |= {key: part.clone(memory_format=torch.contiguous_format)
                 for key, part in zip(keys, value.chunk(len(keys)))}
    return ours


def convert_to(state, names):
    """Our state dict in their format: the inverse of convert_from, to the last bit.

    Raises InputError that names every tensor without a place there, and every one that is missing for it.
    """
    expected = {key for _, keys, _ in names for key in keys}
    missing, surplus = sorted(expected - state.keys()), sorted(state.keys() - expected)
    if missing or surplus:
        raise InputError(f"the model does not fit into this format: no place for {surplus or 'nothing'}, missing "
                         f"{missing or 'nothing'}" + (" (merge an adapted model first)" if missing else ""))
    out = {}
    for theirs, keys, transposed in names:
        value = torch.cat([state[key] for key in keys]).detach()
        out[theirs] = value.t().contiguous() if transposed else value
    return out


def built(model_class, config, state):
    """A model whose parameters are the tensors in `state`. Raises InputError that lists misshapen ones."""
    with torch.device("meta"):   # sizes without memory
        model = model_class(config)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise InputError(f"the state dict does not fit: {one_line(error)}") from None
    return model.requires_grad_(True)


# ---- the namings ----

def gpt2_format(n_layer):
    """(GPT-2's key, our keys that are stacked in it, transposed or not) for every weight of a GPT-2."""
    names = spelled_out(
        {"wte.weight": "token_embedding.weight", "wpe.weight": "position_embedding.weight"}, {"ln_f.": "norm"},
        "h.{}.", {"ln_1.": "norm1", "ln_2.": "norm2", "attn.c_attn.": QKV, "attn.c_proj.": "attention.out",
                  "mlp.c_fc.": "mlp.up", "mlp.c_proj.": "mlp.down"}, n_layer)
    # Conv1D, which GPT-2 uses for its linear maps, holds the transpose of nn.Linear's weight
    return [(theirs, ours, ".c_" in theirs and theirs.endswith("weight")) for theirs, ours, _ in names]


def torchvision_format(n_layer):
    """(torchvision's key, our keys that are stacked in it, False) for every weight of a ViT."""
    return spelled_out(
        {"class_token": "class_token", "encoder.pos_embedding": "position_embedding"},
        {"conv_proj.": "patch_embed", "encoder.ln.": "norm", "heads.head.": "head"},
        "encoder.layers.encoder_layer_{}.", {
            "ln_1.": "norm1", "ln_2.": "norm2", "self_attention.in_proj_": QKV,
            "self_attention.out_proj.": "attention.out", "mlp.0.": "mlp.up", "mlp.3.": "mlp.down"}, n_layer)


def timm_format(n_layer, scales):
    """(timm's key, our keys that are stacked in it, False) for every weight of a ViT; scales: with its layer scales,
    which ours has not (blocks.0.ls1, ...)."""
    gammas = {f"blocks.{i}.{ls}.gamma": f"blocks.{i}.{ls}" for i in range(n_layer) for ls in ("ls1", "ls2") if scales}
    return spelled_out(
        {"cls_token": "class_token", "pos_embed": "position_embedding"} | gammas,
        {"patch_embed.proj.": "patch_embed", "norm.": "norm", "head.": "head"},
        "blocks.{}.", {"norm1.": "norm1", "norm2.": "norm2", "attn.qkv.": QKV, "attn.proj.": "attention.out",
                       "mlp.fc1.": "mlp.up", "mlp.fc2.": "mlp.down"}, n_layer)


def spelled_out(tensors, parts, prefix, parts_of_block, n_layer):
    """(their key, our keys, False) for single tensors, and for the weight and the bias of each part. The tables are
    {theirs: ours}; those of parts_of_block are spelled out for every block."""
    parts = [(theirs, ours.split()) for theirs, ours in parts.items()]
    parts += [(prefix.format(i) + theirs, [f"blocks.{i}.{o}" for o in ours.split()])
              for i in range(n_layer) for theirs, ours in parts_of_block.items()]
    return ([(theirs, [ours], False) for theirs, ours in tensors.items()]
            + [(theirs + kind, [f"{o}.{kind}" for o in ours], False)
               for theirs, ours in parts for kind in ("weight", "bias")])
