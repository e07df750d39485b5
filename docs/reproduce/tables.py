"""Generate the tables and figures of docs/*.md from docs/data/*.csv: python docs/reproduce/tables.py

In a Markdown file, the lines between `<!-- table: NAME -->` and `<!-- end -->` are replaced by the table NAME. The
figures are drawn again if matplotlib is installed. tests/program/test_docs.py runs this and compares.
"""

import re

import evidence
import figures
from measurements import (BAND_2, BAND_8, BASES, DATA, EPYC, GLYPHS, PLAIN, RANDOM_BASIS, XEON, cell,
                          difference, gap_recovered, markdown, parameters, read, runs_of, score, select)

RANDOM_PLACES = "svft:pattern=random,off_diagonals=0"
SQUARE = "@query,key,value,out"
TEXT = {"task": "text", "base": BASES}
ARITHMETIC = {"task": "arithmetic", "base": BASES}
VIT_8, VIT_40 = ({"task": f"cifar10_3000, {n} per class", "base": "dinov2_vits14", "n": "3"} for n in (8, 40))
TEN_BASES = {"file": "evidence_runs", "task": "glyphs", "width": "128", "steps": "200"}
COMMON = ["lora:rank=1", "lora:rank=2", "lora:rank=8", "dora:rank=8", "vera:rank=256"]
PARAMETERS = ["head", "full", "svfit:rank=8", "svfit:rank=32", PLAIN, BAND_2, BAND_8, "svft:off_diagonals=32",
              "lora:rank=1", "lora:rank=2", "lora:rank=8", "lora:rank=32", "vera:rank=16", "vera:rank=256"]
CONTROL_ROWS = {   # M: the spec between singular vectors, and the random mask of as many parameters
    "plain": (PLAIN, "random_mask:off_diagonals=0"), "rank D/4, banded 8": ("svft:rank=32,off_diagonals=8", None),
    "banded 2": (BAND_2, "random_mask:off_diagonals=2"), "banded 8": (BAND_8, "random_mask:off_diagonals=8")}


def comparison(data, where, methods, baselines=("lora:rank=8",), more=()):
    """One row a method: trainable parameters, metric, paired differences, and the columns of runs.csv in `more`."""
    titles = {"gap_recovered": "gap recovered", "ms_per_step": "ms/step", "adapter_kb": "file kB"}
    name = runs_of(data, where, methods[0])[0]["metric_name"]
    header = ["method", "trainable params", name, *(f"Δ vs {b} (paired)" for b in baselines)]
    rows = []
    for method in methods:
        line = runs_of(data, where, method)[0]
        extra = [gap(data, where, method) if m == "gap_recovered" else line[m] or "-" for m in more]
        rows.append([method, count(data, where, method), cell(score(data, where, method)),
                     *(cell(difference(data, where, method, b), True) for b in baselines), *extra])
    header += [titles.get(m, m) for m in more]
    return markdown(header, rows)


def count(data, where, method):
    return f"{parameters(data, where, method):,}"


def gap(data, where, method):
    """Above full fine-tuning, the value of the gap recovered says nothing more."""
    share = gap_recovered(data, where, method)
    return "> 100" if share > 100 else f"{share:.0f}"


def control(data):
    """Singular vectors, random basis and random mask on all tasks. The cells of a row are of one machine."""
    tasks = {"glyphs": {"task": "glyphs", "base": BASES}, "FashionMNIST": {"task": "fashionmnist", "base": BASES},
             "MNIST": {"task": "mnist", "base": BASES}, "text (loss)": TEXT, "arithmetic": ARITHMETIC,
             "real ViT": VIT_40}
    rows = []
    for title, task in tasks.items():
        for m, (spec, mask) in CONTROL_ROWS.items():
            spec = spec.replace("rank=32", "rank=96") if task is VIT_40 else spec
            where = one_machine(data, task, spec)
            if where:
                others = (spec + RANDOM_BASIS, mask)
                rows.append([title, m, *(cell(score(data, where, s)) for s in (spec, *others)),
                             *(cell(difference(data, where, spec, s), True) for s in others)])
                title = ""
    return markdown(["task", "M", "singular vectors", "random basis", "random mask",
                     "Δ vs random basis", "Δ vs random mask"], rows, left=2)


def one_machine(data, where, spec):
    """`where` with the machine that measured this spec; the Xeon if both did. None if none did."""
    machines = {row["machine"] for row in runs_of(data, where, spec)}
    return {**where, "machine": max(machines)} if machines else None


def pairing(data):
    rows = []
    for title, where in (("glyphs", {**GLYPHS, "machine": EPYC}), ("arithmetic", ARITHMETIC), ("real ViT", VIT_40)):
        specs = (PLAIN, RANDOM_PLACES, PLAIN + RANDOM_BASIS)
        rows.append([title, *(cell(score(data, where, spec)) for spec in specs),
                     *(cell(difference(data, where, a, b), True) for a, b in zip(specs, specs[1:]))])
    return markdown(["task", "plain", "random positions", "random basis", "plain − random positions",
                     "random positions − random basis"], rows)


def weight_changes(data):
    columns = {"full": "full", "plain": PLAIN, "plain, random basis": PLAIN + RANDOM_BASIS, "banded 2": BAND_2,
               "banded 2, random basis": BAND_2 + RANDOM_BASIS,
               "random mask, as banded 2": "random_mask:off_diagonals=2"}
    rows = []
    for task in ("glyphs", "text", "arithmetic", VIT_40["task"]):
        found = {row["method"]: row["relative_change"] for row in select(data["weight_changes"], {"task": task})}
        rows.append([task.replace(VIT_40["task"], "real ViT"), *(found.get(spec, "-") for spec in columns.values())])
    return markdown(["task", *columns], rows)


def bases(data):
    """The base models: test score, cosine to the initialization and energy, each in the order of the seeds."""
    rows = []
    for task in ("glyphs", "mnist", "fashionmnist", "text", "arithmetic"):
        found = [row for row in select(data["bases"], {"task": task})
                 if row["steps"] in ("1300", "1600") and row["machine"] in (XEON, EPYC)]
        found = [row for row in found if row["seed"].isdigit()] or found
        scores = ", ".join(row["metric"] for row in found if row["metric"]) or "-"
        stats = [", ".join(dict.fromkeys(row[key] for row in found))
                 for key in ("cosine_to_initialization", "energy_first_quarter")]
        rows.append([task, found[0]["steps"], found[0]["weight_decay"], found[0]["metric_name"], scores, *stats])
    return markdown(["pretrained on", "steps", "weight decay", "metric", "test score", "cosine", "energy, %"], rows, 4)


def pretraining(data):
    """Differences to the linear probe, for glyph bases of four lengths of pretraining."""
    methods = ("full", PLAIN, BAND_2, "lora:rank=8")
    rows = []
    for base in select(data["bases"], {"task": "glyphs", "seed": "mean of 3"}):
        task = "glyphs" if base["steps"] == "1600" else f"glyphs, {base['steps']} steps"
        where = {"task": task, "base": BASES, "machine": base["machine"]}
        rows.append([f"{int(base['steps']):,}", base["cosine_to_initialization"], base["energy_first_quarter"],
                     f"{base['metric']} ± {base['deviation']}", cell(score(data, where, "head")),
                     *(cell(difference(data, where, method, "head"), True) for method in methods)])
    header = ["steps", "cosine", "energy, %", "accuracy of the base", "linear probe", *(f"Δ {m}" for m in methods)]
    return markdown(header, rows, left=0)


def rank_band(data):
    rows = []
    for r, d in ((128, 2), (64, 5), (32, 12), (25, 24)):
        spec, cut = f"svft:rank={r},off_diagonals={d}", {**GLYPHS, "task": f"glyphs, cut to rank {r}"}
        spec = BAND_2 if r == 128 else spec
        rows.append([f"r = {r}, d = {d}", count(data, GLYPHS, spec), cell(score(data, GLYPHS, spec)),
                     cell(difference(data, GLYPHS, spec, BAND_2), True), cell(score(data, cut, spec)),
                     cell(difference(data, cut, spec, f"{spec} (glyphs, not cut)"), True),
                     cell(score(data, GLYPHS if r == 128 else cut, "head"))])
    return markdown(["M", "trainable params", "residual kept", "Δ vs r = 128", "residual dropped", "Δ dropped − kept",
                     "linear probe, dropped"], rows)


def cost(data):
    columns = {"method": "method", "× full": "x_full", "matmul FLOPs × full": "matmul_flops_x_full",
               "weights MB": "weights_mb", "activation MB": "activation_mb", "gradients, AdamW MB": "optimizer_mb"}
    methods = ("full", "svfit", BAND_2, BAND_8, "lora:rank=8", "dora:rank=8", "vera:rank=256")
    rows = []
    for method in methods:
        (row,) = select(data["bench"], {"method": method})
        row = {**row, "x_full": f"{row['x_full']} ± {row['x_full_deviation']}"}
        rows.append([row[column] for column in columns.values()])
    return markdown(list(columns), rows)


def main_table(data):
    """The table of README.md: ten bases if they are there, three otherwise."""
    methods = ["head", "full", PLAIN, BAND_2, BAND_8, "vera:rank=256", "lora:rank=8"]
    complete = all(len({run["base"] for run in select(data["runs"], TEN_BASES | {"method": m})}) >= 10 for m in methods)
    where = TEN_BASES if complete else GLYPHS
    return comparison(data, where, methods, more=("gap_recovered",))


TABLES = {
    "main": main_table,
    "glyphs": lambda data: comparison(data, GLYPHS, PARAMETERS, more=("gap_recovered",)),
    "glyphs_one_base": lambda data: comparison(
        data, {"file": "runs", "task": "glyphs", "base": "0"},
        ["head", "full", "svfit", PLAIN, BAND_2, BAND_8, *COMMON, "boft:block_size=4,factors=2",
         "boft:block_size=2,factors=1"],
        more=("gap_recovered", "lr", "ms_per_step", "adapter_kb")),
    "text": lambda data: comparison(
        data, {"file": "runs", "task": "text", "base": "0"},
        ["zero-shot", "full", PLAIN, BAND_2, BAND_8, *COMMON], more=("gap_recovered",)),
    "arithmetic": lambda data: comparison(
        data, ARITHMETIC, ["zero-shot", "full", PLAIN, BAND_2, BAND_8, *COMMON], more=("gap_recovered", "lr")),
    "arithmetic_weight_decay": lambda data: comparison(
        data, {"task": "arithmetic, weight decay 0.1"}, ["zero-shot", "full", "svfit", PLAIN, BAND_2, BAND_8, *COMMON],
        more=("gap_recovered", "lr")),
    "real_vit": lambda data: comparison(
        data, VIT_8,
        ["head", "full", PLAIN, BAND_2, BAND_8, "lora:rank=1", "lora:rank=8", "dora:rank=8", "vera:rank=256"],
        baselines=("lora:rank=8", "head")),
    "pattern": lambda data: comparison(
        data, GLYPHS, [PLAIN + SQUARE, BAND_2 + SQUARE, "svft:pattern=random,off_diagonals=2" + SQUARE,
                       "svft:pattern=topk,off_diagonals=2" + SQUARE], baselines=(BAND_2 + SQUARE,)),
    "matrices": lambda data: comparison(
        data, GLYPHS, [*(BAND_2 + t for t in ("@query,value", "@query,key,value", SQUARE, "@up,down")), BAND_2],
        baselines=(BAND_2,)),
    "control": control, "pairing": pairing, "weight_changes": weight_changes, "bases": bases,
    "pretraining": pretraining, "rank_band": rank_band, "cost": cost, **evidence.TABLES,
}


def fill(text, data):
    """The Markdown text with every block between `<!-- table: NAME -->` and `<!-- end -->` replaced by its table."""
    def block(match):
        return "\n".join([match[1], *TABLES[match[2]](data), match[3]])
    return re.sub(r"(<!-- table: (\w+) -->)\n.*?(<!-- end -->)", block, text, flags=re.DOTALL)


def main():
    data = read()
    for path in (DATA.parents[1] / "README.md", *sorted(DATA.parent.glob("*.md"))):
        text = path.read_text(encoding="utf-8")
        if fill(text, data) != text:
            path.write_text(fill(text, data), encoding="utf-8")
            print(f"{path.name}: tables written")
    try:
        for name in figures.FIGURES:
            figures.draw(DATA.parent / name, data)
        evidence.draw(DATA.parent, data)
    except ImportError:
        print("The figures were not drawn: pip install matplotlib.")


if __name__ == "__main__":
    main()
