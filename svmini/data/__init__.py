"""Datasets and their tasks: ImageClassification, LanguageModeling, Arithmetic and QuestionAnswering.

A task is a small class with everything that training needs to know about data:

    name, metric, higher_is_better     metric: "accuracy" or "exact match" in percent, "loss" in nats
    data_config                        plain values that determine a result on the data side
    batch(size, seed, step) -> x, y    training examples on the device; a function of (data, seed, step)
    loss(model, x, y) -> scalar        mean over the targets; targets equal to IGNORE_INDEX do not count
    evaluate(model, split)             {"loss": float or None, "metric": float} on "val" or "test"
    show(model)                        a list of samples of what the model does, for a reader
"""

import hashlib
import unicodedata
import urllib.request
from http.client import HTTPException

import torch

from ..errors import MissingFile
from ..files import one_line, write_whole

IGNORE_INDEX = -100   # cross_entropy skips targets with this value (its default ignore_index)


def pick(n, size, g):
    """Draw `size` of the indices 0 to n - 1 with the generator g, without repetition unless size is larger than n."""
    return torch.randperm(n, generator=g)[:size] if size <= n else torch.randint(n, (size,), generator=g)


def to_device(x, device):
    """Copy a tensor to the device. The copy to a CUDA device does not wait for the kernels that are queued there."""
    if torch.device(device).type != "cuda" or x.is_cuda:
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)   # from pageable memory, CUDA may wait even if non_blocking


def normalize(text):
    """Return the text without differences that a reader hardly sees: runs of whitespace, and composed characters."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def download_once(path, url, sha256, alternative):
    """Download a file unless it exists, and return its path.

    Raises MissingFile, which suggests the alternative, if the download fails or its SHA-256 is not the expected one.
    """
    if path.is_file():
        return path
    try:
        content = urllib.request.urlopen(url, timeout=20).read()
        if hashlib.sha256(content).hexdigest() != sha256:   # for example a login page
            raise OSError("the server sent a different file")
        write_whole(path, lambda file: file.write(content))
    except (OSError, HTTPException) as error:
        raise MissingFile(f"{path} is missing and could not be downloaded from {url} ({one_line(error)}): "
                          f"copy the file there yourself, or use {alternative}") from None
    return path
