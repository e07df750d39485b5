"""Adapt one base by several methods, at equal effort, and measure."""

import copy
import json
import re
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
from ..methods import METHODS, WITHOUT_ADAPTERS, options_of, parse_spec, canonical_spec
from ..model_file import derived_metadata, save_model
from .checkpoint import RunFolder, after_json, differences, delete_run, read_json
from .loop import Diverged, evaluate, train


def plan(specs, base, targets, learning_rates, lr=None):
    """{method spec: learning rate}, each method once. `targets` are written into the specs that name none: "svft" with
    targets ("query",) becomes "svft@query".

    learning_rates: the tuned learning learning_rates, by spec; lr replaces them. Raises InputError for a spec that does not fit the
    base: before the work, not after it.
    """
    tuned, planned, known = {canonical_spec(spec): rate for spec, rate in learning_rates.items()}, {}, set()
    for spec in specs:
        meaning = fitting(spec, base, targets)
        method, _, own_targets = parse_spec(spec)
        first = METHODS[method].lr if method in METHODS else 1e-3
        full_spec = spec if own_targets or not targets or method in WITHOUT_ADAPTERS else f"{spec}@{','.join(targets)}"
        if meaning not in known:
            planned[full_spec] = lr or tuned.get(canonical_spec(spec), first)
        known.add(meaning)
    return planned


def all_specs(main, base, targets):
    """The main specs and every method's examples, as far as they fit the base; what is left out is said."""
    specs = list(main)
    for method, cls in METHODS.items():
        specs += (f"{method}:{example}".replace(":@", "@").rstrip(":") for example in cls.examples)
    left = {}
    for spec in specs:
        try:
            left.setdefault(fitting(spec, base, targets), spec)
        except InputError as error:
            print(f"left out: {spec}: {error}")
    return list(left.values())


def fitting(spec, base, targets):
    """What a spec means on this base, equal for specs that mean the same. Raises InputError where it does not fit."""
    method, options, own_targets = parse_spec(spec)
    if method == "head" and not base.also_train:
        raise InputError("this model has no head of its own to train: leave out the spec head")
    if method in WITHOUT_ADAPTERS:
        return canonical_spec(spec)
    targets = own_targets or targets or base.targets
    fitting_linears(base, method, targets, options, base.also_train)
    return *canonical_spec(spec)[:2], frozenset(targets)


def describe_targets(base, targets):
    """Which layers are adapted where a spec names none, in specs, and which nn.Linears are left as they are."""
    found, tied = find_linears(base, targets or base.targets, base.also_train), tied_parameters(base)
    left = {name.rsplit(".", 1)[-1] for name, part in base.named_modules() if isinstance(part, torch.nn.Linear)
            and name not in found and not is_inside(name, base.also_train) and id(part.weight) not in tied}
    return (f"adapted, where a spec names no targets: {', '.join(targets or base.targets)}, {len(found)} layers"
            + (f"; left as they are: {', '.join(sorted(left))}" if left else ""))


def run(spec, base, task, train_config, device_config, out, *, resume=False, save_every=0, eval_every=0, metadata=None,
        base_metadata=None):
    """Adapt a copy of the base by a method spec, train, test, keep. Returns the row of results.json.

    The run's folder, out/runs/WORD-seedN, then holds metrics.jsonl, row.json, and adapter.pt, or model.pt for full
    fine-tuning. With resume, a row that was finished under the same run_config is returned as it is. A loss that is
    not finite makes a row without a metric. metadata: plain values that the adapter's file keeps, and model.pt besides
    what base_metadata says of the base.
    """
    method, options, targets = parse_spec(spec)
    train_config = head_alone(method, train_config)
    run_config = run_config_of(base, task, train_config, device_config) | {
        "method": method, "options": options_of(method) | options, "targets": targets or base.targets}
    folder = run_path(out, spec, train_config.seed)
    this = RunFolder(folder, run_config, resume, save_every, eval_every)
    kept = this.finished()
    if kept is not None:
        return kept
    torch.manual_seed(train_config.seed)                              # LoRA's and DoRA's A are drawn by it
    model = adapt(copy.deepcopy(base), method, targets, **options)
    row = empty_row(spec, task, train_config, count_trainable(model), base)
    on_cuda = device_config.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    try:
        row["ms_per_step"] = train(model, task, train_config, device_config, this, spec)
        row["seconds"] = time.perf_counter() - began
        row["metric"] = evaluate(model, task, "test", device_config)["metric"]
    except Diverged as error:
        return row | {"failed": str(error)}
    path = folder / ("model.pt" if method == "full" else "adapter.pt")
    if method == "full":
        save_model(path, model, derived_metadata(base_metadata or {}, metadata or {}))
    else:
        save_adapter(model, path, metadata)
    row["adapter_bytes"] = path.stat().st_size
    row["peak_mb"] = torch.cuda.max_memory_allocated() / 2**20 if on_cuda else None
    row["sample"] = task.show(model)
    this.finish(row)
    return row


def run_config_of(base, task, train_config, device_config):
    """All that decides a result besides the method, as plain values."""
    return task.data_config | asdict(train_config) | {"base": fingerprint(digests(base)), "model": asdict(base.config),
                                            "dtype": str(device_config.dtype)}


def zero_shot_row(base, task, train_config, device_config):
    """The base as it is on the new task, where it has no head to train: what the others are compared with."""
    model = copy.deepcopy(base).to(device_config.device)
    row = empty_row("zero-shot", task, train_config, {"adapter": 0, "head": 0}, base)
    return row | {"lr": None, "metric": evaluate(model, task, "test", device_config)["metric"], "sample": task.show(model)}


def empty_row(spec, task, train_config, counts, base):
    """A row of results.json before anything was measured."""
    heads = sum(p.numel() for head in heads_of(base, base.also_train) for p in head.parameters())
    backbone = sum(p.numel() for p in base.parameters()) - heads
    return {"method": spec, "trainable_params": counts["adapter"], "head_params": counts["head"],
            "trainable_percent": 100 * counts["adapter"] / backbone, "metric": None, "metric_name": task.metric,
            "higher_is_better": task.higher_is_better, "gap_recovered": None, "seconds": 0.0, "ms_per_step": None,
            "peak_mb": None, "adapter_bytes": 0, "seed": train_config.seed, "lr": train_config.lr, "sample": None}


def fill_gap_recovered(rows):
    """Fill in each row's gap recovered, (metric − start) / (full − start): what part of that which full
    fine-tuning gains over the start a method gains too. The start is the row head (ViT) or start (GPT)."""
    metric = {(row["method"], row["seed"]): row["metric"] for row in rows}
    zero_shot = next((row["metric"] for row in rows if row["method"] == "zero-shot"), None)
    for row in rows:
        start, full = metric.get(("head", row["seed"]), zero_shot), metric.get(("full", row["seed"]))
        if None not in (start, full, row["metric"]) and (full > start) == row["higher_is_better"] and full != start:
            row["gap_recovered"] = (row["metric"] - start) / (full - start)


def lr_sweep(learning_rates, base, task, train_config, device_config, out, points, resume=False):
    """Equally many learning learning_rates for every method: `points` of them, a factor 2 apart, around the one in `learning_rates`.

    Scored on validation data alone, at the seed of train_config. Returns {spec: {"lr": [...], "val": [...], "best": lr}}
    and keeps it in out/lr_sweep.json, where a resumed command finds it. best is None where every rate diverged.
    """
    path, found = Path(out) / "lr_sweep.json", {}
    run_config = after_json(run_config_of(base, task, train_config, device_config))
    if not resume:
        path.unlink(missing_ok=True)   # a later --resume must not meet it
    elif path.is_file():
        content = read_json(path, "run_config", "found")
        different = differences(content["run_config"], run_config)
        if different:
            raise InputError(f"{path} was made with another run config: {'; '.join(different)}: give another --out")
        found = content["found"]
    jobs = [(spec, lr * 2.0 ** (i - (points - 1) // 2)) for spec, lr in learning_rates.items() for i in range(points)]
    for spec, lr in tqdm(jobs, "lr sweep", leave=False, disable=None):
        scores = found.setdefault(spec, {"lr": [], "val": [], "best": None})
        if lr in scores["lr"]:
            continue
        scores["lr"].append(lr)
        scores["val"].append(validation_score(spec, lr, base, task, train_config, device_config))
        sign = 1 if task.higher_is_better else -1
        sound = [(sign * v, -r, r) for v, r in zip(scores["val"], scores["lr"]) if v is not None]   # ties: the smaller
        scores["best"] = max(sound)[-1] if sound else None
        files.write_text(path, json.dumps({"run_config": run_config, "found": found}, indent=1))
    return found


def validation_score(spec, lr, base, task, train_config, device_config):
    """The metric on validation data after a training that keeps nothing; None where it diverged."""
    method, options, targets = parse_spec(spec)
    train_config = head_alone(method, replace(train_config, lr=lr))
    torch.manual_seed(train_config.seed)
    model = adapt(copy.deepcopy(base), method, targets, **options)
    this = RunFolder()
    try:
        train(model, task, train_config, device_config, this, f"{spec} lr {lr:.2g}")
    except Diverged:
        return None
    return this.log[-1]["metric"]


def head_alone(method, train_config):
    """A head alone has one learning rate, and it is the head's."""
    return replace(train_config, head_lr=train_config.lr) if method == "head" else train_config


def run_path(out, spec, seed):
    """The folder of a run, its method spec made a name that every system takes."""
    name = re.sub(r"[^\w=.,+-]", "_", spec)
    return Path(out) / "runs" / f"{name}-seed{seed}"


def delete_runs(specs, seeds, out):
    """Delete what earlier runs of these specs and seeds left: a later --resume must not meet it."""
    for spec in specs:
        for seed in seeds:
            delete_run(run_path(out, spec, seed))
