"""The picture sets that --data can name: glyphs, real ones through torchvision, and folders of one's own.

torchvision downloads what is missing, checks it and names the classes; here pictures are drawn by class and read as
bytes. A set more is one line in REAL.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from ..errors import InputError, MissingFile
from ..files import one_line
from ..rng import generator
from .glyphs import GLYPHS, Glyphs
from .images import IMAGENET


class Real(NamedTuple):
    """What is to be said of a set of torchvision's."""
    dataset: str        # torchvision's class
    mean: tuple         # of each channel over the training pictures, a pixel from 0 to 1
    std: tuple
    natural: bool       # a mirrored, shifted picture is still one of its class
    side: int | None    # the pictures' own side; None: they come in all sizes
    files: str = "the files of the set"   # what torchvision looks for under the data folder, to download or unpack
    train: tuple = ({"train": True},)     # the arguments that give its training pictures, and its test pictures
    test: tuple = ({"train": False},)
    base: str | None = None   # the word of the set that a base for it is pretrained on, where no --init brings one


REAL = {   # word -> set
    "mnist": Real("MNIST", (0.1307,), (0.3081,), False, 28, "MNIST/raw/*.gz",
                  base="fashionmnist"),
    "fashionmnist": Real("FashionMNIST", (0.2860,), (0.3530,), False, 28, "FashionMNIST/raw/*.gz",
                         base="mnist"),
    "cifar10": Real("CIFAR10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), True, 32, "cifar-10-python.tar.gz",
                    base="cifar100"),
    "cifar100": Real("CIFAR100", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), True, 32,
                     "cifar-100-python.tar.gz", base="cifar10"),
    "eurosat": Real("EuroSAT", *IMAGENET, True, 64, "eurosat/EuroSAT.zip", train=({},), test=()),
    # its validation split has as many pictures a class as its training split
    "flowers102": Real("Flowers102", *IMAGENET, True, None,
                       "102flowers.tgz, imagelabels.mat and setid.mat in flowers-102",
                       train=({"split": "train"}, {"split": "val"}), test=({"split": "test"},)),
    "food101": Real("Food101", *IMAGENET, True, None, "food-101.tar.gz",
                    train=({"split": "train"},), test=({"split": "test"},)),
}
FOLDER = Real("ImageFolder", *IMAGENET, True, None)
VAL_PER_CLASS = 500    # at most so many training pictures a class, or a tenth of them, are set aside for validation
TEST_SHARE = 5         # where a set has no test split of its own, every fifth picture of a class is for testing


def open_images(name, data_dir, seed=0, per_class=None, val_per_class=None):
    """The source called name: "glyphs A", "glyphs B", a word of REAL, or "folder:PATH". See images.py for a source.

    data_dir: where real sets lie or are downloaded to. seed: of the glyphs, which are drawn once; real pictures are
    drawn anew for every seed. per_class=10: 8 pictures of each class to train, 2 to validate, and the whole test set,
    as the papers have it; None: every picture. val_per_class: validate on so many others of each class instead, for
    what is chosen by validation. Raises InputError and MissingFile: what is missing is found out now.
    """
    word, _, path = name.partition(":")
    glyphs = {f"glyphs {which}": which for which in GLYPHS}
    if name in glyphs:
        return Glyphs(glyphs[name], seed)
    if word == "folder" and path:
        return TorchvisionImages(name, FOLDER, *open_folder(Path(path).expanduser()), per_class, val_per_class)
    if name not in REAL:
        raise InputError(f"no picture set {name!r}: choose from {', '.join([*glyphs, *REAL])}, folder:PATH")
    if data_dir is None:
        raise InputError(f"{name} is read from files: give their folder by --data-dir, or use --data glyphs")
    return TorchvisionImages(name, REAL[name], *open_real(name, REAL[name], Path(data_dir)), per_class, val_per_class)


class TorchvisionImages:
    """The pictures of torchvision datasets as a source. train, test: lists of datasets; test may be empty."""

    def __init__(self, name, real, train, test, per_class, val_per_class):
        self.name, self.real, self.per_class, self.val_per_class = name, real, per_class, val_per_class
        self.mean, self.std, self.natural = real.mean, real.std, real.natural
        self.word = name.partition(":")[0]   # what is drawn is the same wherever a folder lies
        self.train, self.test, self.labels = train, test or train, labels_of(train)
        names = getattr(train[0], "classes", None) or range(int(self.labels.max()) + 1)
        self.classes = [str(name) for name in names]
        order = torch.arange(len(self.labels))
        if not test:   # a fixed fifth of each class is for testing, whatever the seed
            order = torch.randperm(len(order), generator=generator(self.word, "test"))
        parts = [order[self.labels[order] == label] for label in range(len(self.classes))]
        tested = [0 if test else len(part) // TEST_SHARE for part in parts]
        self.pool = [part[n:] for part, n in zip(parts, tested)]   # of each class, to train and to validate
        self.test_index = (torch.arange(len(labels_of(test))) if test else
                           torch.cat([part[:n] for part, n in zip(parts, tested)]).sort().values)
        most = min(map(len, self.pool)) - (val_per_class or 0)
        if not 2 <= (per_class or 2) <= most:
            raise InputError(f"{per_class or 'all'} pictures a class do not fit {name}: at least 2 are needed, and its "
                             f"smallest class has {most} training pictures that do not validate"
                             + (f": give --per-class 2 to {most}" if most > 1 else ""))
        self.tested = {}   # side -> the test split, read once

    def draw(self, seed, size):
        """{"train" | "val" | "test": (images (N, C, H, W) uint8, labels (N,) int64)} of this seed.

        ImageClassification that lie in files are read as squares of the model's `size`, or of their own if that is smaller.
        """
        side = min(size, self.real.side or size)
        g = generator(self.word, "train", seed)
        chosen = {"train": [], "val": []}
        for pool in self.pool:
            index = pool[torch.randperm(len(pool), generator=g)]
            n = self.per_class or len(index)
            n_val = max(1, n // 5) if self.per_class else min(VAL_PER_CLASS, max(1, n // 10))
            chosen["train"].append(index[n_val:n])
            chosen["val"].append(index[n:n + self.val_per_class] if self.val_per_class else index[:n_val])
        splits = {}
        for split, parts in chosen.items():
            index = torch.cat(parts).sort().values
            splits[split] = read(self.train, index, side, f"{self.name} {split}"), self.labels[index]
        if side not in self.tested:
            self.tested[side] = (read(self.test, self.test_index, side, f"{self.name} test"),
                                 labels_of(self.test)[self.test_index])
        return splits | {"test": self.tested[side]}


def labels_of(datasets):
    """The labels of torchvision datasets, one after another, without reading a picture. (n,) int64"""
    return torch.cat([torch.as_tensor(d.targets if hasattr(d, "targets") else d._labels) for d in datasets])


def read(datasets, index, side, label):
    """The pictures at `index` of these datasets, one after another: (n, C, side, side) uint8.

    Sets that torchvision holds in memory come as they are. Of files the shorter side is resized to `side`, and the
    middle square kept. Raises InputError for a file that is no picture.
    """
    if hasattr(datasets[0], "data"):
        data = torch.as_tensor(datasets[0].data)[index]                                  # (n, H, W) or (n, H, W, 3)
        return data.unsqueeze(1) if data.dim() == 3 else data.permute(0, 3, 1, 2).contiguous()
    paths = [p for d in datasets for p in (d._image_files if hasattr(d, "_image_files") else [s[0] for s in d.samples])]
    out = torch.empty(len(index), 3, side, side, dtype=torch.uint8)
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:   # Pillow decodes without holding the interpreter
        pictures = pool.map(lambda i: read_file(paths[i], side), index.tolist())
        for k, picture in enumerate(tqdm(pictures, label, total=len(index), leave=False, delay=2, disable=None)):
            out[k] = picture
    return out


def read_file(path, side):
    from PIL import Image
    from torchvision.transforms import functional
    try:
        picture = Image.open(path).convert("RGB")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InputError(f"{path} is no picture that can be read ({one_line(error)}): take it away") from None
    return functional.pil_to_tensor(functional.center_crop(functional.resize(picture, side), [side, side]))


def open_folder(path):
    """(train, test) of a folder of class folders, lists of torchvision datasets. Where it holds the folders train and
    test (or val) with class folders in each, these are the two; else test is empty."""
    from torchvision.datasets import ImageFolder
    if not path.is_dir():
        raise MissingFile(f"there is no folder {path}: folder:PATH wants a folder of class folders")
    held_out = [path / name for name in ("test", "val", "validation") if (path / name).is_dir()]
    two = held_out and (path / "train").is_dir()
    try:
        train, *test = [ImageFolder(str(folder)) for folder in ([path / "train", held_out[0]] if two else [path])]
    except FileNotFoundError as error:   # no class folders, or one without pictures
        raise InputError(f"{path} is no folder of class folders with pictures ({one_line(error)})") from None
    if len(train.classes) < 2:
        raise InputError(f"{path} has one class folder, {train.classes[0]}: give the folder that holds them all")
    if test and train.classes != test[0].classes:
        raise InputError(f"{path}/train and {held_out[0]} have different class folders: "
                         f"{', '.join(sorted(set(train.classes) ^ set(test[0].classes))[:5])} is in one only")
    return [train], test


def open_real(name, real, data_dir):
    """(train, test) of a set of torchvision's, lists of datasets, downloaded where they are not there.

    Raises MissingFile that says what torchvision said, and where the files belong.
    """
    import torchvision.datasets
    dataset = getattr(torchvision.datasets, real.dataset)
    try:
        return tuple([dataset(root=str(data_dir), download=True, **which) for which in part]
                     for part in (real.train, real.test))
    except ImportError as error:
        raise InputError(f"torchvision cannot read {name} here ({one_line(error)}): pip install {error.name}") from None
    except Exception as error:   # torchvision passes on what its network, archive and format libraries raise
        raise MissingFile(f"{name} could not be read or downloaded by torchvision ({one_line(error)}): put a sound "
                          f"copy of {real.files} into {data_dir}, delete what was unpacked of a damaged one, or use "
                          f"--data glyphs, which needs no download") from None
