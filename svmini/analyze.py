"""python -m svmini.analyze: what an adapter learned, from its file and its base: a table of layers, and a picture.

With W0 = U Σ Vᵀ (thin, σ descending) and the change ΔW = W − W0,

    C = Uᵀ ΔW V  (D, D)          the change between the base's singular vectors; its diagonal is u_iᵀ ΔW v_i

C is M in SVFT, and has s_i − σ_i on its diagonal in SVFit: for these two the picture shows |C_ii| beside σ_i, and for a
band M near its diagonal; for other methods, and SVFT's random basis, singular values before and after, and of ΔW.
"""

import copy
import sys
from pathlib import Path

import torch

from . import files
from .adapter_file import load_adapter
from .adapting import adapters_of, unwrap
from .cli import Parser, add_model, run_command
from .errors import InputError
from .methods import parse_spec
from .methods.svd import thin_svd
from .model_file import class_of, load_adapted, load_base
from .training.compare import run_path
from .training.report import markdown

GREY = "#808080"   # reads on a light and on a dark page
NOTES = """σ: the largest, median and smallest singular value
leading quarter: ‖U_kᵀ ΔW V_k‖² / ‖ΔW‖² for the k = D/4 leading directions of the base; of a square matrix 6 % where ΔW
has no preference, 25 % where it lies evenly along the diagonal
rank: singular values of ΔW above what float32 rounds away"""
DIAGONAL = "diagonal: mean |M_ii| (SVFit: |s_i − σ_i|) over the first and over the last quarter of i"


def analyze(weight, adapter, spectra=True):
    """What became of one weight W0 (d_out, d_in), in float64: {"before": σ (D,), "C": |C| (D, D), "size": ‖ΔW‖ / ‖W0‖,
    "leading": the share of ‖ΔW‖² in C's first quarter}, and with spectra, which take two further SVDs, "after": the
    singular values of W (D,), "change": those of ΔW, 0 where they are rounding, and "rank": how many are not."""
    U, S, Vt = (t.cpu().double() for t in thin_svd(weight))
    W0, W = weight.detach().cpu().double(), copy.deepcopy(adapter).cpu().double().weight.detach()
    C, k = U.t() @ (W - W0) @ Vt.t(), max(1, len(S) // 4)
    squares = (W - W0).square().sum()
    found = {"before": S, "C": C.abs(), "size": squares.sqrt() / W0.norm(),
             "leading": C[:k, :k].square().sum() / squares.clamp_min(1e-30)}        # 0 where nothing changed
    if spectra:
        change, rounding = torch.linalg.svdvals(W - W0), 4 * torch.finfo(torch.float32).eps * W0.norm()
        found |= {"after": torch.linalg.svdvals(W), "change": torch.where(change > rounding, change, 0.0),
                  "rank": (change > rounding).sum()}
    return found


def analyze_model(base, model, spectra=True):
    """{path: what analyze finds} of an adapted model's layers, beside the plain base (of the same names)."""
    adapters = adapters_of(unwrap(model))
    if not adapters:
        raise InputError("the adapter trains a head alone: no matrix of the base was adapted")
    with torch.no_grad():
        return {name: analyze(base.get_submodule(name).weight, part, spectra) for name, part in adapters.items()}


def by_target(layers):
    """{target: [what analyze found, layer by layer]}, a target being the end of a path; of one D each."""
    groups = {}
    for name, found in layers.items():
        groups.setdefault((name.rpartition(".")[2], len(found["before"])), []).append(found)
    return groups


def between_singular_vectors(method, options):
    """Whether C is what the method trains: SVFit, and SVFT but for the random basis."""
    return method == "svfit" or method == "svft" and options.get("basis", "singular") == "singular"


def mean(founds, key):
    """The mean over layers of what analyze found."""
    return torch.stack([found[key].double() for found in founds]).mean(dim=0)


def table_lines(layers, diagonal):
    """The table as lines of Markdown: a row a layer, then the mean over the layers of each target."""
    rows = [(name, [found]) for name, found in layers.items()]
    rows += [(f"mean of {target}", founds) for (target, _), founds in by_target(layers).items()]
    cells = [["layer", "σ before", "σ after", "‖ΔW‖/‖W0‖", "leading quarter", "rank", "diagonal: first, last"]]
    for name, founds in rows:
        before, after = (" / ".join(f"{v:.3g}" for v in (S[0], S.median(), S[-1]))
                         for S in (mean(founds, "before"), mean(founds, "after")))
        c = mean(founds, "C").diagonal()
        k = max(1, len(c) // 4)
        cells.append([name, before, after, f"{mean(founds, 'size'):.3f}", f"{100 * mean(founds, 'leading'):.0f} %",
                      f"{mean(founds, 'rank'):.0f} of {len(c)}", f"{c[:k].mean():.2g}, {c[-k:].mean():.2g}"])
    return markdown(cells if diagonal else [row[:-1] for row in cells], left=("layer",))


def draw(path, layers, method, options):
    """The picture as a PNG that reads on light and dark pages: one column a target, means over its layers. Returns
    False where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot
    groups, diagonal = by_target(layers), between_singular_vectors(method, options)
    d = options.get("off_diagonals", 0) if diagonal and options.get("pattern") == "banded" else 0
    figure, grid = pyplot.subplots(1 + (d > 0), len(groups), figsize=(1.2 + 2.4 * len(groups), 4.8 if d else 3),
                                   sharex="col", sharey="row", squeeze=False, layout="constrained",
                                   height_ratios=[2, 1] if d else [1])
    for axes, ((target, _), founds) in zip(grid[0], groups.items()):
        axes.plot(mean(founds, "before"), color="C0", label="σ_i of the base")
        if diagonal:
            label = "|s_i − σ_i|" if method == "svfit" else "|M_ii|"
            axes.plot(mean(founds, "C").diagonal(), color="C1", linewidth=1, label=label)
        else:
            axes.plot(mean(founds, "after"), color="C1", linestyle="--", label="after")
            axes.plot(mean(founds, "change"), color="C2", marker=".", markersize=3, linewidth=1, label="of ΔW")
        axes.set_yscale("log", nonpositive="mask")
        axes.set_title(target, color=GREY)
    grid[0, 0].legend(frameon=False, labelcolor=GREY, fontsize="small")
    if d:
        draw_bands(figure, grid, [band(mean(founds, "C"), d) for founds in groups.values()], d)
    for axes in [*grid.flat, *figure.axes]:
        axes.tick_params(which="both", colors=GREY)
        axes.spines[:].set_color(GREY)
    for axes in grid[-1]:
        axes.set_xlabel("i", color=GREY)
    files.write_whole(path, lambda file: figure.savefig(file, dpi=120, format="png", transparent=True))
    pyplot.close(figure)
    return True


def draw_bands(figure, grid, bands, d):
    """The lower row: |M_ij| as an image of i and j − i, all targets on one scale."""
    top = max(float(b.nan_to_num().max()) for b in bands)
    for axes, b in zip(grid[1], bands):
        image = axes.imshow(b.numpy(), aspect="auto", vmin=0, vmax=top, origin="lower", interpolation="nearest",
                            extent=(-0.5, b.shape[1] - 0.5, -d - 0.5, d + 0.5))
    bar = figure.colorbar(image, ax=list(grid.flat), shrink=0.33, anchor=(0, 0), pad=0.01)
    bar.set_label("|M_ij|", color=GREY)
    grid[1, 0].set_ylabel("j − i", color=GREY)


def band(C, d):
    """C (D, D) near its diagonal: (2d + 1, D), entry (d + j − i, i); nan where there is no j."""
    i = torch.arange(len(C))
    j = i + torch.arange(-d, d + 1)[:, None]                                # (2d + 1, D)
    return torch.where((j >= 0) & (j < len(C)), C[i, j.clamp(0, len(C) - 1)], torch.nan)


def draw_best(out, rows, base):
    """After a comparison: out/analysis.png of the best SVFT or SVFit row of the first seed, from the adapter file that
    its run has left; base is the plain model. Prints what it drew; without such a row there is nothing to draw."""
    first = [r for r in rows if r["seed"] == rows[0]["seed"] and r["metric"] is not None and r["method"] != "zero-shot"
             and between_singular_vectors(*parse_spec(r["method"])[:2])]
    if first:
        best = max(first, key=lambda r: r["metric"] if r["higher_is_better"] else -r["metric"])
        model = load_adapter(copy.deepcopy(base), run_path(out, best["method"], best["seed"]) / "adapter.pt")
        what, path = model.adaptation, Path(out) / "analysis.png"
        if draw(path, analyze_model(base, model, spectra=False), what["method"], what["options"]):
            print(f"{path}: what {best['method']} learned, beside the singular values of the base")


def command(argv):
    p = Parser("-m svmini.analyze", "What an adapter learned: spectra, ranks, a picture.")
    add_model(p, adapter_required=True)
    p.add_argument("--out", metavar="DIR", help="where analysis.png goes (beside the adapter)")
    flags = p.parse_args(argv)
    model_class = class_of(flags.init)
    base, _ = load_base(flags.init, model_class, flags.n_head)
    model, _ = load_adapted(flags.init, flags.adapter, model_class, flags.n_head)
    method, options = model.adaptation["method"], model.adaptation["options"]
    layers, diagonal = analyze_model(base, model), between_singular_vectors(method, options)
    print(f"{method}: " + ", ".join(f"{key} {value}" for key, value in options.items()) + "\n")
    print(*table_lines(layers, diagonal), "", NOTES, *[DIAGONAL] * diagonal, sep="\n")
    path = Path(flags.out or Path(flags.adapter).parent) / "analysis.png"
    print(path if draw(path, layers, method, options) else "for a picture of it: pip install matplotlib")


if __name__ == "__main__":
    sys.exit(run_command(command))
