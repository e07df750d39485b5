#!/usr/bin/env bash
# Singular vectors, random basis and random mask on glyphs, FashionMNIST and MNIST: three base models, three seeds each.
# torchvision downloads MNIST and FashionMNIST to DATA_DIR (data) unless they are there.
# Arguments are appended to every training command: with --steps 2 this is a smoke test.
set -euo pipefail
export OMP_NUM_THREADS=1
OUT=${OUT:-out/reproduce}
DATA_DIR=${DATA_DIR:-data}
METHODS="svft:pattern=plain svft:off_diagonals=2 svft:off_diagonals=8 svft:rank=32,off_diagonals=8
    svft:pattern=plain,basis=random svft:off_diagonals=2,basis=random svft:off_diagonals=8,basis=random
    svft:rank=32,off_diagonals=8,basis=random random_mask:off_diagonals=0 random_mask:off_diagonals=2
    random_mask:off_diagonals=8"
for s in 0 1 2; do
    python train_vit.py pretrain --seed $s --out $OUT/base-glyphs-$s "$@"
    python train_vit.py --init $OUT/base-glyphs-$s/pretrain/model.pt --seeds 3 --out $OUT/control-glyphs-$s "$@" \
        --methods head full $METHODS
done
for pair in "mnist fashionmnist" "fashionmnist mnist"; do
    read -r from to <<< "$pair"
    for s in 0 1 2; do
        python train_vit.py pretrain --data $from --data-dir "$DATA_DIR" --seed $s --out $OUT/base-$from-$s "$@"
        python train_vit.py --init $OUT/base-$from-$s/pretrain/model.pt --data $to --data-dir "$DATA_DIR" \
            --val-per-class 50 --seeds 3 --out $OUT/control-$to-$s "$@" --methods head $METHODS
    done
done
for task in glyphs fashionmnist mnist; do
    for m in svft:pattern=plain svft:off_diagonals=2 svft:off_diagonals=8 svft:rank=32,off_diagonals=8; do
        python -m svmini.aggregate $OUT/control-$task-?/results.json --baseline $m
    done
done
