"""Glyphs that the program draws itself: two small picture sets that need no download.

Pillow carries one font. Its characters are drawn in several stroke widths, then distorted, batch by batch.
Everything is a function of the seed.
"""

import string
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from .files import sha256_of, write_whole
from .images import Pictures, load_font
from .rng import generator

# Glyphs: classes, dark on light or not, pictures a class in each split.
GLYPHS = {
    "A": dict(classes="123456789" + string.ascii_uppercase.replace("I", ""), inverted=False,
              sizes={"train": 900, "val": 100, "test": 100}),
    "B": dict(classes=string.ascii_lowercase, inverted=True,
              sizes={"train": 50, "val": 30, "test": 60}),
}
GLYPH_MEAN, GLYPH_STD = (0.5,), (0.5,)   # of a pixel, for both sets: inverted pictures must look inverted to the model
GLYPH_SIZE = 24        # pixels along a side of a glyph picture
BANK_SIZE = 64         # pixels along a side of the drawings that they are made from
STROKES = (0, 1, 2, 4)   # added to each side of a stroke, in half pixels; more would fill the e and join the dot of i
RECIPE = 1             # raise it with every change of the recipe: it stands in the names of cached files
CHUNK = 2048           # pictures made at a time, which bounds the memory


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
    splits = {split: (raw[split].unsqueeze(1), glyph_labels(recipe, split)) for split in recipe["sizes"]}
    return Pictures(f"glyphs {which}", splits, list(recipe["classes"]), GLYPH_MEAN, GLYPH_STD)


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
