"""svmini: fine-tuning by singular values, SVFit and SVFT, next to the methods they are compared with."""

from .adapter import METHODS, adapt, count_trainable, load_adapter, merge, save_adapter
from .gpt import GPT, GPTConfig
from .vit import ViT, ViTConfig

# one line a method: its word, and the class that does it
from .svfit import SVFit; METHODS["svfit"] = SVFit   # noqa: E702
from .svft import SVFT; METHODS["svft"] = SVFT       # noqa: E702
from .lora import LoRA; METHODS["lora"] = LoRA       # noqa: E702
from .dora import DoRA; METHODS["dora"] = DoRA       # noqa: E702
from .vera import VeRA; METHODS["vera"] = VeRA       # noqa: E702
from .boft import BOFT; METHODS["boft"] = BOFT       # noqa: E702

__all__ = ["GPT", "GPTConfig", "ViT", "ViTConfig", "METHODS", "adapt", "merge", "count_trainable",
           "save_adapter", "load_adapter"]
