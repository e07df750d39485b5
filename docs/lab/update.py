"""python docs/lab/update.py BASE TUNED: compare two model files in the singular basis of the first (exercises 8 and 9).

BASE: the base model.  TUNED: the model.pt of a run of `full`, or what svmini.export wrote for an adapter. Prints a row
per kind of layer, with means over the blocks, for the update ΔW = W − W0:
    d = 0, 2, 8    your band_share: the share of ‖ΔW‖² in a band of the singular basis of W0
    uniform        that share if ΔW were spread evenly over all entries
    leading        that share if each row and column of C = Uᵀ ΔW V kept its norm, and C had no other structure
    size           ‖ΔW‖ / ‖W0‖
    rank of ΔW     the number of singular values above float32 rounding
    two largest    the share of ‖ΔW‖² in the two largest singular values of ΔW
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))   # svmini, if it is not installed

import torch
from exercises import ToDo, band_share

from svmini.cli import run_command
from svmini.model_file import load_base

ROUNDING = 4 * torch.finfo(torch.float32).eps


def main(base, tuned):
    models = [load_base(path)[0].double() for path in (base, tuned)]
    before, after = (model.state_dict() for model in models)
    print("layer          shape" + "".join(f"   d = {d} uniform leading" for d in (0, 2, 8))
          + "    size  rank of ΔW  two largest")
    for target in models[0].targets:
        names = [name for name in before if name.endswith(f".{target}.weight")]
        row = torch.tensor([update_of(before[name], after[name]) for name in names]).mean(dim=0).tolist()
        (d_out, d_in), D = before[names[0]].shape, min(before[names[0]].shape)
        print(f"{target:<8}{f'{d_out} x {d_in}':>12}" + "".join(f"{share:8.4f}" for share in row[:9])
              + f"{row[9]:8.2f}{f'{row[10]:.0f} of {D}':>12}{row[11]:13.2f}")


def update_of(W0, W):
    """Return the columns of the table for one weight."""
    U, _, Vt = torch.linalg.svd(W0, full_matrices=False)
    energy = (U.t() @ (W - W0) @ Vt.t()).square()                                       # (D, D)
    expected = torch.outer(energy.sum(dim=1), energy.sum(dim=0)) / energy.sum()
    shares, i = [], torch.arange(len(energy))
    for d in (0, 2, 8):
        band = (i[:, None] - i).abs() <= d
        shares += [band_share(W0, W, d), band.sum() / W0.numel(), expected[band].sum() / (W - W0).square().sum()]
    S = torch.linalg.svdvals(W - W0)
    rank, two = (S > ROUNDING * W0.norm()).sum(), S[:2].square().sum() / S.square().sum()
    return *shares, S.norm() / W0.norm(), rank, two


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        sys.exit(run_command(lambda argv: main(*argv), sys.argv[1:]))
    except ToDo:
        sys.exit("solve exercise 8 first: band_share")
