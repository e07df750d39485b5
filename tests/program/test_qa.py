"""Question answering: pairs are read and split without loss, tokens and targets are right, and answers are scored."""

import hashlib
import http.client
import io
import json
import urllib.error
import urllib.request

import pytest
import tiktoken
import torch

from helpers import refused
from svmini import GPT, GPTConfig
from svmini.data import qa, tokenizers
from svmini.data.qa import QuestionAnswering, final_answer, read_pairs, split_pairs

NAMES = ("Ann", "Ben", "Cid", "Dora", "Eve")


def story(i):
    """A problem and its solution as GSM-8K writes them, different for every i."""
    a, b = 3 + 7 * i % 23, 2 + 5 * i % 19
    return (f"{NAMES[i % 5]} has {a} pears and buys {b} more.\nHow many is that?",
            f"{NAMES[i % 5]} has {a} + {b} = <<{a}+{b}={a + b}>>{a + b} pears.\n#### {a + b}")


GSM8K = {"train": [story(i) for i in range(30)], "test": [story(i) for i in range(30, 38)]}   # replaces the real one


def write(path, pairs):
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in pairs), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer():
    stories = "\n".join(q + a for q, a in map(story, range(20)))
    return tokenizers.bpe_tokenizer(tokenizers.train_bpe(stories + "Question: Answer:", vocab_size=320))


# ---- files ----

def test_pairs_are_read_with_any_character_line_ending_and_blank_lines(tmp_path):
    pairs = [story(i) for i in range(3)] + [("Où est Zoë?\x85\u2028—", "“Là” \U0001f40e")]
    path = write(tmp_path / "a file ü.jsonl", pairs)
    assert read_pairs(path) == pairs
    raw = "".join(json.dumps({"question": q, "answer": a}, ensure_ascii=False) + "\r\n \r\n" for q, a in pairs)
    path.write_bytes(b"\xef\xbb\xbf" + raw.encode("utf-8"))   # as editors on Windows save it
    assert read_pairs(str(path)) == pairs
    with refused(f"no file {tmp_path / 'nothing.jsonl'}: qa:FILE needs"):
        split_pairs(f"qa:{tmp_path / 'nothing.jsonl'}")


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "x.jsonl"
    for line, message in [
            (b'{"question": "a", "answer": "b', "is not JSON in UTF-8 with two strings"),
            (b'{"question": "\xe9", "answer": "b"}', "is not JSON in UTF-8"), (b"[" * 100_000, "is not JSON in UTF-8"),
            (b'["question", "answer"]', "is not JSON in UTF-8"), (b'{"question": "a"}', "is not JSON in UTF-8"),
            (b'{"question": "a", "answer": 12}', "is not JSON in UTF-8"),
            (b'{"question": " ", "answer": "b"}', "has an empty question"),
            (b'{"question": "a", "answer": "b #### "}', "nothing after its last ####"),
            (b'{"question": "a", "answer": "b\\u0000c"}', "the character \\u0000")]:
        path.write_bytes(b'{"question": "a", "answer": "b"}\n\n' + line + b'\n{"question": "c", "answer": "d"}\n')
        with refused(f"{path}, line 3 ", message):
            read_pairs(path)


def test_gsm8k_is_downloaded_once(tmp_path, monkeypatch):
    served = {split: write(tmp_path / split, pairs).read_bytes() for split, pairs in GSM8K.items()}
    requested = []

    def serve(url, timeout):
        requested.append(url)
        return io.BytesIO(served[url.rsplit("/", 1)[-1].removesuffix(".jsonl")])

    monkeypatch.setattr(urllib.request, "urlopen", serve)
    data = tmp_path / "data"
    with refused("the server sent a different file"):               # for example a login page
        split_pairs("gsm8k", data)
    assert not list(data.rglob("*.*")), "nothing is kept, not even a part"
    monkeypatch.setattr(qa, "GSM8K_SHA256", {s: hashlib.sha256(c).hexdigest() for s, c in served.items()})
    requested.clear()
    for _ in range(2):
        splits = split_pairs("gsm8k", data)
        assert requested == [qa.GSM8K_URL.format("train"), qa.GSM8K_URL.format("test")]
        assert splits["test"] == GSM8K["test"] and len(splits["val"]) == 3 and len(splits["train"]) == 27
    write(data / "gsm8k" / "train.jsonl", GSM8K["train"][:29] + GSM8K["test"][:1])
    splits = split_pairs("gsm8k", data)
    assert set(splits["train"] + splits["val"]) == set(GSM8K["train"][:29]), "a test question is not in training"
    monkeypatch.setattr(qa, "MAX_VAL_SIZE", 1)
    assert len(split_pairs("gsm8k", data)["val"]) == 1


def test_a_failed_download_names_the_file_and_alternatives(tmp_path, monkeypatch):
    for error, reason in [(urllib.error.URLError("no route\nto host"), "no route to host"),
                          (http.client.IncompleteRead(b"abc"), "IncompleteRead")]:
        monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: (_ for _ in ()).throw(error))
        with refused(reason, str(tmp_path / "gsm8k" / "train.jsonl"), qa.GSM8K_URL.format("train"), "--data qa:FILE",
                     "--data arithmetic"):
            split_pairs("gsm8k", tmp_path)


# ---- splits ----

def test_a_file_is_always_split_in_the_same_way_whatever_its_order(tmp_path):
    pairs = [story(i) for i in range(45)]
    name = f"qa:{write(tmp_path / 'x.jsonl', pairs)}"
    splits = split_pairs(name)
    assert {split: len(part) for split, part in splits.items()} == {"train": 37, "val": 4, "test": 4}
    assert sorted(sum(splits.values(), [])) == sorted(pairs)
    write(tmp_path / "x.jsonl", reversed(pairs))
    assert splits == split_pairs(name)
    write(tmp_path / "x.jsonl", pairs[:9] * 2)
    with refused("9 different questions, at least 10"):
        split_pairs(name)


def test_a_repeated_question_is_left_out_and_other_answers_are_counted(tmp_path, capsys):
    """Also if only its whitespace, or the composition of its characters, differs."""
    pairs = [(f"é {q}", a) for q, a in map(story, range(45))]
    name = f"qa:{write(tmp_path / 'x.jsonl', pairs)}"
    splits = split_pairs(name)
    assert capsys.readouterr().out == ""
    again = [(f"e\u0301  {q[2:]}\n", "so\n" + a) for q, a in pairs[:20]]
    write(tmp_path / "x.jsonl", pairs + again + [(q, "another") for q, _ in pairs[3:5]])
    assert split_pairs(name) == splits, "the first answer counts"
    assert capsys.readouterr().out == (f"{name}: 22 pairs repeat an earlier question and are left out; 2 of them have "
                                       "a different answer\n")


# ---- tokens ----

def task_of(tokenizer, block_size, train, val=(), test=()):
    splits = {"train": list(train), "val": list(val), "test": list(test)}
    return QuestionAnswering("qa:x", splits, tokenizer, block_size)


def test_the_end_token_of_gpt2_ends_an_answer():
    like_gpt2 = tiktoken.Encoding("x", pat_str=tokenizers.GPT2_PATTERN, special_tokens={"<|endoftext|>": 256},
                                  mergeable_ranks={bytes([b]): b for b in range(256)})
    data = task_of(like_gpt2, 256, [story(0)])
    assert data.batch(1, 0, 0)[1][0, -1] == data.end == 256
    assert data.text(data.problems("train")[1][0]) == " " + story(0)[1]


def test_targets_are_the_answer_and_its_end(tokenizer):
    train = [story(i) for i in range(12)] + [("?", "!")]
    data = task_of(tokenizer, 128, train)
    expected = {f"Question: {q}\nAnswer:": f" {a}\0" for q, a in train}
    x, y = data.batch(13, seed=1, step=5)
    assert x.shape == y.shape and x.dtype == y.dtype == torch.int64 and len(x) == 13
    seen = {}
    for row, targets in zip(x, y):
        at = (targets != -100).nonzero().flatten()
        assert torch.equal(row[at[1:]], targets[at[:-1]]), "the inputs are the answer one token late"
        assert (row[at[-1] + 1:] == 0).all()
        seen[tokenizer.decode(row[:at[0] + 1].tolist())] = tokenizer.decode(targets[at].tolist())
    assert seen == expected and y[:, -1].max() == 0 and (y[:, -1] == -100).any()   # as wide as the longest pair
    for other, same in (((13, 1, 5), True), ((13, 1, 6), False), ((13, 2, 5), False)):
        again = data.batch(*other)[0]
        assert (again.shape == x.shape and torch.equal(again, x)) is same
    assert len({tuple(row.tolist()) for row in data.batch(5, 0, 0)[0]}) == 5


def test_data_config_changes_with_any_split(tokenizer):
    pairs = [story(i) for i in range(4)]
    digests = [task_of(tokenizer, 128, *([p] for p in order)).data_config["sha256"]
               for order in (pairs[:3], pairs[:3], pairs[1:], [pairs[0], pairs[3], pairs[2]], [*pairs[:2], pairs[3]])]
    assert digests[0] == digests[1] and len(set(digests)) == 4


def test_pairs_that_exceed_the_context_are_left_out_of_training_and_counted(tokenizer):
    short, long = ("1 + 1?", "2"), ("1 + 1?", "It is 2, " * 40 + "#### 2")
    size = len(tokenizer.encode_ordinary("Question: 1 + 1?\nAnswer: 2"))      # the end is only a target
    data = task_of(tokenizer, size, [short, long, short], test=[long])
    assert data.left_out == 1 and data.max_new == 2 and len(data.problems("test")[0]) == 1
    assert data.describe() == ("qa:x: 3 pairs in train, 0 pairs in val, 1 pairs in test; 1 training pairs exceed the "
                               "model's context and are left out")
    assert data.batch(2, 0, 0)[0].shape == (2, size)
    with refused(f"context of {size - 1} tokens: the shortest needs {size}"):
        task_of(tokenizer, size - 1, [long, short])


# ---- scores ----

def test_final_answer():
    for written, final in [
            ("2 + 2 = 4\n#### 4", "4"), ("#### 3\nNo.\n#### 4 ", "4"), (" Paris. ", "Paris."), ("1,234,567", "1234567"),
            ("$1,234.50", "1234.50"), ("#### $18.", "18"), ("-$5", "-5"), ("$-5", "-5"), ("-7", "-7"), ("1,2", "1,2"),
            ("1234,567", "1234,567"), ("12 pears", "12 pears"), ("#### 4 ####", "")]:
        assert final_answer(written) == final


def test_a_prediction_is_right_if_it_ends_and_its_final_answer_is_equal(tokenizer):
    data = task_of(tokenizer, 128, [story(0)], test=[("a", "#### 120"), ("b", "so\n#### 1,200."), ("c", "no")])
    prompts, answers = data.problems("test")

    def scores(*written):
        return [data.is_right(a, torch.tensor(tokenizer.encode_ordinary(w) + [data.end] * ended, dtype=torch.int64))
                for a, (w, ended) in zip(answers, written)]

    assert scores((" #### 120", True), ("Hm.\n#### $1200", True), (" no ", True)) == [True] * 3
    assert scores((" #### 12", True), (" 120.0", True), ("", True)) == [False] * 3
    assert scores((" #### 120", False), (" #### 1,200", False), (" no", False)) == [False] * 3, "more could follow"
    assert data.line(prompts[2], answers[2], answers[0]) == "Question: c\nAnswer: no\nModel: #### 120"


def test_a_split_is_scored_by_exact_match_and_a_mean_over_tokens(tokenizer):
    data = task_of(tokenizer, 64, map(story, range(16)), map(story, range(120)), map(story, range(120, 136)))
    assert [len(data.eval_problems[split][0]) for split in ("val", "test")] == [100, 16]   # at most 100 of val
    model = GPT(GPTConfig(tokenizer.n_vocab, 64, n_layer=1, n_head=2, d_model=16))
    mean = data.loss(model, *data.stack(data.splits["train"])).item()
    assert data.answer_loss(model, "train", batch_size=5) == pytest.approx(mean, rel=1e-4)
    prompts, answers = data.eval_problems["test"]

    def greedy(asked, count, end):
        assert asked == prompts[:len(asked)] and (count, end) == (data.max_new, data.end)
        return [answer[:-1] if i % 4 == 0 else answer for i, answer in enumerate(answers[:len(asked)])]

    model.generate_greedy = greedy
    assert data.evaluate(model, "test") == {"loss": data.answer_loss(model, "test"), "metric": 75}
    shown = [line.partition(": Question: ")[0] for line in data.show(model)]
    assert shown == ["wrong", "right", "right", "right"] * 2
