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
from ..methods import METHODS, WHOLE, options_of, parse_word, same_word
from ..model_file import about_made_of, save_model
from .checkpoint import Run, after_json, differences, forget, read_json
from .loop import Diverged, evaluate, train


def plan(words, base, targets, rates, lr=None):
    """{method word: learning rate}, each method once. `targets` are written into the words that name none: "svft" with
    targets ("query",) becomes "svft@query".

    rates: the tuned learning rates, by word; lr replaces them. Raises InputError for a word that does not fit the
    base: before the work, not after it.
    """
    tuned, planned, known = {same_word(word): rate for word, rate in rates.items()}, {}, set()
    for word in words:
        meaning = fitting(word, base, targets)
        method, _, own_targets = parse_word(word)
        first = METHODS[method].lr if method in METHODS else 1e-3
        full_word = word if own_targets or not targets or method in WHOLE else f"{word}@{','.join(targets)}"
        if meaning not in known:
            planned[full_word] = lr or tuned.get(same_word(word), first)
        known.add(meaning)
    return planned


def all_words(main, base, targets):
    """The main words and every method's examples, as far as they fit the base; what is left out is said."""
    words = list(main)
    for method, cls in METHODS.items():
        words += (f"{method}:{example}".replace(":@", "@").rstrip(":") for example in cls.examples)
    left = {}
    for word in words:
        try:
            left.setdefault(fitting(word, base, targets), word)
        except InputError as error:
            print(f"left out: {word}: {error}")
    return list(left.values())


def fitting(word, base, targets):
    """What a word means on this base, equal for words that mean the same. Raises InputError where it does not fit."""
    method, options, own_targets = parse_word(word)
    if method == "head" and not base.also_train:
        raise InputError("this model has no head of its own to train: leave out the word head")
    if method in WHOLE:
        return same_word(word)
    targets = own_targets or targets or base.targets
    fitting_linears(base, method, targets, options, base.also_train)
    return *same_word(word)[:2], frozenset(targets)


def adapted_line(base, targets):
    """Which layers are adapted where a word names none, in words, and which nn.Linears are left as they are."""
    found, tied = find_linears(base, targets or base.targets, base.also_train), tied_parameters(base)
    left = {name.rsplit(".", 1)[-1] for name, part in base.named_modules() if isinstance(part, torch.nn.Linear)
            and name not in found and not is_inside(name, base.also_train) and id(part.weight) not in tied}
    return (f"adapted, where a word names no targets: {', '.join(targets or base.targets)}, {len(found)} layers"
            + (f"; left as they are: {', '.join(sorted(left))}" if left else ""))


def run(word, base, task, settings, machine, out, *, resume=False, save_every=0, eval_every=0, about=None,
        about_base=None):
    """Adapt a copy of the base by a method word, train, test, keep. Returns the row of results.json.

    The run's folder, out/runs/WORD-seedN, then holds metrics.jsonl, row.json, and adapter.pt, or model.pt for full
    fine-tuning. With resume, a row that was finished under the same conditions is returned as it is. A loss that is
    not finite makes a row without a metric. about: plain values that the adapter's file keeps, and model.pt besides
    what about_base says of the base.
    """
    method, options, targets = parse_word(word)
    settings = head_alone(method, settings)
    conditions = conditions_of(base, task, settings, machine) | {
        "method": method, "options": options_of(method) | options, "targets": targets or base.targets}
    folder = run_folder(out, word, settings.seed)
    this = Run(folder, conditions, resume, save_every, eval_every)
    kept = this.finished()
    if kept is not None:
        return kept
    torch.manual_seed(settings.seed)                              # LoRA's and DoRA's A are drawn by it
    model = adapt(copy.deepcopy(base), method, targets, **options)
    row = empty_row(word, task, settings, count_trainable(model), base)
    on_cuda = machine.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    try:
        row["ms_per_step"] = train(model, task, settings, machine, this, word)
        row["seconds"] = time.perf_counter() - began
        row["metric"] = evaluate(model, task, "test", machine)["metric"]
    except Diverged as error:
        return row | {"failed": str(error)}
    path = folder / ("model.pt" if method == "full" else "adapter.pt")
    if method == "full":
        save_model(path, model, about_made_of(about_base or {}, about or {}))
    else:
        save_adapter(model, path, about)
    row["adapter_bytes"] = path.stat().st_size
    row["peak_mb"] = torch.cuda.max_memory_allocated() / 2**20 if on_cuda else None
    row["sample"] = task.show(model)
    this.finish(row)
    return row


def conditions_of(base, task, settings, machine):
    """All that decides a result besides the method, as plain values."""
    return task.facts | asdict(settings) | {"base": fingerprint(digests(base)), "model": asdict(base.config),
                                            "dtype": str(machine.dtype)}


def start_row(base, task, settings, machine):
    """The base as it is on the new task, where it has no head to train: what the others are compared with."""
    model = copy.deepcopy(base).to(machine.device)
    row = empty_row("start", task, settings, {"adapter": 0, "head": 0}, base)
    return row | {"lr": None, "metric": evaluate(model, task, "test", machine)["metric"], "sample": task.show(model)}


def empty_row(word, task, settings, counts, base):
    """A row of results.json before anything was measured."""
    heads = sum(p.numel() for head in heads_of(base, base.also_train) for p in head.parameters())
    backbone = sum(p.numel() for p in base.parameters()) - heads
    return {"method": word, "adapter": counts["adapter"], "head": counts["head"],
            "percent": 100 * counts["adapter"] / backbone, "metric": None, "metric_name": task.metric,
            "higher_is_better": task.higher_is_better, "recovered": None, "seconds": 0.0, "ms_per_step": None,
            "peak_mb": None, "adapter_bytes": 0, "seed": settings.seed, "lr": settings.lr, "sample": None}


def recover(rows):
    """Fill in each row's share of full's gain, (metric − start) / (full − start): what part of that which full
    fine-tuning gains over the start a method gains too. The start is the row head (ViT) or start (GPT)."""
    metric = {(row["method"], row["seed"]): row["metric"] for row in rows}
    zero_shot = next((row["metric"] for row in rows if row["method"] == "start"), None)
    for row in rows:
        start, full = metric.get(("head", row["seed"]), zero_shot), metric.get(("full", row["seed"]))
        if None not in (start, full, row["metric"]) and (full > start) == row["higher_is_better"] and full != start:
            row["recovered"] = (row["metric"] - start) / (full - start)


def tune(rates, base, task, settings, machine, out, points, resume=False):
    """Equally many learning rates for every method: `points` of them, a factor 2 apart, around the one in `rates`.

    Scored on validation data alone, at the seed of settings. Returns {word: {"lr": [...], "val": [...], "best": lr}}
    and keeps it in out/tune.json, where a resumed command finds it. best is None where every rate diverged.
    """
    path, found = Path(out) / "tune.json", {}
    conditions = after_json(conditions_of(base, task, settings, machine))
    if not resume:
        path.unlink(missing_ok=True)   # a later --resume must not meet it
    elif path.is_file():
        content = read_json(path, "conditions", "found")
        different = differences(content["conditions"], conditions)
        if different:
            raise InputError(f"{path} was made under other conditions: {'; '.join(different)}: give another --out")
        found = content["found"]
    jobs = [(word, lr * 2.0 ** (i - (points - 1) // 2)) for word, lr in rates.items() for i in range(points)]
    for word, lr in tqdm(jobs, "tune", leave=False, disable=None):
        scores = found.setdefault(word, {"lr": [], "val": [], "best": None})
        if lr in scores["lr"]:
            continue
        scores["lr"].append(lr)
        scores["val"].append(validation_score(word, lr, base, task, settings, machine))
        sign = 1 if task.higher_is_better else -1
        sound = [(sign * v, -r, r) for v, r in zip(scores["val"], scores["lr"]) if v is not None]   # ties: the smaller
        scores["best"] = max(sound)[-1] if sound else None
        files.write_text(path, json.dumps({"conditions": conditions, "found": found}, indent=1))
    return found


def validation_score(word, lr, base, task, settings, machine):
    """The metric on validation data after a training that keeps nothing; None where it diverged."""
    method, options, targets = parse_word(word)
    settings = head_alone(method, replace(settings, lr=lr))
    torch.manual_seed(settings.seed)
    model = adapt(copy.deepcopy(base), method, targets, **options)
    this = Run()
    try:
        train(model, task, settings, machine, this, f"{word} lr {lr:.2g}")
    except Diverged:
        return None
    return this.log[-1]["metric"]


def head_alone(method, settings):
    """A head alone has one learning rate, and it is the head's."""
    return replace(settings, head_lr=settings.lr) if method == "head" else settings


def run_folder(out, word, seed):
    """The folder of a run, its method word made a name that every system takes."""
    name = re.sub(r"[^\w=.,+-]", "_", word)
    return Path(out) / "runs" / f"{name}-seed{seed}"


def begin_anew(words, seeds, out):
    """Delete what earlier runs of these words and seeds left: a later --resume must not meet it."""
    for word in words:
        for seed in seeds:
            forget(run_folder(out, word, seed))
