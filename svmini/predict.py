"""python -m svmini.predict: the accuracy of a ViT, adapted or not, on test pictures, and a picture of some of them."""

import sys
from pathlib import Path

from .command_line import Parser, add_machine, number, run
from .data.picture_sets import open_pictures
from .data.pictures import Pictures, save_grid
from .errors import InputError
from .model_file import load_adapted
from .models.vit import ViT
from .training.loop import evaluate
from .training.machine import pick_machine


def command(argv):
    p = Parser("-m svmini.predict", "What a ViT takes test pictures for.")
    p.add_argument("--init", required=True, metavar="MODEL", help="a model file, a file of weights, or vit_b_16, ...")
    p.add_argument("--adapter", metavar="FILE", help="an adapter file that goes with --init")
    p.add_argument("--data", metavar="NAME", help="glyphs, mnist, ..., folder:PATH (what it was trained on)")
    p.add_argument("--data-dir", metavar="DIR", help="where real data lie, or are downloaded to")
    p.add_argument("--out", default="out/predict", metavar="DIR", help="where predictions.png goes (out/predict)")
    p.add_argument("--n-head", type=number(1), metavar="N", help="of weights whose heads are not of width 64")
    p.add_argument("--seed", type=number(0), default=0, metavar="N", help="of the glyphs")
    add_machine(p)
    flags = p.parse_args(argv)
    machine = pick_machine(flags.device, flags.dtype)
    model, about = load_adapted(flags.init, flags.adapter, ViT, flags.n_head)
    trained_on = None if about["published"] and not flags.adapter else about.get("data")
    if not (flags.data or trained_on):
        raise InputError(f"{flags.init} does not say what it was trained on: give --data")
    source = open_pictures("glyphs B" if flags.data == "glyphs" else flags.data or trained_on, flags.data_dir,
                           flags.seed)
    if len(source.classes) != model.config.num_classes:
        raise InputError(f"{source.name} has {len(source.classes)} classes, and the model knows "
                         f"{model.config.num_classes}: give the data it was trained on as --data")
    task = Pictures(source, flags.seed, model.config, machine.device)
    accuracy = evaluate(model.to(machine.device), task, "test", machine)["metric"]
    path = Path(flags.out) / "predictions.png"
    save_grid(path, *task.shown(), None, task.show(model), task.classes)
    print(f"{task.name}: accuracy {accuracy:.1f} on {len(task.splits['test'][1])} test pictures; {path}")


if __name__ == "__main__":
    sys.exit(run(command, sys.argv[1:]))
