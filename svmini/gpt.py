"""GPT as in GPT-2 (Radford et al. 2019), and its weights from and to the naming of Hugging Face's GPT-2.

Learned positions, pre-LayerNorm blocks with eps 1e-5, tanh GELU, and a head that is the token embedding again.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from .transformer import Block, check_config, init_linears
from .weights import check_kind, from_theirs, load_exactly, read_source, to_theirs


@dataclass
class GPTConfig:
    """Sizes of a GPT; the MLP is 4 * d_model wide. Raises ValueError for sizes that cannot work."""
    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    d_model: int
    dropout: float = 0.0

    def __post_init__(self):
        check_config(self, ("vocab_size", "block_size", "n_layer", "n_head", "d_model"))


class GPT(nn.Module):
    Config = GPTConfig

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position_embedding = nn.Embedding(config.block_size, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(config.d_model, config.n_head, 4 * config.d_model,
                  causal=True, gelu="tanh", eps=1e-5, dropout=config.dropout)
            for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.d_model, eps=1e-5)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        # GPT-2's 0.02 at its width 768, and its like at others: addition is not learned with 0.02 at width 128
        std = 0.02 * (768 / config.d_model) ** 0.5
        init_linears(self, std, n_layer=config.n_layer)
        nn.init.normal_(self.token_embedding.weight, std=std)
        nn.init.normal_(self.position_embedding.weight, std=std)
        self.head.weight = self.token_embedding.weight   # tied: one matrix reads and writes tokens

    def forward(self, tokens, at=None):
        """tokens (B, T) int64 -> logits (B, T, vocab_size). Raises ValueError where T exceeds block_size.

        at (B,) int64: one position of each row, for the logits there alone, (B, vocab_size). The logits of all
        positions are by far the largest tensor: gigabytes for GPT-2's vocabulary.
        """
        if tokens.dim() != 2:
            raise ValueError(f"tokens of shape {tuple(tokens.shape)} do not fit: GPT takes (B, T)")
        B, T = tokens.shape
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens do not fit into the model's context of block_size={self.config.block_size}")
        positions = torch.arange(T, device=tokens.device)
        x = self.dropout(self.token_embedding(tokens) + self.position_embedding(positions))   # (B, T, d)
        for block in self.blocks:
            x = block(x)                                                                      # (B, T, d)
        if at is not None:
            if at.shape != (B,):
                raise ValueError(f"at of shape {tuple(at.shape)} does not fit: one position for each of {B} rows")
            x = x[torch.arange(B, device=x.device), at]                                       # (B, d)
        return self.head(self.norm(x))                                           # (B, T, vocab), or (B, vocab)

    @torch.no_grad()
    def generate(self, tokens, max_new_tokens, temperature=1.0, top_k=None, generator=None):
        """Continue tokens (B, T) int64 by max_new_tokens; returns (B, T + max_new_tokens).

        Each token is drawn from softmax(logits / temperature), from the top_k likeliest where top_k is given;
        temperature 0 (or below 1e-6) takes the likeliest (greedy). What lies further back than block_size is not seen.
        Raises ValueError for an empty prompt, a negative temperature or a top_k below 1.
        """
        if tokens.dim() != 2 or tokens.shape[1] == 0:
            raise ValueError(f"a prompt is (B, T) tokens with T of at least 1, not of shape {tuple(tokens.shape)}")
        if temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or above, not {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {top_k}")
        was_training = self.training
        self.eval()
        try:
            for _ in range(max_new_tokens):
                seen = tokens[:, -self.config.block_size:]
                last = torch.full((len(seen),), seen.shape[1] - 1, device=seen.device)            # (B,)
                logits = self(seen, at=last).float()                                              # (B, vocab)
                if temperature < 1e-6:
                    new = logits.argmax(dim=-1, keepdim=True)                                     # (B, 1)
                else:
                    logits = logits / temperature
                    if top_k is not None:
                        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]          # (B, 1)
                        logits = logits.masked_fill(logits < least, float("-inf"))
                    new = torch.multinomial(F.softmax(logits, dim=-1), 1, generator=generator)    # (B, 1)
                tokens = torch.cat([tokens, new], dim=1)
        finally:
            self.train(was_training)
        return tokens

    @classmethod
    def from_gpt2(cls, source, n_head=None):
        """A GPT with GPT-2's weights.

        source: "gpt2", "gpt2-medium", "gpt2-large" or "gpt2-xl" (downloaded once), a file, or a Hugging Face
        GPT-2 state dict, with or without the `transformer.` prefix. n_head: None for heads of width 64, as in
        every published GPT-2; a state dict does not tell. Raises ValueError that lists missing, surplus and
        misshapen keys.
        """
        state = {k.removeprefix("transformer."): v for k, v in read_source(source, GPT2_URLS).items()}
        # causal masks that older files carry
        state = {k: v for k, v in state.items() if not k.endswith((".attn.bias", ".attn.masked_bias"))}
        check_kind(state, "GPT-2", {"wte.weight": 2, "wpe.weight": 2, "h.0.attn.c_attn.weight": 2})
        head = state.pop("lm_head.weight", None)
        if head is not None and not torch.equal(head, state["wte.weight"]):
            raise ValueError("lm_head.weight differs from wte.weight: in this GPT the head is the token embedding")
        vocab_size, d_model = state["wte.weight"].shape
        n_layer = len({k.split(".")[1] for k in state if k.startswith("h.")})
        if n_head is None:
            n_head = max(d_model // 64, 1)
        config = GPTConfig(vocab_size, len(state["wpe.weight"]), n_layer, n_head, d_model)
        with torch.device("meta"):   # sizes without memory; the weights are put in their place below
            model = cls(config)
        ours = from_theirs(state, gpt2_names(n_layer))
        load_exactly(model, ours | {"head.weight": ours["token_embedding.weight"]})
        model.head.weight = model.token_embedding.weight
        return model

    def to_gpt2(self):
        """The weights as a Hugging Face GPT-2 state dict, the `transformer.` prefix and `lm_head.weight` included."""
        state = to_theirs(self.state_dict(), gpt2_names(self.config.n_layer))
        state = {f"transformer.{k}": v for k, v in state.items()}
        return state | {"lm_head.weight": state["transformer.wte.weight"]}


GPT2_URLS = {name: f"https://huggingface.co/{name}/resolve/main/pytorch_model.bin"
             for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}


def gpt2_names(n_layer):
    """(GPT-2's key, our keys that are stacked in it, transposed or not) for every weight of a GPT-2."""
    names = [("wte.weight", ["token_embedding.weight"], False), ("wpe.weight", ["position_embedding.weight"], False),
             ("ln_f.weight", ["norm.weight"], False), ("ln_f.bias", ["norm.bias"], False)]
    parts = [("ln_1", ["norm1"]), ("ln_2", ["norm2"]), ("mlp.c_fc", ["mlp.up"]), ("mlp.c_proj", ["mlp.down"]),
             ("attn.c_attn", ["attention.query", "attention.key", "attention.value"]),
             ("attn.c_proj", ["attention.out"])]
    for i in range(n_layer):
        for theirs, ours in parts:
            for kind in ("weight", "bias"):
                # Conv1D, which GPT-2 uses for its linear maps, holds the transpose of nn.Linear's weight
                transposed = ".c_" in theirs and kind == "weight"
                names.append((f"h.{i}.{theirs}.{kind}", [f"blocks.{i}.{o}.{kind}" for o in ours], transposed))
    return names
