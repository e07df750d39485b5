"""GPT as in GPT-2 (Radford et al. 2019), and its weights from and to the naming of Hugging Face's GPT-2.

Learned positions, pre-LayerNorm blocks with eps 1e-5, tanh GELU, and a head that is the token embedding again.
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
    """Sizes of a GPT; the MLP is 4 * d_model wide. Raises InputError for sizes that cannot work."""
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
    targets = ("query", "key", "value", "out", "up", "down")   # the layers that are adapted where nothing is said
    also_train = ()                                            # and the parts that are then trained whole

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

    def forward(self, tokens, last_positions=None, cache=None):
        """tokens (B, T) int64 -> logits (B, T, vocab_size). Raises ValueError where T exceeds block_size.

        last_positions (B,) int64: one position of each row, for the logits there alone, (B, vocab_size). The logits of all
        positions are by far the largest tensor: gigabytes for GPT-2's vocabulary.
        cache: a KVCache of the tokens before these. These are added to it, of each row as far as `last_positions`: what follows
        is padding.
        """
        B, T = tokens.shape
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens do not fit into the model's context of block_size={self.config.block_size}")
        device = tokens.device
        positions = torch.arange(T, device=device) if cache is None else cache.place(B, T, device)   # (T,) or (B, T)
        x = self.dropout(self.token_embedding(tokens) + self.position_embedding(positions))   # (B, T, d)
        for block in self.blocks:
            x = block(x, cache)                                                               # (B, T, d)
        if cache is not None:
            cache.lengths = cache.lengths + (T if last_positions is None else last_positions + 1)
        if last_positions is not None:
            x = x[torch.arange(B, device=device), last_positions]                                         # (B, d)
        return self.head(self.norm(x))                                           # (B, T, vocab), or (B, vocab)

    @torch.no_grad()
    def generate(self, tokens, max_new_tokens, temperature=1.0, top_k=None, generator=None):
        """Continue tokens (B, T) int64 by max_new_tokens; returns (B, T + max_new_tokens).

        Each token is drawn from softmax(logits / temperature), from the top_k likeliest where top_k is given;
        temperature 0 (or below 1e-6) takes the likeliest (greedy). What lies further back than block_size is not seen.
        """
        context, was_training = self.config.block_size, self.training
        unread, cache = tokens[:, -context:], KVCache(min(tokens.shape[1] + max_new_tokens, context))
        self.eval()
        for _ in range(max_new_tokens):
            last = torch.full((len(unread),), unread.shape[1] - 1, device=unread.device)      # (B,)
            logits = self(unread, last_positions=last, cache=cache).float()                               # (B, vocab)
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
            else:   # the context is full: it moves on, and each token in it takes another position
                unread, cache = tokens[:, -context:], None
        self.train(was_training)
        return tokens

    @torch.no_grad()
    def generate_greedy(self, prompts, max_new, end=None, batch_size=64):
        """The likeliest continuation of each prompt, token by token: a list of (at most max_new,) int64 on the CPU.

        prompts: a sequence of (T,) int64 tensors, of any lengths. A continuation ends with the token `end`, after
        max_new tokens or where the context is full; a prompt that is longer than the context gets none. Rows are
        padded on the right and read at their own last token.
        """
        answers = [[] for _ in prompts]
        context, was_training, device = self.config.block_size, self.training, self.head.weight.device

        def has_room(i):
            return len(answers[i]) < max_new and len(prompts[i]) + len(answers[i]) <= context

        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))   # of like length together: little padding
        self.eval()
        for first in range(0, len(order), batch_size):
            going = [i for i in order[first:first + batch_size] if has_room(i)]
            if not going:
                continue
            tokens = pad_sequence([prompts[i] for i in going], batch_first=True).to(device)              # (B, T)
            last = torch.tensor([len(prompts[i]) - 1 for i in going], device=device)                     # (B,)
            cache = KVCache(min(tokens.shape[1] + max_new, context))
            while going:
                new = self(tokens, last_positions=last, cache=cache).argmax(dim=-1)                                  # (B,)
                for i, token in zip(going, new.tolist()):
                    answers[i].append(token)
                on = [row for row, i in enumerate(going) if has_room(i) and answers[i][-1] != end]
                if len(on) < len(going):
                    going, new = [going[row] for row in on], new[on]
                    cache.keep(on)
                tokens, last = new[:, None], torch.zeros_like(new)                                # (B, 1), (B,)
        self.train(was_training)
        return [torch.tensor(answer, dtype=torch.int64) for answer in answers]

    @staticmethod
    def urls():
        """{name: address} of the published weights that are downloaded when they are asked for by name."""
        return published.GPT2_URLS

    @classmethod
    def from_gpt2(cls, source, n_head=None):
        """A GPT with GPT-2's weights.

        source: "gpt2", "gpt2-medium", "gpt2-large" or "gpt2-xl" (downloaded once), a file, or a Hugging Face
        GPT-2 state dict, with or without the `transformer.` prefix. n_head: None for heads of width 64, as in
        every published GPT-2; a state dict does not tell. Raises InputError that lists missing, surplus and
        misshapen keys, or asks for n_head where the width is no multiple of 64.
        """
        state = {k.removeprefix("transformer."): v for k, v in published.read_source(source, cls.urls()).items()}
        # causal masks that older files carry
        state = {k: v for k, v in state.items() if not k.endswith((".attn.bias", ".attn.masked_bias"))}
        published.check_format(state, "gpt2")
        head = state.pop("lm_head.weight", None)
        if head is not None and not torch.equal(head, state["wte.weight"]):
            raise InputError("lm_head.weight differs from wte.weight: in this GPT the head is the token embedding")
        n_layer = len({k.split(".")[1] for k in state if k.startswith("h.")})
        ours = published.convert_from(state, published.gpt2_format(n_layer))
        (vocab_size, d_model), block_size = state["wte.weight"].shape, len(state["wpe.weight"])
        config = GPTConfig(vocab_size, block_size, n_layer, published.heads_of(d_model, n_head), d_model)
        model = published.built(cls, config, ours | {"head.weight": ours["token_embedding.weight"]})
        model.head.weight = model.token_embedding.weight
        return model

    from_state = from_gpt2   # what ViT calls so tells two namings apart

    def to_gpt2(self):
        """The weights as a Hugging Face GPT-2 state dict, the `transformer.` prefix and `lm_head.weight` included.

        Raises InputError that names every tensor for which GPT-2 has no place.
        """
        state = self.state_dict()
        head = state.pop("head.weight", None)
        if self.head.weight is not self.token_embedding.weight and not torch.equal(head, self.token_embedding.weight):
            raise InputError("head.weight differs from token_embedding.weight: in a GPT-2 the two are one")
        state = published.convert_to(state, published.gpt2_format(self.config.n_layer))
        state = {f"transformer.{k}": v for k, v in state.items()}
        return state | {"lm_head.weight": state["transformer.wte.weight"]}
