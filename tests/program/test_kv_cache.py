"""Keys and values that are kept: the logits and tokens of a model that reads everything anew for each token."""

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from small_models import seeded
from svmini import GPT, GPTConfig
from svmini.models.transformer import KVCache


def model_of(context, seed=0):
    """A random GPT in float64, sure enough of its tokens that rounding decides none."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(31, context, n_layer=2, n_head=2, d_model=16)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    return model.eval()


def prompts_of(*lengths):
    g = seeded(0)
    return [torch.randint(31, (n,), generator=g) for n in lengths]


@torch.no_grad()
def generate_anew(model, x, n, temperature, top_k=None, generator=None):
    """The tokens that follow, each from the whole text (the last block_size tokens) again."""
    for _ in range(n):
        logits = model(x[:, -model.config.block_size:])[:, -1].float()
        if temperature == 0:
            new = logits.argmax(-1, keepdim=True)
        else:
            logits = logits / temperature
            if top_k is not None:
                logits[logits < logits.topk(top_k).values[:, -1:]] = -torch.inf
            new = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        x = torch.cat([x, new], dim=1)
    return x


@torch.no_grad()
def answer_anew(model, prompt, n, end=None):
    """One prompt's likeliest continuation, as far as `end`, n tokens or the end of the context."""
    x = prompt
    while len(x) - len(prompt) < n and len(x) <= model.config.block_size and (len(x) == len(prompt) or x[-1] != end):
        x = torch.cat([x, model(x[None])[0, -1:].argmax(-1)])
    return x[len(prompt):]


def reads(model):
    """A list that grows by the size of every batch of tokens that the model is given, and its mode."""
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append((module.training, *inputs[0].shape)))
    return seen


# ---- the cache itself ----

@pytest.mark.parametrize("pad", [0, 17])
def test_rows_of_different_lengths_in_pieces(pad):
    """Five tokens, one, one, three at once, two rows left out on the way; what stands in the padding is never seen."""
    model, rows, cache = model_of(24), prompts_of(5, 2, 4, 1), KVCache(24)
    x = pad_sequence(rows, batch_first=True, padding_value=pad)
    got = model(x, last_positions=torch.tensor([4, 1, 3, 0]), cache=cache)
    going, g = [0, 1, 2, 3], seeded(1)
    for n in (1, 1, 3, 1):
        expected = torch.stack([model(rows[i][None])[0, -1] for i in going])
        assert got.shape == (len(going), 31) and (got - expected).abs().max() < 1e-10 * expected.abs().max()
        if n == 3:
            cache.keep([1, 3])
            going = [going[1], going[3]]
        new = torch.randint(31, (len(going), n), generator=g)
        rows = {i: torch.cat([rows[i], row]) for i, row in zip(going, new)}
        got = model(new, cache=cache)
        assert got.shape == (len(going), n, 31)
        got = got[:, -1]
    assert cache.lengths.tolist() == [len(rows[1]), len(rows[3])] == [8, 7]


# ---- generate ----

@pytest.mark.parametrize("length", [1, 11, 12, 30])
@pytest.mark.parametrize("temperature, top_k", [(0, None), (30.0, 4)])
def test_generate_says_what_it_said_without(length, temperature, top_k):
    """Prompts below, at and over a context of 12, and past it."""
    model, x = model_of(12), torch.stack(prompts_of(*[length] * 3))
    got = model.generate(x, 20, temperature, top_k, seeded(5))
    assert torch.equal(got, generate_anew(model, x, 20, temperature, top_k, seeded(5)))
    assert got.shape == (3, length + 20) and len(got[:, length:].unique()) > (1 if temperature == 0 else 9)


def test_each_token_is_read_once_until_the_context_is_full():
    model = model_of(8)
    seen = reads(model)
    model.generate(torch.stack(prompts_of(5, 5)), 6, temperature=0)
    assert seen == [(False, 2, 5), (False, 2, 1), (False, 2, 1), (False, 2, 1), (False, 2, 8), (False, 2, 8)]


# ---- answers to prompts of any length ----

def test_answers_are_those_given_one_by_one():
    model, prompts = model_of(40), prompts_of(5, 30, 1, 17, 5, 12, 28, 2, 9)
    expected = [answer_anew(model, p, 10) for p in prompts]
    assert len(torch.cat(expected).unique()) > 8, "a model that always says the same shows nothing"
    end = int(expected[0][4])
    ended = [answer_anew(model, p, 10, end) for p in prompts]
    assert {1, 5, 10} <= {len(answer) for answer in ended}, "at once, on the way, never"
    for batch_size in (1, 4, 100):
        for until, right in ((None, expected), (end, ended)):
            got = model.generate_greedy(prompts, 10, until, batch_size)
            assert len(got) == 9 and all(map(torch.equal, got, right))
    assert [len(a) for a in model.generate_greedy(prompts, 0)] == [0] * 9 and model.generate_greedy([], 5) == []


def test_answers_in_a_full_context():
    model, prompts = model_of(12), prompts_of(12, 13, 10, 3, 40)
    got = model.generate_greedy(prompts, 6)
    assert [len(answer) for answer in got] == [1, 0, 3, 6, 0]
    assert all(torch.equal(answer, answer_anew(model, p, 6)) for p, answer in zip(prompts, got) if len(p) <= 12)
    assert all(map(torch.equal, model.generate_greedy(prompts, 100), (answer_anew(model, p, 100) for p in prompts)))


def test_answers_take_no_step_too_many():
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
    assert seen == [(False, 2, 3), (False, 2, 9)], "prompts of like length together"
