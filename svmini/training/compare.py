"""Adapt one base model with several methods, at equal effort, and measure each."""

import copy
import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

from .. import files
from ..adapter_file import save_adapter
from ..adapting import (adapt, count_trainable, digests, find_linears, fingerprint, fitting_linears, heads_of,
                        is_inside, tied_parameters)
from ..errors import InputError
from ..methods import METHODS, WITHOUT_ADAPTERS, canonical_spec, options_of, parse_spec
from ..model_file import derived_metadata, save_model
from . import report
from .checkpoint import RunFolder, check_run_config, delete_run, file_name, read_json
from .loop import Diverged, TrainConfig, evaluate, train


# ---- which methods, at which learning rates ----

def plan(specs, base, targets, learning_rates, lr=None, head_lr=None):
    """Return {method spec: learning rate}, each method once.

    targets: written into every spec that has none: "svft" becomes "svft@query" for targets ("query",).
    learning_rates: tuned learning rates by spec. lr: one learning rate for all methods instead. head_lr: the one of the
    linear probe (spec: head) instead. Raises InputError for a spec that does not fit the base model, before any work.
    """
    tuned, planned, unique = {canonical_spec(spec): value for spec, value in learning_rates.items()}, {}, {}
    for spec in specs:
        unique.setdefault(check_spec(spec, base, targets), spec)
    for spec in unique.values():
        method, _, own_targets = parse_spec(spec)
        default = METHODS[method].lr if method in METHODS else 1e-3
        has_targets = own_targets or not targets or method in WITHOUT_ADAPTERS
        given = head_lr or lr if method == "head" else lr
        full_spec = spec if has_targets else f"{spec}@{','.join(targets)}"
        planned[full_spec] = given or tuned.get(canonical_spec(spec), default)
    return planned


def all_specs(main, base, targets):
    """Return the main specs and every method's examples. Those that do not fit the base model are left out, with a
    printed reason."""
    specs = list(main)
    for method, cls in METHODS.items():
        specs += (f"{method}:{example}".replace(":@", "@").rstrip(":") for example in cls.examples)
    found = {}
    for spec in specs:
        try:
            found.setdefault(check_spec(spec, base, targets), spec)
        except InputError as error:
            print(f"skipped: {spec}: {error}")
    return list(found.values())


def check_spec(spec, base, targets):
    """Return a value that is equal for specs with the same meaning on this base model. Raises InputError for a spec
    that does not fit it."""
    method, options, own_targets = parse_spec(spec)
    if method == "head" and not base.also_train:
        raise InputError("this model has no head that could be trained alone: leave out the method head")
    if method in WITHOUT_ADAPTERS:
        return canonical_spec(spec)
    targets = own_targets or targets or base.targets
    fitting_linears(base, method, targets, options, base.also_train)
    return *canonical_spec(spec)[:2], frozenset(targets)


def describe_targets(base, targets):
    """Return a sentence on which layers a spec without targets adapts, and which nn.Linear layers stay frozen."""
    targets = targets or base.targets
    found, tied = find_linears(base, targets, base.also_train), tied_parameters(base)
    frozen = {name.rsplit(".", 1)[-1] for name, part in base.named_modules() if isinstance(part, torch.nn.Linear)
              and name not in found and not is_inside(name, base.also_train) and id(part.weight) not in tied}
    return (f"adapted layers: {', '.join(targets)} ({len(found)} in total), unless a method spec names its own targets"
            + (f"; frozen: {', '.join(sorted(frozen))}" if frozen else ""))


# ---- every run ----

def run_all(learning_rates, seeds, base, make_task, train_kwargs, device_config, out, *, base_metadata, metadata,
            n_lrs=None, resume=False, **saving):
    """Train and test every method with every seed, print a line per run, and write the report into the folder out.

    learning_rates: from `plan`. make_task: a function from a seed to the task of its runs. train_kwargs: arguments of
    TrainConfig that all runs share. n_lrs: learning rates to try per method with the first seed, see `lr_sweep`.
    metadata: plain values for the adapter files, in addition to the name of the data. The others: see `run`.

    Returns (rows, task of the last seed). A base model without a new head gets the row zero-shot. Raises Diverged if
    every method diverged.
    """
    rows, sweep = [], None
    if not resume:
        delete_runs(learning_rates, seeds, out)
    for seed in seeds:
        task = make_task(seed)
        if seed == seeds[0] and n_lrs:
            kwargs = train_kwargs | {"seed": seed}
            sweep = lr_sweep(learning_rates, base, task, kwargs, device_config, out, n_lrs, resume)
            print(f"learning rates by {task.metric} on validation data:", *report.lr_sweep_lines(sweep), sep="\n")
            learning_rates = {spec: sweep[spec]["best"] or lr for spec, lr in learning_rates.items()}
        if seed == seeds[0] and not base.also_train:
            rows.append(zero_shot_row(base, task, seed, device_config))
            print(report.line(rows[-1]))
        for spec, lr in learning_rates.items():
            config = TrainConfig(lr=lr, seed=seed, **train_kwargs)
            rows.append(run(spec, base, task, config, device_config, out, base_metadata=base_metadata,
                            metadata={"data": task.name} | metadata, resume=resume, **saving))
            print(report.line(rows[-1]))
    fill_gap_recovered(rows)
    report.write(out, rows, task, train_kwargs, device_config, base_metadata, sweep)
    check_not_all_diverged(rows)
    return rows, task


def run(spec, base, task, train_config, device_config, out, *, resume=False, save_every=0, eval_every=0, metadata=None,
        base_metadata=None):
    """Adapt a copy of the base model as a method spec says, train, test and save it. Returns its row of results.json.

    The run folder out/runs/SPEC-seedN then contains metrics.jsonl, row.json and adapter.pt (model.pt for full
    fine-tuning). With resume, the row of a run that finished with the same run config is returned at once. A run that
    diverges gives a row without a metric and is not kept. metadata: plain values for the adapter file. base_metadata:
    of the base model, for model.pt.
    """
    method, options, targets = parse_spec(spec)
    train_config = use_lr_for_head(method, train_config)
    run_config = run_config_of(base, task, train_config, device_config) | {
        "method": method, "options": options_of(method) | options, "targets": targets or base.targets}
    folder, result_file = run_path(out, spec, train_config.seed), "model.pt" if method == "full" else "adapter.pt"
    run_folder = RunFolder(folder, run_config, resume, save_every, eval_every)
    finished = run_folder.finished_row(result_file)
    if finished is not None:
        return finished
    torch.manual_seed(train_config.seed)   # LoRA and DoRA draw A from torch's global stream
    model = adapt(copy.deepcopy(base), method, targets, **options)
    row = empty_row(spec, task, train_config.seed, train_config.lr, count_trainable(model), base)
    on_cuda = device_config.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    try:
        row["ms_per_step"] = train(model, task, train_config, device_config, run_folder, spec)
        row["seconds"] = time.perf_counter() - started
        row["metric"] = evaluate(model, task, "test", device_config)["metric"]
    except Diverged as error:
        return row | {"failed": str(error)}
    path = folder / result_file
    if method == "full":
        save_model(path, model, derived_metadata(base_metadata or {}, metadata or {}))
    else:
        save_adapter(model, path, metadata)
    row["adapter_bytes"] = path.stat().st_size
    row["peak_mb"] = torch.cuda.max_memory_allocated() / 2**20 if on_cuda else None
    row["sample"] = task.show(model)
    run_folder.finish(row)
    return row


def run_config_of(base, task, train_config, device_config):
    """Return everything besides the method that determines a result, as plain values."""
    return task.data_config | asdict(train_config) | {
        "base": fingerprint(digests(base)), "model": asdict(base.config), "dtype": str(device_config.dtype)}


def zero_shot_row(base, task, seed, device_config):
    """Return the row of the base model itself on the new task, for models without a new head."""
    model = copy.deepcopy(base).to(device_config.device)
    row = empty_row("zero-shot", task, seed, None, {"adapter": 0, "head": 0}, base)
    return row | {"metric": evaluate(model, task, "test", device_config)["metric"], "sample": task.show(model)}


def empty_row(spec, task, seed, lr, counts, base):
    """Return a row of results.json before anything is measured."""
    heads = sum(p.numel() for head in heads_of(base, base.also_train) for p in head.parameters())
    backbone = sum(p.numel() for p in base.parameters()) - heads
    return {"method": spec, "trainable_params": counts["adapter"], "head_params": counts["head"],
            "trainable_percent": 100 * counts["adapter"] / backbone, "metric": None, "metric_name": task.metric,
            "higher_is_better": task.higher_is_better, "gap_recovered": None, "seconds": 0.0, "ms_per_step": None,
            "peak_mb": None, "adapter_bytes": 0, "seed": seed, "lr": lr, "sample": None}


def fill_gap_recovered(rows):
    """Fill in gap_recovered = (metric − start) / (full − start) of each row, with the rows of the same seed.

    The start is the linear probe (row head) for a ViT, and the base model itself (row zero-shot) for a GPT.
    """
    for row in rows:
        start, full = report.start_and_full(rows, row["seed"])
        if None not in (start, full, row["metric"]) and (full > start) == row["higher_is_better"] and full != start:
            row["gap_recovered"] = (row["metric"] - start) / (full - start)


def check_not_all_diverged(rows):
    """Raise Diverged if no method has a metric."""
    if all(row["metric"] is None for row in rows if row["method"] != "zero-shot"):
        raise Diverged("every run diverged: try a lower --lr")


def use_lr_for_head(method, train_config):
    """A linear probe trains only the head, so its learning rate is the head's."""
    return replace(train_config, head_lr=train_config.lr) if method == "head" else train_config


def run_path(out, spec, seed):
    """Return the folder of a run."""
    return Path(out) / "runs" / f"{file_name(spec)}-seed{seed}"


def delete_runs(specs, seeds, out):
    """Delete what earlier runs of these specs and seeds left, so that a later --resume does not find it."""
    names = {file_name(spec) for spec in specs}
    for folder in Path(out).glob("runs/*-seed*"):
        name, _, seed = folder.name.rpartition("-seed")
        if name in names and seed.isdigit() and int(seed) in seeds:
            delete_run(folder)


# ---- learning-rate sweep ----

def lr_sweep(learning_rates, base, task, train_kwargs, device_config, out, n, resume=False):
    """Try n learning rates per method, a factor 2 apart, around the given one; all methods get equal effort.

    train_kwargs: arguments of TrainConfig without lr. The score is the metric on validation data. Returns
    {spec: {"lr": [...], "val": [...], "best": lr}}; best is None if all n diverged. out/lr_sweep.json contains the same
    and every score so far, from which a resumed command continues. Raises InputError if its run config or n differ.
    """
    path, scores = Path(out) / "lr_sweep.json", {}
    run_config = run_config_of(base, task, TrainConfig(lr=0.0, **train_kwargs), device_config)
    run_config |= {"lr": None, "lr_sweep": n}
    if not resume:
        path.unlink(missing_ok=True)   # a later --resume must not find it
    elif path.is_file():
        content = read_json(path, "run_config", "scores")
        check_run_config(path, content["run_config"], run_config)
        scores = content["scores"]
    grids = {spec: [lr * 2.0 ** (i - (n - 1) // 2) for i in range(n)] for spec, lr in learning_rates.items()}
    found = {}
    for spec, lr in tqdm([(s, lr) for s, grid in grids.items() for lr in grid], "lr sweep", leave=False, disable=None):
        tried = scores.setdefault(spec, {})
        if repr(lr) not in tried:
            config = TrainConfig(lr=lr, **train_kwargs)
            tried[repr(lr)] = validation_score(spec, base, task, config, device_config)
        found = {s: choose(grid, scores[s], task.higher_is_better) for s, grid in grids.items()
                 if all(repr(lr) in scores.get(s, {}) for lr in grid)}
        files.write_text(path, json.dumps({"run_config": run_config, "found": found, "scores": scores}, indent=1))
    return found


def choose(grid, scores, higher_is_better):
    """Return {"lr", "val", "best"} of a grid of learning rates; of two equal scores, the smaller learning rate wins."""
    val = [scores[repr(lr)] for lr in grid]
    sign = 1 if higher_is_better else -1
    ranked = sorted((-sign * score, lr) for score, lr in zip(val, grid) if score is not None)
    return {"lr": grid, "val": val, "best": ranked[0][1] if ranked else None}


def validation_score(spec, base, task, train_config, device_config):
    """Return the metric on validation data after a training run that keeps nothing, or None if it diverged."""
    method, options, targets = parse_spec(spec)
    train_config = use_lr_for_head(method, train_config)
    torch.manual_seed(train_config.seed)
    model = adapt(copy.deepcopy(base), method, targets, **options)
    run_folder = RunFolder()
    try:
        train(model, task, train_config, device_config, run_folder, f"{spec} lr {train_config.lr:.2g}")
    except Diverged:
        return None
    return run_folder.log[-1]["metric"]
