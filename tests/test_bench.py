"""The bench: its rows, its operation counts and statistics against numbers worked out by hand, its memory on Linux."""

import copy
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn as nn

from conftest import method_of_the_readme
from svmini import METHODS, bench, loop, svd

SMALL = ["--model", "tiny", "--layers", "1", "--batch", "2", "--tokens", "8", "--rounds", "3", "--steps", "1",
         "--device", "cpu"]


def make(inference=False, layers=1, tokens=8, targets=bench.TARGETS):
    """What the command makes of its flags: two sequences, blocks of width 128."""
    torch.manual_seed(0)
    machine = loop.Machine(torch.device("cpu"), torch.float32, "a test")
    return bench.Bench(bench.Blocks(layers, 128, 4, bench.GPT), torch.randn(2, tokens, 128), torch.tensor([0, 1]),
                       machine, targets, inference)


def table_of(out):
    """{method: {column: cell}} of the Markdown table in what was printed."""
    head, _, *rows = [[c.strip() for c in s.strip("|").split("|")] for s in out.splitlines() if s.startswith("|")]
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


@pytest.mark.parametrize("flags, first, last", [([], ["frozen", "full"], []), (["--inference"], ["base"], ["merged"])])
def test_a_row_for_every_word(flags, first, last, tmp_path, capsys):
    assert bench.main([*SMALL, "--no-memory", "--json", str(tmp_path / "b.json"), *flags]) == 0
    out = capsys.readouterr().out
    table, content = table_of(out), json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))
    assert list(table) == [r["method"] for r in content["rows"]] == [*first, *bench.WORDS, *last]
    about = content["about"]
    assert (about["model"], about["layers"], about["batch"], about["tokens"], about["rounds"]) == ("tiny", 1, 2, 8, 3)
    assert about["torch"] == torch.__version__ and about["methods"] == list(bench.WORDS)
    unit = "forward" if flags else "step"
    for row in content["rows"]:
        cells = table[row["method"]]
        assert len(row["times_ms"]) == 3 and row["ms"] == sorted(row["times_ms"])[1] > 0
        assert cells[f"ms/{unit}"] == f"{row['ms']:.1f}" and cells[f"{unit} MB"] == "-"
        assert cells[f"predicted x {first[-1]}"] == f"{row['predicted']:.2f}"
        assert row["weights_mb"] > 0 and (row["setup_s"] is None) == (row["method"] in bench.PLAIN)
        assert (row["file_bytes"] is None) == (row["method"] in ("frozen", "base", "merged"))
        for name in first:
            reference = next(r for r in content["rows"] if r["method"] == name)
            assert row[f"x_{name}"] == [t / r for t, r in zip(row["times_ms"], reference["times_ms"])]
    assert table[first[-1]][f"x {first[-1]}"] == "1.00 ± 0.00"
    assert "cannot be told apart, within 2 standard errors" in out


def test_every_row_pays_for_its_own_svd(monkeypatch):
    real, known = bench.row_model, []
    monkeypatch.setattr(bench, "row_model", lambda word, b: known.append(len(svd._known)) or real(word, b))
    assert bench.main([*SMALL, "--no-memory", "--methods", "svfit", "svft:pattern=plain"]) == 0
    assert known == [0, 0, 0, 0] and not svd._known, "factors of a row stay in memory"


def test_what_each_row_trains():
    start = make(layers=2)
    names = {n for n, _ in start.base.named_parameters()}
    trained = {w: {n for n, p in bench.row_model(w, start).named_parameters() if p.requires_grad}
               for w in ("frozen", "full", "head", "svfit@query")}
    head = {"head.weight", "head.bias"}
    assert trained["full"] == names and trained["head"] == head
    assert trained["frozen"] == head | {n for n in names if ".norm1." in n or ".norm2." in n}
    assert trained["svfit@query"] == head | {f"blocks.{i}.attention.query.s" for i in (0, 1)}
    assert all(p.requires_grad for p in start.base.parameters()), "a row changed the base"


@pytest.mark.parametrize("word", ["frozen", "full", "lora:rank=8"])
def test_a_step_is_a_training_step_and_a_forward_pass_is_none(word):
    modes = []
    for inference in (False, True):
        here = make(inference)
        model = bench.row_model(word, here)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        model.head.register_forward_hook(lambda *a: modes.append(torch.is_inference_mode_enabled()))
        bench.make_step(model, here)()
        for name, p in model.named_parameters():
            assert p.grad is None
            if not name.endswith(("key.bias", ".A")):   # whose first gradients are 0: softmax is blind to one, B = 0
                assert torch.equal(p, before[name]) == (inference or not p.requires_grad), name
    assert modes == [False, True]


# T products of d_out x d_in, by the cheapest order, forward and backward: worked out from FORMULAS.md's counts
UNITS = [
    # square, 100 x 100, 50 tokens: T < D, so the factors are never multiplied
    ("frozen", 100, 100, 50, 2), ("full", 100, 100, 50, 3), ("head", 100, 100, 50, 1),
    ("svft:pattern=plain", 100, 100, 50, 4), ("svfit", 100, 100, 50, 4), ("svfit:rank=100", 100, 100, 50, 4),
    ("svft:off_diagonals=8", 100, 100, 50, 7),
    # 400 tokens: built first, 3 + 2D/T and 3 + 4D/T
    ("svft:pattern=plain", 100, 100, 400, 3.5), ("svft:pattern=topk", 100, 100, 400, 4), ("svfit", 100, 100, 400, 3.5),
    # 4 to 1, a = 1/4: 2 + 2a through the activations, 2 + 3a + 2aD/T folded, and 2 + 5a for few tokens
    ("svft:pattern=plain", 400, 100, 400, 2.5), ("svft:pattern=plain", 100, 400, 50, 2.5),
    ("svft:off_diagonals=2", 400, 100, 400, 2.875), ("svft:off_diagonals=2", 100, 400, 50, 3.25),
    # 2 (1 + a) r/D more for frozen factors, 3 (1 + a) r/D for trained ones
    ("svfit:rank=20", 100, 100, 400, 2.8), ("svfit:rank=20", 400, 100, 400, 2.5), ("vera:rank=20", 100, 400, 400, 2.5),
    ("lora:rank=10", 100, 100, 400, 2.6), ("lora:rank=10", 100, 400, 400, 2.375),
    # r/T for the product B A in the norm, thrice where the gradient goes through it
    ("dora:rank=10", 100, 100, 400, 2.625), ("dora:rank=10,detach_norm=False", 100, 100, 400, 2.675),
    # 3 m b / d_out for the rotation
    ("boft:block_size=4,factors=2", 100, 100, 400, 2.24), ("boft:block_size=4,factors=2", 400, 100, 50, 2.06),
    ("svfit:energy=0.9", 100, 100, 50, None),
]


@pytest.mark.parametrize("word, d_out, d_in, T, expected", UNITS)
def test_units(word, d_out, d_in, T, expected):
    assert bench.units(word, d_out, d_in, T) == (None if expected is None else pytest.approx(expected, rel=1e-12))


@pytest.mark.parametrize("word, d_out, d_in, T, expected", [
    ("full", 100, 100, 1, 1), ("merged", 100, 100, 1, 1), ("svfit", 100, 100, 1, 2), ("svfit", 100, 100, 400, 1.25),
    ("svft", 100, 400, 1, 1.5), ("lora:rank=10", 100, 100, 1, 1.2), ("dora:rank=10", 100, 100, 20, 1.7)])
def test_units_of_a_forward_pass(word, d_out, d_in, T, expected):
    assert bench.units(word, d_out, d_in, T, inference=True) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("word, targets, expected", [
    # one block of width 128: 12 units of 128², and 2 T/d = 1/4 of attention a pass (T = 16); 32 tokens in all
    ("full", bench.TARGETS, 1), ("frozen", bench.TARGETS, (24 + 0.75) / 36.75), ("head", bench.TARGETS, 12.25 / 36.75),
    ("svfit", bench.TARGETS, (4 * 4 + 8 * 2.5 + 0.75) / 36.75),             # T < 2D: through the activations
    ("svfit", ("query",), (4 + 3 * 2 + 8 * 2 + 0.75) / 36.75),
    ("svfit@down,up", ("query",), (4 * 2 + 8 * 2.5 + 0.75) / 36.75),
    ("svfit:energy=0.9", ("query",), None)])
def test_predicted_over_a_block(word, targets, expected):
    got = bench.predicted(word, "full", make(tokens=16, targets=targets))
    assert got == (None if expected is None else pytest.approx(expected, rel=1e-12))


def test_ratios_are_taken_round_by_round():
    times = {"full": [10, 20, 40], "a": [5, 20, 60], "b": [11, 22, 44]}   # a machine that slows down
    assert bench.ratios(times, "a", "full") == [0.5, 1, 1.5] and bench.ratios(times, "b", "full") == [1.1] * 3
    row = {"method": "a", "ms": 20, "x_full": bench.ratios(times, "a", "full"), "predicted": None, "step_mb": 1.25,
           "weights_mb": 2, "setup_s": 0.25, "file_bytes": 5000}
    cells = table_of("\n".join(bench.table_lines([row], ("full",), "step")))["a"]
    assert cells == {"method": "a", "ms/step": "20.0", "x full": "1.00 ± 0.50", "predicted x full": "-",
                     "step MB": "1.2", "weights MB": "2.0", "set-up s": "0.2", "file": "5 kB"}


def test_what_can_be_told_apart():
    # paired differences to full: a 0.1 0.1 0.1, b -0.1 0.2 0.2 (mean 0.1, standard error 0.1), c 1 in every round
    times = {"c": [20, 40, 80], "full": [10, 20, 40], "a": [11, 22, 44], "b": [9, 24, 48]}
    assert bench.alike(times, "full") == {"full": ["b"], "a": ["b"]}
    # mean 0.1, standard errors 0.041 and 0.058: two of them are less, and more
    assert bench.alike({"full": [10] * 4, "a": [10, 11, 11, 12]}, "full") == {}
    assert bench.alike({"full": [10] * 4, "a": [10, 10, 12, 12]}, "full") == {"full": ["a"]}
    assert bench.alike({"full": [10, 11], "a": [10, 11]}, "full") == {"full": ["a"]}


def test_rounds_go_forth_and_back_after_a_warm_up():
    called = []
    times = bench.time_rounds({n: lambda n=n: called.append(n) for n in "abc"}, 2, 2, torch.device("cpu"))
    assert "".join(called) == "abc" + "ccbbaa" + "aabbcc"
    assert {n: len(ms) for n, ms in times.items()} == {"a": 2, "b": 2, "c": 2}


def test_weights_and_files():
    here = make()
    full = 12 * 128 ** 2 + (4 + 4 + 1) * 128 + 4 * 128   # weights, biases, two LayerNorms
    head = 2 * 128 + 2
    assert bench.sizes("full", bench.row_model("full", here)) == {
        "weights_mb": pytest.approx(4 * (full + head) / 1e6), "file_bytes": 4 * full}
    model = bench.row_model("lora:rank=8@query", here)
    assert bench.sizes("lora:rank=8@query", model)["weights_mb"] == pytest.approx(4 * (full + head + 16 * 128) / 1e6)
    assert 4 * (16 * 128 + head) < bench.sizes("lora:rank=8@query", model)["file_bytes"] < 4 * (16 * 128 + head) + 8000
    model.register_buffer("again", model.head.weight.detach()[:1])
    assert bench.sizes("head", model)["weights_mb"] == pytest.approx(4 * (full + head + 16 * 128) / 1e6)


def test_the_merged_row_is_plain(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(bench, "make_step", lambda model, b: seen.append(copy.deepcopy(model)) or (lambda: None))
    assert bench.main([*SMALL, "--no-memory", "--inference", "--methods", "svfit", "lora:rank=2"]) == 0
    base, _, lora, merged = seen
    assert [type(m.blocks[0].attention.query) for m in (base, lora, merged)] == [nn.Linear, METHODS["lora"], nn.Linear]
    assert table_of(capsys.readouterr().out)["merged"]["predicted x base"] == "1.00"


def test_a_method_that_is_dropped_in(monkeypatch, capsys):
    monkeypatch.setitem(METHODS, "loraxs", method_of_the_readme())
    assert bench.main([*SMALL, "--no-memory", "--methods", "loraxs:rank=4", "loraxs:rank=4", "full"]) == 0
    table = table_of(capsys.readouterr().out)
    assert list(table) == ["frozen", "full", "loraxs:rank=4"]
    assert table["loraxs:rank=4"]["predicted x full"] == "-" and float(table["loraxs:rank=4"]["ms/step"]) > 0


@pytest.mark.parametrize("argv, words", [
    ("--model gpt3", ["--model", "gpt2"]), ("--rounds 1", ["--rounds", "of at least 3", "'1'"]),
    ("--tokens 0", ["--tokens", "of at least 1"]), ("--layers x", ["--layers", "a whole number"]),
    ("--no-such-flag", ["--no-such-flag"]), ("--methods svfti", ["svfti", "svfit"]),
    ("--methods svft:rank=2", ["svft has no option 'rank'"]),
    ("--methods svft:pattern=topk", ["topk", "up", "512x128"]),
    ("--methods lora:rank=129", ["rank", "128"]), ("--methods merged", ["no method 'merged'"]),
    ("--targets qwery", ["'qwery'", "query"]), ("--targets qwery --methods head", ["'qwery'", "query"]),
    ("--json .", ["--json", "is no place for a file"])])
def test_bad_flags_are_one_line(argv, words, capsys, monkeypatch):
    monkeypatch.setattr(bench, "measure", lambda *a: pytest.fail("the work started"))
    assert bench.main([*SMALL, *argv.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and all(word in error for word in words), error


def test_memory_stands_in_the_table(monkeypatch, capsys):
    monkeypatch.setattr(bench, "memory_of", lambda word, argv: {"frozen": 1.25, "full": 2.5, "head": None}[word])
    assert bench.main([*SMALL, "--methods", "head"]) == 0
    out = capsys.readouterr().out
    assert [cells["step MB"] for cells in table_of(out).values()] == ["1.2", "2.5", "-"]
    assert out.count("step MB: - where the system does not tell") == 1


def test_a_memory_process_that_fails_says_why(monkeypatch, capsys):
    failed = subprocess.CompletedProcess([], 2, "", "error: no method 'loraxs'\n")   # it is only known in here
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: failed)
    assert bench.memory_of("loraxs", SMALL) is None and capsys.readouterr().err == failed.stderr


def test_a_system_that_does_not_tell_its_memory(monkeypatch, capsys):
    monkeypatch.setattr(Path, "write_text", lambda *a: (_ for _ in ()).throw(PermissionError("clear_refs")))
    assert bench.main([*SMALL, "--memory-of", "head"]) == 0 and capsys.readouterr().out == "null\n"


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux tells a process's peak memory")
def test_memory_of_a_step():
    argv = ["--model", "tiny", "--layers", "2", "--batch", "1", "--tokens", "16", "--device", "cpu"]
    frozen, full = bench.memory_of("frozen", argv), bench.memory_of("full", argv)
    # 396,544 weights: full keeps 8 bytes of AdamW and up to 4 of gradient for each, frozen next to none
    assert 0 < frozen < 8 * 0.3965 < full < frozen + 14 * 0.3965
