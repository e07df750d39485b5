"""predict: accuracy on the data of a model, and the classes of other images."""

import pytest
import torch

from svmini import ViT, predict
from svmini.data import glyphs
from svmini.data.images import ImageClassification, prepare
from svmini.data.image_datasets import open_images, read_file
from svmini.model_file import load_adapted
from svmini.training.loop import evaluate
from toy import CPU
from tools import call, folder    # noqa: F401  folder is a fixture


@pytest.mark.parametrize("base, adapter, data, count", [
    ("vit.pt", None, "glyphs A", 34), ("vit.pt", "vit-adapter.pt", "glyphs B", 26),
    ("raw-vit.pt", "raw-vit-adapter.pt", "folder", 8)])
def test_predict_says_the_accuracy_on_what_a_model_was_trained_on(base, adapter, data, count, folder, tmp_path, capsys,
                                                                  monkeypatch):
    for which in "AB":
        monkeypatch.setitem(glyphs.GLYPHS[which], "sizes", {"train": 2, "val": 1, "test": 1})
    argv = ["--init", folder / base, "--out", tmp_path, "--device", "cpu", *(["--n-head", 2] if "raw" in base else [])]
    said = call(predict, capsys, *argv, *(["--adapter", folder / adapter] if adapter else []))
    data = f"folder:{folder / 'pictures'}" if data == "folder" else data
    model, metadata = load_adapted(folder / base, adapter and folder / adapter, ViT, 2 if "raw" in base else None)
    task = ImageClassification(open_images(data, None, 0), 0, model.config, CPU.device)
    accuracy = evaluate(model, task, "test", CPU)["metric"]
    assert said.startswith(f"{data}: accuracy {accuracy:.1f} on {count} test pictures; ")
    assert (tmp_path / "predictions.png").read_bytes().startswith(b"\x89PNG") and metadata["data"] == data


def test_predict_names_pictures_of_ones_own(folder, tmp_path, capsys):
    argv = ["--init", folder / "raw-vit.pt", "--n-head", 2, "--device", "cpu"]
    paths = sorted((folder / "pictures" / "test").rglob("*.jpg"))[::3]
    model, metadata = load_adapted(folder / "raw-vit.pt", folder / "raw-vit-adapter.pt", ViT, 2)
    x = prepare(torch.stack([read_file(path, 24) for path in paths]), 24, model.config.mean, model.config.std)
    chances = model.eval()(x).softmax(dim=1)
    said = call(predict, capsys, *paths, *argv, "--adapter", folder / "raw-vit-adapter.pt").splitlines()
    assert said == [f"{path}: {metadata['classes'][p.argmax()]} ({100 * p.max():.0f} %)"
                    for path, p in zip(paths, chances)]
    assert len(said) == 3 and {"ant", "bee", "cow", "dog"} >= {line.split(": ")[1].split(" ")[0] for line in said}
    assert call(predict, capsys, paths[0], *argv).startswith(f"{paths[0]}: class "), "a base that does not name them"
    assert not list(tmp_path.iterdir())
    assert "No such file" in call(predict, capsys, tmp_path / "none.jpg", *argv, code=2)
    (tmp_path / "text.jpg").write_text("no picture")
    assert "text.jpg is no picture that can be read" in call(predict, capsys, tmp_path / "text.jpg", *argv, code=2)
