"""LanguageModeling, divided by paragraphs into train, val and test, encoded by a tokenizer, and the task to go on with it.

Two texts need no download, since Python brings them: its own library ("stdlib", to pretrain on) and the topics
of its help ("topics", to adapt to).
"""

import hashlib
import re
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F

from ..errors import InputError, MissingFile
from ..rng import generator
from . import fetched

SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}
SHORTEST = 10_000   # characters; less than this is no corpus: a tenth of it must fill a block_size
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
MOST_WINDOWS = 400   # of val or test are evaluated


# ---- texts ----

def stdlib_source():
    """The top-level *.py of the running Python's standard library, sorted by name, joined (about 4.7 MB)."""
    folder = Path(sysconfig.get_path("stdlib"))
    # two kinds of file there are not the library's: they differ from one installation to the next
    files = [f for f in sorted(folder.glob("*.py"), key=lambda f: f.name)
             if not f.name.startswith(("_sysconfigdata", "sitecustomize"))]
    return "\n".join(f.read_text(encoding="utf-8") for f in files)


def reference_topics():
    """The topics of Python's help (language reference, English, about 370 KB), each paragraph once.

    The topics quote each other at length: repeated paragraphs would end up in training and in test.
    """
    from pydoc_data.topics import topics
    return "\n\n".join(paragraphs("\n\n".join(topics[name] for name in sorted(topics))))


def read_text(name, data_dir=None):
    """The text called name: "stdlib", "topics", "tinyshakespeare", or "file:PATH" for any UTF-8 file.

    data_dir (default "data") holds tinyshakespeare/input.txt, downloaded once. Windows line ends become "\\n".
    Raises MissingFile for a missing file, InputError for one that is not UTF-8 or has fewer than 10,000 characters.
    """
    if name == "stdlib":
        return stdlib_source()
    if name == "topics":
        return reference_topics()
    if name == "tinyshakespeare":
        path = fetched(Path(data_dir or "data") / name / "input.txt", SHAKESPEARE_URL, SHAKESPEARE_SHA256,
                       "--data topics, which needs no network")
    else:
        path = Path(name.removeprefix("file:")).expanduser()
    if not path.is_file():
        raise MissingFile(f"there is no file {path}: file:PATH wants the path of a UTF-8 text file")
    try:
        text = path.read_text(encoding="utf-8-sig")   # as utf-8, less the mark that some editors put in front
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8 first") from None
    if len(text) < SHORTEST:
        raise InputError(f"{path} is too short to train on ({len(text)} characters): at least {SHORTEST} are needed")
    return text


# ---- splits ----

def paragraphs(text):
    """The paragraphs of a text (parted by blank lines), each once, in the order in which they first appear."""
    parts = (p.rstrip() for p in re.split(r"\n\s*\n", text))
    return list(dict.fromkeys(p.strip("\n") for p in parts if p))


def split_text(text, seed=0):
    """{"train", "val", "test"}: strings with about 80, 10 and 10 percent of the characters.

    Whole paragraphs are dealt in an order shuffled by seed, and repeated ones count once, so none is in two
    splits. Within a split they stand in the text's own order. Raises InputError for fewer than ten paragraphs.
    """
    parts = paragraphs(text)
    if len(parts) < 10:
        raise InputError(f"the text has {len(parts)} different paragraphs, at least 10 are needed to split it: "
                         f"part it by blank lines")
    dealt = {name: [] for name in SHARES}
    size = dict.fromkeys(SHARES, 0)
    for i in torch.randperm(len(parts), generator=generator("split", seed)).tolist():
        name = min(SHARES, key=lambda split: size[split] / SHARES[split])   # the split that is furthest behind
        dealt[name].append(i)
        size[name] += len(parts[i])
    return {name: "\n\n".join(parts[i] for i in sorted(dealt[name])) + "\n" for name in SHARES}


# ---- the task ----

def windows(tokens, length):
    """All stretches of tokens (n,) one after another: x and y, both (n_windows, length) int64, for evaluation.

    y is x shifted by one token. The rest that fills no window is left out. Raises InputError where none is filled.
    """
    if len(tokens) < length + 1:
        raise InputError(f"{len(tokens)} tokens do not fill a window of {length} and the one that follows: "
                         f"use a longer text or a shorter window")
    n = (len(tokens) - 1) // length
    return tokens[:n * length].view(n, length), tokens[1:n * length + 1].view(n, length)


def cross_entropy(model, x, y):
    """Mean loss in nats of the tokens that follow x; x and y (B, T) int64, no loss where y is IGNORE_INDEX."""
    return F.cross_entropy(model(x).flatten(0, 1).float(), y.flatten())


class LanguageModeling:
    """The task to go on with a text, `block_size` tokens at a time.

    tokenizer: a tiktoken.Encoding; split_seed: of the split into train, val and test; seed: of what `show` draws.
    Raises InputError as split_text does, and for a split that does not fill one window.
    """
    metric, higher_is_better = "loss", False
    loss = staticmethod(cross_entropy)

    def __init__(self, name, text, tokenizer, block_size, device, split_seed=0, seed=0):
        self.name, self.tokenizer, self.block_size, self.device, self.seed = name, tokenizer, block_size, device, seed
        self.splits = {split: torch.tensor(tokenizer.encode_ordinary(part), dtype=torch.int64, device=device)
                       for split, part in split_text(text, split_seed).items()}                    # (n,) each
        self.windows = {split: windows(tokens, block_size) for split, tokens in self.splits.items()}
        self.data_config = {"data": name, "sha256": hashlib.sha256(text.encode("utf-8")).hexdigest(), "block_size": block_size}

    def batch(self, size, seed, step):
        """Random stretches of the training tokens: x and y, both (size, block_size) int64 on the device."""
        tokens = self.splits["train"]
        starts = torch.randint(len(tokens) - self.block_size, (size, 1), generator=generator("text", seed, step))
        at = (starts + torch.arange(self.block_size)).to(self.device, non_blocking=True)   # (size, block_size)
        return tokens[at], tokens[at + 1]

    def evaluate(self, model, split):
        """The mean loss of the first 400 windows, as "loss" and as "metric"."""
        x, y = (t[:MOST_WINDOWS] for t in self.windows[split])
        n = max(1, 4096 // self.block_size)   # at a time
        loss = sum(cross_entropy(model, a, b).item() * len(a) for a, b in zip(x.split(n), y.split(n))) / len(x)
        return {"loss": loss, "metric": loss}

    def show(self, model):
        """[the test text's first 24 tokens, and what the model adds to them]"""
        g = torch.Generator(self.device).manual_seed(self.seed)
        tokens = model.generate(self.splits["test"][None, :24], 80, temperature=0.8, top_k=40, generator=g)
        return [self.tokenizer.decode(tokens[0].tolist())]
