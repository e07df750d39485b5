"""What a model is shown: bytes to numbers, batches, the light augmentation, and the grid that a reader is shown."""

import pytest
import torch
from torchvision.transforms import functional

from svmini.images import IMAGENET, batch, prepare, save_grid, shake


def bytes_of(*shape, seed=0):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


# ---- bytes to numbers ----

def test_a_pixel_means_what_the_written_numbers_say():
    x = torch.tensor([[[[0, 255], [51, 102]]]], dtype=torch.uint8)        # 0, 1, 0.2 and 0.4 of full brightness
    expected = torch.tensor([[[[-0.5, 1.5], [-0.1, 0.3]]]])               # minus 0.25, over 0.5
    assert torch.allclose(prepare(x, 2, (0.25,), (0.5,)), expected, atol=1e-7)
    assert x.tolist() == [[[[0, 255], [51, 102]]]], "the bytes are left alone"


def test_every_channel_has_its_mean_and_deviation():
    x = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    got = prepare(x, 1, (0.5, 0.2, 0.4), (0.25, 0.1, 0.3))
    assert torch.allclose(got.flatten(), torch.tensor([-2.0, 0.0, 2.0]), atol=1e-6) and got.shape == (1, 3, 1, 1)


def test_grey_becomes_three_equal_channels_and_colour_its_luma():
    grey = prepare(torch.full((2, 1, 4, 4), 102, dtype=torch.uint8), 4, *IMAGENET)
    assert grey.shape == (2, 3, 4, 4)
    for channel, mean, std in zip(range(3), *IMAGENET):
        assert torch.allclose(grey[:, channel], torch.tensor((0.4 - mean) / std), atol=1e-6)
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]], dtype=torch.uint8)
    luma = prepare(colours.view(4, 3, 1, 1), 1, (0.0,), (1.0,))
    assert luma.shape == (4, 1, 1, 1)
    assert torch.allclose(luma.flatten(), torch.tensor([0.299, 0.587, 0.114, 1.0]), atol=1e-6)


@pytest.mark.parametrize("old, new", [((40, 40), 16), ((17, 23), 32), ((8, 8), 12)])
def test_another_size_is_resized_as_torchvision_does(old, new):
    x = bytes_of(2, 3, *old)
    expected = functional.resize(x.float() / 255, [new, new], antialias=True)
    assert torch.allclose(prepare(x, new, (0.0,) * 3, (1.0,) * 3), expected, atol=1e-6)


def test_the_right_size_is_not_touched():
    x = bytes_of(2, 3, 16, 16)
    assert torch.equal(prepare(x, 16, (0.0,) * 3, (1.0,) * 3), x.float() / 255)


# ---- the light augmentation ----

def copies(picture):
    """Every (C, S, S) that shake may make of a picture, by (mirrored, row, column), built index by index."""
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
    shaken = shake(x, seed=1, step=2)
    assert shaken.shape == x.shape
    how = []
    for picture, result in zip(x, shaken):
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
    one = shake(x, 0, 5)
    assert torch.equal(one, shake(x, 0, 5))
    assert not torch.equal(one, shake(x, 0, 6)) and not torch.equal(one, shake(x, 5, 0))
    assert torch.equal(x, kept) and torch.equal(before, torch.get_rng_state())
    tiny = shake(x[:, :, :4, :4], 0, 5)    # too small to shift: mirrored only
    assert all(torch.equal(t, p) or torch.equal(t, p.flip(2)) for t, p in zip(tiny, x[:, :, :4, :4]))


# ---- batches ----

def test_batch_is_a_function_of_data_seed_and_step():
    x, y = torch.arange(50).view(50, 1, 1, 1).float(), torch.arange(50)
    before = torch.get_rng_state()
    bx, by = batch(x, y, 32, seed=0, step=5)
    assert bx.shape == (32, 1, 1, 1) and torch.equal(bx.flatten().long(), by)
    assert len(by.unique()) == 32
    assert torch.equal(by, batch(x, y, 32, 0, 5)[1])
    assert not torch.equal(by, batch(x, y, 32, 0, 6)[1]) and not torch.equal(by, batch(x, y, 32, 5, 0)[1])
    assert torch.equal(before, torch.get_rng_state()), "the global generator is left alone"
    drawn = torch.cat([batch(x, y, 32, 0, step)[1] for step in range(200)]).bincount(minlength=50)
    assert drawn.min() > 90 and drawn.max() < 166   # 128 expected, standard deviation below 7
    assert len(batch(x, y, 64, 0, 0)[1]) == 64
    with pytest.raises(ValueError, match="at least 1"):
        batch(x[:0], y[:0], 32, 0, 0)


# ---- the grid ----

def pixels(path):
    from PIL import Image
    with Image.open(path) as image:
        assert image.mode == "RGB"
        return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)


def has(image, rgb):
    return bool((image == torch.tensor(rgb, dtype=torch.uint8)).all(dim=2).any())


GREEN, RED = (0x1a, 0x7f, 0x37), (0xcf, 0x22, 0x2e)


def test_grid_shows_right_in_green_and_wrong_in_red(tmp_path):
    x, y, classes = bytes_of(4, 1, 24, 24), [0, 1, 2, 3], list("abcde")
    wrong = [k + 1 for k in y]
    for name, before, after, green, red in (("r", None, y, True, False), ("w", None, wrong, False, True),
                                            ("rw", y, wrong, True, True)):
        save_grid(tmp_path / "out" / f"{name}.png", x, y, before, after, classes)
        image = pixels(tmp_path / "out" / f"{name}.png")
        assert (has(image, GREEN), has(image, RED)) == (green, red)
        assert image.shape[1] >= 4 * 96
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["r.png", "rw.png", "w.png"]


def test_grid_takes_colour_tensors_and_long_names(tmp_path):
    x = torch.zeros(2, 3, 32, 32)
    x[:, 0] = 7.0   # pure red on whatever scale
    labels, classes = torch.tensor([0, 1]), ["a", "an uncommonly long name of a class"]
    save_grid(tmp_path / "short.png", x, labels[:1].repeat(2), None, labels[:1].repeat(2), classes)
    save_grid(tmp_path / "long.png", x, labels, labels, labels, classes)
    assert has(pixels(tmp_path / "long.png"), (255, 0, 0))
    assert pixels(tmp_path / "long.png").shape[1] > pixels(tmp_path / "short.png").shape[1], "the tiles make room"


def test_grid_refuses_lists_of_other_lengths(tmp_path):
    with pytest.raises(ValueError, match="equally many"):
        save_grid(tmp_path / "x.png", torch.zeros(2, 1, 24, 24), [0, 1], [0], [0, 1], ["a", "b"])
    assert not list(tmp_path.iterdir())
