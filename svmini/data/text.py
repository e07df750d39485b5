"""Language modeling: read a text, split it by paragraphs into train, val and test, and predict its next tokens.

Two texts are part of every Python installation and need no download: the source code of the standard library
("stdlib", for pretraining) and the topics of Python's help ("topics", for adaptation).
"""

import hashlib
import re
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F

from ..errors import InputError, MissingFile
from ..rng import generator
from . import download_once, normalize, to_device

SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}
MIN_CHARACTERS = 10_000   # of a text; a tenth of it must fill a block
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TEXT_EVAL_SIZE = 400      # windows of val or test that are evaluated


# ---- texts ----

def stdlib_source():
    """Return the top-level *.py files of Python's standard library, sorted by name and joined (4.7 MB)."""
    folder = Path(sysconfig.get_path("stdlib"))
    # these two kinds of files do not belong to the library and differ between installations
    files = [f for f in sorted(folder.glob("*.py"), key=lambda f: f.name)
             if not f.name.startswith(("_sysconfigdata", "sitecustomize"))]
    return "\n".join(f.read_text(encoding="utf-8") for f in files)


def reference_topics():
    """Return the topics of Python's help (language reference, English, 370 KB), each paragraph once.

    The topics quote each other at length. Repeated paragraphs would be in training and in test.
    """
    from pydoc_data.topics import topics
    return "\n\n".join(paragraphs("\n\n".join(topics[name] for name in sorted(topics))))


def read_text(name, data_dir=None):
    """Return the text called "stdlib", "topics" or "tinyshakespeare", or the UTF-8 file of "file:PATH".

    data_dir (default: "data") holds tinyshakespeare/input.txt, which is downloaded once. Windows line endings become
    "\\n". Raises MissingFile for a missing file, and InputError for a file that is not UTF-8 or has fewer than 10,000
    characters.
    """
    if name == "stdlib":
        return stdlib_source()
    if name == "topics":
        return reference_topics()
    if name == "tinyshakespeare":
        path = download_once(Path(data_dir or "data") / name / "input.txt", SHAKESPEARE_URL, SHAKESPEARE_SHA256,
                             "--data topics, which needs no network")
    else:
        path = Path(name.removeprefix("file:")).expanduser()
    if not path.is_file():
        raise MissingFile(f"there is no file {path}: file:PATH needs the path of a UTF-8 text file")
    try:
        text = path.read_text(encoding="utf-8-sig")   # utf-8 without the byte order mark that some editors write
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8 first") from None
    if "\0" in text:
        raise InputError(f"{path} is not UTF-8 text (it contains the character NUL): save it as UTF-8 first")
    if len(text) < MIN_CHARACTERS:
        raise InputError(f"{path} is too short to train on ({len(text)} characters): give at least {MIN_CHARACTERS}")
    return text


# ---- splits ----

def paragraphs(text):
    """Return the paragraphs of a text, which blank lines separate, each once and in order of first appearance."""
    parts = (p.rstrip() for p in re.split(r"\n\s*\n", text))
    return list(dict.fromkeys(p.strip("\n") for p in parts if p))


def split_text(text, seed=0):
    """Split a text into {"train", "val", "test"}: strings with 80, 10 and 10 percent of the characters.

    Splits consist of whole paragraphs in the order of the text. No paragraph is in two splits, not even with other
    whitespace. The paragraphs are dealt in an order that the seed shuffles. If a long paragraph leaves a split with
    less than half or more than one and a half times its share, they are dealt again from long to short, so that the
    longest ones are in train. A text with other paragraphs is split in another way: unlike images, a paragraph does
    not keep its split. Raises InputError if there are fewer than ten different paragraphs.
    """
    parts = paragraphs(text)
    n = len(set(map(normalize, parts)))
    if n < 10:
        raise InputError(f"the text has {n} different paragraphs, at least 10 are needed: separate them by blank lines")
    shuffled = torch.randperm(len(parts), generator=generator("split", seed)).tolist()
    splits = deal(parts, shuffled, lambda share, size: -size / share)
    if not all(0.5 <= characters(splits[name]) / characters(parts) / share <= 1.5 for name, share in SHARES.items()):
        parts = list({normalize(p): p for p in parts}.values())
        total, from_long_to_short = characters(parts), sorted(range(len(parts)), key=lambda i: -len(parts[i]))
        splits = deal(parts, from_long_to_short, lambda share, size: share * total - size)
    return {name: "\n\n".join(split) + "\n" for name, split in splits.items()}


def characters(parts):
    return sum(map(len, parts))


def deal(parts, order, priority):
    """Deal paragraphs, in this order, to the split whose priority(share, size) is highest.

    Returns lists in the order of the text. What differs from a paragraph of train (or test) only in whitespace is left
    out of test and val.
    """
    dealt, size = {name: [] for name in SHARES}, dict.fromkeys(SHARES, 0)
    for i in order:
        name = max(SHARES, key=lambda split: priority(SHARES[split], size[split]))
        dealt[name].append(i)
        size[name] += len(parts[i])
    owner = {normalize(parts[i]): name for name in ("val", "test", "train") for i in dealt[name]}
    return {name: [parts[i] for i in sorted(dealt[name]) if owner[normalize(parts[i])] == name] for name in SHARES}


# ---- the task ----

def windows(tokens, length):
    """Cut tokens (n,) into consecutive windows x and y for evaluation, both (n_windows, length) int64.

    y is x shifted by one token. Tokens that do not fill a window are dropped. Raises InputError if there is no window.
    """
    if len(tokens) < length + 1:
        raise InputError(f"{len(tokens)} tokens do not fill a window of {length} and the token that follows: "
                         "use a longer text or a shorter window")
    n = (len(tokens) - 1) // length
    return tokens[:n * length].view(n, length), tokens[1:n * length + 1].view(n, length)


def cross_entropy(model, x, y):
    """Return the mean loss in nats of the tokens that follow x; x and y (B, T) int64, y may be IGNORE_INDEX."""
    return F.cross_entropy(model(x).flatten(0, 1).float(), y.flatten())


class LanguageModeling:
    """Predict the next token of a text, `block_size` tokens at a time.

    tokenizer: a tiktoken.Encoding.  split_seed: for the split into train, val and test.  seed: for the sample that
    `show` draws.  Raises InputError as split_text does, and for a split that does not fill one window.
    """
    metric, higher_is_better = "loss", False
    loss = staticmethod(cross_entropy)

    def __init__(self, name, text, tokenizer, block_size, device, split_seed=0, seed=0):
        self.name, self.tokenizer, self.block_size, self.device, self.seed = name, tokenizer, block_size, device, seed
        self.splits = {split: torch.tensor(tokenizer.encode_ordinary(part), dtype=torch.int64, device=device)
                       for split, part in split_text(text, split_seed).items()}                    # (n,) each
        self.windows = {split: windows(tokens, block_size) for split, tokens in self.splits.items()}
        sha256 = hashlib.sha256(text.encode("utf-8")).hexdigest()
        self.data_config = {"data": name, "sha256": sha256, "block_size": block_size}

    def describe(self):
        """Return the number of tokens in each split as one line for a reader."""
        return f"{self.name}: {', '.join(f'{len(x):,} tokens in {split}' for split, x in self.splits.items())}"

    def batch(self, size, seed, step):
        """Draw random windows of the training tokens: x and y, both (size, block_size) int64 on the device."""
        tokens = self.splits["train"]
        starts = torch.randint(len(tokens) - self.block_size, (size, 1), generator=generator("text", seed, step))
        index = to_device(starts + torch.arange(self.block_size), self.device)                # (size, block_size)
        return tokens[index], tokens[index + 1]

    def evaluate(self, model, split):
        """Return the mean loss over the first 400 windows, as "loss" and as "metric"."""
        x, y = (t[:TEXT_EVAL_SIZE] for t in self.windows[split])
        n = max(1, 4096 // self.block_size)   # windows at a time
        loss = sum(cross_entropy(model, a, b).item() * len(a) for a, b in zip(x.split(n), y.split(n))) / len(x)
        return {"loss": loss, "metric": loss}

    def show(self, model):
        """Return [the first 24 tokens of the test split and the model's continuation, as a string]."""
        g = torch.Generator(self.device).manual_seed(self.seed)
        tokens = model.generate(self.splits["test"][None, :24], 80, temperature=0.8, top_k=40, generator=g)
        return [self.tokenizer.decode(tokens[0].tolist())]
