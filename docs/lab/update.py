"""python docs/lab/update.py BASE TUNED: is full fine-tuning's update a band in the singular basis? (exercises 8 and 9)

BASE, TUNED: the model.pt of a base, and the one that a run of `full`, or svmini.export, made of it. A row a kind of
layer, means over the blocks. uniform: the share of ΔW = W − W0 in the band if ΔW knew nothing of the basis: its places
over all of W's. size: ‖ΔW‖ / ‖W0‖.  rank of ΔW: singular values above what float32 rounds away, as svmini.analyze
counts.  two largest: their share of Σ σ_i² of ΔW. Needs your band_share.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))   # svmini, from wherever this is called

import torch
from exercises import ToDo, band_share

from svmini.cli import run_command
from svmini.model_file import class_of, load_base

BANDS = (0, 2, 8)
ROUNDING = 4 * torch.finfo(torch.float32).eps


def main(base, tuned):
    kind = class_of(base)
    before, after = (load_base(path, kind)[0].double().state_dict() for path in (base, tuned))
    print(f"{'layer':<8}{'shape':>12}" + "".join(f"{f'd = {d}':>9}{'uniform':>9}" for d in BANDS)
          + "    size   rank of ΔW   two largest")
    for target in kind.targets:
        names = [name for name in before if name.endswith(f".{target}.weight")]
        (d_out, d_in), D = before[names[0]].shape, min(before[names[0]].shape)
        cells = ""
        for d in BANDS:
            share = sum(band_share(before[n], after[n], d) for n in names) / len(names)
            places = sum(abs(i - j) <= d for i in range(D) for j in range(D))
            cells += f"{share:9.3f}{places / (d_out * d_in):9.4f}"
        size, rank, two = torch.tensor([change_of(before[n], after[n]) for n in names]).mean(dim=0).tolist()
        print(f"{target:<8}{f'{d_out} x {d_in}':>12}{cells}{size:8.2f}{f'{rank:.0f} of {D}':>13}{two:14.2f}")


def change_of(W0, W):
    """(‖ΔW‖ / ‖W0‖, rank of ΔW, share of its two largest singular values in Σ σ_i²)"""
    S = torch.linalg.svdvals(W - W0)
    return S.norm() / W0.norm(), (S > ROUNDING * W0.norm()).sum(), S[:2].square().sum() / S.square().sum()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        sys.exit(run_command(lambda argv: main(*argv), sys.argv[1:]))
    except ToDo:
        sys.exit("first solve exercise 8: band_share")
