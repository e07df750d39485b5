"""Vision Transformer (Dosovitskiy et al., arXiv 2010.11929), and its weights from and to torchvision's naming.

Patches by a strided convolution, a class token, learned positions, pre-LayerNorm blocks with eps 1e-6, exact GELU,
and a linear head on the class token.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from .transformer import Block, check_config, init_linears
from .weights import check_kind, from_theirs, load_exactly, read_source, to_theirs


@dataclass
class ViTConfig:
    """Sizes of a ViT for square images; d_mlp=None means 4 * d_model. Raises ValueError for sizes that cannot work."""
    image_size: int
    patch_size: int
    in_channels: int
    num_classes: int
    n_layer: int
    n_head: int
    d_model: int
    d_mlp: int | None = None
    dropout: float = 0.0

    def __post_init__(self):
        if self.d_mlp is None:
            self.d_mlp = 4 * self.d_model
        check_config(self, ("image_size", "patch_size", "in_channels", "num_classes",
                            "n_layer", "n_head", "d_model", "d_mlp"))
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size={self.image_size} is not divisible by patch_size={self.patch_size}: "
                             "the patches must tile the image")


class ViT(nn.Module):
    Config = ViTConfig

    def __init__(self, config):
        super().__init__()
        self.config = config
        C, P, d = config.in_channels, config.patch_size, config.d_model
        n_patches = (config.image_size // P) ** 2
        self.patches = nn.Conv2d(C, d, kernel_size=P, stride=P)
        self.class_token = nn.Parameter(torch.zeros(1, 1, d))
        self.position_embedding = nn.Parameter(torch.empty(1, 1 + n_patches, d))
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(d, config.n_head, config.d_mlp, causal=False, gelu="none", eps=1e-6, dropout=config.dropout)
            for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(d, eps=1e-6)
        init_linears(self, std=1 / math.sqrt(d))
        nn.init.normal_(self.patches.weight, std=1 / math.sqrt(C * P * P))
        nn.init.zeros_(self.patches.bias)
        nn.init.normal_(self.position_embedding, std=0.02)
        self.new_head(config.num_classes)

    def new_head(self, num_classes):
        """Put a fresh linear classifier of zeros in place, as a new task needs it; returns the model."""
        self.config = replace(self.config, num_classes=num_classes)   # checks it; the caller's stays as it is
        device, dtype = self.class_token.device, self.class_token.dtype
        self.head = nn.Linear(self.config.d_model, num_classes, device=device, dtype=dtype)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        return self

    def new_size(self, image_size):
        """Take images of another size from now on: the grid of position embeddings is interpolated (bicubic), the
        patches stay as they are (arXiv 2010.11929, section 3.2); returns the model."""
        config = replace(self.config, image_size=image_size)   # checks it
        old, new = (c.image_size // c.patch_size for c in (self.config, config))
        if old != new:
            first, grid = self.position_embedding.detach().split([1, old * old], dim=1)          # of the class token
            grid = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2)                             # (1, d, old, old)
            grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=True)      # (1, d, new, new)
            grid = grid.flatten(2).transpose(1, 2)                                               # (1, new * new, d)
            self.position_embedding = nn.Parameter(torch.cat([first, grid], dim=1))
        self.config = config
        return self

    def forward(self, images):
        """images (B, C, H, W) -> logits (B, num_classes). Raises ValueError for images of another size."""
        c = self.config
        if images.dim() != 4 or images.shape[1:] != (c.in_channels, c.image_size, c.image_size):
            raise ValueError(f"images of shape {tuple(images.shape)} do not fit: this ViT takes "
                             f"(B, {c.in_channels}, {c.image_size}, {c.image_size})")
        x = self.patches(images).flatten(2).transpose(1, 2)                      # (B, patches, d)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1)       # (B, 1 + patches, d)
        x = self.dropout(x + self.position_embedding)
        for block in self.blocks:
            x = block(x)                                                         # (B, 1 + patches, d)
        return self.head(self.norm(x[:, 0]))                                     # (B, num_classes)

    @classmethod
    def from_torchvision(cls, source, num_classes=None, n_head=None, image_size=None):
        """A ViT with the weights of a torchvision VisionTransformer.

        source: "vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32" or "vit_h_14" (downloaded once), a file, or a state
        dict. num_classes: a fresh head for another task; None keeps theirs. n_head: None for the published models'
        (16 at width 1280, else heads of width 64); a state dict does not tell. image_size: None for theirs.
        Raises ValueError that lists missing, surplus and misshapen keys.
        """
        state = read_source(source, torchvision_urls())
        check_kind(state, "torchvision VisionTransformer", {
            "conv_proj.weight": 4, "encoder.pos_embedding": 3, "heads.head.bias": 1,
            "encoder.layers.encoder_layer_0.mlp.0.bias": 1})
        d, in_channels, patch, _ = state["conv_proj.weight"].shape
        n_layer = len({k.split(".")[2] for k in state if k.startswith("encoder.layers.")})
        names = torchvision_names(n_layer)
        ours = from_theirs(state, names)
        if n_head is None:
            n_head = 16 if d == 1280 else max(d // 64, 1)
        config = ViTConfig(
            image_size=patch * math.isqrt(state["encoder.pos_embedding"].shape[1] - 1), patch_size=patch,
            in_channels=in_channels, num_classes=len(ours["head.bias"]), n_layer=n_layer,
            n_head=n_head, d_model=d, d_mlp=len(ours["blocks.0.mlp.up.bias"]))
        with torch.device("meta"):   # sizes without memory; the weights are put in their place below
            model = cls(config)
        load_exactly(model, ours)
        if image_size is not None:
            model.new_size(image_size)
        return model if num_classes is None else model.new_head(num_classes)

    def to_torchvision(self):
        """The weights as a torchvision VisionTransformer state dict: the inverse of from_torchvision."""
        return to_theirs(self.state_dict(), torchvision_names(self.config.n_layer))


def torchvision_urls():
    from torchvision.models import get_model_weights
    return {name: get_model_weights(name).DEFAULT.url
            for name in ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14")}


def torchvision_names(n_layer):
    """(torchvision's key, our keys that are stacked in it, transposed or not) for every weight of a ViT."""
    names = [("class_token", ["class_token"], False), ("encoder.pos_embedding", ["position_embedding"], False)]
    parts = [("conv_proj.", ["patches"]), ("encoder.ln.", ["norm"]), ("heads.head.", ["head"])]
    inside = [("ln_1.", ["norm1"]), ("ln_2.", ["norm2"]), ("mlp.0.", ["mlp.up"]), ("mlp.3.", ["mlp.down"]),
              ("self_attention.in_proj_", ["attention.query", "attention.key", "attention.value"]),
              ("self_attention.out_proj.", ["attention.out"])]
    for i in range(n_layer):
        parts += [(f"encoder.layers.encoder_layer_{i}.{theirs}", [f"blocks.{i}.{o}" for o in ours])
                  for theirs, ours in inside]
    for theirs, ours in parts:
        names += [(theirs + kind, [f"{o}.{kind}" for o in ours], False) for kind in ("weight", "bias")]
    return names
