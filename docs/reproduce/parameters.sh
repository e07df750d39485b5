#!/usr/bin/env bash
# Accuracy against trainable parameters on glyphs: three base models, three seeds each. Writes curves.png.
# Arguments are appended to every training command: with --steps 2 this is a smoke test.
set -euo pipefail
export OMP_NUM_THREADS=1
OUT=${OUT:-out/reproduce}
for s in 0 1 2; do
    python train_vit.py pretrain --seed $s --out $OUT/base-glyphs-$s "$@"
    python train_vit.py --init $OUT/base-glyphs-$s/pretrain/model.pt --seeds 3 --out $OUT/parameters-$s "$@" \
        --methods head full svfit:rank=8 svfit:rank=32 svft:pattern=plain svft:off_diagonals=2 svft:off_diagonals=8 \
        svft:off_diagonals=32 lora:rank=1 lora:rank=2 lora:rank=8 lora:rank=32 vera:rank=16 vera:rank=256
done
python -m svmini.aggregate $OUT/parameters-?/results.json --baseline lora:rank=8 --plot $OUT/curves.png
