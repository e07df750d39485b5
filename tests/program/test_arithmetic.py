"""Arithmetic: answers are right, and held-out problems are never in training."""

import pytest
import torch

from svmini.data.arithmetic import Arithmetic, decode, encode, split_of
from svmini.errors import InputError


def solve(prompts, operation):
    """Return the reversed answers (n, 4) by Python's own arithmetic."""
    rows = []
    for prompt in prompts:
        text = decode(prompt)
        a, sign, b, equals = int(text[:3]), text[3], int(text[4:7]), text[7]
        assert sign == operation and equals == "="
        rows.append(encode(f"{a + b if operation == '+' else a - b:04d}"[::-1]))
    return torch.stack(rows)


class Stub:
    """Replaces a GPT: it can subtract, but its answer is wrong if a is even."""

    def generate_greedy(self, prompts, max_new, end=None):
        assert (max_new, end) == (4, None)
        self.prompts, answers = prompts, solve(prompts, "-")
        even = prompts[:, 2] % 2 == 0
        answers[even, 3] = (answers[even, 3] + 1) % 10
        return list(answers)


def numbers(tokens):
    """Return a and b of problems (n, at least 7)."""
    powers = torch.tensor([100, 10, 1])
    return (tokens[:, :3] * powers).sum(1), (tokens[:, 4:7] * powers).sum(1)


def test_characters_are_encoded_and_decoded():
    tokens = encode("0123456789+-=")
    assert tokens.tolist() == list(range(13)) and Arithmetic.vocab_size == 13 and tokens.dtype == torch.int64
    assert decode(tokens) == "0123456789+-="
    with pytest.raises(InputError, match="not 'x'"):
        encode("12x")


@pytest.mark.parametrize("operation", "+-")
def test_a_batch_is_right_and_a_function_of_seed_and_step(operation):
    task = Arithmetic(operation)
    x, y = task.batch(300, seed=1, step=5)
    assert x.shape == y.shape == (300, task.length - 1) == (300, 11)
    assert (y[:, :7] == -100).all(), "there is no loss on the prompt"
    assert torch.equal(y[:, 7:], solve(x[:, :8], operation)), "the targets are the right answer"
    assert torch.equal(x[:, 8:], y[:, 7:10]), "the inputs are the answer one token late"
    a, b = numbers(x)
    assert (split_of(a, b) == 0).all()
    assert operation == "+" or (a >= b).all()
    assert torch.equal(task.batch(300, 1, 5)[0], x)
    assert not torch.equal(task.batch(300, 1, 6)[0], x) and not torch.equal(task.batch(300, 2, 5)[0], x)


@pytest.mark.parametrize("operation", "+-")
def test_problems_are_fixed_right_and_held_out(operation):
    task = Arithmetic(operation)
    sets = {}
    for number, split in ((1, "val"), (2, "test")):
        prompts, answers = task.problems(split, 400)
        assert torch.equal(answers, solve(prompts, operation))
        assert torch.equal(task.problems(split, 50)[0], prompts[:50])
        a, b = numbers(prompts)
        assert (split_of(a, b) == number).all()
        sets[split] = set(map(tuple, prompts.tolist()))
        assert len(sets[split]) == 400
    assert not sets["val"] & sets["test"]
    trained = {tuple(row) for step in range(20) for row in task.batch(500, 0, step)[0][:, :8].tolist()}
    assert len(trained) > 8000 and not trained & (sets["val"] | sets["test"])


def test_the_split_rule_is_fixed_symmetric_and_independent_of_digits():
    a, b = torch.cartesian_prod(torch.arange(1000), torch.arange(1000)).unbind(1)
    part = split_of(a, b)
    assert torch.equal(part, split_of(b, a))
    for number, share in ((0, 0.9), (1, 0.05), (2, 0.05)):
        assert (part == number).double().mean().item() == pytest.approx(share, abs=0.002)
        for place in (1, 10, 100):
            pairs = (a // place % 10) * 10 + b // place % 10
            shares = torch.bincount(pairs[part == number], minlength=100) / torch.bincount(pairs)
            assert ((shares - share).abs() < 0.015).all(), "no pair of digits is more frequent in a split"
    assert (part == 1).nonzero()[0].item() == 32, "stored results depend on the rule"


def test_exact_match_counts_complete_answers_of_each_split():
    task = Arithmetic("-")
    for split in ("val", "test"):
        prompts, answers = task.eval_problems[split]
        odd = (prompts[:, 2] % 2 == 1).double().mean().item()
        assert len(answers) == 1000 and 0.3 < odd < 0.7
        assert task.evaluate(stub := Stub(), split) == {"loss": None, "metric": pytest.approx(100 * odd)}
        assert torch.equal(stub.prompts, task.problems(split, 1000)[0])
    assert task.data_config == {"data": "arithmetic -", "sha256": "made by the program"}
    assert (task.name, task.metric, task.higher_is_better) == ("arithmetic -", "exact match", True)


def test_problems_are_shown_with_the_right_and_the_predicted_answer():
    task = Arithmetic("-")
    prompt, answer = encode("417-259="), encode("8510")
    assert task.line(prompt, answer, answer) == "417-259=158  model: 158"
    assert task.line(prompt, answer, encode("8=1+")) == "417-259=158  model: 8=1+"
    shown = task.show(Stub())
    assert [line[7:15] for line in shown] == list(map(decode, task.problems("test", 8)[0]))
    assert [line[:7] for line in shown] == ["right: " if int(line[9]) % 2 else "wrong: " for line in shown]
