"""Shared by the tests of both scripts: settings with which a run takes a second, and how to call a script.

As a program, it runs a script with these settings in a process of its own: python little.py train_vit --steps 3 ...
"""

import contextlib
import functools
import importlib
import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_gpt  # noqa: E402
import train_vit  # noqa: E402
from svmini import analyze  # noqa: E402
from svmini.data import glyphs, text  # noqa: E402
from svmini.data.arithmetic import Arithmetic  # noqa: E402
from toy import timeless  # noqa: E402

SIZES = {"n_layer": 1, "n_head": 2, "d_model": 16}
PROSE = "\n\n".join(f"On day {i} the {('cat', 'dog', 'fox')[i % 3]} sees {i * i} birds\nand number {7 * i % 11} sings."
                    for i in range(260))


def make_little(patch):
    """Set few steps of small models, a few images per class, the first pages of the texts, and forty problems."""
    patch.setattr(train_vit, "PRETRAIN", replace(train_vit.PRETRAIN, steps=24))
    patch.setitem(train_vit.ADAPT, "steps", 8)
    for key, config in train_gpt.PRETRAIN.items():
        patch.setitem(train_gpt.PRETRAIN, key, replace(config, steps=24, batch_size=4))
    for key in train_gpt.ADAPT:
        patch.setitem(train_gpt.ADAPT, key, {"steps": 8, "batch_size": 4})
    patch.setattr(train_vit, "MODEL", SIZES)
    patch.setattr(train_gpt, "MODEL", {"text": SIZES, "arithmetic": SIZES})
    for which in "AB":
        patch.setitem(glyphs.GLYPHS[which], "sizes", {"train": 4, "val": 2, "test": 3})
    library, topics = text.stdlib_source()[:20_000], text.reference_topics()[:15_000]
    patch.setattr(text, "stdlib_source", lambda: library)
    patch.setattr(text, "reference_topics", lambda: topics)
    patch.setattr(text, "TEXT_EVAL_SIZE", 4)
    patch.setattr(train_gpt, "train_bpe", functools.cache(train_gpt.train_bpe))
    patch.setattr(analyze, "draw_best", lambda *a: None)   # most of the time of a little run
    problems, known = Arithmetic.problems, {}

    def few_problems(self, split, n):
        key = self.operation, split
        known[key] = known.get(key) or problems(self, split, 40)
        return known[key]

    patch.setattr(Arithmetic, "problems", few_problems)


@pytest.fixture(scope="module", autouse=True)
def little(tmp_path_factory):
    """Make both scripts little; returns a folder with a text and question-answer pairs."""
    folder = tmp_path_factory.mktemp("data ü")
    (folder / "prose.txt").write_text(PROSE, encoding="utf-8")
    (folder / "pairs.jsonl").write_text("".join(
        json.dumps({"question": f"Ann has {i} pears.", "answer": f"So {i}.\n#### {i}"}) + "\n" for i in range(20)))
    with pytest.MonkeyPatch.context() as patch:
        make_little(patch)
        yield folder


def call(script, *argv, code=0):
    """Return what script.main(argv) prints on stdout; on stderr if `code` is 2 or 130."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        got = script.main([str(a) for a in (*argv, "--device", "cpu")])
    assert got == code, error.getvalue()
    assert code == 0 or error.getvalue().count("\n") == 1
    return error.getvalue() if code > 1 else out.getvalue()


def read(out):
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def rows(out):
    return [timeless(row) for row in read(out)["rows"]]


if __name__ == "__main__":
    make_little(pytest.MonkeyPatch())
    sys.exit(importlib.import_module(sys.argv[1]).main(sys.argv[2:]))
