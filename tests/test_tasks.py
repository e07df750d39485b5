"""Arithmetic: the problems are right, held-out ones are never trained on, and marking tells right from wrong."""

import pytest
import torch
import torch.nn.functional as F

from svmini.tasks import Arithmetic, exact_match, show, split_of


def solve(prompts, operation):
    """The reversed answers (n, 4) by Python's own arithmetic."""
    rows = []
    for prompt in prompts:
        text = Arithmetic.decode(prompt)
        a, sign, b, equals = int(text[:3]), text[3], int(text[4:7]), text[7]
        assert sign == operation and equals == "="
        rows.append(Arithmetic.encode(f"{a + b if operation == '+' else a - b:04d}"[::-1]))
    return torch.stack(rows)


class Stub:
    """Stands in for a GPT: knows the operation, but gets every problem with a = an even number wrong."""
    def __init__(self, operation):
        self.operation, self.calls = operation, 0

    def generate(self, tokens, max_new_tokens, temperature):
        assert temperature == 0 and max_new_tokens == 4
        self.calls += 1
        answers = solve(tokens, self.operation)
        even = tokens[:, 2] % 2 == 0
        answers[even, 3] = (answers[even, 3] + 1) % 10
        return torch.cat([tokens, answers], dim=1)


def numbers(tokens):
    """a and b of problems (n, at least 7)."""
    powers = torch.tensor([100, 10, 1])
    return (tokens[:, :3] * powers).sum(1), (tokens[:, 4:7] * powers).sum(1)


def test_characters_round_trip():
    task = Arithmetic("+")
    tokens = task.encode("0123456789+-=")
    assert tokens.tolist() == list(range(13)) and task.vocab_size == 13 and tokens.dtype == torch.int64
    assert task.decode(tokens) == "0123456789+-="
    with pytest.raises(ValueError, match="not 'x'"):
        task.encode("12x")


@pytest.mark.parametrize("operation", "+-")
def test_batch(operation):
    task = Arithmetic(operation)
    x, y = task.batch(300, seed=1, step=5)
    assert x.shape == y.shape == (300, task.length - 1) == (300, 11)
    assert x.dtype == y.dtype == torch.int64
    assert (y[:, :7] == -100).all()                              # no loss on the prompt ...
    assert torch.equal(y[:, 7:], solve(x[:, :8], operation))     # ... the answer alone, and it is right
    assert torch.equal(x[:, 8:], y[:, 7:10])                     # x is fed the answer one token late
    a, b = numbers(x)
    assert (split_of(a, b) == 0).all()
    assert operation == "+" or (a >= b).all()
    loss = F.cross_entropy(torch.zeros(300 * 11, 13), y.flatten())
    assert loss.item() == pytest.approx(torch.tensor(13.0).log().item())
    for other_seed, other_step, same in ((1, 5, True), (1, 6, False), (2, 5, False)):
        assert torch.equal(task.batch(300, other_seed, other_step)[0], x) is same


@pytest.mark.parametrize("operation", "+-")
def test_problems_are_fixed_right_and_held_out(operation):
    task = Arithmetic(operation)
    sets = {}
    for number, split in ((1, "val"), (2, "test")):
        prompts, answers = task.problems(split, 400)
        assert prompts.shape == (400, 8) and answers.shape == (400, 4)
        assert torch.equal(answers, solve(prompts, operation))
        assert torch.equal(task.problems(split, 50)[0], prompts[:50])
        a, b = numbers(prompts)
        assert (split_of(a, b) == number).all()
        sets[split] = set(map(tuple, prompts.tolist()))
        assert len(sets[split]) == 400
    assert not sets["val"] & sets["test"]
    trained = {tuple(row) for step in range(50) for row in task.batch(500, 0, step)[0][:, :8].tolist()}
    assert len(trained) > 20000 and not trained & (sets["val"] | sets["test"])


def test_split_rule():
    a, b = torch.cartesian_prod(torch.arange(1000), torch.arange(1000)).unbind(1)
    part = split_of(a, b)
    assert torch.equal(part, split_of(b, a))                          # a + b and b + a are kept together
    for number, share in ((0, 0.9), (1, 0.05), (2, 0.05)):
        assert (part == number).double().mean().item() == pytest.approx(share, abs=0.002)
        for place in (1, 10, 100):                                    # no pair of digits is special to a split
            pairs = (a // place % 10) * 10 + b // place % 10
            shares = torch.bincount(pairs[part == number], minlength=100) / torch.bincount(pairs)
            assert ((shares - share).abs() < 0.015).all()
    assert split_of(torch.tensor([417]), torch.tensor([259])).item() == 0   # the rule stays: stored
    assert (part == 1).nonzero()[0].item() == 32                       # results depend on it


def test_exact_match_counts_whole_answers():
    prompts, answers = Arithmetic("-").problems("test", 130)
    model = Stub("-")
    percent, predictions = exact_match(model, prompts, answers, batch_size=50)
    odd = prompts[:, 2] % 2 == 1
    assert model.calls == 3 and predictions.shape == (130, 4)
    assert percent == pytest.approx(100 * odd.sum().item() / 130) and 0 < percent < 100
    assert torch.equal((predictions == answers).all(1), odd)


def test_show():
    prompt, answer = Arithmetic.encode("417-259="), Arithmetic.encode("8510")
    assert show(prompt, answer, answer) == "417-259=158  model: 158  right"
    assert show(prompt, answer, Arithmetic.encode("8511")) == "417-259=158  model: 1158  wrong"
    assert show(prompt, answer, Arithmetic.encode("8=1+")) == "417-259=158  model: 8=1+  wrong"
    assert show(Arithmetic.encode("005-005="), Arithmetic.encode("0000"), answer).startswith("005-005=0  model: 158")


def test_errors_are_sentences():
    with pytest.raises(ValueError, match="operation must be"):
        Arithmetic("*")
    with pytest.raises(ValueError, match="'val' or 'test'"):
        Arithmetic("+").problems("train", 5)
    for n in (0, 10**6):
        with pytest.raises(ValueError, match="n must be 1 to"):
            Arithmetic("-").problems("val", n)
