#!/usr/bin/env bash
# Arithmetic from a base model that was pretrained for 1,500 steps with weight decay 0.1: one base model, three seeds.
# Arguments are appended to every training command: with --steps 2 this is a smoke test.
set -euo pipefail
export OMP_NUM_THREADS=1
OUT=${OUT:-out/reproduce}
python train_gpt.py pretrain --data arithmetic --steps 1500 --weight-decay 0.1 --out $OUT/base-arithmetic-wd "$@"
while read -r lr methods; do
    python train_gpt.py --init $OUT/base-arithmetic-wd/pretrain/model.pt --data arithmetic --seeds 3 --lr $lr \
        --out $OUT/arithmetic-wd-$lr "$@" --methods $methods < /dev/null
done <<END
0.004 full
0.08 svfit svft:pattern=plain
0.04 svft:off_diagonals=2 svft:off_diagonals=8
0.02 lora:rank=1 dora:rank=8
0.01 lora:rank=2 lora:rank=8
0.1 vera:rank=256
END
