"""Options and specs that a method rejects, each with one line that gives the reason."""

import numpy
import pytest
import torch

from layers import adapter, layer_of, linear
from svmini import METHODS
from test_contract import adapted


TOO_LARGE = f"seed={2 ** 63}"
WRONG = {   # options that svmini's methods must reject, and a word of the reason
    "svfit": [("rank=0", "rank"), ("rank=17", "16"), ("rank=2.0", "integer"), ("rank=True", "rank"),
              ("energy=0", "energy"), ("energy=1.1", "energy"), ("energy=x", "energy"), ("rank=2,energy=0.5", "both")],
    "svft": [("pattern=dense", "pattern"), ("off_diagonals=16", "15"), ("off_diagonals=-1", "off_diagonals"),
             ("rank=17", "16"), ("rank=4,off_diagonals=4", "3"), ("basis=fourier", "basis"), ("seed=-1", "seed"),
             (TOO_LARGE, "seed"), ("off_diagonals=1.5", "integer"),
             ("pattern=plain,off_diagonals=-1", "off_diagonals")],
    "lora": [("rank=0", "rank"), ("rank=17", "16"), ("alpha=0", "alpha"), ("alpha=x", "alpha"), ("init=svd", "init"),
             ("alpha=1e999", "alpha"), (f"alpha={10 ** 400}", "alpha"), ("rank=4,alpha=8,init=pissa", "alpha")],
    "dora": [("rank=0", "rank"), ("rank=17", "16"), ("alpha=-1", "alpha"), ("detach_norm=1", "detach_norm")],
    "vera": [("rank=0", "rank"), ("seed=-1", "seed"), ("seed=1.5", "seed"), (TOO_LARGE, "seed"), ("d_init=0", "d_init"),
             ("d_init=x", "d_init"), ("d_init=1e-60", "d_init")],
    "boft": [("block_size=3", "even"), ("block_size=0", "block_size"), ("block_size=32", "16"),
             ("factors=0", "factors"), ("block_size=4,factors=4", "32")],
    "random_mask": [("off_diagonals=16", "15"), ("off_diagonals=-1", "off_diagonals"), ("seed=-1", "seed"),
                    (TOO_LARGE, "seed")],
}


@pytest.mark.parametrize("method", WRONG)
def test_wrong_options(method):
    """The class and adapt reject them before anything is built."""
    for listed, reason in WRONG[method]:
        spec = f"{method}:{listed}"
        for use in (adapter, lambda spec, base: adapted(spec, (16, 16), torch.float32)):
            with pytest.raises(ValueError, match=reason):
                use(spec, linear())
                pytest.fail(f"{spec} is accepted")


@pytest.mark.parametrize("spec", ("svft:pattern=random,", "svft:basis=random,", "vera:", "random_mask:"))
def test_the_largest_accepted_seed_works(spec):
    layer_of(f"{spec}seed={2 ** 63 - 1}")


@pytest.mark.parametrize("method, options", [
    ("lora", {"alpha": numpy.float64(16)}), ("lora", {"rank": numpy.int64(4)}),
    ("svft", {"pattern": numpy.str_("plain")}), ("dora", {"detach_norm": numpy.bool_(True)}),
    ("svfit", {"rank": torch.tensor(4)})], ids=str)
def test_an_option_is_a_plain_value(method, options):
    """An adapter file could not contain a numpy scalar: torch.load(weights_only=True) would reject it."""
    with pytest.raises(ValueError, match=f"{list(options)[0]} must be a plain Python value"):
        METHODS[method](linear(), **options)
