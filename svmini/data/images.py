"""ImageClassification to name the class of: the task, what a model is shown of them, and a grid of them for a reader.

ImageClassification are kept as bytes. `prepare` makes of a batch what a model expects, on the model's device; `augment` is the light
augmentation. Everything is a function of (data, seed, step). A source of pictures, be it another one, has

    name, classes       of the set, and of each class at the index that is its label
    mean, std           of each channel: what a model that is pretrained on it expects
    natural             whether a mirrored, shifted picture is still one of its class
    per_class           how many pictures a class are drawn to train and validate; None: all
    val_per_class       how many others of each class validate instead; None: a part of per_class does
    draw(seed, size)    {"train" | "val" | "test": (images (N, C, H, W) uint8, labels (N,) int64)}; size: the side of
                        the model's pictures
"""

import torch
import torch.nn.functional as F

from ..files import sha256_of, write_whole
from ..rng import generator
from . import pick

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)   # mean and std of a channel, of natural pictures


class ImageClassification:
    """The task to name the class of a source's pictures.

    seed: of what the source draws; config: the model's, with image_size, mean and std; augment: whether the training
    pictures of a natural source are mirrored and shifted. Small sets lie on the device, large ones come to it batch by
    batch, as bytes.
    """
    metric, higher_is_better = "accuracy", True

    def __init__(self, source, seed, config, device, augment=True):
        self.name, self.classes, self.config, self.device = source.name, source.classes, config, device
        self.augmented = augment and source.natural
        splits = source.draw(seed, config.image_size)
        self.splits = {split: (self.near(x), self.near(y)) for split, (x, y) in splits.items()}
        self.data_config = {"data": source.name, "sha256": sha256_of(splits["test"][0]), "per_class": source.per_class,
                      "augment": self.augmented}
        if source.val_per_class:
            self.data_config["val_per_class"] = source.val_per_class

    def near(self, x):
        return x.to(self.device) if x.numel() < 2**30 else x

    def prepared(self, x):
        """Bytes (B, C, H, W) as the model expects them, on the device."""
        x = x.to(self.device, non_blocking=True)
        return prepare(x, self.config.image_size, self.config.mean, self.config.std)

    def batch(self, size, seed, step):
        """Training pictures x (size, C, S, S) float32 and labels y (size,) on the device.

        None comes twice in a batch, unless the batch is larger than the data.
        """
        x, y = self.splits["train"]
        index = pick(len(y), size, generator("images", seed, step)).to(x.device, non_blocking=True)
        shown = self.prepared(x[index])
        return augment(shown, seed, step) if self.augmented else shown, y[index]

    def loss(self, model, x, y):
        return F.cross_entropy(model(x), y)

    def evaluate(self, model, split):
        """The cross entropy, and the accuracy in percent."""
        x, y = self.splits[split]
        chunk = 500 if self.config.image_size < 100 else 64
        logits = torch.cat([model(self.prepared(part)).float() for part in x.split(chunk)])      # (N, classes)
        return {"loss": F.cross_entropy(logits, y).item(),
                "metric": 100 * (logits.argmax(dim=1) == y).double().mean().item()}

    def shown(self):
        """24 test pictures for a reader, the same every time: images (24, C, H, W) uint8, labels (24,)."""
        x, y = self.splits["test"]
        some = torch.randperm(len(y), generator=generator("shown"))[:24]
        return x[some], y[some]

    @torch.no_grad()
    def show(self, model):
        """What the model takes the shown pictures for: 24 labels, for save_grid."""
        return model.eval()(self.prepared(self.shown()[0])).argmax(dim=1).tolist()


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


def augment(x, seed, step):
    """Light augmentation of (B, C, S, S): half of them mirrored, each shifted by up to S / 8, edges reflected."""
    B, _, S, _ = x.shape
    g, most = generator("augment", seed, step), S // 8
    mirrored = torch.rand(B, generator=g) < 0.5
    shift = torch.randint(2 * most + 1, (B, 2), generator=g).tolist()
    x = torch.where(mirrored.view(-1, 1, 1, 1).to(x.device, non_blocking=True), x.flip(3), x)
    x = F.pad(x, (most,) * 4, mode="reflect")
    return torch.stack([picture[:, i:i + S, j:j + S] for picture, (i, j) in zip(x, shift)])


def save_grid(path, pictures, labels, before, after, classes):
    """Write a PNG of pictures, each above its class and above what a model took it for before and after fine-tuning.

    pictures (N, C, H, W) uint8 with 1 or 3 channels; labels, before, after: N indices into classes each; before may
    be None. What was right stands there in green, what was wrong in red.
    """
    from PIL import Image, ImageDraw, ImageFont
    from torchvision.transforms.functional import pil_to_tensor, to_pil_image
    from torchvision.utils import make_grid
    font, zoom = ImageFont.load_default(size=15), max(1, round(100 / pictures.shape[-1]))
    lines = [("", labels)] + [("before: ", before)] * (before is not None) + [("after: ", after)]
    tiles = []
    for i, picture in enumerate(pictures):
        image = to_pil_image(picture.cpu().expand(3, -1, -1))
        image = image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
        tile = Image.new("RGB", (max(image.width, 140), image.height + 4 + 19 * len(lines)), "white")
        tile.paste(image)
        for n, (word, guesses) in enumerate(lines):
            colour = "black" if not word else "#1a7f37" if guesses[i] == labels[i] else "#cf222e"
            ImageDraw.Draw(tile).text((0, image.height + 4 + 19 * n), f"{word}{classes[guesses[i]]}", colour, font)
        tiles.append(pil_to_tensor(tile))
    grid = make_grid(torch.stack(tiles), nrow=8, padding=10, pad_value=255)
    write_whole(path, lambda file: to_pil_image(grid).save(file, format="PNG"))
