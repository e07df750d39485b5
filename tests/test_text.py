"""Corpora, the BPE and batches, without a network."""

import io
import json
import re
import sys
import time
import urllib.request

import pytest
import torch

from svmini import text as T

STORY = "\n\n".join(f"Chapter {i}. The {i}th queen's cat sat on {i * 7} mats; it didn't\n  see the dog, it'll say."
                    for i in range(160))


@pytest.fixture(scope="module")
def tokenizer():
    return T.bpe_tokenizer(T.train_bpe(STORY, vocab_size=320))


# ---- texts ----

def test_stdlib_source():
    text = T.read_text("stdlib")
    assert len(text) > 1_000_000 and "def dataclass(" in text and "\r" not in text
    assert text == T.read_text("stdlib")


def test_stdlib_without_source(tmp_path, monkeypatch):
    (tmp_path / "os.pyc").write_bytes(b"")
    monkeypatch.setattr(T.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="zipped or compiled only"):
        T.stdlib_source()
    (tmp_path / "b.py").write_text("b = 'ä'\n", encoding="utf-8")
    (tmp_path / "a.py").write_text("a = 1\n", encoding="utf-8")
    (tmp_path / "_sysconfigdata_linux.py").write_text("prefix = '/home'\n", encoding="utf-8")
    assert T.stdlib_source() == "a = 1\n\nb = 'ä'\n"


def test_reference_topics():
    from pydoc_data.topics import topics
    text = T.read_text("topics")
    parts = text.split("\n\n")
    assert len(parts) == len(set(parts)) > 1000
    every = {p.strip("\n").rstrip() for topic in topics.values() for p in re.split(r"\n\s*\n", topic)} - {""}
    assert set(parts) == every                                             # nothing is lost but repetition
    assert len(text) < 0.9 * sum(map(len, topics.values()))


def test_reference_topics_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)            # makes the import fail
    with pytest.raises(FileNotFoundError, match="pydoc_data/topics.py"):
        T.read_text("topics")


def test_read_file(tmp_path):
    path = tmp_path / "story.txt"
    path.write_bytes(b"\xef\xbb\xbf" + STORY.replace("\n", "\r\n").encode("utf-8"))   # as Windows editors save it
    assert T.read_text(f"file:{path}") == STORY
    path.write_bytes(STORY.encode("utf-8") + "Käse".encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8"):
        T.read_text(f"file:{path}")
    for short in (b"", b" \n" * 2000, b"too short"):
        path.write_bytes(short)
        with pytest.raises(ValueError, match="too short"):
            T.read_text(f"file:{path}")
    for missing in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no file"):
            T.read_text(f"file:{missing}")
    with pytest.raises(ValueError, match="no text is called 'stdlob'"):
        T.read_text("stdlob")


def test_tinyshakespeare_from_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", None)                   # a download would be a TypeError
    (tmp_path / "input.txt").write_text(STORY, encoding="utf-8")
    assert T.read_text("tinyshakespeare", tmp_path) == STORY
    (tmp_path / "tinyshakespeare").mkdir()
    (tmp_path / "tinyshakespeare" / "input.txt").write_text(STORY.upper(), encoding="utf-8")
    assert T.read_text("tinyshakespeare", tmp_path) == STORY.upper()


def test_tinyshakespeare_download(tmp_path, monkeypatch):
    def offline(url, timeout):
        raise urllib.error.URLError("no route\nto host")
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    with pytest.raises(FileNotFoundError) as caught:
        T.read_text("tinyshakespeare", tmp_path)
    message = str(caught.value)
    assert "\n" not in message and T.SHAKESPEARE_URL in message and "--data topics" in message
    assert str(tmp_path / "tinyshakespeare" / "input.txt") in message

    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(STORY.encode("utf-8")))
    with pytest.raises(FileNotFoundError, match="another file"):           # a login page, say
        T.read_text("tinyshakespeare", tmp_path)
    assert not list(tmp_path.rglob("*input*"))                             # neither kept nor half kept

    monkeypatch.setattr(T, "SHAKESPEARE_SHA256", T.hashlib.sha256(STORY.encode("utf-8")).hexdigest())
    assert T.read_text("tinyshakespeare", tmp_path) == STORY
    assert [p.name for p in tmp_path.rglob("*input*")] == ["input.txt"]


# ---- splits ----

def test_split_keeps_paragraphs_apart():
    text = T.read_text("topics") + "\n\n" + STORY + "\n\n" + STORY         # with repeated paragraphs
    splits = T.split_text(text)
    sets = {name: set(part.rstrip("\n").split("\n\n")) for name, part in splits.items()}
    assert not (sets["train"] & sets["val"] or sets["train"] & sets["test"] or sets["val"] & sets["test"])
    assert set.union(*sets.values()) == set(T.paragraphs(text))
    total = sum(map(len, splits.values()))
    for name, share in T.SHARES.items():
        assert len(splits[name]) / total == pytest.approx(share, abs=0.01)
    assert splits == T.split_text(text, seed=0) != T.split_text(text, seed=1)


def test_paragraphs():
    assert T.paragraphs("\n\n\n  a\n b \n \t\n\nc\n\n  a\n b\n") == ["  a\n b", "c"]
    assert T.paragraphs(" \n\n \n") == []


def test_split_keeps_order_and_indentation():
    text = "\n\n \n".join(f"    line {i}\n        more  " for i in range(20))
    parts = T.split_text(text)["train"].rstrip("\n").split("\n\n")
    assert all(re.fullmatch(r"    line \d+\n        more", part) for part in parts)
    places = [int(part.split()[1]) for part in parts]
    assert places == sorted(places)


def test_split_needs_paragraphs():
    with pytest.raises(ValueError, match="blank lines"):
        T.split_text("one line\n" * 1000)


def test_make_corpus(tokenizer):
    corpus = T.make_corpus("story", STORY, tokenizer, seed=3)
    for name, part in T.split_text(STORY, seed=3).items():
        assert corpus.splits[name].dtype == torch.int64 and corpus.splits[name].dim() == 1
        assert tokenizer.decode(corpus.splits[name].tolist()) == part
    assert corpus.name == "story" and corpus.sha256 == T.hashlib.sha256(STORY.encode()).hexdigest()


# ---- tokenizers ----

def test_bpe_merges_by_hand():
    # "ab" is most frequent (7), then "ab" + "c" (4); "de" and "fg" occur as often, so the smaller ids come first
    ranks = T.train_bpe("abc abc abc abc ab ab ab de fg de fg de fg".replace(" ", "1"), vocab_size=260)
    assert ranks[:256] == [f"{b:02x}" for b in range(256)]
    assert [bytes.fromhex(token) for token in ranks[256:]] == [b"ab", b"abc", b"de", b"fg"]


def naive_bpe(text, vocab_size):
    """The same by counting every pair anew for each token."""
    import regex
    words = [list(word.encode()) for word in regex.findall(T.GPT2_PATTERN, text)]
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < vocab_size:
        counts = T.Counter(pair for ids in words for pair in zip(ids, ids[1:]))
        pair = min(counts, key=lambda p: (-counts[p], p))
        words = [T.join_pair(ids, pair, len(tokens)) for ids in words]
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
    return [token.hex() for token in tokens]


def test_bpe_equals_naive_counting():
    text = T.read_text("topics")[:5000] + " aaaa aaaaaaa ababab" * 20 + STORY
    ranks = T.train_bpe(text, 400)
    assert ranks == naive_bpe(text, 400) and len(set(ranks)) == 400        # no two tokens spell the same


def test_bpe_covers_every_byte(tokenizer):
    text = STORY + "caf\u00e9 \U0001f600\U0001f468\u200d\U0001f469 \x00\x07\x1f\x7f\t\r\n  \u4e2d\u6587 \ufeff\U0010ffff"
    assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text
    every = bytes(range(256))
    assert sorted(tokenizer.encode_single_token(bytes([b])) for b in every) == list(every)
    assert tokenizer.encode_ordinary("<|endoftext|>") and tokenizer.encode_ordinary("") == []
    assert len(tokenizer.encode_ordinary(STORY)) < len(STORY) / 2


def test_bpe_is_plain_values(tmp_path):
    ranks = T.train_bpe(STORY, 300)
    assert ranks == T.train_bpe(STORY, 300) and len(set(ranks)) == 300
    torch.save({"tokenizer": ranks}, tmp_path / "checkpoint.pt")
    loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["tokenizer"]
    assert loaded == json.loads(json.dumps(ranks)) == ranks
    ours, theirs = T.bpe_tokenizer(ranks), T.bpe_tokenizer(loaded)
    assert ours.n_vocab == theirs.n_vocab == 300
    assert ours.encode_ordinary(STORY) == theirs.encode_ordinary(STORY)


def test_bpe_sizes():
    assert len(T.train_bpe("abcdefg", 1024)) == 256                        # no pair occurs twice
    assert T.bpe_tokenizer(T.train_bpe("", 256)).encode_ordinary("hi") == [104, 105]
    with pytest.raises(ValueError, match="at least 256"):
        T.train_bpe(STORY, 255)


def test_gpt2_tokenizer_offline(monkeypatch):
    import tiktoken

    def offline(name):
        raise ConnectionError("no route to host")
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(FileNotFoundError, match="TIKTOKEN_CACHE_DIR.*trained BPE"):
        T.gpt2_tokenizer()


# ---- batches ----

def test_batch_is_a_function_of_seed_and_step():
    tokens = torch.arange(1000) * 3
    x, y = T.batch(tokens, size=8, length=16, seed=0, step=7)
    assert x.shape == y.shape == (8, 16) and x.dtype == y.dtype == torch.int64
    assert torch.equal(y, x + 3) and torch.equal(x[:, 1:], y[:, :-1])
    torch.manual_seed(5)                                                   # no other generator has a say
    assert torch.equal(T.batch(tokens, 8, 16, 0, 7)[0], x)
    for seed, step in ((0, 8), (1, 7), (7, 0)):
        assert not torch.equal(T.batch(tokens, 8, 16, seed, step)[0], x)


def test_batch_reaches_both_ends():
    x, y = T.batch(torch.arange(12), size=500, length=4, seed=0, step=0)
    assert x.min() == 0 and y.max() == 11 and set(x[:, 0].tolist()) == set(range(8))
    assert torch.equal(T.batch(torch.arange(5), 3, 4, 0, 0)[1], torch.tensor([[1, 2, 3, 4]] * 3))


def test_batch_is_cheap():
    tokens = torch.arange(1_000_000)
    times = []
    for step in range(50):
        begin = time.perf_counter()
        T.batch(tokens, 8, 128, 0, step)
        times.append(time.perf_counter() - begin)
    assert min(times) < 1e-3                                               # the best of many: others use the machine


@pytest.mark.parametrize("n, count", [(5, 1), (8, 1), (9, 2), (12, 2), (13, 3)])
def test_windows(n, count):
    tokens = torch.arange(n)
    x, y = T.windows(tokens, 4)
    assert x.shape == y.shape == (count, 4)
    assert torch.equal(x.flatten(), tokens[:4 * count]) and torch.equal(y, x + 1)


def test_too_few_tokens():
    for call in (lambda: T.windows(torch.arange(4), 4), lambda: T.batch(torch.arange(4), 1, 4, 0, 0)):
        with pytest.raises(ValueError, match="4 tokens do not fill a window of 4"):
            call()
