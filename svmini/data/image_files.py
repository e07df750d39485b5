"""Images in files: folders of class folders, copies of files, and how a file is decoded."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from tqdm import tqdm

from ..errors import InputError, MissingFile
from ..files import one_line

# names of split folders, in any case; a validation folder is the test split if there is no test folder
SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
TEST_SHARE = 5   # one image in five is a test image if a dataset has no test split


class Images(NamedTuple):
    """Images with labels. items: a list of paths, or uint8 (N, C, H, W).  labels: (N,) int64."""
    items: list | torch.Tensor
    labels: torch.Tensor

    def subset(self, index):
        """Return the images at a list of indices."""
        items = self.items[index] if isinstance(self.items, torch.Tensor) else [self.items[i] for i in index]
        return Images(items, self.labels[index])


# ---- folders ----

def open_folder(path):
    """List the images in a folder of class folders, or in a folder whose folders train and test hold class folders.

    Returns (classes, train, test): the sorted class names, Images, and Images or None. Hidden files are skipped. If
    other files or folders are not used, a printed line says so. Raises MissingFile, or InputError if the structure
    could mean something else.
    """
    if not path.is_dir():
        raise MissingFile(f"there is no folder {path}: folder:PATH needs the path of a folder of class folders")
    folders, files = list_folder(path)
    splits = {split: [f for f in folders if f.name.lower() in names] for split, names in SPLIT_NAMES.items()}
    tests = splits["test"] or splits["val"]
    used = splits["train"] + tests if tests else [path]
    if tests and (len(splits["train"]) != 1 or len(tests) != 1):
        raise InputError(f"{path} has the split folders {', '.join(f.name for f in used)}: give it one folder train "
                         f"and one folder test, or only class folders")
    found = [class_folders(folder) for folder in used]
    unused = [f for f in files + folders if tests and f not in used] + [f for _, _, others in found for f in others]
    if unused:
        print(f"{path}: not used: {len(unused)} other files or folders, such as {unused[0].relative_to(path)}")
    classes, train, _ = found[0]
    different = sorted({*classes} ^ {*found[-1][0]})
    if different:
        raise InputError(f"{path} has different class folders in {used[0].name} and {used[1].name}: "
                         f"{', '.join(different[:5])} is in only one of them")
    return classes, train, found[1][1] if tests else None


def list_folder(path):
    """Return the folders and the files in a folder, both sorted by name, without hidden ones."""
    entries = sorted((p for p in path.iterdir() if not p.name.startswith(".")), key=lambda p: p.name)
    return [p for p in entries if p.is_dir()], [p for p in entries if not p.is_dir()]


def class_folders(path):
    """Return the class names of a folder of class folders, its Images, and a list of the files that are not images."""
    from PIL import Image
    extensions = {e for e, reader in Image.registered_extensions().items() if reader in Image.OPEN}
    folders, others = list_folder(path)
    classes, items, labels = [folder.name for folder in folders], [], []
    for label, folder in enumerate(folders):
        inner, files = list_folder(folder)
        images = [f for f in files if f.suffix.lower() in extensions]
        if inner:
            raise InputError(f"{folder} has the folder {inner[0].name} inside: put images directly into class folders, "
                             f"and name the folders of splits train and test")
        if not images:
            raise InputError(f"{folder} has no images: add images or delete the folder")
        items += images
        labels += [label] * len(images)
        others += [f for f in files if f.suffix.lower() not in extensions]
    if len({name.casefold() for name in classes}) < max(2, len(classes)):
        raise InputError(f"{path} has the class folders {', '.join(classes) or '(none)'}: it needs at least two, whose "
                         f"names do not differ only in case")
    return classes, Images(items, torch.tensor(labels)), others


# ---- copies ----

def separate(train, test=None):
    """Leave out copies of files, and draw a test split if there is none. train, test: Images with paths.

    Each image is used once, and only in test if test contains it. Without a test split, an image is a test image if a
    hash of its file says so, which is true for one in five. It never changes sides when other images are added.
    Returns (train, test, number of copies). Raises InputError if the copies of an image have different classes.
    """
    n_test = len(test.items) if test else 0
    images = Images(test.items + train.items, torch.cat([test.labels, train.labels])) if test else train
    labels, first = images.labels.tolist(), {}   # first: {hash of a file: the index of its first copy}
    for i, digest in enumerate(in_threads(file_hash, images.items, "comparing files")):
        j = first.setdefault(digest, i)
        if labels[i] != labels[j]:
            raise InputError(f"{images.items[j]} and {images.items[i]} are the same image in two classes: delete one")
    is_test = {i: i < n_test if test else digest % TEST_SHARE == 0 for digest, i in first.items()}
    train, test = (images.subset([i for i in is_test if is_test[i] == side]) for side in (False, True))
    return train, test, len(images.items) - len(first)


def file_hash(path):
    return int.from_bytes(hashlib.blake2b(path.read_bytes()).digest(), "big")


# ---- decoding ----

def read_images(items, side, title):
    """Read images: (n, 3, side, side) uint8 for paths; a tensor is returned as it is."""
    if isinstance(items, torch.Tensor):
        return items.contiguous()
    out = torch.empty(len(items), 3, side, side, dtype=torch.uint8)
    for i, image in enumerate(in_threads(lambda path: read_image(path, side), items, title)):
        out[i] = image
    return out


def read_image(path, side):
    """Read an image as a viewer shows it: (3, side, side) uint8, the middle square of the image.

    EXIF orientation is applied, transparent pixels become white, and 16-bit gray becomes 8-bit gray. Of several frames
    or pages, the first is read. Raises InputError, which names the file.
    """
    from PIL import Image, ImageOps
    from torchvision.transforms.functional import pil_to_tensor
    try:
        with Image.open(path) as image:
            gray16 = image.mode.startswith("I;16") or image.mode == "I" and image.format in ("PNG", "PPM")
            if image.mode in ("I", "F") and not gray16:
                raise ValueError(f"its mode {image.mode} has no fixed range of values; save it with 8 or 16 bits")
            image = ImageOps.exif_transpose(image)
        if gray16:
            image = image.convert("I").point(lambda value: value / 257 + 0.5).convert("L")   # 65535 becomes 255
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    except Exception as error:   # Pillow raises many kinds of exceptions for damaged files
        raise InputError(f"{path} cannot be read as an image ({one_line(error)}): replace or remove it") from None
    # from the square to the size in one step: a long strip would become huge if its short side were resized first
    return pil_to_tensor(ImageOps.fit(image, (side, side), Image.Resampling.BILINEAR))


def in_threads(function, items, title):
    """Yield function(item) for each item, in order, from threads: Pillow and hashlib release the interpreter lock."""
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        yield from tqdm(pool.map(function, items), title, total=len(items), leave=False, delay=2, disable=None)
