"""Every count that the papers print, by the formulas; the same formulas against real modules."""

import csv
import re
from decimal import ROUND_DOWN, ROUND_HALF_UP, ROUND_UP, Decimal
from pathlib import Path

import pytest
import torch
import torch.nn as nn

from conftest import cases, parse
from svmini import GPT, METHODS, GPTConfig, ViT, ViTConfig, adapt, count_trainable


def table(name):
    with open(Path(__file__).with_name(name), encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


MODELS = {row["model"]: row for row in table("shapes.csv")}
ROWS = table("reported_counts.csv")


def options_of(row):
    """The table's option words in svmini's names."""
    words = row["options"].replace("d=", "off_diagonals=").replace("block=", "block_size=")
    return parse(",".join(words.split()))


def shapes_of(row):
    """(d_out, d_in) of every matrix that the row adapts."""
    model = {k: int(v) for k, v in MODELS[row["model"]].items() if k not in ("model", "gated")}
    hidden, mlp = model["hidden"], model["mlp"]
    shape = {"q": (model["q_out"], hidden), "k": (model["kv_out"], hidden), "v": (model["kv_out"], hidden),
             "o": (hidden, model["q_out"]), "u": (mlp, hidden), "d": (hidden, mlp), "g": (mlp, hidden)}
    assert MODELS[row["model"]]["gated"] == "yes" or "g" not in row["adapted"]
    return [shape[letter] for letter in row["adapted"]] * model["layers"]


def computed(row):
    return sum(METHODS[row["method"]].count(*shape, **options_of(row)) for shape in shapes_of(row))


# two printed cells are neither rounded nor cut off: they are the next digit up, 18.432K as 18.5K and 0.2949M as 0.30M
ROUNDED_UP = {("ViT-B/16", "svft", "pattern=plain"), ("ViT-L/16", "boft", "block=4 factors=4")}


def agrees(number, printed, ways=(ROUND_HALF_UP, ROUND_DOWN)):
    """Whether `printed` ("0.28M", "24.6K") is the number, rounded or cut off after the digits that are printed."""
    digits, unit = re.fullmatch(r"([0-9.]+)([KM])", printed).groups()
    exact = Decimal(number) / {"K": 10 ** 3, "M": 10 ** 6}[unit]
    return Decimal(digits) in {exact.quantize(Decimal(digits), way) for way in ways}


def test_agrees_is_neither_blind_nor_loose():
    assert agrees(165888, "0.16M") and agrees(165888, "0.17M") and agrees(24576, "24.6K") and agrees(24576, "24.5K")
    assert not agrees(165888, "0.18M") and not agrees(165888, "0.15M") and not agrees(1433600, "0.43M")
    assert not agrees(24576, "24.6M") and agrees(24450, "24.5K") and not agrees(24449, "24.5K")


def test_no_row_is_missing():
    follows = [row["follows"] for row in ROWS]
    assert len(follows) == 61 and follows.count("yes") == 57
    assert sum(word.startswith("no: ") for word in follows) == 4
    assert {row["method"] for row in ROWS} >= {"svfit", "svft", "lora", "dora", "vera", "boft"}


@pytest.mark.parametrize("row", ROWS, ids=lambda r: f"{r['model']}-{r['method']}-{r['options']}-{r['adapted']}")
def test_reported(row):
    number = computed(row)
    assert number == int(row["computed"])
    if row["reported"] == "16 times fewer than LoRA r=8":
        assert 16 * number == sum(METHODS["lora"].count(*shape, rank=8) for shape in shapes_of(row))
    elif (row["model"], row["method"], row["options"]) in ROUNDED_UP:
        assert agrees(number, row["reported"], [ROUND_UP]) and not agrees(number, row["reported"])
        assert row["follows"] == "yes"
    else:
        assert agrees(number, row["reported"]) == (row["follows"] == "yes")


def test_why_four_do_not_follow():
    by = {(r["model"], r["method"], r["options"]): r for r in ROWS if r["follows"] != "yes"}
    boft = by["ViT-B/16", "boft", "block=2 factors=2"]                  # b * b numbers a block, b(b - 1)/2 are free
    assert agrees(computed(boft) * 4, boft["reported"])
    lora = by["Gemma-7B", "lora", "rank=1"]
    assert lora["reported"] == [r for r in ROWS if r["model"] == "Gemma-2B" and r["options"] == "rank=1"
                                and r["method"] == "lora"][0]["reported"]
    vera = by["Gemma-7B", "vera", "rank=1024"]
    assert agrees(computed(vera), "1" + vera["reported"].removeprefix("0"))
    assert agrees(computed(by["LLaMA-3-8B", "svft", "pattern=plain"]), "0.52M")


@pytest.mark.parametrize("method, example", cases() + [
    ("svft", "off_diagonals=0"), ("svft", "off_diagonals=15"), ("svft", "pattern=random,off_diagonals=4"),
    ("boft", "block_size=4,factors=3"), ("boft", "block_size=8,factors=2"), ("boft", "block_size=16,factors=1"),
    ("dora", "rank=16"), ("vera", "rank=1"), ("svfit", "rank=1")])
def test_real_modules(method, example):
    options = parse(example)
    for d_out, d_in in ((16, 16), (16, 64), (64, 16), (32, 48)):
        if options.get("pattern") == "topk" and d_out != d_in:
            continue
        torch.manual_seed(0)
        layer = METHODS[method](nn.Linear(d_in, d_out), **options)
        resolved = layer.options if "energy" in options else options    # the rank that holds the energy
        trained = sum(p.numel() for p in layer.parameters())
        assert trained == METHODS[method].count(d_out, d_in, **resolved) > 0


def test_energy_is_not_counted_without_weights():
    with pytest.raises(ValueError, match="hangs on the weights"):
        METHODS["svfit"].count(16, 16, energy=0.9)


def test_whole_models():
    """GPT-2 and ViT-B/16, on shapes alone."""
    with torch.device("meta"):
        gpt = GPT(GPTConfig(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, d_model=768))
        vit = ViT(ViTConfig(image_size=224, patch_size=16, in_channels=3, num_classes=1000,
                            n_layer=12, n_head=12, d_model=768))
    for model, number in ((gpt, 124_439_808), (vit, 86_567_656)):
        assert count_trainable(model)["total"] == sum(p.numel() for p in model.parameters()) == number
    assert count_trainable(vit)["head"] == 768 * 1000 + 1000 and count_trainable(gpt)["head"] == 0


def test_a_whole_adapted_model():
    """The printed sum for ViT-B/16, band of 2, at a twelfth of the width, 64: six matrices a block."""
    vit = ViT(ViTConfig(image_size=8, patch_size=4, in_channels=1, num_classes=3, n_layer=12, n_head=2, d_model=64))
    adapt(vit, "svft", off_diagonals=2)
    assert count_trainable(vit)["adapter"] == 12 * 6 * (64 * 5 - 6)
