#!/usr/bin/env bash
# How far fine-tuning moves a weight: ‖ΔW‖ / ‖W0‖ on glyphs, text, arithmetic and the real ViT, seed 0.
# The last part needs WEIGHTS and IMAGES, as in real_vit.sh, and is skipped without them.
# Arguments are appended to every training command: with --steps 2 this is a smoke test.
set -euo pipefail
export OMP_NUM_THREADS=1
OUT=${OUT:-out/reproduce}
METHODS="full svft:pattern=plain svft:pattern=plain,basis=random svft:off_diagonals=2 svft:off_diagonals=2,basis=random
    random_mask:off_diagonals=2"
python train_vit.py pretrain --out $OUT/base-glyphs-0 "$@"
python train_vit.py --init $OUT/base-glyphs-0/pretrain/model.pt --out $OUT/change-glyphs "$@" --methods $METHODS
python docs/reproduce/weight_changes.py --init $OUT/base-glyphs-0/pretrain/model.pt $OUT/change-glyphs/runs/*
python train_gpt.py pretrain --out $OUT/base-text-0 "$@"
python train_gpt.py --init $OUT/base-text-0/pretrain/model.pt --out $OUT/change-text "$@" --methods $METHODS
python docs/reproduce/weight_changes.py --init $OUT/base-text-0/pretrain/model.pt $OUT/change-text/runs/*
for s in 0 1 2; do
    base=$OUT/base-arithmetic-$s/pretrain/model.pt
    python train_gpt.py pretrain --data arithmetic --seed $s --out $OUT/base-arithmetic-$s "$@"
    python train_gpt.py --init $base --data arithmetic --out $OUT/change-arithmetic-$s "$@" --methods $METHODS
    python docs/reproduce/weight_changes.py --init $base $OUT/change-arithmetic-$s/runs/*
done
if [ -n "${WEIGHTS:-}" ] && [ -n "${IMAGES:-}" ]; then
    FLAGS="--init $WEIGHTS --n-head 6 --image-size 98 --data folder:$IMAGES --val-per-class 20 --batch-size 8"
    python train_vit.py $FLAGS --per-class 10 --steps 80 --out $OUT/change-real-vit-8 "$@" --methods svft:pattern=plain
    while read -r lr methods; do
        python train_vit.py $FLAGS --per-class 50 --steps 200 --lr $lr --out $OUT/change-real-vit-$lr "$@" \
            --methods $methods < /dev/null
    done <<END
0.0025 svft:pattern=plain
0.005 svft:pattern=plain,basis=random
0.0005 svft:off_diagonals=2
0.001 svft:off_diagonals=2,basis=random random_mask:off_diagonals=2
END
    python docs/reproduce/weight_changes.py --init $WEIGHTS --n-head 6 $OUT/change-real-vit-*/runs/*
fi
