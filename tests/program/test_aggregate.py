"""python -m svmini.aggregate: seeds are averaged first, then files are compared; others are refused."""

import json
import statistics

import pytest

from helpers import call
from svmini import aggregate

DELTA = "Δ vs lora:rank=8 (paired)"


def write(path, metrics, row=(), **content):
    """Write a results.json with {(method, seed): metric}; returns its path. row: changes of every row."""
    rows = [{"method": method, "seed": seed, "metric": metric, "metric_name": "accuracy", "higher_is_better": True,
             "trainable_params": {"head": 0, "full": 900}.get(method, 10), "head_params": 5, "trainable_percent": 1.0,
             "gap_recovered": None, "seconds": 1.0, "ms_per_step": 1.0, "peak_mb": None, "adapter_bytes": 1, "lr": 0.1,
             **dict(row)} for (method, seed), metric in metrics.items()]
    path.write_text(json.dumps({"task": "glyphs B", "steps": 200, "sha256": path.stem, **content, "rows": rows}))
    return str(path)


def table(*argv):
    """Return {method: {column: cell}} and the lines below, as the command prints them."""
    out = call(aggregate, *argv).splitlines()
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out if line.startswith("|")]
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}, [s for s in out if not s.startswith("|")]


def refused(*argv):
    return call(aggregate, *argv, code=2)


FIRST = {("head", 0): 10.0, ("head", 1): 30.0, ("full", 0): 60.0, ("full", 1): 60.0,
         ("lora:rank=8", 0): 40.0, ("lora:rank=8", 1): 44.0, ("svfit", 0): 50.0, ("svfit", 1): 30.0}
SECOND = {key: metric + (5 if key[0] == "svfit" else 10) for key, metric in FIRST.items()}


@pytest.fixture
def files(tmp_path):
    return [write(tmp_path / name, metrics) for name, metrics in (("a.json", FIRST), ("b.json", SECOND))]


def test_mean_deviation_and_paired_differences_are_over_files(files):
    found, notes = table(*files)
    svfit = found["svfit"]
    assert svfit["accuracy (higher is better)"] == f"42.5 ± {statistics.stdev([40, 45]):.1f}"   # means over the seeds
    assert svfit[DELTA] == f"-4.5 ± {statistics.stdev([-2, -7]):.1f}"                           # 40 - 42 and 45 - 52
    assert svfit["gap recovered"].split()[0] == f"{100 * ((40 - 20) / 40 + (45 - 30) / 40) / 2:.0f}"
    assert found["lora:rank=8"][DELTA] == "-" and found["head"]["gap recovered"].startswith("0 ")
    assert found["full"]["gap recovered"].startswith("100 ")
    assert notes == ["mean ± standard deviation over 2 files; differences and gaps are paired by file and seed"]


def test_differences_are_over_common_seeds_and_diverged_runs_are_counted(tmp_path):
    """Equal on every common seed, svfit differs from LoRA by 0, although their means differ by 30."""
    metrics = {(m, s): 20.0 + 60 * s for m in ("lora:rank=8", "svfit") for s in (0, 1)} | {("svfit", 1): None}
    found, _ = table(write(tmp_path / "a.json", metrics))
    assert found["svfit"]["accuracy (higher is better)"] == "20.0 (1 of 2 diverged)"
    assert found["svfit"][DELTA] == "+0.0" and "diverged" not in found["lora:rank=8"]["accuracy (higher is better)"]
    found, _ = table(write(tmp_path / "b.json", metrics | {("svfit", 0): None}))
    assert found["svfit"]["accuracy (higher is better)"] == "- (2 of 2 diverged)" and found["svfit"][DELTA] == "-"


def test_every_file_has_its_own_start(tmp_path):
    """A method that gains half of what full fine-tuning gains has recovered 50 % in every file."""
    files = [write(tmp_path / f"{start}.json", {
        ("zero-shot", 0): start, ("full", 0): start - 1.0, ("full", 1): start - 3.0, ("svfit", 0): start - 0.5,
        ("svfit", 1): start - 1.5}, {"metric_name": "loss", "higher_is_better": False}) for start in (5.0, 9.0)]
    found, _ = table(*files, "--baseline", "full")
    assert found["svfit"]["gap recovered"].startswith("50 ") and found["zero-shot"]["gap recovered"].startswith("0 ")
    assert found["zero-shot"]["Δ vs full (paired)"] == "+2.000 ± 0.000", "the zero-shot row counts for every seed"
    assert found["svfit"]["loss (lower is better)"] == f"6.000 ± {statistics.stdev([4, 8]):.3f}"


def test_a_gap_that_is_not_defined_is_left_out_with_the_reason(tmp_path, files):
    metrics = SECOND | {("full", 0): 34.0, ("full", 1): 34.0, ("head", 0): 33.0, ("head", 1): 33.0}
    small = write(tmp_path / "c.json", metrics)
    found, notes = table(*files, small)
    assert found["svfit"]["gap recovered"].split()[0] == "44", "of the first two files"
    assert notes[1] == f"gap recovered leaves out {small}: full fine-tuning improves on head by only 1, which is too " \
                       "little to divide by"
    found, notes = table(write(tmp_path / "d.json", {("svfit", 0): 1.0}), "--baseline", "svfit")
    assert found["svfit"]["gap recovered"] == "-" and "it needs the row head and the row full" in notes[1]


def test_a_method_that_some_files_lack_shows_its_number_of_files(tmp_path, files):
    more = write(tmp_path / "c.json", SECOND | {("svft", 0): 3.0, ("svft", 1): 5.0, ("svfit", 0): 1.0}, {"lr": 0.2})
    found, notes = table(*files, more)
    assert found["svft"]["accuracy (higher is better)"] == "4.0" and found["svft"][DELTA] == "-48.0"
    assert notes[1] == "in fewer files: svft (1)"
    assert notes[-1] == "learning rates differ between the files: head, full, lora:rank=8, svfit"


def test_files_with_different_settings_are_refused_by_the_difference(tmp_path, files):
    for row, content, difference in [
            ({"metric_name": "loss"}, {}, "metric_name was 'accuracy' and is 'loss'"),
            ({"higher_is_better": False}, {}, "higher_is_better was True and is False"),
            ({"trainable_params": 3}, {}, "trainable_params.full was 900 and is 3"),
            ({}, {"task": "topics"}, "task was 'glyphs B' and is 'topics'"),
            ({}, {"per_class": 9}, "per_class was None and is 9"),
            ({}, {"train_config": {"batch_size": 8}}, "train_config was None and is {'batch_size': 8}"),
            ({}, {"base": {"run_config": {"steps": 3, "seed": 1}}}, "base.steps was None and is 3")]:
        other = write(tmp_path / "c.json", {("full", 0): 60.0, ("svfit", 0): 5.0}, row, **content)
        assert f"c.json differs from {files[0]}: {difference}" in refused(*files, other)


def test_other_seeds_bases_data_draws_and_machines_may_differ(tmp_path):
    files = [write(tmp_path / f"{s}.json", {("full", s): 60.0, ("svfit", s): 5.0}, device=str(s), torch=s,
                   base={"metric": s, "run_config": {"steps": 9, "seed": s, "sha256": str(s), "dtype": str(s)}})
             for s in (0, 1)]
    assert table(*files, "--baseline", "full")[0]["svfit"]["accuracy (higher is better)"] == "5.0 ± 0.0"


def test_copies_are_refused(tmp_path, files):
    assert "given twice" in refused(files[0], f"{tmp_path}/./a.json")
    same = write(tmp_path / "c.json", FIRST, {"seconds": 2.0})
    part = write(tmp_path / "d.json", {key: FIRST[key] for key in list(FIRST)[:4]} | {("svfit", 0): None})
    for copy in (same, part):
        assert f"{files[0]} and {copy} contain the same runs" in refused(*files, copy)


def test_a_file_that_is_not_a_results_json_is_refused_by_name(tmp_path, files):
    for content in (b"", b"{", b"[]", b"3", b"{}", b'{"rows": []}', b'{"rows": 3}', b'{"rows": [3]}',
                    b'{"rows": [{"method": "svfit"}]}', b'{"run_config": {}, "row": {}}', 3000 * b"[", b"\xff\xfe"):
        (tmp_path / "x.json").write_bytes(content)
        assert "x.json is not a results.json of svmini" in refused(*files, tmp_path / "x.json"), content[:40]


def test_missing_files_and_baselines_are_refused(tmp_path, files):
    assert "there is no file" in refused(tmp_path / "none.json")
    error = refused(*files, "--baseline", "lora")
    assert "--baseline lora: no file has this row; choose from head, full, lora:rank=8, svfit" in error
    assert str(tmp_path) in refused(tmp_path), "a folder"


def test_a_plot_of_the_table_is_drawn(tmp_path, files, monkeypatch):
    drawn = []
    monkeypatch.setattr(aggregate.report, "plot", lambda path, table: drawn.append((path, len(table))))
    table(*files, "--plot", tmp_path / "a.png")
    assert [(str(path), n) for path, n in drawn] == [(str(tmp_path / "a.png"), 4)]
