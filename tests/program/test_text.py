"""Texts, their splits, tokenizers, and the language modeling task; no network is needed."""

import io
import re
import urllib.request

import pytest
import torch

from svmini.data import text as T
from svmini.data import tokenizers as K
from svmini.errors import InputError, MissingFile

STORY = "\n\n".join(f"Chapter {i}. The {i}th queen's cat sat on {i * 7} mats; it didn't\n  see the dog, it'll say."
                    for i in range(160))


@pytest.fixture(scope="module")
def tokenizer():
    return K.tokenizer_of(K.train_bpe(STORY, vocab_size=320))


# ---- texts ----

def test_stdlib_is_the_same_on_every_installation(tmp_path, monkeypatch):
    monkeypatch.setattr(T.sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "b.py").write_text("b = 'ä'\n", encoding="utf-8")
    (tmp_path / "a.py").write_text("a = 1\n", encoding="utf-8")
    (tmp_path / "_sysconfigdata_linux.py").write_text("prefix = '/home'\n", encoding="utf-8")
    assert T.stdlib_source() == "a = 1\n\nb = 'ä'\n"


def test_topics_have_every_paragraph_once():
    from pydoc_data.topics import topics
    text = T.read_text("topics")
    parts = text.split("\n\n")
    assert len(parts) == len(set(parts)) > 1000
    every = {p.strip("\n").rstrip() for topic in topics.values() for p in re.split(r"\n\s*\n", topic)} - {""}
    assert set(parts) == every, "only repetitions are lost"
    assert len(text) < 0.9 * sum(map(len, topics.values()))


def test_a_file_is_read_as_utf_8_and_rejected_otherwise(tmp_path):
    path = tmp_path / "story.txt"
    path.write_bytes(b"\xef\xbb\xbf" + STORY.replace("\n", "\r\n").encode("utf-8"))   # as editors on Windows save it
    assert T.read_text(f"file:{path}") == STORY
    path.write_bytes((STORY + "Käse").encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8"):
        T.read_text(f"file:{path}")
    path.write_bytes(b"too short")
    with pytest.raises(InputError, match="too short"):
        T.read_text(f"file:{path}")
    for missing in (f"file:{tmp_path}", "stdlob"):
        with pytest.raises(MissingFile, match="there is no file"):
            T.read_text(missing)


def test_tinyshakespeare_is_downloaded_once(tmp_path, monkeypatch):   # test_qa.py tests failures, with GSM-8K
    requested, content = [], STORY.encode()
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: requested.append(url) or io.BytesIO(content))
    monkeypatch.setattr(T, "SHAKESPEARE_SHA256", T.hashlib.sha256(content).hexdigest())
    for _ in range(2):
        assert T.read_text("tinyshakespeare", tmp_path) == STORY and requested == [T.SHAKESPEARE_URL]
    assert (tmp_path / "tinyshakespeare" / "input.txt").is_file()


# ---- splits ----

def test_no_paragraph_is_in_two_splits():
    again = STORY.replace("\n  ", "\n    ") + "\n\n" + STORY.replace(" sat", "\tsat")   # also if whitespace differs
    text = T.read_text("topics") + "\n\n" + STORY + "\n\n" + again
    splits = T.split_text(text)
    sets = {name: {" ".join(p.split()) for p in part.split("\n\n")} - {""} for name, part in splits.items()}
    assert not (sets["train"] & sets["val"] or sets["train"] & sets["test"] or sets["val"] & sets["test"])
    assert set.union(*sets.values()) == {" ".join(p.split()) for p in T.paragraphs(text)}
    assert splits == T.split_text(text, seed=0) != T.split_text(text, seed=1)
    splits = T.split_text(T.read_text("topics"))
    for name, share in T.SHARES.items():
        assert len(splits[name]) / sum(map(len, splits.values())) == pytest.approx(share, abs=0.01)


def test_blank_lines_separate_paragraphs():
    assert T.paragraphs("\n\n\n  a\n b \n \t\n\nc\n\n  a\n b\n") == ["  a\n b", "c"]
    with pytest.raises(InputError, match="blank lines"):
        T.split_text("one line\n" * 1000)
    with pytest.raises(InputError, match="has 9 different paragraphs"):
        T.split_text("\n\n".join([f"a {i}" for i in range(9)] + [f"a  {i}" for i in range(9)]))


def test_a_long_paragraph_is_in_training():
    """Whatever the lengths: the shares are 80, 10 and 10 percent, as far as the paragraphs allow it."""
    for seed in range(8):
        g = torch.Generator().manual_seed(seed)
        for spread in (0.5, 2.0):
            lengths = (400 * (spread * torch.randn(10 + 2 * seed, generator=g)).exp()).int().tolist()
            text = "\n\n".join(f"{i} " + "x" * n for i, n in enumerate(lengths))
            splits = {name: len(part) / len(text) for name, part in T.split_text(text, seed).items()}
            assert splits["train"] > 0.7 and max(splits["val"], splits["test"]) < 0.17
    giant = "\n\n".join(["x" * 77_000, *(f"{i} " + "x" * 300 for i in range(14))])
    splits = T.split_text(giant)
    assert "x" * 77_000 in splits["train"] and min(map(len, splits.values())) > 2000


def test_a_split_keeps_order_and_indentation():
    text = "\n\n \n".join(f"    line {i:02}\n        more  " for i in range(20))
    parts = T.split_text(text)["train"].rstrip("\n").split("\n\n")
    assert parts == sorted(parts) and all(re.fullmatch(r"    line \d\d\n        more", part) for part in parts)


# ---- tokenizers ----

def test_bpe_merges_the_most_frequent_pairs():
    # "ab" is most frequent (7), then "ab" + "c" (4); "de" and "fg" occur as often, so the smaller ids come first
    ranks = K.train_bpe("abc abc abc abc ab ab ab de fg de fg de fg".replace(" ", "1"), vocab_size=260)
    assert ranks[:256] == [f"{b:02x}" for b in range(256)]
    assert [bytes.fromhex(token) for token in ranks[256:]] == [b"ab", b"abc", b"de", b"fg"]


def test_bpe_equals_naive_counting():
    """Training that counts every pair again for each token; no two tokens have the same bytes."""
    import regex
    text = T.read_text("topics")[:2500] + " aaaa aaaaaaa ababab" * 20 + STORY[:3000]
    words = [word.encode().decode("latin-1") for word in regex.findall(K.GPT2_PATTERN, text)]   # a character a token
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < 330:
        counts = K.Counter(pair for word in words for pair in zip(word, word[1:]))
        pair = min(counts, key=lambda p: (-counts[p], p))
        words = [word.replace("".join(pair), chr(len(tokens))) for word in words]
        tokens.append(tokens[ord(pair[0])] + tokens[ord(pair[1])])
    assert K.train_bpe(text, 330) == [token.hex() for token in tokens] and len(set(tokens)) == 330


def test_bpe_covers_every_byte(tokenizer):
    text = "caf\u00e9 \U0001f600\U0001f468\u200d\U0001f469 \x00\x07\x1f\x7f\t\r\n  \u4e2d\u6587 \ufeff\U0010ffff"
    assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text
    every = bytes(range(256))
    assert sorted(tokenizer.encode_single_token(bytes([b])) for b in every) == list(every)
    assert tokenizer.encode_ordinary("<|endoftext|>") and tokenizer.encode_ordinary("") == []
    assert len(tokenizer.encode_ordinary(STORY)) < len(STORY) / 2


def test_bpe_stops_when_no_pair_repeats():
    assert len(K.train_bpe("abcdefg", 1024)) == 256                        # no pair occurs twice
    assert K.train_bpe("abcab", 1024)[256:] == [b"ab".hex()]               # one does
    assert K.bpe_tokenizer(K.train_bpe("", 256)).encode_ordinary("hi") == [104, 105]


def test_gpt2_tokenizer_without_network_names_alternatives(monkeypatch):
    import tiktoken
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: (_ for _ in ()).throw(ConnectionError("no route")))
    with pytest.raises(MissingFile, match="TIKTOKEN_CACHE_DIR.*BPE needs no network"):
        K.gpt2_tokenizer()


# ---- the task ----

def test_windows_are_consecutive():
    for n, count in [(5, 1), (8, 1), (9, 2)]:
        tokens = torch.arange(n)
        x, y = T.windows(tokens, 4)
        assert x.shape == y.shape == (count, 4)
        assert torch.equal(x.flatten(), tokens[:4 * count]) and torch.equal(y, x + 1)


class Next(torch.nn.Module):
    """Replaces a GPT: the further a token is from the one before it, the less likely it is. It generates z."""

    def forward(self, tokens):
        return -0.01 * (torch.arange(320) - tokens.unsqueeze(-1)).abs().float()

    def generate(self, tokens, count, temperature, top_k, generator):
        assert (count, temperature, top_k) == (80, 0.8, 40)
        self.seed = generator.initial_seed()
        return torch.cat([tokens, torch.full((1, count), ord("z"))], dim=1)


def test_the_task_has_the_splits_loss_and_sample_of_its_text(tokenizer):
    task = T.LanguageModeling("story", STORY, tokenizer, 16, "cpu", split_seed=3, seed=9)
    for name, part in T.split_text(STORY, seed=3).items():
        assert task.splits[name].dtype == torch.int64 and tokenizer.decode(task.splits[name].tolist()) == part
    sha256 = T.hashlib.sha256(STORY.encode()).hexdigest()
    assert task.data_config == {"data": "story", "sha256": sha256, "block_size": 16}
    assert (task.name, task.metric, task.higher_is_better) == ("story", "loss", False)
    assert task.describe().startswith(f"story: {len(task.splits['train']):,} tokens in train, ")
    x, y = task.batch(8, seed=1, step=2)
    model, logs = Next(), Next()(x).log_softmax(dim=-1)
    assert task.loss(model, x, y).item() == pytest.approx(-logs.gather(2, y.unsqueeze(2)).mean().item(), rel=1e-5)
    y[:, 5:] = -100                                                        # these have no loss
    assert task.loss(model, x, y).item() == pytest.approx(
        -logs[:, :5].gather(2, y[:, :5].unsqueeze(2)).mean().item(), rel=1e-5)
    assert task.show(model) == [tokenizer.decode(task.splits["test"][:24].tolist()) + "z" * 80] and model.seed == 9


def test_a_batch_is_a_function_of_seed_and_step(tokenizer):
    task = T.LanguageModeling("story", STORY, tokenizer, 16, "cpu")
    task.splits["train"] = torch.arange(40) * 3
    x, y = task.batch(500, seed=0, step=7)
    assert x.shape == y.shape == (500, 16) and x.dtype == y.dtype == torch.int64
    assert torch.equal(y, x + 3) and torch.equal(x[:, 1:], y[:, :-1])
    assert set(x[:, 0].tolist()) == set(range(0, 72, 3)), "windows reach both ends"
    torch.manual_seed(5)                                                   # the global generator does not matter
    assert torch.equal(task.batch(500, 0, 7)[0], x)
    for seed, step in ((0, 8), (1, 7), (7, 0)):
        assert not torch.equal(task.batch(500, seed, step)[0], x)


@pytest.mark.parametrize("context, most", [(16, 7), (1300, 400)])          # many windows at a time, and 3
def test_the_first_windows_are_evaluated(monkeypatch, context, most):
    monkeypatch.setattr(T, "TEXT_EVAL_SIZE", most)
    text, one_byte = T.read_text("topics")[:150_000], K.tokenizer_of(K.train_bpe("", 256))
    task = T.LanguageModeling("topics", text, one_byte, context, "cpu")
    for split in ("val", "test"):
        x, y = T.windows(task.splits[split], context)
        assert (len(x) > most) == (context == 16)
        scores = task.evaluate(Next(), split)
        assert scores["loss"] == scores["metric"] == pytest.approx(
            task.loss(Next(), x[:most], y[:most]).item(), rel=1e-5), "a mean over all tokens"


def test_a_split_that_fills_no_window_is_rejected(tokenizer):
    with pytest.raises(InputError, match=r"^\d+ tokens do not fill a window of 5000 .* shorter window$"):
        T.LanguageModeling("story", STORY, tokenizer, 5000, "cpu")
