#!/usr/bin/env bash
# What a training step of each method costs: four blocks of GPT-2's width, 4 x 512 tokens, float32.
set -euo pipefail
OMP_NUM_THREADS=1 python -m svmini.bench --model gpt2 --layers 4 --rounds 3 --steps 1
