"""The results of a comparison: a line per run, the table, results.json, results.md and a plot."""

import json
import platform
import statistics
from pathlib import Path

import torch

from .. import files
from ..methods import parse_spec

REFERENCE = "lora:rank=8"   # the other methods are compared with it, seed by seed
# Standard deviation of a method's metric over base models, by task: docs/results.md
BASE_DEVIATION = {"glyphs B": "2 to 4 points", "arithmetic -": "2 to 14 points", "topics": "0.01 nats"}
SMOKE_TEST = "Smoke test only: the base model is undertrained, so the ranking means nothing."
SMALLEST_GAP = {"accuracy": 5.0, "exact match": 5.0, "loss": 0.05}   # between start and full, to divide by it


def line(row):
    """Return one line about a run that has just finished."""
    result = row.get("failed") or f"{row['metric_name']} {row['metric']:.4g}"
    return f"  {row['method']:<36} seed {row['seed']}  {row['trainable_params']:>12,} trainable params  {result}"


def summarize(rows):
    """Return one dict per method, in the order of the rows: the values of its first run, and lists over its seeds."""
    methods = {}
    for row in rows:
        methods.setdefault(row["method"], []).append(row)
    reference = {r["seed"]: r["metric"] for r in methods.get(REFERENCE, [])}
    table = []
    for spec, runs in methods.items():
        finite = [r for r in runs if r["metric"] is not None]
        differences = [r["metric"] - reference[r["seed"]] for r in finite if reference.get(r["seed"]) is not None]
        table.append({**(finite or runs)[0], "n_runs": len(runs), "metrics": [r["metric"] for r in finite],
                      "differences": differences if spec not in (REFERENCE, "zero-shot") else [],
                      **{key: [r[key] for r in finite if r[key] is not None]
                         for key in ("gap_recovered", "ms_per_step", "seconds", "peak_mb")}})
    return table


def table_lines(rows):
    """Return the table as lines of Markdown: trainable parameters, metric and gap recovered of each method."""
    better = "higher" if rows[0]["higher_is_better"] else "lower"
    digits, no_gap = digits_of(rows), gap_problem(rows)
    cells = [["method", "trainable params", f"{rows[0]['metric_name']} ({better} is better)",
              f"Δ vs {REFERENCE} (paired)", "gap recovered", "ms/step"]]
    for t in summarize(rows):
        cells.append([t["method"], f"{t['trainable_params']:,}", metric_cell(t["metrics"], t["n_runs"], digits),
                      spread(t["differences"], f"+.{digits}f") or "-", gap_cell([] if no_gap else t["gap_recovered"]),
                      spread(t["ms_per_step"], ".1f", mean_only=True) or "-"])
    if len({row["seed"] for row in rows}) == 1:   # a single difference is not a paired comparison
        cells = [row[:3] + row[4:] for row in cells]
    return markdown(cells, left=("method", "gap recovered"))


def cost_lines(rows):
    """Return a second table: the learning rate of each method and the cost of a run."""
    cells = [["method", "% of base", "lr", "ms/step", "s", "peak MB", "file"]]
    for t in summarize(rows):
        mean = {key: spread(t[key], ".1f", mean_only=True) or "-" for key in ("ms_per_step", "seconds", "peak_mb")}
        cells.append([t["method"], f"{t['trainable_percent']:.2f}", "-" if t["lr"] is None else f"{t['lr']:.2g}",
                      mean["ms_per_step"], mean["seconds"], mean["peak_mb"], size(t["adapter_bytes"])])
    return markdown(cells, left=("method",))


def notes(rows, task):
    """Return the lines under the table. task: the name of the task."""
    methods, seeds = {r["method"] for r in rows}, sorted({r["seed"] for r in rows if r["method"] != "zero-shot"})
    deviation = (f"over base models, a metric varies with a standard deviation of {BASE_DEVIATION[task]}"
                 if task in BASE_DEVIATION else "the deviation over base models was not measured on this task")
    if len(seeds) == 1:
        lines = [f"one base model and one seed: {deviation}. --seeds 3 adds means and paired differences"]
    else:
        lines = [f"mean ± standard deviation over seeds {', '.join(map(str, seeds))} of one base model; {deviation}"]
        if REFERENCE not in methods:
            lines.append(f"Δ is empty: it needs the row {REFERENCE}, so add it to --methods")
    problem, start = gap_problem(rows), "zero-shot" if "zero-shot" in methods else "head"
    lines.append(f"gap recovered is empty: {problem}" if problem else
                 f"gap recovered: (metric − {start}) / (full − {start}) in percent, an estimate from one base model")
    heads = {r["head_params"] for r in rows if r.get("head_params")}
    if heads:
        lines.append(f"head: {max(heads):,} more parameters, trained by every method and not part of trainable params")
    return lines + [f"{r['method']}, seed {r['seed']}: {r['failed']}" for r in rows if r.get("failed")]


def gap_problem(rows):
    """Return the reason why the column gap recovered stays empty, or None."""
    methods = {row["method"] for row in rows}
    start = "zero-shot" if "zero-shot" in methods else "head"
    missing = [spec for spec in (start, "full") if spec not in methods]
    if missing:
        return f"it needs the row {' and the row '.join(missing)}, so add it to --methods"
    pairs = [start_and_full(rows, row["seed"]) for row in rows if row["method"] == "full"]
    gaps = [full - first for first, full in pairs if None not in (first, full)]
    if not gaps:
        return f"{start} or full diverged"
    least = min(gaps) if rows[0]["higher_is_better"] else -max(gaps)
    if least < SMALLEST_GAP.get(rows[0]["metric_name"], 0):
        return f"full fine-tuning improves on {start} by only {least:.3g}, which is too little to divide by"


def start_and_full(rows, seed):
    """Return the metrics between which the gap of a seed lies: the start, and full fine-tuning. None if missing."""
    metric = {row["method"]: row["metric"] for row in rows if row["seed"] == seed}
    zero_shot = next((row["metric"] for row in rows if row["method"] == "zero-shot"), None)
    return metric.get("head", zero_shot), metric.get("full")


def lr_sweep_lines(found):
    """Return one line per method: the score of each learning rate, and whether the best is at the edge of the grid."""
    lines = []
    for spec, t in found.items():
        grid = "  ".join(f"{lr:.2g}: " + ("diverged" if v is None else f"{v:.4g}") for lr, v in zip(t["lr"], t["val"]))
        edge = t["best"] in (min(t["lr"]), max(t["lr"])) and len(t["lr"]) > 1
        chosen = "none" if t["best"] is None else f"{t['best']:.2g}"
        lines.append(f"  {spec:<44} {grid}  -> {chosen}" + (" (at the edge of the grid)" if edge else ""))
    return lines


def write(out, rows, metadata, lr_sweep=None):
    """Write results.json, results.md and, with matplotlib, results.png into the folder out; then print the table.

    metadata: plain values on what was run, on which data and device; "task" is its name.
    """
    metadata = {"python": platform.python_version(), "torch": torch.__version__, **metadata}
    bare = [{key: value for key, value in row.items() if key != "sample"} for row in rows]
    table, remarks = table_lines(rows), notes(rows, metadata["task"])
    files.write_text(Path(out) / "results.json", json.dumps({**metadata, "rows": bare, "lr_sweep": lr_sweep}, indent=1,
                                                            ensure_ascii=False) + "\n")
    info = [f"- {key}: {value.get('result', value) if key == 'base' else value}" for key, value in metadata.items()]
    lines = [f"# {metadata['task']}", "", *table, "", *cost_lines(rows), "", *(f"- {n}" for n in remarks), "", *info]
    files.write_text(Path(out) / "results.md", "\n".join(lines) + "\n")
    drawn = plot(Path(out) / "results.png", rows)
    print("\n".join(["", *table, "", *remarks]))
    print(f"{Path(out) / 'results.json'}, results.md (learning rates, costs){', results.png' if drawn else ''}")
    if not drawn:
        print("for a plot of the table: pip install matplotlib")


def plot(path, rows):
    """Plot the metric against the trainable parameters (log scale), one color per method, as a PNG for light and dark
    pages. Returns False if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure   # pyplot would change the settings of a notebook
    except ImportError:
        return False
    grey, lines = "#808080", {}
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for t in (t for t in summarize(rows) if t["metrics"]):
        mean = statistics.mean(t["metrics"])
        if t["trainable_params"]:
            deviation = statistics.stdev(t["metrics"]) if len(t["metrics"]) > 1 else 0
            lines.setdefault(family(t["method"]), []).append((t["trainable_params"], mean, deviation))
        else:
            axes.axhline(mean, color=grey, linestyle=":", linewidth=1)
            axes.annotate(t["method"], (0.01, mean), xycoords=("axes fraction", "data"), va="bottom", color=grey)
    for i, (name, points) in enumerate(lines.items()):
        x, y, deviation = zip(*sorted(points))
        axes.errorbar(x, y, yerr=deviation if any(deviation) else None, marker="osD^vP"[i % 6], fillstyle="none",
                      capsize=3, linewidth=1, color=f"C{i % 10}", label=name)
    axes.set_xscale("log")
    axes.set_xlabel("trainable params (without the head)", color=grey)
    axes.set_ylabel(rows[0]["metric_name"], color=grey)
    axes.tick_params(which="both", colors=grey)
    for spine in axes.spines.values():
        spine.set_color(grey)
    if lines:
        axes.legend(frameon=False, labelcolor=grey)
    files.write_whole(path, lambda file: figure.savefig(file, dpi=120, format="png", transparent=True))
    return True


def family(spec):
    """Return the curve of the plot that a spec belongs to: its method and every option that does not set its size."""
    method, options, _ = parse_spec(spec)
    apart = [f"{key} {value}" for key, value in options.items() if value in ("random", "topk", "pissa")]
    return " ".join([method, *apart])


# ---- cells of a table ----

def digits_of(rows):
    """Return the number of decimals of the metric."""
    return 3 if rows[0]["metric_name"] == "loss" else 1


def metric_cell(metrics, n_runs, digits):
    """Return mean ± standard deviation of the runs that did not diverge, and the number of those that did."""
    if not metrics:
        return "diverged"
    diverged = n_runs - len(metrics)
    return spread(metrics, f".{digits}f") + (f" ({diverged} of {n_runs} diverged)" if diverged else "")


def gap_cell(values):
    """Return the mean gap recovered in percent, with a bar. Above 100 or below 0 its size means little."""
    if not values:
        return "-"
    share = statistics.mean(values)
    percent = "> 100" if share > 1 else "< 0" if share < 0 else f"{100 * share:.0f}"
    filled = round(min(max(share, 0), 1) * 10)
    return f"{percent:>5} {'█' * filled}{'·' * (10 - filled)}"


def spread(values, form, mean_only=False):
    """Return "mean ± standard deviation"; only the mean for one value, and None for no value."""
    if not values:
        return None
    text = f"{statistics.mean(values):{form}}"
    return text if mean_only or len(values) == 1 else text + f" ± {statistics.stdev(values):{form.lstrip('+')}}"


def size(n_bytes):
    if not n_bytes:
        return "-"
    return f"{n_bytes / 1e6:.1f} MB" if n_bytes >= 1e6 else f"{n_bytes / 1e3:.0f} kB"


def markdown(cells, left):
    """Return rows of cells as lines of a Markdown table whose columns line up in a terminal.

    left: titles of the columns that are aligned to the left.
    """
    widths = [max(map(len, column)) for column in zip(*cells)]
    is_left = [name in left for name in cells[0]]
    rule = ["-" * w if l else "-" * (w - 1) + ":" for w, l in zip(widths, is_left)]
    lines = [[c.ljust(w) if l else c.rjust(w) for c, w, l in zip(row, widths, is_left)] for row in cells]
    return ["| " + " | ".join(row) + " |" for row in (lines[0], rule, *lines[1:])]
