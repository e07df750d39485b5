#!/usr/bin/env bash
# Text, one base model, three seeds: the table in docs/results.md.
# Arguments are appended to every training command: with --steps 2 this is a smoke test.
set -euo pipefail
export OMP_NUM_THREADS=1
OUT=${OUT:-out/reproduce}
python train_gpt.py --seeds 3 --out $OUT/text "$@"
