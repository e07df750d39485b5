#!/usr/bin/env bash
# Three studies on glyphs, on three base models with three seeds each: accuracy against trainable parameters (draws
# parameters.png), which matrices are adapted, and the patterns of M on the square matrices.
# Arguments are appended to every training command: with --steps 2 this is a smoke test.
set -euo pipefail
export OMP_NUM_THREADS=1
OUT=${OUT:-out/reproduce}
SQUARE=@query,key,value,out
while read -r study baseline methods; do
    for s in 0 1 2; do
        base=$OUT/base-glyphs-$s/pretrain/model.pt
        [ -f $base ] || python train_vit.py pretrain --seed $s --out $OUT/base-glyphs-$s "$@" < /dev/null
        python train_vit.py --init $base --seeds 3 --out $OUT/$study-$s "$@" --methods $methods < /dev/null
    done
    python -m svmini.aggregate $OUT/$study-?/results.json --baseline $baseline --plot $OUT/$study.png
done <<END
parameters lora:rank=8 head full svfit:rank=8 svfit:rank=32 svft:pattern=plain svft:off_diagonals=2 svft:off_diagonals=8 \
svft:off_diagonals=32 lora:rank=1 lora:rank=2 lora:rank=8 lora:rank=32 vera:rank=16 vera:rank=256
matrices svft:off_diagonals=2 svft:off_diagonals=2@query,value svft:off_diagonals=2@query,key,value \
svft:off_diagonals=2$SQUARE svft:off_diagonals=2@up,down svft:off_diagonals=2
pattern svft:off_diagonals=2$SQUARE svft:pattern=plain$SQUARE svft:off_diagonals=2$SQUARE \
svft:pattern=random,off_diagonals=2$SQUARE svft:pattern=topk,off_diagonals=2$SQUARE
END
