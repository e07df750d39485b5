"""What a comparison says: a line a row, the table, results.json, results.md, and a picture."""

import json
import platform
import statistics
from pathlib import Path

import torch

from .. import files
from ..methods import parse_spec

REFERENCE = "lora:rank=8"   # what the others are compared with, seed by seed


def line(row):
    """One row, as it is finished."""
    metric = row.get("failed") or f"{row['metric_name']} {row['metric']:.4g}"
    return f"  {row['method']:<36} seed {row['seed']}  {row['trainable_params']:>12,} numbers  {metric}"


def summarise(rows):
    """One dict a method, in the order of the rows: the first row's plain values, and lists of what the seeds gave."""
    methods = {}
    for row in rows:
        methods.setdefault(row["method"], []).append(row)
    reference = {r["seed"]: r["metric"] for r in methods.get(REFERENCE, [])}
    table = []
    for spec, runs in methods.items():
        sound = [r for r in runs if r["metric"] is not None]
        differences = [r["metric"] - reference[r["seed"]] for r in sound if reference.get(r["seed"]) is not None]
        table.append({**(sound or runs)[0], "metrics": [r["metric"] for r in sound],
                      "differences": differences if spec not in (REFERENCE, "zero-shot") else [],
                      **{key: [r[key] for r in sound if r[key] is not None]
                         for key in ("gap_recovered", "ms_per_step", "seconds", "peak_mb")}})
    return table


def table_lines(rows):
    """The table as lines of Markdown: how many numbers a method trains, what it reaches, and which part that is of
    what full fine-lr_sweep gains."""
    better = "higher" if rows[0]["higher_is_better"] else "lower"
    digits = 3 if rows[0]["metric_name"] == "loss" else 1
    cells = [["method", "trainable params", f"{rows[0]['metric_name']} ({better} is better)",
              f"Δ vs {REFERENCE} (paired)", "gap recovered", "ms/step"]]
    for t in summarise(rows):
        share = statistics.mean(t["gap_recovered"]) if t["gap_recovered"] else None
        cells.append([t["method"], f"{t['trainable_params']:,}", spread(t["metrics"], f".{digits}f") or "diverged",
                      spread(t["differences"], f"+.{digits}f") or "-", "-" if share is None else
                      f"{100 * share:4.0f} {bar(share)}", spread(t["ms_per_step"], ".1f", mean_only=True) or "-"])
    if len({row["seed"] for row in rows}) == 1:   # one difference is no paired comparison
        cells = [row[:3] + row[4:] for row in cells]
    return markdown(cells, left=("method", "gap recovered"))


def cost_lines(rows):
    """A second table: the learning rate of each method, and what a run of it costs."""
    cells = [["method", "% of base", "lr", "ms/step", "s", "peak MB", "file"]]
    for t in summarise(rows):
        mean = {key: spread(t[key], ".1f", mean_only=True) or "-" for key in ("ms_per_step", "seconds", "peak_mb")}
        cells.append([t["method"], f"{t['trainable_percent']:.2f}", "-" if t["lr"] is None else f"{t['lr']:.2g}",
                      mean["ms_per_step"], mean["seconds"], mean["peak_mb"], size(t["adapter_bytes"])])
    return markdown(cells, left=("method",))


def notes(rows):
    """What stands under the table: seeds, the head's numbers, what failed."""
    seeds = sorted({r["seed"] for r in rows if r["method"] != "zero-shot"})
    small = "small differences" if rows[0]["metric_name"] == "loss" else "differences under three points"
    if len(seeds) == 1:
        lines = [f"one seed: {small} show nothing (--seeds 3 for mean, spread and paired differences)"]
    else:
        lines = [f"mean ± standard deviation over seeds {', '.join(map(str, seeds))}: of the batches, of LoRA's and "
                 "DoRA's start, and of the draw where real pictures are drawn by class; the base is one"]
    heads = {r["head_params"] for r in rows if r.get("head_params")}
    if heads:
        lines.append(f"head: {max(heads):,} numbers more, trained beside every method and not counted as adapter's")
    return lines + [f"{r['method']}, seed {r['seed']}: {r['failed']}" for r in rows if r.get("failed")]


def lr_sweep_lines(found):
    """What each method's grid of learning rates gave, and where the best one lies at its edge."""
    lines = []
    for spec, t in found.items():
        grid = "  ".join(f"{lr:.2g}: " + ("diverged" if v is None else f"{v:.4g}") for lr, v in zip(t["lr"], t["val"]))
        edge = t["best"] in (min(t["lr"]), max(t["lr"])) and len(t["lr"]) > 1
        chosen = "none" if t["best"] is None else f"{t['best']:.2g}"
        lines.append(f"  {spec:<44} {grid}  -> {chosen}" + (" (at the edge of the grid)" if edge else ""))
    return lines


def write(out, rows, metadata, lr_sweep=None):
    """Print the table; write out/results.json, results.md and, where matplotlib is installed, results.png.

    metadata: what was run, where, on what: plain values, "task" among them.
    """
    metadata = {"python": platform.python_version(), "torch": torch.__version__, **metadata}
    bare = [{key: value for key, value in row.items() if key != "sample"} for row in rows]
    files.write_text(Path(out) / "results.json", json.dumps({**metadata, "rows": bare, "lr_sweep": lr_sweep}, indent=1,
                                                            ensure_ascii=False) + "\n")
    print("\n".join(["", *table_lines(rows), "", *notes(rows)]))
    info = [f"- {key}: {value.get('result', value) if key == 'base' else value}" for key, value in metadata.items()]
    files.write_text(Path(out) / "results.md", "\n".join(
        [f"# {metadata['task']}", "", *table_lines(rows), "", *cost_lines(rows), "", *(f"- {n}" for n in notes(rows)), "",
         *info]) + "\n")
    drawn = plot(Path(out) / "results.png", rows)
    print(f"{Path(out) / 'results.json'}, results.md (with rates and costs)" + (", results.png" if drawn else ""))
    if not drawn:
        print("for a picture of the table: pip install matplotlib")


def plot(path, rows):
    """The metric against the trainable params, on a log axis, as a PNG that reads on a light and on a dark page: one
    colour a method, its points joined. Returns False where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure   # not pyplot, which would change a notebook's train_config
    except ImportError:
        return False
    grey, lines = "#808080", {}
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for t in (t for t in summarise(rows) if t["metrics"]):
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
    axes.set_xlabel("trainable params beside the head", color=grey)
    axes.set_ylabel(rows[0]["metric_name"], color=grey)
    axes.tick_params(which="both", colors=grey)
    for spine in axes.spines.values():
        spine.set_color(grey)
    if lines:
        axes.legend(frameon=False, labelcolor=grey)
    files.write_whole(path, lambda file: figure.savefig(file, dpi=120, format="png", transparent=True))
    return True


def family(spec):
    """Which curve of the plot a row belongs to: its method, and what else sets it apart besides its size."""
    method, options, _ = parse_spec(spec)
    apart = [f"{key} {value}" for key, value in options.items() if value in ("random", "topk", "pissa")]
    return " ".join([method, *apart])


def spread(values, form, mean_only=False):
    """"mean ± standard deviation" of some numbers; the one number where there is one, None where there is none."""
    if not values:
        return None
    text = f"{statistics.mean(values):{form}}"
    return text if mean_only or len(values) == 1 else text + f" ± {statistics.stdev(values):{form.lstrip('+')}}"


def bar(share, width=10):
    """A share from 0 to 1 as a bar of `width` characters."""
    filled = round(min(max(share, 0), 1) * width)
    return "█" * filled + "·" * (width - filled)


def size(n_bytes):
    if not n_bytes:
        return "-"
    return f"{n_bytes / 1e6:.1f} MB" if n_bytes >= 1e6 else f"{n_bytes / 1e3:.0f} kB"


def markdown(cells, left):
    """Rows of cells as a Markdown table that reads well in a terminal too: every column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    is_left = [name in left for name in cells[0]]
    rule = ["-" * w if l else "-" * (w - 1) + ":" for w, l in zip(widths, is_left)]
    lines = [[c.ljust(w) if l else c.rjust(w) for c, w, l in zip(row, widths, is_left)] for row in cells]
    return ["| " + " | ".join(row) + " |" for row in (lines[0], rule, *lines[1:])]
