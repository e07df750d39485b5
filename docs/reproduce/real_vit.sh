#!/usr/bin/env bash
# A pretrained DINOv2 ViT-S/14 on 3,000 images of CIFAR-10, with 8 and with 40 training images per class, three draws
# each.
# svmini ships neither. WEIGHTS is the file of weights, IMAGES a folder with train and test, and class folders in each.
# Arguments are appended to every training command: with --steps 2 this is a smoke test.
set -euo pipefail
export OMP_NUM_THREADS=1
OUT=${OUT:-out/reproduce}
WEIGHTS=${WEIGHTS:-dinov2_vits14.pt}
IMAGES=${IMAGES:-data/cifar10_3000}
FLAGS="--init $WEIGHTS --n-head 6 --image-size 98 --data folder:$IMAGES --val-per-class 20 --batch-size 8"
SVFT="svft:pattern=plain svft:off_diagonals=2"
python train_vit.py $FLAGS --per-class 10 --steps 80 --seeds 3 --out $OUT/real-vit-8 "$@" \
    --methods head full svfit $SVFT svft:off_diagonals=8 lora:rank=1 lora:rank=8 dora:rank=8 vera:rank=256
# the third draw with half of the learning rates
python train_vit.py $FLAGS --per-class 10 --steps 80 --seed 2 --lr 0.001 --out $OUT/real-vit-8-half "$@" \
    --methods svft:off_diagonals=2
python train_vit.py $FLAGS --per-class 10 --steps 80 --seed 2 --lr 0.005 --out $OUT/real-vit-8-half-plain "$@" \
    --methods svft:pattern=plain
python train_vit.py $FLAGS --per-class 50 --steps 200 --seeds 3 --out $OUT/real-vit-40-head "$@" --methods head
while read -r lr methods; do
    python train_vit.py $FLAGS --per-class 50 --steps 200 --seeds 3 --lr $lr --out $OUT/real-vit-40-$lr "$@" \
        --methods $methods < /dev/null
done <<END
0.0025 svft:pattern=plain random_mask:off_diagonals=0
0.005 svft:pattern=plain,basis=random
0.00125 svft:pattern=random,off_diagonals=0
0.0005 svft:off_diagonals=2 svft:rank=96,off_diagonals=8
0.001 svft:off_diagonals=2,basis=random svft:rank=96,off_diagonals=8,basis=random random_mask:off_diagonals=2
END
python -m svmini.bench --model vit_s_14 --rounds 2 --steps 1 --methods head full svfit $SVFT svft:off_diagonals=8 \
    lora:rank=1 lora:rank=8 dora:rank=8 vera:rank=256
