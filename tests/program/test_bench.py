"""The bench: its rows, its counts against numbers worked out by hand, and the order of its rounds."""

import copy
import json

import pytest
import torch

from helpers import call
from svmini import METHODS, bench
from svmini.training import compare
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


def test_a_row_for_every_spec(tmp_path):
    first = ["frozen", "full"]
    table = table_of(call(bench, *SMALL, "--json", tmp_path / "b.json"))
    rows = {row["method"]: row for row in json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))["rows"]}
    assert list(table) == list(rows) == [*first, *bench.SPECS]
    for spec, row in rows.items():
        assert len(row["times_ms"]) == 2 and row["ms"] == sum(row["times_ms"]) / 2 > 0
        assert table[spec]["ms/step"] == f"{row['ms']:.1f}"
        for name in first:   # a ratio a round
            assert row[f"x_{name}"] == [t / r for t, r in zip(row["times_ms"], rows[name]["times_ms"])]
        assert row["x_flops"] == row["flops"] / rows[first[-1]]["flops"]
        assert "activation MB" in table[spec] and "peak MB" not in table[spec]   # this is a CPU
    assert table[first[-1]][f"x {first[-1]}"] == "1.00 ± 0.00"


def test_rounds_alternate_their_order_after_a_warm_up():
    called = []
    times = bench.time_rounds({n: lambda n=n: called.append(n) for n in "abc"}, 2, 2, torch.device("cpu"))
    assert "".join(called) == "abc" + "ccbbaa" + "aabbcc" and len(times["c"]) == 2


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


def test_the_memory_of_full_and_head():
    here, n = make(), 12 * D * D + 9 * D + 4 * D       # weights, biases, two LayerNorms
    for spec, trained, tensors in (("full", n + 2 * D + 2, 18), ("lora:rank=2@query", 4 * D + 2 * D + 2, 4),
                                   ("head", 2 * D + 2, 2)):
        model = bench.row_model(spec, here)
        found = bench.measure_memory(bench.Step(model, here), model)
        assert found["state_mb"] == pytest.approx(4 * (3 * trained + tensors) / 1e6)    # and a step count a tensor
    assert found["weights_mb"] == pytest.approx(4 * (n + 2 * D + 2) / 1e6)
    assert found["activation_mb"] == pytest.approx((4 * (B * D + 2 * B) + 8 * B + 4) / 1e6)     # x; of the loss
    frozen = {n for n, p in bench.row_model("frozen", here).named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in here.base.named_parameters() if "norm" not in n and "head" not in n}
    assert all(p.requires_grad for p in here.base.parameters()), "a row changed the base"


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


def test_methods_all_includes_a_new_method(monkeypatch):
    monkeypatch.setattr(bench, "SPECS", ["lora:rank=8"])
    monkeypatch.setattr(compare, "METHODS", {"lora": METHODS["lora"], "new": METHODS["random_mask"]})
    monkeypatch.setitem(METHODS, "new", METHODS["random_mask"])
    rows = list(table_of(call(bench, *SMALL, "--methods", "all", "--targets", "query,up")))
    assert rows[:3] == ["frozen", "full", "lora:rank=8@query,up"] and rows[-1] == "new:off_diagonals=2@query,up"
    assert len(rows) == 3 + len(METHODS["lora"].examples), "every example is a row, lora:rank=8 once"


@pytest.mark.parametrize("argv, parts", [
    ("--rounds 1", ["--rounds", "of at least 2", "'1'"]),
    ("--methods svft:pattern=topk", ["topk", "up", "512x128"]), ("--methods merged", ["no method 'merged'"]),
    ("--targets qwery --methods head", ["'qwery'", "query"])])
def test_bad_flags_are_refused_in_one_line(argv, parts, monkeypatch):
    monkeypatch.setattr(bench, "measure", lambda *a: pytest.fail("the measurement started"))
    error = call(bench, *SMALL, *argv.split(), code=2)
    assert error.startswith("error: ") and all(part in error for part in parts), error
