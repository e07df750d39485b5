"""Problems with answers: arithmetic is right and held-out problems are never trained on; pairs are read and split
without loss, tokens and targets are right; answers are marked honestly."""

import hashlib
import http.client
import io
import json
import urllib.error
import urllib.request

import pytest
import tiktoken
import torch

from svmini import GPT, GPTConfig
from svmini.data import qa, tokenizers
from svmini.data.arithmetic import Arithmetic, decode, encode, split_of
from svmini.data.qa import QuestionAnswering, final_answer, read_pairs, split_pairs
from svmini.errors import InputError, MissingFile


# ---- arithmetic ----

def solve(prompts, operation):
    """The reversed answers (n, 4) by Python's own arithmetic."""
    rows = []
    for prompt in prompts:
        text = decode(prompt)
        a, sign, b, equals = int(text[:3]), text[3], int(text[4:7]), text[7]
        assert sign == operation and equals == "="
        rows.append(encode(f"{a + b if operation == '+' else a - b:04d}"[::-1]))
    return torch.stack(rows)


class Stub:
    """Stands in for a GPT: knows subtraction, but gets every problem with a = an even number wrong."""

    def generate_greedy(self, prompts, max_new, end=None):
        assert (max_new, end) == (4, None)
        answers = solve(prompts, "-")
        even = prompts[:, 2] % 2 == 0
        answers[even, 3] = (answers[even, 3] + 1) % 10
        return list(answers)


def numbers(tokens):
    """a and b of problems (n, at least 7)."""
    powers = torch.tensor([100, 10, 1])
    return (tokens[:, :3] * powers).sum(1), (tokens[:, 4:7] * powers).sum(1)


def test_characters_round_trip():
    tokens = encode("0123456789+-=")
    assert tokens.tolist() == list(range(13)) and Arithmetic.vocab_size == 13 and tokens.dtype == torch.int64
    assert decode(tokens) == "0123456789+-="
    with pytest.raises(InputError, match="not 'x'"):
        encode("12x")


@pytest.mark.parametrize("operation", "+-")
def test_batch(operation):
    task = Arithmetic(operation)
    x, y = task.batch(300, seed=1, step=5)
    assert x.shape == y.shape == (300, task.length - 1) == (300, 11)
    assert (y[:, :7] == -100).all()                              # no loss on the prompt ...
    assert torch.equal(y[:, 7:], solve(x[:, :8], operation))     # ... the answer alone, and it is right
    assert torch.equal(x[:, 8:], y[:, 7:10])                     # x is fed the answer one token late
    a, b = numbers(x)
    assert (split_of(a, b) == 0).all()
    assert operation == "+" or (a >= b).all()
    for other_seed, other_step, same in ((1, 5, True), (1, 6, False), (2, 5, False)):
        assert torch.equal(task.batch(300, other_seed, other_step)[0], x) is same


@pytest.mark.parametrize("operation", "+-")
def test_problems_are_fixed_right_and_held_out(operation):
    task = Arithmetic(operation)
    sets = {}
    for number, split in ((1, "val"), (2, "test")):
        prompts, answers = task.problems(split, 400)
        assert prompts.shape == (400, 8) and answers.shape == (400, 4)
        assert torch.equal(answers, solve(prompts, operation))
        assert torch.equal(task.problems(split, 50)[0], prompts[:50])
        a, b = numbers(prompts)
        assert (split_of(a, b) == number).all()
        sets[split] = set(map(tuple, prompts.tolist()))
        assert len(sets[split]) == 400
    assert not sets["val"] & sets["test"]
    trained = {tuple(row) for step in range(50) for row in task.batch(500, 0, step)[0][:, :8].tolist()}
    assert len(trained) > 20000 and not trained & (sets["val"] | sets["test"])


def test_split_rule():
    a, b = torch.cartesian_prod(torch.arange(1000), torch.arange(1000)).unbind(1)
    part = split_of(a, b)
    assert torch.equal(part, split_of(b, a))                          # a + b and b + a are kept together
    for number, share in ((0, 0.9), (1, 0.05), (2, 0.05)):
        assert (part == number).double().mean().item() == pytest.approx(share, abs=0.002)
        for place in (1, 10, 100):                                    # no pair of digits is special to a split
            pairs = (a // place % 10) * 10 + b // place % 10
            shares = torch.bincount(pairs[part == number], minlength=100) / torch.bincount(pairs)
            assert ((shares - share).abs() < 0.015).all()
    assert (part == 1).nonzero()[0].item() == 32                      # the rule stays: stored results depend on it


def test_exact_match_counts_whole_answers():
    task = Arithmetic("-")
    for split in ("val", "test"):
        prompts, answers = task.eval_problems[split]
        odd = (prompts[:, 2] % 2 == 1).double().mean().item()
        assert len(answers) == 1000 and 0.3 < odd < 0.7
        assert task.evaluate(Stub(), split) == {"loss": None, "metric": pytest.approx(100 * odd)}
    assert task.data_config == {"data": "arithmetic -", "sha256": "made by the program"}
    assert (task.name, task.metric, task.higher_is_better) == ("arithmetic -", "exact match", True)


def test_problems_are_shown():
    task = Arithmetic("-")
    prompt, answer = encode("417-259="), encode("8510")
    assert task.line(prompt, answer, answer) == "417-259=158  model: 158"
    assert task.line(prompt, answer, encode("8=1+")) == "417-259=158  model: 8=1+"
    shown = task.show(Stub())
    assert [line[7:15] for line in shown] == list(map(decode, task.problems("test", 8)[0]))
    assert [line[:7] for line in shown] == ["right: " if int(line[9]) % 2 else "wrong: " for line in shown]


# ---- question-answer pairs ----

NAMES = ("Ann", "Ben", "Cid", "Dora", "Eve")


def story(i):
    """A problem and its solution, as GSM-8K writes them; no two are alike."""
    a, b = 3 + 7 * i % 23, 2 + 5 * i % 19
    return (f"{NAMES[i % 5]} has {a} pears and buys {b} more.\nHow many is that?",
            f"{NAMES[i % 5]} has {a} + {b} = <<{a}+{b}={a + b}>>{a + b} pears.\n#### {a + b}")


GSM8K = {"train": [story(i) for i in range(30)], "test": [story(i) for i in range(30, 38)]}   # stands for the real one


def write(path, pairs):
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in pairs), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer():
    stories = "\n".join(q + a for q, a in map(story, range(20)))
    return tokenizers.bpe_tokenizer(tokenizers.train_bpe(stories + "Question: Answer:", vocab_size=320))


# ---- files ----

def test_read_pairs(tmp_path):
    pairs = [story(i) for i in range(3)] + [("Où est Zoë?\x85\u2028—", "“Là” \U0001f40e")]
    path = write(tmp_path / "a file ü.jsonl", pairs)
    assert read_pairs(path) == pairs
    raw = "".join(json.dumps({"question": q, "answer": a}, ensure_ascii=False) + "\r\n \r\n" for q, a in pairs)
    path.write_bytes(b"\xef\xbb\xbf" + raw.encode("utf-8"))   # as Windows' editors save it
    assert read_pairs(str(path)) == pairs
    with pytest.raises(MissingFile, match="no file .*nothing.jsonl: qa:FILE wants"):
        split_pairs(f"qa:{tmp_path / 'nothing.jsonl'}")


@pytest.mark.parametrize("line, said", [
    (b'{"question": "a", "answer": "b', "no JSON"),
    (b'{"question": "\xe9", "answer": "b"}', "no JSON in UTF-8"),
    (b'["question", "answer"]', 'no "question"'),
    (b'{"question": "a"}', 'no "answer"'),
    (b'{"question": "a", "answer": 12}', 'no "answer" with a text'),
    (b'{"question": " ", "answer": "b"}', 'no "question" with a text'),
    (b'{"question": "a", "answer": "b #### "}', "something after its last ####"),
    (b'{"question": "a", "answer": "b\\u0000c"}', "no character \\u0000"),
])
def test_a_damaged_line_is_named(tmp_path, line, said):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"question": "a", "answer": "b"}\n\n' + line + b'\n{"question": "c", "answer": "d"}\n')
    with pytest.raises(InputError) as caught:
        read_pairs(path)
    assert str(caught.value).startswith(f"{path}, line 3: ") and said in str(caught.value)


def test_gsm8k_is_downloaded_once(tmp_path, monkeypatch):
    served = {split: write(tmp_path / split, pairs).read_bytes() for split, pairs in GSM8K.items()}
    asked = []

    def serve(url, timeout):
        asked.append(url)
        return io.BytesIO(served[url.rsplit("/", 1)[-1].removesuffix(".jsonl")])

    monkeypatch.setattr(urllib.request, "urlopen", serve)
    data = tmp_path / "data"
    with pytest.raises(MissingFile, match="what came is another file"):   # a login page, say
        split_pairs("gsm8k", data)
    assert not list(data.rglob("*.*"))                                    # neither kept nor half kept
    monkeypatch.setattr(qa, "GSM8K_SHA256", {s: hashlib.sha256(c).hexdigest() for s, c in served.items()})
    root = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/"
    asked.clear()
    for _ in range(2):
        splits = split_pairs("gsm8k", data)
        assert asked == [root + "train.jsonl", root + "test.jsonl"]
        assert splits["test"] == GSM8K["test"] and len(splits["val"]) == 3 and len(splits["train"]) == 27
        assert set(splits["train"] + splits["val"]) == set(GSM8K["train"])
    write(data / "gsm8k" / "train.jsonl", GSM8K["train"][:29] + GSM8K["test"][:1])
    splits = split_pairs("gsm8k", data)                                   # a test question in the training file
    assert set(splits["train"] + splits["val"]) == set(GSM8K["train"][:29])
    monkeypatch.setattr(qa, "MOST_VAL", 1)
    assert len(split_pairs("gsm8k", data)["val"]) == 1


@pytest.mark.parametrize("error, why", [(urllib.error.URLError("no route\nto host"), "no route to host"),
                                        (http.client.IncompleteRead(b"abc"), "IncompleteRead")])
def test_gsm8k_that_cannot_be_had(tmp_path, monkeypatch, error, why):
    def serve(url, timeout):
        raise error

    monkeypatch.setattr(urllib.request, "urlopen", serve)
    with pytest.raises(MissingFile) as caught:
        split_pairs("gsm8k", tmp_path)
    message = str(caught.value)
    assert "\n" not in message and why in message and str(tmp_path / "gsm8k" / "train.jsonl") in message
    assert qa.GSM8K_URL.format("train") in message
    assert "--data qa:FILE" in message and "--data arithmetic" in message


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
    write(tmp_path / "x.jsonl", pairs[:9] * 2)
    with pytest.raises(InputError, match="9 different questions: at least 10"):
        split_pairs(name)


# ---- tokens ----

def splits_of(train, val=(), test=()):
    return {"train": list(train), "val": list(val), "test": list(test)}


def test_end_token(tokenizer):
    assert tokenizer.decode_single_token_bytes(tokenizers.end_token(tokenizer)) == b"\0"
    like_gpt2 = tiktoken.Encoding("x", pat_str=tokenizers.GPT2_PATTERN, special_tokens={"<|endoftext|>": 256},
                                  mergeable_ranks={bytes([b]): b for b in range(256)})
    assert tokenizers.end_token(like_gpt2) == 256
    data = QuestionAnswering("qa:x", splits_of([story(0)]), like_gpt2, 256)
    assert data.batch(1, 0, 0)[1][0, -1] == 256 and data.text(data.problems("train")[1][0]) == " " + story(0)[1]


def test_targets_are_the_answer_and_its_end(tokenizer):
    train = [story(i) for i in range(12)] + [("?", "!")]
    data = QuestionAnswering("qa:x", splits_of(train), tokenizer, 128)
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
    assert seen == expected and y[:, -1].max() == 0 and (y[:, -1] == -100).any()   # as wide as its longest pair
    for other, same in (((13, 1, 5), True), ((13, 1, 6), False), ((13, 2, 5), False)):
        again = data.batch(*other)[0]
        assert (again.shape == x.shape and torch.equal(again, x)) is same
    assert len({tuple(row.tolist()) for row in data.batch(5, 0, 0)[0]}) == 5


def test_facts_tell_pairs_apart(tokenizer):
    first, same, other = (QuestionAnswering("qa:x", splits_of([story(i)]), tokenizer, 128).data_config["sha256"] for i in (0, 0, 1))
    assert first == same != other


def test_pairs_that_do_not_fit(tokenizer):
    short, long = ("1 + 1?", "2"), ("1 + 1?", "It is 2, " * 40 + "#### 2")
    size = len(tokenizer.encode_ordinary("Question: 1 + 1?\nAnswer: 2"))      # the end is only a target
    data = QuestionAnswering("qa:x", splits_of([short, long, short], test=[long]), tokenizer, size)
    assert data.left_out == 1 and data.max_new == 2 and len(data.problems("test")[0]) == 1
    assert data.batch(2, 0, 0)[0].shape == (2, size)
    with pytest.raises(InputError, match=f"context of {size - 1} tokens: the shortest needs {size}$"):
        QuestionAnswering("qa:x", splits_of([long, short]), tokenizer, size - 1)


# ---- final answers ----

@pytest.mark.parametrize("written, final", [
    ("2 + 2 = 4\n#### 4", "4"), ("#### 3\nNo.\n#### 4 ", "4"), (" Paris. ", "Paris."), ("1,234,567", "1234567"),
    ("$1,234.50", "1234.50"), ("#### $18.", "18"), ("-$5", "-5"), ("$-5", "-5"), ("-7", "-7"), ("1,2", "1,2"),
    ("1234,567", "1234,567"), ("12 pears", "12 pears"), ("#### 4 ####", "")])
def test_final_answer(written, final):
    assert final_answer(written) == final


# ---- marking ----

def test_marking(tokenizer):
    data = QuestionAnswering("qa:x", splits_of([story(0)], test=[("a", "#### 120"), ("b", "so\n#### 1,200."), ("c", "no")]),
                 tokenizer, 128)
    prompts, answers = data.problems("test")

    def marks(*written):
        return [data.right(a, torch.tensor(tokenizer.encode_ordinary(w) + [data.end] * ended, dtype=torch.int64))
                for a, (w, ended) in zip(answers, written)]

    assert marks((" #### 120", True), ("Hm.\n#### $1200", True), (" no ", True)) == [True] * 3
    assert marks((" #### 12", True), (" 120.0", True), ("", True)) == [False] * 3
    assert marks((" #### 120", False), (" #### 1,200", False), (" no", False)) == [False] * 3   # who knows what follows
    assert data.line(prompts[2], answers[2], answers[0]) == "Question: c\nAnswer: no\nModel: #### 120"


def test_a_hundred_of_val_and_all_of_test_are_marked(tokenizer, monkeypatch):
    data = QuestionAnswering("qa:x", splits_of([story(0)], map(story, range(120)), map(story, range(120, 250))), tokenizer, 64)
    assert {split: len(prompts) for split, (prompts, _) in data.eval_problems.items()} == {"val": 100, "test": 130}


def test_a_short_file_is_learned_and_marked(tmp_path, tokenizer):
    """The whole road: twenty lines of a file, training with the loss on the answers, greedy answers, exact match."""
    name = f"qa:{write(tmp_path / 'x.jsonl', [story(i) for i in range(20)])}"
    data = QuestionAnswering(name, split_pairs(name), tokenizer, 64)
    assert data.left_out == 0
    torch.manual_seed(0)
    model = GPT(GPTConfig(tokenizer.n_vocab, 64, n_layer=2, n_head=2, d_model=48))
    data.eval_problems["train"] = data.problems("train")
    start = data.evaluate(model, "train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(80):
        optimizer.zero_grad()
        data.loss(model, *data.batch(16, 0, step)).backward()
        optimizer.step()
    learned, val = data.evaluate(model, "train"), data.evaluate(model, "val")
    assert start["metric"] == 0 and learned["metric"] > 90 and learned["loss"] < 0.1 < start["loss"]
    assert val["loss"] > learned["loss"] and 0 <= val["metric"] <= 100
    whole = data.loss(model, *data.stack(data.splits["train"])).item()   # a mean over tokens, not over batches
    assert data.loss_of(model, "train", batch_size=5) == pytest.approx(whole, rel=1e-4)
    prompts, answers = data.eval_problems["train"]
    data.eval_problems["test"] = [*prompts, torch.zeros(65, dtype=torch.int64)], [*answers, answers[0]]
    percent = data.evaluate(model, "test")["metric"]
    assert percent == pytest.approx(learned["metric"] * 16 / 17)   # a prompt without room is not solved
    shown = data.show(model)
    assert len(shown) == 8 and sum(s.startswith("right: Question: ") for s in shown) >= 7
