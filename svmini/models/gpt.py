"""GPT as in GPT-2 (Radford et al. 2019), with weights from and to Hugging Face's GPT-2.

Learned position embeddings, pre-LayerNorm blocks with eps 1e-5, tanh GELU, and a head that is tied to the token
embedding.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from ..errors import InputError
from . import published
from .transformer import Block, KVCache, check_config, init_linears


@dataclass
class GPTConfig:
    """Sizes of a GPT; the width of its MLP is 4 * d_model. Raises InputError for sizes that cannot work."""
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
    targets = ("query", "key", "value", "out", "up", "down")   # default of adapt: the layers that get an adapter
    also_train = ()                                            # default of adapt: modules that are trained in full

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
        # 0.02 is GPT-2's at width 768; scaled to other widths, because width 128 does not learn addition with 0.02
        std = 0.02 * (768 / config.d_model) ** 0.5
        init_linears(self, std, n_layer=config.n_layer)
        nn.init.normal_(self.token_embedding.weight, std=std)
        nn.init.normal_(self.position_embedding.weight, std=std)
        self.head.weight = self.token_embedding.weight   # weight tying, as in GPT-2

    def forward(self, tokens, last_positions=None, cache=None):
        """Map tokens (B, T) int64 to logits (B, T, vocab_size). Raises ValueError if T exceeds block_size.

        last_positions: (B,) int64, one position in each row. If given, only the logits at these positions are
            computed, (B, vocab_size). The logits at all positions are by far the largest tensor of a forward pass:
            gigabytes for GPT-2's vocabulary.
        cache: a KVCache with the tokens that come before these. These tokens are added to it. With last_positions, a
            row ends at its last position, and the tokens after it are padding.
        """
        B, T = tokens.shape
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens do not fit into the model's context of block_size={self.config.block_size}")
        device = tokens.device
        positions = torch.arange(T, device=device) if cache is None else cache.next_positions(B, T, device)
        x = self.dropout(self.token_embedding(tokens) + self.position_embedding(positions))   # (B, T, d)
        for block in self.blocks:
            x = block(x, cache)                                                  # (B, T, d)
        if cache is not None:
            cache.lengths = cache.lengths + (T if last_positions is None else last_positions + 1)
        if last_positions is not None:
            x = x[torch.arange(B, device=device), last_positions]                # (B, d)
        return self.head(self.norm(x))                                           # (B, T, vocab) or (B, vocab)

    @torch.no_grad()
    def generate(self, tokens, max_new_tokens, temperature=1.0, top_k=None, generator=None):
        """Continue tokens (B, T) int64, T >= 1, by max_new_tokens; return (B, T + max_new_tokens).

        Each new token is sampled from softmax(logits / temperature), restricted to the top_k most likely tokens if
        top_k is given. Temperature 0 (or below 1e-6) always takes the most likely token (greedy decoding). The model
        sees the last block_size tokens.
        """
        context, was_training = self.config.block_size, self.training
        unread, cache = tokens[:, -context:], KVCache(min(tokens.shape[1] + max_new_tokens, context))
        self.eval()
        for _ in range(max_new_tokens):
            last = torch.full((len(unread),), unread.shape[1] - 1, device=unread.device)      # (B,)
            logits = self(unread, last_positions=last, cache=cache).float()                   # (B, vocab)
            if temperature < 1e-6:
                new = logits.argmax(dim=-1, keepdim=True)                                     # (B, 1)
            else:
                logits = logits / temperature
                if top_k is not None:
                    least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]          # (B, 1)
                    logits = logits.masked_fill(logits < least, float("-inf"))
                new = torch.multinomial(F.softmax(logits, dim=-1), 1, generator=generator)    # (B, 1)
            tokens = torch.cat([tokens, new], dim=1)
            if tokens.shape[1] <= context:
                unread = new
            else:   # the context is full: the window moves by one, which changes the position of every token in it
                unread, cache = tokens[:, -context:], None
        self.train(was_training)
        return tokens

    @torch.no_grad()
    def generate_greedy(self, prompts, max_new_tokens, end=None, batch_size=64):
        """Continue each prompt greedily; return a list of (at most max_new_tokens,) int64 tensors on the CPU.

        prompts: a sequence of (T,) int64 tensors, T >= 1, which can have different lengths. In a batch they are padded
            on the right, and the logits are read at the last token of each.
        end: a token after which a continuation ends. It also ends when the context is full, so a prompt that is longer
            than the context gets an empty one.
        """
        answers = [[] for _ in prompts]
        context, was_training, device = self.config.block_size, self.training, self.head.weight.device

        def has_room(i):
            return len(answers[i]) < max_new_tokens and len(prompts[i]) + len(answers[i]) <= context

        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))   # similar lengths together: little padding
        self.eval()
        for first in range(0, len(order), batch_size):
            active = [i for i in order[first:first + batch_size] if has_room(i)]
            if not active:
                continue
            tokens = pad_sequence([prompts[i] for i in active], batch_first=True).to(device)             # (B, T)
            last = torch.tensor([len(prompts[i]) - 1 for i in active], device=device)                    # (B,)
            cache = KVCache(min(tokens.shape[1] + max_new_tokens, context))
            while active:
                new = self(tokens, last_positions=last, cache=cache).argmax(dim=-1)                      # (B,)
                for i, token in zip(active, new.tolist()):
                    answers[i].append(token)
                rows = [row for row, i in enumerate(active) if has_room(i) and answers[i][-1] != end]
                if len(rows) < len(active):
                    active, new = [active[row] for row in rows], new[rows]
                    cache.select_rows(rows)
                tokens, last = new[:, None], torch.zeros_like(new)                                       # (B, 1), (B,)
        self.train(was_training)
        return [torch.tensor(answer, dtype=torch.int64) for answer in answers]

    urls = staticmethod(lambda: published.GPT2_URLS)   # {name: URL} of the weights that from_pretrained downloads

    @classmethod
    def from_pretrained(cls, source, n_head=None):
        """Build a GPT with the weights of a Hugging Face GPT-2.

        source: "gpt2", "gpt2-medium", "gpt2-large" or "gpt2-xl" (downloaded once), a file, or a state dict, with or
            without the prefix `transformer.`.
        n_head: number of heads, which weights do not tell. None means heads of width 64, as in every published GPT-2.

        float16 and bfloat16 weights become float32: call `.bfloat16()` on the model to have it in half precision.
        Raises InputError for another format or model, and if keys, shapes or n_head do not fit.
        """
        ours, _ = published.read_pretrained(source, cls.urls(), "GPT")
        vocab_size, d_model = published.shape_of(ours, "token_embedding.weight", 2)
        embedding = ours["token_embedding.weight"]
        head = ours.setdefault("head.weight", embedding)
        if head is not embedding and not torch.equal(head, embedding):
            raise InputError("lm_head.weight differs from wte.weight: in this GPT the head is the token embedding")
        config = GPTConfig(vocab_size, len(ours["position_embedding.weight"]), published.count_blocks(ours),
                           published.infer_n_head(d_model, n_head), d_model)
        model = published.build(cls, config, ours)
        model.head.weight = model.token_embedding.weight
        return model

    def to_gpt2(self):
        """Return the weights as a Hugging Face GPT-2 state dict, with the prefix `transformer.` and `lm_head.weight`.

        Raises InputError that names every tensor for which GPT-2 has no place.
        """
        head, embedding = self.head.weight, self.token_embedding.weight
        if head is not embedding and not torch.equal(head, embedding):
            raise InputError("head.weight differs from token_embedding.weight: GPT-2 has one tensor for both")
        state = published.convert_to(self.state_dict(), "GPT-2")
        state = {f"transformer.{key}": value for key, value in state.items() if key != "lm_head.weight"}
        return state | {"lm_head.weight": state["transformer.wte.weight"]}
