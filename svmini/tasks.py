"""Arithmetic made by the program: problems whose right answer is known, so that a model can be marked.

    417+259=6760     addition, the answer's four digits reversed: 676 is 0676 is "6760"
    417-259=8510     subtraction of the smaller number from the larger, likewise

Reversed digits let the model write the digit first that needs no carry from another one. The loss is taken on the
answer alone, and a problem counts as solved if all four digits are right (exact match), as is usual for GSM-8K.
A model is pretrained on one operation and adapted to the other.

Another task needs the same three things: vocab_size, batch(size, seed, step) with -100 where there is no loss, and
problems(split, n); exact_match marks it as it stands.
"""

import torch

from .rng import generator

CHARACTERS = "0123456789+-="   # a token is the character's place here, so a digit's token is the digit
NO_LOSS = -100                 # cross_entropy leaves out targets of this value (its ignore_index)
DIGITS = 3                     # of a and b
ANSWER = DIGITS + 1            # digits of the answer: up to 999 + 999 = 1998


def encode(text):
    """int64 tokens (len(text),). Raises ValueError for a character that is not in CHARACTERS."""
    unknown = sorted(set(text) - set(CHARACTERS))
    if unknown:
        raise ValueError(f"arithmetic knows the characters {CHARACTERS} only, not {' '.join(map(repr, unknown))}")
    return torch.tensor([CHARACTERS.index(c) for c in text], dtype=torch.int64)


def decode(tokens):
    """The characters of tokens (n,), as a string."""
    return "".join(CHARACTERS[t] for t in tokens.tolist())


def split_of(a, b):
    """The split that problems of a and b (int64, of one shape) belong to: 0 train (90 %), 1 val, 2 test (5 % each).

    A fixed rule, the same for a + b, b + a and a - b, so that no held-out problem is met in training the other way
    round. It mixes the pair's bits by two multiplications, so that a split favours no digits and no answers.
    """
    mixed = (torch.minimum(a, b) * 1000 + torch.maximum(a, b)) * 2654435761 % 2**32
    mixed = (mixed ^ mixed >> 15) * 739982445 % 2**32
    part = (mixed >> 12) % 20
    return (part == 1) + 2 * (part == 2)   # int64, since True counts as 1


class Arithmetic:
    """Problems "ddd+ddd=" or "ddd-ddd=" with answers of four digits, reversed, as tokens of one character each."""
    vocab = CHARACTERS
    vocab_size = len(CHARACTERS)
    prompt_length = 2 * DIGITS + 2
    answer_length = ANSWER
    length = prompt_length + answer_length
    encode = staticmethod(encode)
    decode = staticmethod(decode)

    def __init__(self, operation):
        if operation not in ("+", "-"):
            raise ValueError(f"operation must be '+' or '-', not {operation!r}")
        self.operation = operation

    def write(self, a, b):
        """a, b int64 (n,) -> the problems with their answers, (n, 12); for "-" a must be at least b."""
        answer = a + b if self.operation == "+" else a - b
        sign, equals = (torch.full_like(a, CHARACTERS.index(c)).unsqueeze(1) for c in (self.operation, "="))
        reversed_answer = digits(answer, ANSWER).flip(1)
        return torch.cat([digits(a, DIGITS), sign, digits(b, DIGITS), equals, reversed_answer], dim=1)

    def batch(self, size, seed, step):
        """Training problems: inputs x and targets y, both (size, 11) int64; y is -100 outside the answer.

        A function of (seed, step); problems of val and test are never drawn.
        """
        g = generator("arithmetic", self.operation, seed, step)
        a, b = torch.randint(1000, (2, size), generator=g)                   # (size,) each
        while (held_out := split_of(a, b) > 0).any():
            again = torch.randint(1000, (2, int(held_out.sum())), generator=g)
            a[held_out], b[held_out] = again
        if self.operation == "-":
            a, b = torch.maximum(a, b), torch.minimum(a, b)
        tokens = self.write(a, b)                                            # (size, 12)
        x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].clone()            # (size, 11)
        y[:, :self.prompt_length - 1] = NO_LOSS
        return x, y

    def problems(self, split, n):
        """The first n problems of "val" or "test": prompts (n, 8) and answers (n, 4), int64, always the same.

        Raises ValueError for another split, or where it has not n problems (about 50,000 for "+", half for "-").
        """
        if split not in ("val", "test"):
            raise ValueError(f"split must be 'val' or 'test', not {split!r}")
        a, b = torch.cartesian_prod(torch.arange(1000), torch.arange(1000)).unbind(1)   # every pair, (10**6,) each
        chosen = split_of(a, b) == ("train", "val", "test").index(split)
        if self.operation == "-":
            chosen &= a >= b
        a, b = a[chosen], b[chosen]
        if not 1 <= n <= len(a):
            raise ValueError(f"{split} has {len(a)} problems of {self.operation!r}: n must be 1 to that, not {n}")
        first = torch.randperm(len(a), generator=generator("problems"))[:n]
        tokens = self.write(a[first], b[first])                                         # (n, 12)
        return tokens[:, :self.prompt_length], tokens[:, self.prompt_length:]


def digits(numbers, count):
    """numbers (n,) -> their decimal digits (n, count), the highest first, with leading zeros."""
    powers = 10 ** torch.arange(count - 1, -1, -1)
    return numbers.unsqueeze(1) // powers % 10


def exact_match(model, prompts, answers, batch_size=500):
    """Percent of prompts (n, P) that the model continues, greedily, by exactly answers (n, L).

    Returns (percent, predictions (n, L)). model: anything with GPT's generate; the tokens lie on its device.
    """
    predictions = torch.cat([model.generate(part, answers.shape[1], temperature=0)[:, prompts.shape[1]:]
                             for part in prompts.split(batch_size)])                    # (n, L)
    return 100 * (predictions == answers).all(dim=1).double().mean().item(), predictions


def show(prompt, answer, prediction):
    """One arithmetic problem for a reader, from tokens (8,), (4,), (4,): "417-259=158  model: 158  right"."""
    mark = "right" if torch.equal(answer, prediction) else "wrong"
    return f"{decode(prompt)}{readable(answer)}  model: {readable(prediction)}  {mark}"


def readable(answer):
    """A reversed answer as a number; as it is, where the model wrote something else than digits."""
    text = decode(answer)
    return str(int(text[::-1])) if text.isdigit() else text
