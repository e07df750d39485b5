"""Problems with answers, so that a model can be marked: arithmetic made by the program, and question-answer pairs.

    417+259=6760                          addition, the answer's four digits reversed: 676 is 0676 is "6760"
    417-259=8510                          subtraction of the smaller number from the larger, likewise
    Question: ...\\nAnswer: ... #### 18    GSM-8K (Cobbe et al., arXiv 2110.14168), or JSON lines of your own

Reversed digits let the model write the digit first that needs no carry from another one. A model is pretrained on one
operation and adapted to the other. All take one road: the loss is on the answer alone; to be marked, a model continues
the prompts greedily, and a problem is solved if what it wrote says the same as the answer (exact match). A set of
problems, be it another one, has:

    batch(size, seed, step) -> x, y    training problems, (size, T) int64 both, y = -100 where there is no loss
    problems(split, n)                 prompts and answers of "val" or "test", sequences of (T,) int64 tensors
    max_new, end                       how many tokens an answer may take, and which one ends it (None: all are taken)
    read(tokens) -> str                what is compared of an answer
"""

import hashlib
import json
import re
import urllib.request
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from .files import write_whole
from .rng import generator
from .weights import one_line

CHARACTERS = "0123456789+-="   # a token is the character's place here, so a digit's token is the digit
NO_LOSS = -100                 # cross_entropy leaves out targets of this value (its ignore_index)
DIGITS = 3                     # of a and b
ANSWER = DIGITS + 1            # digits of the answer: up to 999 + 999 = 1998
GSM8K_URL = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/{}.jsonl"
GSM8K_COUNTS = {"train": 7473, "test": 1319}
MOST_VAL = 500                 # pairs that are set aside for validation: marking them takes its time


# ---- arithmetic ----

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


def show(prompt, answer, prediction):
    """One arithmetic problem for a reader, from tokens (8,), (4,), (4,): "417-259=158  model: 158  right"."""
    mark = "right" if torch.equal(answer, prediction) else "wrong"
    return f"{decode(prompt)}{readable(answer)}  model: {readable(prediction)}  {mark}"


def readable(answer):
    """A reversed answer as a number; as it is, where the model wrote something else than digits."""
    text = decode(answer)
    return str(int(text[::-1])) if text.isdigit() else text


class Arithmetic:
    """Problems "ddd+ddd=" or "ddd-ddd=" with answers of four digits, reversed, as tokens of one character each."""
    vocab_size = len(CHARACTERS)
    prompt_length = 2 * DIGITS + 2
    answer_length = ANSWER
    length = prompt_length + answer_length
    max_new, end = ANSWER, None
    encode = staticmethod(encode)
    decode = read = staticmethod(decode)
    show = staticmethod(show)

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


# ---- question-answer pairs ----

def read_pairs(path):
    """[(question, answer), ...] of a file of JSON lines {"question": "...", "answer": "..."}, other keys ignored.

    Raises FileNotFoundError, or ValueError that names the file, the line and what is wrong with it.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: qa:FILE wants the path of a file of JSON lines")
    return parse_pairs(path.read_bytes(), path)


def parse_pairs(content, path):
    """read_pairs for the bytes of a file; path is named in errors."""
    return [parse_line(line, f"{path}, line {number}")
            for number, line in enumerate(content.splitlines(), 1) if line.strip()]


def parse_line(line, where):
    """The bytes of a line as (question, answer). Raises ValueError that begins with `where`."""
    form = 'a line reads {"question": "...", "answer": "..."}'
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError(f"{where}: it is no JSON in UTF-8, or is cut short: {form}") from None
    for key in ("question", "answer"):
        if not isinstance(entry, dict) or key not in entry:
            raise ValueError(f'{where}: it has no "{key}": {form}')
        if not isinstance(entry[key], str) or not entry[key].strip():
            raise ValueError(f'{where}: "{key}" is {json.dumps(entry[key])[:40]}, not a text: {form}')
    if "\0" in entry["answer"] or not final_answer(entry["answer"]):
        raise ValueError(f'{where}: "answer" must hold no character \\u0000, and something after its last ####')
    return entry["question"].strip(), entry["answer"].strip()


def gsm8k(data_dir=None):
    """{"train": pairs, "test": pairs} of data_dir (default "data")/gsm8k/{train,test}.jsonl, each downloaded once
    where it is missing. Raises FileNotFoundError where that fails, ValueError for a damaged or incomplete file."""
    sets = {}
    for split, count in GSM8K_COUNTS.items():
        path, url = Path(data_dir or "data") / "gsm8k" / f"{split}.jsonl", GSM8K_URL.format(split)
        there = path.is_file()
        try:
            content = path.read_bytes() if there else urllib.request.urlopen(url, timeout=20).read()
            sets[split] = parse_pairs(content, path.name)
            if len(sets[split]) != count:   # half a file, say
                raise ValueError(f"it holds {len(sets[split]):,} problems and should hold {count:,}")
            if not there:
                write_whole(path, lambda file: file.write(content))
        except Exception as error:   # besides OSError, a broken connection raises http.client's own kind
            kind, what, cure = ((ValueError, "is damaged", "delete it to have it downloaded again") if there else
                                (FileNotFoundError, "is missing and could not be downloaded", "put it there by hand"))
            raise kind(f"{path} {what} ({one_line(error)}): {cure} from {url}, or use --data qa:FILE with pairs of "
                       f"your own or --data arithmetic, which need no network") from None
    return sets


def split_pairs(name, data_dir=None, seed=0):
    """{"train", "val", "test"}: lists of (question, answer) of "gsm8k" or "qa:FILE", no question in two of them.

    A tenth for test, where there is no test set, always the same; a tenth, at most 500, for val by seed. Of a repeated
    question the first answer counts. Raises ValueError for fewer than ten, and as read_pairs and gsm8k do.
    """
    sets = gsm8k(data_dir) if name == "gsm8k" else {"train": read_pairs(name.removeprefix("qa:")), "test": []}
    tested, first = dict(sets["test"]), dict(reversed(sets["train"]))
    pairs = sorted((question, answer) for question, answer in first.items() if question not in tested)
    n, tenth = len(pairs), len(pairs) // 10
    if tenth < 1:
        raise ValueError(f"{name} has {n} different questions: at least 10 are needed, to train, validate and test on")
    pairs = [pairs[i] for i in torch.randperm(n, generator=generator("test pairs")).tolist()]
    test = sets["test"] or [pairs.pop() for _ in range(tenth)]
    pairs = [pairs[i] for i in torch.randperm(len(pairs), generator=generator("val pairs", seed)).tolist()]
    n_val = min(MOST_VAL, tenth)
    return {"train": pairs[n_val:], "val": pairs[:n_val], "test": test}


def end_token(tokenizer):
    """The token that ends an answer: <|endoftext|> in GPT-2's tokenizer, elsewhere the byte 0, which no text holds."""
    special = "<|endoftext|>" in tokenizer.special_tokens_set
    return tokenizer.eot_token if special else tokenizer.encode_single_token(b"\0")


def final_answer(text):
    """What is compared of an answer: what follows the last "####", or else all of it, without spaces around.

    A number loses thousands' commas, a dollar sign in front and a full stop behind: "#### $1,234." is "1234".
    """
    answer = text.rpartition("####")[2].strip()
    number = re.fullmatch(r"(-?)\$?(-?)(\d+|\d{1,3}(?:,\d{3})+)(\.\d+)?\.?", answer)
    return "".join(part or "" for part in number.groups()).replace(",", "") if number else answer


class Pairs:
    """Question-answer pairs as tokens: the prompt "Question: {question}\\nAnswer:", the answer " {answer}" and its end.

    Both are encoded apart: a prompt has the same tokens in training and in marking. splits: from split_pairs.
    Training pairs that exceed block_size, the model's context, are left out, `left_out` of them; val and test stay
    whole, and a problem that finds no room is not solved. Raises ValueError where no training pair fits.
    """

    def __init__(self, splits, tokenizer, block_size):
        def needed(prompt, answer):
            return len(prompt) + len(answer) - 1   # of the context: the last token is only a target

        self.tokenizer, self.end = tokenizer, end_token(tokenizer)
        self.splits = {split: [self.encode(*pair) for pair in pairs] for split, pairs in splits.items()}
        self.fitting = {split: [(p, a) for p, a in pairs if needed(p, a) <= block_size]
                        for split, pairs in self.splits.items()}
        if not self.fitting["train"]:
            raise ValueError(f"no training pair fits into the model's context of {block_size} tokens: "
                             f"the shortest needs {min(needed(*pair) for pair in self.splits['train'])}")
        self.left_out = len(self.splits["train"]) - len(self.fitting["train"])
        self.max_new = max(len(a) for _, a in self.fitting["train"])
        self.sha256 = hashlib.sha256(json.dumps(splits).encode("utf-8")).hexdigest()

    def encode(self, question, answer):
        """A pair as tokens: prompt (P,) and answer (A,) with its end, int64."""
        prompt = self.tokenizer.encode_ordinary(f"Question: {question}\nAnswer:")
        return torch.tensor(prompt), torch.tensor(self.tokenizer.encode_ordinary(f" {answer}") + [self.end])

    def text(self, tokens):
        """tokens (T,), but for the end token, as text; bytes that are no UTF-8 become the replacement character."""
        return self.tokenizer.decode([t for t in tokens.tolist() if t != self.end])

    def read(self, tokens):
        return final_answer(self.text(tokens))

    def batch(self, size, seed, step):
        """Training pairs, by (data, seed, step) alone: x, y (size, T) int64, y -100 outside the answer and its end."""
        g, n = generator("pairs", seed, step), len(self.fitting["train"])
        index = torch.randperm(n, generator=g)[:size] if size <= n else torch.randint(n, (size,), generator=g)
        return stack([self.fitting["train"][i] for i in index])

    def problems(self, split, n=None):
        """The first n problems of a split, or all: prompts (P,) and answers (A,), int64, in two tuples."""
        return tuple(zip(*self.splits[split][:n]))

    @torch.no_grad()
    def loss(self, model, split, batch_size=8):
        """Mean cross entropy in nats of the answers' tokens, of the pairs of a split that fit; None where none does."""
        device, total, count = next(model.parameters()).device, 0.0, 0
        for first in range(0, len(self.fitting[split]), batch_size):
            x, y = (t.to(device) for t in stack(self.fitting[split][first:first + batch_size]))
            total += F.cross_entropy(model(x).flatten(0, 1).float(), y.flatten(), reduction="sum").item()
            count += (y != NO_LOSS).sum().item()
        return total / count if count else None

    def show(self, prompt, answer, prediction):
        """One pair for a reader: the prompt, the right answer, the model's and whether it counts."""
        mark = "right" if right(self, answer, prediction) else "wrong"
        return f"{self.text(prompt)}{self.text(answer)}\nModel:{self.text(prediction)}\n{mark}"


def stack(pairs):
    """(prompt, answer) pairs of tokens -> x and y, both (len(pairs), T), padded on the right, y shifted by one."""
    x = [torch.cat([p, a[:-1]]) for p, a in pairs]
    y = [torch.cat([torch.full_like(p[1:], NO_LOSS), a]) for p, a in pairs]
    return pad_sequence(x, batch_first=True), pad_sequence(y, batch_first=True, padding_value=NO_LOSS)


# ---- marking ----

@torch.no_grad()
def greedy(model, prompts, max_new, end=None, batch_size=64):
    """The likeliest continuation of each prompt, token by token: a list of (at most max_new,) int64 on the CPU.

    prompts: a sequence of (T,) int64 tensors, of any lengths. A continuation ends with the token `end`, after max_new
    tokens or where the context is full; a prompt that is longer than the context gets none. Rows are padded on the
    right and read at their own last token: attention is causal, so none sees what stands behind it.
    """
    rows = [p.cpu() for p in prompts]                                # (T_i,) each, and growing
    starts = [len(row) for row in rows]
    device, context = next(model.parameters()).device, model.config.block_size
    was_training = model.training
    model.eval()
    try:
        order = sorted(range(len(rows)), key=starts.__getitem__)   # prompts of like length together: little padding
        for first in range(0, len(rows), batch_size):
            going = [i for i in order[first:first + batch_size] if starts[i] <= context]
            while going:
                x = pad_sequence([rows[i] for i in going], batch_first=True).to(device)             # (B, T)
                last = torch.tensor([len(rows[i]) - 1 for i in going], device=device)               # (B,)
                new = model(x, at=last).argmax(dim=-1, keepdim=True).cpu()                          # (B, 1)
                for i, token in zip(going, new):
                    rows[i] = torch.cat([rows[i], token])
                going = [i for i, token in zip(going, new.flatten().tolist()) if token != end
                         and len(rows[i]) <= context and len(rows[i]) - starts[i] < max_new]
    finally:
        model.train(was_training)
    return [row[start:] for row, start in zip(rows, starts)]


def exact_match(model, prompts, answers, data=Arithmetic, batch_size=64):
    """Percent of prompts to which the model's greedy continuation says what the answer says, and the continuations.

    prompts, answers: what data.problems gave, sequences of (T,) int64 tensors. Returns (percent, list of (T,)).
    """
    predictions = greedy(model, prompts, data.max_new, data.end, batch_size)
    return 100 * sum(right(data, a, p) for a, p in zip(answers, predictions)) / len(predictions), predictions


def right(data, answer, prediction):
    """Whether a prediction (T,) is complete and says what the answer (A,) says: "12" may be half of "120"."""
    ended = data.end is None or data.end in prediction.tolist()
    return ended and data.read(prediction) == data.read(answer)
