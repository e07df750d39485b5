"""Real picture sets, in small and with the layout of their files: what is drawn, what is damaged, what is missing."""

import bz2
import os
import shutil
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from fake_datasets import TEST, TRAIN, build, build_flowers, build_mnist, build_tree, pictures, write_picture
from svmini.data import glyphs, image_datasets
from svmini.data.image_datasets import REAL, Real, open_images
from svmini.data.images import prepare
from svmini.errors import InputError, MissingFile

SETS = [*REAL, "folder", "folder with test"]


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """The addresses that were asked for: there is no network in tests."""
    addresses = []

    def urlopen(request, *arguments, **options):
        addresses.append(request.full_url)
        raise urllib.error.URLError("no route\nto host")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return addresses


def keys(x):
    return [bytes(picture.flatten().tolist()) for picture in x]


def same(p, q, splits=("train", "val", "test")):
    return all(torch.equal(p[s][i], q[s][i]) for s in splits for i in (0, 1))


# ---- what is drawn ----

@pytest.mark.parametrize("which", SETS)
def test_a_draw_has_the_pictures_that_it_should(which, tmp_path, monkeypatch, asked):
    name, made = build(which, tmp_path, monkeypatch)
    n_classes = 10 if which.endswith("mnist") or "cifar" in which else 4
    origin = {key: split for split, (x, _) in made.items() for key in keys(x)}
    ten, every, two = (open_images(name, tmp_path, per_class=n) for n in (10, None, 2))
    draws = [ten.draw(0, 8), ten.draw(0, 8), ten.draw(1, 8), every.draw(0, 8), two.draw(0, 8)]
    for splits, n_train, n_val in zip(draws, (8, 8, 8, 11, 1), (2, 2, 2, 1, 1)):
        found = {}
        for split, n in {"train": n_train, "val": n_val, "test": TEST}.items():
            x, y = splits[split]
            assert x.dtype == torch.uint8 and y.dtype == torch.int64 and y.bincount().tolist() == [n] * n_classes
            assert torch.equal(x[:, 0, 0, 0].long(), y), "the label is that of the picture"
            found[split] = set(keys(x))
            assert len(found[split]) == len(y)
            assert {origin[key] for key in found[split]} == ({"both"} if "both" in made else
                                                             {"test" if split == "test" else "train"})
        assert not found["train"] & found["val"] and not found["test"] & (found["train"] | found["val"])
    assert ten.name == name and len(ten.classes) == n_classes and (ten.per_class, every.per_class) == (10, None)
    assert which == "fashionmnist" or "3" in ten.classes[3], "names stand at their labels"
    assert len(ten.mean) == len(ten.std) == draws[0]["val"][0].shape[1]
    one, again, other, *_ = draws
    assert same(one, again) and same(one, other, ["test"])
    assert one["test"][0] is other["test"][0], "it is read once"
    assert not same(one, other, ["train"]) and not same(one, other, ["val"])
    assert same(one, open_images(name, str(tmp_path), 5, 10).draw(0, 8)), "also of another process"
    for wrong in (1, 13):
        with pytest.raises(InputError, match=f"{wrong} pictures a class .* class has {TRAIN} training pictures"):
            open_images(name, tmp_path, per_class=wrong)
    assert not asked, "what is there is not asked for again"


def test_validation_takes_a_tenth_and_no_more_than_a_limit(tmp_path, monkeypatch):
    build_mnist(tmp_path, monkeypatch, datasets.MNIST, per_class=40)
    source = open_images("mnist", tmp_path)
    assert len(source.draw(0, 28)["val"][1]) == 10 * 4
    monkeypatch.setattr(image_datasets, "VAL_PER_CLASS", 3)
    drawn = source.draw(0, 28)
    assert drawn["val"][1].bincount().tolist() == [3] * 10 and len(drawn["train"][1]) == 10 * 37


def test_a_folder_gives_the_same_wherever_it_lies(tmp_path):
    build_tree(tmp_path / "here", {"": 15})
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    here, there = (open_images(f"folder:{tmp_path / place}", None, 0, 5).draw(3, 8) for place in ("here", "there"))
    assert same(here, there)


def test_files_are_resized_by_their_shorter_side_and_cropped_to_the_middle(tmp_path):
    stripes = torch.zeros(3, 10, 30, dtype=torch.uint8)
    for i in range(3):
        stripes[i, :, 10 * i:10 * i + 10] = 200   # red, green, blue, each as wide as the picture is high
    for k in range(4):
        write_picture(tmp_path / "a" / f"wide{k}.png", stripes)
        write_picture(tmp_path / "b" / f"high{k}.png", stripes.transpose(1, 2))
    Image.fromarray(np.full((6, 6), 77, dtype=np.uint8)).save(tmp_path / "b" / "grey.png")
    for side in (10, 5):
        x, y = open_images(f"folder:{tmp_path}", None).draw(0, side)["train"]
        assert x.shape[1:] == (3, side, side)
        for picture in x:
            centre = picture[:, 1:-1, 1:-1].flatten(1).unique(dim=1).flatten().tolist()
            assert centre in ([0, 200, 0], [77, 77, 77])


@pytest.mark.parametrize("which, size, side", [("eurosat", 4, 4), ("eurosat", 224, 64), ("food101", 16, 16),
                                               ("mnist", 8, 28)])
def test_pictures_are_kept_no_larger_than_they_are_needed(which, size, side, tmp_path, monkeypatch):
    name, _ = build(which, tmp_path, monkeypatch)
    source = open_images(name, tmp_path, per_class=2)
    for asked, kept in ((size, side), (4, 28 if which == "mnist" else 4)):   # for another model
        assert {x.shape[-1] for x, _ in source.draw(0, asked).values()} == {kept}


def test_glyphs_are_drawn_by_the_first_seed(monkeypatch):
    for recipe in glyphs.GLYPHS.values():
        monkeypatch.setitem(recipe, "sizes", {"train": 3, "val": 3, "test": 3})
    a, b, other = (open_images(f"glyphs {which}", None, seed) for which, seed in (("A", 3), ("B", 3), ("B", 4)))
    assert (a.name, len(a.classes), b.name, len(b.classes)) == ("glyphs A", 34, "glyphs B", 26)
    assert same(b.draw(0, 24), b.draw(1, 24)) and not same(b.draw(0, 24), other.draw(0, 24))


# ---- a set more is one line ----

def test_usps_is_one_line(tmp_path, monkeypatch, asked):
    monkeypatch.setitem(REAL, "usps", Real("USPS", (0.2469,), (0.2989,), False, 16))
    with pytest.raises(MissingFile, match="^usps could not be .* the files of the set into .*glyphs"):
        open_images("usps", tmp_path)
    assert len(asked) == 1 and "usps.bz2" in asked[0]
    for file, n in (("usps.bz2", TRAIN), ("usps.t.bz2", TEST)):
        x, y = pictures(10, n, 1, 16, seed=n)
        lines = (f"{k + 1} " + " ".join(f"{i + 1}:{v / 127.5 - 1}" for i, v in enumerate(p.flatten().tolist()))
                 for p, k in zip(x, y.tolist()))
        (tmp_path / file).write_bytes(bz2.compress("\n".join(lines).encode()))
    drawn = open_images("usps", tmp_path, per_class=5).draw(0, 16)
    assert {split: tuple(x.shape) for split, (x, _) in drawn.items()} == {
        "train": (40, 1, 16, 16), "val": (10, 1, 16, 16), "test": (30, 1, 16, 16)}
    x, y = drawn["train"]
    assert (x[:, 0, 0, 0].long() - y).abs().max() <= 1 and y.bincount().tolist() == [4] * 10   # USPS rounds down


# ---- names and folders that are not there ----

@pytest.mark.parametrize("name", ["svhn", "folder", "folder:", "mnist:here", "", "glyphs C"])
def test_unknown_names_are_said(name, tmp_path):
    with pytest.raises(InputError, match="no picture set .* glyphs A, glyphs B, mnist, fashionmnist, .* folder:PATH"):
        open_images(name, tmp_path)


def test_a_folder_that_is_none_of_classes_is_said(tmp_path):
    with pytest.raises(MissingFile, match="no folder .*nowhere"):
        open_images(f"folder:{tmp_path / 'nowhere'}", None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty is no folder of class folders"):
        open_images(f"folder:{tmp_path / 'empty'}", None)
    build_tree(tmp_path / "split", {"train": 3, "test": 2})
    shutil.rmtree(tmp_path / "split" / "test" / "class 1")
    with pytest.raises(InputError, match="different class folders: class 1 is in one only"):
        open_images(f"folder:{tmp_path / 'split'}", None)
    shutil.rmtree(tmp_path / "split" / "test")   # who says train every time would be right
    with pytest.raises(InputError, match="one class folder, train: give the folder that holds them all"):
        open_images(f"folder:{tmp_path / 'split'}", None)
    build_tree(tmp_path / "one", {"": 1})
    with pytest.raises(InputError, match="at least 2 are needed, and its smallest class has 1 training pictures"):
        open_images(f"folder:{tmp_path / 'one'}", None)


@pytest.mark.parametrize("word", REAL)
def test_a_missing_set_is_said_with_its_name_its_files_their_place_and_a_way_out(word, tmp_path, monkeypatch, asked):
    if word == "flowers102":
        build_flowers(tmp_path / "other", monkeypatch, datasets.Flowers102)   # brings a scipy where there is none
    with pytest.raises(MissingFile) as error:
        open_images(word, tmp_path / "data")
    said = str(error.value)
    assert "\n" not in said and said.startswith(f"{word} could not be read or downloaded")
    assert f"put a sound copy of {REAL[word].files} into {tmp_path / 'data'}, " in said
    assert "--data glyphs" in said and "no route to host" in said
    assert asked and all(a.startswith("http") for a in asked)
    address = asked[0].rsplit("/", 1)[1]   # the file that torchvision would put there is among those that are named
    assert address in REAL[word].files or REAL[word].files.endswith("*.gz") and address.endswith(".gz")


@pytest.mark.parametrize("which, file", [("cifar10", "cifar-10-batches-py/data_batch_3"),
                                         ("flowers102", "flowers-102/setid.mat"),
                                         ("mnist", "MNIST/raw/train-images-idx3-ubyte")])
def test_a_damaged_set_is_never_read(which, file, tmp_path, monkeypatch):
    name, _ = build(which, tmp_path, monkeypatch)
    open_images(name, tmp_path)                                # unpacks
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:-1])
    for packed in tmp_path.glob("*/raw/*.gz"):                   # what is unpacked needs them no more
        packed.write_bytes(b"")
    with pytest.raises(MissingFile, match=f"^{which} could not be read") as error:
        open_images(name, tmp_path)
    assert f"of {REAL[which].files} into {tmp_path}, delete what was unpacked" in str(error.value)


def test_flowers_without_scipy_say_so(tmp_path, monkeypatch):
    build("flowers102", tmp_path, monkeypatch)
    monkeypatch.setitem(sys.modules, "scipy.io", None)   # makes the import fail
    with pytest.raises(InputError, match="cannot read flowers102 here .* pip install scipy"):
        open_images("flowers102", tmp_path)

def test_the_real_files(tmp_path):
    packed = Path(os.environ.get("SVMINI_SHARED", "")) / "data" / "MNIST" / "raw"
    if "SVMINI_SHARED" not in os.environ or not packed.is_dir():
        pytest.skip("SVMINI_SHARED names no folder with data/MNIST/raw/*.gz")
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)   # a copy, as torchvision unpacks beside the files
    for file in packed.glob("*.gz"):
        shutil.copyfile(file, tmp_path / "MNIST" / "raw" / file.name)
    source = open_images("mnist", tmp_path, 0, 50)
    drawn = source.draw(0, 28)
    assert {split: len(y) for split, (x, y) in drawn.items()} == {"train": 400, "val": 100, "test": 10_000}
    x, tested = (prepare(drawn[split][0], 28, source.mean, source.std) for split in ("train", "test"))
    y, labels = drawn["train"][1], drawn["test"][1]
    assert abs(x.mean()) < 0.1 and abs(x.std() - 1) < 0.1
    means = torch.stack([x[y == k].mean(dim=0) for k in range(10)]).flatten(1)   # (10, 784)
    assert (torch.cdist(tested.flatten(1), means).argmin(dim=1) == labels).float().mean() > 0.65


def test_validation_on_others_of_each_class(tmp_path, monkeypatch):
    build_mnist(tmp_path, monkeypatch, datasets.MNIST, per_class=40)
    few, more = (open_images("mnist", tmp_path, 0, 10, n).draw(0, 28) for n in (None, 20))
    assert torch.equal(few["train"][0], more["train"][0]) and len(few["val"][1]) == 20
    assert more["val"][1].bincount().tolist() == [20] * 10
    seen = {x.numpy().tobytes() for split in ("train", "val") for x in few[split][0]}
    assert not seen & {x.numpy().tobytes() for x in more["val"][0]}   # neither trained on nor, above, validated on
    with pytest.raises(InputError, match="at least 2 are needed, and its smallest class has 5 training pictures"):
        open_images("mnist", tmp_path, 0, 10, 35)
