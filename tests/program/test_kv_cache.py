"""The KV cache: the same logits and tokens as a model without it, which reads the whole text again for each token."""

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from helpers import assert_close, seeded
from svmini import GPT, GPTConfig
from svmini.models.transformer import KVCache


def model_of(context):
    """A random GPT in float64 with logits so far apart that rounding does not decide between tokens."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(31, context, n_layer=2, n_head=2, d_model=16)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    return model.eval()


def prompts_of(*lengths):
    g = seeded(0)
    return [torch.randint(31, (n,), generator=g) for n in lengths]


@torch.no_grad()
def reference_generate(model, x, n, temperature, top_k=None, generator=None):
    """The tokens of GPT.generate, each computed from the whole text (its last block_size tokens)."""
    for _ in range(n):
        logits = model(x[:, -model.config.block_size:])[:, -1].float()
        if temperature == 0:
            new = logits.argmax(-1, keepdim=True)
        else:
            logits = logits / temperature
            if top_k is not None:
                logits[logits < logits.topk(min(top_k, 31)).values[:, -1:]] = -torch.inf
            new = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        x = torch.cat([x, new], dim=1)
    return x


def reference_answer(model, prompt, n, end=None):
    """The greedy continuation of one prompt up to `end`, n tokens or a full context."""
    n = max(0, min(n, model.config.block_size + 1 - len(prompt)))
    new = reference_generate(model, prompt[None], n, 0)[0, len(prompt):]
    return new[:new.tolist().index(end) + 1] if end in new.tolist() else new


def reads(model):
    """A list that records (training mode, batch size, tokens) of each forward pass from now on."""
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append((module.training, *inputs[0].shape)))
    return seen


# ---- the cache itself ----

@pytest.mark.parametrize("pad", [0, 17])
def test_rows_of_different_lengths_in_pieces(pad):
    """Five tokens, then 1, 1 and 3, then two of the rows only; no token attends to the padding."""
    model, rows, cache = model_of(24), prompts_of(5, 2, 4, 1), KVCache(24)
    x = pad_sequence(rows, batch_first=True, padding_value=pad)
    got = model(x, last_positions=torch.tensor([4, 1, 3, 0]), cache=cache)
    active, g = [0, 1, 2, 3], seeded(1)
    for n in (1, 1, 3, 1):
        assert_close(got, torch.stack([model(rows[i][None])[0, -1] for i in active]), 1e-10)
        if n == 3:
            cache.select_rows([1, 3])
            active = [active[1], active[3]]
        new = torch.randint(31, (len(active), n), generator=g)
        rows = {i: torch.cat([rows[i], row]) for i, row in zip(active, new)}
        got = model(new, cache=cache)[:, -1]
    assert cache.lengths.tolist() == [len(rows[1]), len(rows[3])] == [8, 7]


# ---- generate ----

@pytest.mark.parametrize("length", [1, 12, 30])
@pytest.mark.parametrize("temperature, top_k", [(0, None), (30.0, 4), (20.0, None), (20.0, 1000)])
def test_generate_gives_the_same_tokens_as_without_a_cache(length, temperature, top_k):
    """Prompts that are shorter, as long as and longer than the context of 12, each continued past it."""
    model, x = model_of(12), torch.stack(prompts_of(*[length] * 3))
    got = model.generate(x, 20, temperature, top_k, seeded(5))
    assert torch.equal(got, reference_generate(model, x, 20, temperature, top_k, seeded(5)))
    assert got.shape == (3, length + 20) and len(got[:, length:].unique()) > (1 if temperature == 0 else 9)


def test_each_token_is_read_once_until_the_context_is_full():
    model = model_of(8)
    seen = reads(model)
    model.generate(torch.stack(prompts_of(5, 5)), 6, temperature=0)
    assert seen == [(False, 2, 5), (False, 2, 1), (False, 2, 1), (False, 2, 1), (False, 2, 8), (False, 2, 8)]


# ---- generate_greedy ----

def test_batched_answers_are_those_of_one_prompt_at_a_time():
    model, prompts = model_of(40), prompts_of(5, 30, 1, 17, 5, 12, 28, 2, 9)
    expected = [reference_answer(model, p, 10) for p in prompts]
    assert len(torch.cat(expected).unique()) > 8, "a model that repeats one token would show nothing"
    end = int(expected[0][4])
    ended = [reference_answer(model, p, 10, end) for p in prompts]
    assert {1, 5, 10} <= {len(answer) for answer in ended}, "some end at once, some later, some never"
    for batch_size in (1, 4, 100):
        for until, right in ((None, expected), (end, ended)):
            got = model.generate_greedy(prompts, 10, until, batch_size)
            assert len(got) == 9 and all(map(torch.equal, got, right))
    assert [len(a) for a in model.generate_greedy(prompts, 0)] == [0] * 9 and model.generate_greedy([], 5) == []


def test_answers_end_when_the_context_is_full():
    model, prompts = model_of(12), prompts_of(12, 13, 10, 3, 40)
    assert [len(answer) for answer in model.generate_greedy(prompts, 6)] == [1, 0, 3, 6, 0]
    expected = [reference_answer(model, p, 100) for p in prompts]
    assert all(map(torch.equal, model.generate_greedy(prompts, 100), expected))


def test_answers_take_no_forward_pass_too_many():
    model, prompts = model_of(40), prompts_of(4, 4)
    seen = reads(model)
    both = model.generate_greedy(prompts, 3)
    assert seen == [(False, 2, 4), (False, 2, 1), (False, 2, 1)]
    end = int(both[0][0])
    assert int(both[1][0]) != end
    seen.clear()
    model.generate_greedy(prompts, 2, end)
    assert seen == [(False, 2, 4), (False, 1, 1)]
    seen.clear()
    model.generate_greedy(prompts_of(9, 2, 8, 3), 1, batch_size=2)
    assert seen == [(False, 2, 3), (False, 2, 9)], "prompts of similar lengths share a batch"
