"""predict: the accuracy of a model on the data it was trained on, and the classes of other images."""

import pytest
import torch

import train_vit
from fake_datasets import build_tree
from helpers import CPU, call, read
from svmini import ViT, analyze, predict
from svmini.data import glyphs
from svmini.data.image_datasets import open_images
from svmini.data.image_files import read_image
from svmini.data.images import ImageClassification, prepare
from svmini.model_file import load_adapted
from svmini.training.loop import evaluate


@pytest.fixture(autouse=True)
def few_glyphs(monkeypatch):
    for which in "AB":
        monkeypatch.setitem(glyphs.GLYPHS[which], "sizes", {"train": 2, "val": 1, "test": 1})


@pytest.mark.parametrize("base, adapter, data, count", [
    ("vit.pt", None, "glyphs A", 34), ("vit.pt", "vit-adapter.pt", "glyphs B", 26),
    ("raw-vit.pt", "raw-vit-adapter.pt", "folder", 8)])
def test_the_accuracy_is_on_the_test_split_of_the_training_data(base, adapter, data, count, folder, tmp_path):
    argv = ["--init", folder / base, "--out", tmp_path, "--device", "cpu", *(["--n-head", 2] if "raw" in base else [])]
    printed = call(predict, *argv, *(["--adapter", folder / adapter] if adapter else []))
    data = f"folder:{folder / 'images'}" if data == "folder" else data
    model, metadata = load_adapted(folder / base, adapter and folder / adapter, ViT, 2 if "raw" in base else None)
    task = ImageClassification(open_images(data, None, 0), 0, model.config, CPU.device)
    accuracy = evaluate(model, task, "test", CPU)["metric"]
    assert printed.startswith(f"{data}: accuracy {accuracy:.1f} on {count} test images; ")
    assert (tmp_path / "predictions.png").read_bytes().startswith(b"\x89PNG") and metadata["data"] == data


@pytest.mark.parametrize("init, data, seed", [("vit.pt", "glyphs", 1), ("raw-vit.pt", "folder:", 0)])
def test_the_data_and_seed_of_a_run_are_found_again(init, data, seed, folder, tmp_path, monkeypatch):
    """Of an adapter and of full fine-tuning, also of a published base."""
    monkeypatch.setattr(analyze, "draw_best", lambda *a: None)
    n_head, per_class = (["--n-head", 2], ["--per-class", 3]) if "raw" in init else ([], [])
    data = data if data == "glyphs" else f"{data}{folder / 'images'}"
    argv = ["--init", folder / init, *n_head, "--data", data, *per_class]
    call(train_vit, *argv, "--methods", "full", "svfit", "--steps", 2, "--seed", seed, "--out", tmp_path)
    seeds = []
    monkeypatch.setattr(predict, "open_images", lambda *a, **b: seeds.append(a[2]) or open_images(*a, **b))
    runs, out = tmp_path / "runs", ["--device", "cpu", "--out", tmp_path]
    for row, flags in zip(read(tmp_path)["rows"], (
            ["--init", runs / f"full-seed{seed}" / "model.pt"],
            ["--init", folder / init, *n_head, "--adapter", runs / f"svfit-seed{seed}" / "adapter.pt"])):
        assert f": accuracy {row['metric']:.1f} on " in call(predict, *flags, *out)
    assert seeds == [seed, seed]


def test_data_with_other_classes_are_rejected_even_if_their_number_is_equal(folder, tmp_path):
    build_tree(tmp_path, {"train": 3, "test": 2})
    argv = ["--init", folder / "raw-vit.pt", "--n-head", 2, "--data", f"folder:{tmp_path}", "--out", tmp_path]
    adapter = ["--adapter", folder / "raw-vit-adapter.pt"]
    assert ": accuracy " in call(predict, *argv, *adapter)
    for split in ("train", "test"):
        (tmp_path / split / "class 3").rename(tmp_path / split / "b")
    message = "has 4 classes (b, class 0, class 1, class 2), but the model has"
    assert f"{message} 4 (class 0, class 1, class 2, class 3)" in call(predict, *argv, *adapter, code=2)
    assert f"{message} 5 " in call(predict, *argv, code=2)


def test_images_are_classified_in_batches(folder, tmp_path, monkeypatch):
    argv = ["--init", folder / "raw-vit.pt", "--n-head", 2, "--device", "cpu"]
    paths = sorted((folder / "images" / "test").rglob("*.jpg"))[::3]
    model, metadata = load_adapted(folder / "raw-vit.pt", folder / "raw-vit-adapter.pt", ViT, 2)
    x = prepare(torch.stack([read_image(path, 24) for path in paths]), 24, model.config.mean, model.config.std)
    probabilities = model.eval()(x).softmax(dim=1)
    sizes, forward = [], ViT.forward
    monkeypatch.setattr(predict, "BATCH_SIZE", 2)
    monkeypatch.setattr(ViT, "forward", lambda self, x: sizes.append(len(x)) or forward(self, x))
    printed = call(predict, *paths, *argv, "--adapter", folder / "raw-vit-adapter.pt").splitlines()
    assert printed == [f"{path}: {metadata['classes'][p.argmax()]} ({100 * p.max():.0f} %)"
                       for path, p in zip(paths, probabilities)] and sizes == [2, 1]
    assert call(predict, paths[0], *argv).startswith(f"{paths[0]}: class "), "a base without class names"
    assert not list(tmp_path.iterdir())
    assert "No such file" in call(predict, tmp_path / "none.jpg", *argv, code=2)
    assert "cannot be read as an image" in call(predict, __file__, *argv, code=2)
