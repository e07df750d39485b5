"""docs/evidence.md: its statistics, its figures, and the script that runs the experiments."""

import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
sys.path.insert(0, str(DOCS / "reproduce"))
import evidence  # noqa: E402
import measurements  # noqa: E402
from svmini import ViT, ViTConfig, model_file  # noqa: E402


@pytest.mark.parametrize("df, t", [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042)])
def test_t_quantile_agrees_with_the_published_table(df, t):
    assert evidence.t_quantile(0.05, df) == pytest.approx(t, abs=5e-4)
    assert evidence.t_p_value(-t, df) == pytest.approx(0.05, abs=1e-4)


def test_holm_multiplies_by_the_remaining_comparisons_and_stays_monotone():
    assert evidence.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def run_line(base, seed, method, metric):
    return {"task": "glyphs", "width": "128", "steps": "200", "base": str(base), "seed": str(seed), "method": method,
            "metric": str(metric), "base_metric": "80" if base == 9 else "95"}


def test_a_comparison_averages_seeds_and_pairs_bases():
    runs = [run_line(base, seed, method, metric) for base, seed, method, metric in [
        (0, 0, "full", 70), (0, 1, "full", 72), (1, 2, "full", 80), (1, 3, "full", 80), (2, 4, "full", 90),
        (2, 4, "head", 10), (0, 0, "head", 50), (0, 1, "head", 50), (1, 2, "head", 57), (1, 3, "head", 57)]]
    found = evidence.compare(runs, "glyphs", "full", "head")
    assert (found["n"], found["mean"]) == (2, pytest.approx(22))          # 21 and 23; base 2 has one seed
    assert found["deviation"] == pytest.approx(2 ** 0.5)
    assert (found["low"], found["high"]) == (pytest.approx(22 - 12.706, abs=1e-3), pytest.approx(22 + 12.706, abs=1e-3))


def test_the_trend_is_the_least_squares_line_over_the_doublings_of_the_width():
    """Differences 1, 3 at width 64 and 5, 7 at 128: slope 4; residuals of 1 on 2 degrees of freedom, error sqrt 2."""
    found = evidence.trend({64: {"differences": [1.0, 3.0]}, 128: {"differences": [5.0, 7.0]}})
    assert (found["n"], found["mean"], found["deviation"]) == (4, pytest.approx(4), pytest.approx(2 ** 0.5))
    assert found["high"] - found["mean"] == pytest.approx(4.303 * 2 ** 0.5, abs=1e-3)


def test_an_incomplete_comparison_counts_as_p_1_in_the_family():
    """Of ten bases, number 9 is excluded: it did not learn its own task."""
    runs = [run_line(base, seed, method, metric + base / 10) for base in range(10) for seed in (0, 1)
            for method, metric in (("svft:pattern=plain", 60), ("svft:pattern=plain,basis=random", 70))]
    first = evidence.confirmatory_table(runs)[2]
    assert "| 9 |" in first and first.endswith("| incomplete: 1 |")


def test_the_figures_can_be_drawn_from_the_data(tmp_path):
    pytest.importorskip("matplotlib")
    evidence.draw(tmp_path, measurements.read())
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in DOCS.glob("evidence_*.png")}


def test_the_script_appends_a_line_a_run_and_skips_lines_it_has(tmp_path):
    pytest.importorskip("PIL")
    import small_models
    folder = tmp_path / "glyphs-128-base0" / "pretrain"
    folder.mkdir(parents=True)
    model = ViT(ViTConfig(24, 6, 1, 34, n_layer=1, n_head=2, d_model=8, mean=(0.5,), std=(0.5,)))
    model_file.save_model(folder / "model.pt", model, {"metric": 95.0, "published": False})
    words = ["run", "glyphs", "--bases", "0", "--methods", "svft:pattern=plain,basis=random", "--steps", "1",
             "--out", str(tmp_path)]
    small_models.main(words)
    first = (tmp_path / "evidence_runs.csv").read_text()
    small_models.main(words)
    assert (tmp_path / "evidence_runs.csv").read_text() == first
    lines = small_models.read(tmp_path / "evidence_runs.csv")
    assert [(line["seed"], line["method"]) for line in lines] == [(s, "svft:pattern=plain,basis=random") for s in "01"]
    assert lines[0]["metric"] != lines[1]["metric"]
