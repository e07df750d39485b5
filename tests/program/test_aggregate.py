"""python -m svmini.aggregate: seeds are averaged first, then the files are compared."""

import json
import statistics

import pytest

from svmini import aggregate
from svmini.errors import InputError


def write(path, metrics):
    """A results.json with {(method, seed): metric}."""
    rows = [{"method": method, "seed": seed, "metric": metric, "metric_name": "accuracy", "higher_is_better": True,
             "trainable_params": {"head": 0, "full": 900}.get(method, 10), "head_params": 5, "trainable_percent": 1.0, "gap_recovered": None,
             "seconds": 1.0, "ms_per_step": 1.0, "peak_mb": None, "adapter_bytes": 1, "lr": 0.1}
            for (method, seed), metric in metrics.items()]
    path.write_text(json.dumps({"rows": rows}))
    return str(path)


def cells(text):
    return {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
            for line in text.splitlines() if line.startswith("|")}


def test_mean_spread_and_differences_are_over_files(tmp_path, capsys):
    first = {("head", 0): 10.0, ("head", 1): 30.0, ("full", 0): 60.0, ("full", 1): 60.0,
             ("lora:rank=8", 0): 40.0, ("lora:rank=8", 1): 44.0, ("svfit", 0): 50.0, ("svfit", 1): 30.0}
    second = {key: metric + (5 if key[0] == "svfit" else 10) for key, metric in first.items()}
    files = [write(tmp_path / name, metrics) for name, metrics in (("a.json", first), ("b.json", second))]
    aggregate.command(files)
    table = cells(capsys.readouterr().out)
    assert table["svfit"][1] == f"42.5 ± {statistics.stdev([40, 45]):.1f}"     # of the means over the seeds
    assert table["svfit"][2] == f"-4.5 ± {statistics.stdev([-2, -7]):.1f}"     # 40 - 42 and 45 - 52
    assert table["svfit"][3] == f"{100 * ((40 - 20) / 40 + (45 - 30) / 40) / 2:.0f}"
    assert table["lora:rank=8"][2] == "-" and table["head"][3] == "0" and table["full"][3] == "100"


def test_a_row_that_diverged_is_left_out_and_a_picture_is_drawn(tmp_path, capsys):
    file = write(tmp_path / "a.json", {("full", 0): 60.0, ("full", 1): None, ("svfit", 0): 40.0})
    aggregate.command([file, "--baseline", "full", "--plot", str(tmp_path / "a.png")])
    out = capsys.readouterr().out
    assert cells(out)["full"][1] == "60.0" and cells(out)["svfit"][2] == "-20.0"
    assert (tmp_path / "a.png").is_file() or "pip install matplotlib" in out


def test_what_is_missing_is_said(tmp_path):
    file = write(tmp_path / "a.json", {("full", 0): 60.0})
    with pytest.raises(InputError, match="no file has such a row"):
        aggregate.command([file])
    with pytest.raises(InputError, match="there is no file"):
        aggregate.command([str(tmp_path / "b.json")])
    with pytest.raises(InputError, match="named twice"):
        aggregate.command([str(tmp_path / "a.json"), str(tmp_path / "a.json")])
