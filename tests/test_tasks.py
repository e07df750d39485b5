"""Arithmetic: the problems are right, held-out ones are never trained on, marking tells right from wrong; and greedy
answers, many at a time, are those that a model gives one by one."""

import pytest
import torch
import torch.nn.functional as F

from svmini import GPT, GPTConfig, tasks
from svmini.tasks import Arithmetic, exact_match, greedy, show, split_of


def solve(prompts, operation):
    """The reversed answers (n, 4) by Python's own arithmetic."""
    rows = []
    for prompt in prompts:
        text = Arithmetic.decode(prompt)
        a, sign, b, equals = int(text[:3]), text[3], int(text[4:7]), text[7]
        assert sign == operation and equals == "="
        rows.append(Arithmetic.encode(f"{a + b if operation == '+' else a - b:04d}"[::-1]))
    return torch.stack(rows)


class Stub(torch.nn.Linear):
    """Stands in for a GPT: knows the operation, but gets every problem with a = an even number wrong."""
    config = GPTConfig(vocab_size=13, block_size=12, n_layer=1, n_head=1, d_model=1)

    def __init__(self, operation):
        super().__init__(1, 1)   # greedy asks its parameters for their device
        self.operation, self.calls = operation, 0

    def forward(self, tokens, at):
        self.calls += 1
        answers = solve(tokens[:, :8], self.operation)
        even = tokens[:, 2] % 2 == 0
        answers[even, 3] = (answers[even, 3] + 1) % 10
        return F.one_hot(answers[torch.arange(len(at)), at - 7], 13).float()


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
    predictions = torch.stack(predictions)
    assert model.calls == 3 * 4 and predictions.shape == (130, 4)
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


# ---- greedy answers to prompts of any length ----

def tiny(block_size):
    """A random GPT whose every parameter counts."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(31, block_size, n_layer=2, n_head=2, d_model=16)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    return model


def prompts_of(*lengths):
    g = torch.Generator().manual_seed(0)
    return [torch.randint(31, (n,), generator=g) for n in lengths]


def test_greedy_is_generate_row_by_row():
    model = tiny(block_size=40)
    prompts = prompts_of(5, 30, 1, 17, 5, 12, 28, 2, 9)
    expected = [model.generate(p[None], 10, temperature=0)[0, len(p):] for p in prompts]
    assert len(torch.cat(expected).unique()) > 8, "a model that always says the same shows nothing"
    for batch_size in (1, 2, 4, 100):
        got = greedy(model, prompts, 10, batch_size=batch_size)
        assert all(map(torch.equal, got, expected)) and len(got) == 9
    end = int(expected[0][4])
    stops = [(e.tolist() + [end]).index(end) + 1 for e in expected]           # 11: it is never said
    assert len(set(stops)) > 4 and 11 in stops and 1 in stops
    for answer, whole, stop in zip(greedy(model, prompts, 10, end=end, batch_size=4), expected, stops):
        assert torch.equal(answer, whole[:stop])


def test_greedy_in_a_full_context():
    model = tiny(block_size=12)
    prompts = prompts_of(12, 13, 10, 3)
    got = greedy(model, prompts, 6)
    assert [len(answer) for answer in got] == [1, 0, 3, 6]
    for prompt, answer in zip(prompts, got):
        room = model.generate(prompt[None, :12], len(answer), temperature=0)[0]
        assert torch.equal(room[len(room) - len(answer):], answer)


def test_padding_is_never_seen(monkeypatch):
    model, prompts = tiny(block_size=40), prompts_of(5, 30, 1, 17)
    expected = greedy(model, prompts, 8)
    padded = []

    def other_padding(rows, batch_first):
        padded.append(sum(len(row) < max(map(len, rows)) for row in rows))
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=batch_first, padding_value=9)

    monkeypatch.setattr(tasks, "pad_sequence", other_padding)
    assert all(map(torch.equal, greedy(model, prompts, 8), expected)) and padded == 8 * [3]


def test_greedy_takes_no_step_too_many_and_leaves_the_mode():
    model, sizes = tiny(block_size=40), []
    model.register_forward_pre_hook(lambda module, inputs: sizes.append((module.training, *inputs[0].shape)))
    prompts = prompts_of(4, 4)
    both = greedy(model.train(), prompts, 3)
    assert model.training and sizes == [(False, 2, 4), (False, 2, 5), (False, 2, 6)]
    end = int(both[0][0])
    assert int(both[1][0]) != end
    sizes.clear()
    greedy(model.eval(), prompts, 2, end=end)
    assert not model.training and sizes == [(False, 2, 4), (False, 1, 5)]     # a row that has ended costs nothing
    sizes.clear()
    with pytest.raises(IndexError):
        greedy(model.train(), [torch.tensor([31])], 2)                        # no such token
    assert model.training
