"""The tables and figures of docs/ are those of docs/data/, and docs/reproduce/*.sh run as they are."""

import csv
import importlib
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import train_gpt
import train_vit
from svmini.methods import METHODS, canonical_spec, parse_spec
from svmini.training.learning_rates import GPT_LEARNING_RATES, VIT_LEARNING_RATES

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SCRIPTS = sorted((DOCS / "reproduce").glob("*.sh"))
sys.path.insert(0, str(DOCS / "reproduce"))
import figures  # noqa: E402
import measurements  # noqa: E402
import minilm  # noqa: E402
import tables  # noqa: E402

WIDTHS = {"glyphs": (4, 128), "fashionmnist": (4, 128), "mnist": (4, 128), "text": (4, 128), "arithmetic": (3, 128)}


def lines_of(name):
    with (DOCS / "data" / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_table_is_the_one_that_the_data_give():
    """A figure edited by hand, or data that changed without their table, fail here: python docs/reproduce/tables.py."""
    data, found = measurements.read(), set()
    for path in (ROOT / "README.md", *DOCS.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        found |= set(re.findall(r"<!-- table: (\w+) -->", text))
        assert tables.fill(text, data) == text, f"{path.name} differs from docs/data: run docs/reproduce/tables.py"
    assert found >= set(tables.TABLES) - {"main"}


def test_a_table_changes_with_its_data():
    """The check above would also pass if fill replaced nothing."""
    data = measurements.read()
    text = "before\n<!-- table: glyphs -->\n<!-- end -->\nafter\n"
    filled = tables.fill(text, data)
    assert "| full | 800,384 | 79.5 ± 0.6 | +1.9 ± 1.5 | 100 |" in filled and filled.endswith("<!-- end -->\nafter\n")
    next(row for row in data["runs"] if row["metric"] == "79.5")["metric"] = "79.6"
    assert tables.fill(filled, data) != filled


def test_individual_runs_are_averaged_over_seeds_and_then_over_bases():
    runs = [{"task": "t", "base": base, "seed": seed, "method": method, "metric": metric, "metric_name": "accuracy"}
            for method, base, seed, metric in (
                ("svft", "0", "0", "10"), ("svft", "0", "1", "20"), ("svft", "1", "2", "30"), ("svft", "2", "4", "45"),
                ("lora", "0", "0", "10"), ("lora", "1", "2", "20"), ("lora", "2", "4", "30"), ("lora", "3", "6", "99"))]
    data = {"runs": runs, "paired_differences": []}
    assert measurements.score(data, {"task": "t"}, "svft") == (30, 15, 3, None, 1)
    difference = measurements.difference(data, {"task": "t"}, "svft", "lora")
    assert difference == (10, 5, 3, "bases", 1)   # of 5, 10 and 15 on the bases 0, 1 and 2, which both have
    assert not measurements.significant(difference) and measurements.significant(difference._replace(deviation=4))
    assert not measurements.significant(difference._replace(deviation=4, unit="seeds"))


def test_a_stored_difference_changes_sign_with_the_order_of_its_methods():
    stored = {"task": "t", "method": "a", "minus": "b", "difference": "+0.7", "deviation": "0.2", "n": "3",
              "unit": "bases"}
    data = {"runs": [], "paired_differences": [stored]}
    assert measurements.cell(measurements.difference(data, {"task": "t"}, "a", "b"), True) == "**+0.7 ± 0.2**"
    assert measurements.cell(measurements.difference(data, {"task": "t"}, "b", "a"), True) == "**-0.7 ± 0.2**"


@pytest.mark.parametrize("name", sorted(figures.FIGURES))
def test_every_figure_shows_the_data(name, tmp_path):
    from PIL import Image
    data = measurements.read()
    assert Image.open(DOCS / name).text["Description"] == figures.digest(data, name), "run docs/reproduce/tables.py"
    pytest.importorskip("matplotlib")
    figures.draw(tmp_path / name, data)
    assert Image.open(tmp_path / name).size == Image.open(DOCS / name).size


def test_trainable_parameters_of_the_runs_are_those_of_the_formulas():
    checked = 0
    for row in lines_of("runs.csv"):
        if row["method"] == "zero-shot":
            continue
        method, options, targets = parse_spec(row["method"])
        task = row["task"].split(",")[0]
        if method in METHODS and task in WIDTHS:
            n_layer, width = WIDTHS[task]
            shapes = {"up": (4 * width, width), "down": (width, 4 * width)}
            layers = [shapes.get(target, (width, width)) for target in targets or train_vit.ViT.targets]
            count = n_layer * sum(METHODS[method].count(*shape, **options) for shape in layers)
            assert int(row["trainable_params"]) == count, row
            checked += 1
    assert checked > 100


def test_learning_rates_are_the_best_of_their_sweeps():
    """The chosen one scores best on validation data, is inside its grid, and is the one that the scripts use."""
    grids = defaultdict(list)
    for row in lines_of("lr_sweeps.csv"):
        grids[row["task"], row["method"], row["machine"]].append(row)
    used = {"glyphs": VIT_LEARNING_RATES["glyphs"], "text": GPT_LEARNING_RATES["text"],
            "arithmetic": GPT_LEARNING_RATES["arithmetic"],
            "cifar10_3000, 8 per class": VIT_LEARNING_RATES["published"], "movie reviews": minilm.LEARNING_RATES,
            **{task: VIT_LEARNING_RATES["glyphs"] | VIT_LEARNING_RATES[task] for task in ("mnist", "fashionmnist")}}
    used = {task: {canonical_spec(spec): lr for spec, lr in table.items()} for task, table in used.items()}
    on_three_bases = defaultdict(lambda: defaultdict(list))   # these take precedence
    for row in lines_of("evidence_sweeps.csv"):
        on_three_bases[row["task"], row["width"], row["method"]][float(row["lr"])].append(float(row["metric"]))
    best = {}
    for key, grid in on_three_bases.items():
        if all(len(scores) == 3 for scores in grid.values()):
            lrs = sorted(grid)
            best[key] = max(lrs, key=lambda lr: sum(grid[lr]))
            assert best[key] not in (lrs[0], lrs[-1]), key
    for row in lines_of("evidence_runs.csv"):
        assert float(row["lr"]) == best[row["task"], row["width"], row["method"]], row
    for (task, width, method), lr in best.items():
        assert width not in ("128", "384") or lr == used[task][canonical_spec(method)], (task, method)
    for (task, method, _), rows in grids.items():
        sign = -1 if task == "text" else 1
        (chosen,) = (row for row in rows if row["chosen"])
        assert sign * float(chosen["score"]) == max(sign * float(row["score"]) for row in rows), (task, method)
        if task in used and (task, "128", method) not in on_three_bases:
            assert used[task][canonical_spec(method)] == pytest.approx(float(chosen["lr"])), (task, method)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_command_of_a_script_is_accepted(script, tmp_path, capsys):
    """Run the script with a `python` that only notes its arguments; then parse these as the program does."""
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    stub, log = tmp_path / "python", tmp_path / "log"
    stub.write_text('#!/bin/sh\necho "$@" >> "$LOG"\n')
    stub.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "LOG": str(log),
                   "OUT": "out", "WEIGHTS": "weights.pt", "IMAGES": "images", "DATA_DIR": "data"}
    subprocess.run(["bash", str(script)], cwd=ROOT, env=environment, check=True)
    commands = {tuple(line.split()) for line in log.read_text().splitlines()}
    for program, *argv in commands:
        module = {"train_vit.py": train_vit, "train_gpt.py": train_gpt}.get(program)
        if module and argv[0] == "pretrain":
            module.pretraining_flags(argv[1:])
        elif module:
            module.adapting_flags(argv)
        elif program == "-m":
            with pytest.raises(SystemExit):
                importlib.import_module(argv[0]).command(["--help"])
            known = capsys.readouterr().out
            assert all(flag in known for flag in argv if flag.startswith("--")), argv
        else:
            assert (ROOT / program).is_file()
