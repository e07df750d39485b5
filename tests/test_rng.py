"""Generators: the key alone decides, on every machine and in every process."""

import torch

from svmini.rng import generator


def draw(*key):
    return torch.randint(2**62, (4,), generator=generator(*key)).tolist()


def test_the_key_alone_decides():
    before = torch.get_rng_state()
    assert generator("batch", 0, 7).initial_seed() == 26639363565562997   # in every process: results depend on it
    assert draw("batch", 0, 7) == draw("batch", 0, 7)
    keys = [("batch", 0, 7), ("batch", 7, 0), ("batch", 0, 8), ("batch", 1, 7), ("other", 0, 7), ("batch", 0)]
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)
    assert torch.equal(before, torch.get_rng_state()), "the global generator is left alone"
