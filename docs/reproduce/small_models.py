"""Run the experiments of docs/evidence.md on the small models and append one line a run to a CSV file.

    python docs/reproduce/small_models.py sweep glyphs                    # learning rates, on bases 100, 101, 102
    python docs/reproduce/small_models.py run glyphs                      # every row, on bases 0 to 9
    python docs/reproduce/small_models.py run glyphs --bases 3 --methods svft:off_diagonals=2   # one row of one base

Run it from the repository root with OMP_NUM_THREADS=1. Runs that the CSV file already holds are skipped, so the same
command continues after an interruption. Base b is pretrained with seed b and adapted with seeds 2b and 2b + 1.
"""

import argparse
import csv
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import train_gpt  # noqa: E402
import train_vit  # noqa: E402
from svmini import GPT, ViT, model_file  # noqa: E402
from svmini.data.arithmetic import Arithmetic  # noqa: E402
from svmini.data.image_datasets import open_images  # noqa: E402
from svmini.data.images import ImageClassification  # noqa: E402
from svmini.methods import options_of, parse_spec  # noqa: E402
from svmini.training import compare  # noqa: E402
from svmini.training.device import resolve_device  # noqa: E402
from svmini.training.learning_rates import GPT_LEARNING_RATES, VIT_LEARNING_RATES  # noqa: E402
from svmini.training.loop import TrainConfig  # noqa: E402

CONTROLS = ["svft:pattern=plain", "svft:pattern=plain,basis=random", "svft:off_diagonals=2", "lora:rank=8", "full",
            "svft:pattern=random,off_diagonals=0", "random_mask:off_diagonals=0", "svft:off_diagonals=8",
            "svft:off_diagonals=8,basis=random"]
LATER = ["random_mask:off_diagonals=2", "svft:pattern=random,off_diagonals=8"]   # exploratory
SIDES = ["svft:off_diagonals=8,basis=random_U", "svft:off_diagonals=8,basis=random_V"]
METHODS = {"glyphs": [*CONTROLS, "head", "vera:rank=256", *LATER], "arithmetic": [*CONTROLS, *LATER, *SIDES]}
LEARNING_RATES = {"glyphs": VIT_LEARNING_RATES["glyphs"], "arithmetic": GPT_LEARNING_RATES["arithmetic"]}
CHANCE = {"glyphs": 100 / 26, "arithmetic": 0.0}   # the score of a run that diverged
RUN_COLUMNS = ["task", "width", "steps", "base", "base_metric", "method", "seed", "metric", "metric_name", "status",
               "trainable_params", "lr", "machine", "torch", "date", "commit", "command"]
SWEEP_COLUMNS = ["task", "width", "steps", "base", "method", "seed", "lr", "metric", "metric_name", "status", "machine",
                 "torch", "date", "commit"]
CURVE_COLUMNS = ["task", "width", "steps", "base", "method", "seed", "step", "metric", "metric_name", "commit"]


def main(argv=None):
    flags = parse_flags(argv)
    for base_seed in flags.bases:
        base, metadata = pretrained_base(flags, base_seed)
        if flags.action == "sweep":
            sweep(flags, base_seed, base)
        elif flags.action == "run":
            run(flags, base_seed, base, metadata)


def parse_flags(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("action", choices=("pretrain", "sweep", "run"))
    p.add_argument("task", choices=sorted(METHODS))
    p.add_argument("--bases", type=int, nargs="+", help="pretraining seeds (100 to 102 for sweep, else 0 to 9)")
    p.add_argument("--methods", nargs="+", help="method specs without seed (default: all rows of the task)")
    p.add_argument("--lr", type=float, nargs="+", help="learning rates (sweep: five around the tuned one; run: the tuned one)")
    p.add_argument("--width", type=int, default=128, help="width of the model (128)")
    p.add_argument("--steps", type=int, help="fine-tuning steps (default: the training script's)")
    p.add_argument("--eval-every", type=int, default=0, help="steps between validations, for learning curves (0: none)")
    p.add_argument("--seeds-per-base", type=int, default=2, help="fine-tuning seeds of each base (2)")
    p.add_argument("--out", type=Path, default=Path("out/evidence"), help="folder of the bases (out/evidence)")
    p.add_argument("--csv", type=Path, help="folder of the CSV files to append to (default: --out)")
    flags = p.parse_args(argv)
    flags.bases = flags.bases or ([100, 101, 102] if flags.action == "sweep" else list(range(10)))
    flags.methods = flags.methods or METHODS[flags.task]
    flags.csv = flags.csv or flags.out
    flags.csv.mkdir(parents=True, exist_ok=True)
    adapt = train_vit.ADAPT if flags.task == "glyphs" else train_gpt.ADAPT["arithmetic"]
    flags.train_config = TrainConfig(**adapt | {"steps": flags.steps or adapt["steps"]}, lr=1.0)   # lr: set for each run
    flags.device_config = resolve_device("cpu", "float32", False)
    return flags


def pretrained_base(flags, seed):
    """Pretrain base `seed` with the training script, or load it if an earlier command made it."""
    folder = flags.out / f"{flags.task}-{flags.width}-base{seed}"
    path = folder / "pretrain" / "model.pt"
    if not path.is_file():
        script = train_vit if flags.task == "glyphs" else train_gpt
        code = script.main(["pretrain", "--data", flags.task, "--d-model", str(flags.width), "--seed", str(seed),
                            "--device", "cpu", "--out", str(folder)])
        if code:
            sys.exit(code)
    return model_file.load_base(str(path), ViT if flags.task == "glyphs" else GPT, None)


def adaptation_task(flags, base_seed, base):
    """Return the target task of a base, and the base with a new head if the task has other classes."""
    if flags.task == "arithmetic":
        return Arithmetic("-", flags.device_config.device)
    source = open_images("glyphs B", None, base_seed)
    torch.manual_seed(base_seed)
    base.reset_classifier(len(source.classes))
    return ImageClassification(source, base_seed, base.config, flags.device_config.device)


def seeded(spec, seed):
    """Return the spec with its method's own random draws seeded too."""
    method, options, _ = parse_spec(spec)
    if "seed" not in options_of(method):
        return spec
    return f"{spec}{',' if ':' in spec else ':'}seed={seed}"


def sweep(flags, base_seed, base):
    """Score learning rates on the validation data of one base, at fine-tuning seed 2b."""
    task, seed = adaptation_task(flags, base_seed, base), 2 * base_seed
    path = flags.csv / "evidence_sweeps.csv"
    done = {(r["task"], r["width"], r["base"], r["method"], r["lr"]) for r in read(path)}
    for spec in flags.methods:
        center = LEARNING_RATES[flags.task].get(spec) or LEARNING_RATES[flags.task]["svft:off_diagonals=8"]
        for lr in flags.lr or [center * 2.0 ** i for i in range(-2, 3)]:
            if (flags.task, str(flags.width), str(base_seed), spec, f"{lr:g}") in done:
                continue
            score = compare.validation_score(seeded(spec, seed), base, task, replace(flags.train_config, lr=lr, seed=seed),
                                             flags.device_config)
            append(path, SWEEP_COLUMNS, common(flags, base_seed, task) | {
                "method": spec, "seed": seed, "lr": f"{lr:g}", "metric": CHANCE[flags.task] if score is None else score,
                "status": "diverged" if score is None else "ok"})
            print(f"{flags.task} base {base_seed} {spec} lr {lr:g}: {score}", flush=True)


def run(flags, base_seed, base, metadata):
    """Fine-tune one base by every method with each of its seeds, and append the test metrics."""
    task, path = adaptation_task(flags, base_seed, base), flags.csv / "evidence_runs.csv"
    done = {(r["task"], r["width"], r["steps"], r["base"], r["method"], r["seed"]) for r in read(path)}
    scratch = flags.out / f"scratch-{os.getpid()}"
    for seed in range(2 * base_seed, 2 * base_seed + flags.seeds_per_base):
        for spec in flags.methods:
            steps = flags.train_config.steps
            if (flags.task, str(flags.width), str(steps), str(base_seed), spec, str(seed)) in done:
                continue
            lr = flags.lr[0] if flags.lr else LEARNING_RATES[flags.task].get(spec)
            if lr is None:
                sys.exit(f"{spec} has no tuned learning rate: run its sweep and add the best one to "
                         "svmini/training/learning_rates.py, or give --lr")
            train_config = replace(flags.train_config, lr=lr, seed=seed)
            row = compare.run(seeded(spec, seed), base, task, train_config, flags.device_config, scratch,
                              eval_every=flags.eval_every)
            failed = row["metric"] is None
            append(path, RUN_COLUMNS, common(flags, base_seed, task) | {
                "method": spec, "seed": seed, "metric": CHANCE[flags.task] if failed else f"{row['metric']:.6g}",
                "status": "diverged" if failed else "ok", "base_metric": f"{metadata['metric']:.6g}",
                "trainable_params": row["trainable_params"], "lr": f"{lr:g}", "command": command(flags, base_seed, spec)})
            if flags.eval_every:
                keep_curve(flags, base_seed, task, spec, seed, scratch)
            print(f"{flags.task} base {base_seed} seed {seed} {spec}: {row['metric']}", flush=True)
    shutil.rmtree(scratch, ignore_errors=True)


def keep_curve(flags, base_seed, task, spec, seed, scratch):
    """Append the validation metrics of a run's log."""
    log = compare.run_path(scratch, seeded(spec, seed), seed) / "metrics.jsonl"
    for line in map(json.loads, log.read_text().splitlines()):
        append(flags.csv / "evidence_curves.csv", CURVE_COLUMNS, common(flags, base_seed, task) | {
            "method": spec, "seed": seed, "step": line["step"], "metric": f"{line['metric']:.6g}"})


def command(flags, base_seed, spec):
    """Return the command that repeats one line."""
    default = train_vit.ADAPT if flags.task == "glyphs" else train_gpt.ADAPT["arithmetic"]
    words = ["python docs/reproduce/small_models.py run", flags.task, f"--bases {base_seed}", f"--methods {spec}"]
    words += [f"--width {flags.width}"] * (flags.width != 128)
    words += [f"--steps {flags.steps}"] * (flags.train_config.steps != default["steps"])
    words += [f"--lr {flags.lr[0]:g}"] if flags.lr else []
    return " ".join(words)


def common(flags, base_seed, task):
    """Return the columns that every line has."""
    return {"task": flags.task, "width": flags.width, "steps": flags.train_config.steps, "base": base_seed,
            "metric_name": task.metric, "machine": machine(), "torch": torch.__version__,
            "date": datetime.date.today().isoformat(), "commit": commit()}


def machine():
    """Return the processor's name and the number of threads."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    return f"{name}, {torch.get_num_threads()} thread" + "s" * (torch.get_num_threads() > 1)


def commit():
    """Return the commit of the code, or "unknown" outside a git checkout."""
    found = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def read(path):
    """Return the lines of a CSV file as dicts; none if it does not exist."""
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append(path, columns, line):
    """Append one line in a single write, so that two processes can share the file."""
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(line)


if __name__ == "__main__":
    main()
