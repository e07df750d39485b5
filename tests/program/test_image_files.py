"""Images in files: which folders are splits and classes, which files are copies, and what is read from a file."""

import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from fake_datasets import build_tree, noise_images, write_image
from svmini.data.image_datasets import open_images
from svmini.data.image_files import read_image
from svmini.data.images import describe
from svmini.errors import InputError, MissingFile


def open_folder(path, **options):
    return open_images(f"folder:{path}", None, **options)


def keys(source, *splits):
    return {bytes(image.flatten().tolist()) for split in splits for image in source.draw(0, 8)[split][0]}


# ---- folders of splits and classes ----

@pytest.mark.parametrize("train, test", [("train", "valid"), ("Train", "Test"), ("training", "testing"),
                                         ("TRAIN", "Val"), ("Training", "validation")])
def test_split_folders_are_recognized_in_any_case(train, test, tmp_path):
    build_tree(tmp_path, {train: 4, test: 2})
    assert describe(open_folder(tmp_path)).endswith(
        "12 images in train, 4 images in val, 8 images in test; 4 classes: class 0, class 1, class 2, class 3")


def test_a_structure_that_could_mean_something_else_is_rejected(tmp_path):
    def rejected(message):
        with pytest.raises(InputError, match=message):
            open_folder(tmp_path)

    with pytest.raises(MissingFile, match="no folder .*nowhere"):
        open_folder(tmp_path / "nowhere")
    rejected("at least two class folders.*none")
    build_tree(tmp_path, {"train": 4, "test": 2})
    (tmp_path / "Test" if (tmp_path / "TEST").is_dir() else tmp_path / "Testing").mkdir()
    rejected("split folders train, Testing, test: give it one folder train and one folder test")
    shutil.rmtree(tmp_path / "Testing")
    (tmp_path / "test" / "class 1").rename(tmp_path / "test" / "Class 1")
    rejected("different class folders in train and test: Class 1, class 1 is in only one")
    shutil.rmtree(tmp_path / "test" / "Class 1")
    rejected("class 1 is in only one")
    (tmp_path / "train" / "class 1").rename(tmp_path / "train" / "CLASS 0")
    rejected("differ not only in case; it has CLASS 0, class 0")
    (tmp_path / "test").rename(tmp_path / "tst")   # a typo would make train and tst the classes
    rejected("train is not a class folder: it has the folder CLASS 0")
    shutil.rmtree(tmp_path / "train" / "CLASS 0")
    shutil.rmtree(tmp_path / "tst")
    (tmp_path / "train").rename(tmp_path / "test")
    rejected("split folders test: give it one folder train")
    (tmp_path / "test" / "class 0" / "nothing").mkdir(parents=True)
    (tmp_path / "test" / "class 2").rename(tmp_path / "class 2")
    shutil.rmtree(tmp_path / "test")
    rejected("two class folders.* it has class 2: give the folder that holds them all")
    (tmp_path / "empty").mkdir()
    rejected("empty is not a class folder: it has no images")


def test_a_class_called_train_is_a_class(tmp_path):
    build_tree(tmp_path, {"": 15})
    (tmp_path / "class 2").rename(tmp_path / "train")
    assert open_folder(tmp_path).classes == ["class 0", "class 1", "class 3", "train"]


def test_hidden_and_other_files_are_not_read_and_other_files_are_named(tmp_path, capsys):
    build_tree(tmp_path, {"train": 4, "test": 2})
    expected = describe(open_folder(tmp_path))
    for name in (".DS_Store", ".ipynb_checkpoints/a.png", "train/class 0/._0.jpg", "train/.git/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert describe(open_folder(tmp_path)) == expected and capsys.readouterr().out == ""
    (tmp_path / "val").mkdir()
    (tmp_path / "train" / "class 3" / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "test" / "class 3" / "notes.txt").write_bytes(b"x")
    assert describe(open_folder(tmp_path)) == expected
    assert capsys.readouterr().out == f"{tmp_path}: not used: 3 other files or folders, such as val\n"


def test_names_and_links_do_not_matter(tmp_path):
    """Endings in upper case, names that are not ASCII, links to files and to folders."""
    x, y = noise_images(2, 4, 3, 8, 0)
    for i, (image, label) in enumerate(zip(x, y.tolist())):
        write_image(tmp_path / "all" / f"{i}.x", image)
        for split in ("train", "test")[i % 2:i % 2 + 1]:
            folder = tmp_path / "links" / split / ("Käse", "猫")[label]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"ü {i}.PNG").symlink_to(tmp_path / "all" / f"{i}.x")
    (tmp_path / "here").symlink_to(tmp_path / "links")
    source = open_folder(tmp_path / "here")
    assert source.classes == ["Käse", "猫"] and sum(source.sizes.values()) == 8


# ---- which images are tested ----

def test_an_image_never_changes_sides_when_others_are_added(tmp_path):
    build_tree(tmp_path, {"": 15})
    before = open_folder(tmp_path)
    for i, image in enumerate(noise_images(4, 15, 3, 8, seed=9)[0]):
        write_image(tmp_path / f"class {i % 4}" / f"-{i}.jpg", image)        # before the others in every order of names
    after = open_folder(tmp_path)
    assert keys(before, "test") < keys(after, "test")
    assert keys(before, "train", "val") < keys(after, "train", "val")
    assert 60 / 4 < after.sizes["test"] < 2 * 60 / 4, "one in five of 120, more or less"


def test_copies_of_an_image_are_on_one_side_and_counted(tmp_path, capsys):
    build_tree(tmp_path, {"train": 4, "test": 2})
    expected, test = describe(open_folder(tmp_path)), keys(open_folder(tmp_path), "test")
    for file in tmp_path.glob("test/*/*"):
        shutil.copyfile(file, tmp_path / "train" / file.parent.name / f"copy {file.name}")
    copies = list(tmp_path.glob("train/*/*.jpg"))
    shutil.copyfile(copies[0], copies[0].with_name("again.jpg"))
    source = open_folder(tmp_path)
    assert describe(source) == expected and keys(source, "test") == test and not keys(source, "train", "val") & test
    assert capsys.readouterr().out.endswith(f"{source.name}: 9 files are copies of other files and are left out\n")
    shutil.rmtree(tmp_path / "train")
    shutil.copytree(tmp_path / "test", tmp_path / "train")
    with pytest.raises(InputError, match="smallest class has 0 training images"):
        open_folder(tmp_path)


def test_copies_with_different_classes_are_a_contradiction(tmp_path):
    build_tree(tmp_path, {"train": 4, "test": 2})
    file = next(tmp_path.glob("test/class 1/*"))
    shutil.copyfile(file, tmp_path / "train" / "class 3" / "x.jpg")
    with pytest.raises(InputError, match=f"{file} and .*x.jpg are the same image in two classes: delete one"):
        open_folder(tmp_path)


def test_every_class_needs_a_test_image(tmp_path):
    build_tree(tmp_path, {"": 15})
    for file in sorted(tmp_path.glob("class 1/*"))[4:]:
        file.unlink()
    with pytest.raises(InputError, match="has no test image of class 1: add images to these classes"):
        open_folder(tmp_path)


# ---- what is read from a file ----

RGB = np.zeros((16, 16, 3), np.uint8)   # yellow, red / green, black
RGB[:8, :, 0], RGB[:, :8, 1] = 255, 255


def corners(path):
    """The colors of a file's corners (2, 2, 3), as it is read."""
    return read_image(path, 16)[:, ::15, ::15].permute(1, 2, 0).tolist()


BLACK, WHITE, YELLOW, RED, GREEN = [0] * 3, [255] * 3, [255, 255, 0], [255, 0, 0], [0, 255, 0]


@pytest.mark.parametrize("name", ["x.gif", "x.webp", "x.tif", "x.png"])
def test_the_first_frame_or_page_is_read(name, tmp_path):
    options = {"lossless": True} if name == "x.webp" else {}
    more = [Image.new("RGB", (16, 16), "white")] * 2
    Image.fromarray(RGB).save(tmp_path / name, save_all=True, append_images=more, **options)
    assert corners(tmp_path / name) == [[YELLOW, RED], [GREEN, BLACK]]


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.webp"])
def test_orientation_is_applied(name, tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6   # rotate by 90 degrees to the right
    Image.fromarray(RGB).save(tmp_path / name, exif=exif, **({"lossless": True} if name == "x.webp" else {}))
    assert corners(tmp_path / name) == [[GREEN, YELLOW], [BLACK, RED]]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparent_pixels_become_white(mode, tmp_path):
    """An alpha channel, and one transparent color."""
    image, options = Image.fromarray(RGB // 255 * 254), {"transparency": (0, 0, 0)}
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray((RGB.any(2) * 255).astype(np.uint8)))
        options = {}
    elif mode == "P":
        image = image.quantize(4)
        options = {"transparency": image.getpixel((15, 15))}
    image.convert(mode).save(tmp_path / "x.png", **options)
    found = corners(tmp_path / "x.png")
    assert found[1][1] == WHITE and WHITE not in (found[0][0], found[0][1], found[1][0])


@pytest.mark.parametrize("mode, name", [("CMYK", "x.jpg"), ("CMYK", "x.tif"), ("P", "x.gif"), ("YCbCr", "x.tif"),
                                        ("LAB", "x.tif"), ("1", "x.png")])
def test_other_modes_are_converted(mode, name, tmp_path):
    image = Image.fromarray(RGB if mode != "1" else RGB[..., :1].repeat(3, 2))
    if mode == "LAB":
        from PIL import ImageCms
        spaces = (ImageCms.createProfile(space) for space in ("sRGB", "LAB"))
        image = ImageCms.applyTransform(image, ImageCms.buildTransform(*spaces, "RGB", "LAB"))
    image.convert(mode).save(tmp_path / name, **({"quality": 100} if name == "x.jpg" else {}))
    expected = [[WHITE, WHITE], [BLACK, BLACK]] if mode == "1" else [[YELLOW, RED], [GREEN, BLACK]]
    assert np.abs(np.array(corners(tmp_path / name)) - expected).max() < 20


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.pgm"])
def test_16_bit_gray_is_scaled_to_8_bits(name, tmp_path):
    ramp = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)
    if name == "x.pgm":
        (tmp_path / name).write_bytes(b"P5 16 16 65535\n" + ramp.astype(">u2").tobytes())
    else:
        Image.fromarray(ramp).save(tmp_path / name)
    assert torch.equal(read_image(tmp_path / name, 16), torch.arange(256).view(1, 16, 16).expand(3, -1, -1))


def test_a_file_is_resized_by_its_shorter_side_and_cropped_to_the_middle(tmp_path):
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
    assert read_image(tmp_path / "strip", 224).shape == (3, 224, 224), "without 60,000 x 224 pixels in between"


def png(width, height, *chunks):
    chunks = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), *chunks, (b"IDAT", b""), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(content)) + kind + content +
                                           struct.pack(">I", zlib.crc32(kind + content)) for kind, content in chunks)


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "header", "bomb", "long text", "mode F", "mode I"])
def test_a_file_that_cannot_be_read_is_named_in_one_line(damage, tmp_path):
    Image.fromarray(RGB).save(path := tmp_path / "x.png")
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"no image", "cut": content[:-30], "header": content[:20],
                      "bomb": png(30_000, 30_000),
                      "long text": png(16, 16, (b"zTXt", b"k\0\0" + zlib.compress(bytes(2**21))))}.get(damage, content))
    if damage.startswith("mode"):
        Image.fromarray(np.ones((16, 16), {"F": np.float32, "I": np.int32}[damage[-1]])).save(path, format="TIFF")
    with pytest.raises(InputError) as error:
        read_image(path, 16)
    message = str(error.value)
    assert message.startswith(f"{path} cannot be read as an image (") and "\n" not in message
    assert not damage.startswith("mode") or f"its {damage} has no fixed range" in message
