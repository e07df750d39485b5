"""Tables on rows made by hand, whose means, spreads and differences a reader can work out."""

import builtins
import json
import platform
import sys

import pytest
import torch

from svmini import compare, report


def row(method, metric, seed=0, **more):
    """A row as compare makes it, with numbers that are easy to recognise."""
    return {"method": method, "adapter": 1000, "head": 0, "percent": 12.5, "metric": metric, "metric_name": "accuracy",
            "higher_is_better": True, "recovered": None, "seconds": 2.0, "ms_per_step": 5.0, "peak_mb": None,
            "adapter_bytes": 4_000, "seed": seed, "lr": 1e-3, "learned": None, "sample": ["of it"], **more}


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
    assert table["lora:rank=8"]["differences"] == []
    svfit = cells(report.table_lines(THREE_SEEDS), "svfit")
    assert svfit["accuracy (higher is better)"] == "85.0 ± 3.0"             # mean of 82 85 88, n - 1 below
    assert svfit["minus lora:rank=8, paired"] == "+3.0 ± 1.0"               # mean of 2 4 3
    assert cells(report.table_lines(THREE_SEEDS), "head")["minus lora:rank=8, paired"] == "-30.0 ± 1.0"
    assert cells(report.table_lines(THREE_SEEDS), "lora:rank=8")["minus lora:rank=8, paired"] == "-"
    assert svfit["adapter params"] == "1,000" and svfit["% of base"] == "12.50" and svfit["lr"] == "0.001"
    assert svfit["ms/step"] == "5.0" and svfit["s"] == "2.0" and svfit["file"] == "4 kB"


def test_every_column_is_as_wide_as_its_widest_cell():
    lines = report.table_lines(THREE_SEEDS)
    assert len({len(line) for line in lines}) == 1 and len(lines) == 6
    assert len({line.count("|") for line in lines}) == 1


def test_one_seed_has_no_spread_and_says_so():
    rows = [r for r in THREE_SEEDS if r["seed"] == 0]
    lines = report.table_lines(rows)
    assert "±" not in "".join(lines) and "paired" not in lines[0]
    assert report.notes(rows)[0].startswith("one seed")
    assert "seeds 0, 1, 2" in report.notes(THREE_SEEDS)[0] and "one seed" not in " ".join(report.notes(THREE_SEEDS))
    assert "the draw where real pictures are drawn by class" in report.notes(THREE_SEEDS)[0]


def test_a_start_row_does_not_count_as_a_seed():
    rows = [row("start", 4.0, seed=7, adapter=0, adapter_bytes=0, lr=None, ms_per_step=None), row("svfit", 3.0, seed=1)]
    assert report.notes(rows)[0].startswith("one seed")
    start = cells(report.table_lines(rows), "start")
    assert (start["lr"], start["file"], start["ms/step"], start["adapter params"]) == ("-", "-", "-", "0")


@pytest.mark.parametrize("higher, metrics, shares", [
    (True, {"head": 50, "full": 90, "a": 80, "b": 50, "c": 100, "d": 40}, {"a": 0.75, "b": 0, "c": 1.25, "d": -0.25}),
    (False, {"head": 4.0, "full": 3.0, "a": 3.25, "b": 4.0, "c": 2.75, "d": 4.25},
     {"a": 0.75, "b": 0, "c": 1.25, "d": -0.25}),
])
def test_recovered(higher, metrics, shares):
    rows = [row(m, x, higher_is_better=higher) for m, x in metrics.items()]
    compare.recover(rows)
    got = {r["method"]: r["recovered"] for r in rows}
    assert got == pytest.approx({"head": 0, "full": 1, **shares})


def test_recovered_is_by_seed_and_from_the_start_row_where_there_is_no_head():
    rows = [row("start", 4.0, higher_is_better=False)]
    rows += [row("full", 3.0, 0, higher_is_better=False), row("full", 2.0, 1, higher_is_better=False)]
    rows += [row("svfit", 3.5, 0, higher_is_better=False), row("svfit", 3.5, 1, higher_is_better=False)]
    compare.recover(rows)
    assert [r["recovered"] for r in rows[1:]] == [1, 1, 0.5, 0.25]
    assert "38 " in cells(report.table_lines(rows), "svfit")["share of full's gain"]    # mean of 50 and 25: 37.5


@pytest.mark.parametrize("metrics", [{"head": 50, "svfit": 60}, {"full": 90, "svfit": 60}, {"head": 50, "full": 50},
                                     {"head": 50, "full": 40, "svfit": 60}, {"head": 50, "full": None, "svfit": 60}])
def test_recovered_means_nothing_where_full_gained_nothing(metrics):
    rows = [row(m, x) for m, x in metrics.items()]
    compare.recover(rows)
    assert all(r["recovered"] is None for r in rows)
    assert cells(report.table_lines(rows), rows[0]["method"])["share of full's gain"] == "-"


def test_a_diverged_run_is_no_number():
    failed = row("svfit", None, adapter=0, adapter_bytes=0, failed="svfit: the loss is nan at step 10")
    rows = [row("lora:rank=8", 80), failed]
    assert cells(report.table_lines(rows), "svfit")["accuracy (higher is better)"] == "diverged"
    assert any("svfit, seed 0: svfit: the loss is nan at step 10" in line for line in report.notes(rows))
    later = [row("lora:rank=8", 81, 1), row("svfit", 70, 1)]
    svfit = cells(report.table_lines(rows + later), "svfit")
    assert svfit["accuracy (higher is better)"] == "70.0" and svfit["adapter params"] == "1,000"


def test_notes_tell_heads_and_what_was_learned():
    learned = {"query": {"before": 1.5, "after": 1.75, "max_M": 0.25}}
    rows = [row("head", 50, head=3354), row("svfit", 60, head=3354, learned=learned),
            row("svfit", 61, 1, head=3354, learned={"query": {"before": 9, "after": 9, "max_M": 9}})]
    notes = "\n".join(report.notes(rows))
    assert "3,354 parameters" in notes and "query 1.50→1.75 (0.25)" in notes and "9.00" not in notes


@pytest.mark.parametrize("n_bytes, text", [(0, "-"), (None, "-"), (1_500, "2 kB"), (999_000, "999 kB"), (3_300_000, "3.3 MB")])
def test_file_sizes(n_bytes, text):
    assert report.size(n_bytes) == text


@pytest.mark.parametrize("share, filled", [(-1, 0), (0, 0), (0.5, 5), (1, 10), (3, 10)])
def test_bars_stay_in_their_width(share, filled):
    assert report.bar(share) == "█" * filled + "·" * (10 - filled)


def test_loss_has_three_digits():
    rows = [row("svfit", 3.14159, metric_name="loss", higher_is_better=False)]
    assert cells(report.table_lines(rows), "svfit")["loss (lower is better)"] == "3.142"


def test_tuning_lines():
    found = {"a": {"lr": [0.1, 0.2, 0.4], "val": [1.0, None, 3.0], "best": 0.4},
             "b": {"lr": [0.1, 0.2, 0.4], "val": [1.0, 5.0, 3.0], "best": 0.2},
             "c": {"lr": [0.1], "val": [1.0], "best": 0.1}, "d": {"lr": [0.1], "val": [None], "best": None}}
    a, b, c, d = report.show_tuning(found)
    assert "0.2: diverged" in a and "-> 0.4 (at the edge" in a
    assert "edge" not in b and "edge" not in c and d.endswith("-> none")


def test_the_files(tmp_path):
    learned = {"query": {"before": 1, "after": 2, "max_M": 1}}
    rows = [row("svfit", 60, learned=learned), row("lora:rank=8@query,value", 61)]
    report.write_results(tmp_path, rows, {"task": "größe →", "device": "cpu", "steps": 3})
    content = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert content["python"] == platform.python_version() and content["torch"] == torch.__version__
    assert content["rows"] == [{k: v for k, v in r.items() if k != "sample"} for r in rows]
    lines = (tmp_path / "results.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# größe →" and "- steps: 3" in lines
    assert cells([line for line in lines if line.startswith("|")], "svfit")["accuracy (higher is better)"] == "60.0"


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    report.plot(tmp_path / "results.png", THREE_SEEDS + [row("diverges", None)])
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib_says_so_before_the_work(tmp_path, monkeypatch, capsys):
    import train_vit
    real = builtins.__import__

    def missing(name, *arguments, **options):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.delitem(sys.modules, "matplotlib", raising=False)
    monkeypatch.setattr(builtins, "__import__", missing)
    assert train_vit.main(["--quick", "--plot", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--plot needs matplotlib" in error and "pip install" in error
    assert not (tmp_path / "out").exists()
