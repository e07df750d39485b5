"""Text for train_gpt.py: corpora, tokenizers, batches.

A corpus is a text, divided by paragraphs into train, val and test, and encoded by a tokenizer:

    text = read_text("stdlib")
    ranks = train_bpe(text)                        # plain values, kept with a model's checkpoint
    corpus = make_corpus("stdlib", text, bpe_tokenizer(ranks))
    x, y = batch(corpus.splits["train"], size=8, length=128, seed=0, step=0)

Two texts need no download, since Python brings them: its own library ("stdlib", to pretrain on) and the topics
of its help ("topics", to adapt to).
"""

import hashlib
import heapq
import re
import sysconfig
import urllib.request
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

from .files import write_whole
from .rng import generator

TEXTS = ("stdlib", "topics", "tinyshakespeare")
SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}
SHORTEST = 10_000   # characters; less than this is no corpus: a tenth of it must fill a context
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
GPT2_VOCAB = 50257
# Where GPT-2 cuts a text, so that no token crosses a cut: contractions, words, numbers, other marks, spaces
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass
class Corpus:
    """A tokenized text. splits: "train", "val", "test" to int64 (n,); sha256: of the text, unsplit."""
    name: str
    splits: dict
    sha256: str


# ---- texts ----

def stdlib_source():
    """The top-level *.py of the running Python's standard library, sorted by name, joined (about 4.7 MB).

    Raises FileNotFoundError where this Python keeps its library zipped or compiled only.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    # two kinds of file there are not the library's: they differ from one installation to the next
    files = [f for f in sorted(folder.glob("*.py"), key=lambda f: f.name)
             if not f.name.startswith(("_sysconfigdata", "sitecustomize"))]
    if not files:
        raise FileNotFoundError(f"this Python has no library source in {folder} (zipped or compiled only): "
                                f"run under an ordinary Python, or give a text of your own as file:PATH")
    return "\n".join(f.read_text(encoding="utf-8") for f in files)


def reference_topics():
    """The topics of Python's help (language reference, English, about 370 KB), each paragraph once.

    The topics quote each other at length: repeated paragraphs would end up in training and in test.
    Raises FileNotFoundError where this Python comes without pydoc_data.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise FileNotFoundError("this Python has no pydoc_data/topics.py: run under an ordinary Python, "
                                "or give a text of your own as file:PATH") from None
    return "\n\n".join(paragraphs("\n\n".join(topics[name] for name in sorted(topics))))


def tinyshakespeare(data_dir):
    """The path of tinyshakespeare's input.txt under data_dir, downloaded once where it is missing."""
    folder = Path(data_dir or "data")
    target = folder / "tinyshakespeare" / "input.txt"
    for path in (target, folder / "input.txt"):
        if path.is_file():
            return path
    try:
        with urllib.request.urlopen(SHAKESPEARE_URL, timeout=20) as reply:
            content = reply.read()
        if hashlib.sha256(content).hexdigest() != SHAKESPEARE_SHA256:   # a login page, say
            raise OSError("what came is another file")
        write_whole(target, lambda file: file.write(content))
    except Exception as error:   # besides OSError, a broken connection raises http.client's own kind
        why = " ".join(str(error).split()) or type(error).__name__   # one line
        raise FileNotFoundError(f"{target} is missing and could not be fetched from {SHAKESPEARE_URL} ({why}): put "
                                f"it there by hand, or use --data topics, which needs no network") from None
    return target


def read_text(name, data_dir=None):
    """The text called name: "stdlib", "topics", "tinyshakespeare", or "file:PATH" for any UTF-8 file.

    data_dir (default "data") holds tinyshakespeare/input.txt or input.txt. Windows line ends become "\\n".
    Raises FileNotFoundError for a missing file, ValueError for another name, a file that is not UTF-8, or one
    with fewer than 10,000 characters.
    """
    if name == "stdlib":
        return stdlib_source()
    if name == "topics":
        return reference_topics()
    if name != "tinyshakespeare" and not name.startswith("file:"):
        raise ValueError(f"no text is called {name!r}: use {', '.join(TEXTS)}, or file:PATH for a file of your own")
    own_file = Path(name.removeprefix("file:")).expanduser()
    path = tinyshakespeare(data_dir) if name == "tinyshakespeare" else own_file
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: file:PATH wants the path of a UTF-8 text file")
    try:
        text = path.read_text(encoding="utf-8-sig")   # as utf-8, less the mark that some editors put in front
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8 first") from None
    if len(text.strip()) < SHORTEST:
        raise ValueError(f"{path} is too short to train on ({len(text.strip())} characters): "
                         f"give a text of at least {SHORTEST}")
    return text


# ---- splits ----

def paragraphs(text):
    """The paragraphs of a text (parted by blank lines), each once, in the order in which they first appear."""
    parts = (p.rstrip() for p in re.split(r"\n\s*\n", text))
    return list(dict.fromkeys(p.strip("\n") for p in parts if p))


def split_text(text, seed=0):
    """{"train", "val", "test"}: strings with about 80, 10 and 10 percent of the characters.

    Whole paragraphs are dealt in an order shuffled by seed, and repeated ones count once, so none is in two
    splits. Within a split they stand in the text's own order. Raises ValueError for fewer than ten paragraphs.
    """
    parts = paragraphs(text)
    if len(parts) < 10:
        raise ValueError(f"the text has {len(parts)} different paragraphs, at least 10 are needed to split it: "
                         f"part it by blank lines")
    dealt = {name: [] for name in SHARES}
    size = dict.fromkeys(SHARES, 0)
    for i in torch.randperm(len(parts), generator=generator("split", seed)).tolist():
        name = min(SHARES, key=lambda split: size[split] / SHARES[split])   # the split that is furthest behind
        dealt[name].append(i)
        size[name] += len(parts[i])
    return {name: "\n\n".join(parts[i] for i in sorted(dealt[name])) + "\n" for name in SHARES}


def make_corpus(name, text, tokenizer, seed=0):
    """Split a text by seed, encode each split: a Corpus. Raises ValueError as split_text does."""
    splits = {split: torch.tensor(tokenizer.encode_ordinary(part), dtype=torch.int64)
              for split, part in split_text(text, seed).items()}
    return Corpus(name, splits, hashlib.sha256(text.encode("utf-8")).hexdigest())


# ---- tokenizers ----

def train_bpe(text, vocab_size=1024):
    """Byte-pair encoding (Sennrich et al. 2016) on bytes, as in GPT-2: the tokens' bytes in hexadecimal, by rank.

    The first 256 are the single bytes, so every text can be encoded; each further one joins the pair of tokens
    that stands side by side most often (of equally frequent pairs the one with the smaller ids). Returns a list of
    strings, plain values for JSON or a checkpoint; it is shorter than vocab_size where no pair is left that occurs
    twice. Raises ValueError for a vocab_size below 256.
    """
    import regex
    if vocab_size < 256:
        raise ValueError(f"vocab_size must be at least 256, one token for each byte, not {vocab_size}")
    counts = Counter(regex.findall(GPT2_PATTERN, text))            # each different word once, with its count
    words = [(list(word.encode("utf-8")), n) for word, n in counts.items()]
    pair_counts, found_in = Counter(), defaultdict(set)
    for i, (ids, n) in enumerate(words):
        for pair in zip(ids, ids[1:]):
            pair_counts[pair] += n
            found_in[pair].add(i)
    tokens = [bytes([b]) for b in range(256)]                      # a token's id is its place
    heap = [(-n, pair) for pair, n in pair_counts.items()]
    heapq.heapify(heap)
    while len(tokens) < vocab_size and heap:
        n, pair = heapq.heappop(heap)
        if -n != pair_counts[pair]:
            continue                                               # outdated: a newer entry has today's count
        if -n < 2:
            break
        new = len(tokens)
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        changed = set()
        for i in found_in.pop(pair):
            ids, n = words[i]
            shorter = join_pair(ids, pair, new)
            pairs = Counter(zip(shorter, shorter[1:]))
            pairs.subtract(zip(ids, ids[1:]))                      # what this word gains and loses by the join
            for other, difference in pairs.items():
                if difference:
                    pair_counts[other] += n * difference
                    changed.add(other)
                if difference > 0:
                    found_in[other].add(i)
            words[i] = shorter, n
        for other in changed:
            heapq.heappush(heap, (-pair_counts[other], other))
    return [token.hex() for token in tokens]


def join_pair(ids, pair, new):
    """ids with every occurrence of pair, from the left, replaced by new."""
    out, i = [], 0
    while i < len(ids):
        if i + 1 < len(ids) and (ids[i], ids[i + 1]) == pair:
            out.append(new)
            i += 2
        else:
            out.append(ids[i])
            i += 1
    return out


def bpe_tokenizer(ranks):
    """A tiktoken.Encoding (encode_ordinary, decode, n_vocab) of what train_bpe returned."""
    import tiktoken
    return tiktoken.Encoding("svmini", pat_str=GPT2_PATTERN, special_tokens={}, explicit_n_vocab=len(ranks),
                             mergeable_ranks={bytes.fromhex(token): i for i, token in enumerate(ranks)})


def gpt2_tokenizer():
    """GPT-2's tokenizer (50,257 tokens), downloaded once by tiktoken. Raises FileNotFoundError where it cannot."""
    import tiktoken
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:   # tiktoken passes on whatever its network library raises
        url = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
        names = [f"{f} as {hashlib.sha1((url + f).encode()).hexdigest()}" for f in ("vocab.bpe", "encoder.json")]
        raise FileNotFoundError(f"GPT-2's tokenizer could not be fetched from {url} ({type(error).__name__}): put "
                                f"{' and '.join(names)} into a folder and set TIKTOKEN_CACHE_DIR to it, or start from "
                                f"a model pretrained here, whose trained BPE needs no network") from None


# ---- batches ----

def batch(tokens, size, length, seed, step):
    """size random stretches of tokens (n,): x and y, both (size, length) int64; y is x shifted by one token.

    A function of the tokens, the seed and the step alone.
    Raises ValueError for fewer than length + 1 tokens.
    """
    check_length(tokens, length)
    starts = torch.randint(len(tokens) - length, (size, 1), generator=generator("text", seed, step))
    at = (starts + torch.arange(length)).to(tokens.device, non_blocking=True)   # (size, length)
    return tokens[at], tokens[at + 1]


def windows(tokens, length):
    """All stretches of tokens (n,) one after another: x and y, both (n_windows, length) int64, for evaluation.

    The rest that fills no window is left out. Raises ValueError for fewer than length + 1 tokens.
    """
    check_length(tokens, length)
    n = (len(tokens) - 1) // length
    return tokens[:n * length].view(n, length), tokens[1:n * length + 1].view(n, length)


def check_length(tokens, length):
    if length < 1 or len(tokens) < length + 1:
        raise ValueError(f"{len(tokens)} tokens do not fill a window of {length} and the one that follows: "
                         f"use a longer text or a shorter window of at least 1")
