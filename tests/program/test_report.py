"""Tables of rows made by hand, whose means, deviations and differences a reader can work out; the files; the plot."""

import json
import platform
import sys

import pytest
import torch

from svmini.training import compare, report
from helpers import CPU, Toy

ACCURACY, GAP, DELTA = "accuracy (higher is better)", "gap recovered", "Δ vs lora:rank=8 (paired)"


def row(method, metric, seed=0, **changes):
    """Return a row as compare makes it."""
    return {"method": method, "trainable_params": 1000, "head_params": 0, "trainable_percent": 12.5, "metric": metric,
            "metric_name": "accuracy", "higher_is_better": True, "gap_recovered": None, "seconds": 2.0,
            "ms_per_step": 5.0, "peak_mb": None, "adapter_bytes": 4_000, "seed": seed, "lr": 1e-3, "sample": ["a"],
            **changes}


def cells(lines, method):
    """Return {column: cell} of one line of a table."""
    table = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    return dict(zip(table[0], next(r for r in table if r[0] == method)))


def table_of(rows):
    return report.table_lines(report.summarize(rows), len({r["seed"] for r in rows}) > 1 and report.reference_of(rows))


def filled(rows):
    compare.fill_gap_recovered(rows)
    return rows


THREE_SEEDS = [row(m, x, seed) for seed, metrics in enumerate([(50, 90, 80, 82), (52, 92, 81, 85), (54, 94, 85, 88)])
               for m, x in zip(("head", "full", "lora:rank=8", "svfit"), metrics)]


def test_means_deviations_and_paired_differences_of_seeds():
    table = {t["method"]: t for t in report.summarize(THREE_SEEDS)}
    assert list(table) == ["head", "full", "lora:rank=8", "svfit"]
    assert table["svfit"]["metrics"] == [82, 85, 88]
    assert table["svfit"]["differences"] == [2, 4, 3], "seed by seed"
    lines = table_of(THREE_SEEDS)
    svfit, lora, head = (cells(lines, spec) for spec in ("svfit", "lora:rank=8", "head"))
    assert svfit[ACCURACY] == "85.0 ± 3.0"            # mean of 82 85 88; the deviation divides by n - 1
    assert svfit[DELTA] == "+3.0 ± 1.0"               # mean of 2 4 3
    assert head[DELTA] == "-30.0 ± 1.0" and lora[DELTA] == "-"
    assert svfit["trainable params"] == "1,000" and svfit["ms/step"] == "5.0"
    cost = cells(report.cost_lines(report.summarize(THREE_SEEDS)), "svfit")
    assert [cost[c] for c in ("% of base", "lr", "s", "peak MB", "file")] == ["12.50", "0.001", "2.0", "-", "4 kB"]
    assert len({len(line) for line in lines}) == 1 and len(lines) == 6 and len({line.count("|") for line in lines}) == 1


def test_the_notes_state_the_number_of_seeds_and_the_deviation_over_base_models():
    rows = [r for r in THREE_SEEDS if r["seed"] == 0]
    lines = table_of(rows)
    assert "±" not in "".join(lines) and "paired" not in lines[0]
    first, several = report.notes(rows, "glyphs B")[0], report.notes(THREE_SEEDS, "glyphs B")[0]
    assert first.startswith("one base model and one seed") and "seeds 0, 1, 2 of one base model" in several
    assert all(f"standard deviation of {report.BASE_DEVIATION['glyphs B']}" in note for note in (first, several))
    assert "was not measured on this task" in report.notes(rows, "folder:x")[0]
    rows = [row("zero-shot", 4.0, seed=7, trainable_params=0, adapter_bytes=0, lr=None, ms_per_step=None),
            row("svfit", 3.0, seed=1)]
    assert "one seed" in report.notes(rows, "topics")[0], "the zero-shot row does not count as a seed"
    start = cells(report.cost_lines(report.summarize(rows)), "zero-shot")
    assert (start["lr"], start["file"], start["ms/step"]) == ("-", "-", "-")


def test_an_empty_difference_column_is_explained():
    rows = [r for r in THREE_SEEDS if r["method"] != "lora:rank=8"]
    assert cells(table_of(rows), "svfit")[DELTA] == "-"
    assert any("Δ is empty: it needs the row lora:rank=8" in note for note in report.notes(rows, "x"))
    with_targets = rows + [r | {"method": "lora:rank=8@query"} for r in THREE_SEEDS if r["method"] == "lora:rank=8"]
    assert cells(table_of(with_targets), "svfit")["Δ vs lora:rank=8@query (paired)"] == "+3.0 ± 1.0"
    assert not any("Δ is empty" in note for r in (THREE_SEEDS, with_targets) for note in report.notes(r, "x"))


@pytest.mark.parametrize("higher, metrics", [(True, (50, 90, 80, 50, 100, 40)),
                                             (False, (4.0, 3.0, 3.25, 4.0, 2.75, 4.25))])
def test_gap_recovered(higher, metrics):
    rows = filled([row(m, x, higher_is_better=higher) for m, x in zip(("head", "full", *"abcd"), metrics)])
    assert [r["gap_recovered"] for r in rows] == pytest.approx([0, 1, 0.75, 0, 1.25, -0.25])


def test_gap_recovered_is_paired_by_seed_and_starts_at_zero_shot_without_a_head():
    rows = filled([row(m, x, seed, higher_is_better=False) for m, x, seed in (
        ("zero-shot", 40, 0), ("full", 30, 0), ("full", 20, 1), ("svfit", 35, 0), ("svfit", 35, 1))])
    assert [r["gap_recovered"] for r in rows[1:]] == [1, 1, 0.5, 0.25]
    assert cells(table_of(rows), "svfit")[GAP] == "38 ████······"    # mean of 50 and 25: 37.5
    assert "gap recovered: (metric − zero-shot) / (full − zero-shot)" in " ".join(report.notes(rows, "x"))


def test_an_empty_gap_column_is_explained():
    """Also if the gap between the start and full fine-tuning is too small to divide by."""
    for name, metrics, why in [
            ("accuracy", {"head": 50, "svfit": 60}, "it needs the row full"),
            ("accuracy", {"svfit": 60}, "it needs the row head and the row full"),
            ("loss", {"zero-shot": 60, "svfit": 60}, "it needs the row full"),
            ("accuracy", {"head": 50, "full": 40, "svfit": 60}, "full fine-tuning improves on head by only -10"),
            ("accuracy", {"head": 50, "full": 54, "svfit": 60}, "full fine-tuning improves on head by only 4"),
            ("loss", {"zero-shot": 4.0, "full": 3.97}, "full fine-tuning improves on zero-shot by only 0.03"),
            ("accuracy", {"head": 50, "full": None, "svfit": 60}, "head or full diverged")]:
        rows = filled([row(m, x, metric_name=name, higher_is_better=name != "loss") for m, x in metrics.items()])
        assert cells(table_of(rows), rows[0]["method"])[GAP] == "-"
        assert any(note.startswith(f"gap recovered is empty: {why}") for note in report.notes(rows, "x")), why


def test_a_gap_above_100_or_below_0_is_not_shown_as_if_it_were_exact():
    rows = filled([row(m, x) for m, x in {"head": 50, "full": 90, "svfit": 91, "svft": 49}.items()])
    shown = [cells(table_of(rows), m)[GAP][:5] for m in ("head", "full", "svfit", "svft")]
    assert shown == ["0 ···", "100 █", "> 100", "< 0 ·"]


def test_a_diverged_run_is_counted_and_not_averaged():
    failed = row("svfit", None, adapter_bytes=0, ms_per_step=None, failed="svfit: the loss is nan at step 10")
    rows = [row("lora:rank=8", 80, head_params=3354), failed]
    assert cells(table_of(rows), "svfit")[ACCURACY] == "- (1 of 1 diverged)"
    assert any("svfit, seed 0: svfit: the loss is nan at step 10" in line for line in report.notes(rows, "x"))
    assert any("head: 3,354 more parameters" in line for line in report.notes(rows, "x"))
    assert "the loss is nan" in report.line(failed) and "accuracy 80" in report.line(rows[0])
    later = cells(table_of(rows + [row("lora:rank=8", 81, 1), row("svfit", 70, 1)]), "svfit")
    assert later[ACCURACY] == "70.0 (1 of 2 diverged)" and later[DELTA] == "-11.0" and later["ms/step"] == "5.0"


def test_file_sizes_and_losses_have_their_own_format():
    assert list(map(report.size, (0, 1500, 999000, 3.3e6))) == ["-", "2 kB", "999 kB", "3.3 MB"]
    rows = [row("svfit", 3.14159, metric_name="loss", higher_is_better=False)]
    assert cells(table_of(rows), "svfit")["loss (lower is better)"] == "3.142"


def test_sweep_lines_show_divergence_and_edges():
    found = {"a": {"lr": [0.1, 0.2, 0.4], "val": [1.0, None, 3.0], "best": 0.4},
             "b": {"lr": [0.1, 0.2, 0.4], "val": [1.0, 5.0, 3.0], "best": 0.2},
             "c": {"lr": [0.1], "val": [1.0], "best": 0.1}, "d": {"lr": [0.1], "val": [None], "best": None}}
    a, b, c, d = report.lr_sweep_lines(found)
    assert "0.2: diverged" in a and "-> 0.4 (at the edge" in a
    assert "edge" not in b and "edge" not in c and d.endswith("-> none")


def written(out, capsys):
    rows = [*THREE_SEEDS, row("lora:rank=1", 61), row("zero-shot", 40, trainable_params=0),
            row("svft", None, failed="nan")]
    task = Toy(name="größe →", data_config={"sha256": "ab"})
    report.write(out, rows, task, {"steps": 3}, CPU, {"data": "a", "tokenizer": ["00"]}, {"svfit": {"best": 1}})
    return rows, capsys.readouterr().out


def test_results_json_and_results_md_contain_the_rows_and_the_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "plot", lambda *a: True)
    rows, printed = written(tmp_path, capsys)
    content = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert content["python"] == platform.python_version() and content["torch"] == torch.__version__
    expected = {"task": "größe →", "device": CPU.reason, "dtype": "torch.float32", "sha256": "ab", "steps": 3,
                "train_config": {"steps": 3}, "base": {"data": "a"}, "lr_sweep": {"svfit": {"best": 1}}}
    assert expected.items() <= content.items()
    assert content["rows"] == [{k: v for k, v in r.items() if k != "sample"} for r in rows]
    lines = (tmp_path / "results.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# größe →" and "- steps: 3" in lines and "- svft, seed 0: nan" in lines
    table = [line for line in lines if line.startswith("|")]
    assert cells(table, "svfit")[ACCURACY] == "85.0 ± 3.0"
    assert all(line in printed for line in table_of(rows))
    assert [line for line in table if "% of base" in line], "the second table: learning rates and costs"


def test_the_reports_are_written_before_they_are_printed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "plot", lambda *a: True)
    monkeypatch.setattr("builtins.print", lambda *a, **k: (_ for _ in ()).throw(BrokenPipeError()))
    with pytest.raises(BrokenPipeError):
        written(tmp_path, capsys)
    assert {"results.json", "results.md"} <= {p.name for p in tmp_path.iterdir()}


def test_the_plot_has_a_curve_per_method_and_a_line_for_what_trains_nothing(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes
    curves, levels, curve, level = {}, [], Axes.errorbar, Axes.axhline
    monkeypatch.setattr(Axes, "errorbar", lambda self, x, y, **k: (
        curves.update({k["label"]: (x, y, k["yerr"], k["color"])}), curve(self, x, y, **k))[1])
    monkeypatch.setattr(Axes, "axhline", lambda self, y, **k: (levels.append(y), level(self, y, **k))[1])
    before = "matplotlib.pyplot" in sys.modules
    _, printed = written(tmp_path, capsys)
    assert "results.png" in printed and (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    assert curves["lora"][:3] == ((1000, 1000), (61, 82), (0, pytest.approx(2.6457513))) and levels == [40]
    assert curves["svfit"][:3] == ((1000,), (85,), (3.0,)) and "svft" not in curves
    assert len({color for *_, color in curves.values()}) == len(curves)
    assert ("matplotlib.pyplot" in sys.modules) == before, "the settings of a notebook stay"
    assert report.plot(tmp_path / "b.png", report.summarize([row("head", 40, trainable_params=0)]))
    names = {"svft:pattern=topk@query": "svft pattern topk", "svft:off_diagonals=8": "svft",
             "svft:pattern=random,off_diagonals=8": "svft pattern random", "lora:init=pissa": "lora init pissa"}
    assert list(map(report.family, names)) == list(names.values())


def test_without_matplotlib_one_line_says_how_to_install_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)   # makes the import fail
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    _, printed = written(tmp_path, capsys)
    assert printed.splitlines()[-1] == "for a plot of the table: pip install matplotlib"
    assert "results.png" not in printed and sorted(p.name for p in tmp_path.iterdir()) == ["results.json", "results.md"]
