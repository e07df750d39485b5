"""What the tests of both scripts share: a setting in which a whole run takes a second, and how a script is called."""

import contextlib
import io
import json
from dataclasses import replace

import pytest

import train_gpt
import train_vit
from svmini.data import glyphs, text
from svmini.data.arithmetic import Arithmetic
from toy import timeless

SIZES = {"n_layer": 1, "n_head": 2, "d_model": 16}
PROSE = "\n\n".join(f"On day {i} the {('cat', 'dog', 'fox')[i % 3]} sees {i * i} birds\nand number {7 * i % 11} sings."
                    for i in range(260))


@pytest.fixture(scope="module", autouse=True)
def little(tmp_path_factory):
    """Few steps of small models; a few pictures of every class, the first pages of texts, forty problems; files."""
    folder = tmp_path_factory.mktemp("data ü")
    (folder / "prose.txt").write_text(PROSE, encoding="utf-8")
    (folder / "pairs.jsonl").write_text("".join(
        json.dumps({"question": f"Ann has {i} pears.", "answer": f"So {i}.\n#### {i}"}) + "\n" for i in range(20)))
    problems, kept = Arithmetic.problems, {}

    def few(self, split, n):
        key = self.operation, split
        kept[key] = kept.get(key) or problems(self, split, 40)
        return kept[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_vit, "PRETRAIN", replace(train_vit.PRETRAIN, steps=24))
        patch.setattr(train_vit, "ADAPT", replace(train_vit.ADAPT, steps=8))
        for key, value in train_gpt.PRETRAIN.items():
            patch.setitem(train_gpt.PRETRAIN, key, replace(value, steps=24, batch_size=4))
        for key, value in train_gpt.ADAPT.items():
            patch.setitem(train_gpt.ADAPT, key, replace(value, steps=8, batch_size=4))
        patch.setattr(train_vit, "MODEL", SIZES)
        patch.setattr(train_gpt, "MODEL", {"text": SIZES, "arithmetic": SIZES})
        for which in "AB":
            patch.setitem(glyphs.GLYPHS[which], "sizes", {"train": 4, "val": 2, "test": 3})
        library, topics = text.stdlib_source()[:40_000], text.reference_topics()[:30_000]
        patch.setattr(text, "stdlib_source", lambda: library)
        patch.setattr(text, "reference_topics", lambda: topics)
        patch.setattr(text, "TEXT_EVAL_SIZE", 4)
        patch.setattr(Arithmetic, "problems", few)
        yield folder


def call(script, *argv, code=0):
    """What script.main(argv) prints, or what it says on stderr where `code` is not 0."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        got = script.main([str(a) for a in (*argv, "--device", "cpu")])
    assert got == code, error.getvalue()
    assert code == 0 or error.getvalue().count("\n") == 1
    return error.getvalue() if code else out.getvalue()


def read(out):
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def rows(out):
    return [timeless(row) for row in read(out)["rows"]]
