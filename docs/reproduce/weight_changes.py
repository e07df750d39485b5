"""Print how far fine-tuning moved the adapted weights: python docs/reproduce/weight_changes.py --init MODEL RUN...

RUN is the folder of one run, such as out/vit-glyphs/runs/full-seed0. The value is the mean of ‖W − W0‖ / ‖W0‖ over the
layers that the model adapts by default.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))   # find svmini from any working directory

from svmini import merge
from svmini.adapting import find_linears
from svmini.cli import Parser, add_model, run_command
from svmini.model_file import load_adapted, load_base


def command(argv):
    p = Parser("docs/reproduce/weight_changes.py", "Print how far fine-tuning moved the adapted weights.")
    add_model(p)
    p.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    flags = p.parse_args(argv)
    base, _ = load_base(flags.init, n_head=flags.n_head)
    for run in map(Path, flags.runs):
        if (run / "adapter.pt").is_file():
            model = merge(load_adapted(flags.init, str(run / "adapter.pt"), n_head=flags.n_head)[0])
        else:
            model, _ = load_base(str(run / "model.pt"))
        changes = [relative_change(linear.weight.detach(), model.get_submodule(name).weight.detach())
                   for name, linear in find_linears(base, base.targets, base.also_train).items()]
        print(f"{run.name:<60} {sum(changes) / len(changes):.3g}")


def relative_change(before, after):
    return ((after - before).norm() / before.norm()).item()


if __name__ == "__main__":
    sys.exit(run_command(command))
