#!/usr/bin/env bash
# Glyph base models pretrained for 125 to 2,000 steps: three base models of each length, three seeds each.
# Arguments are appended to every training command: with --steps 2 this is a smoke test.
set -euo pipefail
export OMP_NUM_THREADS=1
OUT=${OUT:-out/reproduce}
while read -r steps head full plain banded lora; do   # the learning rates that sweeps found for each length
    for s in 0 1 2; do
        base=$OUT/base-glyphs-$steps-$s
        python train_vit.py pretrain --seed $s --steps $steps --out $base "$@" < /dev/null
        for pair in "head $head" "full $full" "svft:pattern=plain $plain" "svft:off_diagonals=2 $banded" \
                    "lora:rank=8 $lora"; do
            read -r method lr <<< "$pair"
            python train_vit.py --init $base/pretrain/model.pt --seeds 3 --lr $lr --out $base/${method//[:=]/-} "$@" \
                --methods $method < /dev/null
        done
    done
done <<END
125 0.08 0.001 0.12 0.05 0.005
500 0.16 0.001 0.12 0.025 0.005
1600 0.16 0.0005 0.12 0.025 0.005
2000 0.08 0.0005 0.06 0.025 0.005
END
