#!/usr/bin/env bash
# Singular vectors, random basis and random mask on text and arithmetic: three base models, three seeds each.
# The runs on arithmetic include the table of all methods, and four methods after 900 instead of 300 steps.
# Arguments are appended to every training command: with --steps 2 this is a smoke test.
set -euo pipefail
export OMP_NUM_THREADS=1
OUT=${OUT:-out/reproduce}
METHODS="full svft:pattern=plain svft:off_diagonals=2 svft:off_diagonals=8 svft:rank=32,off_diagonals=8
    svft:pattern=plain,basis=random svft:off_diagonals=2,basis=random svft:off_diagonals=8,basis=random
    svft:rank=32,off_diagonals=8,basis=random random_mask:off_diagonals=0 random_mask:off_diagonals=2
    random_mask:off_diagonals=8"
for s in 0 1 2; do
    python train_gpt.py pretrain --seed $s --out $OUT/base-text-$s "$@"
    python train_gpt.py --init $OUT/base-text-$s/pretrain/model.pt --seeds 3 --out $OUT/control-text-$s "$@" \
        --methods $METHODS
    python train_gpt.py pretrain --data arithmetic --seed $s --out $OUT/base-arithmetic-$s "$@"
    python train_gpt.py --init $OUT/base-arithmetic-$s/pretrain/model.pt --data arithmetic --seeds 3 \
        --out $OUT/control-arithmetic-$s "$@" \
        --methods $METHODS lora:rank=1 lora:rank=2 lora:rank=8 dora:rank=8 vera:rank=256
    python train_gpt.py --init $OUT/base-arithmetic-$s/pretrain/model.pt --data arithmetic --steps 900 \
        --out $OUT/control-arithmetic-900-$s "$@" --methods svft:off_diagonals=2 svft:off_diagonals=8 \
        svft:off_diagonals=2,basis=random svft:off_diagonals=8,basis=random
    python train_gpt.py --init $OUT/base-arithmetic-$s/pretrain/model.pt --data arithmetic --seeds 3 --lr 0.04 \
        --out $OUT/control-arithmetic-lr-$s "$@" --methods svft:off_diagonals=8,basis=random
done
for task in text arithmetic; do
    for m in svft:pattern=plain svft:off_diagonals=2 svft:off_diagonals=8 svft:rank=32,off_diagonals=8; do
        python -m svmini.aggregate $OUT/control-$task-?/results.json --baseline $m
    done
done
python -m svmini.aggregate $OUT/control-arithmetic-?/results.json --baseline lora:rank=8
