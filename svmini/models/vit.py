"""Vision Transformer (Dosovitskiy et al., arXiv 2010.11929), with published weights of torchvision, timm, Hugging Face.

A strided convolution embeds the patches. A class token, learned position embeddings, pre-LayerNorm blocks, exact GELU
and a linear classifier on the class token follow.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..errors import InputError
from . import published
from .transformer import Block, check_config, init_linears

# whose code interpolates position embeddings with which arguments of F.interpolate, from old² to new² (all bicubic)
INTERPOLATION = {
    "torchvision": lambda old, new: {"size": new, "align_corners": True},   # interpolate_embeddings
    "timm": lambda old, new: {"size": new, "antialias": True},              # resample_abs_pos_embed
    "huggingface": lambda old, new: {"size": new},                          # interpolate_pos_encoding
    "dino": lambda old, new: {"scale_factor": (new + 0.1) / old},           # interpolate_pos_encoding of DINO, DINOv2
}


@dataclass
class ViTConfig:
    """Sizes of a ViT for square images. Raises InputError for sizes that cannot work.

    d_mlp: width of the MLP; None means 4 * d_model.
    mean, std: per channel, how images are normalized for these weights; None means 0.5. The model itself does not
        normalize. They are for the code that prepares its images (the same fields are in timm's pretrained_cfg).
    position_interpolation: whose rule `set_input_size` follows: torchvision, timm, huggingface or dino.
    layer_norm_eps: 1e-6 in the papers' code and timm, 1e-12 in Hugging Face's ViT.
    """
    image_size: int
    patch_size: int
    in_channels: int
    num_classes: int
    n_layer: int
    n_head: int
    d_model: int
    d_mlp: int | None = None
    dropout: float = 0.0
    mean: tuple | None = None
    std: tuple | None = None
    position_interpolation: str = "torchvision"
    layer_norm_eps: float = 1e-6

    def __post_init__(self):
        if self.d_mlp is None:
            self.d_mlp = 4 * self.d_model
        check_config(self, ("image_size", "patch_size", "in_channels", "num_classes",
                            "n_layer", "n_head", "d_model", "d_mlp"))
        if self.image_size % self.patch_size:
            raise InputError(f"image_size={self.image_size} is not divisible by patch_size={self.patch_size}: "
                             "the patches must tile the image")
        self.mean, self.std = (self.in_channels * (0.5,) if x is None else tuple(x) for x in (self.mean, self.std))
        if not len(self.mean) == len(self.std) == self.in_channels:
            raise InputError(f"mean and std: they need one value for each of the {self.in_channels} channels")


class ViT(nn.Module):
    Config = ViTConfig
    targets = ("query", "key", "value", "out", "up", "down")   # default of adapt: the layers that get an adapter
    also_train = ("head",)                                     # default of adapt: modules that are trained in full

    def __init__(self, config):
        super().__init__()
        self.config = config
        C, P, d = config.in_channels, config.patch_size, config.d_model
        n_patches = (config.image_size // P) ** 2
        self.patch_embed = nn.Conv2d(C, d, kernel_size=P, stride=P)
        self.class_token = nn.Parameter(torch.zeros(1, 1, d))
        self.position_embedding = nn.Parameter(torch.empty(1, 1 + n_patches, d))
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(d, config.n_head, config.d_mlp,
                  causal=False, gelu="none", eps=config.layer_norm_eps, dropout=config.dropout)
            for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(d, eps=config.layer_norm_eps)
        init_linears(self, std=1 / math.sqrt(d))
        nn.init.normal_(self.patch_embed.weight, std=1 / math.sqrt(C * P * P))
        nn.init.zeros_(self.patch_embed.bias)
        nn.init.normal_(self.position_embedding, std=0.02)
        self.reset_classifier(config.num_classes)

    def reset_classifier(self, num_classes):
        """Replace `head` by a classifier for num_classes that starts at zero; returns the model (timm's name)."""
        self.config = replace(self.config, num_classes=num_classes)   # checks num_classes; the caller's stays unchanged
        device, dtype = self.class_token.device, self.class_token.dtype
        self.head = nn.Linear(self.config.d_model, num_classes, device=device, dtype=dtype)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        return self

    def set_input_size(self, image_size):
        """Take images of another size from now on; returns the model (timm's name).

        The patches keep their size, and the grid of position embeddings is interpolated (arXiv 2010.11929, section
        3.2) exactly as the code from which the weights come does it: see config.position_interpolation.
        """
        config = replace(self.config, image_size=image_size)   # checks image_size
        old, new = (c.image_size // c.patch_size for c in (self.config, config))
        if old != new:
            class_token, grid = self.position_embedding.detach().split([1, old * old], dim=1)
            grid = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2)                             # (1, d, old, old)
            grid = F.interpolate(grid.to(torch.promote_types(grid.dtype, torch.float32)), mode="bicubic",
                                 **INTERPOLATION[config.position_interpolation](old, new))       # (1, d, new, new)
            grid = grid.flatten(2).transpose(1, 2).to(class_token.dtype)                         # (1, new * new, d)
            self.position_embedding = nn.Parameter(torch.cat([class_token, grid], dim=1))
        self.config = config
        return self

    def forward(self, images):
        """Map images (B, C, H, W) to logits (B, num_classes). Raises ValueError for images of another size.

        Images in another floating-point dtype than the weights, as the data sets give them, are converted.
        """
        c = self.config
        if images.shape[1:] != (c.in_channels, c.image_size, c.image_size):
            size = f"(B, {c.in_channels}, {c.image_size}, {c.image_size})"
            raise ValueError(f"images of shape {tuple(images.shape)} do not fit: this ViT takes {size}")
        if images.is_floating_point():
            images = images.to(self.class_token.dtype)
        x = self.patch_embed(images).flatten(2).transpose(1, 2)                  # (B, patches, d)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1)       # (B, 1 + patches, d)
        x = self.dropout(x + self.position_embedding)
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x)                                                         # (B, 1 + patches, d)
        x = last(x, queries=1)                                                   # (B, 1, d): of the class token alone
        return self.head(self.norm(x[:, 0]))                                     # (B, num_classes)

    urls = staticmethod(published.vit_urls)   # {name: URL} of the weights that from_pretrained downloads

    @classmethod
    def from_pretrained(cls, source, num_classes=None, n_head=None, image_size=None):
        """Build a ViT with published weights, whose format is recognized by its keys.

        source: a name ("vit_b_16", "dinov2_vits14", "google/vit-base-patch16-224-in21k", ...: ViT.urls() lists them),
            which is downloaded once; a file; or a state dict. The formats are torchvision's, timm's (also DeiT's and
            DINO's), DINOv2's, and Hugging Face's ViT and DINOv2. A prefix such as `vit.` may precede the keys.
        num_classes: size of a new classifier that starts at zero. None keeps the classifier of the weights; if they
            have none, the new one has a single class.
        n_head: number of heads, which weights do not tell. None means 16 for width 1280, otherwise heads of width 64.
        image_size: None keeps the image size of the weights; otherwise `set_input_size` changes it.

        float16 and bfloat16 weights become float32: call `.bfloat16()` on the model to have it in half precision.
        Layer scales (ls1, ls2) are folded into `out` and `down`. config.mean and config.std are those of ImageNet, or
        0.5 for Google's models: those in Hugging Face's format and those with the 21,843 classes of ImageNet-21k.
        config.position_interpolation is that of the format. The keys of DINO are timm's, so a DINO file is taken for
        timm's; the name "dino_vitb16" is not.
        Raises InputError for another format or model, and if keys, shapes or n_head do not fit.
        """
        ours, fields = published.read_pretrained(source, cls.urls(), "ViT")
        d, in_channels, patch_size, _ = published.shape_of(ours, "patch_embed.weight", 4)
        positions, d_mlp = published.shape_of(ours, "position_embedding", 3)[1], len(ours["blocks.0.mlp.up.bias"])
        if published.shape_of(ours, "blocks.0.mlp.down.weight", 2)[1] * 2 == d_mlp:
            raise InputError("this ViT has a SwiGLU MLP, which svmini does not support")
        zeros = ours["class_token"].new_zeros
        ours = {"head.weight": zeros(1, d), "head.bias": zeros(1)} | ours
        if len(ours["head.bias"]) == 21843 or in_channels != 3:
            fields = fields | {"mean": None, "std": None}
        image_size_of_weights = patch_size * math.isqrt(max(positions - 1, 1))
        config = ViTConfig(image_size_of_weights, patch_size, in_channels, num_classes=len(ours["head.bias"]),
                           n_layer=published.count_blocks(ours), d_model=d, d_mlp=d_mlp, **fields,
                           n_head=16 if n_head is None and d == 1280 else published.infer_n_head(d, n_head))
        model = published.build(cls, config, ours)
        if image_size is not None:
            model.set_input_size(image_size)
        return model if num_classes is None else model.reset_classifier(num_classes)

    def to_torchvision(self):
        """Return the weights as a torchvision VisionTransformer's state dict; `from_pretrained` reads it back.

        Raises InputError that names every tensor for which torchvision has no place.
        """
        return published.convert_to(self.state_dict(), "torchvision")
