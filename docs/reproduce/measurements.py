"""Read docs/data/*.csv and compute means, deviations and paired differences.

A line of a *runs.csv file is one run (n is 1 or missing; base and seed are given), or the mean of n bases, draws or
seeds whose individual runs no longer exist. Individual runs are averaged here: first over the seeds of a base, then
over bases. A paired difference is read from paired_differences.csv if it is there, and computed from individual runs
otherwise.
"""

import csv
import math
import statistics
from collections import defaultdict, namedtuple
from pathlib import Path

DATA = Path(__file__).parents[1] / "data"
XEON, EPYC = "Intel Xeon, 1 thread", "AMD EPYC, 1 thread"
DIGITS = {"loss": 3}   # of a metric; others: 1

PLAIN, BAND_2, BAND_8 = "svft:pattern=plain", "svft:off_diagonals=2", "svft:off_diagonals=8"
RANDOM_BASIS = ",basis=random"   # appended to a spec of svft
BASES = "mean of 3 bases x 3 seeds"
GLYPHS = {"task": "glyphs", "base": BASES, "machine": XEON}

Mean = namedtuple("Mean", "value deviation n unit digits")   # unit of the n values: bases, draws or seeds


def read(folder=DATA):
    """{file name without .csv: its lines as dicts}; "runs" holds the lines of all *runs.csv files."""
    tables = {}
    for path in sorted(folder.glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            tables[path.stem] = [{**row, "file": path.stem} for row in csv.DictReader(file)]
    return {**tables, "runs": [row for name in tables if name.endswith("runs") for row in tables[name]]}


def select(rows, where):
    return [row for row in rows if all(row.get(key) == value for key, value in where.items())]


def runs_of(data, where, method):
    """The lines of runs.csv of one method. where: {column: value}."""
    return select(data["runs"], {**where, "method": method})


def parameters(data, where, method):
    return int(runs_of(data, where, method)[0]["trainable_params"])


def score(data, where, method):
    """The Mean of a method's metric over bases (over seeds if there is one base), or None if it was not run."""
    rows = runs_of(data, where, method)
    if not rows:
        return None
    digits = DIGITS.get(rows[0]["metric_name"], 1)
    if is_mean(rows[0]):
        (row,) = rows
        return Mean(float(row["metric"]), float(row["deviation"]), int(row["n"]), None, digits)
    return mean_of(list(per_unit(rows).values()), None, digits)


def difference(data, where, method, minus):
    """The Mean of the paired differences method - minus, or None if they are not known."""
    for a, b, sign in ((method, minus, 1), (minus, method, -1)):
        here = {key: value for key, value in where.items() if key != "file"}
        stored = select(data["paired_differences"], {**here, "method": a, "minus": b})
        if stored:
            (row,) = stored
            digits = len(row["difference"].partition(".")[2])
            return Mean(sign * float(row["difference"]), float(row["deviation"]), int(row["n"]), row["unit"], digits)
    rows, others = runs_of(data, where, method), runs_of(data, where, minus)
    if method == minus or not rows or not others or any(is_mean(row) for row in rows + others):
        return None
    a, b = per_unit(rows), per_unit(others)
    unit = "bases" if len({row["base"] for row in rows}) > 1 else "seeds"
    return mean_of([a[key] - b[key] for key in a if key in b], unit, DIGITS.get(rows[0]["metric_name"], 1))


def is_mean(row):
    return int(row.get("n") or 1) > 1


def per_unit(rows):
    """{base: its mean metric over seeds}, or {seed: metric} if all individual runs are of one base."""
    key = "base" if len({row["base"] for row in rows}) > 1 else "seed"
    metrics = defaultdict(list)
    for row in rows:
        metrics[row[key]].append(float(row["metric"]))
    return {unit: statistics.mean(values) for unit, values in metrics.items()}


def mean_of(values, unit, digits):
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Mean(statistics.mean(values), deviation, len(values), unit, digits)


def gap_recovered(data, where, method):
    """The gap recovered in percent: as measured if the line has it, else from the means."""
    stored = runs_of(data, where, method)[0].get("gap_recovered")
    if stored:
        return float(stored)
    start = score(data, where, "head") or score(data, where, "zero-shot")
    full = score(data, where, "full")
    return 100 * (score(data, where, method).value - start.value) / (full.value - start.value)


def significant(difference):
    """Whether a paired t-test over bases or draws, two-sided and not corrected, gives p < 0.05."""
    value, deviation, n, unit, _ = difference
    return bool(unit != "seeds" and deviation and t_p_value(value / deviation * n**0.5, n - 1) < 0.05)


def cell(mean, signed=False):
    """value ± deviation; bold if it is a significant difference."""
    if mean is None:
        return "-"
    text = f"{mean.value:{'+' if signed else ''}.{mean.digits}f}"
    text += "" if mean.deviation is None else f" ± {mean.deviation:.{mean.digits}f}"
    return f"**{text}**" if signed and significant(mean) else text


def markdown(header, rows, left=1):
    """Rows of cells as lines of Markdown; all columns after the first `left` are aligned to the right."""
    rule = "|" + "---|" * left + "---:|" * (len(header) - left)
    header, *lines = ["| " + " | ".join(row) + " |" for row in (header, *rows)]
    return [header, rule, *lines]


def t_p_value(t, df):
    """Return the two-sided p-value of Student's t with an integer number of degrees of freedom.

    The finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    theta = math.atan(abs(t) / math.sqrt(df))
    sin, cos = math.sin(theta), math.cos(theta)
    term = total = 1.0 if df % 2 == 0 else cos
    for j in range(2 if df % 2 == 0 else 3, df, 2):
        term *= cos * cos * (j - 1) / j
        total += term
    if df % 2 == 0:
        inside = sin * total
    else:
        inside = 2 / math.pi * (theta + (sin * total if df > 1 else 0))
    return max(0.0, 1 - inside)


def t_quantile(p, df):
    """Return the t with this two-sided p-value, by bisection."""
    low, high = 0.0, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_p_value(middle, df) > p else (low, middle)
    return high


def holm(p_values):
    """Return Holm's adjusted p-values, in the order of the given ones."""
    adjusted, largest, m = [0.0] * len(p_values), 0.0, len(p_values)
    for rank, i in enumerate(sorted(range(m), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (m - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted
