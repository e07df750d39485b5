"""python -m svmini.aggregate: one table of several comparisons, such as the same methods on several base models.

The seeds of each results.json are averaged first, so that mean ± standard deviation are over files. Differences and
gaps are paired: within a file, over the seeds on which none of the methods diverged.
"""

import itertools
import json
import statistics
import sys
from pathlib import Path

from .cli import Parser, run_command
from .errors import InputError
from .training import report
from .training.checkpoint import differences

ROW_KEYS = {"method", "seed", "metric", "metric_name", "higher_is_better", "trainable_params"}
MAY_DIFFER = {"python", "torch", "device", "sha256", "base", "rows", "lr_sweep"}   # keys of a results.json
BASE_MAY_DIFFER = {"seed", "sha256", "dtype"}   # keys of the run config of a base model


def command(argv):
    p = Parser("-m svmini.aggregate", "Make one table of several comparisons.")
    p.add_argument("results", nargs="+", metavar="FILE", help="results.json of each comparison (required)")
    p.flag("--baseline", "SPEC", str, "method that the others are compared with", report.REFERENCE)
    p.flag("--plot", "FILE", str, "PNG file for a plot of the table", shown="no plot")
    flags = p.parse_args(argv)
    contents = {path: read_results(path) for path in flags.results}
    if len({Path(path).resolve() for path in flags.results}) < len(flags.results):
        raise InputError("a file is given twice: give each comparison once")
    check_comparable(contents)
    files = {path: content["rows"] for path, content in contents.items()}
    methods = list(dict.fromkeys(row["method"] for rows in files.values() for row in rows))
    if flags.baseline not in methods:
        raise InputError(f"--baseline {flags.baseline}: no file has this row; choose from {', '.join(methods)}")
    table = [summarize(list(files.values()), method, flags.baseline) for method in methods]
    drawn = flags.plot and report.plot(flags.plot, table)
    print(*report.table_lines(table, flags.baseline), *notes(files, table), sep="\n")
    if drawn is False:
        print("for a plot of the table: pip install matplotlib")


def read_results(path):
    """Return the content of a results.json. Raises InputError if the file is something else."""
    if not Path(path).is_file():
        raise InputError(f"there is no file {path}: give the results.json of a comparison")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content["rows"] and all(ROW_KEYS <= row.keys() and isinstance(row["metric"], int | float | None)
                                   for row in content["rows"]):
            return content
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    raise InputError(f"{path} is not a results.json of svmini: give the results.json of a comparison")


def check_comparable(contents):
    """Raise InputError if the files have different setups, or the same runs. contents: {path: content}."""
    for (a, one), (b, other) in itertools.combinations(contents.items(), 2):
        different = differences(*setups(one, other))
        if different:
            raise InputError(f"{b} differs from {a}: {'; '.join(different)}. Aggregate comparisons with equal settings")
        runs, others = ({(r["method"], r["seed"], r["metric"]) for r in content["rows"] if r["metric"] is not None}
                        for content in (one, other))
        if runs and others and one.get("base") == other.get("base") and (runs <= others or others <= runs):
            raise InputError(f"{a} and {b} contain the same runs: a deviation over copies means nothing. Leave out one")


def setups(*contents):
    """Return what must be equal in two files; methods count only if both have them."""
    counts = [{row["method"]: row["trainable_params"] for row in content["rows"]} for content in contents]
    both = counts[0].keys() & counts[1].keys()
    for content, count in zip(contents, counts):
        base, row = content.get("base") or {}, content["rows"][0]
        yield {key: value for key, value in content.items() if key not in MAY_DIFFER} | {
            "metric_name": row["metric_name"], "higher_is_better": row["higher_is_better"],
            "trainable_params": {method: count[method] for method in both},
            "base": {"published": bool(base.get("published"))} | {
                key: value for key, value in base.get("run_config", {}).items() if key not in BASE_MAY_DIFFER}}


def metrics_of(rows, method):
    """Return {seed: metric} of a method in one file, without diverged runs. The zero-shot row counts for every seed."""
    found = {row["seed"]: row["metric"] for row in rows if row["method"] == method and row["metric"] is not None}
    return {row["seed"]: x for x in found.values() for row in rows} if method == "zero-shot" else found


def gap_recovered(rows, method):
    """Return (metric − start) / (full − start) of one file, averaged over common seeds; None if it is not defined."""
    start, full = metrics_of(rows, "head") or metrics_of(rows, "zero-shot"), metrics_of(rows, "full")
    metric = metrics_of(rows, method)
    seeds = metric.keys() & start.keys() & full.keys()
    if not seeds or report.gap_problem(rows):
        return None
    return sum(metric[s] - start[s] for s in seeds) / sum(full[s] - start[s] for s in seeds)


def summarize(files, method, baseline):
    """Return a method's row for report.table_lines, with lists over files. files: the rows of each file."""
    pairs = [(metrics_of(rows, method), metrics_of(rows, baseline)) for rows in files]
    runs = [row for rows in files for row in rows if row["method"] == method]
    differences = [statistics.mean(x[s] - y[s] for s in x.keys() & y.keys()) for x, y in pairs if x.keys() & y.keys()]
    return {**runs[0], "metrics": [statistics.mean(x.values()) for x, _ in pairs if x],
            "differences": differences if method != baseline else [],
            "gap_recovered": [gap for rows in files if (gap := gap_recovered(rows, method)) is not None],
            "ms_per_step": [row["ms_per_step"] for row in runs if row.get("ms_per_step")],
            "n_runs": len(runs), "n_diverged": sum(row["metric"] is None for row in runs)}


def notes(files, table):
    """Return the lines under the table. files: {path: rows}."""
    lines = [f"mean ± standard deviation over {len(files)} files; differences and gaps are paired by file and seed"]
    rare = [f"{t['method']} ({len(t['metrics'])})" for t in table if len(t["metrics"]) < len(files)]
    lines += [f"in fewer files: {', '.join(rare)}"] if rare else []
    lines += [f"gap recovered leaves out {path}: {problem}" for path, rows in files.items()
              if (problem := report.gap_problem(rows))]
    lrs = {(row["method"], row.get("lr")) for rows in files.values() for row in rows}
    different = [t["method"] for t in table if sum(method == t["method"] for method, _ in lrs) > 1]
    return lines + ([f"learning rates differ between the files: {', '.join(different)}"] if different else [])


if __name__ == "__main__":
    sys.exit(run_command(command))
