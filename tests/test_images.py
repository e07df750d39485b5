"""Pictures: labels fit, splits differ, seeds repeat, caches heal, and damaged or missing files are named."""

import gzip
import hashlib
import os
import shutil
from pathlib import Path

import pytest
import torch

from svmini import images
from svmini.images import batch, glyphs, load_pictures, save_grid


@pytest.fixture(scope="module")
def b():
    return glyphs("B", seed=0)


def same(p, q):
    return all(torch.equal(p.splits[s][i], q.splits[s][i]) for s in p.splits for i in (0, 1))


def few(monkeypatch, which="B", n=3):
    """Make a glyph set small; its full size is tested once."""
    monkeypatch.setitem(images.GLYPHS[which], "sizes", {"train": n, "val": n, "test": n})


def test_b_has_the_sizes_and_scale_it_promises(b):
    assert b.classes == list("abcdefghijklmnopqrstuvwxyz")
    for split, n in {"train": 50, "val": 30, "test": 60}.items():
        x, y = b.splits[split]
        assert x.shape == (26 * n, 1, 24, 24) and x.dtype == torch.float32
        assert y.dtype == torch.int64 and y.bincount().tolist() == [n] * 26


def test_a_is_light_on_dark_and_b_dark_on_light(monkeypatch, b):
    few(monkeypatch, "A")
    a = glyphs("A")
    assert len(a.classes) == len(set(a.classes)) == 34 and not {"0", "I"} & set(a.classes)
    x, y = a.splits["val"]
    assert y.tolist() == list(range(34)) * 3
    assert x.median() < x.mean() and b.splits["val"][0].median() > b.splits["val"][0].mean()


def test_a_pixel_means_what_the_written_numbers_say():
    raw = torch.tensor([[[0, 255]]], dtype=torch.uint8)   # (1, 1, 2)
    assert torch.allclose(images.normalise(raw, 0.25, 0.5), torch.tensor([[[[-0.5, 1.5]]]]))


def test_each_label_names_its_picture(b):
    """The class whose mean training picture is nearest is right far more often than by chance (4 %)."""
    x, y = b.splits["train"]
    means = torch.stack([x[y == k].mean(dim=0) for k in range(26)]).flatten(1)   # (26, 576)
    for split in ("val", "test"):
        x, y = b.splits[split]
        right = torch.cdist(x.flatten(1), means).argmin(dim=1) == y
        assert right.float().mean() > 0.4


def test_the_drawing_is_of_the_character():
    bank = images.draw_bank("LT")   # each (strokes, 64, 64); L is heavy below, T above
    top, bottom = bank[:, :, :32].sum(dim=(2, 3)), bank[:, :, 32:].sum(dim=(2, 3))
    assert (bottom[0] > top[0]).all() and (top[1] > bottom[1]).all()
    ink = bank.sum(dim=(2, 3))
    assert (ink[:, 1:] > ink[:, :-1]).all(), "every stroke width has more ink than the one before"


def test_a_descender_is_not_cut_off():
    bank = images.draw_bank("gjpqy")
    assert bank[:, :, -1].max() == 0 and bank[:, :, 0].max() == 0


def test_seed_and_split_decide_the_pictures(monkeypatch):
    few(monkeypatch)
    p = glyphs("B", seed=1)
    assert same(p, glyphs("B", seed=1)) and not same(p, glyphs("B", seed=2))
    flat = torch.cat([p.splits[s][0] for s in p.splits]).flatten(1)
    assert len(flat.unique(dim=0)) == len(flat), "no picture is in two splits"


def test_cache_changes_nothing_and_heals(monkeypatch, tmp_path, capsys):
    few(monkeypatch)
    plain = glyphs("B", seed=3)
    assert same(plain, glyphs("B", seed=3, cache=tmp_path / "kept"))
    [file] = (tmp_path / "kept").iterdir()
    assert file.name == f"glyphs-B-seed3-v{images.RECIPE}.pt"
    monkeypatch.setattr(images, "draw_bank", None)   # from here on, drawing fails
    assert same(plain, glyphs("B", seed=3, cache=tmp_path / "kept"))
    monkeypatch.undo()
    few(monkeypatch)
    assert capsys.readouterr().err == ""
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damage in (whole[:1000], b"", bytes(flipped)):
        file.write_bytes(damage)
        assert same(plain, glyphs("B", seed=3, cache=tmp_path / "kept"))
        err = capsys.readouterr().err
        assert str(file) in err and "made again" in err and err.count("\n") == 1
        assert [f.name for f in file.parent.iterdir()] == [file.name]
        assert same(plain, glyphs("B", seed=3, cache=tmp_path / "kept")) and capsys.readouterr().err == ""


def test_cache_of_other_pictures_is_refused(monkeypatch, tmp_path, capsys):
    """A file that is sound but whose pictures were changed after they were written."""
    few(monkeypatch)
    plain = glyphs("B", cache=tmp_path)
    [file] = tmp_path.iterdir()
    content = torch.load(file, weights_only=True)
    content["splits"]["val"][0, 0, 0] ^= 1
    torch.save(content, file)
    assert same(plain, glyphs("B", cache=tmp_path)) and "made again" in capsys.readouterr().err


def test_pillow_without_freetype_is_said(monkeypatch):
    from PIL import ImageFont

    def load_default(size=None):
        raise ImportError("The _imagingft C module is not installed")
    monkeypatch.setattr(ImageFont, "load_default", load_default)
    with pytest.raises(ValueError, match="Pillow 10.1 or later with FreeType"):
        glyphs("B")


def test_unknown_names_are_said():
    with pytest.raises(ValueError, match="A, B"):
        glyphs("C")
    with pytest.raises(ValueError, match="mnist, fashionmnist"):
        load_pictures("cifar10", "anywhere")
    with pytest.raises(ValueError, match="--data-dir"):
        load_pictures("mnist")


def test_batch_is_a_function_of_data_seed_and_step():
    x, y = torch.arange(50).view(50, 1, 1, 1).float(), torch.arange(50)
    before = torch.get_rng_state()
    bx, by = batch(x, y, 32, seed=0, step=5)
    assert bx.shape == (32, 1, 1, 1) and torch.equal(bx.flatten().long(), by)
    assert len(by.unique()) == 32
    assert torch.equal(by, batch(x, y, 32, 0, 5)[1])
    assert not torch.equal(by, batch(x, y, 32, 0, 6)[1]) and not torch.equal(by, batch(x, y, 32, 5, 0)[1])
    assert torch.equal(before, torch.get_rng_state()), "the global generator is left alone"
    drawn = torch.cat([batch(x, y, 32, 0, step)[1] for step in range(200)]).bincount(minlength=50)
    assert drawn.min() > 90 and drawn.max() < 166   # 128 expected, standard deviation below 7
    assert len(batch(x, y, 64, 0, 0)[1]) == 64
    with pytest.raises(ValueError, match="at least 1"):
        batch(x[:0], y[:0], 32, 0, 0)


# A set in MNIST's format, of 10 classes and 12 pictures a class, whose first pixel is the label.

def idx(values):
    shape = values.shape
    return bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape) + values.numpy().tobytes()


@pytest.fixture
def small_mnist(monkeypatch, tmp_path):
    from torchvision.datasets import MNIST
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    resources = []
    for part, n in (("train", 120), ("t10k", 30)):
        labels = (torch.arange(n) * 7 % 10).to(torch.uint8)
        pictures = torch.randint(256, (n, 28, 28), generator=torch.Generator().manual_seed(n)).to(torch.uint8)
        pictures[:, 0, 0] = labels
        for name, values in ((f"{part}-images-idx3-ubyte.gz", pictures), (f"{part}-labels-idx1-ubyte.gz", labels)):
            (raw / name).write_bytes(gzip.compress(idx(values), mtime=0))
            resources.append((name, hashlib.md5((raw / name).read_bytes()).hexdigest()))
    monkeypatch.setattr(MNIST, "resources", resources)
    monkeypatch.setattr(MNIST, "mirrors", [(tmp_path / "no-such-mirror").as_uri() + "/"])   # no network in tests
    monkeypatch.setattr(images, "VAL_PER_CLASS", 4)
    return tmp_path / "data"


def first_pixel(x):
    return ((x[:, 0, 0, 0] * 0.3081 + 0.1307) * 255).round().long()


def test_real_pictures_are_split_by_class_and_seed(small_mnist):
    p = load_pictures("mnist", small_mnist)
    assert p.classes == list("0123456789")
    for split, n in {"train": 8, "val": 4, "test": 3}.items():
        x, y = p.splits[split]
        assert x.shape == (10 * n, 1, 28, 28) and x.dtype == torch.float32 and y.dtype == torch.int64
        assert y.bincount().tolist() == [n] * 10 and torch.equal(first_pixel(x), y)
    assert same(p, load_pictures("mnist", str(small_mnist))) and not same(p, load_pictures("mnist", small_mnist, 1))


def test_few_pictures_a_class_are_part_of_the_whole_split(small_mnist):
    whole, part = load_pictures("mnist", small_mnist), load_pictures("mnist", small_mnist, per_class=2)
    assert torch.equal(whole.splits["test"][0], part.splits["test"][0])
    rows = {split: {tuple(x.flatten().tolist()) for x in whole.splits[split][0]} for split in ("train", "val")}
    assert not rows["train"] & rows["val"]
    for split in rows:
        x, y = part.splits[split]
        assert y.bincount().tolist() == [2] * 10 and torch.equal(first_pixel(x), y)
        assert {tuple(x.flatten().tolist()) for x in x} <= rows[split]
    for wrong in (0, 9):
        with pytest.raises(ValueError, match="from 1 to 8"):
            load_pictures("mnist", small_mnist, per_class=wrong)


@pytest.mark.parametrize("name, cut", [("train-images-idx3-ubyte.gz", 1000), ("t10k-labels-idx1-ubyte.gz", 0),
                                       ("train-images-idx3-ubyte", 1000), ("t10k-labels-idx1-ubyte", 3)])
def test_a_damaged_file_is_named_and_left_alone(small_mnist, name, cut):
    load_pictures("mnist", small_mnist)   # unpacks
    file = small_mnist / "MNIST" / "raw" / name
    whole = file.read_bytes()
    file.write_bytes(whole[:cut])
    with pytest.raises(ValueError, match="damaged") as error:
        load_pictures("mnist", small_mnist)
    assert f"{file} is" in str(error.value) and "\n" not in str(error.value)
    assert file.read_bytes() == whole[:cut]
    if file.suffix != ".gz":   # the remedy works
        file.unlink()
        load_pictures("mnist", small_mnist)
        assert file.read_bytes() == whole


def test_a_missing_file_is_named_with_its_place(small_mnist, tmp_path):
    raw = small_mnist / "MNIST" / "raw"
    (raw / "t10k-images-idx3-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError) as error:
        load_pictures("mnist", small_mnist)
    said = str(error.value)
    assert "\n" not in said and "t10k-images-idx3-ubyte.gz" in said and "train-images" not in said
    assert "no-such-mirror" in said and str(raw) in said and "--data glyphs" in said
    with pytest.raises(FileNotFoundError, match="train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz"):
        load_pictures("mnist", tmp_path / "empty")


@pytest.mark.skipif("SVMINI_DATA" not in os.environ, reason="SVMINI_DATA names no folder with MNIST/raw/*.gz")
def test_the_real_files(tmp_path):
    raw = tmp_path / "MNIST" / "raw"   # a copy, as torchvision unpacks beside the files
    raw.mkdir(parents=True)
    for file in (Path(os.environ["SVMINI_DATA"]) / "MNIST" / "raw").glob("*.gz"):
        shutil.copyfile(file, raw / file.name)
    p = load_pictures("mnist", tmp_path, per_class=50)
    assert {split: len(y) for split, (x, y) in p.splits.items()} == {"train": 500, "val": 500, "test": 10_000}
    x, y = p.splits["train"]
    assert abs(x.mean()) < 0.1 and abs(x.std() - 1) < 0.1
    means = torch.stack([x[y == k].mean(dim=0) for k in range(10)]).flatten(1)   # (10, 784)
    x, y = p.splits["test"]
    assert (torch.cdist(x.flatten(1), means).argmin(dim=1) == y).float().mean() > 0.7


# The grid

def pixels(path):
    from PIL import Image
    with Image.open(path) as image:
        assert image.mode == "RGB"
        return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)


def has(image, rgb):
    return bool((image == torch.tensor(rgb, dtype=torch.uint8)).all(dim=2).any())


GREEN, RED = (0x1a, 0x7f, 0x37), (0xcf, 0x22, 0x2e)


def test_grid_shows_right_in_green_and_wrong_in_red(tmp_path, b):
    x, y = b.splits["test"]
    y = y[:4].tolist()
    wrong = [k + 1 for k in y]
    for name, before, after, green, red in (("r", None, y, True, False), ("w", None, wrong, False, True),
                                            ("rw", y, wrong, True, True)):
        save_grid(tmp_path / "out" / f"{name}.png", x[:4], y, before, after, b.classes)
        image = pixels(tmp_path / "out" / f"{name}.png")
        assert (has(image, GREEN), has(image, RED)) == (green, red)
        assert image.shape[1] >= 4 * 96
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["r.png", "rw.png", "w.png"]


def test_grid_takes_colour_tensors_and_long_names(tmp_path):
    x = torch.zeros(2, 3, 32, 32)
    x[:, 0] = 7.0   # pure red on whatever scale
    labels, classes = torch.tensor([0, 1]), ["a", "an uncommonly long name of a class"]
    save_grid(tmp_path / "short.png", x, labels[:1].repeat(2), None, labels[:1].repeat(2), classes)
    save_grid(tmp_path / "long.png", x, labels, labels, labels, classes)
    assert has(pixels(tmp_path / "long.png"), (255, 0, 0))
    assert pixels(tmp_path / "long.png").shape[1] > pixels(tmp_path / "short.png").shape[1], "the tiles make room"


def test_grid_refuses_lists_of_other_lengths(tmp_path):
    with pytest.raises(ValueError, match="equally many"):
        save_grid(tmp_path / "x.png", torch.zeros(2, 1, 24, 24), [0, 1], [0], [0, 1], ["a", "b"])
    assert not list(tmp_path.iterdir())
