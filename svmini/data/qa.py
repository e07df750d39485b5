"""Question-answer pairs: GSM-8K (Cobbe et al., arXiv 2110.14168), or JSON lines of your own.

    Question: ...\\nAnswer: ... #### 18
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
from . import IGNORE_INDEX, fetched, pick
from .exact_match import ExactMatch
from .tokenizers import end_token

GSM8K_URL = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/{}.jsonl"
GSM8K_SHA256 = {"train": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
                "test": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"}
MOST_VAL = 500                 # pairs that are set aside for validation
QA_EVAL_SIZE = 100             # of val, whose answers take long; test is marked whole


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


class QuestionAnswering(ExactMatch):
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
        self.eval_problems = {"val": self.problems("val", QA_EVAL_SIZE), "test": self.problems("test")}
        self.data_config = {"data": name, "sha256": hashlib.sha256(json.dumps(splits).encode("utf-8")).hexdigest()}

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
        y = [torch.cat([torch.full_like(p[1:], IGNORE_INDEX), a]) for p, a in pairs]
        return (pad_sequence(x, batch_first=True).to(self.device),
                pad_sequence(y, batch_first=True, padding_value=IGNORE_INDEX).to(self.device))

    @torch.no_grad()
    def loss_of(self, model, split, batch_size=8):
        """Mean cross entropy in nats of the answers' tokens, of the pairs of a split that fit; None where none does."""
        total, count = 0.0, 0
        for first in range(0, len(self.fitting[split]), batch_size):
            x, y = self.stack(self.fitting[split][first:first + batch_size])
            total += F.cross_entropy(model(x).flatten(0, 1).float(), y.flatten(), reduction="sum").item()
            count += (y != IGNORE_INDEX).sum().item()
        return total / count if count else None

    def line(self, prompt, answer, prediction):
        """The prompt, the right answer and the model's."""
        return f"{self.text(prompt)}{self.text(answer)}\nModel:{self.text(prediction)}"
