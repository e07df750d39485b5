"""Random generators for data: what is drawn depends on a key alone, not on what ran before."""

import hashlib

import torch


def generator(*key):
    """A torch.Generator on the CPU whose seed is a hash of the key, so that keys that differ give unrelated streams.

    A key begins with the purpose, then come the numbers that it depends on: generator("batch", seed, step). With
    that, batches are functions of (data, seed, step), and a resumed run meets the same ones.
    """
    digest = hashlib.blake2b("/".join(map(str, key)).encode("utf-8"), digest_size=7).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little"))
