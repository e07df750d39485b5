"""python -m svmini.predict: what a ViT, adapted or not, takes pictures for: files of your own, or its test pictures."""

import sys
from pathlib import Path

import torch

from .cli import Parser, add_device, add_model, number, run_command
from .data.image_datasets import open_images, read_file
from .data.images import ImageClassification, prepare, save_grid
from .errors import InputError
from .model_file import load_adapted
from .models.vit import ViT
from .training.loop import evaluate
from .training.device import resolve_device


def command(argv):
    p = Parser("-m svmini.predict", "What a ViT takes pictures for.")
    p.add_argument("pictures", nargs="*", metavar="PICTURE", help="files to name (none: the test pictures)")
    add_model(p, "vit_b_16, ...")
    p.add_argument("--data", metavar="NAME", help="glyphs, mnist, ..., folder:PATH (what it was trained on)")
    p.add_argument("--data-dir", metavar="DIR", help="where real data lie, or are downloaded to")
    p.add_argument("--out", default="out/predict", metavar="DIR", help="where predictions.png goes (out/predict)")
    p.add_argument("--seed", type=number(0), default=0, metavar="N", help="of the glyphs")
    add_device(p)
    flags = p.parse_args(argv)
    device_config = resolve_device(flags.device, flags.dtype)
    model, metadata = load_adapted(flags.init, flags.adapter, ViT, flags.n_head)
    model.to(device_config.device)
    if flags.pictures:
        return name_each(flags.pictures, model, metadata.get("classes"), device_config)
    trained_on = None if metadata["published"] and not flags.adapter else metadata.get("data")
    if not (flags.data or trained_on):
        raise InputError(f"{flags.init} does not say what it was trained on: give --data")
    source = open_images("glyphs B" if flags.data == "glyphs" else flags.data or trained_on, flags.data_dir,
                           flags.seed)
    if len(source.classes) != model.config.num_classes:
        raise InputError(f"{source.name} has {len(source.classes)} classes, and the model knows "
                         f"{model.config.num_classes}: give the data it was trained on as --data")
    task = ImageClassification(source, flags.seed, model.config, device_config.device)
    accuracy = evaluate(model, task, "test", device_config)["metric"]
    path = Path(flags.out) / "predictions.png"
    save_grid(path, *task.shown(), None, task.show(model), task.classes)
    print(f"{task.name}: accuracy {accuracy:.1f} on {len(task.splits['test'][1])} test pictures; {path}")


@torch.inference_mode()
def name_each(paths, model, classes, device_config):
    """Print each file's class, and the probability that the model gives it. classes: their names, where known."""
    c = model.eval().config
    x = torch.stack([read_file(path, c.image_size) for path in paths])          # (N, 3, S, S) uint8
    with device_config.autocast():
        logits = model(prepare(x.to(device_config.device), c.image_size, c.mean, c.std))
    for path, (p, i) in zip(paths, zip(*logits.float().softmax(dim=1).max(dim=1))):
        print(f"{path}: {classes[i] if classes else f'class {i}'} ({100 * p:.0f} %)")


if __name__ == "__main__":
    sys.exit(run_command(command))
