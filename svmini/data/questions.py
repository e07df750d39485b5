"""Problems with answers, so that a model can be marked: arithmetic made by the program, and question-answer pairs.

    417+259=6760                          addition, the answer's four digits reversed: 676 is 0676 is "6760"
    417-259=8510                          subtraction of the smaller number from the larger, likewise
    Question: ...\\nAnswer: ... #### 18    GSM-8K (Cobbe et al., arXiv 2110.14168), or JSON lines of your own

Reversed digits let the model write the digit first that needs no carry from another one. A model is pretrained on one
operation and adapted to the other. Both kinds are Answers: the loss is on the answer alone; to be marked, a model
continues the prompts greedily, and a problem is solved if what it wrote says the same as the answer (exact match).
"""

import hashlib
import json
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from ..errors import InputError, MissingFile
from ..rng import generator
from . import NO_LOSS, fetched, pick
from .text import cross_entropy
from .tokenizers import end_token

CHARACTERS = "0123456789+-="   # a token is the character's place here, so a digit's token is the digit
DIGITS = 3                     # of a and b
ANSWER = DIGITS + 1            # digits of the answer: up to 999 + 999 = 1998
GSM8K_URL = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/{}.jsonl"
GSM8K_SHA256 = {"train": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
                "test": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"}
MOST_VAL = 500                 # pairs that are set aside for validation
ARITHMETIC_MARKED = 1000       # problems of val and of test each
PAIRS_MARKED = 100             # of val, whose answers take long; test is marked whole


class Answers:
    """A task of problems with answers. Another set of problems says:

    batch(size, seed, step) -> x, y    training problems, (size, T) int64 both, y = NO_LOSS outside the answer
    marked                             {"val": (prompts, answers), "test": ...}: what is marked, (T,) int64 tensors
    max_new, end                       how many tokens an answer may take, and which one ends it (None: all are taken)
    read(tokens) -> str                what is compared of an answer
    line(prompt, answer, prediction)   one problem for a reader, as a string
    """
    metric, higher_is_better = "exact match", True
    loss = staticmethod(cross_entropy)

    def evaluate(self, model, split):
        """{"loss": of the answers' tokens, where it is measured, "metric": percent of the problems that the model's
        greedy continuation solves}"""
        prompts, answers = self.marked[split]
        right = map(self.right, answers, model.answer(prompts, self.max_new, self.end))
        return {"loss": self.loss_of(model, split), "metric": 100 * sum(right) / len(prompts)}

    def loss_of(self, model, split):
        return None

    def right(self, answer, prediction):
        """Whether a prediction (T,) is complete and says what the answer (A,) says: "12" may be half of "120"."""
        ended = self.end is None or self.end in prediction.tolist()
        return ended and self.read(prediction) == self.read(answer)

    def show(self, model):
        """The first eight test problems, as the model solves them, each with "right" or "wrong" before it."""
        prompts, answers = (part[:8] for part in self.marked["test"])
        return [f"{'right' if self.right(a, q) else 'wrong'}: {self.line(p, a, q)}"
                for p, a, q in zip(prompts, answers, model.answer(prompts, self.max_new, self.end))]


# ---- arithmetic ----

def encode(text):
    """int64 tokens (len(text),). Raises InputError for a character that is not in CHARACTERS."""
    unknown = sorted(set(text) - set(CHARACTERS))
    if unknown:
        raise InputError(f"arithmetic knows the characters {CHARACTERS} only, not {' '.join(map(repr, unknown))}")
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


def readable(answer):
    """A reversed answer as a number; as it is, where the model wrote something else than digits."""
    text = decode(answer)
    return str(int(text[::-1])) if text.isdigit() else text


class Arithmetic(Answers):
    """Problems "ddd+ddd=" or "ddd-ddd=" with answers of four digits, reversed, as tokens of one character each."""
    vocab_size = len(CHARACTERS)
    prompt_length = 2 * DIGITS + 2
    length = prompt_length + ANSWER
    max_new, end = ANSWER, None
    read = staticmethod(decode)

    def __init__(self, operation, device="cpu"):
        self.operation, self.device = operation, device
        self.name = f"arithmetic {operation}"
        self.marked = {split: self.problems(split, ARITHMETIC_MARKED) for split in ("val", "test")}
        self.facts = {"data": self.name, "sha256": "made by the program"}

    def write(self, a, b):
        """a, b int64 (n,) -> the problems with their answers, (n, 12); for "-" a must be at least b."""
        answer = a + b if self.operation == "+" else a - b
        sign, equals = (torch.full_like(a, CHARACTERS.index(c)).unsqueeze(1) for c in (self.operation, "="))
        reversed_answer = digits(answer, ANSWER).flip(1)
        return torch.cat([digits(a, DIGITS), sign, digits(b, DIGITS), equals, reversed_answer], dim=1)

    def batch(self, size, seed, step):
        """Training problems x, y, both (size, 11) int64 on the device; problems of val and test are never drawn."""
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
        return x.to(self.device), y.to(self.device)

    def problems(self, split, n):
        """The first n problems of a split: prompts (n, 8) and answers (n, 4), int64, always the same."""
        a, b = torch.cartesian_prod(torch.arange(1000), torch.arange(1000)).unbind(1)   # every pair, (10**6,) each
        chosen = split_of(a, b) == ("train", "val", "test").index(split)
        if self.operation == "-":
            chosen &= a >= b
        a, b = a[chosen], b[chosen]
        first = torch.randperm(len(a), generator=generator("problems"))[:n]
        tokens = self.write(a[first], b[first])                                         # (n, 12)
        return tokens[:, :self.prompt_length], tokens[:, self.prompt_length:]

    def line(self, prompt, answer, prediction):
        """From tokens (8,), (4,), (4,): "417-259=158  model: 158"."""
        return f"{decode(prompt)}{readable(answer)}  model: {readable(prediction)}"


def digits(numbers, count):
    """numbers (n,) -> their decimal digits (n, count), the highest first, with leading zeros."""
    powers = 10 ** torch.arange(count - 1, -1, -1)
    return numbers.unsqueeze(1) // powers % 10


# ---- question-answer pairs ----

def read_pairs(path):
    """[(question, answer), ...] of a file of JSON lines {"question": "...", "answer": "..."}, other keys ignored.

    Raises MissingFile, or InputError that names the line and what is wrong with it.
    """
    path, form, pairs = Path(path).expanduser(), 'a line reads {"question": "...", "answer": "..."}', []
    if not path.is_file():
        raise MissingFile(f"there is no file {path}: qa:FILE wants the path of a file of JSON lines")
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except ValueError:
            raise InputError(f"{where}: it is no JSON in UTF-8, or is cut short: {form}") from None
        for key in ("question", "answer"):
            if not isinstance(entry, dict) or not isinstance(entry.get(key), str) or not entry[key].strip():
                raise InputError(f'{where}: it has no "{key}" with a text: {form}')
        if "\0" in entry["answer"] or not final_answer(entry["answer"]):
            raise InputError(f'{where}: "answer" must hold no character \\u0000, and something after its last ####')
        pairs.append((entry["question"].strip(), entry["answer"].strip()))
    return pairs


def gsm8k(data_dir=None):
    """{"train": pairs, "test": pairs} of data_dir (default "data")/gsm8k/{train,test}.jsonl, each downloaded once
    where it is missing. Raises MissingFile where that fails, InputError for a damaged file."""
    return {split: read_pairs(fetched(
        Path(data_dir or "data") / "gsm8k" / f"{split}.jsonl", GSM8K_URL.format(split), sha256,
        "--data qa:FILE with pairs of your own, or --data arithmetic, which need no network"))
        for split, sha256 in GSM8K_SHA256.items()}


def split_pairs(name, data_dir=None, seed=0):
    """{"train", "val", "test"}: lists of (question, answer) of "gsm8k" or "qa:FILE", no question in two of them.

    A tenth for test, where there is no test set, always the same; a tenth, at most 500, for val by seed. Of a repeated
    question the first answer counts. Raises InputError for fewer than ten, and as read_pairs and gsm8k do.
    """
    sets = gsm8k(data_dir) if name == "gsm8k" else {"train": read_pairs(name.removeprefix("qa:")), "test": []}
    tested, first = dict(sets["test"]), dict(reversed(sets["train"]))
    pairs = sorted((question, answer) for question, answer in first.items() if question not in tested)
    n, tenth = len(pairs), len(pairs) // 10
    if tenth < 1:
        raise InputError(f"{name} has {n} different questions: at least 10 are needed, to train, validate and test on")
    pairs = [pairs[i] for i in torch.randperm(n, generator=generator("test pairs")).tolist()]
    test = sets["test"] or [pairs.pop() for _ in range(tenth)]
    pairs = [pairs[i] for i in torch.randperm(len(pairs), generator=generator("val pairs", seed)).tolist()]
    n_val = min(MOST_VAL, tenth)
    return {"train": pairs[n_val:], "val": pairs[:n_val], "test": test}


def final_answer(text):
    """What is compared of an answer: what follows the last "####", or else all of it, without spaces around.

    A number loses thousands' commas, a dollar sign in front and a full stop behind: "#### $1,234." is "1234".
    """
    answer = text.rpartition("####")[2].strip()
    number = re.fullmatch(r"(-?)\$?(-?)(\d+|\d{1,3}(?:,\d{3})+)(\.\d+)?\.?", answer)
    return "".join(part or "" for part in number.groups()).replace(",", "") if number else answer


class Pairs(Answers):
    """Question-answer pairs as tokens: the prompt "Question: {question}\\nAnswer:", the answer " {answer}" and its end.

    Both are encoded apart: a prompt has the same tokens in training and in marking. splits: from split_pairs.
    Training pairs that exceed block_size, the model's context, are left out, `left_out` of them; val and test stay
    whole, and a problem that finds no room is not solved. Raises InputError where no training pair fits.
    """

    def __init__(self, name, splits, tokenizer, block_size, device="cpu"):
        def needed(prompt, answer):
            return len(prompt) + len(answer) - 1   # of the context: the last token is only a target

        self.name, self.tokenizer, self.device, self.end = name, tokenizer, device, end_token(tokenizer)
        self.splits = {split: [self.encode(*pair) for pair in pairs] for split, pairs in splits.items()}
        self.fitting = {split: [pair for pair in pairs if needed(*pair) <= block_size]
                        for split, pairs in self.splits.items()}
        if not self.fitting["train"]:
            raise InputError(f"no training pair fits into the model's context of {block_size} tokens: "
                             f"the shortest needs {min(needed(*pair) for pair in self.splits['train'])}")
        self.left_out = len(self.splits["train"]) - len(self.fitting["train"])
        self.max_new = max(len(a) for _, a in self.fitting["train"])
        self.marked = {"val": self.problems("val", PAIRS_MARKED), "test": self.problems("test")}
        self.facts = {"data": name, "sha256": hashlib.sha256(json.dumps(splits).encode("utf-8")).hexdigest()}

    def encode(self, question, answer):
        """A pair as tokens: prompt (P,) and answer (A,) with its end, int64."""
        prompt, answer = map(self.tokenizer.encode_ordinary, (f"Question: {question}\nAnswer:", f" {answer}"))
        return torch.tensor(prompt), torch.tensor(answer + [self.end])

    def text(self, tokens):
        """tokens (T,), but for the end token, as text; bytes that are no UTF-8 become the replacement character."""
        return self.tokenizer.decode([t for t in tokens.tolist() if t != self.end])

    def read(self, tokens):
        return final_answer(self.text(tokens))

    def batch(self, size, seed, step):
        """Training pairs x, y (size, T) int64 on the device; the loss is on the answer and its end."""
        index = pick(len(self.fitting["train"]), size, generator("pairs", seed, step))
        return self.stack([self.fitting["train"][i] for i in index])

    def problems(self, split, n=None):
        """The first n problems of a split, or all: prompts (P,) and answers (A,), int64, in two tuples."""
        return tuple(zip(*self.splits[split][:n]))

    def stack(self, pairs):
        """(prompt, answer) pairs of tokens -> x and y, both (n, T), padded on the right, y shifted by one."""
        x = [torch.cat([p, a[:-1]]) for p, a in pairs]
        y = [torch.cat([torch.full_like(p[1:], NO_LOSS), a]) for p, a in pairs]
        return (pad_sequence(x, batch_first=True).to(self.device),
                pad_sequence(y, batch_first=True, padding_value=NO_LOSS).to(self.device))

    @torch.no_grad()
    def loss_of(self, model, split, batch_size=8):
        """Mean cross entropy in nats of the answers' tokens, of the pairs of a split that fit; None where none does."""
        total, count = 0.0, 0
        for first in range(0, len(self.fitting[split]), batch_size):
            x, y = self.stack(self.fitting[split][first:first + batch_size])
            total += F.cross_entropy(model(x).flatten(0, 1).float(), y.flatten(), reduction="sum").item()
            count += (y != NO_LOSS).sum().item()
        return total / count if count else None

    def line(self, prompt, answer, prediction):
        """The prompt, the right answer and the model's."""
        return f"{self.text(prompt)}{self.text(answer)}\nModel:{self.text(prediction)}"
