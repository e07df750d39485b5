"""Tables and pictures of results: results.json, results.md, and the metric against trained parameters."""

import json
import platform
import statistics
from pathlib import Path

import torch

from . import files

ONE_SEED = "one seed: {} show nothing (--seeds 3 for mean, spread and paired differences)"
REFERENCE = "lora:rank=8"   # what the others are compared with, seed by seed


def summarise(rows):
    """One dict a method, in the order of the rows: means over its seeds, with lists of what varies."""
    methods = {}
    for row in rows:
        methods.setdefault(row["method"], []).append(row)
    reference = {r["seed"]: r["metric"] for r in methods.get(REFERENCE, [])}
    table = []
    for word, runs in methods.items():
        sound = [r for r in runs if r["metric"] is not None]
        differences = [r["metric"] - reference[r["seed"]] for r in sound if reference.get(r["seed"]) is not None]
        recovered = [r["recovered"] for r in sound if r["recovered"] is not None]
        first = (sound or runs)[0]
        table.append({
            **{k: first.get(k) for k in ("method", "adapter", "head", "percent", "lr", "adapter_bytes")},
            "metrics": [r["metric"] for r in sound],
            "differences": differences if word not in (REFERENCE, "start") else [],
            "recovered": statistics.mean(recovered) if recovered else None,
            "ms": statistics.mean([r["ms_per_step"] for r in sound if r["ms_per_step"]] or [0]) or None,
            "seconds": statistics.mean([r["seconds"] for r in sound] or [0]),
            "failed": next((r["failed"] for r in runs if r.get("failed")), None)})
    return table


def mean_and_spread(values, digits):
    if not values:
        return "-"
    text = f"{statistics.mean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def bar(share, width=10):
    """A share from 0 to 1 as a bar of `width` characters."""
    filled = round(min(max(share, 0), 1) * width)
    return "█" * filled + "·" * (width - filled)


def size(n_bytes):
    if not n_bytes:
        return "-"
    return f"{n_bytes / 1e6:.1f} MB" if n_bytes >= 1e6 else f"{n_bytes / 1e3:.0f} kB"


def table_lines(rows):
    """The table as lines of Markdown that read well in a terminal too: every column as wide as its widest cell."""
    name, better = rows[0]["metric_name"], "higher" if rows[0]["higher_is_better"] else "lower"
    digits = 3 if name == "loss" else 1
    table = summarise(rows)
    paired = any(len(t["differences"]) > 1 for t in table)
    head = ["method", "adapter params", "% of base", f"{name} ({better} is better)", "share of full's gain", "lr",
            "ms/step", "s", "file"]
    if paired:
        head.insert(4, f"minus {REFERENCE}, paired")
    cells = [head]
    for t in table:
        share = "-" if t["recovered"] is None else f"{100 * t['recovered']:4.0f} {bar(t['recovered'])}"
        metric = mean_and_spread(t["metrics"], digits) if t["metrics"] else "diverged"
        row = [t["method"], f"{t['adapter'] or 0:,}", f"{t['percent'] or 0:.2f}", metric, share,
               "-" if t["lr"] is None else f"{t['lr']:.2g}", "-" if not t["ms"] else f"{t['ms']:.1f}",
               f"{t['seconds']:.1f}", size(t["adapter_bytes"])]
        if paired:
            row.insert(4, signed(t["differences"], digits))
        cells.append(row)
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    left = [i in (0, head.index("share of full's gain")) for i in range(len(head))]

    def line(row):
        return "| " + " | ".join(c.ljust(w) if l else c.rjust(w) for c, w, l in zip(row, widths, left)) + " |"

    rule = "| " + " | ".join("-" * w if l else "-" * (w - 1) + ":" for w, l in zip(widths, left)) + " |"
    return [line(cells[0]), rule, *map(line, cells[1:])]


def signed(differences, digits):
    if not differences:
        return "-"
    text = f"{statistics.mean(differences):+.{digits}f}"
    return text + (f" ± {statistics.stdev(differences):.{digits}f}" if len(differences) > 1 else "")


def notes(rows):
    """What stands under the table: seeds, head parameters, what failed, and what the SVF-type methods learned."""
    seeds = sorted({r["seed"] for r in rows if r["method"] != "start"})
    small = "small differences" if rows[0]["metric_name"] == "loss" else "differences under three points"
    lines = [ONE_SEED.format(small) if len(seeds) == 1 else
             f"mean ± standard deviation over seeds {', '.join(map(str, seeds))}: of the batches, of LoRA's and DoRA's "
             "start, and of the draw where real pictures are drawn by class; the base is one"]
    heads = {r["head"] for r in rows if r.get("head")}
    if heads:
        lines.append(f"head: {max(heads):,} parameters more, trained beside every method and not counted as adapter's")
    lines += [f"{r['method']}, seed {r['seed']}: {r['failed']}" for r in rows if r.get("failed")]
    spectra = [r for r in rows if r.get("learned") and r["seed"] == seeds[0]]
    if spectra:
        lines.append(f"learned, seed {seeds[0]}: largest singular value before → after, mean of the layers "
                     "(and largest |M_ij|, for svfit |s_i − σ_i|)")
    for r in spectra:
        cells = [f"{t} {x['before']:.2f}→{x['after']:.2f} ({x['max_M']:.2f})" for t, x in r["learned"].items()]
        lines.append(f"  {r['method']:<{max(len(r['method']) for r in spectra)}}  " + "  ".join(cells))
    return lines


def show_tuning(found):
    """Lines that say what each method's grid gave, and where the best rate lies at its edge."""
    lines = []
    for word, t in found.items():
        grid = "  ".join(f"{lr:.2g}: " + ("diverged" if v is None else f"{v:.4g}") for lr, v in zip(t["lr"], t["val"]))
        edge = t["best"] in (min(t["lr"]), max(t["lr"])) and len(t["lr"]) > 1
        chosen = "none" if t["best"] is None else f"{t['best']:.2g}"
        lines.append(f"  {word:<44} {grid}  -> {chosen}" + (" (at the edge of the grid)" if edge else ""))
    return lines


def write_results(out, rows, about, tuning=None):
    """out/results.json and out/results.md. about: what was run, where, on what; plain values."""
    out = Path(out)
    about = {"python": platform.python_version(), "torch": torch.__version__, **about}
    bare = [{k: v for k, v in row.items() if k != "sample"} for row in rows]
    files.write_text(out / "results.json", json.dumps({**about, "rows": bare, "tuning": tuning}, indent=1,
                                                      ensure_ascii=False) + "\n")
    lines = [f"# {about['task']}", "", *table_lines(rows), "", *(f"- {line}" for line in notes(rows)), "",
             *(f"- {k}: {v}" for k, v in about.items())]
    files.write_text(out / "results.md", "\n".join(lines) + "\n")


def need_matplotlib():
    """Raise ValueError where matplotlib is missing; asked before the work starts."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")


def plot(path, rows):
    """The metric against adapter parameters on a log axis, as a PNG."""
    need_matplotlib()
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    table = summarise(rows)
    methods = list(dict.fromkeys(t["method"].split(":")[0] for t in table))   # one colour each
    for t in table:
        if not t["metrics"]:
            continue
        mean = statistics.mean(t["metrics"])
        if not t["adapter"]:
            axes.axhline(mean, color="grey", linestyle=":", linewidth=1)
            axes.annotate(t["method"], (0.01, mean), xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
            continue
        spread = statistics.stdev(t["metrics"]) if len(t["metrics"]) > 1 else 0
        axes.errorbar(t["adapter"], mean, yerr=spread, marker="o", capsize=3,
                      color=f"C{methods.index(t['method'].split(':')[0]) % 10}")
        axes.annotate(t["method"], (t["adapter"], mean), xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", xlabel="adapter parameters", ylabel=rows[0]["metric_name"])
    files.write_whole(path, lambda file: figure.savefig(file, dpi=120, format="png"))
    pyplot.close(figure)
