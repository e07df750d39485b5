"""Images in files: which folders are splits and classes, which files are copies, and what is read from a file."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from fake_datasets import build_tree, noise_images, write_image
from helpers import refused
from svmini.data.image_datasets import open_images
from svmini.data.image_files import read_image
from svmini.data.images import describe
from svmini.errors import InputError


def open_folder(path):
    return open_images(f"folder:{path}", None)


def keys(source, *splits):
    return {bytes(image.flatten().tolist()) for split in splits for image in source.draw(0, 8)[split][0]}


# ---- folders of splits and classes ----

def test_split_folders_are_recognized_in_any_case(tmp_path):
    for i, (train, test) in enumerate([("train", "valid"), ("Training", "testing"), ("TRAIN", "Val")]):
        build_tree(tmp_path / str(i), {train: 4, test: 2})
        assert describe(open_folder(tmp_path / str(i))).endswith(
            "12 images in train, 4 images in val, 8 images in test; 4 classes: class 0, class 1, class 2, class 3")


@pytest.mark.parametrize("change, message", [
    ([("test/class 1", None)], "different class folders in train and test: class 1 is in only one"),
    ([("test", "Testing"), ("train", "test")], "has the split folders Testing, test: give it one folder train"),
    ([("train/class 1", "Train/a")], "has the split folders Train, train, test: give it one folder train"),
    ([("train", None)], "has the split folders test: give it one folder train"),
    ([("test", "tst")], "train has the folder class 0 inside: put images directly into class folders"),
    ([("test/x", ""), ("train/x", "")], "train/x has no images: add images or delete the folder"),
    ([("test/class 1", "one"), ("train", None), ("test", None)], "has the class folders one: it needs at least two"),
    ([("train/class 1", "train/CLASS 0")], "class folders CLASS 0, class 0, class 2, class 3: it needs .* case"),
])
def test_a_structure_that_could_mean_something_else_is_rejected(change, message, tmp_path):
    """After moves from a path to another one, None to delete it, "" to create it."""
    build_tree(tmp_path, {"train": 4, "test": 2})
    for old, new in change:
        if new is None:
            shutil.rmtree(tmp_path / old)
        else:
            (tmp_path / (new or old)).mkdir(parents=True)
            (tmp_path / old).rename(tmp_path / (new or old))
    with pytest.raises(InputError, match=message):
        open_folder(tmp_path)


def test_a_class_called_train_is_a_class(tmp_path):
    with refused(f"no folder {tmp_path / 'nowhere'}"):
        open_folder(tmp_path / "nowhere")
    build_tree(tmp_path, {"": 15})
    (tmp_path / "class 2").rename(tmp_path / "train")
    assert open_folder(tmp_path).classes == ["class 0", "class 1", "class 3", "train"]


def test_hidden_files_are_skipped_and_other_files_are_named(tmp_path, capsys):
    build_tree(tmp_path / "there", {"train": 4, "test": 2})
    (tmp_path / "a link ü").symlink_to(tmp_path / "there")
    tmp_path = tmp_path / "a link ü"
    expected = describe(open_folder(tmp_path))
    for file in tmp_path.glob("train/class 0/*.jpg"):
        file.rename(file.with_suffix(".JPG"))
    for name in (".DS_Store", ".ipynb_checkpoints/a.png", "train/class 0/._0.jpg", "train/.git/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert describe(open_folder(tmp_path)) == expected and capsys.readouterr().out == ""
    for name in ("val/a.png", "train/class 3/Thumbs.db", "test/class 3/notes.txt", "train/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert describe(open_folder(tmp_path)) == expected
    assert capsys.readouterr().out == f"{tmp_path}: not used: 4 other files or folders, such as val\n"


# ---- which images are test images ----

def test_an_image_never_changes_sides_when_others_are_added(tmp_path):
    build_tree(tmp_path, {"": 15})
    before = open_folder(tmp_path)
    for i, image in enumerate(noise_images(4, 15, 3, 8, seed=9)[0]):
        write_image(tmp_path / f"class {i % 4}" / f"-{i}.jpg", image)
    after = open_folder(tmp_path)
    assert keys(before, "test") < keys(after, "test")
    assert keys(before, "train", "val") < keys(after, "train", "val")
    assert 15 < after.sizes["test"] < 30, "one in five of 120, more or less"


def test_copies_of_an_image_are_on_one_side_and_counted(tmp_path, capsys):
    build_tree(tmp_path, {"train": 4, "test": 2})
    expected, test = describe(open_folder(tmp_path)), keys(open_folder(tmp_path), "test")
    for file in tmp_path.glob("test/*/*"):
        shutil.copyfile(file, tmp_path / "train" / file.parent.name / f"copy {file.name}")
    file = next(tmp_path.glob("train/*/*.jpg"))
    shutil.copyfile(file, file.with_name("again.jpg"))
    source = open_folder(tmp_path)
    assert describe(source) == expected and keys(source, "test") == test and not keys(source, "train", "val") & test
    assert capsys.readouterr().out.endswith(f"{source.name}: 9 files are copies of other files and are left out\n")
    shutil.rmtree(tmp_path / "train")
    shutil.copytree(tmp_path / "test", tmp_path / "train")
    with refused("smallest class, ", " has 0 training images"):
        open_folder(tmp_path)
    file = next(tmp_path.glob("test/class 1/*"))
    shutil.copyfile(file, tmp_path / "train" / "class 3" / "x.jpg")
    with refused(f"{file} and ", "x.jpg are the same image in two classes: delete one"):
        open_folder(tmp_path)


def test_every_class_needs_a_test_image(tmp_path):
    build_tree(tmp_path, {"": 15})
    for file in sorted(tmp_path.glob("class 1/*"))[4:]:
        file.unlink()
    with refused("has no test image of class 1: add images to these classes"):
        open_folder(tmp_path)


# ---- what is read from a file ----

RGB = np.array([[[255, 255, 0], [255, 0, 0]], [[0, 255, 0], [0, 0, 0]]], np.uint8).repeat(8, 0).repeat(8, 1)


def save(path, kind):
    """Save RGB as a file of some kind; returns what a viewer shows, (16, 16, 3)."""
    image, options, shown = Image.fromarray(RGB), {"lossless": True, "quality": 100}, RGB.copy()
    if kind == "orientation":
        options["exif"] = Image.Exif()
        options["exif"][0x112] = 6   # turn by 90 degrees to the right
        shown = np.rot90(RGB, -1)
    elif kind == "alpha":
        image.putalpha(Image.fromarray(RGB.max(2)))
        shown[8:, 8:] = 255
    elif kind == "transparent color":
        image = image.quantize(4) if path.suffix == ".gif" else image
        options["transparency"] = image.getpixel((15, 15))
        shown[8:, 8:] = 255
    else:
        image = image.convert(kind)
    image.save(path, **options)
    return shown


@pytest.mark.parametrize("kind, endings", [("orientation", "png tif jpg"), ("alpha", "png webp tif"),
                                           ("transparent color", "png gif"), ("CMYK", "jpg tif"), ("P", "png gif")])
def test_an_image_is_read_as_a_viewer_shows_it(kind, endings, tmp_path):
    """Turned, on white, in RGB; the corners, because JPEG mixes colors at edges."""
    for ending in endings.split():
        shown = save(tmp_path / f"x.{ending}", kind)[::15, ::15].astype(int)
        found = read_image(tmp_path / f"x.{ending}", 16)[:, ::15, ::15].permute(1, 2, 0)
        assert np.abs(found.numpy() - shown).max() < (20 if ending == "jpg" else 3), ending


def test_16_bit_gray_is_scaled_to_8_bits(tmp_path):
    ramp = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)
    for name in ("x.png", "x.tif"):
        Image.fromarray(ramp).save(tmp_path / name)
        assert torch.equal(read_image(tmp_path / name, 16), torch.arange(256).view(1, 16, 16).expand(3, -1, -1))


def test_the_middle_square_is_resized(tmp_path):
    stripes = torch.zeros(3, 10, 30, dtype=torch.uint8)
    for i in range(3):
        stripes[i, :, 10 * i:10 * i + 10] = 200   # red, green, blue, each as wide as the image is high
    write_image(tmp_path / "wide", stripes)
    write_image(tmp_path / "high", stripes.transpose(1, 2))
    write_image(tmp_path / "strip", stripes[:, :1].repeat(1, 1, 2000))
    for name, side in (("wide", 10), ("wide", 5), ("high", 10), ("high", 5)):
        image = read_image(tmp_path / name, side)
        assert image.shape == (3, side, side)
        assert image[:, 1:-1, 1:-1].flatten(1).unique(dim=1).flatten().tolist() == [0, 200, 0]
    assert read_image(tmp_path / "strip", 224).shape == (3, 224, 224), "without 224 x 13,440,000 pixels in between"


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "cut", "F", "I"])
def test_a_file_that_cannot_be_read_is_named_in_one_line(damage, tmp_path):
    Image.fromarray(RGB).save(path := tmp_path / "x.png")
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"no image", "cut": content[:-30]}.get(damage, content))
    if damage in ("F", "I"):
        Image.fromarray(np.ones((16, 16), {"F": np.float32, "I": np.int32}[damage])).save(path, format="TIFF")
    name = tmp_path / ("missing" if damage == "missing" else "x.png")
    with refused(f"{name} cannot be read as an image (", "): replace or remove it",
                 f"its mode {damage} has no fixed range" if damage in ("F", "I") else ""):
        read_image(name, 16)
