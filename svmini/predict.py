"""python -m svmini.predict: classify images with a ViT, adapted or not: your own files, or its test images."""

import sys
from pathlib import Path

import torch

from .cli import Parser, add_device, add_model, number, run_command
from .data.image_datasets import open_images
from .data.image_files import read_image
from .data.images import ImageClassification, listed, prepare, save_grid
from .errors import InputError
from .model_file import load_adapted
from .models.vit import ViT
from .training.device import resolve_device
from .training.loop import evaluate

BATCH_SIZE = 64   # image files that are read and classified at a time


def command(argv):
    p = Parser("-m svmini.predict", "Classify images with a ViT.")
    p.add_argument("images", nargs="*", metavar="IMAGE", help="image files to classify (default: all test images)")
    add_model(p, "vit_b_16, ...")
    p.flag("--data", "NAME", str, "glyphs, mnist, ..., folder:PATH", shown="as in training")
    p.flag("--data-dir", "DIR", str, "folder of the datasets that are files, or downloaded", shown="none")
    p.flag("--out", "DIR", str, "folder of predictions.png", "out/predict")
    p.flag("--seed", "N", number(0), "seed of the glyphs", shown="as in training")
    add_device(p)
    flags = p.parse_args(argv)
    device_config = resolve_device(flags.device, flags.dtype)
    model, metadata = load_adapted(flags.init, flags.adapter, ViT, flags.n_head)
    model.to(device_config.device)
    classes = metadata.get("classes", [f"class {i}" for i in range(model.config.num_classes)])
    if flags.images:
        return classify(flags.images, model, classes, device_config)
    fine_tuned = "classes" in metadata or not metadata["published"]
    name = flags.data or (metadata.get("data") if fine_tuned else None)
    if name is None:
        raise InputError(f"{flags.init} does not store the dataset it was trained on: give it as --data")
    seed = metadata.get("data_seed", 0) if flags.seed is None else flags.seed
    source = open_images("glyphs B" if name == "glyphs" else name, flags.data_dir, seed, test_only=True)
    if len(source.classes) != len(classes) or source.classes != metadata.get("classes", source.classes):
        raise InputError(f"{source.name} has {len(source.classes)} classes ({listed(source.classes)}), but the model "
                         f"has {len(classes)} ({listed(classes)}): give the data it was trained on as --data")
    task = ImageClassification(source, seed, model.config, device_config.device)
    accuracy = evaluate(model, task, "test", device_config)["metric"]
    path = Path(flags.out) / "predictions.png"
    save_grid(path, *task.samples(), None, task.show(model), task.classes)
    print(f"{task.name}: accuracy {accuracy:.1f} on {source.sizes['test']} test images; {path}")


@torch.inference_mode()
def classify(paths, model, classes, device_config):
    """Print the predicted class of each image file and its probability. classes: the names of the classes."""
    c = model.eval().config
    for first in range(0, len(paths), BATCH_SIZE):
        batch = paths[first:first + BATCH_SIZE]
        x = torch.stack([read_image(path, c.image_size) for path in batch])             # (B, 3, S, S) uint8
        with device_config.autocast():
            logits = model(prepare(x.to(device_config.device), c.image_size, c.mean, c.std))
        for path, (p, i) in zip(batch, zip(*logits.float().softmax(dim=1).max(dim=1))):
            print(f"{path}: {classes[i]} ({100 * p:.0f} %)")


if __name__ == "__main__":
    sys.exit(run_command(command))
