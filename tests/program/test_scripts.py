"""Both scripts from the command line to their files, with few steps and little data."""

import json
import math
import platform
import re
import runpy
import shutil
import statistics
import sys
from pathlib import Path

import pytest
import torch

import train_gpt
import train_vit
from helpers import assert_same_folder, call, little, log_of, read, rows   # noqa: F401  little is a fixture
from svmini import GPT, ViT, load_adapter
from svmini.methods.lora import LoRA
from svmini.model_file import load_model
from svmini.training import compare, pretrain, report

ROOT = Path(__file__).resolve().parents[2]
ROW = {"method", "trainable_params", "head_params", "trainable_percent", "metric", "metric_name", "higher_is_better",
       "gap_recovered", "seconds", "ms_per_step", "peak_mb", "adapter_bytes", "seed", "lr"}
# name: script, its flags, the row that the gap starts from, metric, whether higher is better
STORIES = {
    "glyphs": (train_vit, [], "head", "accuracy", True),
    "topics": (train_gpt, [], "zero-shot", "loss", False),
    "arithmetic": (train_gpt, ["--data", "arithmetic"], "zero-shot", "exact match", True),
    "pairs": (train_gpt, ["--data", "qa:PAIRS"], "zero-shot", "exact match", True),
}


@pytest.fixture(scope="module", autouse=True)
def no_plots():
    """test_report.py and test_analyze.py test these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "plot", lambda *a: None)
        yield


@pytest.fixture(scope="module", params=STORIES)
def story(request, tmp_path_factory, little):
    """(name, command, folder, output) of one --quick run each."""
    script, flags, *_ = STORIES[request.param]
    out = tmp_path_factory.mktemp("an out folder ü") / request.param
    argv = [script, "--quick", *(f.replace("PAIRS", str(little / "pairs.jsonl")) for f in flags), "--eval-every", 2]
    return request.param, argv, out, call(*argv, "--out", out)


def test_results_json_has_every_row_with_exact_counts(story):
    name, (script, *_), out, _ = story
    *_, reference, metric, higher = STORIES[name]
    content = read(out)
    assert content["python"] == platform.python_version() and content["torch"] == torch.__version__
    assert content["device"] == "cpu (1 thread, set by --device), float32"
    assert content["steps"] == content["train_config"]["steps"] == 4 and content["lr_sweep"] is None
    assert re.fullmatch("made by the program" if name == "arithmetic" else "[0-9a-f]{64}", content["sha256"])
    found = {row["method"]: row for row in content["rows"]}
    assert list(found) == (["zero-shot"] if reference == "zero-shot" else []) + script.QUICK
    model, _ = load_model(out / "pretrain" / "model.pt", ViT if name == "glyphs" else GPT)
    size = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("head."))
    for spec, row in found.items():
        assert set(row) == ROW and math.isfinite(row["metric"]) and row["peak_mb"] is None
        assert (row["metric_name"], row["higher_is_better"], row["seed"]) == (metric, higher, 0)
        assert row["trainable_percent"] == pytest.approx(100 * row["trainable_params"] / size)
        assert row["head_params"] == (26 * 17 if name == "glyphs" else 0)
        assert (row["adapter_bytes"] > 0) == (row["seconds"] > 0) == (spec != "zero-shot")
    assert found["full"]["trainable_percent"] == 100 and found[reference]["trainable_percent"] == 0
    assert found["lora:rank=8"]["trainable_params"] == 4 * 8 * 2 * 16 + 2 * 8 * 5 * 16
    assert found["svft:off_diagonals=8"]["trainable_params"] == 6 * (16 * 17 - 8 * 9)
    start, full = found[reference]["metric"], found["full"]["metric"]
    gap = (lambda x: (x - start) / (full - start)) if full != start and (full > start) == higher else lambda x: None
    assert all(found[spec]["gap_recovered"] == gap(found[spec]["metric"]) for spec in script.QUICK)


def test_a_run_writes_its_files_and_prints_what_a_reader_needs(story):
    name, (script, *_), out, printed = story
    names = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    expected = {"results.json", "results.md", "pretrain/model.pt", "pretrain/metrics.jsonl"}
    for spec in script.QUICK:
        folder = "runs/" + spec.replace(":", "_") + "-seed0"
        made = "model.pt" if spec == "full" else "adapter.pt"
        expected |= {f"{folder}/{n}" for n in ("metrics.jsonl", "row.json", made)}
        assert [(line["step"], line["split"]) for line in log_of(out / folder)] == [(2, "val"), (4, "val")]
        assert spec in printed and spec in (out / "results.md").read_text(encoding="utf-8")
    assert "device: cpu (1 thread, set by --device), float32\n" in printed
    assert "adapted layers: query, key, value, out, up, down (" in printed
    assert "Smoke test only: the base model is undertrained, so the ranking means nothing." in printed
    assert names == expected | ({"predictions.png"} if name == "glyphs" else set())
    if name != "glyphs":
        assert "\n--- before ---\n" in printed and "\n--- after, " in printed
    if name == "arithmetic":
        assert re.search(r"\d{3}-\d{3}=\d+  model: ", printed)
    if name == "pairs":
        assert printed.count("\nModel:") == 4 and "16 pairs in train" in printed


@pytest.mark.parametrize("story", ["glyphs", "topics"], indirect=True)
def test_the_same_seed_gives_the_same_numbers_and_the_base_is_reused(story, tmp_path, monkeypatch):
    name, argv, out, first = story
    assert "pretraining on" in first and "from an earlier run" not in first
    if name != "glyphs":   # glyphs: once with a base model of its own
        (tmp_path / "pretrain").mkdir()
        shutil.copy(out / "pretrain" / "model.pt", tmp_path / "pretrain")
    printed = call(*argv, "--out", tmp_path)
    assert ("from an earlier run" in printed) == ("pretraining on" not in printed) == (name != "glyphs")
    assert rows(tmp_path) == rows(out)
    assert_same_folder(out / "runs", tmp_path / "runs")
    assert (tmp_path / "pretrain" / "model.pt").read_bytes() == (out / "pretrain" / "model.pt").read_bytes()
    before = read(tmp_path)["rows"]
    monkeypatch.setattr(compare, "train", lambda *a, **k: pytest.fail("a run was repeated"))
    call(*argv, "--resume", "--out", tmp_path)
    assert read(tmp_path)["rows"] == before


def test_the_written_files_reproduce_their_rows(story, tmp_path):
    """The adapter loads on the base model; the fully fine-tuned model as --init has the metric of its row."""
    name, argv, out, _ = story
    kind, full = ViT if name == "glyphs" else GPT, out / "runs" / "full-seed0" / "model.pt"
    model = load_model(out / "pretrain" / "model.pt", kind)[0]
    model = load_adapter(model.reset_classifier(26) if name == "glyphs" else model,
                         out / "runs/lora_rank=8-seed0/adapter.pt")
    assert model.adaptation["method"] == "lora" and model.adaptation["options"]["rank"] == 8
    flags = [*argv, "--init", full, "--methods", "lora:rank=1", "--steps", 1, "--out", tmp_path]
    printed = call(*flags)
    assert "pretraining" not in printed and "gap recovered is empty: it needs the row" in printed
    found = {row["method"]: row["metric"] for row in rows(out)}
    assert name == "glyphs" or rows(tmp_path)[0]["metric"] == found["full"]
    assert rows(tmp_path)[-1]["method"] == "lora:rank=1", "--quick accepts --methods"
    assert {"published": False, "data": read(out)["task"]}.items() <= read(tmp_path)["base"].items()
    assert "result" not in read(tmp_path)["base"], "it describes the base model of the base model"


def best_is_largest(spec, base, task, config, device):
    """Replace compare.validation_score, so that the larger learning rate is the better one."""
    return config.lr


def test_seeds_sweep_targets_and_head_lr_reach_the_runs(little, tmp_path, monkeypatch):
    """Each seed has its own batches; all seeds use the learning rates that the first one chose."""
    specs = ["head", "full", "svfit", "lora:rank=8@up"]
    argv = [train_vit, "--methods", *specs, "--seeds", 2, "--seed", 5, "--lr-sweep", 2, "--targets", "query,value",
            "--head-lr", 0.02, "--out", tmp_path]
    monkeypatch.setattr(compare, "validation_score", best_is_largest)
    printed = call(*argv)
    content, (head, full, svfit, lora) = read(tmp_path), ["head", "full", "svfit@query,value", "lora:rank=8@up"]
    assert [(r["method"], r["seed"]) for r in content["rows"]] == [
        (w, s) for s in (5, 6) for w in (head, full, svfit, lora)]
    assert list(content["lr_sweep"]) == [head, full, svfit, lora]
    tuned = train_vit.LEARNING_RATES["glyphs"]
    for spec, first in ((head, 0.02), (full, tuned["full"]), (svfit, tuned["svfit"]), (lora, LoRA.lr)):
        found = content["lr_sweep"][spec]
        assert found["lr"] == pytest.approx([first, 2 * first]) and found["best"] == found["lr"][1]
        assert {r["lr"] for r in content["rows"] if r["method"] == spec} == {found["best"]}
        for seed in (5, 6):
            folder = compare.run_path(tmp_path, spec, seed)
            run_config = json.loads((folder / "row.json").read_text(encoding="utf-8"))["run_config"]
            assert run_config["head_lr"] == (0.04 if spec == "head" else 0.02) and run_config["seed"] == seed
            assert run_config["targets"] == {svfit: ["query", "value"], lora: ["up"]}.get(spec, list(ViT.targets))
    assert log_of(compare.run_path(tmp_path, "full", 5)) != log_of(compare.run_path(tmp_path, "full", 6))
    assert "mean ± standard deviation over seeds 5, 6" in printed and "learning rates by accuracy" in printed
    metrics = [r["metric"] for r in content["rows"] if r["method"] == "full"]
    line = next(x for x in (tmp_path / "results.md").read_text("utf-8").splitlines() if x.startswith("| full"))
    assert f"{statistics.mean(metrics):.1f} ± {statistics.stdev(metrics):.1f}" in line
    for module in (compare, pretrain):
        monkeypatch.setattr(module, "train", lambda *a, **k: pytest.fail("a run was repeated"))
    call(*argv, "--resume")
    assert read(tmp_path) == content


@pytest.mark.parametrize("name", ["glyphs", "arithmetic"])
def test_all_methods_and_the_result_of_a_sweep_reach_the_runs(name, tmp_path, monkeypatch):
    script, flags, *_ = STORIES[name]
    spec, deleted = script.MAIN[-1] + "@up", []
    monkeypatch.setattr(compare, "delete_runs", lambda specs, seeds, out: deleted.append((*specs, *seeds, out)))
    monkeypatch.setattr(compare, "all_specs", lambda main, base, targets: [main[-1]] if targets == ("up",) else [])
    monkeypatch.setattr(compare, "validation_score", best_is_largest)
    call(script, *flags, "--methods", "all", "--targets", "up", "--steps", 1, "--lr-sweep", 2, "--out", tmp_path)
    row, found = rows(tmp_path)[-1], read(tmp_path)["lr_sweep"][spec]
    assert deleted == [(spec, 0, tmp_path)], "runs of an earlier command"
    assert row["method"] == spec and row["lr"] == found["best"] == found["lr"][1]


def test_if_every_run_diverges_the_exit_code_is_1_after_the_table(tmp_path, capsys):
    argv = ["--data", "arithmetic", "--methods", "full", "svfit", "--lr", "1e30", "--steps", "12"]
    assert train_gpt.main([*argv, "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert [(r["method"], r["metric"]) for r in rows(tmp_path)[1:]] == [("full", None), ("svfit", None)]
    printed, error = capsys.readouterr()
    lines = [line for line in printed.splitlines() if line.startswith("|") and "diverged" in line]
    assert len(lines) == 2 and "try a lower --lr" in printed and "nan |" not in printed
    assert error == "error: every run diverged: try a lower --lr\n"


def test_a_script_as_a_program_ends_with_the_exit_code(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_vit.py", "--lr", "0"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "train_vit.py"), run_name="__main__")
    assert caught.value.code == 2 and "--lr" in capsys.readouterr().err
