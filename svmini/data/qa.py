"""Question answering: GSM-8K (Cobbe et al., arXiv 2110.14168), or a file of JSON lines.

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
from . import IGNORE_INDEX, download_once, normalize, pick, to_device
from .exact_match import ExactMatch
from .tokenizers import end_token

GSM8K_URL = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/{}.jsonl"
GSM8K_SHA256 = {"train": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
                "test": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"}
MAX_VAL_SIZE = 500     # pairs in the validation split
QA_EVAL_SIZE = 100     # pairs of val that are scored, because answers take long; all of test is scored


def read_pairs(path):
    """Read [(question, answer), ...] from JSON lines {"question": "...", "answer": "..."}; other keys are ignored.

    Raises MissingFile, or InputError that names the line and what is wrong with it.
    """
    path, pairs = Path(path).expanduser(), []
    if not path.is_file():
        raise MissingFile(f"there is no file {path}: qa:FILE needs the path of a file of JSON lines")
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            question, answer = (str.strip(entry[key]) for key in ("question", "answer"))
        except (ValueError, TypeError, KeyError, RecursionError):
            raise InputError(f'{path}, line {number} is not JSON in UTF-8 with two strings: write it as '
                             f'{{"question": "...", "answer": "..."}}') from None
        if not question or not final_answer(answer) or "\0" in answer:
            raise InputError(f"{path}, line {number} has an empty question, an empty answer (or nothing after its last "
                             f"####), or the character \\u0000 in its answer: change or remove it")
        pairs.append((question, answer))
    return pairs


def gsm8k(data_dir=None):
    """Return {"train": pairs, "test": pairs} from data_dir (default: "data")/gsm8k/{train,test}.jsonl.

    Missing files are downloaded once. Raises MissingFile if that fails, and InputError for a damaged file.
    """
    return {split: read_pairs(download_once(
        Path(data_dir or "data") / "gsm8k" / f"{split}.jsonl", GSM8K_URL.format(split), sha256,
        "--data qa:FILE with your own pairs, or --data arithmetic, which need no network"))
        for split, sha256 in GSM8K_SHA256.items()}


def split_pairs(name, data_dir=None):
    """Split "gsm8k" or "qa:FILE" into {"train", "val", "test"}: lists of (question, answer), always the same.

    test: the dataset's own, else a tenth.  val: a tenth, at most 500.  No question is in two splits, not even with
    other whitespace: the first answer to a repeated question counts, and a printed line says how many were left out.
    Raises InputError if there are fewer than ten questions, and as read_pairs and gsm8k do.
    """
    files = gsm8k(data_dir) if name == "gsm8k" else {"train": read_pairs(name.removeprefix("qa:")), "test": []}
    first = {}   # {question: its first pair}
    for question, answer in files["test"] + files["train"]:
        first.setdefault(normalize(question), (question, answer))
    tested = {normalize(question) for question, _ in files["test"]}
    pairs = sorted(pair for question, pair in first.items() if question not in tested)
    n, tenth, left_out = len(pairs), len(pairs) // 10, len(files["train"]) - len(pairs)
    if left_out:
        differ = sum(final_answer(first[normalize(q)][1]) != final_answer(a) for q, a in files["train"])
        print(f"{name}: {left_out} pairs repeat an earlier question and are left out; {differ} of them have a "
              f"different answer")
    if tenth < 1:
        raise InputError(f"{name} has {n} different questions, at least 10 are needed: add pairs")
    pairs = [pairs[i] for i in torch.randperm(n, generator=generator("test pairs")).tolist()]
    test = files["test"] or [pairs.pop() for _ in range(tenth)]
    pairs = [pairs[i] for i in torch.randperm(len(pairs), generator=generator("val pairs", 0)).tolist()]
    n_val = min(MAX_VAL_SIZE, tenth)
    return {"train": pairs[n_val:], "val": pairs[:n_val], "test": test}


def final_answer(text):
    """Return the part of an answer that is compared: the text after the last "####", or all of it, stripped.

    A number loses its thousands separators, a leading dollar sign and a final period: "#### $1,234." gives "1234".
    """
    answer = text.rpartition("####")[2].strip()
    number = re.fullmatch(r"(-?)\$?(-?)(\d+|\d{1,3}(?:,\d{3})+)(\.\d+)?\.?", answer)
    return "".join(part or "" for part in number.groups()).replace(",", "") if number else answer


class QuestionAnswering(ExactMatch):
    """Answer questions: the prompt is "Question: {question}\\nAnswer:", the answer " {answer}" and an end token.

    Prompt and answer are encoded separately, so that a prompt has the same tokens in training and in evaluation.
    splits: from split_pairs.  block_size: the context of the model. Training pairs that exceed it are left out. val
    and test keep every pair, and a problem that exceeds the context counts as not solved. Raises InputError if no
    training pair fits.
    """

    def __init__(self, name, splits, tokenizer, block_size, device="cpu"):
        def needed(prompt, answer):
            return len(prompt) + len(answer) - 1   # the last token is only a target

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

    def describe(self):
        """Return the number of pairs in each split, and how many are left out, for a reader."""
        text = f"{self.name}: {', '.join(f'{len(pairs)} pairs in {split}' for split, pairs in self.splits.items())}"
        return text + (f"; {self.left_out} training pairs exceed the model's context and are left out"
                       if self.left_out else "")

    def encode(self, question, answer):
        """Encode a pair as a prompt (P,) and an answer (A,) with its end token, int64."""
        prompt, answer = map(self.tokenizer.encode_ordinary, (f"Question: {question}\nAnswer:", f" {answer}"))
        return torch.tensor(prompt), torch.tensor(answer + [self.end])

    def text(self, tokens):
        """Decode tokens (T,) without the end token; bytes that are not UTF-8 become the replacement character."""
        return self.tokenizer.decode([t for t in tokens.tolist() if t != self.end])

    def read(self, tokens):
        return final_answer(self.text(tokens))

    def batch(self, size, seed, step):
        """Draw training pairs x and y, both (size, T) int64 on the device; targets are the answer and its end."""
        index = pick(len(self.fitting["train"]), size, generator("pairs", seed, step))
        return self.stack([self.fitting["train"][i] for i in index])

    def problems(self, split, n=None):
        """Return the first n problems of a split (default: all) as two tuples: prompts (P,) and answers (A,), int64."""
        return tuple(zip(*self.splits[split][:n]))

    def stack(self, pairs):
        """Stack (prompt, answer) pairs to x and y, both (n, T) on the device, padded on the right; y is x shifted."""
        x = [torch.cat([p, a[:-1]]) for p, a in pairs]
        y = [torch.cat([torch.full_like(p[1:], IGNORE_INDEX), a]) for p, a in pairs]
        return (to_device(pad_sequence(x, batch_first=True), self.device),
                to_device(pad_sequence(y, batch_first=True, padding_value=IGNORE_INDEX), self.device))

    @torch.no_grad()
    def answer_loss(self, model, split, batch_size=8):
        """Return the mean cross entropy in nats of the answer tokens, over the pairs of a split that fit (or None)."""
        total, count = 0.0, 0
        for first in range(0, len(self.fitting[split]), batch_size):
            x, y = self.stack(self.fitting[split][first:first + batch_size])
            total += F.cross_entropy(model(x).flatten(0, 1).float(), y.flatten(), reduction="sum").item()
            count += (y != IGNORE_INDEX).sum().item()
        return total / count if count else None

    def line(self, prompt, answer, prediction):
        """Return the prompt, the right answer and the model's answer as a string."""
        return f"{self.text(prompt)}{self.text(answer)}\nModel:{self.text(prediction)}"
