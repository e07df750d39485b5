"""Pictures for train_vit.py: glyphs that the program draws itself, and MNIST and FashionMNIST through torchvision.

Everything is a function of its seed. Pictures are kept as tensors in memory, normalised once, and a batch is drawn
from them by `batch`, which has no state. A real set more (CIFAR-10, ...) is one line in REAL, provided that its
torchvision class has `data` and `targets`; `load_real` and `check_files` know only the files of the MNIST family.
"""

import hashlib
import math
import string
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from .files import sha256_of, write_whole
from .rng import generator

# Glyphs: classes, dark on light or not, pictures a class in each split.
GLYPHS = {
    "A": dict(classes="123456789" + string.ascii_uppercase.replace("I", ""), inverted=False,
              sizes={"train": 900, "val": 100, "test": 100}),
    "B": dict(classes=string.ascii_lowercase, inverted=True,
              sizes={"train": 50, "val": 30, "test": 60}),
}
GLYPH_MEAN, GLYPH_STD = 0.5, 0.5   # of a pixel, for both sets: inverted pictures must look inverted to the model
GLYPH_SIZE = 24        # pixels along a side of a glyph picture
BANK_SIZE = 64         # pixels along a side of the drawings that they are made from
STROKES = (0, 1, 2, 4)   # added to each side of a stroke, in half pixels; more would fill the e and join the dot of i
RECIPE = 1             # raise it with every change of the recipe: it stands in the names of cached files
CHUNK = 2048           # pictures made at a time, which bounds the memory

# Real sets: the name of torchvision's class, mean and standard deviation of a pixel over its training set.
REAL = {
    "mnist": ("MNIST", 0.1307, 0.3081),
    "fashionmnist": ("FashionMNIST", 0.2860, 0.3530),
}
VAL_PER_CLASS = 500    # training pictures of each class that are set aside for validation


@dataclass
class Pictures:
    """splits: {"train" | "val" | "test": (images, labels)} with images (N, C, H, W) float32, normalised, and labels
    (N,) int64; classes: the names, at the index that is their label."""
    name: str
    splits: dict
    classes: list


def normalise(images, mean, std):
    """(N, H, W) uint8 -> (N, 1, H, W) float32."""
    return images.unsqueeze(1).float().div_(255).sub_(mean).div_(std)


def batch(images, labels, size, seed, step):
    """A batch (x, y) of `size` pictures that depends on the data, the seed and the step alone.

    No picture comes twice in a batch, unless the batch is larger than the data. Raises ValueError for empty data.
    """
    if len(images) == 0 or size < 1:
        raise ValueError(f"cannot draw a batch of {size} from {len(images)} pictures: both must be at least 1")
    g = generator("images", seed, step)
    if size <= len(images):
        index = torch.randperm(len(images), generator=g)[:size]
    else:
        index = torch.randint(len(images), (size,), generator=g)
    index = index.to(images.device)
    return images[index], labels[index]   # (size, C, H, W), (size,)


# ---------------------------------------------------------------------------------------------------- glyphs

def glyphs(which, seed=0, cache=None):
    """The glyph set "A" (digits and upper case, light on dark) or "B" (lower case, dark on light), 1 x 24 x 24.

    A is there to pretrain on, B to adapt to. cache: a folder where the set is kept between runs, or None; the
    pictures are the same either way. Raises ValueError for another set, and where Pillow cannot draw the font.
    """
    if which not in GLYPHS:
        raise ValueError(f"no glyph set {which!r}: choose from {', '.join(GLYPHS)}")
    recipe = GLYPHS[which]
    file = Path(cache) / f"glyphs-{which}-seed{seed}-v{RECIPE}.pt" if cache is not None else None
    raw = read_cache(file, recipe) if file else None
    if raw is None:
        bank = draw_bank(recipe["classes"])
        raw = {split: draw_split(bank, n, recipe["inverted"], generator("glyphs", which, split, seed))
               for split, n in recipe["sizes"].items()}
        if file:
            write_whole(file, lambda f: torch.save({"splits": raw, "sha256": checksum(raw)}, f))
    splits = {split: (normalise(raw[split], GLYPH_MEAN, GLYPH_STD), glyph_labels(recipe, split))
              for split in recipe["sizes"]}
    return Pictures(f"glyphs {which}", splits, list(recipe["classes"]))


def glyph_labels(recipe, split):
    """0, 1, 2, ..., 0, 1, 2, ...: any first few pictures of a split show all classes equally often. (N,) int64"""
    return torch.arange(len(recipe["classes"])).repeat(recipe["sizes"][split])


def draw_bank(characters):
    """Each character in each stroke width, light on dark: (classes, strokes, 64, 64) float32 in [0, 1]."""
    from PIL import Image, ImageDraw
    font = load_font(100)
    bank = torch.empty(len(characters), len(STROKES), BANK_SIZE, BANK_SIZE)
    for i, character in enumerate(characters):
        for j, stroke in enumerate(STROKES):
            image = Image.new("L", (2 * BANK_SIZE, 2 * BANK_SIZE))   # twice the size, for half pixels of stroke
            # "mm" keeps all characters on one base line, so that p stays lower than d; 6 higher, p's stem fits
            ImageDraw.Draw(image).text((BANK_SIZE, BANK_SIZE - 6), character, fill=255, font=font, anchor="mm",
                                       stroke_width=stroke)
            pixels = torch.frombuffer(bytearray(image.reduce(2).tobytes()), dtype=torch.uint8)
            bank[i, j] = pixels.view(BANK_SIZE, BANK_SIZE) / 255
    return bank


def load_font(size):
    """The font that Pillow carries. Raises ValueError where this Pillow has none that scales."""
    from PIL import ImageFont
    try:
        return ImageFont.load_default(size=size)
    except (ImportError, OSError, TypeError) as error:   # TypeError: before 10.1 it took no size
        raise ValueError(f"this Pillow cannot draw text at a chosen size ({error}): "
                         "install Pillow 10.1 or later with FreeType (pip install --upgrade pillow)") from None


def draw_split(bank, per_class, inverted, g):
    """per_class pictures of each class in the order of glyph_labels, drawn by the generator g: (N, 24, 24) uint8."""
    labels = torch.arange(len(bank)).repeat(per_class)
    return torch.cat([draw(bank, part, inverted, g) for part in labels.split(CHUNK)])


def draw(bank, labels, inverted, g):
    """One distorted glyph for each label: (n, 24, 24) uint8.

    The drawing is rotated by up to 12 degrees, scaled by up to 0.15 along each axis, sheared by up to 0.15, shifted
    by up to 0.08 of half a side, bent by a smooth displacement of about 0.05, and covered with noise of 0.06.
    """
    n = len(labels)

    def uniform(bound):
        return (torch.rand(n, generator=g) * 2 - 1) * bound                       # (n,)

    angle, shear = uniform(torch.pi / 15), uniform(0.15)
    scale_x, scale_y = 1 + uniform(0.15), 1 + uniform(0.15)
    shift_x, shift_y = uniform(0.08), uniform(0.08)
    cos, sin = angle.cos(), angle.sin()
    # scale, then shear, then rotate; grid_sample asks where a pixel comes from, so the scale divides
    theta = torch.stack([torch.stack([cos / scale_x, (shear * cos - sin) / scale_y, shift_x], dim=1),
                         torch.stack([sin / scale_x, (shear * sin + cos) / scale_y, shift_y], dim=1)], dim=1)
    grid = F.affine_grid(theta, [n, 1, GLYPH_SIZE, GLYPH_SIZE], align_corners=False)             # (n, 24, 24, 2)
    bend = 0.05 * torch.randn(n, 2, 4, 4, generator=g)
    bend = F.interpolate(bend, size=(GLYPH_SIZE, GLYPH_SIZE), mode="bicubic", align_corners=False)   # (n, 2, 24, 24)
    stroke = torch.randint(len(STROKES), (n,), generator=g)
    drawing = bank[labels, stroke].unsqueeze(1)                                                  # (n, 1, 64, 64)
    x = F.grid_sample(drawing, grid + bend.permute(0, 2, 3, 1), align_corners=False).squeeze(1)  # (n, 24, 24)
    x = (x + 0.06 * torch.randn(x.shape, generator=g)).clamp_(0, 1)
    if inverted:
        x = 1 - x
    return (x * 255).round_().to(torch.uint8)


def checksum(raw):
    return sha256_of(*(raw[split] for split in sorted(raw)))


def read_cache(file, recipe):
    """The uint8 pictures of a cached set by split, or None where there is no such file or it is damaged."""
    if not file.exists():
        return None
    try:
        content = torch.load(file, weights_only=True)
        raw = content["splits"]
        shapes = {split: (n * len(recipe["classes"]), GLYPH_SIZE, GLYPH_SIZE) for split, n in recipe["sizes"].items()}
        if {split: tuple(raw[split].shape) for split in raw} == shapes and content["sha256"] == checksum(raw):
            return raw
        reason = "its content is not what was written"
    except Exception as error:   # unpickling fails in many ways; each means that the file is of no use
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    print(f"{file} is damaged and is made again ({reason})", file=sys.stderr)
    return None


# ------------------------------------------------------------------------------------------------- real sets

def load_pictures(name, data_dir=None, seed=0, per_class=None):
    """A real set through torchvision, downloaded into data_dir where it is not there yet; 1 x 28 x 28.

    The seed puts the training pictures of each class in an order; the first 500 are set aside for validation and
    training takes from the rest, so the two never meet. per_class=None: all of both; per_class=50: the first 50 of
    each class in both (at most 500 in val). The test set is always whole. Raises ValueError for an unknown name, no
    data_dir, a per_class that the set cannot give and damaged files, FileNotFoundError for files that cannot be had.
    """
    if name not in REAL:
        raise ValueError(f"no picture set {name!r}: choose from {', '.join(REAL)}")
    if data_dir is None:
        raise ValueError(f"{name} is read from files: give their folder by --data-dir, or use --data glyphs")
    class_name, mean, std = REAL[name]
    train, test = load_real(class_name, Path(data_dir))
    order = torch.randperm(len(train.targets), generator=generator(name, "train", seed))
    by_class = [order[train.targets[order] == label] for label in range(len(train.classes))]
    most = min(map(len, by_class)) - VAL_PER_CLASS
    if per_class is not None and not 1 <= per_class <= most:
        raise ValueError(f"per_class={per_class} does not fit {name}: it must be from 1 to {most}, "
                         f"as {VAL_PER_CLASS} training pictures of each class are set aside for validation")
    chosen = {"train": [i[VAL_PER_CLASS:][:per_class] for i in by_class],
              "val": [i[:VAL_PER_CLASS][:per_class] for i in by_class]}
    splits = {}
    for split, parts in chosen.items():
        index = torch.cat(parts).sort().values
        splits[split] = normalise(train.data[index], mean, std), train.targets[index]
    splits["test"] = normalise(test.data, mean, std), test.targets
    return Pictures(name, splits, [c.split(" - ")[0] for c in train.classes])   # MNIST's are "0 - zero", ...


def load_real(class_name, data_dir):
    """torchvision's training and test set, with every way to fail put in one sentence."""
    import torchvision.datasets
    dataset = getattr(torchvision.datasets, class_name)
    folder = data_dir / class_name / "raw"
    check_files(dataset, folder)
    try:
        train = dataset(root=str(data_dir), train=True, download=True)
        check_files(dataset, folder)   # once more: what has been unpacked is new
        return train, dataset(root=str(data_dir), train=False)
    except (RuntimeError, OSError) as error:   # URLError and PermissionError are OSErrors
        check_files(dataset, folder)   # a broken download is named
        missing = [f for f, _ in dataset.resources if not (folder / f).exists() and not (folder / f[:-3]).exists()]
        if not missing:
            raise ValueError(f"cannot read {class_name} in {folder} ({one_line(error)}): "
                             "check its files, and that the folder can be written to") from None
        raise FileNotFoundError(
            f"{class_name} is not complete: {', '.join(missing)} could not be downloaded from "
            f"{' or '.join(dataset.mirrors)} ({one_line(error)}); put what is missing into {folder}, "
            "or use pictures that need no download: --data glyphs") from None


def one_line(error):
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def check_files(dataset, folder):
    """Raises ValueError that names a damaged file: torchvision does not look again at what it has unpacked before."""
    for name, md5 in dataset.resources:
        packed, unpacked = folder / name, folder / name[:-len(".gz")]
        remedy = "delete it to have it made again from a sound copy, or use --data glyphs"
        if packed.is_file() and hashlib.md5(packed.read_bytes(), usedforsecurity=False).hexdigest() != md5:
            raise ValueError(f"{packed} is damaged (its MD5 is not {md5}): {remedy}")
        if not unpacked.is_file():
            continue
        dims = 3 if "idx3" in name else 1   # pictures or labels
        with open(unpacked, "rb") as file:
            head = file.read(4 + 4 * dims)   # the format: 0, 0, 8 for bytes, dims, then each size in four bytes
        sizes = [int.from_bytes(head[i:i + 4], "big") for i in range(4, 4 + 4 * dims, 4)]
        if head[:4] != bytes([0, 0, 8, dims]) or unpacked.stat().st_size != 4 + 4 * dims + math.prod(sizes):
            raise ValueError(f"{unpacked} is damaged (its length or kind is not what its head should say): {remedy}")


# ---------------------------------------------------------------------------------------------------- a grid

def save_grid(path, pictures, labels, before, after, classes):
    """Write a PNG of pictures with their label and what a model took them for before and after fine-tuning.

    pictures (N, C, H, W) with 1 or 3 channels on any scale; labels, before, after: N ints each, indices into
    classes; before may be None (a fresh head knows nothing). Green is right, red is wrong; the frame is that of
    `after`. The file is written whole or not at all. Raises ValueError where the lengths do not agree.
    """
    from torchvision.transforms.functional import to_pil_image
    from torchvision.utils import make_grid
    if not len(pictures) == len(labels) == len(after) == len(after if before is None else before) > 0:
        raise ValueError("pictures, labels, before and after must be equally many, and at least one")
    pictures = pictures.detach().float().cpu()
    low, high = pictures.min(), pictures.max()
    pictures = (pictures - low) / (high - low).clamp_min(1e-9)
    font = load_font(15)
    captions = []
    for i, label in enumerate(map(int, labels)):
        lines = [("label", label, "black")]
        for word, guesses in (("before", before), ("after", after)):
            if guesses is not None:
                lines.append((word, int(guesses[i]), "#1a7f37" if int(guesses[i]) == label else "#cf222e"))
        captions.append([(word, classes[k], colour) for word, k, colour in lines])
    left = font.getlength("before   ")
    width = 12 + int(left + max(font.getlength(text) for lines in captions for _, text, _ in lines))
    tiles = [draw_tile(p, lines, font, left, width) for p, lines in zip(pictures, captions)]
    grid = make_grid(torch.stack(tiles), nrow=min(8, len(tiles)), padding=10, pad_value=1.0)
    write_whole(path, lambda file: to_pil_image(grid).save(file, format="PNG"))


def draw_tile(picture, lines, font, left, width):
    """A picture (C, H, W) in [0, 1], enlarged and framed, above its lines of (word, class, colour): (3, h, w)."""
    from PIL import Image, ImageDraw
    from torchvision.transforms.functional import pil_to_tensor, to_pil_image
    zoom = max(1, round(100 / picture.shape[-1]))
    image = to_pil_image(picture.expand(3, -1, -1))
    image = image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
    frame, line_height = 4, 19
    top = image.height + 2 * frame + 4   # of the text
    tile = Image.new("RGB", (max(width, image.width + 2 * frame), top + line_height * len(lines)), "white")
    pen = ImageDraw.Draw(tile)
    pen.rectangle((0, 0, image.width + 2 * frame - 1, image.height + 2 * frame - 1), fill=lines[-1][2])
    tile.paste(image, (frame, frame))
    for i, (word, text, colour) in enumerate(lines):
        pen.text((0, top + line_height * i), word, fill="#6e7781", font=font)
        pen.text((left, top + line_height * i), text, fill=colour, font=font)
    return pil_to_tensor(tile) / 255
