"""train_gpt.py on weights in GPT-2's naming, on question-answer pairs and texts of one's own.

No network: a stub of GPT-2's 50,257 tokens stands for its tokenizer, but where TIKTOKEN_CACHE_DIR holds the real one.
"""

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import types
import urllib.request
from pathlib import Path

import pytest
import tiktoken
import torch

import train_gpt
from conftest import assert_close
from svmini import GPT, GPTConfig, load_adapter, loop, tasks, text

CONTEXT, BASE = 24, "pretrain/model.pt"   # of the raw model; where a run keeps the one that it pretrained
SMALL = ["--n-layer", 1, "--n-head", 2, "--d-model", 48, "--pretrain-steps", 4]
WORDS = ["full", "svft:off_diagonals=8"]
STEPS = ["--steps", 80, "--eval-every", 16]
REAL_TOKENIZER = text.gpt2_tokenizer   # before it is patched
PROSE = "\n\n".join(f"On day {i} the {('cat', 'dog', 'fox')[i % 3]} sees {i * i} birds\nand number {7 * i % 11} sings."
                    for i in range(180))
# as GSM-8K writes them; the answer is always 7
PAIRS = [(f"Ann has {i} pears and buys {2 * i}.\nHow many?", "7.\n#### 7") for i in range(20)]
# GPT-2's numbers: 50,257 tokens, <|endoftext|> the last; fillers begin with a byte that no text in UTF-8 has
RANKS = [bytes.fromhex(token) for token in text.train_bpe(PROSE + "Question: Answer:", 500)]
RANKS += [b"\xff" + i.to_bytes(2, "big") for i in range(len(RANKS), 50256)]
STUB = tiktoken.Encoding("stub", pat_str=text.GPT2_PATTERN, special_tokens={"<|endoftext|>": 50256},
                         mergeable_ranks={token: i for i, token in enumerate(RANKS)})


def raw_model(vocab_size=50257):
    """A random GPT-2 of one layer, nothing at zero."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size, CONTEXT, n_layer=1, n_head=1, d_model=64))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape)
        model.token_embedding.weight *= 0.5   # a surer model would not move in a few steps
    return model.eval()


def write(path, pairs):
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in pairs), encoding="utf-8")
    return path


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """raw.pt in Hugging Face's naming, with the causal masks of old files, and prose.txt; the stub, no network."""
    out = tmp_path_factory.mktemp("published ü")
    masks = {"transformer.h.0.attn.bias": torch.ones(1, 1, CONTEXT, CONTEXT).tril().bool()}
    torch.save(raw_model().to_gpt2() | masks, out / "raw.pt")
    (out / "prose.txt").write_text(PROSE, encoding="utf-8")
    library = text.stdlib_source()[:12_000]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "stdlib_source", lambda: library)
        patch.setattr(text, "gpt2_tokenizer", lambda: STUB)
        patch.setattr(urllib.request, "urlopen", lambda *a, **k: pytest.fail("the network was asked"))
        yield out


def call(*argv, code=0):
    """What train_gpt prints, or where `code` is not 0 what it says on stderr."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        got = train_gpt.main([str(a) for a in (*argv, "--device", "cpu")])
    assert got == code, error.getvalue()
    assert code != 2 or error.getvalue().startswith("error: ") and error.getvalue().count("\n") == 1
    return error.getvalue() if code else out.getvalue()


def results(out):
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def rows(out):
    """By method, without what the clock says and what other rows decide."""
    clock = ("seconds", "ms_per_step", "recovered")
    return {r["method"]: {k: v for k, v in r.items() if k not in clock} for r in results(out)["rows"]}


def base_of(source, n_head=None):
    return train_gpt.base_of(types.SimpleNamespace(init=str(source), n_head=n_head))


# ---- where a base comes from ----

def test_a_file_in_their_naming(folder, tmp_path):
    model, about = base_of(folder / "raw.pt")
    assert about == {"data": "raw", "published": True, "tokenizer": "gpt2"} and train_gpt.tokenizer_of(about) is STUB
    x = torch.arange(CONTEXT)[None]
    assert model.config == raw_model().config and torch.equal(model.eval()(x), raw_model()(x))
    assert base_of(folder / "raw.pt", n_head=4)[0].config.n_head == 4
    words = "raw.pt speaks text, which does not go with --data arithmetic"
    assert words in call("--data", "arithmetic", "--init", folder / "raw.pt", "--out", tmp_path, code=2)


@pytest.mark.parametrize("name", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_a_name_is_downloaded(name, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url",
                        lambda url, **options: asked.append((url, options["file_name"])) or raw_model().to_gpt2())
    model, about = base_of(name)
    assert asked == [(f"https://huggingface.co/{name}/resolve/main/pytorch_model.bin", f"{name}-pytorch_model.bin")]
    assert about == {"data": name, "published": True, "tokenizer": "gpt2"} and isinstance(model, GPT)


def test_model_files_of_ours_and_files_that_are_no_base(tmp_path):
    kept, ranks = GPT(GPTConfig(256, 16, 1, 1, 16)), [bytes([b]).hex() for b in range(256)]
    loop.save_model(tmp_path / "m.pt", kept, data="stdlib", tokenizer=ranks, published=False)
    loop.save_model(tmp_path / "old.pt", kept, data="stdlib", tokenizer=ranks)   # from before "published"
    for name in ("m.pt", "old.pt"):
        model, about = base_of(tmp_path / name)
        assert about == {"data": "stdlib", "tokenizer": ranks, "published": False} and model.config == kept.config
        assert torch.equal(model.token_embedding.weight, kept.token_embedding.weight)
        assert call("generate", "--init", tmp_path / name, "--prompt", "ab", "--length", 2).startswith("ab")
    loop.save_model(tmp_path / "a.pt", kept, data="stdlib")
    loop.save_model(tmp_path / "b.pt", kept, tokenizer=ranks)
    torch.save(raw_model(vocab_size=300).to_gpt2(), tmp_path / "small.pt")
    for name, words in (("a.pt", "does not say what it was trained on, with which tokenizer"),
                        ("b.pt", "does not say what"), ("small.pt", "knows 300 tokens, and GPT-2's tokenizer 50,257")):
        for argv in (["generate", "--prompt", "a"], ["finetune", "--method", "svfit"]):
            said = call(*argv, "--init", tmp_path / name, "--out", tmp_path / "out", code=2)
            assert f"{name} {words}" in said


def test_the_real_tokenizer_of_gpt2(folder, monkeypatch):
    cache, names = os.environ.get("TIKTOKEN_CACHE_DIR"), ("6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
                                                          "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6")
    if not cache or not all((Path(cache) / name).is_file() for name in names):
        pytest.skip("TIKTOKEN_CACHE_DIR names no folder with GPT-2's tokenizer")
    monkeypatch.setattr(text, "gpt2_tokenizer", REAL_TOKENIZER)
    tokenizer = train_gpt.tokenizer_of(base_of(folder / "raw.pt")[1])
    assert tokenizer.n_vocab == text.GPT2_VOCAB == 50257 and tasks.end_token(tokenizer) == 50256
    assert tokenizer.encode_ordinary("Hello world") == [15496, 995]
    assert call("generate", "--init", folder / "raw.pt", "--prompt", "Größe: ", "--length", 3).startswith("Größe: ")


# ---- published weights: adapted, merged, and back ----

@pytest.fixture(scope="module")
def prose(folder):
    """The folder of a comparison on prose."""
    out = folder / "prose"
    printed = call("compare", "--init", folder / "raw.pt", "--data", f"file:{folder / 'prose.txt'}", "--steps", 4,
                   "--batch-size", 3, "--methods", *WORDS, "--out", out)
    start = STUB.decode(text.make_corpus("", PROSE, STUB).splits["test"][:24].tolist())
    _, before, after = printed.split("\n--- ")
    assert before.startswith(f"before ---\n{start}") and after.startswith(f"after, svft:off_diagonals=8 ---\n{start}")
    return out


def test_a_comparison_on_published_weights(prose):
    start, full, svft = rows(prose).values()
    assert [full["lr"], svft["lr"]] == [train_gpt.RATES["published"][word] for word in WORDS]
    assert full["metric_name"] == "loss" and svft["metric"] < start["metric"] != full["metric"]
    assert svft["adapter"] == 6 * (64 * 17 - 8 * 9)
    assert svft["percent"] == pytest.approx(100 * svft["adapter"] / sum(p.numel() for p in raw_model().parameters()))
    content = results(prose)
    assert content["context"] == CONTEXT and content["sha256"] == hashlib.sha256(PROSE.encode()).hexdigest()
    assert base_of(prose / "runs" / "full-seed0" / "model.pt")[1] == {   # published still: its rates, its tokenizer
        "data": "raw", "published": True, "tokenizer": "gpt2"}


def test_merged_it_goes_back_where_it_came_from(prose, folder, tmp_path):
    adapter, x = prose / "runs" / "svft_off_diagonals=8-seed0" / "adapter.pt", torch.arange(CONTEXT)[None] * 1999
    pair = folder / "raw.pt", "--adapter", adapter
    assert "gpt2's naming" in call("merge", "--init", *pair, "--format", "gpt2", "--out", tmp_path)
    call("merge", "--init", *pair, "--out", tmp_path)
    assert base_of(tmp_path / "merged.pt")[1] == {"data": "adapted", "tokenizer": "gpt2", "published": True}
    state = torch.load(tmp_path / "merged-gpt2.pt", weights_only=True)
    assert state["transformer.h.0.attn.c_attn.weight"].shape == (64, 3 * 64), "d_in first, as Conv1D keeps it"
    with torch.no_grad():
        expected = load_adapter(raw_model(), adapter).eval()(x)
        assert_close(GPT.from_gpt2(state).eval()(x), expected, 1e-5)
        assert (raw_model()(x) - expected).abs().max() > 1e-3 * expected.abs().max(), "it is the adapted model"
    argv = ["generate", "--prompt", "On day 3 the", "--length", 5, "--temperature", 0, "--init"]
    said = [call(*argv, *pair), call(*argv, tmp_path / "merged-gpt2.pt"), call(*argv, tmp_path / "merged.pt")]
    assert said[0] == said[1] == said[2] and said[0].startswith("On day 3 the") and len(said[0]) > 13
    if importlib.util.find_spec("transformers"):
        from transformers import GPT2Config, GPT2LMHeadModel
        theirs = GPT2LMHeadModel(GPT2Config(n_positions=CONTEXT, n_embd=64, n_layer=1, n_head=1)).eval()
        theirs.load_state_dict(state, strict=True)
        assert_close(theirs(x).logits.detach(), expected, 1e-5)


# ---- question-answer pairs ----

@pytest.fixture(scope="module")
def answered(folder):
    """(data, folder, what it printed) of a comparison on twenty pairs of one answer, and one that does not fit."""
    data, out = f"qa:{write(folder / 'long.jsonl', PAIRS + [('long ' * 99, '#### 7')])}", folder / "answered"
    return data, out, call("compare", "--data", data, *SMALL, "--methods", *WORDS, *STEPS, "--out", out)


def test_pairs_are_learned_and_marked(answered):
    data, out, printed = answered
    content, splits = results(out), tasks.split_pairs(data)
    assert {(r["metric_name"], r["higher_is_better"]) for r in rows(out).values()} == {("exact match", True)}
    assert {word: r["metric"] for word, r in rows(out).items()} == {"start": 0, "full": 100, WORDS[1]: 100}
    assert content["sha256"] == hashlib.sha256(json.dumps(splits).encode()).hexdigest() and "context" not in content
    lines = [json.loads(line) for line in (out / "runs/full-seed0/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [16, 32, 48, 64, 80] and lines[0]["loss"] > 2 * lines[-1]["loss"] > 0
    assert "1 of 17 training pairs do not fit into the model's context of 128 tokens and are left out" in printed
    _, before, after = printed.split("\n--- ")
    for shown, mark in ((before, "wrong"), (after, "right")):
        assert shown.count("\nModel:") == 2 == shown.count(f"\n{mark}\n")
        assert all(f"Question: {q}\nAnswer: {a}\nModel:" in shown for q, a in splits["test"])
    assert after.startswith(f"after, {WORDS[1]} ---") and after.count("\nModel: 7.\n#### 7\n") == 2


def test_pairs_in_another_order_and_by_seed(answered, tmp_path):
    data, out, _ = answered
    argv = ["finetune", "--data", data, "--init", out / BASE, "--method", WORDS[1], *STEPS, "--out", tmp_path]
    for seed in (1, 0):   # and without full before it
        call(*argv, "--seed", seed)
    one, other = (tmp_path / "runs" / f"svft_off_diagonals=8-seed{seed}" for seed in (0, 1))
    assert rows(one)["svft:off_diagonals=8"] == rows(out)["svft:off_diagonals=8"]
    logs = [(run / "metrics.jsonl").read_text() for run in (out / "runs" / one.name, one, other)]
    assert logs[0] == logs[1] != logs[2]
    assert results(other)["sha256"] != results(one)["sha256"], "the seed draws the split"
    data = f"qa:{write(tmp_path / 'x.jsonl', PAIRS)}"
    assert "sha256 was" in call(*argv, "--resume", "--data", data, code=2)
    assert "--context speaks of text, or of a model that is pretrained here" in call(*argv, "--context", 64, code=2)


def test_a_resumed_run_on_pairs_equals_the_uninterrupted_one(answered, tmp_path, monkeypatch):
    data, out, _ = answered
    steps, batch = [], tasks.Pairs.batch

    def cut(self, size, seed, step):
        steps.append(step)
        if len(steps) == 21:
            raise KeyboardInterrupt
        return batch(self, size, seed, step)

    monkeypatch.setattr(tasks.Pairs, "batch", cut)
    argv = ["compare", "--data", data, "--init", out / BASE, "--methods", *WORDS, *STEPS, "--out", tmp_path]
    call(*argv, "--save-every", 8, code=130)
    call(*argv, "--resume")
    assert steps == [*range(21), *range(16, 80), *range(80)] and rows(tmp_path) == rows(out)
    for run in ("full-seed0", "svft_off_diagonals=8-seed0"):
        again, whole = (f / "runs" / run for f in (tmp_path, out))
        assert (again / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
        numbers, others = (torch.load(f / "last.pt", weights_only=True)["model"] for f in (again, whole))
        assert all(torch.equal(numbers[k], v) for k, v in others.items())


@pytest.mark.parametrize("content, words", [
    (None, ["there is no file", "x.jsonl"]),
    ('{"question": "a", "answer": "b"}\n{"question": "a"}\n', ["x.jsonl, line 2", 'no "answer"']),
    ("".join(f'{{"question": "{i}", "answer": "b"}}\n' for i in range(9)), ["9 different questions: at least 10"])])
def test_pairs_that_cannot_be_used_are_found_before_pretraining(content, words, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "train", lambda *a, **k: pytest.fail("training started"))
    if content is not None:
        (tmp_path / "x.jsonl").write_text(content)
    said = call("--data", f"qa:{tmp_path / 'x.jsonl'}", "--out", tmp_path / "out", code=2)
    assert all(word in said for word in words) and not list((tmp_path / "out").iterdir())


def test_pairs_on_published_weights_end_with_endoftext(folder, tmp_path):
    argv = ["finetune", "--method", "full", "--init", folder / "raw.pt", "--out", tmp_path, "--data"]
    short = write(tmp_path / "short.jsonl", [(f"{i}", "#### 1") for i in range(20)])
    printed = call(*argv, f"qa:{short}", "--lr", 0.01, "--steps", 12, "--batch-size", 4)
    run = tmp_path / "runs" / "full-seed0"
    assert rows(run)["full"]["metric"] == 100 and "<|endoftext|>" not in printed
    assert call("generate", "--init", run / "model.pt", "--prompt", "Question: 3\nAnswer:", "--temperature", 0,
                "--length", 8) == "Question: 3\nAnswer: #### 1\n", "as far as the end of the answer"
    words = f"no training pair fits into the model's context of {CONTEXT} tokens: the shortest needs"
    assert words in call(*argv, f"qa:{write(tmp_path / 'x.jsonl', PAIRS)}", code=2)

def test_gsm8k_from_its_files(answered, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "GSM8K_COUNTS", {"train": 17, "test": 3})
    (tmp_path / "gsm8k").mkdir()
    test = PAIRS[17:]
    write(tmp_path / "gsm8k" / "train.jsonl", PAIRS[:17])
    write(tmp_path / "gsm8k" / "test.jsonl", test)
    printed = call("finetune", "--method", "full", "--data", "gsm8k", "--data-dir", tmp_path, *STEPS,
                   "--init", answered[1] / BASE, "--out", tmp_path)
    row, prompt = rows(tmp_path / "runs/full-seed0")["full"], f"Question: {test[0][0]}\nAnswer:"
    assert (row["metric"], row["metric_name"]) == (100, "exact match") and "do not fit" not in printed
    assert all(f"Question: {q}\nAnswer: {a}\nModel:" in printed for q, a in test)
    said = call("generate", "--init", tmp_path / "runs/full-seed0/model.pt", "--temperature", 0, "--prompt", prompt)
    assert said.startswith(prompt) and said.endswith("#### 7\n") and "\0" not in said


def test_sets_that_cannot_be_had_are_found_before_pretraining(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, **k: asked.append(url) or open(tmp_path / "no route"))
    monkeypatch.setattr(loop, "train", lambda *a, **k: pytest.fail("training started"))
    for data, url in (("gsm8k", tasks.GSM8K_URL.format("train")), ("tinyshakespeare", text.SHAKESPEARE_URL)):
        said = call("--data", data, "--data-dir", tmp_path / "d", "--out", tmp_path / "out", code=2)
        assert asked.pop() == url and not asked
        assert url in said and "no route" in said and str(tmp_path / "d") in said
    assert [p.name for p in tmp_path.rglob("*")] == ["out"]


# ---- texts, and how they are gone through ----

def finetuned(out, *argv):
    """(row, what results.json says besides, trained numbers) of svfit after two steps."""
    call("finetune", "--method", "svfit", "--steps", 2, "--batch-size", 5, "--out", out, *argv)
    run = out / "runs" / "svfit-seed0"
    return rows(run)["svfit"], results(run), torch.load(run / "last.pt", weights_only=True)["model"]


@pytest.fixture
def ours(answered, folder):
    return ["--init", answered[1] / BASE, "--data", f"file:{folder / 'prose.txt'}"]


def test_tinyshakespeare_from_its_file(ours, tmp_path):
    (tmp_path / "input.txt").write_text(PROSE, encoding="utf-8")
    row, content, _ = finetuned(tmp_path / "a", *ours, "--data", "tinyshakespeare", "--data-dir", tmp_path)
    assert row == finetuned(tmp_path / "b", *ours)[0] and row["metric_name"] == "loss"
    assert (content["task"], content["sha256"]) == ("tinyshakespeare", hashlib.sha256(PROSE.encode()).hexdigest())


def test_context(ours, tmp_path):
    whole, short = (finetuned(tmp_path / c, *ours, "--context", c) for c in ("128", "8"))
    assert whole[0] != short[0] and (whole[1]["context"], short[1]["context"]) == (128, 8)
    for argv, words in (([129], "--context 129 is longer than the model's, 128 tokens"),
                        ([64, "--data", "arithmetic"], "--context belongs to text")):
        assert words in call("finetune", "--method", "svfit", *ours, "--out", tmp_path, "--context", *argv, code=2)
    call("pretrain", "--context", 20, *SMALL[:-2], "--steps", 2, "--out", tmp_path)
    assert base_of(tmp_path / BASE)[0].config.block_size == 20


@pytest.mark.parametrize("kind", ["text", "pairs"])
def test_accumulation_changes_nothing_but_the_rounding(kind, ours, tmp_path, monkeypatch):
    """Five in parts of three and two; of pairs also with unequal numbers of targets."""
    if kind == "pairs":
        ours[-1] = f"qa:{write(tmp_path / 'x.jsonl', [(f'{i}?', 'is ' * (i % 7) + f'#### {i}') for i in range(20)])}"
    sizes, loss = [], train_gpt.cross_entropy
    monkeypatch.setattr(train_gpt, "cross_entropy", lambda model, x, y: (
        sizes.append(len(x)) if torch.is_grad_enabled() else None) or loss(model, x, y))
    (one, _, numbers), (two, _, others) = (finetuned(tmp_path / str(n), *ours, "--accumulate", n) for n in (1, 2))
    assert sizes == [5] * 2 + [3, 2] * 2 and two["metric"] == pytest.approx(one["metric"], rel=1e-5)
    for key, value in numbers.items():
        assert_close(others[key], value, 1e-5)
