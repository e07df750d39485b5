"""Addition and subtraction problems that the program generates.

    417+259=6760     addition; the four digits of the answer are reversed: 676 is written 0676, reversed 6760
    417-259=8510     subtraction of the smaller number from the larger one, written in the same way
"""

import torch

from ..errors import InputError
from ..rng import generator
from . import IGNORE_INDEX, to_device
from .exact_match import ExactMatch

CHARACTERS = "0123456789+-="    # a token is the index of its character, so the token of a digit is the digit
DIGITS = 3                      # of a and b
ANSWER = DIGITS + 1             # digits of the answer: up to 999 + 999 = 1998
ARITHMETIC_EVAL_SIZE = 1000     # problems in val and in test


def encode(text):
    """Encode a string as int64 tokens (len(text),). Raises InputError for a character outside CHARACTERS."""
    unknown = sorted(set(text) - set(CHARACTERS))
    if unknown:
        raise InputError(f"arithmetic uses only the characters {CHARACTERS}, not {' '.join(map(repr, unknown))}")
    return torch.tensor([CHARACTERS.index(c) for c in text], dtype=torch.int64)


def decode(tokens):
    """Decode tokens (n,) to a string."""
    return "".join(CHARACTERS[t] for t in tokens.tolist())


def split_of(a, b):
    """Return the split of the problems with a and b (int64, same shape): 0 train (90 %), 1 val, 2 test (5 % each).

    The rule is fixed and the same for a + b, b + a and a - b, so training never contains a held-out problem with its
    numbers swapped. Two multiplications mix the bits of the pair, so that no split prefers certain digits or answers.
    """
    mixed = (torch.minimum(a, b) * 1000 + torch.maximum(a, b)) * 2654435761 % 2**32
    mixed = (mixed ^ mixed >> 15) * 739982445 % 2**32
    part = (mixed >> 12) % 20
    return (part == 1) + 2 * (part == 2)   # int64, because True counts as 1


def readable(answer):
    """Convert a reversed answer to an ordinary number; return it unchanged if it contains more than digits."""
    text = decode(answer)
    return str(int(text[::-1])) if text.isdigit() else text


def digits(numbers, count):
    """Split numbers (n,) into decimal digits (n, count), the highest digit first, with leading zeros."""
    powers = 10 ** torch.arange(count - 1, -1, -1)
    return numbers.unsqueeze(1) // powers % 10


class Arithmetic(ExactMatch):
    """Solve problems "ddd+ddd=" or "ddd-ddd=", whose answers are four reversed digits; a token is one character.

    operation: "+" or "-".
    """
    vocab_size = len(CHARACTERS)
    prompt_length = 2 * DIGITS + 2
    length = prompt_length + ANSWER
    max_new, end = ANSWER, None
    read = staticmethod(decode)

    def __init__(self, operation, device="cpu"):
        self.operation, self.device = operation, device
        self.name = f"arithmetic {operation}"
        self.eval_problems = {split: self.problems(split, ARITHMETIC_EVAL_SIZE) for split in ("val", "test")}
        self.data_config = {"data": self.name, "sha256": "made by the program"}

    def write(self, a, b):
        """Write the problems with a and b (int64, (n,)) and their answers as tokens (n, 12); "-" needs a >= b."""
        answer = a + b if self.operation == "+" else a - b
        sign, equals = (torch.full_like(a, CHARACTERS.index(c)).unsqueeze(1) for c in (self.operation, "="))
        reversed_answer = digits(answer, ANSWER).flip(1)
        return torch.cat([digits(a, DIGITS), sign, digits(b, DIGITS), equals, reversed_answer], dim=1)

    def batch(self, size, seed, step):
        """Draw training problems x and y, both (size, 11) int64 on the device; never one of val or test."""
        g = generator("arithmetic", self.operation, seed, step)
        a, b = torch.randint(1000, (2, size), generator=g)                   # (size,) each
        while (held_out := split_of(a, b) > 0).any():
            again = torch.randint(1000, (2, int(held_out.sum())), generator=g)
            a[held_out], b[held_out] = again
        if self.operation == "-":
            a, b = torch.maximum(a, b), torch.minimum(a, b)
        tokens = self.write(a, b)                                            # (size, 12)
        x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].clone()            # (size, 11)
        y[:, :self.prompt_length - 1] = IGNORE_INDEX
        return to_device(x, self.device), to_device(y, self.device)

    def problems(self, split, n):
        """Return the first n problems of a split, always the same: prompts (n, 8) and answers (n, 4), int64."""
        a, b = torch.cartesian_prod(torch.arange(1000), torch.arange(1000)).unbind(1)   # every pair, (10**6,) each
        chosen = split_of(a, b) == ("train", "val", "test").index(split)
        if self.operation == "-":
            chosen &= a >= b
        a, b = a[chosen], b[chosen]
        first = torch.randperm(len(a), generator=generator("problems"))[:n]
        tokens = self.write(a[first], b[first])                                         # (n, 12)
        return tokens[:, :self.prompt_length], tokens[:, self.prompt_length:]

    def line(self, prompt, answer, prediction):
        """Return a problem as a string like "417-259=158  model: 158", from tokens (8,), (4,) and (4,)."""
        return f"{decode(prompt)}{readable(answer)}  model: {readable(prediction)}"
