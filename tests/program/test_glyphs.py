"""Glyphs: labels match images, splits differ, and a seed repeats its images."""

import pytest
import torch

from helpers import same
from svmini.data import glyphs as module
from svmini.data.glyphs import Glyphs


@pytest.fixture(scope="module")
def b():
    return Glyphs("B", seed=0)


def few(monkeypatch, which="B", n=3):
    """Make a glyph dataset small; the full size is tested once."""
    monkeypatch.setitem(module.GLYPHS[which], "sizes", {"train": n, "val": n, "test": n})


def test_b_has_the_documented_sizes_and_range(b):
    assert b.classes == list("abcdefghijklmnopqrstuvwxyz")
    for split, n in {"train": 50, "val": 30, "test": 60}.items():
        x, y = b.splits[split]
        assert x.shape == (26 * n, 1, 24, 24) and x.dtype == torch.uint8
        assert y.dtype == torch.int64 and y.bincount().tolist() == [n] * 26
        assert x.min() == 0 and x.max() == 255
    assert b.mean == b.std == (0.5,) and not b.natural, "a mirrored letter is another letter"


def test_a_is_light_on_dark_and_b_dark_on_light(monkeypatch, b):
    few(monkeypatch, "A")
    a = Glyphs("A")
    assert len(a.classes) == len(set(a.classes)) == 34 and not {"0", "I"} & set(a.classes)
    x, y = a.splits["val"]
    assert y.tolist() == list(range(34)) * 3
    assert x.median() < x.float().mean() and b.splits["val"][0].median() > b.splits["val"][0].float().mean()


def test_each_label_matches_its_image(b):
    """The class with the nearest mean training image is right far more often than by chance (4 %)."""
    x, y = b.splits["train"]
    means = torch.stack([x[y == k].float().mean(dim=0) for k in range(26)]).flatten(1)   # (26, 576)
    for split in ("val", "test"):
        x, y = b.splits[split]
        right = torch.cdist(x.flatten(1).float(), means).argmin(dim=1) == y
        assert right.float().mean() > 0.4


def test_a_drawing_shows_its_character():
    bank = module.draw_bank("LT")   # each (strokes, 64, 64); L has more ink below, T above
    top, bottom = bank[:, :, :32].sum(dim=(2, 3)), bank[:, :, 32:].sum(dim=(2, 3))
    assert (bottom[0] > top[0]).all() and (top[1] > bottom[1]).all()
    assert module.draw_bank("gjpqy")[:, :, [0, -1]].max() == 0, "descenders are not cut off"
    ink = bank.sum(dim=(2, 3))
    assert (ink[:, 1:] > ink[:, :-1]).all(), "every stroke width has more ink than the one before"


def test_images_depend_on_seed_and_split(monkeypatch):
    few(monkeypatch)
    p = Glyphs("B", seed=1)
    assert same(p.splits, Glyphs("B", seed=1).splits) and not same(p.splits, Glyphs("B", seed=2).splits)
    assert p.draw(seed=7, size=24) is p.draw(seed=0, size=48), "the other seeds of a run get the same images"
    flat = torch.cat([p.splits[s][0] for s in p.splits]).flatten(1)
    assert len(flat.unique(dim=0)) == len(flat), "no image is in two splits"
