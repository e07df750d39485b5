"""The parameter counts that the papers print, computed by the formulas from shapes."""

import csv
import re
from decimal import ROUND_DOWN, ROUND_HALF_UP, ROUND_UP, Decimal
from pathlib import Path

import pytest

from svmini import METHODS
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


def test_an_energy_has_no_count_without_weights():
    with pytest.raises(ValueError, match="depends on the weights"):
        METHODS["svfit"].count(16, 16, energy=0.9)
