"""Tuned learning rates, {dataset: {method spec: learning rate}}, found by `--lr-sweep` on validation data.

docs/data/lr_sweeps.csv has the score of every learning rate, and evidence_sweeps.csv those over three base models, which
take precedence. "published" is for base models with published weights.
A spec that is missing here starts at its method's own `lr`.
"""

VIT_LEARNING_RATES = {   # by target dataset; a dataset that is missing takes the learning rates of glyphs
    "glyphs": {
        "head": 8e-2, "full": 5e-4, "svfit": 1.2e-1, "svft:pattern=plain": 1.2e-1, "svft:off_diagonals=2": 2.5e-2,
        "svft:off_diagonals=8": 1e-2, "lora:rank=1": 1e-2, "lora:rank=2": 1e-2, "lora:rank=8": 5e-3,
        "dora:rank=8": 5e-3, "vera:rank=256": 5e-2, "svft:rank=32,off_diagonals=8": 1e-2,
        "svft:pattern=plain,basis=random": 8e-2, "svft:off_diagonals=2,basis=random": 2e-2,
        "svft:off_diagonals=8,basis=random": 1e-2, "svft:rank=32,off_diagonals=8,basis=random": 4e-2,
        "random_mask:off_diagonals=0": 8e-2, "random_mask:off_diagonals=2": 4e-2, "random_mask:off_diagonals=8": 1e-2,
        "boft:block_size=4,factors=2": 2e-2, "boft:block_size=2,factors=1": 8e-2, "svft:off_diagonals=32": 2.5e-3,
        "lora:rank=32": 2.5e-3, "vera:rank=16": 5e-2, "svfit:rank=8": 3e-2, "svfit:rank=32": 6e-2,
        "svft:pattern=random,off_diagonals=0": 6e-2, "svft:pattern=random,off_diagonals=8": 1e-2,
        "svft:rank=64,off_diagonals=5": 2e-2, "svft:rank=32,off_diagonals=12": 1e-2,
        "svft:rank=25,off_diagonals=24": 5e-3, "svft:pattern=plain@query,key,value,out": 4e-2,
        "svft:off_diagonals=2@query,key,value,out": 4e-2, "svft:pattern=random@query,key,value,out": 2e-2,
        "svft:pattern=topk@query,key,value,out": 4e-2, "svft:off_diagonals=2@query,value": 4e-2,
        "svft:off_diagonals=2@query,key,value": 4e-2, "svft:off_diagonals=2@up,down": 4e-2},
    "fashionmnist": {
        "head": 6.4e-1, "svfit": 6e-2, "svft:pattern=plain": 6e-2, "svft:off_diagonals=2": 5e-2,
        "svft:pattern=plain,basis=random": 8e-2, "svft:off_diagonals=2,basis=random": 4e-2,
        "random_mask:off_diagonals=0": 4e-2, "random_mask:off_diagonals=2": 4e-2, "random_mask:off_diagonals=8": 5e-3,
        "svft:rank=32,off_diagonals=8,basis=random": 2e-2},
    "mnist": {
        "head": 3.2e-1, "svft:off_diagonals=8": 2e-2, "svft:off_diagonals=8,basis=random": 2e-2,
        "random_mask:off_diagonals=0": 1.6e-1, "random_mask:off_diagonals=2": 2e-2, "random_mask:off_diagonals=8": 5e-3,
        "svft:rank=32,off_diagonals=8": 2e-2},
    # swept on a DINOv2 ViT-S/14 with 8 images per class (docs/results.md), except for lora:rank=2 and boft
    "published": {
        "head": 2e-2, "full": 5e-6, "svfit": 1e-2, "svft:pattern=plain": 1e-2, "svft:off_diagonals=2": 2e-3,
        "svft:off_diagonals=8": 5e-4, "lora:rank=1": 2e-3, "lora:rank=2": 2e-3, "lora:rank=8": 1e-3,
        "dora:rank=8": 2e-3, "vera:rank=256": 1e-2, "boft:block_size=4,factors=2": 4e-3},
}

GPT_LEARNING_RATES = {   # by kind of data; question-answer pairs take the learning rates of text
    "text": {
        "full": 4e-3, "svfit": 3.2e-1, "svft:pattern=plain": 3.2e-1, "svft:off_diagonals=2": 8e-2,
        "svft:off_diagonals=8": 4e-2, "lora:rank=1": 4e-2, "lora:rank=2": 2e-2, "lora:rank=8": 2e-2,
        "dora:rank=8": 2e-2, "vera:rank=256": 1e-1, "svft:pattern=plain,basis=random": 3.2e-1,
        "svft:off_diagonals=2,basis=random": 8e-2, "svft:off_diagonals=8,basis=random": 4e-2,
        "svft:rank=32,off_diagonals=8": 4e-2, "svft:rank=32,off_diagonals=8,basis=random": 8e-2,
        "random_mask:off_diagonals=0": 1.6e-1, "random_mask:off_diagonals=2": 8e-2,
        "random_mask:off_diagonals=8": 4e-2},
    "arithmetic": {
        "full": 4e-3, "svfit": 1.6e-1, "svft:pattern=plain": 1.6e-1, "svft:off_diagonals=2": 4e-2,
        "svft:off_diagonals=8": 2e-2, "svft:pattern=plain,basis=random": 1.6e-1,
        "svft:off_diagonals=2,basis=random": 8e-2, "svft:off_diagonals=8,basis=random": 2e-2,
        "svft:off_diagonals=8,basis=random_U": 2e-2, "svft:off_diagonals=8,basis=random_V": 2e-2,
        "svft:pattern=random,off_diagonals=0": 1.6e-1, "svft:pattern=random,off_diagonals=8": 2e-2,
        "random_mask:off_diagonals=0": 1.6e-1, "random_mask:off_diagonals=2": 4e-2, "random_mask:off_diagonals=8": 2e-2,
        "svft:rank=32,off_diagonals=8": 2e-2, "svft:rank=32,off_diagonals=8,basis=random": 4e-2,
        "lora:rank=1": 1e-2, "lora:rank=2": 1e-2, "lora:rank=8": 5e-3, "dora:rank=8": 1e-2, "vera:rank=256": 5e-2},
    # not swept: those of svft come from its authors' scripts for Gemma-2B, the others are common first tries
    "published": {
        "full": 5e-5, "svfit": 5e-2, "svft:pattern=plain": 5e-2, "svft:off_diagonals=2": 5e-3,
        "svft:off_diagonals=8": 5e-3, "lora:rank=1": 5e-4, "lora:rank=2": 5e-4, "lora:rank=8": 5e-4,
        "dora:rank=8": 5e-4, "vera:rank=256": 2e-2},
}
