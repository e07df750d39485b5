"""svmini: fine-tuning with singular values (SVFit and SVFT), with LoRA, DoRA, VeRA and BOFT as baselines."""

from .adapter_file import load_adapter, save_adapter
from .adapting import adapt, count_trainable, merge
from .methods import METHODS
from .models.gpt import GPT, GPTConfig
from .models.vit import ViT, ViTConfig

__all__ = ["GPT", "GPTConfig", "ViT", "ViTConfig", "METHODS", "adapt", "merge", "count_trainable",
           "save_adapter", "load_adapter"]
