"""The parameter counts that the papers print, computed by the formulas from shapes, and counts of real modules."""

import csv
import re
from decimal import ROUND_DOWN, ROUND_HALF_UP, ROUND_UP, Decimal
from pathlib import Path

import pytest
import torch

from layers import layer_of
from svmini import GPT, METHODS, GPTConfig, ViT, ViTConfig, count_trainable
from svmini.methods import parse_spec


def table(name):
    with open(Path(__file__).with_name(name), encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


MODELS = {row["model"]: row for row in table("shapes.csv")}
ROWS = table("reported_counts.csv")


def shapes_of(row):
    """Return (d_out, d_in) of every matrix that the row adapts."""
    model = {k: int(v) for k, v in MODELS[row["model"]].items() if k not in ("model", "gated")}
    hidden, mlp = model["hidden"], model["mlp"]
    shape = {"q": (model["q_out"], hidden), "k": (model["kv_out"], hidden), "v": (model["kv_out"], hidden),
             "o": (hidden, model["q_out"]), "u": (mlp, hidden), "d": (hidden, mlp), "g": (mlp, hidden)}
    assert MODELS[row["model"]]["gated"] == "yes" or "g" not in row["adapted"]
    return [shape[letter] for letter in row["adapted"]] * model["layers"]


def computed(row):
    options = row["options"].replace("d=", "off_diagonals=").replace("block=", "block_size=").replace(" ", ",")
    method, options, _ = parse_spec(f"{row['method']}:{options}")
    return sum(METHODS[method].count(*shape, **options) for shape in shapes_of(row))


# two printed cells are neither rounded nor truncated but rounded up: 18.432K as 18.5K, and 0.2949M as 0.30M
ROUNDED_UP = {("ViT-B/16", "svft", "pattern=plain"), ("ViT-L/16", "boft", "block=4 factors=4")}


def agrees(number, printed, ways=(ROUND_HALF_UP, ROUND_DOWN)):
    """Return True if `printed` ("0.28M", "24.6K") is the number, rounded or truncated to the printed digits."""
    digits, unit = re.fullmatch(r"([0-9.]+)([KM])", printed).groups()
    exact = Decimal(number) / {"K": 10 ** 3, "M": 10 ** 6}[unit]
    return Decimal(digits) in {exact.quantize(Decimal(digits), way) for way in ways}


def test_agrees_accepts_rounding_and_truncation_only():
    assert agrees(165888, "0.16M") and agrees(165888, "0.17M") and agrees(24576, "24.6K") and agrees(24576, "24.5K")
    assert not agrees(165888, "0.18M") and not agrees(165888, "0.15M") and not agrees(1433600, "0.43M")
    assert not agrees(24576, "24.6M") and agrees(24450, "24.5K") and not agrees(24449, "24.5K")


def test_no_row_is_missing():
    follows = [row["follows"] for row in ROWS]
    assert len(follows) == 61 and follows.count("yes") == 57 and follows.count("") == 0


@pytest.mark.parametrize("method", sorted({row["method"] for row in ROWS}))
def test_reported_counts(method):
    for row in ROWS:
        if row["method"] == method:
            number, reported = computed(row), row["reported"]
            assert number == int(row["computed"]), row
            if reported == "16 times fewer than LoRA r=8":
                assert 16 * number == sum(METHODS["lora"].count(*shape, rank=8) for shape in shapes_of(row))
            elif (row["model"], method, row["options"]) in ROUNDED_UP:
                assert agrees(number, reported, [ROUND_UP]) and not agrees(number, reported), row
            else:
                assert agrees(number, reported) == (row["follows"] == "yes"), row


def test_why_four_printed_counts_do_not_follow():
    by = {(r["model"], r["method"], r["options"]): r for r in ROWS if r["follows"] != "yes"}
    boft = by["ViT-B/16", "boft", "block=2 factors=2"]    # b * b entries per block; b(b - 1)/2 are free
    assert agrees(computed(boft) * 4, boft["reported"])
    lora = by["Gemma-7B", "lora", "rank=1"]
    assert lora["reported"] == [r for r in ROWS if r["model"] == "Gemma-2B" and r["options"] == "rank=1"
                                and r["method"] == "lora"][0]["reported"]
    vera = by["Gemma-7B", "vera", "rank=1024"]
    assert agrees(computed(vera), "1" + vera["reported"].removeprefix("0"))
    assert agrees(computed(by["LLaMA-3-8B", "svft", "pattern=plain"]), "0.52M")


# (d_out, d_in), computed by hand from the formulas: D(2d + 1) - d(d + 1), with D = r if there is a rank, and so on
COUNTED = [("svft:off_diagonals=0", (16, 64), 16), ("svft:off_diagonals=15", (16, 16), 256),
           ("svft:pattern=random,off_diagonals=4", (64, 16), 124), ("svft:rank=8,off_diagonals=7", (32, 48), 64),
           ("svft:rank=8,pattern=plain", (32, 48), 8), ("svft:rank=8,basis=random", (32, 48), 8 * 5 - 6),
           ("random_mask:off_diagonals=2", (32, 48), 32 * 5 - 6), ("svfit:rank=1", (16, 64), 1),
           ("svfit:", (64, 16), 16), ("lora:rank=16", (16, 64), 16 * 80), ("dora:rank=16", (32, 48), 16 * 80 + 32),
           ("vera:rank=1", (64, 16), 65), ("vera:rank=256", (16, 64), 272),
           ("boft:block_size=8,factors=2", (16, 64), 448)]


@pytest.mark.parametrize("spec, shape, number", COUNTED)
def test_real_modules(spec, shape, number):
    method, options, _ = parse_spec(spec)
    layer = layer_of(spec, shape, moved=False)
    assert METHODS[method].count(*shape, **options) == sum(p.numel() for p in layer.parameters()) == number


def test_an_energy_has_no_count_without_weights():
    with pytest.raises(ValueError, match="depends on the weights"):
        METHODS["svfit"].count(16, 16, energy=0.9)


def test_gpt2_and_vit_b_16():
    with torch.device("meta"):
        gpt = GPT(GPTConfig(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, d_model=768))
        vit = ViT(ViTConfig(image_size=224, patch_size=16, in_channels=3, num_classes=1000,
                            n_layer=12, n_head=12, d_model=768))
    for model, number in ((gpt, 124_439_808), (vit, 86_567_656)):
        assert count_trainable(model)["total"] == sum(p.numel() for p in model.parameters()) == number
    assert count_trainable(vit)["head"] == 768 * 1000 + 1000 and count_trainable(gpt)["head"] == 0
