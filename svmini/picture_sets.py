"""Real picture sets through torchvision: downloaded where they are missing, checked, drawn by class, read as bytes.

A set more is one line in REAL, and where it is downloaded one in files_of.
"""

import hashlib
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

import torch
from tqdm import tqdm

from .images import IMAGENET, Pictures
from .rng import generator
from .weights import one_line

# word -> torchvision's class; mean and standard deviation of a channel; whether a mirrored, shifted picture is still
# one of its class; the pictures' own side where that is small (others come in all sizes)
REAL = {
    "mnist": ("MNIST", ((0.1307,), (0.3081,)), False, 28),
    "fashionmnist": ("FashionMNIST", ((0.2860,), (0.3530,)), False, 28),
    "cifar10": ("CIFAR10", ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)), True, 32),
    "cifar100": ("CIFAR100", ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)), True, 32),
    "eurosat": ("EuroSAT", IMAGENET, True, 64),
    "flowers102": ("Flowers102", IMAGENET, True, None),
    "food101": ("Food101", IMAGENET, True, None),
    "folder": ("ImageFolder", IMAGENET, True, None),   # folder:PATH
}
VAL_PER_CLASS = 500    # at most so many training pictures a class, or a tenth of them, are set aside for validation
TEST_SHARE = 5         # where a set has no test split of its own, every fifth picture of a class is for testing


class RealPictures:
    """A real set in data_dir, downloaded by torchvision where it is not there; draw(seed, per_class) gives Pictures.

    name: a word of REAL, or folder:PATH for a folder of class folders, or of train/ and test/ with class folders in
    each. size: side in pixels of the model's pictures; larger ones are cropped to a square of it when they are read.
    Raises ValueError for an unknown name, no data_dir and damaged files, FileNotFoundError for what cannot be had.
    """

    def __init__(self, name, data_dir, size):
        word, _, path = name.partition(":")
        if word not in REAL or (word == "folder") != bool(path):
            raise ValueError(f"no picture set {name!r}: choose from {', '.join(REAL)}:PATH")
        if data_dir is None and not path:
            raise ValueError(f"{name} is read from files: give their folder by --data-dir, or use --data glyphs")
        class_name, (self.mean, self.std), self.natural, side = REAL[word]
        self.name, self.side = name, min(size, side or size)
        self.train, self.test = open_folder(Path(path).expanduser()) if path else open_real(class_name, Path(data_dir))
        names = getattr(self.train[0], "classes", None) or list(range(int(labels_of(self.train).max()) + 1))
        self.classes = [str(c).split(" - ")[0] for c in names]   # MNIST's are "0 - zero", ...
        self.labels = labels_of(self.train)
        if self.test is None:   # a fixed fifth of each class, whatever the seed
            order = torch.randperm(len(self.labels), generator=generator(word, "test"))
            parts = [order[self.labels[order] == label] for label in range(len(self.classes))]
            self.test_index = torch.cat([i[:len(i) // TEST_SHARE] for i in parts]).sort().values
            self.pool = [i[len(i) // TEST_SHARE:] for i in parts]
        else:
            self.test_index = torch.arange(len(labels_of(self.test)))
            order = torch.arange(len(self.labels))
            self.pool = [order[self.labels == label] for label in range(len(self.classes))]
        self.tested = None

    def draw(self, seed=0, per_class=None):
        """Pictures for this seed. per_class=10: 8 pictures of each class to train, 2 to validate, and the whole test
        set, as the papers have it; None: every picture. Raises ValueError for a per_class that is not there."""
        g = generator(self.name.partition(":")[0], "train", seed)   # the same wherever a folder lies
        pool = [i[torch.randperm(len(i), generator=g)] for i in self.pool]
        least = min(map(len, pool))
        if per_class is not None and not 2 <= per_class <= least or least < 2:
            remedy = f"give --per-class 2 to {least}" if least > 1 else "at least 2 are needed"
            raise ValueError(f"--per-class {per_class or 'all'} does not fit {self.name}: its smallest class has "
                             f"{least} training pictures, {remedy}")
        chosen = {"train": [], "val": []}
        for i in pool:
            n = len(i) if per_class is None else per_class
            n_val = min(VAL_PER_CLASS, max(1, n // 10)) if per_class is None else max(1, n // 5)
            chosen["val"].append(i[:n_val])
            chosen["train"].append(i[n_val:n])
        splits = {}
        for split, parts in chosen.items():
            index = torch.cat(parts).sort().values
            splits[split] = read(self.train, index, self.side, f"{self.name} {split}"), self.labels[index]
        if self.tested is None:
            test = self.test or self.train
            self.tested = (read(test, self.test_index, self.side, f"{self.name} test"),
                           labels_of(test)[self.test_index])
        return Pictures(self.name, splits | {"test": self.tested}, self.classes, self.mean, self.std, self.natural)


def labels_of(datasets):
    """The labels of torchvision datasets, one after another, without reading a picture. (n,) int64"""
    return torch.cat([torch.as_tensor(d.targets if hasattr(d, "targets") else d._labels) for d in datasets])


def read(datasets, index, side, label):
    """The pictures at `index` of these datasets, one after another: (n, C, side, side) uint8.

    Sets that torchvision holds in memory come as they are. Of files the shorter side is resized to `side`, and the
    middle square kept. Raises ValueError that names a file which is no picture.
    """
    if hasattr(datasets[0], "data"):
        data = torch.as_tensor(datasets[0].data)[index]                                  # (n, H, W) or (n, H, W, 3)
        return data.unsqueeze(1) if data.dim() == 3 else data.permute(0, 3, 1, 2).contiguous()
    paths = [p for d in datasets for p in (d._image_files if hasattr(d, "_image_files") else [s[0] for s in d.samples])]
    out = torch.empty(len(index), 3, side, side, dtype=torch.uint8)

    def put(k):
        out[k] = read_file(paths[index[k]], side)

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:   # Pillow decodes without holding the interpreter
        list(tqdm(pool.map(put, range(len(index))), label, total=len(index), leave=False, delay=2, disable=None))
    return out


def read_file(path, side):
    from PIL import Image
    from torchvision.transforms import functional
    try:
        picture = Image.open(path).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is missing or no picture that can be read ({one_line(error)}): "
                         "put a sound copy there, or take the file away") from None
    return functional.pil_to_tensor(functional.center_crop(functional.resize(picture, side), [side, side]))


def open_folder(path):
    """(train, test or None) of a folder of class folders, each a list of one torchvision dataset. Where it holds the
    folders train and test (or val) with class folders in each, these are the two."""
    from torchvision.datasets import ImageFolder
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {path}: folder:PATH wants a folder of class folders")
    try:
        held_out = next((path / name for name in ("test", "val", "validation") if (path / name).is_dir()), None)
        if (path / "train").is_dir():
            if held_out is None:
                raise ValueError(f"{path} has a folder train and none called test, val or validation beside it")
            train, test = ImageFolder(str(path / "train")), ImageFolder(str(held_out))
            if train.classes != test.classes:
                raise ValueError(f"{path}/train and {held_out} have different class folders: "
                                 f"{', '.join(sorted(set(train.classes) ^ set(test.classes))[:5])} is in one only")
            return [train], [test]
        whole = ImageFolder(str(path))
        if len(whole.classes) < 2:
            raise ValueError(f"{path} has one class folder, {whole.classes[0]}: give the folder that holds them all")
        return [whole], None
    except FileNotFoundError as error:   # no class folders, or one without pictures
        raise ValueError(f"{path} is no folder of class folders with pictures ({one_line(error)})") from None


def open_real(class_name, data_dir):
    """(train, test or None), each a list of torchvision datasets, downloaded where they are not there; every way to
    fail in one sentence."""
    import torchvision.datasets
    dataset = getattr(torchvision.datasets, class_name)

    def split(download, **which):
        return dataset(root=str(data_dir), download=download, **which)

    def everything(download):
        if class_name == "EuroSAT":
            return [split(download)], None
        if class_name == "Flowers102":   # its validation split has as many pictures a class as its training split
            return [split(download, split="train"), split(False, split="val")], [split(False, split="test")]
        if class_name == "Food101":
            return [split(download, split="train")], [split(False, split="test")]
        return [split(download, train=True)], [split(False, train=False)]

    try:
        if class_name == "Flowers102":
            import_module("scipy")   # before the download, not after it: its labels are a MATLAB file
        check_unpacked(dataset, data_dir)
        try:
            return everything(download=False)
        except RuntimeError:   # torchvision's word for: not there
            check_packed(dataset, data_dir)
            data_dir.mkdir(parents=True, exist_ok=True)
            return everything(download=True)
    except ImportError as error:
        raise ValueError(f"torchvision cannot read {class_name} here ({one_line(error)}): "
                         f"pip install {error.name}") from None
    except (RuntimeError, OSError, EOFError, json.JSONDecodeError) as error:   # URLError is an OSError
        check_packed(dataset, data_dir)   # a broken download is named
        wanted = files_of(dataset)
        missing = [f for f in wanted if not (data_dir / f).exists() and not (data_dir / f.removesuffix(".gz")).exists()]
        if not missing:
            raise ValueError(f"cannot read {class_name} in {data_dir} ({one_line(error)}): "
                             "check its files, and that the folder can be written to") from None
        raise FileNotFoundError(
            f"{class_name} is not complete: {', '.join(missing)} could not be downloaded from "
            f"{' or '.join(dict.fromkeys(wanted[f][1] for f in missing))} ({one_line(error)}); put what is missing "
            f"into {data_dir} under these names, or use pictures that need no download: --data glyphs") from None


def files_of(dataset):
    """{path under the data folder: (MD5, where it comes from)} of what torchvision downloads for a dataset."""
    name = dataset.__name__
    if hasattr(dataset, "resources"):
        return {f"{name}/raw/{f}": (md5, dataset.mirrors[0]) for f, md5 in dataset.resources}
    if name.startswith("CIFAR"):
        return {dataset.filename: (dataset.tgz_md5, dataset.url)}
    if name == "Flowers102":
        return {f"flowers-102/{f}": (md5, dataset._download_url_prefix) for f, md5 in dataset._file_dict.values()}
    if name == "Food101":
        return {"food-101.tar.gz": (dataset._MD5, dataset._URL)}
    return {"eurosat/EuroSAT.zip": ("c8fa014336c82ac7804f0398fcb19387",
                                    "https://huggingface.co/datasets/torchgeo/eurosat")}


REMEDY = "delete it to have it made again from a sound copy, or use --data glyphs"


def check_packed(dataset, data_dir):
    """Raises ValueError that names a damaged archive, such as half a download."""
    for name, (md5, _) in files_of(dataset).items():
        if (data_dir / name).is_file() and md5_of(data_dir / name) != md5:
            raise ValueError(f"{data_dir / name} is damaged (its MD5 is not {md5}): {REMEDY}")


def check_unpacked(dataset, data_dir):
    """Raises ValueError that names a damaged file where torchvision would not look again or would not name it."""
    if hasattr(dataset, "train_list"):   # CIFAR
        for name, md5 in [*dataset.train_list, *dataset.test_list, (dataset.meta["filename"], dataset.meta["md5"])]:
            path = data_dir / dataset.base_folder / name
            if path.is_file() and md5_of(path) != md5:
                raise ValueError(f"{path} is damaged (its MD5 is not {md5}): {REMEDY}")
    for name, _ in getattr(dataset, "resources", []):   # MNIST's family
        path = data_dir / dataset.__name__ / "raw" / name.removesuffix(".gz")
        if not path.is_file():
            continue
        dims = 3 if "idx3" in name else 1   # pictures or labels
        with open(path, "rb") as file:
            head = file.read(4 + 4 * dims)   # the format: 0, 0, 8 for bytes, dims, then each size in four bytes
        sizes = [int.from_bytes(head[i:i + 4], "big") for i in range(4, 4 + 4 * dims, 4)]
        if head[:4] != bytes([0, 0, 8, dims]) or path.stat().st_size != 4 + 4 * dims + math.prod(sizes):
            raise ValueError(f"{path} is damaged (its length or kind is not what its head should say): {REMEDY}")


def md5_of(path):
    with open(path, "rb") as file:
        digest = hashlib.md5(usedforsecurity=False)
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
