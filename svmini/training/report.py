"""The results of a comparison: a line per run, the table, results.json, results.md and a plot."""

import json
import platform
import statistics
from contextlib import contextmanager
from pathlib import Path

import torch

from .. import files
from ..methods import parse_spec

REFERENCE = "lora:rank=8"   # the other methods are compared with it, seed by seed
# Standard deviation of a method's metric over base models, by task: docs/results.md
BASE_DEVIATION = {"glyphs B": "2 to 4 points", "arithmetic -": "2 to 14 points", "topics": "0.01 nats"}
SMOKE_TEST = "Smoke test only: the base model is undertrained, so the ranking means nothing."
SMALLEST_GAP = {"accuracy": 5.0, "exact match": 5.0, "loss": 0.05}   # between start and full, to divide by it
GRAY = "#808080"   # readable on light and dark pages
STYLE = dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "text.color"), GRAY) | {
    "legend.frameon": False, "legend.fontsize": "small"}


def line(row):
    """Return one line about a run that has just finished."""
    result = row.get("failed") or f"{row['metric_name']} {row['metric']:.4g}"
    return f"  {row['method']:<36} seed {row['seed']}  {row['trainable_params']:>12,} trainable params  {result}"


def reference_of(rows):
    """Return the method of the differences: REFERENCE, which --targets may have completed."""
    return next((row["method"] for row in rows if row["method"].partition("@")[0] == REFERENCE), REFERENCE)


def best_of(rows, accept):
    """Return the best row of the first seed whose method spec is accepted and which did not diverge, or None."""
    good = [r for r in rows if r["seed"] == rows[0]["seed"] and r["metric"] is not None and accept(r["method"])]
    return max(good, key=lambda r: r["metric"] if r["higher_is_better"] else -r["metric"], default=None)


def summarize(rows):
    """Return one dict per method, in the order of the rows: the values of its first run, and lists over its seeds."""
    methods = {}
    for row in rows:
        methods.setdefault(row["method"], []).append(row)
    reference, no_gap = reference_of(rows), gap_problem(rows)
    its_metric = {r["seed"]: r["metric"] for r in methods.get(reference, [])}
    table = []
    for spec, runs in methods.items():
        finite = [r for r in runs if r["metric"] is not None]
        lists = {key: [r[key] for r in finite if r[key] is not None]
                 for key in ("gap_recovered", "ms_per_step", "seconds", "peak_mb")}
        differences = [r["metric"] - its_metric[r["seed"]] for r in finite if its_metric.get(r["seed"]) is not None]
        table.append({**(finite or runs)[0], "n_runs": len(runs), "n_diverged": len(runs) - len(finite),
                      "metrics": [r["metric"] for r in finite], **lists, **({"gap_recovered": []} if no_gap else {}),
                      "differences": differences if spec not in (reference, "zero-shot") else []})
    return table


def table_lines(table, reference):
    """Return a summary as lines of Markdown: trainable parameters, metric, differences and gap recovered.

    reference: the method of the differences; None leaves them out, because a single difference is no paired comparison.
    """
    better = "higher" if table[0]["higher_is_better"] else "lower"
    digits = 3 if table[0]["metric_name"] == "loss" else 1
    cells = [["method", "trainable params", f"{table[0]['metric_name']} ({better} is better)",
              f"Δ vs {reference} (paired)", "gap recovered", "ms/step"]]
    for t in table:
        diverged = f" ({t['n_diverged']} of {t['n_runs']} diverged)" if t["n_diverged"] else ""
        cells.append([t["method"], f"{t['trainable_params']:,}", spread(t["metrics"], f".{digits}f") + diverged,
                      spread(t["differences"], f"+.{digits}f"), gap_cell(t["gap_recovered"]), mean(t["ms_per_step"])])
    if not reference:
        cells = [row[:3] + row[4:] for row in cells]
    return markdown(cells, left=("method", "gap recovered"))


def cost_lines(table):
    """Return a second table: the learning rate of each method and the cost of a run."""
    cells = [["method", "% of base", "lr", "ms/step", "s", "peak MB", "file"]]
    for t in table:
        cells.append([t["method"], f"{t['trainable_percent']:.2f}", "-" if t["lr"] is None else f"{t['lr']:.2g}",
                      mean(t["ms_per_step"]), mean(t["seconds"]), mean(t["peak_mb"]), size(t["adapter_bytes"])])
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
        if reference_of(rows) not in methods:
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
        return f"it needs the row {' and the row '.join(missing)}, so add {'them' if missing[1:] else 'it'} to --methods"
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


def write(out, rows, task, train_kwargs, device_config, base_metadata, lr_sweep=None):
    """Write results.json, results.md and, with matplotlib, results.png into the folder out; then print the table.

    train_kwargs: the arguments of TrainConfig that all runs share.
    """
    metadata = {"python": platform.python_version(), "torch": torch.__version__, "task": task.name,
                "device": device_config.reason, "dtype": str(device_config.dtype), "steps": train_kwargs["steps"],
                "train_config": train_kwargs, **task.data_config,
                "base": {key: value for key, value in base_metadata.items() if key != "tokenizer"}}
    bare = [{key: value for key, value in row.items() if key != "sample"} for row in rows]
    content = {**metadata, "rows": bare, "lr_sweep": lr_sweep}
    files.write_text(Path(out) / "results.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    table, remarks = summarize(rows), notes(rows, task.name)
    lines = table_lines(table, reference_of(rows) if len({row["seed"] for row in rows}) > 1 else None)
    info = [f"- {key}: {value.get('result', value) if key == 'base' else value}" for key, value in metadata.items()]
    files.write_text(Path(out) / "results.md", "\n".join([
        f"# {task.name}", "", *lines, "", *cost_lines(table), "", *(f"- {n}" for n in remarks), "", *info, ""]))
    drawn = plot(Path(out) / "results.png", table)
    print("", *lines, "", *remarks, sep="\n")
    print(f"{Path(out) / 'results.json'}, results.md (learning rates, costs){', results.png' if drawn else ''}")
    if not drawn:
        print("for a plot of the table: pip install matplotlib")


@contextmanager
def figure(path, figsize):
    """Yield a matplotlib figure, which is then saved as a PNG for light and dark pages; None without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure   # pyplot would change the settings of a notebook
    except ImportError:
        yield None
        return
    with matplotlib.rc_context(STYLE):
        yield (drawn := Figure(figsize=figsize, layout="constrained"))
        files.write_whole(path, lambda file: drawn.savefig(file, dpi=120, format="png", transparent=True))


def plot(path, table):
    """Plot the metric of a summary against the trainable parameters (log scale), one color per method, as a PNG.
    Returns False if matplotlib is missing."""
    with figure(path, (8, 5)) as drawn:
        if drawn is None:
            return False
        axes, lines = drawn.subplots(), {}
        for t in (t for t in table if t["metrics"]):
            y = statistics.mean(t["metrics"])
            if t["trainable_params"]:
                deviation = statistics.stdev(t["metrics"]) if len(t["metrics"]) > 1 else 0
                lines.setdefault(family(t["method"]), []).append((t["trainable_params"], y, deviation))
            else:
                axes.axhline(y, color=GRAY, linestyle=":", linewidth=1)
                axes.annotate(t["method"], (0.01, y), xycoords=("axes fraction", "data"), va="bottom")
        for i, (name, points) in enumerate(lines.items()):
            x, y, deviation = zip(*sorted(points))
            axes.errorbar(x, y, yerr=deviation if any(deviation) else None, marker="osD^vP"[i % 6], fillstyle="none",
                          capsize=3, linewidth=1, color=f"C{i % 10}", label=name)
        axes.set_xscale("log")
        axes.set_xlabel("trainable params (without the head)")
        axes.set_ylabel(table[0]["metric_name"])
        if lines:
            axes.legend()
    return True


def family(spec):
    """Return the curve of the plot that a spec belongs to: its method and every option that does not set its size."""
    method, options, _ = parse_spec(spec)
    apart = [f"{key} {value}" for key, value in options.items() if value in ("random", "topk", "pissa")]
    return " ".join([method, *apart])


# ---- cells of a table ----

def gap_cell(values):
    """Return the mean gap recovered in percent, with a bar. Above 100 or below 0 its size means little."""
    if not values:
        return "-"
    share = statistics.mean(values)
    percent = "> 100" if share > 1 else "< 0" if share < 0 else f"{100 * share:.0f}"
    filled = round(min(max(share, 0), 1) * 10)
    return f"{percent:>5} {'█' * filled}{'·' * (10 - filled)}"


def spread(values, form):
    """Return "mean ± standard deviation", only the value if there is one, and "-" without values."""
    deviation = f" ± {statistics.stdev(values):{form.lstrip('+')}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{deviation}" if values else "-"


def mean(values):
    return f"{statistics.mean(values):.1f}" if values else "-"


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
