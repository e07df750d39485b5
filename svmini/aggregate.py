"""python -m svmini.aggregate: one table of several comparisons, such as the same methods from several bases.

The seeds of each results.json are averaged first. Mean ± standard deviation are then over the files, and differences
are paired file by file: the spread between bases is the one that counts.
"""

import statistics
import sys
from pathlib import Path

from .cli import Parser, run_command
from .errors import InputError
from .training import report
from .training.checkpoint import read_json
from .training.compare import fill_gap_recovered


def command(argv):
    p = Parser("-m svmini.aggregate", "One table of several comparisons.")
    p.add_argument("results", nargs="+", metavar="FILE", help="results.json of each")
    p.add_argument("--baseline", default=report.REFERENCE, metavar="M", help="the method that is subtracted from each")
    p.add_argument("--plot", metavar="FILE", help="also write a picture there, a PNG")
    flags = p.parse_args(argv)
    if len({Path(path).resolve() for path in flags.results}) < len(flags.results):
        raise InputError("a file is named twice: a spread over the same results means nothing")
    rows = [row for i, path in enumerate(flags.results) for row in averaged(path, i)]
    fill_gap_recovered(rows)
    metric = {(row["method"], row["seed"]): row["metric"] for row in rows}
    if flags.baseline not in {row["method"] for row in rows}:
        raise InputError(f"--baseline {flags.baseline}: no file has such a row")
    digits = 3 if rows[0]["metric_name"] == "loss" else 1
    cells = [["method", "trainable params", rows[0]["metric_name"], f"Δ vs {flags.baseline} (paired)", "gap recovered"]]
    for t in report.summarise(rows):
        pairs = [(metric[t["method"], i], metric.get((flags.baseline, i))) for i in range(len(flags.results))
                 if (t["method"], i) in metric]
        differences = [a - b for a, b in pairs if b is not None] if t["method"] != flags.baseline else []
        share = 100 * statistics.mean(t["gap_recovered"]) if t["gap_recovered"] else None
        cells.append([t["method"], f"{t['trainable_params']:,}", report.spread(t["metrics"], f".{digits}f"),
                      report.spread(differences, f"+.{digits}f") or "-", "-" if share is None else f"{share:.0f}"])
    print("\n".join(report.markdown(cells, left=("method",))))
    print(f"mean ± standard deviation over {len(flags.results)} files")
    if flags.plot and not report.plot(flags.plot, rows):
        print("for a picture of the table: pip install matplotlib")


def averaged(path, i):
    """The rows of one results.json, a method's seeds averaged into one row whose "seed" is the file's number i."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no file {path}: give the results.json of a run's folder")
    methods = {}
    for row in read_json(path)["rows"]:
        if row["metric"] is not None:
            methods.setdefault(row["method"], []).append(row)
    return [{**runs[0], "seed": i, "metric": statistics.mean(r["metric"] for r in runs), "gap_recovered": None}
            for runs in methods.values()]


if __name__ == "__main__":
    sys.exit(run_command(command))
