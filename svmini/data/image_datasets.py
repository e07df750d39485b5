"""The image datasets that --data can name: glyphs, those of torchvision, and your own folders.

torchvision downloads and checks the files of its datasets and names the classes. To add a dataset of torchvision, add
one line to IMAGE_DATASETS: nothing else changes. Its class must have labels in `targets`, `labels` or `_labels`, and
images in the array `data` or as paths in `samples`, `_images` or `_image_files`, as most classes of torchvision do.
"""

from pathlib import Path
from typing import NamedTuple

import torch

from ..errors import InputError, MissingFile
from ..files import one_line
from ..rng import generator
from .glyphs import GLYPHS, Glyphs
from .image_files import Images, open_folder, read_images, separate
from .images import IMAGENET, listed


class ImageDataset(NamedTuple):
    """A dataset of torchvision."""
    dataset: str              # the name of torchvision's class
    mean: tuple               # of each channel over the training images, with pixels from 0 to 1
    std: tuple
    natural: bool             # whether a mirrored and shifted image still belongs to its class
    side: int | None          # height and width in pixels; None if they vary
    files: str = "the files of the dataset"   # those that torchvision looks for in --data-dir, to download or unpack
    train: tuple = ({"train": True},)         # arguments for its training images, and for its test images
    test: tuple = ({"train": False},)
    base_data: str | None = None   # dataset for pretraining a base model when --init is not given


IMAGE_DATASETS = {
    "mnist": ImageDataset("MNIST", (0.1307,), (0.3081,), False, 28, "MNIST/raw/*.gz", base_data="fashionmnist"),
    "fashionmnist": ImageDataset("FashionMNIST", (0.2860,), (0.3530,), False, 28, "FashionMNIST/raw/*.gz",
                                 base_data="mnist"),
    "cifar10": ImageDataset("CIFAR10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), True, 32,
                            "cifar-10-python.tar.gz", base_data="cifar100"),
    "cifar100": ImageDataset("CIFAR100", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), True, 32,
                             "cifar-100-python.tar.gz", base_data="cifar10"),
    "eurosat": ImageDataset("EuroSAT", *IMAGENET, True, 64, "eurosat/EuroSAT.zip", train=({},), test=()),
    # its validation split is as large as its training split, so both are used for training
    "flowers102": ImageDataset("Flowers102", *IMAGENET, True, None,
                               "102flowers.tgz, imagelabels.mat and setid.mat in flowers-102",
                               train=({"split": "train"}, {"split": "val"}), test=({"split": "test"},)),
    "food101": ImageDataset("Food101", *IMAGENET, True, None, "food-101.tar.gz",
                            train=({"split": "train"},), test=({"split": "test"},)),
}
FOLDER = ImageDataset("", *IMAGENET, True, None)
MAX_VAL_PER_CLASS = 500   # validation images per class: a tenth of the training images, but not more than this


def open_images(name, data_dir, seed=0, per_class=None, val_per_class=None, test_only=False):
    """Open the source called "glyphs A", "glyphs B", a name in IMAGE_DATASETS, or "folder:PATH" (see images.py).

    data_dir: where the files of a dataset are, or are downloaded to.  seed: for drawing the glyphs, once; real images
    are drawn again for every seed of a run.  per_class=10: 8 training and 2 validation images per class and the
    complete test split, as in the papers; None: all images.  val_per_class: so many other images per class are for
    validation instead, which makes choices by validation more certain.  test_only: do not read training images, unless
    the test split is drawn from them.  Raises InputError and MissingFile before anything is trained.
    """
    kind, _, path = name.partition(":")
    glyphs = {f"glyphs {which}": which for which in GLYPHS}
    if name in glyphs:
        return Glyphs(glyphs[name], seed, ("test",) if test_only else ("train", "val", "test"))
    if kind == "folder" and path:
        dataset, (classes, train, test) = FOLDER, open_folder(Path(path).expanduser())
    elif name not in IMAGE_DATASETS:
        known = ", ".join([*glyphs, *IMAGE_DATASETS, "folder:PATH"])
        raise InputError(f"no image dataset {name!r}: choose from {known}")
    elif data_dir is None:
        raise InputError(f"{name} is read from files: give their folder as --data-dir, or use --data glyphs")
    else:
        dataset = IMAGE_DATASETS[name]
        classes, train, test = open_torchvision(name, dataset, Path(data_dir))
    if kind == "folder" or test is None:   # the splits of published datasets stay as they are
        train, test, n_copies = separate(train.subset([]) if test_only and test else train, test)
        if n_copies:
            print(f"{name}: {n_copies} files are copies of other files and are left out")
    return LabeledImages(name, dataset, classes, None if test_only else train, test, per_class, val_per_class)


class LabeledImages:
    """Images with labels as a source (see images.py).

    train, test: Images; train may be None, and `draw` then returns only the test split.  Raises InputError if a class
    has too few images.
    """

    def __init__(self, name, dataset, classes, train, test, per_class=None, val_per_class=None):
        self.name, self.classes, self.train, self.test = name, classes, train, test
        self.mean, self.std, self.natural, self.side = dataset.mean, dataset.std, dataset.natural, dataset.side
        self.per_class, self.val_per_class = per_class, val_per_class
        self.key = name.partition(":")[0]   # for the generator: a folder gives the same draw wherever it is
        self.sizes = {"test": len(test.labels)}
        self.test_splits = {}   # {side: the test split}, because it is the same for every seed
        untested = [c for c, n in zip(classes, test.labels.bincount(minlength=len(classes)).tolist()) if n == 0]
        if untested:
            raise InputError(f"{name} has no test image of {listed(untested)}: add images to these classes, or give "
                             f"it the folders train and test")
        if train is None:
            return
        self.parts = [(train.labels == label).nonzero().flatten() for label in range(len(classes))]   # by class
        most, smallest = min((len(part) - (val_per_class or 0), c) for part, c in zip(self.parts, classes))
        if not 2 <= (per_class or 2) <= most:
            raise InputError(f"{per_class or 'all'} images per class do not fit {name}: at least 2 are needed, and its "
                             f"smallest class, {smallest}, has {most} training images that are not for validation: "
                             + (f"give --per-class 2 to {most}" if most > 1 else "add images to it"))
        n_train, n_val = (sum(map(len, parts)) for parts in zip(*map(self.divide, self.parts)))
        self.sizes = {"train": n_train, "val": n_val, **self.sizes}

    def divide(self, index):
        """Divide the shuffled indices of a class into those for training and those for validation."""
        n = self.per_class or len(index) - (self.val_per_class or 0)
        n_val = max(1, n // 5) if self.per_class else min(MAX_VAL_PER_CLASS, max(1, n // 10))
        if not self.val_per_class:
            return index[n_val:n], index[:n_val]
        return index[n_val if self.per_class else 0:n], index[n:n + self.val_per_class]

    def draw(self, seed, size):
        """Return {"train" | "val" | "test": (images (N, C, H, W) uint8, labels (N,) int64)} for this seed.

        Files are read as squares of the size of the model's images, or of their own size if that is smaller.
        """
        side = min(size, self.side or size)
        splits = {}
        if self.train is not None:
            g = generator(self.key, "train", seed)
            divided = [self.divide(part[torch.randperm(len(part), generator=g)]) for part in self.parts]
            for split, parts in zip(("train", "val"), zip(*divided)):
                images = self.train.subset(torch.cat(parts).sort().values.tolist())
                splits[split] = read_images(images.items, side, f"{self.name} {split}"), images.labels
        if side not in self.test_splits:
            self.test_splits[side] = read_images(self.test.items, side, f"{self.name} test"), self.test.labels
        return splits | {"test": self.test_splits[side]}


def open_torchvision(name, dataset, data_dir):
    """Open a dataset of torchvision, and download it if it is missing: (classes, train, test); test may be None.

    Raises MissingFile with torchvision's reason and the place where the files must be.
    """
    import torchvision.datasets
    torchvision_class = getattr(torchvision.datasets, dataset.dataset)
    try:
        train, test = ([torchvision_class(root=str(data_dir), download=True, **arguments) for arguments in split]
                       for split in (dataset.train, dataset.test))
    except ImportError as error:
        raise InputError(f"torchvision cannot read {name} ({one_line(error)}): pip install {error.name}") from None
    except Exception as error:   # torchvision raises whatever its network, archive and format libraries raise
        raise MissingFile(f"{name} could not be read or downloaded by torchvision ({one_line(error)}): put an intact "
                          f"copy of {dataset.files} into {data_dir}, delete what was unpacked from a damaged one, or "
                          f"use --data glyphs, which needs no download") from None
    images = images_of(train)
    names = getattr(train[0], "classes", range(int(images.labels.max()) + 1))
    return list(map(str, names)), images, images_of(test) if test else None


def images_of(datasets):
    """Return the Images of torchvision datasets, one after the other, without reading files."""
    def first(dataset, *names):
        return next(getattr(dataset, name) for name in names if hasattr(dataset, name))

    labels = [torch.as_tensor(first(dataset, "targets", "labels", "_labels")) for dataset in datasets]
    if hasattr(datasets[0], "data"):
        data = torch.cat([torch.as_tensor(dataset.data) for dataset in datasets])   # (N, H, W) or (N, H, W, 3)
        items = data.unsqueeze(1) if data.dim() == 3 else data.permute(0, 3, 1, 2)
    else:
        files = [f for dataset in datasets for f in first(dataset, "samples", "_images", "_image_files")]
        items = [Path(f[0] if isinstance(f, tuple) else f) for f in files]   # samples are (path, label)
    return Images(items, torch.cat(labels))
