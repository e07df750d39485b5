"""Draw curves.png and control.png from docs/data/*.csv. docs/reproduce/tables.py calls this."""

import hashlib

from measurements import BAND_2, BAND_8, GLYPHS, PLAIN, RANDOM_BASIS, parameters, score

GRAY = "#808080"   # readable on light and on dark pages
FIGURES = {   # file: {curve: specs}
    "curves.png": {"full": ["full"], "svft": [PLAIN, BAND_2, BAND_8, "svft:off_diagonals=32"],
                   "lora": ["lora:rank=1", "lora:rank=2", "lora:rank=8", "lora:rank=32"],
                   "vera": ["vera:rank=16", "vera:rank=256"], "svfit": ["svfit:rank=8", "svfit:rank=32", PLAIN]},
    "control.png": {"full": ["full"], **{
        f"svft, {title}": [spec + basis for spec in (PLAIN, "svft:rank=32,off_diagonals=8", BAND_2, BAND_8)]
        for title, basis in (("singular vectors", ""), ("random basis", RANDOM_BASIS))},
        "random_mask": [f"random_mask:off_diagonals={d}" for d in (0, 2, 8)]},
}


def points(data, name):
    """{curve: [(trainable parameters, mean, deviation)]} of a figure, and the linear probe as one more curve."""
    curves = {**FIGURES[name], "head": ["head"]}
    return {curve: [(parameters(data, GLYPHS, s), *score(data, GLYPHS, s)[:2]) for s in specs]
            for curve, specs in curves.items()}


def digest(data, name):
    """What the file of a figure carries as its description, so that a test sees whether its data have changed."""
    return hashlib.sha256(repr(points(data, name)).encode()).hexdigest()


def draw(path, data):
    """Accuracy on glyphs over trainable parameters, in colors that can be read on light and on dark pages."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    curves = points(data, path.name)
    ((_, probe, _),) = curves.pop("head")
    axes.axhline(probe, color=GRAY, linestyle=":", linewidth=1)
    axes.annotate("linear probe", (0.01, probe), xycoords=("axes fraction", "data"), va="bottom", color=GRAY)
    for i, (name, curve) in enumerate(curves.items()):
        x, y, deviation = zip(*curve)
        axes.errorbar(x, y, yerr=deviation, label=name, color=f"C{i}", marker="osD^v"[i], fillstyle="none", capsize=3,
                      linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("trainable parameters, without the head", color=GRAY)
    axes.set_ylabel("test accuracy, %", color=GRAY)
    gray_axes(axes)
    axes.legend(frameon=False, labelcolor=GRAY)
    figure.savefig(path, dpi=120, transparent=True, metadata={"Description": digest(data, path.name)})


def gray_axes(axes):
    axes.tick_params(which="both", colors=GRAY)
    for spine in axes.spines.values():
        spine.set_color(GRAY)
