"""Vision Transformer (Dosovitskiy et al., arXiv 2010.11929), and its weights in torchvision's and timm's naming.

Patches by a strided convolution, a class token, learned positions, pre-LayerNorm blocks with eps 1e-6, exact GELU,
and a linear head on the class token.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..errors import InputError
from . import published
from .transformer import Block, check_config, init_linears


@dataclass
class ViTConfig:
    """Sizes of a ViT for square images; d_mlp=None means 4 * d_model. Raises InputError for sizes that cannot work.

    mean, std: of each channel of the pictures that the weights expect, None for 0.5. They are a note for those who
    prepare pictures: the model takes them as they come.
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
            raise InputError(f"mean={self.mean} and std={self.std} do not fit: a number each for every one of "
                             f"{self.in_channels} channels")


class ViT(nn.Module):
    Config = ViTConfig
    targets = ("query", "key", "value", "out", "up", "down")   # the layers that are adapted where nothing is said
    also_train = ("head",)                                     # and the parts that are then trained whole

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
            Block(d, config.n_head, config.d_mlp, causal=False, gelu="none", eps=1e-6, dropout=config.dropout)
            for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(d, eps=1e-6)
        init_linears(self, std=1 / math.sqrt(d))
        nn.init.normal_(self.patch_embed.weight, std=1 / math.sqrt(C * P * P))
        nn.init.zeros_(self.patch_embed.bias)
        nn.init.normal_(self.position_embedding, std=0.02)
        self.reset_classifier(config.num_classes)

    def reset_classifier(self, num_classes):
        """Put a fresh linear classifier of zeros in place, as a new task needs it; returns the model."""
        self.config = replace(self.config, num_classes=num_classes)   # checks it; the caller's stays as it is
        device, dtype = self.class_token.device, self.class_token.dtype
        self.head = nn.Linear(self.config.d_model, num_classes, device=device, dtype=dtype)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        return self

    def set_input_size(self, image_size):
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
        if images.shape[1:] != (c.in_channels, c.image_size, c.image_size):
            raise ValueError(f"images of shape {tuple(images.shape)} do not fit: this ViT takes "
                             f"(B, {c.in_channels}, {c.image_size}, {c.image_size})")
        x = self.patch_embed(images).flatten(2).transpose(1, 2)                      # (B, patches, d)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1)       # (B, 1 + patches, d)
        x = self.dropout(x + self.position_embedding)
        for block in self.blocks:
            x = block(x)                                                         # (B, 1 + patches, d)
        return self.head(self.norm(x[:, 0]))                                     # (B, num_classes)

    @staticmethod
    def urls():
        """{name: address} of the published weights that are downloaded when they are asked for by name."""
        return published.torchvision_urls() | published.TIMM_URLS

    @classmethod
    def from_state(cls, state, n_head=None):
        """A ViT from a published model's state dict, in torchvision's or timm's naming: its keys tell which.
        Raises InputError where it is neither."""
        torchvisions = published.format_of(state) == "torchvision"
        return (cls.from_torchvision if torchvisions else cls.from_timm)(state, n_head=n_head)

    @classmethod
    def from_torchvision(cls, source, num_classes=None, n_head=None, image_size=None):
        """A ViT with the weights of a torchvision VisionTransformer.

        source: "vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32" or "vit_h_14" (downloaded once), a file, or a state
        dict, with a head or without. num_classes: a fresh head for another task; None keeps theirs, or where there
        is none makes one of a single class. n_head: None for the published models' (16 at width 1280, else heads of
        width 64); a state dict does not tell. image_size: None for theirs. config.mean and std are ImageNet's.
        Raises InputError that lists missing, surplus and misshapen keys, or asks for n_head.
        """
        state = published.read_source(source, published.torchvision_urls())
        published.check_format(state, "torchvision")
        n_layer = len({k.split(".")[2] for k in state if k.startswith("encoder.layers.")})
        state = with_head(state, "heads.head", state["conv_proj.weight"])
        ours = published.convert_from(state, published.torchvision_format(n_layer))
        return cls._of(ours, n_layer, num_classes, n_head, image_size, published.IMAGENET)

    @classmethod
    def from_timm(cls, source, num_classes=None, n_head=None, image_size=None):
        """A ViT with weights in timm's naming, which DeiT, DINO and DINOv2 have too.

        source: "dinov2_vits14", "dinov2_vitb14", "dino_vitb16", "vit_base_patch16_224.augreg_in21k" (downloaded
        once), a file, or a state dict. The rest as in from_torchvision. Layer scales (ls1, ls2) are folded into `out`
        and `down`; DINOv2's mask_token, of its training alone, is left out. config.mean and std are ImageNet's, but
        0.5 where the head has the 21,843 classes of ImageNet-21k, as Google's models were trained.
        """
        state = dict(published.read_source(source, published.TIMM_URLS))
        published.check_format(state, "timm")
        state.pop("mask_token", None)
        n_layer = len({k.split(".")[1] for k in state if k.startswith("blocks.")})
        scaled = any(k.endswith((".ls1.gamma", ".ls2.gamma")) for k in state)
        state = with_head(state, "head", state["patch_embed.proj.weight"])
        ours = published.convert_from(state, published.timm_format(n_layer, scaled))
        scales = {k: ours.pop(k) for k in list(ours) if k.endswith((".ls1", ".ls2"))}
        expects = {} if len(ours["head.bias"]) == 21843 else published.IMAGENET
        model = cls._of(ours, n_layer, num_classes, n_head, image_size, expects)
        for key, gamma in scales.items():                        # ls1 and ls2 of each block: γ * (W x + b)
            _, i, scale = key.split(".")
            block = model.blocks[int(i)]
            linear = block.attention.out if scale == "ls1" else block.mlp.down
            linear.weight.data *= gamma[:, None]
            linear.bias.data *= gamma
        return model

    @classmethod
    def _of(cls, ours, n_layer, num_classes, n_head, image_size, expects):
        """A ViT of weights in our naming; expects: mean and std, where the pictures have three channels."""
        d, in_channels, patch, _ = ours["patch_embed.weight"].shape
        config = ViTConfig(
            image_size=patch * math.isqrt(ours["position_embedding"].shape[1] - 1), patch_size=patch,
            in_channels=in_channels, num_classes=len(ours["head.bias"]), n_layer=n_layer,
            n_head=16 if n_head is None and d == 1280 else published.heads_of(d, n_head), d_model=d,
            d_mlp=len(ours["blocks.0.mlp.up.bias"]), **expects if in_channels == 3 else {})
        model = published.built(cls, config, ours)
        if image_size is not None:
            model.set_input_size(image_size)
        return model if num_classes is None else model.reset_classifier(num_classes)

    def to_torchvision(self):
        """The weights as a torchvision VisionTransformer state dict: the inverse of from_torchvision.

        Raises InputError that names every tensor for which torchvision has no place.
        """
        return published.convert_to(self.state_dict(), published.torchvision_format(self.config.n_layer))


def with_head(state, name, patches):
    """A state dict with a head called `name`: of zeros, for one class, where it has none. patches: (d, C, P, P)."""
    if any(k.startswith(f"{name}.") for k in state):
        return state
    return state | {f"{name}.weight": patches.new_zeros(1, len(patches)), f"{name}.bias": patches.new_zeros(1)}
