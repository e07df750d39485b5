"""The image task: preparation of bytes, augmentation, batches and scores, and the grid of predictions."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import functional

from svmini.data.images import IMAGENET, ImageClassification, augment, prepare, save_grid


def random_bytes(*shape, seed=0):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


# ---- preparation ----

def test_pixels_are_normalized_by_mean_and_std():
    x = torch.tensor([[[[0, 255], [51, 102]]]], dtype=torch.uint8)        # 0, 1, 0.2 and 0.4 of full brightness
    expected = torch.tensor([[[[-0.5, 1.5], [-0.1, 0.3]]]])               # minus 0.25, divided by 0.5
    assert torch.allclose(prepare(x, 2, (0.25,), (0.5,)), expected, atol=1e-7)
    assert x.tolist() == [[[[0, 255], [51, 102]]]], "the bytes do not change"


def test_gray_becomes_three_equal_channels_and_color_its_luma():
    gray = prepare(torch.full((2, 1, 4, 4), 102, dtype=torch.uint8), 4, *IMAGENET)
    assert gray.shape == (2, 3, 4, 4)
    for channel, mean, std in zip(range(3), *IMAGENET):
        assert torch.allclose(gray[:, channel], torch.tensor((0.4 - mean) / std), atol=1e-6)
    colors = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]], dtype=torch.uint8)
    luma = prepare(colors.view(4, 3, 1, 1), 1, (0.0,), (1.0,))
    assert luma.shape == (4, 1, 1, 1)
    assert torch.allclose(luma.flatten(), torch.tensor([0.299, 0.587, 0.114, 1.0]), atol=1e-6)


def test_other_sizes_are_resized_as_torchvision_does():
    for old, new in [((40, 40), 16), ((17, 23), 32)]:
        x = random_bytes(2, 3, *old)
        expected = functional.resize(x.float() / 255, [new, new], antialias=True)
        assert torch.allclose(prepare(x, new, (0.0,) * 3, (1.0,) * 3), expected, atol=1e-6)


# ---- augmentation ----

def copies(image):
    """Return every (C, S, S) that augment may make of an image by numpy, keyed by (mirrored, row, column)."""
    S = image.shape[-1]
    most = S // 8
    padded = [np.pad(source, [(0, 0), (most, most), (most, most)], mode="reflect") for source in (image, image.flip(2))]
    return {(mirrored, i - most, j - most): torch.from_numpy(padded[mirrored][:, i:i + S, j:j + S])
            for mirrored in (0, 1) for i in range(2 * most + 1) for j in range(2 * most + 1)}


def test_an_augmented_image_is_a_shifted_or_mirrored_copy():
    x = torch.randn(80, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    how, before, one = [], torch.get_rng_state(), augment(x, seed=1, step=2)
    assert torch.equal(one, augment(x, 1, 2)) and torch.equal(before, torch.get_rng_state())
    assert not torch.equal(one, augment(x, 1, 3)) and not torch.equal(one, augment(x, 2, 2))
    for image, result in zip(x, one, strict=True):
        [key] = [key for key, copy in copies(image).items() if torch.equal(copy, result)]
        how.append(key)
    assert 25 <= sum(m for m, _, _ in how) <= 55, "half of 80 are mirrored, within three standard deviations"
    for axis in (1, 2):
        assert {key[axis] for key in how} == {-2, -1, 0, 1, 2}, "an eighth of 16 to either side"
    assert len({(i, j) for _, i, j in how}) > 15, "rows and columns are shifted independently"


# ---- the task ----

CONFIG = SimpleNamespace(image_size=8, mean=(0.0,), std=(1.0,))
COLOR = SimpleNamespace(image_size=12, mean=IMAGENET[0], std=IMAGENET[1])


class Source:
    """Noise of 50 classes, whose brightest pixel is at the label; every seed gives another draw."""
    name, classes, mean, std = "toy", [f"class {i}" for i in range(50)], (0.5,), (0.5,)
    per_class, val_per_class = 7, None

    def __init__(self, natural=False):
        self.natural, self.asked = natural, []

    def draw(self, seed, size):
        self.asked.append((seed, size))
        splits = {}
        for i, (split, n) in enumerate({"train": 50, "val": 1110, "test": 130}.items()):
            y = torch.arange(n) % 50
            x = random_bytes(n, 1, 8, 8, seed=10 * seed + i) // 2
            x.view(n, -1)[torch.arange(n), y] = 255
            splits[split] = x, y
        return splits


class Brightest(torch.nn.Module):
    """Predict the class at which an image is brightest, but class 3 for class 4."""
    sizes = ()

    def forward(self, x):
        self.sizes = [*self.sizes, len(x)]
        logits = x.flatten(1)[:, :50].clone()
        logits[logits.argmax(1) == 3, 4] = 2
        return logits


def test_a_batch_is_a_function_of_data_seed_and_step():
    """Prepared with the mean and std of the model's pretraining, not those of the source."""
    before = torch.get_rng_state()
    task = ImageClassification(Source(), 1, CONFIG, "cpu")
    x, y = task.batch(32, seed=0, step=5)
    assert x.shape == (32, 1, 8, 8) and torch.equal(x.flatten(1)[:, :50].argmax(1), y) and len(y.unique()) == 32
    train = Source().draw(1, 8)["train"][0].float() / 255
    assert torch.equal(x, train[y]), "images that are not natural are not augmented"
    color = ImageClassification(source := Source(), 1, COLOR, "cpu")
    assert source.asked == [(1, 12)]
    assert torch.equal(color.batch(32, 0, 5)[0], prepare(Source().draw(1, 12)["train"][0][y], 12, *IMAGENET))
    assert all(map(torch.equal, (x, y), task.batch(32, 0, 5)))
    assert not torch.equal(y, task.batch(32, 0, 6)[1]) and not torch.equal(y, task.batch(32, 1, 5)[1])
    assert torch.equal(before, torch.get_rng_state()), "the global generator is not used"
    assert len(task.batch(64, 0, 0)[1]) == 64 and len(task.batch(50, 0, 0)[1].unique()) == 50


def test_only_training_images_of_a_natural_source_are_augmented():
    plain, augmented = (ImageClassification(Source(natural=True), 0, CONFIG, "cpu", augment=on) for on in (False, True))
    x, y = plain.batch(32, 2, 3)
    again, same = augmented.batch(32, 2, 3)
    assert torch.equal(y, same) and torch.equal(again, augment(x, 2, 3)) and not torch.equal(again, x)
    assert (plain.data_config["augment"], augmented.data_config["augment"]) == (False, True)
    assert augmented.evaluate(Brightest(), "test") == plain.evaluate(Brightest(), "test")


def test_accuracy_and_loss_of_a_split():
    task = ImageClassification(Source(), 0, CONFIG, "cpu")
    model = Brightest()
    x, y = task.splits["val"]
    right = 100 * (y != 3).double().mean().item()
    scores = task.evaluate(model, "val")
    assert scores["metric"] == pytest.approx(right) and model.sizes == [500, 500, 110]
    logits = Brightest()(x.float() / 255)
    assert scores["loss"] == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)
    assert task.loss(model, x.float() / 255, y).item() == pytest.approx(scores["loss"], rel=1e-5)
    large = ImageClassification(Source(), 0, SimpleNamespace(image_size=100, mean=(0.0,), std=(1.0,)), "cpu")
    large.evaluate(model := Brightest(), "test")
    assert model.sizes == [64, 64, 2]
    assert (task.name, task.metric, task.higher_is_better) == ("toy", "accuracy", True)


def test_a_change_in_any_split_changes_data_config(monkeypatch):
    """So that --resume does not reuse the result of other data."""
    source = Source()
    splits = source.draw(0, 8)
    monkeypatch.setattr(source, "draw", lambda seed, size: splits)
    seen = {ImageClassification(source, 0, CONFIG, "cpu").data_config["sha256"]}
    for x, y in splits.values():
        x[0, 0, 0, 0] ^= 1
        seen.add(ImageClassification(source, 0, CONFIG, "cpu").data_config["sha256"])
        y[[0, 1]] = y[[1, 0]]
        seen.add(ImageClassification(source, 0, CONFIG, "cpu").data_config["sha256"])
    source.classes = source.classes[::-1]
    config = ImageClassification(source, 0, CONFIG, "cpu").data_config
    assert config == {"data": "toy", "sha256": config["sha256"], "per_class": 7, "augment": False}
    assert len(seen | {config["sha256"]}) == 8


def test_the_samples_are_always_the_same_24_test_images():
    task = ImageClassification(Source(), 0, CONFIG, "cpu")
    x, y = task.samples()
    assert x.shape == (24, 1, 8, 8) and x.dtype == torch.uint8 and 15 < len(y.unique())
    assert torch.equal(x.flatten(1).argmax(1), y) and all(map(torch.equal, (x, y), task.samples()))
    tested = Source().draw(0, 8)["test"][0].flatten(1)
    assert all((image == tested).all(dim=1).any() for image in x.flatten(1))
    assert task.show(Brightest()) == [4 if k == 3 else k for k in y.tolist()]


# ---- the grid ----

def test_the_grid_shows_right_predictions_in_green_and_wrong_ones_in_red(tmp_path):
    from PIL import Image
    y = torch.arange(4)
    right, wrong = y.tolist(), (y + 1).tolist()
    for channels, before, after, green, red in ((1, None, right, True, False), (3, None, wrong, False, True),
                                                (3, right, wrong, True, True)):
        x = random_bytes(4, channels, 24, 24)
        save_grid(tmp_path / "out" / "x.png", x, y, before, after, list("abcde"))
        with Image.open(tmp_path / "out" / "x.png") as image:
            colors = {color for _, color in image.getcolors(2**20)}
        assert ((0x1a, 0x7f, 0x37) in colors, (0xcf, 0x22, 0x2e) in colors) == (green, red)
        assert tuple(x[2, :, 5, 7].expand(3).tolist()) in colors, "the images are shown unchanged"
