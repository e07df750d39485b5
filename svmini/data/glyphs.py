"""Glyphs: two small image datasets that the program draws itself, so they need no download.

Pillow contains one font. Its characters are drawn in several stroke widths and then distorted, one batch after the
other. Everything is a function of the seed.
"""

import string

import torch
import torch.nn.functional as F

from ..rng import generator

# classes, whether glyphs are dark on light, and the number of images per class in each split
GLYPHS = {
    "A": dict(classes="123456789" + string.ascii_uppercase.replace("I", ""), inverted=False,
              sizes={"train": 900, "val": 100, "test": 100}),
    "B": dict(classes=string.ascii_lowercase, inverted=True,
              sizes={"train": 50, "val": 30, "test": 60}),
}
GLYPH_SIZE = 24          # height and width of an image in pixels
BANK_SIZE = 64           # height and width of the drawings that the images are made from
STROKES = (0, 1, 2, 4)   # added to each side of a stroke, in half pixels; more would fill the e and join the dot of i
CHUNK = 2048             # images that are made at a time, which bounds the memory


class Glyphs:
    """The dataset "A" (digits and upper case, light on dark) or "B" (lower case, dark on light), 1 x 24 x 24 pixels.

    A is for pretraining, B for adaptation.  seed: for drawing the images; it is the same for all seeds of a run.
    splits: the splits to draw.
    """
    mean = std = (0.5,)   # of a pixel, for both datasets: inverted images must look inverted to the model
    natural = False       # a mirrored letter is another letter
    side = GLYPH_SIZE
    per_class = val_per_class = None

    def __init__(self, which, seed=0, splits=("train", "val", "test")):
        recipe = GLYPHS[which]
        self.name, self.classes = f"glyphs {which}", list(recipe["classes"])
        self.sizes = {split: n * len(self.classes) for split, n in recipe["sizes"].items()}
        bank = draw_bank(recipe["classes"])
        self.splits = {}
        for split in splits:
            # 0, 1, 2, ..., 0, 1, 2, ...: the first images of a split show all classes equally often
            labels = torch.arange(len(bank)).repeat(recipe["sizes"][split])                        # (N,)
            g = generator("glyphs", which, split, seed)
            images = torch.cat([draw(bank, part, recipe["inverted"], g) for part in labels.split(CHUNK)])
            self.splits[split] = images.unsqueeze(1), labels                                       # (N, 1, 24, 24)

    def draw(self, seed, size):
        """Return {"train" | "val" | "test": (images (N, 1, 24, 24) uint8, labels (N,) int64)}, equal for all seeds."""
        return self.splits


def draw_bank(characters):
    """Draw each character in each stroke width, light on dark: (classes, strokes, 64, 64) float32 in [0, 1]."""
    from PIL import Image, ImageDraw, ImageFont
    font = ImageFont.load_default(size=100)
    bank = torch.empty(len(characters), len(STROKES), BANK_SIZE, BANK_SIZE)
    for i, character in enumerate(characters):
        for j, stroke in enumerate(STROKES):
            image = Image.new("L", (2 * BANK_SIZE, 2 * BANK_SIZE))   # twice the size, so that strokes have half pixels
            # "mm" keeps all characters on one baseline, so that p is lower than d; the stem of p fits 6 pixels higher
            ImageDraw.Draw(image).text((BANK_SIZE, BANK_SIZE - 6), character, fill=255, font=font, anchor="mm",
                                       stroke_width=stroke)
            pixels = torch.frombuffer(bytearray(image.reduce(2).tobytes()), dtype=torch.uint8)
            bank[i, j] = pixels.view(BANK_SIZE, BANK_SIZE) / 255
    return bank


def draw(bank, labels, inverted, g):
    """Draw one distorted glyph for each label: (n, 24, 24) uint8.

    The drawing is rotated by up to 12 degrees, scaled by up to 0.15 along each axis, sheared by up to 0.15, shifted
    by up to 0.08 of half its side, bent by a smooth displacement (deviation 0.05), and covered with noise (0.06).
    """
    n = len(labels)

    def uniform(bound):
        return (torch.rand(n, generator=g) * 2 - 1) * bound                       # (n,)

    angle, shear = uniform(torch.pi / 15), uniform(0.15)
    scale_x, scale_y = 1 + uniform(0.15), 1 + uniform(0.15)
    shift_x, shift_y = uniform(0.08), uniform(0.08)
    cos, sin = angle.cos(), angle.sin()
    # scale, then shear, then rotate; grid_sample needs the inverse map, so the scale divides
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
