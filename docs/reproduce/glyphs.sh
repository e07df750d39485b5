#!/usr/bin/env bash
# Glyphs, one base model, three seeds: the table of docs/ablations.md that the default experiment prints.
# Arguments are appended to every training command: with --steps 2 this is a smoke test.
set -euo pipefail
export OMP_NUM_THREADS=1
OUT=${OUT:-out/reproduce}
python train_vit.py --seeds 3 --out $OUT/glyphs "$@"
python train_vit.py --init $OUT/glyphs/pretrain/model.pt --seeds 3 --out $OUT/glyphs-boft "$@" \
    --methods boft:block_size=4,factors=2 boft:block_size=2,factors=1
