"""Random weights in published formats, written out by hand, and what the published models compute with them."""

import math

import torch

from helpers import seeded


def random_state(shapes, dtype):
    g = seeded(1) if torch.get_default_device().type == "cpu" else None   # no generator on the meta device
    return {key: torch.randn(shape, generator=g, dtype=dtype) * 0.4 for key, shape in shapes.items()}


def gpt2_state(n_layer=2, d=12, vocab=31, block=10, dtype=torch.float64):
    shapes = {"wte.weight": (vocab, d), "wpe.weight": (block, d), "ln_f.weight": (d,), "ln_f.bias": (d,)}
    for i in range(n_layer):
        for name, size in (("ln_1", (d,)), ("attn.c_attn", (d, 3 * d)), ("attn.c_proj", (d, d)),
                           ("ln_2", (d,)), ("mlp.c_fc", (d, 4 * d)), ("mlp.c_proj", (4 * d, d))):
            shapes |= {f"h.{i}.{name}.weight": size, f"h.{i}.{name}.bias": size[-1:]}
    return random_state(shapes, dtype)


def timm_state(n_layer=2, d=12, mlp=20, patch=4, size=12, classes=5, scales=True, dtype=torch.float64, channels=3):
    """classes=0: no head, as in DINO."""
    shapes = {"cls_token": (1, 1, d), "pos_embed": (1, 1 + (size // patch) ** 2, d), "norm.weight": (d,),
              "norm.bias": (d,), "patch_embed.proj.weight": (d, channels, patch, patch), "patch_embed.proj.bias": (d,)}
    for i in range(n_layer):
        for name, size in (("norm1", (d,)), ("attn.qkv", (3 * d, d)), ("attn.proj", (d, d)),
                           ("norm2", (d,)), ("mlp.fc1", (mlp, d)), ("mlp.fc2", (d, mlp))):
            shapes |= {f"blocks.{i}.{name}.weight": size, f"blocks.{i}.{name}.bias": size[:1]}
        if scales:
            shapes |= {f"blocks.{i}.{name}.gamma": (d,) for name in ("ls1", "ls2")}
    if classes:
        shapes |= {"head.weight": (classes, d), "head.bias": (classes,)}
    return random_state(shapes, dtype)


def as_hugging_face(state, dinov2, prefix=""):
    """The weights of a timm_state under the keys that files of Hugging Face's ViT or DINOv2 have."""
    names = {"blocks.": "encoder.layer.", "attn.proj": "attention.output.dense", "cls_token": "embeddings.cls_token",
             "pos_embed": "embeddings.position_embeddings", "norm.": "layernorm.", "ls1.gamma": "layer_scale1.lambda1",
             "ls2.gamma": "layer_scale2.lambda1", "patch_embed.proj": "embeddings.patch_embeddings.projection"}
    if not dinov2:
        names |= {"norm1": "layernorm_before", "norm2": "layernorm_after", "mlp.fc1": "intermediate.dense",
                  "mlp.fc2": "output.dense"}
    theirs = {}
    for key, value in state.items():
        for old, new in names.items():
            key = key.replace(old, new)
        parts = dict(zip(("query", "key", "value"), value.chunk(3))) if "attn.qkv" in key else {"": value}
        theirs |= {prefix + key.replace("attn.qkv", f"attention.attention.{n}"): part for n, part in parts.items()}
    for kind in ("weight", "bias"):
        if f"{prefix}head.{kind}" in theirs:
            theirs[f"classifier.{kind}"] = theirs.pop(f"{prefix}head.{kind}")
    return theirs


def layer_norm(s, y, name, eps):
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
    return y * s[f"{name}.weight"] + s[f"{name}.bias"]


def attention(qkv, n_head, hidden=0):
    """Multi-head attention of queries, keys and values in one tensor (B, T, 3d); hidden is added to the scores."""
    heads = zip(*(part.chunk(n_head, -1) for part in qkv.chunk(3, -1)))
    return torch.cat([(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5 + hidden).softmax(-1) @ v for q, k, v in heads], -1)


def gpt2_forward(s, x, n_layer=2, n_head=3):
    """GPT-2's logits, in as few operations as possible."""
    def conv1d(y, name):
        return y @ s[f"{name}.weight"] + s[f"{name}.bias"]

    T = x.shape[1]
    y = s["wte.weight"][x] + s["wpe.weight"][:T]
    hidden = torch.full((T, T), -math.inf).triu(1)
    for i in range(n_layer):
        qkv = conv1d(layer_norm(s, y, f"h.{i}.ln_1", 1e-5), f"h.{i}.attn.c_attn")
        y = y + conv1d(attention(qkv, n_head, hidden), f"h.{i}.attn.c_proj")
        u = conv1d(layer_norm(s, y, f"h.{i}.ln_2", 1e-5), f"h.{i}.mlp.c_fc")
        u = 0.5 * u * (1 + torch.tanh((2 / math.pi) ** 0.5 * (u + 0.044715 * u ** 3)))
        y = y + conv1d(u, f"h.{i}.mlp.c_proj")
    return layer_norm(s, y, "ln_f", 1e-5) @ s["wte.weight"].T


def vit_features(s, x, n_layer=2, n_head=2, patch=4, eps=1e-6):
    """The class token after the last LayerNorm, from a timm_state, in as few operations as possible."""
    def linear(y, name):
        return y @ s[f"{name}.weight"].T + s[f"{name}.bias"]

    x = x.unfold(2, patch, patch).unfold(3, patch, patch)                                # (B, C, rows, columns, P, P)
    x = x.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)                             # (B, patches, C * P * P)
    y = x @ s["patch_embed.proj.weight"].flatten(1).T + s["patch_embed.proj.bias"]
    y = torch.cat([s["cls_token"].expand(len(y), -1, -1), y], dim=1) + s["pos_embed"]
    for i in range(n_layer):
        qkv = linear(layer_norm(s, y, f"blocks.{i}.norm1", eps), f"blocks.{i}.attn.qkv")
        y = y + s.get(f"blocks.{i}.ls1.gamma", 1) * linear(attention(qkv, n_head), f"blocks.{i}.attn.proj")
        u = linear(layer_norm(s, y, f"blocks.{i}.norm2", eps), f"blocks.{i}.mlp.fc1")
        u = u * 0.5 * (1 + torch.erf(u / math.sqrt(2)))
        y = y + s.get(f"blocks.{i}.ls2.gamma", 1) * linear(u, f"blocks.{i}.mlp.fc2")
    return layer_norm(s, y[:, 0], "norm", eps)
