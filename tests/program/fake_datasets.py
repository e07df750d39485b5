"""Small image datasets in the layouts of the real ones, with the checksums that torchvision expects patched.

Every image is noise, except that its first value is its label: a drawn image can be recognized, and its label checked.
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
from torchvision import datasets

from svmini.data.image_datasets import IMAGE_DATASETS

TRAIN, TEST = 12, 3      # images per class; a dataset without a test split has all 15 in one place


def noise_images(classes, per_class, channels, side, seed):
    """Return shuffled images (n, C, side, side) uint8 and their labels (n,)."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(classes).repeat(per_class)[torch.randperm(classes * per_class, generator=g)]
    x = torch.randint(256, (len(y), channels, side, side), generator=g).to(torch.uint8)
    x[:, 0, 0, 0] = y.to(torch.uint8)
    return x, y


def write_image(path, x):
    """Write (3, H, W) as PPM, with the same bytes on every machine; Pillow ignores the ending of the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"P6 %d %d 255\n" % (x.shape[2], x.shape[1]) + x.permute(1, 2, 0).numpy().tobytes())


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
        x, y = made[split] = noise_images(10, n, 1, 28, seed=n)
        for name, values in ((f"{part}-images-idx3-ubyte.gz", x[:, 0]), (f"{part}-labels-idx1-ubyte.gz", y.byte())):
            (raw / name).write_bytes(gzip.compress(idx(values), mtime=0))
            resources.append((name, md5(raw / name)))
    patch.setattr(dataset, "resources", resources)
    return made


def build_cifar(data, patch, dataset):
    made = {"train": noise_images(10, TRAIN, 3, 32, 1), "test": noise_images(10, TEST, 3, 32, 2)}
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
    made = {"train": noise_images(4, TRAIN, 3, 8, 1), "test": noise_images(4, TEST, 3, 8, 2)}
    (data / "food-101" / "meta").mkdir(parents=True)
    for split, (x, y) in made.items():
        lists = {f"dish_{k}": [] for k in range(4)}
        for i, (image, label) in enumerate(zip(x, y.tolist())):
            lists[f"dish_{label}"].append(f"dish_{label}/{split}{i}")
            write_image(data / "food-101" / "images" / f"dish_{label}" / f"{split}{i}.jpg", image)
        (data / "food-101" / "meta" / f"{split}.json").write_text(json.dumps(lists))
    return made


def build_flowers(data, patch, dataset):
    """Labels and splits are MATLAB files, which scipy reads. JSON and a reader for it replace them."""
    scipy_io = types.ModuleType("scipy.io")
    scipy_io.loadmat = lambda path, squeeze_me: {k: np.array(v) for k, v in json.loads(Path(path).read_text()).items()}
    patch.setitem(sys.modules, "scipy", types.ModuleType("scipy"))
    patch.setitem(sys.modules, "scipy.io", scipy_io)
    folder = data / "flowers-102"
    made = {"train": noise_images(4, TRAIN, 3, 8, 1), "test": noise_images(4, TEST, 3, 8, 2)}
    x, y = (torch.cat(parts) for parts in zip(*made.values()))
    for i, image in enumerate(x):
        write_image(folder / "jpg" / f"image_{i + 1:05d}.jpg", image)
    numbers = list(range(1, len(y) + 1))   # counted from 1, as MATLAB does
    (folder / "imagelabels.mat").write_text(json.dumps({"labels": (y + 1).tolist()}))
    (folder / "setid.mat").write_text(json.dumps({
        "trnid": numbers[:20], "valid": numbers[20:4 * TRAIN], "tstid": numbers[4 * TRAIN:]}))
    patch.setattr(dataset, "classes", [f"flower {i}" for i in range(4)], raising=False)
    patch.setattr(dataset, "_file_dict", dataset._file_dict | {
        k: (f, md5(folder / f)) for k, f in (("label", "imagelabels.mat"), ("setid", "setid.mat"))})
    return made


def build_tree(folder, splits):
    """Build a folder of class folders ({"": n images per class}), or one with such a folder for every split."""
    made = {}
    for i, (split, n) in enumerate(splits.items()):
        x, y = made[split or "all"] = noise_images(4, n, 3, 8, seed=i)
        for k, (image, label) in enumerate(zip(x, y.tolist())):
            write_image(folder / split / f"class {label}" / f"{k}.jpg", image)
    return made


def build(which, data, patch):
    """Build a dataset in the folder `data`; returns its name, and the images and labels of each split."""
    if which.startswith("folder"):
        splits = {"": TRAIN + TEST} if which == "folder" else {"train": TRAIN, "test": TEST}
        return f"folder:{data}", build_tree(data, splits)
    if which == "eurosat":
        return which, build_tree(data / "eurosat" / "2750", {"": TRAIN + TEST})
    dataset = getattr(datasets, IMAGE_DATASETS[which].dataset)
    for kind, builder in ((datasets.MNIST, build_mnist), (datasets.CIFAR10, build_cifar),
                          (datasets.Food101, build_food), (datasets.Flowers102, build_flowers)):
        if issubclass(dataset, kind):
            return which, builder(data, patch, dataset)
    pytest.skip(f"the layout of the files of {which} is not in tests/program/fake_datasets.py")
