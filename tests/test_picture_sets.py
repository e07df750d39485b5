"""Real picture sets, in small and with the layout of their files: what is drawn, what is damaged, what is missing."""

import os
import shutil
import sys
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from fake_sets import TEST, TRAIN, build, build_cifar, build_flowers, build_mnist, build_tree, md5, write_picture
from svmini import images, picture_sets
from svmini.picture_sets import REAL, RealPictures

SETS = [word for word in REAL if word != "folder"] + ["folder", "folder with test"]


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
    return all(torch.equal(p.splits[s][i], q.splits[s][i]) for s in splits for i in (0, 1))


# ---- what is drawn ----

@pytest.mark.parametrize("which", SETS)
def test_a_draw_has_the_pictures_that_it_should(which, tmp_path, monkeypatch, asked):
    name, made = build(which, tmp_path, monkeypatch)
    n_classes = 10 if which.endswith("mnist") or "cifar" in which else 4
    real = RealPictures(name, tmp_path, size=8)
    origin = {key: split for split, (x, _) in made.items() for key in keys(x)}
    draws = [real.draw(seed, per_class) for seed, per_class in ((0, 10), (0, 10), (1, 10), (0, None), (0, 2))]
    for drawn, n_train, n_val in zip(draws, (8, 8, 8, 11, 1), (2, 2, 2, 1, 1)):
        assert drawn.name == name and len(drawn.classes) == n_classes
        assert len(drawn.mean) == len(drawn.std) == drawn.splits["val"][0].shape[1]
        found = {}
        for split, n in {"train": n_train, "val": n_val, "test": TEST}.items():
            x, y = drawn.splits[split]
            assert x.dtype == torch.uint8 and y.dtype == torch.int64 and y.bincount().tolist() == [n] * n_classes
            assert torch.equal(x[:, 0, 0, 0].long(), y), "the label is that of the picture"
            found[split] = set(keys(x))
            assert len(found[split]) == len(y)
            assert {origin[key] for key in found[split]} == ({"both"} if "both" in made else
                                                             {"test" if split == "test" else "train"})
        assert not found["train"] & found["val"] and not found["test"] & (found["train"] | found["val"])
    one, again, other, *_ = draws
    assert same(one, again) and same(one, other, ["test"])
    assert not same(one, other, ["train"]) and not same(one, other, ["val"])
    assert same(one, RealPictures(name, str(tmp_path), size=8).draw(0, 10)), "also of another process"
    for wrong in (1, 0, 13):
        with pytest.raises(ValueError, match=f"--per-class .* smallest class has {TRAIN} training pictures"):
            real.draw(0, wrong)
    assert not asked, "what is there is not asked for again"


def test_classes_have_their_names(tmp_path, monkeypatch):
    names = {which: RealPictures(build(which, tmp_path / which, monkeypatch)[0], tmp_path / which, 8).classes
             for which in ("mnist", "cifar10", "cifar100", "food101", "flowers102", "folder")}
    assert names == {"mnist": list("0123456789"), "cifar10": [f"kind {i}" for i in range(10)],
                     "cifar100": [f"kind {i}" for i in range(10)], "food101": [f"dish_{i}" for i in range(4)],
                     "flowers102": [f"flower {i}" for i in range(4)], "folder": [f"class {i}" for i in range(4)]}


def test_validation_takes_a_tenth_and_no_more_than_a_limit(tmp_path, monkeypatch):
    build_mnist(tmp_path, monkeypatch, datasets.MNIST, per_class=40)
    assert len(RealPictures("mnist", tmp_path, 28).draw().splits["val"][1]) == 10 * 4
    monkeypatch.setattr(picture_sets, "VAL_PER_CLASS", 3)
    drawn = RealPictures("mnist", tmp_path, 28).draw()
    assert drawn.splits["val"][1].bincount().tolist() == [3] * 10 and len(drawn.splits["train"][1]) == 10 * 37


def test_a_folder_gives_the_same_wherever_it_lies(tmp_path):
    build_tree(tmp_path / "here", {"": 15})
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    here, there = (RealPictures(f"folder:{tmp_path / place}", None, 8).draw(3, 5) for place in ("here", "there"))
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
        x, y = RealPictures(f"folder:{tmp_path}", None, side).draw(0, None).splits["train"]
        assert x.shape[1:] == (3, side, side)
        for picture in x:
            centre = picture[:, 1:-1, 1:-1].flatten(1).unique(dim=1).flatten().tolist()
            assert centre in ([0, 200, 0], [77, 77, 77])


@pytest.mark.parametrize("which, size, side", [("eurosat", 4, 4), ("eurosat", 224, 64), ("food101", 16, 16),
                                               ("mnist", 8, 28)])
def test_pictures_are_kept_no_larger_than_they_are_needed(which, size, side, tmp_path, monkeypatch):
    name, _ = build(which, tmp_path, monkeypatch)
    assert RealPictures(name, tmp_path, size).draw(0, 2).splits["train"][0].shape[-1] == side


# ---- names and folders that are not there ----

@pytest.mark.parametrize("name", ["svhn", "folder", "folder:", "mnist:here", ""])
def test_unknown_names_are_said(name, tmp_path):
    with pytest.raises(ValueError, match="no picture set .* mnist, fashionmnist, .* folder:PATH"):
        RealPictures(name, tmp_path, 8)


def test_no_folder_for_the_data_is_said():
    with pytest.raises(ValueError, match="--data-dir"):
        RealPictures("mnist", None, 28)


def test_a_folder_that_is_none_of_classes_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        RealPictures(f"folder:{tmp_path / 'nowhere'}", None, 8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty is no folder of class folders"):
        RealPictures(f"folder:{tmp_path / 'empty'}", None, 8)
    build_tree(tmp_path / "split", {"train": 3, "test": 2})
    shutil.rmtree(tmp_path / "split" / "test" / "class 1")
    with pytest.raises(ValueError, match="different class folders: class 1 is in one only"):
        RealPictures(f"folder:{tmp_path / 'split'}", None, 8)
    (tmp_path / "split" / "test" / "class 1").mkdir()
    with pytest.raises(ValueError, match="split is no folder of class folders with pictures .*class 1"):
        RealPictures(f"folder:{tmp_path / 'split'}", None, 8)
    build_tree(tmp_path / "one", {"": 1})
    with pytest.raises(ValueError, match="smallest class has 1 training pictures, at least 2 are needed"):
        RealPictures(f"folder:{tmp_path / 'one'}", None, 8).draw()
    for label in (1, 2, 3):
        shutil.rmtree(tmp_path / "one" / f"class {label}")   # who says class 0 every time would be right
    with pytest.raises(ValueError, match="one class folder, class 0: give the folder"):
        RealPictures(f"folder:{tmp_path / 'one'}", None, 8)
    build_tree(tmp_path / "lone", {"train": 3})   # would be one class, called train
    with pytest.raises(ValueError, match="a folder train and none called test, val or validation"):
        RealPictures(f"folder:{tmp_path / 'lone'}", None, 8)


@pytest.mark.parametrize("word", [w for w in REAL if w != "folder"])
def test_a_missing_set_is_said_with_file_address_place_and_way_out(word, tmp_path, monkeypatch, asked):
    if word == "flowers102":
        build_flowers(tmp_path / "other", monkeypatch, datasets.Flowers102)   # brings a scipy where there is none
    dataset = getattr(datasets, REAL[word][0])
    with pytest.raises(FileNotFoundError) as error:
        RealPictures(word, tmp_path / "data", 28)
    said = str(error.value)
    assert "\n" not in said and f"{tmp_path / 'data'} " in said
    assert "--data glyphs" in said and "no route to host" in said
    for file, (_, address) in picture_sets.files_of(dataset).items():
        assert file in said and address in said and address.startswith("http")
    assert asked and all(a.startswith("http") for a in asked)


# ---- damage ----

@pytest.mark.parametrize("word", [w for w in REAL if w != "folder"])
def test_a_damaged_archive_is_named_before_anything_is_downloaded(word, tmp_path, monkeypatch, asked):
    if word == "flowers102":
        build_flowers(tmp_path / "other", monkeypatch, datasets.Flowers102)
    for file in picture_sets.files_of(getattr(datasets, REAL[word][0])):
        data = tmp_path / "data" / Path(file).name
        (data / file).parent.mkdir(parents=True)
        (data / file).write_bytes(b"half a download")
        with pytest.raises(ValueError, match="is damaged") as error:
            RealPictures(word, data, 28)
        assert f"{data / file} is" in str(error.value) and "delete it" in str(error.value)
        assert (data / file).read_bytes() == b"half a download" and not asked


def test_a_download_that_breaks_off_is_named(tmp_path, monkeypatch):
    def breaks_off(address, path, **options):
        Path(path).write_bytes(b"half")
        raise urllib.error.URLError("gone")

    monkeypatch.setattr(datasets.utils, "_get_redirect_url", lambda address, **options: address)
    monkeypatch.setattr(datasets.utils, "_urlretrieve", breaks_off)
    with pytest.raises(ValueError, match="cifar-10-python.tar.gz is damaged"):
        RealPictures("cifar10", tmp_path, 32)


def test_a_sound_archive_is_unpacked_and_not_asked_for(tmp_path, monkeypatch, asked):
    """Also where part of what it held has gone."""
    build_cifar(tmp_path, monkeypatch, datasets.CIFAR100)
    with tarfile.open(tmp_path / datasets.CIFAR100.filename, "w:gz") as archive:
        archive.add(tmp_path / "cifar-100-python", "cifar-100-python")
    monkeypatch.setattr(datasets.CIFAR100, "tgz_md5", md5(tmp_path / datasets.CIFAR100.filename))
    whole = RealPictures("cifar100", tmp_path, 32).draw(0, 5)
    for gone in ("cifar-100-python/test", "cifar-100-python"):
        path = tmp_path / gone
        path.unlink() if path.is_file() else shutil.rmtree(path)
        assert same(whole, RealPictures("cifar100", tmp_path, 32).draw(0, 5))
    assert not asked


@pytest.mark.parametrize("which, file", [("cifar10", "cifar-10-batches-py/data_batch_3"),
                                         ("cifar10", "cifar-10-batches-py/batches.meta"),
                                         ("cifar100", "cifar-100-python/test"),
                                         ("flowers102", "flowers-102/setid.mat")])
def test_a_damaged_part_is_named(which, file, tmp_path, monkeypatch, asked):
    name, _ = build(which, tmp_path, monkeypatch)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:-1])
    with pytest.raises(ValueError, match="is damaged") as error:
        RealPictures(name, tmp_path, 32)
    assert f"{tmp_path / file} is" in str(error.value) and not asked


@pytest.mark.parametrize("which, file", [("food101", "food-101/images/dish_1/*.jpg"),
                                         ("flowers102", "flowers-102/jpg/*.jpg"),
                                         ("eurosat", "eurosat/2750/class 2/*.jpg"), ("folder", "class 3/*.jpg")])
def test_a_damaged_picture_is_named(which, file, tmp_path, monkeypatch):
    name, _ = build(which, tmp_path, monkeypatch)
    real = RealPictures(name, tmp_path, 8)
    victim = sorted(tmp_path.glob(file))[0]
    for damage in (victim.read_bytes()[:100], b"no picture", b"", None):
        victim.write_bytes(damage) if damage is not None else victim.unlink()
        with pytest.raises(ValueError, match="no picture that can be read") as error:
            real.draw(0, None)
        assert f"{victim} is" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name, cut", [("train-images-idx3-ubyte", 1000), ("t10k-labels-idx1-ubyte", 3)])
def test_a_damaged_file_of_mnist_is_named_and_made_again(name, cut, tmp_path, monkeypatch, asked):
    build("mnist", tmp_path, monkeypatch)
    whole = RealPictures("mnist", tmp_path, 28).draw(0, 5)   # unpacks
    raw = tmp_path / "MNIST" / "raw"
    content = (raw / name).read_bytes()
    (raw / name).write_bytes(content[:cut])
    with pytest.raises(ValueError, match="is damaged") as error:
        RealPictures("mnist", tmp_path, 28)
    assert f"{raw / name} is" in str(error.value) and (raw / name).read_bytes() == content[:cut]
    (raw / name).unlink()   # the remedy works
    assert same(whole, RealPictures("mnist", tmp_path, 28).draw(0, 5)) and (raw / name).read_bytes() == content
    for packed in raw.glob("*.gz"):   # what is unpacked needs them no more
        packed.write_bytes(b"")
    assert same(whole, RealPictures("mnist", tmp_path, 28).draw(0, 5)) and not asked


def test_only_what_is_missing_is_asked_for(tmp_path, monkeypatch, asked):
    build("mnist", tmp_path, monkeypatch)
    (tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match="t10k-images-idx3-ubyte.gz could not") as error:
        RealPictures("mnist", tmp_path, 28)
    assert "train-images" not in str(error.value) and asked and all("t10k-images" in address for address in asked)


def test_flowers_without_scipy_say_so_before_the_download(tmp_path, monkeypatch, asked):
    monkeypatch.setitem(sys.modules, "scipy", None)   # makes the import fail
    monkeypatch.delitem(sys.modules, "scipy.io", raising=False)
    with pytest.raises(ValueError, match="cannot read Flowers102 here .* pip install scipy$"):
        RealPictures("flowers102", tmp_path, 8)
    assert not asked and not list(tmp_path.iterdir())


@pytest.mark.skipif("SVMINI_DATA" not in os.environ, reason="SVMINI_DATA names no folder with MNIST/raw/*.gz")
def test_the_real_files(tmp_path):
    raw = tmp_path / "MNIST" / "raw"   # a copy, as torchvision unpacks beside the files
    raw.mkdir(parents=True)
    for file in (Path(os.environ["SVMINI_DATA"]) / "MNIST" / "raw").glob("*.gz"):
        shutil.copyfile(file, raw / file.name)
    p = RealPictures("mnist", tmp_path, 28).draw(0, 50)
    assert {split: len(y) for split, (x, y) in p.splits.items()} == {"train": 400, "val": 100, "test": 10_000}
    shown = {split: (images.prepare(x, 28, p.mean, p.std), y) for split, (x, y) in p.splits.items()}
    x, y = shown["train"]
    assert abs(x.mean()) < 0.1 and abs(x.std() - 1) < 0.1
    means = torch.stack([x[y == k].mean(dim=0) for k in range(10)]).flatten(1)   # (10, 784)
    x, y = shown["test"]
    assert (torch.cdist(x.flatten(1), means).argmin(dim=1) == y).float().mean() > 0.7
