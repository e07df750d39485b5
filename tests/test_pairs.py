"""Question-answer pairs: read and split without loss, tokens and targets right, answers marked honestly."""

import http.client
import io
import json
import urllib.request

import pytest
import tiktoken
import torch

from svmini import GPT, GPTConfig, loop, tasks, text
from svmini.tasks import Pairs, exact_match, final_answer, read_pairs, split_pairs

NAMES = ("Ann", "Ben", "Cid", "Dora", "Eve")
MACHINE = loop.Machine(torch.device("cpu"), torch.float32, "")


def story(i):
    """A problem and its solution, as GSM-8K writes them; no two are alike."""
    a, b = 3 + 7 * i % 23, 2 + 5 * i % 19
    return (f"{NAMES[i % 5]} has {a} pears and buys {b} more.\nHow many is that?",
            f"{NAMES[i % 5]} has {a} + {b} = <<{a}+{b}={a + b}>>{a + b} pears.\n#### {a + b}")


def write(path, pairs):
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in pairs), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer():
    return text.bpe_tokenizer(text.train_bpe("\n".join(q + a for q, a in map(story, range(20))) + "Question: Answer:",
                                             vocab_size=320))


# ---- files ----

def test_read_pairs(tmp_path):
    pairs = [story(i) for i in range(3)] + [("Où est Zoë?\x85\u2028—", "“Là” \U0001f40e")]
    path = write(tmp_path / "a file ü.jsonl", pairs)
    assert read_pairs(path) == pairs
    raw = "".join(json.dumps({"id": 7, "question": f" {q}\n", "answer": a}, ensure_ascii=False) + "\r\n \r\n"
                  for q, a in pairs)
    path.write_bytes(b"\xef\xbb\xbf" + raw.encode("utf-8"))   # as Windows' editors save it
    assert read_pairs(str(path)) == pairs
    with pytest.raises(FileNotFoundError, match="no file .*nothing.jsonl: qa:FILE wants"):
        split_pairs(f"qa:{tmp_path / 'nothing.jsonl'}")


@pytest.mark.parametrize("line, said", [
    (b'{"question": "a", "answer": "b', "no JSON"),
    (b'question,answer', "no JSON"),
    (b'[' * 100_000, "no JSON"),
    (b'{"question": "\xe9", "answer": "b"}', "no JSON in UTF-8"),
    (b'["question", "answer"]', 'no "question"'),
    (b'7', 'no "question"'),
    (b'{"Question": "a", "answer": "b"}', 'no "question"'),
    (b'{"question": "a"}', 'no "answer"'),
    (b'{"question": "a", "answer": 12}', '"answer" is 12, not a text'),
    (b'{"question": null, "answer": "b"}', '"question" is null, not a text'),
    (b'{"question": "a", "answer": " \\n"}', '"answer" is " \\n", not a text'),
    (b'{"question": "", "answer": "b"}', '"question" is "", not a text'),
    (b'{"question": "a", "answer": "b #### "}', "something after its last ####"),
    (b'{"question": "a", "answer": "b\\u0000c"}', "no character \\u0000"),
])
def test_a_damaged_line_is_named(tmp_path, line, said):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"question": "a", "answer": "b"}\n\n' + line + b'\n{"question": "c", "answer": "d"}\n')
    with pytest.raises(ValueError) as caught:
        read_pairs(path)
    message = str(caught.value)
    assert type(caught.value) is ValueError and message.startswith(f"{path}, line 3: ")
    assert said in message and "\n" not in message


# ---- GSM-8K's files ----

@pytest.fixture
def small_gsm8k(monkeypatch):
    """Thirty training and eight test problems stand for GSM-8K; returns {split: pairs}."""
    monkeypatch.setattr(tasks, "GSM8K_COUNTS", {"train": 30, "test": 8})
    return {"train": [story(i) for i in range(30)], "test": [story(i) for i in range(30, 38)]}


def offline(url, timeout):
    raise AssertionError(f"asked for {url}")


def test_gsm8k_on_disk_is_not_downloaded_again(tmp_path, monkeypatch, small_gsm8k):
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    (tmp_path / "gsm8k").mkdir()
    for split, pairs in small_gsm8k.items():
        write(tmp_path / "gsm8k" / f"{split}.jsonl", pairs)
    before = [path.stat().st_ino for path in (tmp_path / "gsm8k").iterdir()]
    assert tasks.gsm8k(tmp_path) == small_gsm8k
    assert [path.stat().st_ino for path in (tmp_path / "gsm8k").iterdir()] == before   # nor written again
    splits = split_pairs("gsm8k", tmp_path)
    assert splits["test"] == small_gsm8k["test"] and len(splits["val"]) == 3 and len(splits["train"]) == 27
    assert set(splits["train"] + splits["val"]) == set(small_gsm8k["train"])
    monkeypatch.setattr(tasks, "MOST_VAL", 2)
    assert len(split_pairs("gsm8k", tmp_path)["val"]) == 2
    write(tmp_path / "gsm8k" / "train.jsonl", small_gsm8k["train"][:29] + small_gsm8k["test"][:1])
    splits = split_pairs("gsm8k", tmp_path)   # a test question in the training file
    assert set(splits["train"] + splits["val"]) == set(small_gsm8k["train"][:29])


def test_gsm8k_is_downloaded_once(tmp_path, monkeypatch, small_gsm8k):
    asked = []

    def serve(url, timeout):
        asked.append(url)
        split = url.rsplit("/", 1)[-1].removesuffix(".jsonl")
        return io.BytesIO(write(tmp_path / "served", small_gsm8k[split]).read_bytes())

    monkeypatch.setattr(urllib.request, "urlopen", serve)
    root = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/"
    data = tmp_path / "data"
    assert tasks.gsm8k(data) == small_gsm8k and asked == [root + "train.jsonl", root + "test.jsonl"]
    assert {p.name for p in (data / "gsm8k").iterdir()} == {"train.jsonl", "test.jsonl"}
    assert tasks.gsm8k(data) == small_gsm8k and len(asked) == 2
    (data / "gsm8k" / "test.jsonl").unlink()
    assert tasks.gsm8k(data) == small_gsm8k and asked[2:] == [root + "test.jsonl"]


def broken(content):
    """What urlopen gives for a connection that ends early, or for content."""
    def serve(url, timeout):
        if content is None:
            raise urllib.error.URLError("no route\nto host")
        if content == "cut":
            raise http.client.IncompleteRead(b"abc")
        return io.BytesIO(content)
    return serve


@pytest.mark.parametrize("content, why", [
    (None, "no route to host"), ("cut", "IncompleteRead"),
    (b"<html>log in</html>", "train.jsonl, line 1: it is no JSON"),
    (b'{"question": "a", "answer": "b"}\n' * 29, "it holds 29 problems and should hold 30")])
def test_gsm8k_that_cannot_be_had(tmp_path, monkeypatch, small_gsm8k, content, why):
    monkeypatch.setattr(urllib.request, "urlopen", broken(content))
    with pytest.raises(FileNotFoundError) as caught:
        split_pairs("gsm8k", tmp_path)
    message = str(caught.value)
    assert "\n" not in message and why in message and str(tmp_path / "gsm8k" / "train.jsonl") in message
    assert tasks.GSM8K_URL.format("train") in message and "--data qa:FILE" in message and "--data arithmetic" in message
    assert not list(tmp_path.rglob("*.*"))   # neither kept nor half kept


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("cut, why", [(lambda c: c[:-9], "line {n}: it is no JSON"), (lambda c: b"", "it holds 0 "),
                                      (lambda c: c[:c.rindex(b"\n", 0, -1) + 1], "it holds {less} problems")])
def test_a_half_downloaded_file_is_named(tmp_path, monkeypatch, small_gsm8k, split, cut, why):
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    (tmp_path / "gsm8k").mkdir()
    files = {s: write(tmp_path / "gsm8k" / f"{s}.jsonl", pairs) for s, pairs in small_gsm8k.items()}
    half = cut(files[split].read_bytes())
    files[split].write_bytes(half)
    with pytest.raises(ValueError) as caught:
        tasks.gsm8k(tmp_path)
    message, n = str(caught.value), len(small_gsm8k[split])
    assert message.startswith(f"{files[split]} is damaged (") and why.format(n=n, less=n - 1) in message
    assert "\n" not in message and "delete it" in message and tasks.GSM8K_URL.format(split) in message
    assert files[split].read_bytes() == half


# ---- splits ----

def test_splits_of_a_file(tmp_path):
    pairs = [story(i) for i in range(45)]
    name = f"qa:{write(tmp_path / 'x.jsonl', pairs + [(q, 'another') for q, _ in pairs[:20]])}"
    splits = split_pairs(name)
    assert {split: len(part) for split, part in splits.items()} == {"train": 37, "val": 4, "test": 4}
    assert sorted(sum(splits.values(), [])) == sorted(pairs)       # each question once, with its first answer
    assert splits == split_pairs(name, seed=0) != split_pairs(name, seed=1)
    write(tmp_path / "x.jsonl", reversed(pairs))
    assert splits == split_pairs(name)                             # whatever the order of the file
    write(tmp_path / "x.jsonl", pairs[:10])
    assert sorted(map(len, split_pairs(name).values())) == [1, 1, 8]
    write(tmp_path / "x.jsonl", pairs[:9] * 2)
    with pytest.raises(ValueError, match="9 different questions: at least 10"):
        split_pairs(name)


# ---- tokens ----

def splits_of(train, val=(), test=()):
    return {"train": list(train), "val": list(val), "test": list(test)}


def test_end_token(tokenizer):
    assert tokenizer.decode_single_token_bytes(tasks.end_token(tokenizer)) == b"\0"
    like_gpt2 = tiktoken.Encoding("x", pat_str=text.GPT2_PATTERN, special_tokens={"<|endoftext|>": 256},
                                  mergeable_ranks={bytes([b]): b for b in range(256)})
    assert tasks.end_token(like_gpt2) == 256
    data = Pairs(splits_of([story(0)]), like_gpt2, 256)
    assert data.batch(1, 0, 0)[1][0, -1] == 256 and data.text(data.problems("train")[1][0]) == " " + story(0)[1]


def test_targets_are_the_answer_and_its_end(tokenizer):
    train = [story(i) for i in range(12)] + [("?", "!")]
    data = Pairs(splits_of(train), tokenizer, 128)
    expected = {f"Question: {q}\nAnswer:": f" {a}\0" for q, a in train}
    x, y = data.batch(13, seed=1, step=5)
    assert x.shape == y.shape and x.dtype == y.dtype == torch.int64 and len(x) == 13
    seen = {}
    for row, targets in zip(x, y):
        at = (targets != -100).nonzero().flatten()
        assert torch.equal(at, torch.arange(at[0], at[-1] + 1))               # one stretch
        assert torch.equal(row[at[1:]], targets[at[:-1]])                     # x is fed the answer one token late
        assert (row[at[-1] + 1:] == 0).all()
        seen[tokenizer.decode(row[:at[0] + 1].tolist())] = tokenizer.decode(targets[at].tolist())
        whole = next(i for i, p in enumerate(data.problems("train")[0]) if torch.equal(p, row[:at[0] + 1]))
        assert torch.equal(data.problems("train")[1][whole], targets[at])     # as when it is marked
    assert seen == expected and y[:, -1].max() == 0 and (y[:, -1] == -100).any()   # as wide as its longest pair
    for other, same in (((13, 1, 5), True), ((13, 1, 6), False), ((13, 2, 5), False)):
        again = data.batch(*other)[0]
        assert (again.shape == x.shape and torch.equal(again, x)) is same
    assert len(data.batch(40, 0, 0)[0]) == 40                                 # more than there are
    assert len({tuple(row.tolist()) for row in data.batch(5, 0, 0)[0]}) == 5


def test_sha256_tells_pairs_apart(tokenizer):
    first, same, other = (Pairs(splits_of([story(i)]), tokenizer, 128).sha256 for i in (0, 0, 1))
    assert first == same != other and len(first) == 64
    assert Pairs(splits_of([("half a \ud83d", "pair")]), tokenizer, 128).sha256   # what JSON may hold, UTF-8 may not


def test_pairs_that_do_not_fit(tokenizer):
    short, long = ("1 + 1?", "2"), ("1 + 1?", "It is 2, " * 40 + "#### 2")
    size = len(tokenizer.encode_ordinary("Question: 1 + 1?\nAnswer: 2"))      # the end is only a target
    data = Pairs(splits_of([short, long, short], test=[long]), tokenizer, size)
    assert data.left_out == 1 and data.max_new == 2 and len(data.problems("test")[0]) == 1
    assert data.batch(2, 0, 0)[0].shape == (2, size)
    with pytest.raises(ValueError, match=f"context of {size - 1} tokens: the shortest needs {size}$"):
        Pairs(splits_of([long, short]), tokenizer, size - 1)


# ---- final answers ----

@pytest.mark.parametrize("written, final", [
    ("2 + 2 = 4\n#### 4", "4"), ("#### 3\nNo.\n#### 4 ", "4"), ("####5", "5"), (" Paris ", "Paris"),
    ("Paris.", "Paris."),
    ("#### 1,234", "1234"), ("1,234,567", "1234567"), ("$1,234.50", "1234.50"), ("#### $18.", "18"), ("-$5", "-5"),
    ("$-5", "-5"), ("-7", "-7"), ("0.5", "0.5"), ("1,2", "1,2"), ("1234,567", "1234,567"), ("12 pears", "12 pears"),
    ("#### ", ""), ("", ""), ("#### 4 ####", ""), ("5%", "5%")])
def test_final_answer(written, final):
    assert final_answer(written) == final


# ---- marking ----

def test_marking(tokenizer):
    data = Pairs(splits_of([story(0)], test=[("a", "#### 120"), ("b", "so\n#### 1,200."), ("c", "no")]), tokenizer, 128)
    _, answers = data.problems("test")

    def marks(*written):
        return [tasks.right(data, a, torch.tensor(tokenizer.encode_ordinary(w) + [data.end] * ended, dtype=torch.int64))
                for a, (w, ended) in zip(answers, written)]

    assert marks((" #### 120", True), ("Hm.\n#### $1200", True), (" no ", True)) == [True] * 3
    assert marks((" #### 12", True), (" 120.0", True), ("", True)) == [False] * 3
    assert marks((" #### 120", False), (" #### 1,200", False), (" no", False)) == [False] * 3   # who knows what follows
    assert data.show(data.problems("test")[0][2], answers[2], answers[0]) == (
        "Question: c\nAnswer: no\nModel: #### 120\nwrong")
    assert data.show(data.problems("test")[0][2], answers[2], answers[2]).endswith("Model: no\nright")


def test_a_short_file_is_learned_and_marked(tmp_path, tokenizer):
    """The whole road: twenty lines of a file, fine-tuning with the loss on the answers, greedy answers, exact match."""
    path = write(tmp_path / "x.jsonl", [story(i) for i in range(20)])
    data = Pairs(split_pairs(f"qa:{path}"), tokenizer, 64)
    assert data.left_out == 0
    torch.manual_seed(0)
    model = GPT(GPTConfig(tokenizer.n_vocab, 64, n_layer=2, n_head=2, d_model=48))

    def loss(model, x, y):
        return torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())

    def evaluate(model, split):
        return {"loss": data.loss(model, split), "metric": exact_match(model, *data.problems(split), data)[0]}

    task = loop.Task("pairs", "exact match", True, data.batch, loss, evaluate)
    start = loop.evaluate(model, task, "train")
    log = loop.train(model, task, loop.Settings(steps=150, lr=5e-3, batch_size=16), MACHINE)["log"]
    assert log[-1]["split"] == "val" and 0 <= log[-1]["metric"] <= 100
    learned = loop.evaluate(model, task, "train")
    assert start["metric"] == 0 and learned["metric"] > 90 and learned["loss"] < 0.1 < start["loss"]
    x, y = tasks.stack(data.splits["train"])
    with torch.no_grad():   # the loss is a mean over tokens, not over batches
        assert data.loss(model, "train", batch_size=5) == pytest.approx(loss(model, x, y).item(), rel=1e-4)

    prompts, answers = data.problems("train")
    nothing = torch.zeros(65, dtype=torch.int64)
    percent, predictions = exact_match(model, [*prompts, nothing], [*answers, answers[0]], data)
    assert percent == pytest.approx(learned["metric"] * 16 / 17) and len(predictions[-1]) == 0   # no room: not solved
