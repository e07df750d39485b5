"""The bench: its rows, its counts against numbers worked out by hand, and the order of its rounds."""

import copy
import json

import pytest
import torch
import torch.nn as nn

from svmini import METHODS, bench
from svmini.cli import run_command
from svmini.training.device import resolve_device

SMALL = "--layers 1 --batch 2 --tokens 8 --rounds 2 --steps 1 --device cpu".split()
D, B, T = 128, 2, 16
N = B * T   # tokens in a batch


def make(**device_config):
    torch.manual_seed(0)
    return bench.Bench(bench.Blocks(1, D, 4, bench.GPT_BLOCK), torch.randn(B, T, D), torch.tensor([0, 1]),
                       resolve_device("cpu", "float32", **device_config))


def table_of(out):
    """Return {method: {column: cell}} of the Markdown table in a text."""
    head, _, *rows = [[c.strip() for c in s.strip("|").split("|")] for s in out.splitlines() if s.startswith("|")]
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def test_a_row_for_every_spec(tmp_path, capsys):
    first = ["frozen", "full"]
    assert run_command(bench.command, [*SMALL, "--json", str(tmp_path / "b.json")]) == 0
    table, content = table_of(capsys.readouterr().out), json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))
    rows = {row["method"]: row for row in content["rows"]}
    assert list(table) == list(rows) == [*first, *bench.SPECS]
    for spec, row in rows.items():
        assert len(row["times_ms"]) == 2 and row["ms"] == sum(row["times_ms"]) / 2 > 0
        assert table[spec]["ms/step"] == f"{row['ms']:.1f}"
        for name in first:   # a ratio a round
            assert row[f"x_{name}"] == [t / r for t, r in zip(row["times_ms"], rows[name]["times_ms"])]
        assert row["x_flops"] == row["flops"] / rows[first[-1]]["flops"]
        assert "activation MB" in table[spec] and "peak MB" not in table[spec]   # this is a CPU
    assert table[first[-1]][f"x {first[-1]}"] == "1.00 ± 0.00"
    assert rows["svfit"]["weights_mb"] > rows["lora:rank=8"]["weights_mb"] > rows["head"]["weights_mb"]


def test_rounds_alternate_their_order_after_a_warm_up():
    called = []
    times = bench.time_rounds({n: lambda n=n: called.append(n) for n in "abc"}, 2, 2, torch.device("cpu"))
    assert "".join(called) == "abc" + "ccbbaa" + "aabbcc"
    assert {n: len(ms) for n, ms in times.items()} == {"a": 2, "b": 2, "c": 2}


# a block has 12 D² weights; unit: 2 N D² operations, for a product of x, of its gradient or of the weight's gradient
@pytest.mark.parametrize("spec, units", [
    ("full", 36), ("frozen", 24),
    ("head", 12),                           # no gradient passes the blocks
    ("svfit", 3 * 3 + 4 + 2 * 10),          # N < 2D: Vᵀ x and U; before query, key, value nothing needs a gradient
    ("lora:rank=8@down", 12 + (2 * 4 + 3 * 1) * 8 / D)])    # A is 4 D wide: x and dA; B: added in place, dB, B's input
def test_the_matmul_flops_of_a_step(spec, units):
    here = make()
    found = bench.matmul_flops(bench.Step(bench.row_model(spec, here), here))
    attention = 4 * N * T * D * {"head": 1, "lora:rank=8@down": 1}.get(spec, 3)   # q kᵀ and p v, forward and backward
    head = 4 * B * D * {"head": 2}.get(spec, 3)                                   # its input's gradient, or not
    assert found == round(2 * N * D * D * units) + attention + head


def test_the_activation_bytes_are_what_autograd_saves():
    model, x = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2)), torch.randn(3, 4)
    model.register_buffer("scale", torch.ones(3, 2))
    saved = {}

    def forward():
        saved["y"] = model(x) * model.scale                         # the buffer is saved, and is the model's own
    assert bench.activation_bytes(model, forward) == 4 * (3 * 4 + 3 * 8 + 3 * 8)     # x, GELU's input, GELU's output
    model[0].requires_grad_(False)
    model[2].weight.requires_grad_(False)
    assert bench.activation_bytes(model, forward) == 0                   # a bias needs none of it
    long = torch.randn(5, 4, requires_grad=True)                    # two parts of a storage count as all of it, once
    assert bench.activation_bytes(model, lambda: saved.update(z=long[:2] * long[2:4])) == 4 * 5 * 4


def test_the_memory_of_full_and_head():
    here, n = make(), 12 * D * D + 9 * D + 4 * D       # weights, biases, two LayerNorms
    found = {w: bench.measure_memory(bench.Step(model, here), model) for w in ("full", "head", "lora:rank=2@query")
             for model in [bench.row_model(w, here)]}
    assert found["full"]["weights_mb"] == pytest.approx(4 * (n + 2 * D + 2) / 1e6)
    steps = 16 + 2                                     # AdamW has a step count for each of the 18 tensors
    assert found["full"]["state_mb"] == pytest.approx(4 * (3 * (n + 2 * D + 2) + steps) / 1e6)
    assert found["head"]["state_mb"] == pytest.approx(4 * (3 * (2 * D + 2) + 2) / 1e6)
    assert found["lora:rank=2@query"]["state_mb"] == pytest.approx(4 * (3 * (4 * D + 2 * D + 2) + 4) / 1e6)
    assert found["head"]["activation_mb"] == pytest.approx((4 * (B * D + 2 * B) + 8 * B + 4) / 1e6)     # x; of the loss
    assert found["full"]["activation_mb"] > found["lora:rank=2@query"]["activation_mb"] > found["head"]["activation_mb"]


def test_each_row_trains_its_parameters():
    start = make()
    names = {n for n, _ in start.base.named_parameters()}
    trained = {w: {n for n, p in bench.row_model(w, start).named_parameters() if p.requires_grad}
               for w in ("frozen", "full", "head", "svfit@query")}
    head = {"head.weight", "head.bias"}
    assert trained["full"] == names and trained["head"] == head
    assert trained["frozen"] == head | {n for n in names if ".norm1." in n or ".norm2." in n}
    assert trained["svfit@query"] == head | {"blocks.0.attention.query.s"}
    assert all(p.requires_grad for p in start.base.parameters()), "a row changed the base"


def test_a_step_changes_the_weights():
    here = make()
    model = bench.row_model("full", here)
    before = copy.deepcopy(model.state_dict())
    bench.Step(model, here)()
    same = {n: torch.equal(t, before[n]) for n, t in model.state_dict().items() if not n.endswith("key.bias")}
    assert not any(same.values()) and all(p.grad is None for p in model.parameters())


def test_every_row_computes_its_own_svd(monkeypatch):
    computed, compiled, svd = [], [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: computed.append(a) or svd(*a, **k))
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    here = make(compile=True)
    bench.measure(here, ["svfit", "svft"], 2, 1)
    assert len(computed) == 6 + 6, "one per layer and row"
    assert len(compiled) == 4
    bench.row_model("svfit", here)
    assert len(computed) == 6 + 6 + 6, "the factors of the last row must not stay in memory"


def test_methods_all_includes_a_new_method(monkeypatch, capsys):
    monkeypatch.setattr(bench, "SPECS", ["lora:rank=8"])
    monkeypatch.setitem(METHODS, "new", METHODS["random_mask"])
    assert run_command(bench.command, [*SMALL, "--methods", "all", "--targets", "query,up"]) == 0
    rows, examples = list(table_of(capsys.readouterr().out)), sum(len(cls.examples) for cls in METHODS.values())
    assert rows[:3] == ["frozen", "full", "lora:rank=8@query,up"] and rows[-1] == "new:off_diagonals=2@query,up"
    assert len(rows) == 2 + examples, "every example is a row, lora:rank=8 once"


@pytest.mark.parametrize("argv, parts", [
    ("--model gpt3", ["--model", "gpt2"]), ("--rounds 1", ["--rounds", "of at least 2", "'1'"]),
    ("--no-such-flag", ["--no-such-flag"]), ("--methods svfti", ["svfti", "svfit"]),
    ("--methods svft:pattern=topk", ["topk", "up", "512x128"]), ("--methods merged", ["no method 'merged'"]),
    ("--targets qwery --methods head", ["'qwery'", "query"])])
def test_bad_flags_are_refused_in_one_line(argv, parts, capsys, monkeypatch):
    monkeypatch.setattr(bench, "measure", lambda *a: pytest.fail("the measurement started"))
    assert run_command(bench.command, [*SMALL, *argv.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and all(part in error for part in parts), error
