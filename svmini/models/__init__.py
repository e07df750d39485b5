"""The models: GPT and ViT, on one transformer, and published weights for both."""

from .gpt import GPT, GPTConfig
from .vit import ViT, ViTConfig

__all__ = ["GPT", "GPTConfig", "ViT", "ViTConfig"]
