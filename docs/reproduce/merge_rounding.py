"""python docs/reproduce/merge_rounding.py MODEL ADAPTER: what merge() loses if the base model is in half precision.

MODEL is a base whose values are exact in bf16 (for fp16: in fp16), in a file of any dtype. Prints the size of the
update, which share of the changed weights rounds back to the base weight, and the error of the merged update.
merge(model, torch.float32) loses nothing.
"""

import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))   # svmini, from any working directory

import torch

from svmini.adapting import adapters_of
from svmini.cli import run_command
from svmini.model_file import load_any, with_adapter


@torch.no_grad()
def main(argv):
    base, metadata = load_any(argv[0])
    base = base.float()
    model, _ = with_adapter(copy.deepcopy(base), metadata, argv[1])
    for dtype in (torch.bfloat16, torch.float16):
        lost = changed = error = update = norm = 0
        for name, adapter in adapters_of(model).items():
            W0, W = base.get_submodule(name).weight.double(), adapter.weight.double()
            merged = W.to(dtype).double()
            changed += (W != W0).sum()
            lost += ((merged == W0.to(dtype)) & (W != W0)).sum()
            error, update, norm = (a + b.square().sum() for a, b in ((error, merged - W), (update, W - W0), (norm, W0)))
        print(f"{dtype}: ‖ΔW‖ is {100 * (update / norm) ** 0.5:.2f} % of ‖W0‖; {100 * lost / changed:.1f} % of the "
              f"{changed:,} changed weights are lost; the error is {100 * (error / update) ** 0.5:.1f} % of ‖ΔW‖")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(run_command(main, sys.argv[1:]))
