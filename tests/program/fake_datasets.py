"""Small picture sets in the layouts of the real ones' files, with the sums that torchvision expects of them.

Every picture is noise whose first number is its label, so that a drawn one can be told and its label checked.
"""

import gzip
import hashlib
import json
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from svmini.data.image_datasets import REAL

TRAIN, TEST = 12, 3      # pictures a class; where a set has no test split, all 15 lie together


def pictures(classes, per_class, channels, side, seed):
    """uint8 (n, C, side, side) and labels (n,), mixed."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(classes).repeat(per_class)[torch.randperm(classes * per_class, generator=g)]
    x = torch.randint(256, (len(y), channels, side, side), generator=g).to(torch.uint8)
    x[:, 0, 0, 0] = y.to(torch.uint8)
    return x, y


def write_picture(path, x):
    """A PNG, whatever the name ends with: it keeps every bit, and Pillow goes by the content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(x.permute(1, 2, 0).numpy()).save(path, format="PNG")


def md5(path):
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def idx(values):
    shape = values.shape
    return bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape) + values.numpy().tobytes()


def build_mnist(data, patch, dataset, per_class=TRAIN):
    raw = data / dataset.__name__ / "raw"
    raw.mkdir(parents=True)
    resources, made = [], {}
    for split, part, n in (("train", "train", per_class), ("test", "t10k", TEST)):
        x, y = made[split] = pictures(10, n, 1, 28, seed=n)
        for name, values in ((f"{part}-images-idx3-ubyte.gz", x[:, 0]), (f"{part}-labels-idx1-ubyte.gz", y.byte())):
            (raw / name).write_bytes(gzip.compress(idx(values), mtime=0))
            resources.append((name, md5(raw / name)))
    patch.setattr(dataset, "resources", resources)
    return made


def build_cifar(data, patch, dataset):
    made = {"train": pictures(10, TRAIN, 3, 32, 1), "test": pictures(10, TEST, 3, 32, 2)}
    folder = data / dataset.base_folder
    folder.mkdir(parents=True)
    labels = "labels" if dataset is datasets.CIFAR10 else "fine_labels"
    for split, files in (("train", dataset.train_list), ("test", dataset.test_list)):
        sums = []
        parts = zip(made[split][0].chunk(len(files)), made[split][1].chunk(len(files)))
        for (name, _), (x, y) in zip(files, parts):
            (folder / name).write_bytes(pickle.dumps({"data": x.flatten(1).numpy(), labels: y.tolist()}))
            sums.append([name, md5(folder / name)])
        patch.setattr(dataset, f"{split}_list", sums)
    meta = folder / dataset.meta["filename"]
    meta.write_bytes(pickle.dumps({dataset.meta["key"]: [f"kind {i}" for i in range(10)]}))
    patch.setattr(dataset, "meta", dataset.meta | {"md5": md5(meta)})
    return made


def build_food(data, patch, dataset):
    made = {"train": pictures(4, TRAIN, 3, 8, 1), "test": pictures(4, TEST, 3, 8, 2)}
    (data / "food-101" / "meta").mkdir(parents=True)
    for split, (x, y) in made.items():
        lists = {f"dish_{k}": [] for k in range(4)}
        for i, (picture, label) in enumerate(zip(x, y.tolist())):
            lists[f"dish_{label}"].append(f"dish_{label}/{split}{i}")
            write_picture(data / "food-101" / "images" / f"dish_{label}" / f"{split}{i}.jpg", picture)
        (data / "food-101" / "meta" / f"{split}.json").write_text(json.dumps(lists))
    return made


def build_flowers(data, patch, dataset):
    """Labels and splits are MATLAB files; where scipy is not installed, JSON and a reader for it stand in."""
    try:
        from scipy.io import savemat
    except ImportError:
        def loadmat(path, squeeze_me):
            return {k: np.array(v) for k, v in json.loads(Path(path).read_text()).items()}

        def savemat(path, content):
            Path(path).write_text(json.dumps(content))

        reader = types.ModuleType("scipy.io")
        reader.loadmat = loadmat
        patch.setitem(sys.modules, "scipy", types.ModuleType("scipy"))
        patch.setitem(sys.modules, "scipy.io", reader)
    folder = data / "flowers-102"
    made = {"train": pictures(4, TRAIN, 3, 8, 1), "test": pictures(4, TEST, 3, 8, 2)}
    x, y = (torch.cat(parts) for parts in zip(*made.values()))
    for i, picture in enumerate(x):
        write_picture(folder / "jpg" / f"image_{i + 1:05d}.jpg", picture)
    numbers = list(range(1, len(y) + 1))   # counted from 1, as MATLAB does
    savemat(folder / "imagelabels.mat", {"labels": (y + 1).tolist()})
    savemat(folder / "setid.mat", {"trnid": numbers[:20], "valid": numbers[20:4 * TRAIN], "tstid": numbers[4 * TRAIN:]})
    patch.setattr(dataset, "classes", [f"flower {i}" for i in range(4)], raising=False)
    patch.setattr(dataset, "_file_dict", dataset._file_dict | {
        k: (f, md5(folder / f)) for k, f in (("label", "imagelabels.mat"), ("setid", "setid.mat"))})
    return made


def build_tree(folder, splits):
    """A folder of class folders, or of one such folder a split."""
    made = {}
    for i, (split, n) in enumerate(splits.items()):
        x, y = made[split or "both"] = pictures(4, n, 3, 8, seed=i)
        for k, (picture, label) in enumerate(zip(x, y.tolist())):
            write_picture(folder / split / f"class {label}" / f"{k}.jpg", picture)
    return made


def build(which, data, patch):
    """(the name of the set, what it was made of by split) with its files in `data`."""
    if which.startswith("folder"):
        splits = {"": TRAIN + TEST} if which == "folder" else {"train": TRAIN, "test": TEST}
        return f"folder:{data}", build_tree(data, splits)
    if which == "eurosat":
        return which, build_tree(data / "eurosat" / "2750", {"": TRAIN + TEST})
    dataset = getattr(datasets, REAL[which].dataset)
    make = {"food101": build_food, "flowers102": build_flowers}.get(which)
    make = make or (build_mnist if which.endswith("mnist") else build_cifar if which.startswith("cifar") else None)
    if make is None:
        pytest.skip(f"nobody has written down how the files of {which} look: tests/program/fake_datasets.py")
    return which, make(data, patch, dataset)
