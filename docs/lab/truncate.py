"""python docs/lab/truncate.py BASE RANK OUT: write a base model whose adapted weights keep RANK singular values.

On it, svft:rank=RANK is U_r (Σ_r + M) V_rᵀ, as in the SVFT paper's study of truncation, which drops the residual.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))   # svmini, if it is not installed

from svmini.adapting import find_linears
from svmini.cli import run_command
from svmini.methods.svd import thin_svd
from svmini.model_file import load_base, save_model


def main(base, rank, out):
    model, metadata = load_base(base)
    for linear in find_linears(model, model.targets, model.also_train).values():
        U, S, Vt = thin_svd(linear.weight)
        linear.weight.data = U[:, :rank] * S[:rank] @ Vt[:rank]
    save_model(out, model, metadata)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    sys.exit(run_command(lambda argv: main(argv[0], int(argv[1]), argv[2]), sys.argv[1:]))
