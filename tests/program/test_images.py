"""What a model is shown: bytes to numbers, the light augmentation, the task, and the grid that a reader is shown."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import functional

from svmini.data.images import IMAGENET, ImageClassification, prepare, save_grid, augment
from svmini.files import sha256_of


def bytes_of(*shape, seed=0):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


# ---- bytes to numbers ----

def test_a_pixel_means_what_the_written_numbers_say():
    x = torch.tensor([[[[0, 255], [51, 102]]]], dtype=torch.uint8)        # 0, 1, 0.2 and 0.4 of full brightness
    expected = torch.tensor([[[[-0.5, 1.5], [-0.1, 0.3]]]])               # minus 0.25, over 0.5
    assert torch.allclose(prepare(x, 2, (0.25,), (0.5,)), expected, atol=1e-7)
    assert x.tolist() == [[[[0, 255], [51, 102]]]], "the bytes are left alone"


def test_grey_becomes_three_equal_channels_and_colour_its_luma():
    grey = prepare(torch.full((2, 1, 4, 4), 102, dtype=torch.uint8), 4, *IMAGENET)
    assert grey.shape == (2, 3, 4, 4)
    for channel, mean, std in zip(range(3), *IMAGENET):
        assert torch.allclose(grey[:, channel], torch.tensor((0.4 - mean) / std), atol=1e-6)
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]], dtype=torch.uint8)
    luma = prepare(colours.view(4, 3, 1, 1), 1, (0.0,), (1.0,))
    assert luma.shape == (4, 1, 1, 1)
    assert torch.allclose(luma.flatten(), torch.tensor([0.299, 0.587, 0.114, 1.0]), atol=1e-6)


@pytest.mark.parametrize("old, new", [((40, 40), 16), ((17, 23), 32), ((16, 16), 16)])
def test_another_size_is_resized_as_torchvision_does(old, new):
    x = bytes_of(2, 3, *old)
    expected = functional.resize(x.float() / 255, [new, new], antialias=True)
    assert torch.allclose(prepare(x, new, (0.0,) * 3, (1.0,) * 3), expected, atol=1e-6)


# ---- the light augmentation ----

def copies(picture):
    """Every (C, S, S) that augment may make of a picture, by (mirrored, row, column), built index by index."""
    S = picture.shape[-1]
    most = S // 8
    found = {}
    for mirrored in (False, True):
        source = picture.flip(2) if mirrored else picture
        for i in range(-most, most + 1):
            for j in range(-most, most + 1):
                rows, columns = ([abs(k) if k < S else 2 * (S - 1) - k for k in range(d, d + S)] for d in (i, j))
                found[mirrored, i, j] = source[:, rows][:, :, columns]
    return found


def test_every_picture_is_a_shifted_or_mirrored_copy():
    x = torch.randn(80, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    augmented = augment(x, seed=1, step=2)
    assert augmented.shape == x.shape
    how = []
    for picture, result in zip(x, augmented):
        [key] = [key for key, copy in copies(picture).items() if torch.equal(copy, result)]
        how.append(key)
    mirrored = sum(m for m, _, _ in how)
    assert 25 <= mirrored <= 55, "half of 80, give or take three deviations"
    for axis in (1, 2):
        assert {key[axis] for key in how} == {-2, -1, 0, 1, 2}, "an eighth of 16 to either side"
    assert len({(i, j) for _, i, j in how}) > 15, "rows and columns are shifted on their own"


def test_shaking_is_a_function_of_seed_and_step():
    x = torch.randn(16, 1, 24, 24, generator=torch.Generator().manual_seed(0))
    kept, before = x.clone(), torch.get_rng_state()
    one = augment(x, 0, 5)
    assert torch.equal(one, augment(x, 0, 5))
    assert not torch.equal(one, augment(x, 0, 6)) and not torch.equal(one, augment(x, 1, 5))
    assert torch.equal(x, kept) and torch.equal(before, torch.get_rng_state())


# ---- the task ----

CONFIG = SimpleNamespace(image_size=8, mean=(0.0,), std=(1.0,))


class Source:
    """Noise of 50 classes, whose brightest pixel stands at the label; another draw for every seed."""
    name, classes, mean, std = "toy", [f"class {i}" for i in range(50)], (0.5,), (0.5,)
    per_class, val_per_class = 7, None

    def __init__(self, natural=False):
        self.natural, self.asked = natural, []

    def draw(self, seed, size):
        self.asked.append((seed, size))
        splits = {}
        for i, (split, n) in enumerate({"train": 50, "val": 1110, "test": 130}.items()):
            y = torch.arange(n) % 50
            x = bytes_of(n, 1, 8, 8, seed=10 * seed + i) // 2
            x.view(n, -1)[torch.arange(n), y] = 255
            splits[split] = x, y
        return splits


class Brightest(torch.nn.Module):
    """Takes a picture for the class at which it is brightest, but class 3 for class 4."""
    sizes = ()

    def forward(self, x):
        self.sizes = [*self.sizes, len(x)]
        logits = x.flatten(1)[:, :50].clone()
        logits[logits.argmax(1) == 3, 4] = 2
        return logits


def test_a_batch_is_a_function_of_data_seed_and_step():
    before = torch.get_rng_state()
    task = ImageClassification(Source(), 1, CONFIG, "cpu")
    x, y = task.batch(32, seed=0, step=5)
    assert x.shape == (32, 1, 8, 8) and torch.equal(x.flatten(1)[:, :50].argmax(1), y) and len(y.unique()) == 32
    train = Source().draw(1, 8)["train"][0].float() / 255
    assert torch.equal(x, train[y]), "the pictures are not augmented where a mirrored one is another's"
    assert all(map(torch.equal, (x, y), task.batch(32, 0, 5)))
    assert not torch.equal(y, task.batch(32, 0, 6)[1]) and not torch.equal(y, task.batch(32, 1, 5)[1])
    assert torch.equal(before, torch.get_rng_state()), "the global generator is left alone"
    assert len(task.batch(64, 0, 0)[1]) == 64 and len(task.batch(50, 0, 0)[1].unique()) == 50


def test_training_pictures_of_a_natural_source_are_shaken_and_no_others():
    plain, augmented = (ImageClassification(Source(natural=True), 0, CONFIG, "cpu", augment=on) for on in (False, True))
    x, y = plain.batch(32, 2, 3)
    again, same = augmented.batch(32, 2, 3)
    assert torch.equal(y, same) and torch.equal(again, augment(x, 2, 3)) and not torch.equal(again, x)
    assert (plain.data_config["augment"], augmented.data_config["augment"]) == (False, True)
    assert augmented.evaluate(Brightest(), "test") == plain.evaluate(Brightest(), "test")


def test_pictures_are_prepared_as_the_model_expects_them():
    """With the mean and std that the model was trained with, not those of the source."""
    config = SimpleNamespace(image_size=12, mean=IMAGENET[0], std=IMAGENET[1])
    source = Source()
    task = ImageClassification(source, 5, config, "cpu")
    assert source.asked == [(5, 12)]
    x, y = task.batch(50, 0, 0)
    train = source.draw(5, 12)["train"][0]
    assert torch.equal(x, prepare(train[y], 12, *IMAGENET)) and x.shape == (50, 3, 12, 12)


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
    assert task.data_config == {"data": "toy", "sha256": sha256_of(task.splits["test"][0]), "per_class": 7, "augment": False}
    assert (task.name, task.metric, task.higher_is_better) == ("toy", "accuracy", True)


def test_the_same_24_test_pictures_are_shown():
    task = ImageClassification(Source(), 0, CONFIG, "cpu")
    x, y = task.shown()
    assert x.shape == (24, 1, 8, 8) and x.dtype == torch.uint8 and 15 < len(y.unique())
    assert torch.equal(x.flatten(1).argmax(1), y) and all(map(torch.equal, (x, y), task.shown()))
    tested = Source().draw(0, 8)["test"][0].flatten(1)
    assert all((picture == tested).all(dim=1).any() for picture in x.flatten(1))
    assert task.show(Brightest()) == [4 if k == 3 else k for k in y.tolist()]


# ---- the grid ----

def pixels(path):
    from PIL import Image
    with Image.open(path) as image:
        assert image.mode == "RGB"
        return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)


def has(image, rgb):
    return bool((image == torch.tensor(rgb, dtype=torch.uint8)).all(dim=2).any())


GREEN, RED = (0x1a, 0x7f, 0x37), (0xcf, 0x22, 0x2e)


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_shows_right_in_green_and_wrong_in_red(channels, tmp_path):
    x, y = bytes_of(4, channels, 24, 24), torch.arange(4)
    right, wrong = y.tolist(), (y + 1).tolist()
    for before, after, green, red in ((None, right, True, False), (None, wrong, False, True),
                                      (right, wrong, True, True)):
        save_grid(tmp_path / "out" / "x.png", x, y, before, after, list("abcde"))
        image = pixels(tmp_path / "out" / "x.png")
        assert (has(image, (0x1a, 0x7f, 0x37)), has(image, (0xcf, 0x22, 0x2e))) == (green, red)
        assert has(image, x[2, :, 5, 7].expand(3).tolist()), "the pictures are there as they were"
