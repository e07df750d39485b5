"""docs/tour.ipynb: all code cells run in order, and the stored outputs come from the stored code.

After a change to the notebook, execute it and store its outputs again (three minutes; needs jupyter and matplotlib):

    python tests/program/test_tour.py
"""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOUR = Path(__file__).parents[2] / "docs" / "tour.ipynb"
STALE = ("docs/tour.ipynb has changed since its outputs were stored. To undo the change: git checkout docs/tour.ipynb. "
         "To keep it, execute the notebook and store the outputs: python tests/program/test_tour.py")


def read():
    """Return the notebook, the source of each code cell, and their SHA-256."""
    notebook = json.loads(TOUR.read_text(encoding="utf-8"))
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return notebook, code, hashlib.sha256("\n\n".join(code).encode("utf-8")).hexdigest()


def test_cells_run_in_order(monkeypatch, tmp_path):
    from svmini.data.glyphs import GLYPHS     # here, because the script below does not need svmini
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    for recipe in GLYPHS.values():
        monkeypatch.setitem(recipe, "sizes", {"train": 2, "val": 1, "test": 2})
    alts, names = [], {"display": lambda figure, metadata: alts.append(metadata["image/png"]["alt"])}
    with matplotlib.rc_context({"backend": "Agg"}):
        for code in read()[1]:
            exec(code, names)
            if "STEPS" in names:
                names.update(PRETRAIN_STEPS=2, STEPS=2, SEEDS=2)
    assert len(names["losses"]) == 2 and len(alts) == 9 and all(alts)


def test_stored_outputs_belong_to_stored_code():
    notebook, code, digest = read()
    assert notebook["metadata"].get("code_sha256") == digest, STALE
    counts = [cell["execution_count"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(code) + 1)), STALE
    assert TOUR.stat().st_size < 1.5e6


if __name__ == "__main__":
    shutil.rmtree(TOUR.parent / "tour-out", ignore_errors=True)   # or pretraining would be skipped
    subprocess.run([sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--inplace", TOUR,
                    "--ExecutePreprocessor.record_timing=False"], check=True)
    notebook, code, digest = read()
    notebook["metadata"]["code_sha256"] = digest
    TOUR.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
