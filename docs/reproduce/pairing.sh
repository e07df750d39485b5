#!/usr/bin/env bash
# The diagonal of M, as many random positions, and the random basis, on glyphs and arithmetic: three base models, three
# seeds each.
# Arguments are appended to every training command: with --steps 2 this is a smoke test.
set -euo pipefail
export OMP_NUM_THREADS=1
OUT=${OUT:-out/reproduce}
METHODS="svft:pattern=plain svft:pattern=random,off_diagonals=0 svft:pattern=plain,basis=random"
for s in 0 1 2; do
    python train_vit.py pretrain --seed $s --out $OUT/base-glyphs-$s "$@"
    python train_vit.py --init $OUT/base-glyphs-$s/pretrain/model.pt --seeds 3 --out $OUT/pairing-glyphs-$s "$@" \
        --methods $METHODS
    python train_gpt.py pretrain --data arithmetic --seed $s --out $OUT/base-arithmetic-$s "$@"
    python train_gpt.py --init $OUT/base-arithmetic-$s/pretrain/model.pt --data arithmetic --seeds 3 \
        --out $OUT/pairing-arithmetic-$s "$@" --methods $METHODS
done
for task in glyphs arithmetic; do
    python -m svmini.aggregate $OUT/pairing-$task-?/results.json --baseline svft:pattern=random,off_diagonals=0
done
