"""What an adapter changed: values against NumPy and against changes known by construction; the figure."""

import sys

import numpy as np
import pytest
import torch
import torch.nn as nn

from helpers import call, move, refused, tiny_gpt
from svmini import adapt, analyze, model_file, save_adapter


class Shapes(nn.Module):
    """A square, a tall and a wide layer."""
    targets, also_train = ("square", "tall", "wide"), ()

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.square, self.tall, self.wide = nn.Linear(16, 16), nn.Linear(16, 40), nn.Linear(40, 16)


def trained(method, net=Shapes, targets=None, size=0.3, **options):
    """A plain model, and a copy with adapters that moved."""
    return net(), move(adapt(net(), method, targets, **options), size)


@pytest.mark.parametrize("method, options, rank", [("lora", {"rank": 3}, 3), ("svfit", {"rank": 5}, 5),
                                                   ("svft", {}, 16)])
def test_results_against_numpy(method, options, rank):
    base, model = trained(method, **options)
    found = analyze.analyze_model(base, model)
    for name, f in found.items():
        W0, W = (m.get_submodule(name).weight.detach().double().numpy() for m in (base, model))
        dW, (U, S, Vt) = W - W0, np.linalg.svd(W0, full_matrices=False)
        C = U.T @ dW @ Vt.T
        expected = {"before": S, "after": np.linalg.svd(W, compute_uv=False), "C": abs(C), "rank": rank,
                    "change": np.linalg.svd(dW, compute_uv=False), "size": np.linalg.norm(dW) / np.linalg.norm(W0),
                    "leading": (C[:4, :4] ** 2).sum() / (dW ** 2).sum()}
        assert f.keys() == expected.keys() and (f["change"] > 0).sum() == rank
        for key, value in expected.items():
            np.testing.assert_allclose(f[key], value, rtol=1e-4, atol=1e-6, err_msg=key)


def test_the_leading_quarter_and_the_rank_of_one_direction_and_of_none():
    base, model = trained("svft", size=0, pattern="plain")
    model.wide.M.data[3] = 0.2   # of 16 directions, the leading quarter is 0 to 3
    found = analyze.analyze_model(base, model)
    assert found["wide"]["leading"].item() == pytest.approx(1) and found["wide"]["rank"] == 1
    assert found["square"]["rank"] == 0 and found["square"]["size"] < 1e-6   # nothing but rounding


def test_a_band_is_laid_flat():
    C = torch.arange(25.0).view(5, 5)
    flat = analyze.band(C, 2)
    for i in range(5):
        for off in range(-2, 3):
            assert flat[2 + off, i] == C[i, i + off] if 0 <= i + off < 5 else flat[2 + off, i].isnan()


@pytest.mark.parametrize("method, options", [("svft", {"off_diagonals": 2}), ("svft", {"basis": "random"})])
def test_the_command_prints_a_table_and_draws_a_figure(method, options, tmp_path, monkeypatch):
    """A notebook keeps its matplotlib backend."""
    base, model = trained(method, tiny_gpt, ("query", "up"), **options)
    model_file.save_model(tmp_path / "model.pt", base, {"data": "x"})
    save_adapter(model, tmp_path / "adapter.pt")
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)   # importing it would fail
    printed = call(analyze, "--init", tmp_path / "model.pt", "--adapter", tmp_path / "adapter.pt")
    rows = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("|")][2:]
    assert rows == ["blocks.0.attention.query", "blocks.0.mlp.up", "mean of query", "mean of up"]
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image").open(tmp_path / "analysis.png")
    assert image.getpixel((0, 0))[3] == 0, "transparent, for dark pages"
    assert image.height == (576 if options == {"off_diagonals": 2} else 360)   # a band has a second row


def test_the_best_row_of_a_comparison_is_drawn(tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(analyze, "draw", lambda path, layers, method, _: drawn.append((method, len(layers))) or True)
    base, rows = tiny_gpt(), [{"method": spec, "seed": 3, "metric": loss, "higher_is_better": False} for spec, loss in (
        ("zero-shot", 0.5), ("svft:pattern=plain", 2.0), ("svfit", 1.5), ("lora:rank=8", 1.0), ("svft", None))]
    save_adapter(trained("svfit", tiny_gpt)[1], tmp_path / "runs" / "svfit-seed3" / "adapter.pt")
    analyze.draw_best(tmp_path, rows, base)
    assert drawn == [("svfit", 6)] and "the update by svfit" in capsys.readouterr().out
    analyze.draw_best(tmp_path, rows[3:], base)
    assert len(drawn) == 1 and not hasattr(base, "adaptation")


def test_what_cannot_be_shown(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert analyze.draw(tmp_path / "p.png", analyze.analyze_model(*trained("svfit")), "svfit", {}) is False
    with refused("only a head"):
        analyze.analyze_model(Shapes(), adapt(Shapes(), "head", also_train=("wide",)))
    assert "nowhere.pt" in call(analyze, "--init", "nowhere.pt", "--adapter", "x.pt", code=2)
    assert not list(tmp_path.iterdir())
