"""The tables and figures of docs/evidence.md; docs/reproduce/tables.py writes them.

The statistics are those of docs/reproduce/hypotheses.md: seeds are averaged within a base, tests are paired t-tests over
bases, and Holm's method corrects the eight confirmatory comparisons.
"""

import math
import statistics

from figures import GRAY, gray_axes
from measurements import holm, markdown, t_p_value, t_quantile

N_BASES = 10
LEARNED = 90   # smallest test metric of a base on the task that it was pretrained on, in percent
SEEDS_PER_BASE = {"movie reviews": 1, "arithmetic, 900 steps": 1}   # the others have 2
ARITHMETIC = "arithmetic, 300 steps"
LONG = "arithmetic, 900 steps"
FIRST_NEW_BASE = 20   # arithmetic bases of width 128 from here on were made later, on another machine
NEW = f"{ARITHMETIC}, new bases"
WIDTHS = (64, 128, 256)
REVIEWS = "movie reviews"
PLAIN, PLAIN_RANDOM = "svft:pattern=plain", "svft:pattern=plain,basis=random"
BANDED2, BANDED8 = "svft:off_diagonals=2", "svft:off_diagonals=8"
BANDED8_RANDOM = "svft:off_diagonals=8,basis=random"
POSITIONS, POSITIONS8 = "svft:pattern=random,off_diagonals=0", "svft:pattern=random,off_diagonals=8"
MASK, MASK2 = "random_mask:off_diagonals=0", "random_mask:off_diagonals=2"
LORA, VERA = "lora:rank=8", "vera:rank=256"

CONFIRMATORY = [   # (task, what is compared, row, row that is subtracted), in the order of hypotheses.md
    ("glyphs", "plain M: singular vectors − random basis", PLAIN, PLAIN_RANDOM),
    ("glyphs", "plain M: diagonal − random positions", PLAIN, POSITIONS),
    ("glyphs", "plain M − random mask", PLAIN, MASK),
    ("glyphs", "banded 8: singular vectors − random basis", BANDED8, BANDED8_RANDOM),
    ("glyphs", "banded 2 − LoRA rank 8", BANDED2, LORA),
    ("glyphs", "banded 2 − full fine-tuning", BANDED2, "full"),
    (ARITHMETIC, "banded 8: singular vectors − random basis", BANDED8, BANDED8_RANDOM),
    (REVIEWS, "plain M: singular vectors − random basis", PLAIN, PLAIN_RANDOM),
]
EXPLORATORY = [
    ("glyphs", "random positions − random basis, plain's count", POSITIONS, PLAIN_RANDOM),
    ("glyphs", "banded 8 − random positions", BANDED8, POSITIONS8),
    ("glyphs", "banded 2 − random mask", BANDED2, MASK2),
    ("glyphs", "banded 8 − full fine-tuning", BANDED8, "full"),
    ("glyphs", "banded 2 − VeRA rank 256", BANDED2, VERA),
    ("glyphs", "VeRA rank 256 − LoRA rank 8", VERA, LORA),
    ("glyphs", "VeRA rank 256 − full fine-tuning", VERA, "full"),
    (ARITHMETIC, "plain M: singular vectors − random basis", PLAIN, PLAIN_RANDOM),
    (ARITHMETIC, "plain M: diagonal − random positions", PLAIN, POSITIONS),
    (ARITHMETIC, "plain M − random mask", PLAIN, MASK),
    (LONG, "banded 8: singular vectors − random basis", BANDED8, BANDED8_RANDOM),
    (NEW, "banded 8: singular vectors − random basis", BANDED8, BANDED8_RANDOM),
    (NEW, "banded 8: singular vectors − random U", BANDED8, f"{BANDED8_RANDOM}_U"),
    (NEW, "banded 8: singular vectors − random V", BANDED8, f"{BANDED8_RANDOM}_V"),
    (NEW, "banded 8: random U − random basis", f"{BANDED8_RANDOM}_U", BANDED8_RANDOM),
    (NEW, "banded 8: random V − random basis", f"{BANDED8_RANDOM}_V", BANDED8_RANDOM),
    (NEW, "banded 8: random U − random V", f"{BANDED8_RANDOM}_U", f"{BANDED8_RANDOM}_V"),
    (NEW, "banded 8 − random positions", BANDED8, POSITIONS8),
    (NEW, "banded 2 − random mask", BANDED2, MASK2),
    (REVIEWS, "plain M: diagonal − random positions", PLAIN, POSITIONS),
    (REVIEWS, "plain M − random mask", PLAIN, MASK),
    (REVIEWS, "banded 2: singular vectors − random basis", BANDED2, "svft:off_diagonals=2,basis=random"),
    (REVIEWS, "full fine-tuning − linear probe", "full", "head"),
]


def means(runs, task):
    """Return {method: {base: mean metric over seeds}} of one task, for the bases that have all their seeds.

    Bases that did not learn their own task are excluded, as hypotheses.md says.
    """
    values, seeds = {}, SEEDS_PER_BASE.get(task, 2)
    for r in runs:
        if name_of(r) == task and learned(r):
            values.setdefault(r["method"], {}).setdefault(int(r["base"]), []).append(float(r["metric"]))
    complete = {method: {base: statistics.mean(found[:seeds]) for base, found in bases.items() if len(found) >= seeds}
                for method, bases in values.items()}
    return {method: bases for method, bases in complete.items() if bases}


def learned(r):
    """Return whether the base of a line learned the task that it was pretrained on. A published model has no metric."""
    return not r["base_metric"] or float(r["base_metric"]) >= LEARNED


def name_of(r):
    """Return a line's task, with the number of steps for arithmetic, and with the width if it is not the usual one."""
    name = f"arithmetic, {r['steps']} steps" if r["task"] == "arithmetic" else r["task"]
    if r["width"] not in ("128", "384"):
        return f"{name}, width {r['width']}"
    return NEW if name == ARITHMETIC and int(r["base"]) >= FIRST_NEW_BASE else name


def compare(runs, task, row, other):
    """Return the paired comparison of two rows, or None below n = 2.

    Its keys: n, mean, deviation, low, high (the 95 % interval), p, differences.
    """
    found = means(runs, task)
    a, b = found.get(row, {}), found.get(other, {})
    differences = [a[base] - b[base] for base in sorted(a.keys() & b.keys())]
    n = len(differences)
    if n < 2:
        return None
    mean, deviation = statistics.mean(differences), statistics.stdev(differences)
    error = deviation / math.sqrt(n)
    half = t_quantile(0.05, n - 1) * error
    p = t_p_value(mean / error, n - 1) if error else float(mean == 0)
    return {"n": n, "mean": mean, "deviation": deviation, "low": mean - half, "high": mean + half, "p": p,
            "differences": differences}


def confirmatory_table(runs):
    found = [compare(runs, task, row, other) for task, _, row, other in CONFIRMATORY]
    complete = [c is not None and c["n"] == N_BASES for c in found]
    adjusted = holm([c["p"] if ok else 1.0 for c, ok in zip(found, complete)])
    cells = [["#", "task", "difference", "mean", "95 % interval", "deviation", "n", "p", "p (Holm)"]]
    for i, ((task, what, _, _), c, ok, p) in enumerate(zip(CONFIRMATORY, found, complete, adjusted), 1):
        cells.append([str(i), task, what, *statistics_cells(c), p_text(p) if ok else "incomplete: 1"])
    return markdown(cells[0], cells[1:], 3)


def exploratory_table(runs):
    cells = [["task", "difference", "mean", "95 % interval", "deviation", "n", "p, uncorrected"]]
    for task, what, row, other in EXPLORATORY:
        c = compare(runs, task, row, other)
        if c is not None:
            cells.append([task, what, *statistics_cells(c)])
    return markdown(cells[0], cells[1:], 2) if len(cells) > 1 else ["*Not run.*"]


def by_width(runs, task):
    """Return {"plain M" or "banded 8": {width: comparison of singular vectors with a random basis}}."""
    found = {}
    for what, row, other in (("plain M", PLAIN, PLAIN_RANDOM), ("banded 8", BANDED8, BANDED8_RANDOM)):
        compared = {width: compare(runs, task if width == 128 else f"{task}, width {width}", row, other) for width in WIDTHS}
        found[what] = {width: c for width, c in compared.items() if c is not None}
    return found


def trend(compared):
    """Return the slope of the paired differences over log2 of the width, by least squares, as compare does."""
    points = [(math.log2(width), y) for width, c in compared.items() for y in c["differences"]]
    n, x_mean = len(points), statistics.mean(x for x, _ in points)
    slope, intercept = statistics.linear_regression(*zip(*points))
    variance = sum((y - intercept - slope * x) ** 2 for x, y in points) / (n - 2)
    error = math.sqrt(variance / sum((x - x_mean) ** 2 for x, _ in points))
    half = t_quantile(0.05, n - 2) * error
    return {"n": n, "mean": slope, "deviation": math.sqrt(variance), "low": slope - half, "high": slope + half,
            "p": t_p_value(slope / error, n - 2)}


def width_table(runs):
    cells = [["task", "M", "width", "mean", "95 % interval", "deviation", "n", "p, uncorrected"]]
    for task in ("glyphs", ARITHMETIC):
        for what, compared in by_width(runs, task).items():
            cells += [[task, what, str(width), *statistics_cells(c)] for width, c in compared.items()]
            cells.append([task, what, "slope per doubling", *statistics_cells(trend(compared))])
    return markdown(cells[0], cells[1:], 3)


def statistics_cells(c):
    """Return the cells mean, interval, deviation, n and p of a comparison."""
    if c is None:
        return ["not run", "", "", "0", ""]
    return [f"{c['mean']:+.1f}", f"{c['low']:+.1f} to {c['high']:+.1f}", f"{c['deviation']:.1f}", str(c["n"]),
            p_text(c["p"])]


def p_text(p):
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}" if p < 0.01 else f"{p:.2f}"


def task_table(runs, task, references):
    """Return a row for each method: parameters, learning rate, mean ± deviation over bases, differences."""
    lines, found = [r for r in runs if name_of(r) == task], means(runs, task)
    if not found:
        return ["*Not run.*"]
    cells = [["method", "trainable params", "lr", f"{lines[0]['metric_name']}", "n",
              *(f"Δ vs {reference}" for reference in references)]]
    for method in sorted(found, key=lambda m: list(found).index(m)):
        first, values = next(r for r in lines if r["method"] == method), list(found[method].values())
        cells.append([method, f"{int(first['trainable_params']):,}", f"{float(first['lr']):g}", spread(values),
                      str(len(values)), *(interval(compare(runs, task, method, reference)) if method != reference else "-"
                                          for reference in references)])
    return markdown(cells[0], cells[1:], 1)


def spread(values):
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def interval(c):
    return "-" if c is None else f"{c['mean']:+.1f} ({c['low']:+.1f} to {c['high']:+.1f})"


def one_run_table(runs):
    """Return how far single runs of different bases deviate: of a metric, and of a difference between two rows."""
    cells = [["task", "metric of one run: median", "largest", "difference of two rows: median", "largest"]]
    for task in ("glyphs", ARITHMETIC, REVIEWS):
        single = {}
        for r in runs:
            if name_of(r) == task and learned(r):
                single.setdefault(r["method"], {})[int(r["base"]), int(r["seed"])] = float(r["metric"])
        methods = [m for m, values in single.items() if len(values) > 2]
        if len(methods) < 2:
            continue
        metric = [single_deviation(single[m]) for m in methods]
        paired = [single_deviation({key: single[a][key] - single[b][key] for key in single[a].keys() & single[b].keys()})
                  for i, a in enumerate(methods) for b in methods[i + 1:]]
        cells.append([task, *(f"{f(values):.1f}" for values in (metric, paired) for f in (statistics.median, max))])
    return markdown(cells[0], cells[1:], 1)


def single_deviation(values):
    """Return the deviation of one run over bases, {(base, seed): value}: the root mean variance over seeds' positions."""
    positions = {}
    for base, seed in sorted(values):
        positions.setdefault(base, []).append(values[base, seed])
    variances = [statistics.variance(column) for column in zip(*positions.values()) if len(column) > 1]
    return math.sqrt(statistics.mean(variances))


def sweep_table(sweeps):
    """Return the mean validation metric of each learning rate; the best is bold."""
    cells, scores = [["task", "method", "learning rate: mean validation metric over three bases"]], {}
    for r in sweeps:
        scores.setdefault((r["task"], r["width"], r["method"]), {}).setdefault(float(r["lr"]), []).append(float(r["metric"]))
    for (task, width, method), grid in scores.items():
        full = {lr: statistics.mean(v) for lr, v in sorted(grid.items()) if len(v) == 3}
        if full:
            best = max(full, key=lambda lr: (full[lr], -lr))
            listed = ", ".join(f"**{lr:g}: {v:.1f}**" if lr == best else f"{lr:g}: {v:.1f}" for lr, v in full.items())
            cells.append([task if width in ("128", "384") else f"{task}, width {width}", f"`{method}`", listed])
    return markdown(cells[0], cells[1:], 3)


def draw_differences(path, runs):
    """Draw every comparison as its mean and 95 % interval, a panel for each task."""
    from matplotlib.figure import Figure
    listed = [(task, what, compare(runs, task, row, other), True) for task, what, row, other in CONFIRMATORY]
    listed += [(task, what, compare(runs, task, row, other), False) for task, what, row, other in EXPLORATORY]
    listed = [entry for entry in listed if entry[2] is not None and entry[2]["deviation"] > 0]
    tasks = list(dict.fromkeys(task for task, *_ in listed))
    if not tasks:
        return
    sizes = [sum(entry[0] == task for entry in listed) for task in tasks]
    figure = Figure(figsize=(8, 1.2 * len(tasks) + 0.3 * len(listed)), layout="constrained")
    panels = figure.subplots(len(tasks), 1, squeeze=False, height_ratios=[n + 1 for n in sizes])[:, 0]
    for axes, task in zip(panels, tasks):
        entries = [entry for entry in listed if entry[0] == task][::-1]
        for y, (_, _, c, confirmatory) in enumerate(entries):
            axes.errorbar(c["mean"], y, xerr=[[c["mean"] - c["low"]], [c["high"] - c["mean"]]], marker="o", capsize=3,
                          color="C0", fillstyle="full" if confirmatory else "none")
        axes.axvline(0, color=GRAY, linewidth=1)
        axes.set_yticks(range(len(entries)), [what for _, what, _, _ in entries])
        axes.set_ylim(-0.7, len(entries) - 0.3)
        axes.set_title(task, color=GRAY, fontsize="medium")
        gray_axes(axes)
    panels[-1].set_xlabel("difference in points, 95 % interval (filled: confirmatory)", color=GRAY)
    figure.savefig(path, dpi=120, transparent=True, metadata={"Software": None})


def draw_widths(path, runs):
    """Draw singular minus random basis over the width, with 95 % intervals, a panel for each task."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    for axes, task in zip(figure.subplots(1, 2), ("glyphs", ARITHMETIC)):
        for i, (what, compared) in enumerate(by_width(runs, task).items()):
            x = [width * 1.04 ** (2 * i - 1) for width in compared]     # side by side
            mean, low, high = zip(*((c["mean"], c["mean"] - c["low"], c["high"] - c["mean"]) for c in compared.values()))
            axes.errorbar(x, mean, yerr=[low, high], marker="os"[i], fillstyle="none", capsize=3, linewidth=1, label=what)
        axes.axhline(0, color=GRAY, linewidth=1)
        axes.set_xscale("log")
        axes.minorticks_off()
        axes.set_xticks(WIDTHS, WIDTHS)
        axes.set_title(task, color=GRAY, fontsize="medium")
        axes.set_xlabel("width", color=GRAY)
        axes.legend(frameon=False, labelcolor=GRAY)
        gray_axes(axes)
    figure.axes[0].set_ylabel("singular − random, points", color=GRAY)
    figure.savefig(path, dpi=120, transparent=True, metadata={"Software": None})


def draw_curves(path, curves, runs):
    """Draw the validation metric of each base's first seed over steps: a thin line for each base, a color for each row."""
    excluded = {r["base"] for r in runs if r["task"] == "arithmetic" and not learned(r)}
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    lines = {}
    for r in curves:
        if r["base"] not in excluded and int(r["seed"]) == 2 * int(r["base"]):
            lines.setdefault(r["method"], {}).setdefault(r["base"], []).append((int(r["step"]), float(r["metric"])))
    for i, (method, bases) in enumerate(lines.items()):
        for j, points in enumerate(bases.values()):
            x, y = zip(*sorted(points))
            axes.plot(x, y, color=f"C{i}", linewidth=0.8, label=None if j else method)
    axes.set_xlabel("step", color=GRAY)
    axes.set_ylabel("validation problems solved, percent", color=GRAY)
    axes.legend(frameon=False, labelcolor=GRAY)
    gray_axes(axes)
    figure.savefig(path, dpi=120, transparent=True, metadata={"Software": None})


def draw(folder, data):
    """Draw docs/evidence_*.png."""
    draw_differences(folder / "evidence_differences.png", data["evidence_runs"])
    draw_widths(folder / "evidence_widths.png", data["evidence_runs"])
    if "evidence_curves" in data:
        draw_curves(folder / "evidence_curves.png", data["evidence_curves"], data["evidence_runs"])


TABLES = {
    "evidence_confirmatory": lambda data: confirmatory_table(data["evidence_runs"]),
    "evidence_exploratory": lambda data: exploratory_table(data["evidence_runs"]),
    "evidence_glyphs": lambda data: task_table(data["evidence_runs"], "glyphs", (LORA, "full")),
    "evidence_arithmetic": lambda data: task_table(data["evidence_runs"], ARITHMETIC, ()),
    "evidence_arithmetic_900": lambda data: task_table(data["evidence_runs"], LONG, ()),
    "evidence_reviews": lambda data: task_table(data["evidence_runs"], REVIEWS, ("head", "full")),
    "evidence_new_bases": lambda data: task_table(data["evidence_runs"], NEW, ()),
    "evidence_widths": lambda data: width_table(data["evidence_runs"]),
    "evidence_one_run": lambda data: one_run_table(data["evidence_runs"]),
    "evidence_sweeps": lambda data: sweep_table(data["evidence_sweeps"]),
}
