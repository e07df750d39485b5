"""The transformer that GPT and ViT share: attention, MLP and the pre-LayerNorm block.

Vaswani et al., arXiv 1706.03762, with LayerNorm before each part instead of after it (GPT-2, ViT).
Query, key, value and out are separate nn.Linears, so that a method can adapt each of them alone.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..errors import InputError


class Attention(nn.Module):
    """Multi-head self-attention: softmax(q kᵀ / √d_head) v, head by head, then `out`."""

    def __init__(self, d_model, n_head, causal, dropout=0.0):
        super().__init__()
        self.query = nn.Linear(d_model, d_model)
        self.key = nn.Linear(d_model, d_model)
        self.value = nn.Linear(d_model, d_model)
        self.out = nn.Linear(d_model, d_model)
        self.n_head, self.causal, self.dropout = n_head, causal, dropout

    def forward(self, x, cache=None):
        B, T, d = x.shape

        def heads(y):
            return y.view(B, y.shape[1], self.n_head, d // self.n_head).transpose(1, 2)   # (B, heads, T, d_head)

        q, k, v = self.query(x), self.key(x), self.value(x)                      # (B, T, d)
        if cache is None:
            rule = {"is_causal": self.causal, "dropout_p": self.dropout if self.training else 0.0}
        else:
            k, v = cache.add(self, k, v)                                         # (B, S, d): of all that was read
            rule = {"attn_mask": cache.seen}                                     # (B, 1, T, S)
        y = F.scaled_dot_product_attention(heads(q), heads(k), heads(v), **rule)   # (B, heads, T, d_head)
        return self.out(y.transpose(1, 2).reshape(B, T, d))                      # (B, T, d)


class KVCache:
    """Keys and values of the tokens that a causal model has read: each token then goes through the model only once.

    The rows of a batch may be of different lengths. The next token of row i stands at position lengths[i], and its
    key and value are kept there. A token at position p sees those at 0 to p; what padding left behind row i's end
    is not seen, and is overwritten. size: the most tokens of a row. For evaluation: there is no dropout.
    """

    def __init__(self, size):
        self.size, self.used = size, 0    # places in a row: that there are, that the longest row has filled
        self.lengths = 0                  # (B,) after the first tokens
        self.kept = {}                    # {Attention: [keys (B, size, d), values (B, size, d)]}

    def place(self, B, T, device):
        """Positions (B, T) of the next T tokens of each row."""
        self.used = min(self.used + T, self.size)
        start = torch.zeros(B, dtype=torch.int64, device=device) + self.lengths                       # (B,)
        self.at = start[:, None] + torch.arange(T, device=device)                                     # (B, T)
        self.seen = torch.arange(self.used, device=device) <= self.at[:, None, :, None]               # (B, 1, T, S)
        return self.at

    def add(self, layer, *new):
        """Keep a layer's keys and values (B, T, d) at the places last given; returns all it has, (B, S, d) each."""
        if layer not in self.kept:
            self.kept[layer] = [y.new_zeros(len(y), self.size, y.shape[-1]) for y in new]
        rows = torch.arange(len(self.at), device=self.at.device)[:, None]                             # (B, 1)
        for kept, y in zip(self.kept[layer], new):
            kept[rows, self.at] = y
        return [kept[:, :self.used] for kept in self.kept[layer]]

    def keep(self, rows):
        """Go on with these rows alone, a list of their numbers."""
        self.lengths = self.lengths[rows]
        self.kept = {layer: [y[rows] for y in both] for layer, both in self.kept.items()}


class MLP(nn.Module):
    """down(gelu(up(x)))."""

    def __init__(self, d_model, d_mlp, gelu):
        super().__init__()
        self.up = nn.Linear(d_model, d_mlp)
        self.down = nn.Linear(d_mlp, d_model)
        self.gelu = nn.GELU(approximate=gelu)

    def forward(self, x):
        return self.down(self.gelu(self.up(x)))                                  # (B, T, d)


class Block(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)); shapes (B, T, d) in and out.

    causal: a token sees only itself and those before it.  gelu: "tanh" (GPT-2) or "none" (exact, ViT).
    eps: of the LayerNorms, 1e-5 in GPT-2 and 1e-6 in ViT.  cache: keys and values of the tokens before these.
    """

    def __init__(self, d_model, n_head, d_mlp, *, causal, gelu, eps, dropout=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(d_model, eps=eps)
        self.attention = Attention(d_model, n_head, causal, dropout)
        self.norm2 = nn.LayerNorm(d_model, eps=eps)
        self.mlp = MLP(d_model, d_mlp, gelu)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, cache=None):
        x = x + self.dropout(self.attention(self.norm1(x), cache))
        return x + self.dropout(self.mlp(self.norm2(x)))


def init_linears(module, std, n_layer=None):
    """Draw every nn.Linear weight from N(0, std²) and set its bias to 0, from torch's global generator.

    With n_layer, the two maps that end in the residual stream, `out` and `down`, get std / √(2 n_layer), so that
    the sum of 2 n_layer of them keeps its size (GPT-2).
    """
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            ends_in_stream = n_layer and name.rsplit(".", 1)[-1] in ("out", "down")
            nn.init.normal_(part.weight, std=std / math.sqrt(2 * n_layer) if ends_in_stream else std)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def check_config(config, whole):
    """Raise InputError unless the fields named in `whole` are positive whole numbers and d_model is divisible by
    n_head: what GPTConfig and ViTConfig have in common."""
    for name in whole:
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{name} must be a whole number of at least 1, not {value!r}")
    if config.d_model % config.n_head:
        raise InputError(f"d_model={config.d_model} is not divisible by n_head={config.n_head}: "
                         "every head takes an equal share of the width")
