"""Adapt one base by several methods, at equal effort, and measure: what the story and `compare` of both scripts do."""

import copy
import json
import re
import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Callable

import torch
from tqdm import tqdm

from . import files, report
from .adapter import (METHODS, adapt, adapters, count_trainable, find_linears, fingerprint, fitting_linears, head_of,
                      save_adapter)
from .cli import parse_method, same_method
from .loop import Diverged, Machine, Settings, Task, evaluate, save_model, train


@dataclass
class Setup:
    """What is adapted, on what, how. task_of(seed): the task, whose training data may hang on the seed. rates:
    learning rates by method word. sample(model): something to show of it."""
    base: torch.nn.Module
    task_of: Callable
    settings: Settings
    machine: Machine
    out: Path
    targets: tuple
    rates: dict
    sample: Callable
    about: dict = field(default_factory=dict)   # what a model file of this task says about itself
    run: dict = field(default_factory=dict)     # which data: what else decides a result
    resume: bool = False
    lr: float | None = None

    @property
    def task(self) -> Task:
        """Of the first seed: what tuning runs on, and where names and test data come from."""
        return self.task_of(self.settings.seed)


def rate_of(word, setup):
    """The learning rate of a method word: --lr, else the tuned one, else the method's own first guess."""
    if setup.lr is not None:
        return setup.lr
    tuned = {same_method(w): lr for w, lr in setup.rates.items()}
    return tuned.get(same_method(word), METHODS[parse_method(word)[0]].lr if parse_method(word)[0] in METHODS else 1e-3)


def adapted(word, setup, seed):
    """A copy of the base, adapted by this word. seed: of LoRA's and DoRA's A; svft and vera have their own."""
    method, options, targets = parse_method(word)
    torch.manual_seed(seed)
    return adapt(copy.deepcopy(setup.base), method, targets or setup.targets, **options)


def settings_of(word, setup, seed, lr):
    """The settings of one run. A head alone has one rate: the head's."""
    s = replace(setup.settings, seed=seed, lr=lr)
    return replace(s, head_lr=lr) if parse_method(word)[0] == "head" else s


def finetune(word, setup, seed, lr=None):
    """One run: adapt, train, test, save. Returns its row, a dict of plain values.

    Its folder, out/runs/WORD-seedN, gets last.pt, best.pt, metrics.jsonl, row.json, and adapter.pt, or model.pt
    for full fine-tuning. Raises Diverged, Stopped and whatever adapt and train raise.
    """
    lr = rate_of(word, setup) if lr is None else lr
    folder = setup.out / "runs" / f"{slug(word)}-seed{seed}"
    model, task = adapted(word, setup, seed), setup.task_of(seed)
    s = settings_of(word, setup, seed, lr)
    flags = setup.run | {"method": model.adaptation["method"], "options": model.adaptation["options"],
                         "targets": model.adaptation["targets"], "base": model.adaptation["base"],
                         "dtype": str(setup.machine.dtype)}
    flags |= s.flags()
    if setup.machine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    trained = train(model, task, s, setup.machine, folder, flags, setup.resume, word)
    seconds = time.perf_counter() - began
    with setup.machine.autocast():
        scores = evaluate(model, task, "test")
    counts = count_trainable(model)
    on_cuda = setup.machine.device.type == "cuda"
    row = empty_row(word, setup, seed, lr) | {
        "adapter": counts["adapter"], "head": counts["head"],
        "percent": 100 * counts["adapter"] / backbone(setup.base), "metric": scores["metric"],
        "seconds": seconds, "ms_per_step": trained["ms_per_step"],
        "peak_mb": torch.cuda.max_memory_allocated() / 2**20 if on_cuda else None,
        "adapter_bytes": save_result(model, folder, setup.about),
        "learned": learned(model), "sample": setup.sample(model)}
    files.write_text(folder / "row.json", json.dumps({"flags": flags, "row": row}, ensure_ascii=False))
    return row


def save_result(model, folder, about):
    """Write adapter.pt, or model.pt where everything was trained; returns the file's size in bytes."""
    if model.adaptation["method"] == "full":
        path = folder / "model.pt"
        save_model(path, model, **about)
    else:
        path = folder / "adapter.pt"
        save_adapter(model, path, {"data": about["data"]} if "data" in about else None)
    return path.stat().st_size


def start_row(setup):
    """The base as it is, on the new task: what GPT compares with in place of a head."""
    model = copy.deepcopy(setup.base).to(setup.machine.device)
    with setup.machine.autocast():
        metric = evaluate(model, setup.task, "test")["metric"]
    return empty_row("start", setup, setup.settings.seed, None) | {"metric": metric, "sample": setup.sample(model)}


def empty_row(word, setup, seed, lr):
    """A row of results.json before anything was measured."""
    return {"method": word, "adapter": 0, "head": 0, "percent": 0.0, "metric": None,
            "metric_name": setup.task.metric_name, "higher_is_better": setup.task.higher_is_better,
            "recovered": None, "seconds": 0.0, "ms_per_step": None, "peak_mb": None, "adapter_bytes": 0,
            "seed": seed, "lr": lr, "learned": None, "sample": None}


def finished(word, setup, seed, lr):
    """The row of a run that an earlier, stopped comparison finished with the same settings, or None."""
    path = setup.out / "runs" / f"{slug(word)}-seed{seed}" / "row.json"
    if not setup.resume or not path.is_file():
        return None
    targets = parse_method(word)[2] or setup.targets
    now = conditions(setup, settings_of(word, setup, seed, lr)) | {"lr": lr, "targets": list(targets)}
    return kept(path, now)["row"]


def conditions(setup, s):
    """What decides a result besides the method, its targets, its rate and the seed."""
    return setup.run | {"base": fingerprint(setup.base), "steps": s.steps, "batch_size": s.batch_size,
                        "head_lr": s.head_lr, "dtype": str(setup.machine.dtype)}


def kept(path, now):
    """The content of a JSON file of an earlier command. Raises ValueError where its "flags" are not those of now."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        was = content["flags"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged: delete it to have it made again") from None
    other = [f"{k} was {was.get(k)!r} and is {v!r}" for k, v in now.items() if was.get(k) != v]
    if other:
        raise ValueError(f"{path} was made with other settings: {'; '.join(other)}: give another --out")
    return content


def words_of(flags, main, quick):
    """The method words that a command line asks for."""
    return {"finetune": [flags.method], "compare": flags.methods}.get(flags.command, quick if flags.quick else main)


def check_words(words, model, targets):
    """Raise ValueError for a method word that does not fit the model's shapes: before the work, not after it."""
    for method, options, own_targets in map(parse_method, words):
        if method in METHODS:
            fitting_linears(model, method, own_targets or targets, options)
        elif method == "head" and head_of(model) is None:
            raise ValueError("this model has no head of its own to train: leave out the word head")


def run_command(flags, setup, main, quick):
    """story, compare or finetune: run the methods, print and write the results; returns the rows."""
    words = words_of_all(setup, main) if flags.all else words_of(flags, main, quick)
    words = list({same_method(w): w for w in reversed(words)}.values())[::-1]   # each once: a repeat is no new seed
    check_words(words, setup.base, setup.targets)
    tuning = None
    if flags.tune:
        tuning = tune(words, setup, flags.tune)
        print("\n".join([f"learning rates by {setup.task.metric_name} on the validation split, seed {flags.seed}:",
                         *report.show_tuning(tuning)]))
        setup.rates = setup.rates | {w: t["best"] for w, t in tuning.items() if t["best"] is not None}
    print(f"{setup.task.name}: {len(words)} rows, {setup.settings.steps} steps each, {flags.seeds} seed(s)")
    rows = compare(words, setup, range(flags.seed, flags.seed + flags.seeds))
    print("\n".join(["", *report.table_lines(rows), "", *report.notes(rows)]))
    about = {"task": setup.task.name, "device": setup.machine.reason, "steps": setup.settings.steps, **setup.run}
    # one run keeps its results to itself: those of a comparison stay
    out = setup.out / "runs" / f"{slug(words[0])}-seed{flags.seed}" if flags.command == "finetune" else setup.out
    report.write_results(out, rows, about, tuning)
    print(f"{out / 'results.json'}, results.md")
    if flags.plot:
        report.plot(setup.out / "results.png", rows)
        print(f"{setup.out / 'results.png'}")
    if flags.command == "finetune" and rows[-1].get("failed"):
        raise Diverged(rows[-1]["failed"])
    return rows


def compare(words, setup, seeds):
    """Every method with every seed; returns the rows, the reference row `start` first where there is no head.

    A run whose loss diverges becomes a row without a metric, and the next one goes on.
    """
    rows = [] if head_of(setup.base) is not None else [start_row(setup)]
    jobs = [(word, seed) for seed in seeds for word in words]
    for word, seed in tqdm(jobs, "methods", leave=False, disable=None):
        lr = rate_of(word, setup)
        row = finished(word, setup, seed, lr)
        if row is None:
            try:
                row = finetune(word, setup, seed, lr)
            except Diverged as error:
                row = {**empty_row(word, setup, seed, lr), "failed": str(error)}
        rows.append(row)
        tqdm.write(f"  {row['method']:<44} seed {seed}  {row['metric_name']} "
                   + (f"{row['metric']:.4g}" if row["metric"] is not None else row["failed"]))
    recover(rows)
    return rows


def recover(rows):
    """Fill in each row's share of full's gain, (metric − start) / (full − start), start being head where it is."""
    metric = {(r["method"], r["seed"]): r["metric"] for r in rows}
    for r in rows:
        start = metric.get(("head", r["seed"]), next((r["metric"] for r in rows if r["method"] == "start"), None))
        full = metric.get(("full", r["seed"]))
        if None not in (start, full, r["metric"]) and (full > start) == r["higher_is_better"] and full != start:
            r["recovered"] = (r["metric"] - start) / (full - start)


def tune(words, setup, points):
    """Equally many learning rates for every method: `points` of them, a factor 2 apart, around its own default.

    Scored on the validation split, at the first seed. Returns {word: {"lr": [...], "val": [...], "best": lr}} and
    keeps it in out/tune.json, where a resumed command finds it.
    """
    path, found = setup.out / "tune.json", {}
    now = conditions(setup, setup.settings) | {"targets": list(setup.targets), "seed": setup.settings.seed}
    if setup.resume and path.is_file():
        found = kept(path, now)["found"]
    sign = 1 if setup.task.higher_is_better else -1
    jobs = [(w, rate_of(w, setup) * 2.0 ** (i - (points - 1) // 2)) for w in words for i in range(points)]
    for word, lr in tqdm(jobs, "tune", leave=False, disable=None):
        scores = found.setdefault(word, {"lr": [], "val": [], "best": None})
        if lr in scores["lr"]:
            continue
        model = adapted(word, setup, setup.settings.seed)
        try:
            run = train(model, setup.task, settings_of(word, setup, setup.settings.seed, lr), setup.machine,
                        label=f"{word} lr {lr:.2g}")
            value = run["log"][-1]["metric"]   # the last evaluation of a run is at its end, on the validation split
        except Diverged:
            value = None
        scores["lr"].append(lr)
        scores["val"].append(value)
        sound = [(sign * v, -r, r) for v, r in zip(scores["val"], scores["lr"]) if v is not None]   # ties: the smaller
        scores["best"] = max(sound)[-1] if sound else None
        files.write_text(path, json.dumps({"flags": now, "found": found}, indent=1))
    return found


def words_of_all(setup, main):
    """The main rows, then every registered method's other examples, on the targets that fit them, each with a banded
    and a random row on the same targets where those are fewer than all: a comparison must be like with like."""
    words, known = list(main), {same_method(w) for w in main}
    linears = find_linears(setup.base, setup.targets)
    for method, cls in METHODS.items():
        for example in cls.examples:
            word = f"{method}:{example}".rstrip(":")
            on = [t for t in setup.targets if all(fits(word, *linear.weight.shape) for name, linear in linears.items()
                                                  if name.rsplit(".", 1)[-1] == t)]
            new = [word]
            if len(on) < len(setup.targets):
                at = "@" + ",".join(on)
                new = [w + at for w in ("svft:pattern=banded", "svft:pattern=random", word)] if on else []
            words += [w for w in new if same_method(w) not in known]
            known |= {same_method(w) for w in new}
    return words


def fits(word, d_out, d_in):
    """Whether the options of a method word fit a matrix of this shape."""
    method, options, _ = parse_method(word)
    try:
        METHODS[method].check(d_out, d_in, **options)
    except ValueError:
        return False
    return True


def learned(model):
    """What an SVF-type method changed, per target: the largest singular value before and after, as means over the
    layers, and the largest |M_ij| of all; None of other methods."""
    rows = {}
    for name, adapter in adapters(model).items():
        spectrum = adapter.learned()
        if spectrum is not None:
            before, after, M = spectrum
            rows.setdefault(name.rsplit(".", 1)[-1], []).append([t.max().item() for t in (before, after, M.abs())])
    return {target: {"before": statistics.mean(r[0] for r in rs), "after": statistics.mean(r[1] for r in rs),
                     "max_M": max(r[2] for r in rs)} for target, rs in rows.items()} or None


def backbone(model):
    """Parameters of a base without its head, shared ones once."""
    head = head_of(model)
    return sum(p.numel() for p in model.parameters()) - (sum(p.numel() for p in head.parameters()) if head else 0)


def slug(word):
    """A method word as a folder name that every system takes."""
    return re.sub(r"[^\w=.,+-]", "_", word)
