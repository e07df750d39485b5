"""python -m svmini.analyze: show what an adapter changed, from its file and its base: a table of layers, and a figure.

With W0 = U Σ Vᵀ (thin, σ descending) and the update ΔW = W − W0,

    C = Uᵀ ΔW V  (D, D)          the update between the base's singular vectors; its diagonal is u_iᵀ ΔW v_i

C is M in SVFT, and has s_i − σ_i on its diagonal in SVFit. For these two methods the figure shows |C_ii| next to σ_i,
and for banded M also its entries near the diagonal. For the other methods, and for SVFT's random basis, it shows the
singular values of W0, W and ΔW.
"""

import copy
import sys
from pathlib import Path

import torch

from .adapter_file import load_adapter
from .adapting import adapters_of, unwrap
from .cli import Parser, add_model, run_command
from .errors import InputError
from .methods import parse_spec
from .methods.svd import thin_svd
from .model_file import load_any, with_adapter
from .training.compare import run_path
from .training.report import best_of, figure, markdown

NOTES = """σ: the largest, median and smallest singular value
leading quarter: ‖U_kᵀ ΔW V_k‖² / ‖ΔW‖² for the k = D/4 leading directions of the base; in a square matrix it is 6 % if
ΔW prefers no direction, 25 % if ΔW is spread evenly along the diagonal
rank: the number of singular values of ΔW above the rounding error of float32"""


def analyze(weight, adapter, spectra=True):
    """Compare one weight W0 (d_out, d_in) with its adapter, in float64.

    Returns {"before": σ (D,), "C": |C| (D, D), "size": ‖ΔW‖ / ‖W0‖, "leading": share of ‖ΔW‖² in C's first quarter}.
    spectra adds two SVDs: "after", the singular values of W (D,); "change", those of ΔW, 0 where they are rounding
    errors; and "rank", the number of those that are not.
    """
    U, S, Vt = (t.cpu().double() for t in thin_svd(weight))
    W0, W = weight.detach().cpu().double(), copy.deepcopy(adapter).cpu().double().weight.detach()
    C, k = U.t() @ (W - W0) @ Vt.t(), max(1, len(S) // 4)
    squares = (W - W0).square().sum()
    result = {"before": S, "C": C.abs(), "size": squares.sqrt() / W0.norm(),
              "leading": C[:k, :k].square().sum() / squares.clamp_min(1e-30)}        # 0 if nothing changed
    if spectra:
        change, rounding = torch.linalg.svdvals(W - W0), 4 * torch.finfo(torch.float32).eps * W0.norm()
        result |= {"after": torch.linalg.svdvals(W), "change": torch.where(change > rounding, change, 0.0),
                   "rank": (change > rounding).sum()}
    return result


def analyze_model(base, model, spectra=True):
    """{path: result of analyze} for every adapted layer. base: the plain model, whose layers have the same paths."""
    adapters = adapters_of(unwrap(model))
    if not adapters:
        raise InputError("the adapter trains only a head: there is no adapted matrix to analyze")
    with torch.no_grad():
        return {name: analyze(base.get_submodule(name).weight, part, spectra) for name, part in adapters.items()}


def by_target(layers):
    """{(last name of the path, D): [result of analyze, layer by layer]}."""
    groups = {}
    for name, result in layers.items():
        groups.setdefault((name.rpartition(".")[2], len(result["before"])), []).append(result)
    return groups


def trains_diagonal(method, options):
    """Return True if C is what the method trains: SVFit, and SVFT except with the random basis."""
    return method == "svfit" or method == "svft" and options.get("basis", "singular") == "singular"


def mean(results, key):
    """The mean over layers of one entry of their results."""
    return torch.stack([result[key].double() for result in results]).mean(dim=0)


def table_lines(layers):
    """The table as lines of Markdown: one row per layer, then the mean over the layers of each target."""
    rows = [(name, [result]) for name, result in layers.items()]
    rows += [(f"mean of {target}", results) for (target, _), results in by_target(layers).items()]
    cells = [["layer", "σ before", "σ after", "‖ΔW‖/‖W0‖", "leading quarter", "rank"]]
    for name, results in rows:
        before, after = (" / ".join(f"{v:.3g}" for v in (S[0], S.median(), S[-1]))
                         for S in (mean(results, "before"), mean(results, "after")))
        cells.append([name, before, after, f"{mean(results, 'size'):.3f}", f"{100 * mean(results, 'leading'):.0f} %",
                      f"{mean(results, 'rank'):.0f} of {len(results[0]['before'])}"])
    return markdown(cells, left=("layer",))


def draw(path, layers, method, options):
    """Write the figure as a PNG: one column per target, means over its layers. Returns False without matplotlib."""
    groups, diagonal = by_target(layers), trains_diagonal(method, options)
    d = options.get("off_diagonals", 0) if diagonal and options.get("pattern") == "banded" else 0
    with figure(path, (1.2 + 2.4 * len(groups), 4.8 if d else 3)) as drawn:
        if drawn is None:
            return False
        grid = drawn.subplots(1 + (d > 0), len(groups), sharex="col", sharey="row", squeeze=False,
                              height_ratios=[2, 1] if d else [1])
        for axes, ((target, _), results) in zip(grid[0], groups.items()):
            axes.plot(mean(results, "before"), color="C0", label="σ_i of the base")
            if diagonal:
                label = "|s_i − σ_i|" if method == "svfit" else "|M_ii|"
                axes.plot(mean(results, "C").diagonal(), color="C1", linewidth=1, label=label)
            else:
                axes.plot(mean(results, "after"), color="C1", linestyle="--", label="after")
                axes.plot(mean(results, "change"), color="C2", marker=".", markersize=3, linewidth=1, label="of ΔW")
            axes.set_yscale("log", nonpositive="mask")
            axes.set_title(target)
        grid[0, 0].legend()
        if d:
            draw_bands(drawn, grid, [band(mean(results, "C"), d) for results in groups.values()], d)
        for axes in grid[-1]:
            axes.set_xlabel("i")
    return True


def draw_bands(figure, grid, bands, d):
    """Draw the lower row: |M_ij| as an image over i and j − i, all targets on one scale."""
    top = max(float(b.nan_to_num().max()) for b in bands)
    for axes, b in zip(grid[1], bands):
        image = axes.imshow(b.numpy(), aspect="auto", vmin=0, vmax=top, origin="lower", interpolation="nearest",
                            extent=(-0.5, b.shape[1] - 0.5, -d - 0.5, d + 0.5))
    figure.colorbar(image, ax=list(grid.flat), shrink=0.33, anchor=(0, 0), pad=0.01, label="|M_ij|")
    grid[1, 0].set_ylabel("j − i")


def band(C, d):
    """Return C (D, D) near its diagonal as (2d + 1, D): entry (d + j − i, i), nan outside C."""
    i = torch.arange(len(C))
    j = i + torch.arange(-d, d + 1)[:, None]                                # (2d + 1, D)
    return torch.where((j >= 0) & (j < len(C)), C[i, j.clamp(0, len(C) - 1)], torch.nan)


def draw_best(out, rows, base):
    """After a comparison, draw out/analysis.png for the best SVFT or SVFit row of the first seed, from the adapter file
    of its run, and print what was drawn. base: the plain model. Does nothing if there is no such row."""
    best = best_of(rows, lambda spec: spec != "zero-shot" and trains_diagonal(*parse_spec(spec)[:2]))
    if best is not None:
        model = load_adapter(copy.deepcopy(base), run_path(out, best["method"], best["seed"]) / "adapter.pt")
        record, path = model.adaptation, Path(out) / "analysis.png"
        if draw(path, analyze_model(base, model, spectra=False), record["method"], record["options"]):
            print(f"{path}: the update by {best['method']}, next to the singular values of the base")


def command(argv):
    p = Parser("-m svmini.analyze", "Show what an adapter changed: spectra, ranks and a figure.")
    add_model(p, adapter_required=True)
    p.flag("--out", "DIR", str, "folder for analysis.png", shown="the folder of the adapter")
    flags = p.parse_args(argv)
    base, metadata = load_any(flags.init, n_head=flags.n_head)
    model, _ = with_adapter(copy.deepcopy(base), metadata, flags.adapter)
    method, options = model.adaptation["method"], model.adaptation["options"]
    layers = analyze_model(base, model)
    print(f"{method}: " + ", ".join(f"{key} {value}" for key, value in options.items()) + "\n")
    print(*table_lines(layers), "", NOTES, sep="\n")
    path = Path(flags.out or Path(flags.adapter).parent) / "analysis.png"
    print(path if draw(path, layers, method, options) else "to draw a figure as well: pip install matplotlib")


if __name__ == "__main__":
    sys.exit(run_command(command))
