"""The transformer that GPT and ViT share: multi-head attention, the MLP and the pre-LayerNorm block.

Vaswani et al., arXiv 1706.03762, with the LayerNorm before each sublayer (GPT-2, ViT) instead of after it.
Query, key, value and out are separate nn.Linear layers, so that each can be adapted on its own.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..errors import InputError


class Attention(nn.Module):
    """Multi-head self-attention: softmax(q kᵀ / √d_head) v in each head, then the linear layer `out`.

    causal: whether a token attends only to itself and earlier tokens.
    """

    def __init__(self, d_model, n_head, causal, dropout=0.0):
        super().__init__()
        self.query = nn.Linear(d_model, d_model)
        self.key = nn.Linear(d_model, d_model)
        self.value = nn.Linear(d_model, d_model)
        self.out = nn.Linear(d_model, d_model)
        self.n_head, self.causal, self.dropout = n_head, causal, dropout

    def forward(self, x, cache=None, queries=None):
        """Map x (B, T, d) to (B, T, d), or to (B, queries, d) for the first `queries` tokens alone.

        cache: a KVCache; its tokens come before those of x.
        """
        B, _, d = x.shape

        def split_heads(y):
            return y.view(B, y.shape[1], self.n_head, d // self.n_head).transpose(1, 2)   # (B, heads, T, d_head)

        q = self.query(x[:, :queries])                                           # (B, queries or T, d)
        k, v = self.key(x), self.value(x)                                        # (B, T, d)
        if cache is None:
            options = {"is_causal": self.causal, "dropout_p": self.dropout if self.training else 0.0}
        else:
            k, v = cache.update(self, k, v)                                      # (B, S, d), S tokens so far
            options = {"attn_mask": cache.mask}                                  # (B, 1, T, S)
        y = F.scaled_dot_product_attention(split_heads(q), split_heads(k), split_heads(v), **options)
        return self.out(y.transpose(1, 2).reshape(B, -1, d))                     # (B, queries or T, d)


class KVCache:
    """The keys and values of all tokens that a causal model has read, so that it reads each token only once.

    The rows of a batch can have different lengths. The next token of row i is at position lengths[i], and that is
    where its key and value are stored. A token at position p attends to positions 0 to p. Padding at the end of a
    shorter row is stored as well, but no later token attends to it, and the next tokens overwrite it.

    size: the largest number of tokens in a row. The cache is for evaluation: attention with it has no dropout.
    """

    def __init__(self, size):
        self.size = size
        self.used = 0         # positions that are filled in the longest row
        self.lengths = 0      # tokens in each row, (B,) once there are any
        self.stored = {}      # {Attention: [keys (B, size, d), values (B, size, d)]}

    def next_positions(self, B, T, device):
        """Return the positions (B, T) of the next T tokens of each row, and expect these tokens in `update`."""
        self.used = min(self.used + T, self.size)
        start = torch.zeros(B, dtype=torch.int64, device=device) + self.lengths                       # (B,)
        self.positions = start[:, None] + torch.arange(T, device=device)                              # (B, T)
        self.mask = torch.arange(self.used, device=device) <= self.positions[:, None, :, None]        # (B, 1, T, S)
        return self.positions

    def update(self, layer, *new):
        """Store a layer's keys and values (B, T, d) of the next tokens; return those of all tokens, (B, S, d) each."""
        if layer not in self.stored:
            self.stored[layer] = [y.new_zeros(len(y), self.size, y.shape[-1]) for y in new]
        rows = torch.arange(len(self.positions), device=self.positions.device)[:, None]               # (B, 1)
        for stored, y in zip(self.stored[layer], new):
            stored[rows, self.positions] = y
        return [stored[:, :self.used] for stored in self.stored[layer]]

    def select_rows(self, rows):
        """Keep only these rows, a list of indices."""
        self.lengths = self.lengths[rows]
        self.stored = {layer: [y[rows] for y in both] for layer, both in self.stored.items()}


class MLP(nn.Module):
    """Two linear layers: down(gelu(up(x)))."""

    def __init__(self, d_model, d_mlp, gelu):
        super().__init__()
        self.up = nn.Linear(d_model, d_mlp)
        self.down = nn.Linear(d_mlp, d_model)
        self.gelu = nn.GELU(approximate=gelu)

    def forward(self, x):
        return self.down(self.gelu(self.up(x)))                                  # (B, T, d)


class Block(nn.Module):
    """One pre-LayerNorm block: x + attention(norm1(x)), then x + mlp(norm2(x)), both (B, T, d).

    forward takes Attention's `cache` and `queries`.
    causal: whether a token attends only to itself and earlier tokens.
    gelu: "tanh" for GPT-2's approximation, "none" for the exact function (ViT).
    eps: of the LayerNorms, 1e-5 in GPT-2 and 1e-6 in most ViTs.
    """

    def __init__(self, d_model, n_head, d_mlp, *, causal, gelu, eps, dropout=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(d_model, eps=eps)
        self.attention = Attention(d_model, n_head, causal, dropout)
        self.norm2 = nn.LayerNorm(d_model, eps=eps)
        self.mlp = MLP(d_model, d_mlp, gelu)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, cache=None, queries=None):
        x = x[:, :queries] + self.dropout(self.attention(self.norm1(x), cache, queries))
        return x + self.dropout(self.mlp(self.norm2(x)))


def init_linears(module, std, n_layer=None):
    """Draw the weight of every nn.Linear from N(0, std²) with torch's global generator and set its bias to zero.

    n_layer: if given, the two layers that write to the residual stream, `out` and `down`, get std / √(2 n_layer),
        so that the sum of 2 n_layer such layers keeps its variance (GPT-2).
    """
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            ends_in_stream = n_layer and name.rsplit(".", 1)[-1] in ("out", "down")
            nn.init.normal_(part.weight, std=std / math.sqrt(2 * n_layer) if ends_in_stream else std)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def check_config(config, sizes):
    """Check a GPTConfig or ViTConfig: the fields in `sizes` must be positive integers and n_head must divide d_model.

    Raises InputError.
    """
    for name in sizes:
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{name} must be an integer of at least 1, not {value!r}")
    if config.d_model % config.n_head:
        raise InputError(f"d_model={config.d_model} is not divisible by n_head={config.n_head}: "
                         "all heads have the same width")
