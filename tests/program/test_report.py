"""Tables on rows made by hand, whose means, spreads and differences a reader can work out; the files; the picture."""

import json
import platform
import sys

import pytest
import torch

from svmini.training import compare, report

ACCURACY, SHARE = "accuracy (higher is better)", "gap recovered"


def row(method, metric, seed=0, **more):
    """A row as compare makes it, with numbers that are easy to recognise."""
    return {"method": method, "trainable_params": 1000, "head_params": 0, "trainable_percent": 12.5, "metric": metric, "metric_name": "accuracy",
            "higher_is_better": True, "gap_recovered": None, "seconds": 2.0, "ms_per_step": 5.0, "peak_mb": None,
            "adapter_bytes": 4_000, "seed": seed, "lr": 1e-3, "sample": ["of it"], **more}


def cells(lines, method):
    """{column: cell} of one line of the table."""
    table = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    return dict(zip(table[0], next(r for r in table if r[0] == method)))


THREE_SEEDS = [row(m, x, seed) for seed, metrics in enumerate([(50, 90, 80, 82), (52, 92, 81, 85), (54, 94, 85, 88)])
               for m, x in zip(("head", "full", "lora:rank=8", "svfit"), metrics)]


def test_means_spreads_and_paired_differences():
    table = {t["method"]: t for t in report.summarise(THREE_SEEDS)}
    assert list(table) == ["head", "full", "lora:rank=8", "svfit"]
    assert table["svfit"]["metrics"] == [82, 85, 88]
    assert table["svfit"]["differences"] == [2, 4, 3], "seed by seed, not difference of sorted values"
    lines = report.table_lines(THREE_SEEDS)
    svfit, lora, head = (cells(lines, spec) for spec in ("svfit", "lora:rank=8", "head"))
    assert svfit[ACCURACY] == "85.0 ± 3.0"                                  # mean of 82 85 88, n - 1 below
    assert svfit["Δ vs lora:rank=8 (paired)"] == "+3.0 ± 1.0"               # mean of 2 4 3
    assert head["Δ vs lora:rank=8 (paired)"] == "-30.0 ± 1.0" and lora["Δ vs lora:rank=8 (paired)"] == "-"
    assert svfit["trainable params"] == "1,000" and svfit["ms/step"] == "5.0"
    cost = cells(report.cost_lines(THREE_SEEDS), "svfit")
    assert [cost[c] for c in ("% of base", "lr", "s", "peak MB", "file")] == ["12.50", "0.001", "2.0", "-", "4 kB"]
    assert len({len(line) for line in lines}) == 1 and len(lines) == 6 and len({line.count("|") for line in lines}) == 1


def test_one_seed_has_no_spread_and_says_so():
    rows = [r for r in THREE_SEEDS if r["seed"] == 0]
    lines = report.table_lines(rows)
    assert "±" not in "".join(lines) and "paired" not in lines[0]
    assert report.notes(rows)[0].startswith("one seed: differences under three points")
    assert "seeds 0, 1, 2" in report.notes(THREE_SEEDS)[0] and "one seed" not in " ".join(report.notes(THREE_SEEDS))
    rows = [row("zero-shot", 4.0, seed=7, trainable_params=0, adapter_bytes=0, lr=None, ms_per_step=None), row("svfit", 3.0, seed=1)]
    assert report.notes(rows)[0].startswith("one seed"), "a start row does not count as a seed"
    start = cells(report.cost_lines(rows), "zero-shot")
    assert (start["lr"], start["file"], start["ms/step"]) == ("-", "-", "-")


@pytest.mark.parametrize("higher, metrics, shares", [
    (True, {"head": 50, "full": 90, "a": 80, "b": 50, "c": 100, "d": 40}, {"a": 0.75, "b": 0, "c": 1.25, "d": -0.25}),
    (False, {"head": 4.0, "full": 3.0, "a": 3.25, "b": 4.0, "c": 2.75, "d": 4.25},
     {"a": 0.75, "b": 0, "c": 1.25, "d": -0.25})])
def test_recovered(higher, metrics, shares):
    rows = [row(m, x, higher_is_better=higher) for m, x in metrics.items()]
    compare.fill_gap_recovered(rows)
    assert {r["method"]: r["gap_recovered"] for r in rows} == pytest.approx({"head": 0, "full": 1, **shares})


def test_recovered_is_by_seed_and_from_the_start_row_where_there_is_no_head():
    rows = [row(m, x, seed, higher_is_better=False) for m, x, seed in (
        ("zero-shot", 4.0, 0), ("full", 3.0, 0), ("full", 2.0, 1), ("svfit", 3.5, 0), ("svfit", 3.5, 1))]
    compare.fill_gap_recovered(rows)
    assert [r["gap_recovered"] for r in rows[1:]] == [1, 1, 0.5, 0.25]
    assert cells(report.table_lines(rows), "svfit")[SHARE] == "38 ████······"    # mean of 50 and 25: 37.5


@pytest.mark.parametrize("metrics", [{"head": 50, "svfit": 60}, {"full": 90, "svfit": 60}, {"head": 50, "full": 50},
                                     {"head": 50, "full": 40, "svfit": 60}, {"head": 50, "full": None, "svfit": 60}])
def test_recovered_means_nothing_where_full_gained_nothing(metrics):
    rows = [row(m, x) for m, x in metrics.items()]
    compare.fill_gap_recovered(rows)
    assert all(r["gap_recovered"] is None for r in rows)
    assert cells(report.table_lines(rows), rows[0]["method"])[SHARE] == "-"


def test_a_diverged_run_is_no_number():
    failed = row("svfit", None, adapter_bytes=0, ms_per_step=None, failed="svfit: the loss is nan at step 10")
    rows = [row("lora:rank=8", 80, head_params=3354), failed]
    assert cells(report.table_lines(rows), "svfit")[ACCURACY] == "diverged"
    assert any("svfit, seed 0: svfit: the loss is nan at step 10" in line for line in report.notes(rows))
    assert any("3,354 numbers more" in line for line in report.notes(rows))
    assert "the loss is nan" in report.line(failed) and "accuracy 80" in report.line(rows[0])
    later = cells(report.table_lines(rows + [row("lora:rank=8", 81, 1), row("svfit", 70, 1)]), "svfit")
    assert later[ACCURACY] == "70.0" and later["Δ vs lora:rank=8 (paired)"] == "-11.0" and later["ms/step"] == "5.0"


@pytest.mark.parametrize("got, expected", [
    *((report.size(n), text) for n, text in ((0, "-"), (1500, "2 kB"), (999000, "999 kB"), (3.3e6, "3.3 MB"))),
    *((report.bar(share), "█" * n + "·" * (10 - n)) for share, n in ((-1, 0), (0, 0), (0.5, 5), (3, 10)))])
def test_sizes_and_bars(got, expected):
    assert got == expected


def test_loss_has_three_digits():
    rows = [row("svfit", 3.14159, metric_name="loss", higher_is_better=False)]
    assert cells(report.table_lines(rows), "svfit")["loss (lower is better)"] == "3.142"
    assert report.notes(rows)[0].startswith("one seed: small differences")


def test_tuning_lines():
    found = {"a": {"lr": [0.1, 0.2, 0.4], "val": [1.0, None, 3.0], "best": 0.4},
             "b": {"lr": [0.1, 0.2, 0.4], "val": [1.0, 5.0, 3.0], "best": 0.2},
             "c": {"lr": [0.1], "val": [1.0], "best": 0.1}, "d": {"lr": [0.1], "val": [None], "best": None}}
    a, b, c, d = report.lr_sweep_lines(found)
    assert "0.2: diverged" in a and "-> 0.4 (at the edge" in a
    assert "edge" not in b and "edge" not in c and d.endswith("-> none")


def written(out, capsys):
    rows = [*THREE_SEEDS, row("lora:rank=1", 61), row("zero-shot", 40, trainable_params=0), row("svft", None, failed="nan")]
    report.write(out, rows, {"task": "größe →", "device": "cpu", "sha256": "ab", "steps": 3}, {"svfit": {"best": 1}})
    return rows, capsys.readouterr().out


def test_the_files(tmp_path, capsys):
    rows, said = written(tmp_path, capsys)
    content = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert content["python"] == platform.python_version() and content["torch"] == torch.__version__
    assert (content["device"], content["sha256"], content["lr_sweep"]) == ("cpu", "ab", {"svfit": {"best": 1}})
    assert content["rows"] == [{k: v for k, v in r.items() if k != "sample"} for r in rows]
    lines = (tmp_path / "results.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# größe →" and "- steps: 3" in lines and "- svft, seed 0: nan" in lines
    first = [line for line in lines if line.startswith("|")]
    assert cells(first, "svfit")[ACCURACY] == "85.0 ± 3.0" and all(line in said for line in report.table_lines(rows))
    assert [line for line in first if "% of base" in line], "and a second table, of rates and costs"


def test_the_picture(tmp_path, capsys, monkeypatch):
    """One curve a method, its points joined in the order of their numbers; what trains nothing is a line."""
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes
    curves, levels, curve, level = {}, [], Axes.errorbar, Axes.axhline
    monkeypatch.setattr(Axes, "errorbar", lambda self, x, y, **k: (
        curves.update({k["label"]: (x, y, k["yerr"], k["color"])}), curve(self, x, y, **k))[1])
    monkeypatch.setattr(Axes, "axhline", lambda self, y, **k: (levels.append(y), level(self, y, **k))[1])
    before = "matplotlib.pyplot" in sys.modules
    _, said = written(tmp_path, capsys)
    assert "results.png" in said and (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    assert curves["lora"][:3] == ((1000, 1000), (61, 82), (0, pytest.approx(2.6457513))) and levels == [40]
    assert curves["svfit"][:3] == ((1000,), (85,), (3.0,)) and "svft" not in curves
    assert len({colour for *_, colour in curves.values()}) == len(curves)
    assert ("matplotlib.pyplot" in sys.modules) == before, "a notebook's train_config stay"
    assert report.plot(tmp_path / "b.png", [row("head", 40, trainable_params=0)]) and (tmp_path / "b.png").is_file()
    names = {"svft:pattern=topk@query": "svft pattern topk", "svft:off_diagonals=8": "svft",
             "svft:pattern=random,off_diagonals=8": "svft pattern random", "lora:init=pissa": "lora init pissa"}
    assert list(map(report.family, names)) == list(names.values())


def test_without_matplotlib_one_line_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)   # makes the import fail
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    _, said = written(tmp_path, capsys)
    assert said.splitlines()[-1] == "for a picture of the table: pip install matplotlib"
    assert "results.png" not in said and sorted(p.name for p in tmp_path.iterdir()) == ["results.json", "results.md"]
