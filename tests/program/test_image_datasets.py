"""Image datasets, in small copies with the layout of the real files: draws, splits, missing and damaged files."""

import shutil
import sys
import urllib.error
import urllib.request

import pytest
import torch
from torchvision import datasets

from fake_datasets import TEST, build, build_flowers, build_mnist, build_tree
from helpers import refused, same as equal
from svmini.data import glyphs, image_datasets
from svmini.data.image_datasets import IMAGE_DATASETS, ImageDataset, open_images
from svmini.data.images import describe

WITHOUT_TEST = ["eurosat", "folder"]


@pytest.fixture(autouse=True)
def requested(monkeypatch):
    """The addresses that were requested; there is no network in tests."""
    addresses = []

    def urlopen(request, *arguments, **options):
        addresses.append(request.full_url)
        raise urllib.error.URLError("no route\nto host")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return addresses


def keys(x):
    return [bytes(image.flatten().tolist()) for image in x]


def same(p, q, splits=("train", "val", "test")):
    return all(equal(p[s], q[s]) for s in splits)


# ---- draws ----

@pytest.mark.parametrize("which", [*IMAGE_DATASETS, "folder", "folder with test"])
def test_a_draw_has_the_right_images_labels_and_sizes(which, tmp_path, monkeypatch, requested):
    name, made = build(which, tmp_path, monkeypatch)
    origin = {key: split for split, (x, _) in made.items() for key in keys(x)}
    ten, every, two = (open_images(name, tmp_path, per_class=n) for n in (10, None, 2))
    n_classes = len(ten.classes)
    draws = [ten.draw(0, 8), ten.draw(0, 8), ten.draw(1, 8), every.draw(0, 8), two.draw(0, 8)]
    for source, splits, n_train, n_val in zip((ten, ten, ten, every, two), draws, (8, 8, 8, 11, 1), (2, 2, 2, 1, 1)):
        found = {}
        for split, n in {"train": n_train, "val": n_val, "test": TEST}.items():
            x, y = splits[split]
            assert x.dtype == torch.uint8 and y.dtype == torch.int64 and len(y) == source.sizes[split]
            assert torch.equal(x[:, 0, 0, 0].long(), y), "each image has its own label"
            if which not in WITHOUT_TEST or split != "test" and source is not every:
                assert y.bincount().tolist() == [n] * n_classes
            found[split] = set(keys(x))
            assert len(found[split]) == len(y)
            assert {origin[key] for key in found[split]} == ({"all"} if which in WITHOUT_TEST else
                                                             {"test" if split == "test" else "train"})
        assert not found["train"] & found["val"] and not found["test"] & (found["train"] | found["val"])
        if which in WITHOUT_TEST and source is every:
            assert set.union(*found.values()) == set(origin) and found["test"] == set(keys(draws[0]["test"][0]))
    assert ten.name == name and (ten.per_class, every.per_class) == (10, None)
    assert "fashion" in which or f"; {n_classes} classes: {', '.join(ten.classes)}" in describe(ten)
    assert "mnist" in which or "3" in ten.classes[3], "names are at the index of their label"
    assert len(ten.mean) == len(ten.std) == draws[0]["val"][0].shape[1]
    one, again, other, *_ = draws
    assert same(one, again) and same(one, other, ["test"])
    assert one["test"][0] is other["test"][0], "the test split is read once"
    assert not same(one, other, ["train"]) and not same(one, other, ["val"])
    assert same(one, open_images(name, str(tmp_path), 5, 10).draw(0, 8)), "a draw does not depend on the process"
    assert torch.equal(open_images(name, tmp_path, test_only=True).draw(0, 8)["test"][0], one["test"][0])
    for wrong in (1, 16):
        with refused(f"{wrong} images per class ", " smallest class, ", " training images"):
            open_images(name, tmp_path, per_class=wrong)
    assert not requested, "existing files are not requested again"


def test_validation_takes_a_tenth_at_most_a_limit_or_val_per_class_other_images(tmp_path, monkeypatch):
    build_mnist(tmp_path, monkeypatch, datasets.MNIST, per_class=40)
    source = open_images("mnist", tmp_path)
    assert len(source.draw(0, 28)["val"][1]) == 10 * 4
    monkeypatch.setattr(image_datasets, "MAX_VAL_PER_CLASS", 3)
    drawn = source.draw(0, 28)
    assert drawn["val"][1].bincount().tolist() == [3] * 10 and len(drawn["train"][1]) == 10 * 37
    few, more, rest = (open_images("mnist", tmp_path, 0, *n).draw(0, 28) for n in ((10,), (10, 20), (None, 5)))
    assert torch.equal(few["train"][0], more["train"][0]) and len(few["val"][1]) == 20
    assert more["val"][1].bincount().tolist() == [20] * 10
    seen = set(keys(few["train"][0]) + keys(few["val"][0]))
    assert not seen & set(keys(more["val"][0])), "these images neither trained nor validated before"
    assert rest["val"][1].bincount().tolist() == [5] * 10 and len(rest["train"][1]) == 350, "without --per-class"
    assert not set(keys(rest["train"][0])) & set(keys(rest["val"][0]))
    with refused("at least 2 are needed, and its smallest class, ", ", has 5 training images"):
        open_images("mnist", tmp_path, 0, 10, 35)


def test_a_folder_gives_the_same_draw_wherever_it_is(tmp_path):
    build_tree(tmp_path / "here", {"": 15})
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    here, there = (open_images(f"folder:{tmp_path / place}", None, 0, 5).draw(3, 8) for place in ("here", "there"))
    assert same(here, there)


def test_images_are_read_no_larger_than_the_model_needs(tmp_path, monkeypatch):
    for which, size, side in [("eurosat", 224, 64), ("food101", 16, 16), ("mnist", 8, 28)]:
        name, _ = build(which, tmp_path, monkeypatch)
        source = open_images(name, tmp_path, per_class=2)
        for wanted, kept in ((size, side), (4, 28 if which == "mnist" else 4)):   # then for another model
            assert {x.shape[-1] for x, _ in source.draw(0, wanted).values()} == {kept}


def test_test_only_reads_no_training_image(tmp_path, monkeypatch):
    build_tree(tmp_path, {"train": 3, "test": 2})
    for file in tmp_path.glob("train/*/*"):
        file.write_bytes(b"")
    assert open_images(f"folder:{tmp_path}", None, test_only=True).draw(0, 8).keys() == {"test"}
    drawn = []
    monkeypatch.setattr(glyphs, "draw", lambda bank, labels, *a: drawn.append(len(labels)) or labels)
    assert open_images("glyphs B", None, test_only=True).draw(0, 24).keys() == {"test"} and drawn == [1560]


def test_glyphs_are_drawn_by_the_first_seed(monkeypatch):
    for recipe in glyphs.GLYPHS.values():
        monkeypatch.setitem(recipe, "sizes", {"train": 3, "val": 3, "test": 3})
    a, b, other = (open_images(f"glyphs {which}", None, seed) for which, seed in (("A", 3), ("B", 3), ("B", 4)))
    assert describe(a).startswith(f"glyphs A: {', '.join(f'102 images in {s}' for s in a.splits)}; 34 classes: 1, 2,")
    assert (b.name, len(b.classes)) == ("glyphs B", 26)
    assert same(b.draw(0, 24), b.draw(1, 24)) and not same(b.draw(0, 24), other.draw(0, 24))


# ---- a new dataset is one line ----

def test_kmnist_is_one_line(tmp_path, monkeypatch, requested):
    monkeypatch.setitem(IMAGE_DATASETS, "kmnist", ImageDataset("KMNIST", (0.1918,), (0.3483,), False, 28))
    with refused("kmnist could not be ", " the files of the dataset into ", "glyphs"):
        open_images("kmnist", tmp_path / "nothing")
    assert "train-images-idx3-ubyte.gz" in requested[0]
    requested.clear()
    test_a_draw_has_the_right_images_labels_and_sizes("kmnist", tmp_path / "data", monkeypatch, requested)


# ---- missing and damaged files ----

def test_an_unknown_name_lists_the_known_ones(tmp_path):
    for name in ("svhn", "folder", "folder:", "mnist:here", "glyphs C"):
        with refused("no image dataset ", " glyphs A, glyphs B, mnist, fashionmnist, ", " folder:PATH"):
            open_images(name, tmp_path)


@pytest.mark.parametrize("name", IMAGE_DATASETS)
def test_a_missing_dataset_names_its_files_their_place_and_an_alternative(name, tmp_path, monkeypatch, requested):
    if name == "flowers102":
        build_flowers(tmp_path / "other", monkeypatch, datasets.Flowers102)   # replaces scipy if it is not installed
    files = IMAGE_DATASETS[name].files
    with refused(f"{name} could not be read or downloaded", "--data glyphs", "no route to host",
                 f"put an intact copy of {files} into {tmp_path / 'data'}, "):
        open_images(name, tmp_path / "data")
    address = requested[0].rsplit("/", 1)[1]   # the file that torchvision would download is among those in the message
    assert address in files or files.endswith("*.gz") and address.endswith(".gz") or files == "the files of the dataset"


@pytest.mark.parametrize("which, file", [("cifar10", "cifar-10-batches-py/data_batch_3"),
                                         ("flowers102", "flowers-102/setid.mat"),
                                         ("mnist", "MNIST/raw/train-images-idx3-ubyte")])
def test_a_damaged_dataset_is_rejected(which, file, tmp_path, monkeypatch):
    name, _ = build(which, tmp_path, monkeypatch)
    open_images(name, tmp_path)                                # unpacks
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:-1])
    for packed in tmp_path.glob("*/raw/*.gz"):                 # unpacked files do not need them
        packed.write_bytes(b"")
    with refused(f"{which} could not be read",
                 f"of {IMAGE_DATASETS[which].files} into {tmp_path}, delete what was unpacked"):
        open_images(name, tmp_path)


def test_flowers_without_scipy_name_the_package(tmp_path, monkeypatch):
    build("flowers102", tmp_path, monkeypatch)
    monkeypatch.setitem(sys.modules, "scipy.io", None)   # makes the import fail
    with refused("cannot read flowers102 ", " pip install scipy"):
        open_images("flowers102", tmp_path)
