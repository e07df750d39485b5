#!/usr/bin/env bash
# The learning-rate sweeps of docs/data/lr_sweeps.csv: five learning rates per method, a factor of 2 apart, centered on
# the one in svmini/training/learning_rates.py. If the best one was at the edge, the grid in the CSV file was extended
# by hand. Each sweep uses one base model and seed 0, except for bands on arithmetic, which use seeds 0, 1 and 2.
# MNIST and FashionMNIST are in DATA_DIR (data). The real ViT needs WEIGHTS and IMAGES, as in real_vit.sh, and is
# skipped without them. Arguments are appended to every training command: with --steps 2 this is a smoke test.
set -euo pipefail
export OMP_NUM_THREADS=1
OUT=${OUT:-out/reproduce}
DATA_DIR=${DATA_DIR:-data}
BANDED="svft:off_diagonals=2 svft:off_diagonals=8"
CONTROL="svft:pattern=plain,basis=random svft:off_diagonals=2,basis=random svft:off_diagonals=8,basis=random
    random_mask:off_diagonals=0 random_mask:off_diagonals=2 random_mask:off_diagonals=8
    svft:rank=32,off_diagonals=8 svft:rank=32,off_diagonals=8,basis=random"
OTHERS="lora:rank=1 lora:rank=2 lora:rank=8 dora:rank=8 vera:rank=256"

python train_vit.py pretrain --out $OUT/base-glyphs-0 "$@"
python train_vit.py --init $OUT/base-glyphs-0/pretrain/model.pt --lr-sweep 5 --out $OUT/sweep-glyphs "$@" \
    --methods head full svft:pattern=plain $BANDED $CONTROL $OTHERS boft:block_size=4,factors=2 \
    boft:block_size=2,factors=1 svft:pattern=random,off_diagonals=0 svft:off_diagonals=32 lora:rank=32 vera:rank=16 \
    svfit:rank=8 svfit:rank=32 svft:rank=64,off_diagonals=5 svft:rank=32,off_diagonals=12 \
    svft:rank=25,off_diagonals=24 \
    svft:pattern=plain@query,key,value,out svft:off_diagonals=2@query,key,value,out \
    svft:pattern=random,off_diagonals=2@query,key,value,out svft:pattern=topk,off_diagonals=2@query,key,value,out \
    svft:off_diagonals=2@query,value svft:off_diagonals=2@query,key,value svft:off_diagonals=2@up,down

while read -r rank band; do
    python docs/lab/truncate.py $OUT/base-glyphs-0/pretrain/model.pt $rank $OUT/base-glyphs-0/rank-$rank.pt
    python train_vit.py --init $OUT/base-glyphs-0/rank-$rank.pt --lr-sweep 5 --out $OUT/sweep-rank-$rank "$@" \
        --methods svft:rank=$rank,off_diagonals=$band < /dev/null
done <<END
64 5
32 12
25 24
END

for steps in 125 500 2000; do
    python train_vit.py pretrain --steps $steps --out $OUT/base-glyphs-$steps-0 "$@"
    python train_vit.py --init $OUT/base-glyphs-$steps-0/pretrain/model.pt --lr-sweep 5 \
        --out $OUT/sweep-$steps-steps "$@" --methods head full svft:pattern=plain svft:off_diagonals=2 lora:rank=8
done

for pair in "mnist fashionmnist" "fashionmnist mnist"; do
    read -r from to <<< "$pair"
    python train_vit.py pretrain --data $from --data-dir "$DATA_DIR" --out $OUT/base-$from-0 "$@"
    python train_vit.py --init $OUT/base-$from-0/pretrain/model.pt --data $to --data-dir "$DATA_DIR" \
        --val-per-class 50 --lr-sweep 5 --out $OUT/sweep-$to "$@" --methods head svft:pattern=plain $BANDED $CONTROL
done

python train_gpt.py pretrain --out $OUT/base-text-0 "$@"
python train_gpt.py --init $OUT/base-text-0/pretrain/model.pt --lr-sweep 5 --out $OUT/sweep-text "$@" \
    --methods full svft:pattern=plain $BANDED $CONTROL $OTHERS

base=$OUT/base-arithmetic-0/pretrain/model.pt
python train_gpt.py pretrain --data arithmetic --out $OUT/base-arithmetic-0 "$@"
python train_gpt.py --init $base --data arithmetic --lr-sweep 5 --out $OUT/sweep-arithmetic "$@" \
    --methods full svft:pattern=plain $OTHERS svft:rank=32,off_diagonals=8 svft:rank=32,off_diagonals=8,basis=random \
    svft:pattern=plain,basis=random svft:pattern=random,off_diagonals=0 random_mask:off_diagonals=0
for s in 0 1 2; do   # their mean chooses
    python train_gpt.py --init $base --data arithmetic --seed $s --lr-sweep 5 --out $OUT/sweep-arithmetic-$s "$@" \
        --methods $BANDED svft:off_diagonals=2,basis=random svft:off_diagonals=8,basis=random \
        random_mask:off_diagonals=2 random_mask:off_diagonals=8
done

if [ -n "${WEIGHTS:-}" ] && [ -n "${IMAGES:-}" ]; then
    FLAGS="--init $WEIGHTS --n-head 6 --image-size 98 --data folder:$IMAGES --val-per-class 20 --batch-size 8"
    python train_vit.py $FLAGS --per-class 10 --steps 80 --lr-sweep 5 --out $OUT/sweep-real-vit-8 "$@" \
        --methods head full svft:pattern=plain $BANDED lora:rank=1 lora:rank=8 dora:rank=8 vera:rank=256
    python train_vit.py $FLAGS --per-class 50 --steps 200 --lr-sweep 5 --out $OUT/sweep-real-vit-40 "$@" \
        --methods svft:pattern=plain svft:off_diagonals=2 svft:pattern=plain,basis=random \
        svft:off_diagonals=2,basis=random \
        svft:pattern=random,off_diagonals=0 random_mask:off_diagonals=0 random_mask:off_diagonals=2 \
        svft:rank=96,off_diagonals=8 svft:rank=96,off_diagonals=8,basis=random
fi
