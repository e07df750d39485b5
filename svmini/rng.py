"""Random generators for data: what is drawn depends on a key alone, not on what ran before."""

import hashlib

import torch


def generator(*key):
    """Return a CPU torch.Generator seeded with a hash of the key, so that different keys give unrelated streams.

    A key starts with its purpose, followed by the values that the draw depends on: generator("batch", seed, step). Each
    batch is then a function of (data, seed, step), and a resumed run draws the same batches.
    """
    digest = hashlib.blake2b("/".join(map(str, key)).encode("utf-8"), digest_size=7).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little"))
