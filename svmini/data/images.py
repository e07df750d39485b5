"""Image classification: the task, the preparation and augmentation of images, and a grid of images with predictions.

Images are stored as bytes. `prepare` converts a batch to what a model expects, on the model's device. Everything is a
function of (data, seed, step). A source of images has these attributes:

    name, classes       the name of the dataset, and the name of each class, indexed by label
    mean, std           of each channel: what a model that is pretrained on this source expects
    natural             whether a mirrored and shifted image still belongs to its class
    side                height and width of the images in pixels; None if they vary
    per_class           training and validation images that are drawn per class; None: all
    val_per_class       validation images per class that are drawn in addition; None: a part of per_class
    sizes               {"train" | "val" | "test": number of images}
    draw(seed, size)    {"train" | "val" | "test": (images (N, C, H, W) uint8, labels (N,) int64)} for a model whose
                        images have height and width `size`
"""

import torch
import torch.nn.functional as F

from ..files import sha256_of, write_whole
from ..rng import generator
from . import pick, to_device

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)   # mean and std of the channels of natural images


def describe(source):
    """Return the size of each split and the classes of a source as one line for a reader."""
    sizes = ", ".join(f"{n:,} images in {split}" for split, n in source.sizes.items())
    return f"{source.name}: {sizes}; {len(source.classes)} classes: {listed(source.classes)}"


def listed(classes):
    """Return the first ten class names as a string."""
    return ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")


class ImageClassification:
    """Predict the class of an image.

    seed: for what the source draws.  config: of the model, with image_size, mean and std.  augment: whether training
    images of a natural source are mirrored and shifted. Small datasets are kept on the device. Large ones stay in main
    memory, and each batch is copied as bytes.
    """
    metric, higher_is_better = "accuracy", True

    def __init__(self, source, seed, config, device, augment=True):
        self.name, self.classes, self.config, self.device = source.name, source.classes, config, device
        self.augmented = augment and source.natural
        splits = source.draw(seed, config.image_size)
        self.data_config = {"data": source.name, "sha256": sha256_of(source.classes, splits),
                            "per_class": source.per_class, "augment": self.augmented}
        if source.val_per_class:
            self.data_config["val_per_class"] = source.val_per_class
        self.splits = {split: (x.to(device), y.to(device)) if x.numel() < 2**30 else (x, y)
                       for split, (x, y) in splits.items()}

    def prepared(self, x):
        """Copy bytes (B, C, H, W) to the device and prepare them as the model expects."""
        return prepare(to_device(x, self.device), self.config.image_size, self.config.mean, self.config.std)

    def batch(self, size, seed, step):
        """Draw training images x (size, C, S, S) float32 and labels y (size,) int64 on the device.

        No image is in a batch twice, unless the batch is larger than the dataset.
        """
        x, y = self.splits["train"]
        index = to_device(pick(len(y), size, generator("images", seed, step)), x.device)
        images = self.prepared(x[index])
        return augment(images, seed, step) if self.augmented else images, to_device(y[index], self.device)

    def loss(self, model, x, y):
        return F.cross_entropy(model(x), y)

    def evaluate(self, model, split):
        """Return the mean cross entropy as "loss" and the accuracy in percent as "metric"."""
        x, y = self.splits[split]
        chunk = 500 if self.config.image_size < 100 else 64   # images at a time
        logits = torch.cat([model(self.prepared(part)).float() for part in x.split(chunk)])      # (N, classes)
        y = y.to(logits.device)
        return {"loss": F.cross_entropy(logits, y).item(),
                "metric": 100 * (logits.argmax(dim=1) == y).double().mean().item()}

    def samples(self):
        """Return 24 test images for a reader, always the same: images (24, C, H, W) uint8 and labels (24,)."""
        x, y = self.splits["test"]
        index = torch.randperm(len(y), generator=generator("shown"))[:24]
        return x[index], y[index]

    @torch.no_grad()
    def show(self, model):
        """Return the classes that the model predicts for `samples`, as 24 labels for save_grid."""
        return model.eval()(self.prepared(self.samples()[0])).argmax(dim=1).tolist()


def prepare(images, size, mean, std):
    """Convert uint8 (B, C, H, W) to float32 (B, len(mean), size, size), normalized by the mean and std of each channel.

    Other sizes are resized (bilinear, antialiased). Gray becomes three equal channels, and color becomes its luma.
    """
    def channels(values):   # (C, 1, 1) on the device
        return to_device(torch.tensor(values).view(-1, 1, 1), images.device)

    x = images.float().div_(255)
    if x.shape[-2:] != (size, size):
        x = F.interpolate(x, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    if x.shape[1] == 3 and len(mean) == 1:
        x = (x * channels((0.299, 0.587, 0.114))).sum(dim=1, keepdim=True)   # ITU-R BT.601
    x = x.expand(-1, len(mean), -1, -1)
    return (x - channels(mean)) / channels(std)


def augment(x, seed, step):
    """Mirror half of the images (B, C, S, S), and shift each by up to S / 8 pixels with reflected edges."""
    B, _, S, _ = x.shape
    g, most = generator("augment", seed, step), S // 8
    mirrored = torch.rand(B, generator=g) < 0.5
    shift = torch.randint(2 * most + 1, (B, 2), generator=g).tolist()
    x = torch.where(to_device(mirrored, x.device).view(-1, 1, 1, 1), x.flip(3), x)
    x = F.pad(x, (most,) * 4, mode="reflect")
    return torch.stack([image[:, i:i + S, j:j + S] for image, (i, j) in zip(x, shift)])


def save_grid(path, images, labels, before, after, classes):
    """Save a PNG of images, each above its class and the classes that a model predicts before and after fine-tuning.

    images: (N, C, H, W) uint8 with 1 or 3 channels.  labels, before, after: N indices into classes; before may be
    None. Right predictions are green, wrong ones are red.
    """
    from PIL import Image, ImageDraw, ImageFont
    from torchvision.transforms.functional import pil_to_tensor, to_pil_image
    from torchvision.utils import make_grid
    font, zoom = ImageFont.load_default(size=15), max(1, round(100 / images.shape[-1]))
    lines = [("", labels)] + [("before: ", before)] * (before is not None) + [("after: ", after)]
    tiles = []
    for i, x in enumerate(images):
        image = to_pil_image(x.cpu().expand(3, -1, -1))
        image = image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
        tile = Image.new("RGB", (max(image.width, 140), image.height + 4 + 19 * len(lines)), "white")
        tile.paste(image)
        for n, (title, predicted) in enumerate(lines):
            color = "black" if not title else "#1a7f37" if predicted[i] == labels[i] else "#cf222e"
            ImageDraw.Draw(tile).text((0, image.height + 4 + 19 * n), f"{title}{classes[predicted[i]]}", color, font)
        tiles.append(pil_to_tensor(tile))
    grid = make_grid(torch.stack(tiles), nrow=8, padding=10, pad_value=255)
    write_whole(path, lambda file: to_pil_image(grid).save(file, format="PNG"))
