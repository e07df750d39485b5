#!/usr/bin/env bash
# Patterns of M at equal parameter count, on the square matrices of the glyph model: three base models, three seeds
# each.
# Arguments are appended to every training command: with --steps 2 this is a smoke test.
set -euo pipefail
export OMP_NUM_THREADS=1
OUT=${OUT:-out/reproduce}
for s in 0 1 2; do
    python train_vit.py pretrain --seed $s --out $OUT/base-glyphs-$s "$@"
    python train_vit.py --init $OUT/base-glyphs-$s/pretrain/model.pt --seeds 3 --out $OUT/pattern-$s "$@" \
        --methods svft:pattern=plain@query,key,value,out svft:off_diagonals=2@query,key,value,out \
        svft:pattern=random,off_diagonals=2@query,key,value,out svft:pattern=topk,off_diagonals=2@query,key,value,out
done
python -m svmini.aggregate $OUT/pattern-?/results.json --baseline svft:off_diagonals=2@query,key,value,out
