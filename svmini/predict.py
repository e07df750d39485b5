"""python -m svmini.predict: what a ViT, adapted or not, takes pictures for: files of your own, or its test pictures."""

import sys
from pathlib import Path

import torch

from .command_line import Parser, add_machine, add_model, number, run
from .data.picture_sets import open_pictures, read_file
from .data.pictures import Pictures, prepare, save_grid
from .errors import InputError
from .model_file import load_adapted
from .models.vit import ViT
from .training.loop import evaluate
from .training.machine import pick_machine


def command(argv):
    p = Parser("-m svmini.predict", "What a ViT takes pictures for.")
    p.add_argument("pictures", nargs="*", metavar="PICTURE", help="files to name (none: the test pictures)")
    add_model(p, "vit_b_16, ...")
    p.add_argument("--data", metavar="NAME", help="glyphs, mnist, ..., folder:PATH (what it was trained on)")
    p.add_argument("--data-dir", metavar="DIR", help="where real data lie, or are downloaded to")
    p.add_argument("--out", default="out/predict", metavar="DIR", help="where predictions.png goes (out/predict)")
    p.add_argument("--seed", type=number(0), default=0, metavar="N", help="of the glyphs")
    add_machine(p)
    flags = p.parse_args(argv)
    machine = pick_machine(flags.device, flags.dtype)
    model, about = load_adapted(flags.init, flags.adapter, ViT, flags.n_head)
    model.to(machine.device)
    if flags.pictures:
        return name_each(flags.pictures, model, about.get("classes"), machine)
    trained_on = None if about["published"] and not flags.adapter else about.get("data")
    if not (flags.data or trained_on):
        raise InputError(f"{flags.init} does not say what it was trained on: give --data")
    source = open_pictures("glyphs B" if flags.data == "glyphs" else flags.data or trained_on, flags.data_dir,
                           flags.seed)
    if len(source.classes) != model.config.num_classes:
        raise InputError(f"{source.name} has {len(source.classes)} classes, and the model knows "
                         f"{model.config.num_classes}: give the data it was trained on as --data")
    task = Pictures(source, flags.seed, model.config, machine.device)
    accuracy = evaluate(model, task, "test", machine)["metric"]
    path = Path(flags.out) / "predictions.png"
    save_grid(path, *task.shown(), None, task.show(model), task.classes)
    print(f"{task.name}: accuracy {accuracy:.1f} on {len(task.splits['test'][1])} test pictures; {path}")


@torch.inference_mode()
def name_each(paths, model, classes, machine):
    """Print each file's class, and the probability that the model gives it. classes: their names, where known."""
    c = model.eval().config
    x = torch.stack([read_file(path, c.image_size) for path in paths])          # (N, 3, S, S) uint8
    with machine.autocast():
        logits = model(prepare(x.to(machine.device), c.image_size, c.mean, c.std))
    for path, (p, i) in zip(paths, zip(*logits.float().softmax(dim=1).max(dim=1))):
        print(f"{path}: {classes[i] if classes else f'class {i}'} ({100 * p:.0f} %)")


if __name__ == "__main__":
    sys.exit(run(command))
