"""Pictures for train_vit.py: batches of them, what a model is shown, and a grid of them for a reader.

Pictures are kept as bytes. `prepare` makes of a batch what a model expects, on the model's device; `shake` is the light
augmentation. Everything is a function of (data, seed, step).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .files import write_whole
from .rng import generator

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)   # mean and std that torchvision's weights expect


@dataclass
class Pictures:
    """splits: {"train" | "val" | "test": (images, labels)} with images (N, C, H, W) uint8 and labels (N,) int64;
    classes: the names, at the index that is their label; mean, std: of each channel; natural: may be mirrored."""
    name: str
    splits: dict
    classes: list
    mean: tuple
    std: tuple
    natural: bool = False


def prepare(images, size, mean, std):
    """uint8 (B, C, H, W) -> float32 (B, len(mean), size, size), as weights trained with this mean and std expect.

    Another size is resized to (bilinear, antialiased), grey becomes three equal channels, colour becomes its luma.
    """
    def channels(numbers):   # (C, 1, 1) on the device; a copy that blocks would wait for all that is queued there
        return torch.tensor(numbers).view(-1, 1, 1).to(images.device, non_blocking=True)

    x = images.float().div_(255)
    if x.shape[-2:] != (size, size):
        x = F.interpolate(x, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    if x.shape[1] == 3 and len(mean) == 1:
        x = (x * channels((0.299, 0.587, 0.114))).sum(dim=1, keepdim=True)   # ITU-R BT.601
    x = x.expand(-1, len(mean), -1, -1)
    return (x - channels(mean)) / channels(std)


def shake(x, seed, step):
    """Light augmentation of (B, C, S, S): half of them mirrored, each shifted by up to S / 8, edges reflected."""
    B, _, S, _ = x.shape
    g, most = generator("shake", seed, step), S // 8
    mirrored = torch.rand(B, generator=g) < 0.5
    shift = torch.randint(2 * most + 1, (B, 2), generator=g).tolist()
    x = torch.where(mirrored.view(-1, 1, 1, 1).to(x.device, non_blocking=True), x.flip(3), x)
    x = F.pad(x, (most,) * 4, mode="reflect")
    return torch.stack([picture[:, i:i + S, j:j + S] for picture, (i, j) in zip(x, shift)])


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
    index = index.to(images.device, non_blocking=True)
    return images[index], labels[index]   # (size, C, H, W), (size,)


def load_font(size):
    """The font that Pillow carries. Raises ValueError where this Pillow has none that scales."""
    from PIL import ImageFont
    try:
        return ImageFont.load_default(size=size)
    except (ImportError, OSError, TypeError) as error:   # TypeError: before 10.1 it took no size
        raise ValueError(f"this Pillow cannot draw text at a chosen size ({error}): "
                         "install Pillow 10.1 or later with FreeType (pip install --upgrade pillow)") from None


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
