"""What a model learns from, each with its task: LanguageModeling, Arithmetic, QuestionAnswering, ImageClassification.

A task is a small class, and all that the training knows of data:

    name, metric, higher_is_better     "accuracy" and "exact match" in percent, "loss" in nats
    data_config                              plain values: all that decides a result on the data's side
    batch(size, seed, step) -> x, y    on the device; a function of (data, seed, step)
    loss(model, x, y) -> scalar        the mean over the targets; a target of IGNORE_INDEX has none
    evaluate(model, split)             {"loss": float or None, "metric": float} of "val" or "test"
    show(model)                        a list of something to show of a model for a reader
"""

import hashlib
import urllib.request
from http.client import HTTPException

import torch

from ..errors import MissingFile
from ..files import one_line, write_whole

IGNORE_INDEX = -100   # cross_entropy leaves out targets of this value (its ignore_index)


def pick(n, size, g):
    """`size` of the indices 0 to n - 1, drawn by the generator g; none comes twice, unless size is larger than n."""
    return torch.randperm(n, generator=g)[:size] if size <= n else torch.randint(n, (size,), generator=g)


def fetched(path, url, sha256, instead):
    """The path of a file, downloaded where it is missing. Raises MissingFile that says what to use `instead`."""
    if path.is_file():
        return path
    try:
        content = urllib.request.urlopen(url, timeout=20).read()
        if hashlib.sha256(content).hexdigest() != sha256:   # a login page, say
            raise OSError("what came is another file")
        write_whole(path, lambda file: file.write(content))
    except (OSError, HTTPException) as error:
        raise MissingFile(f"{path} is missing and could not be downloaded from {url} ({one_line(error)}): "
                          f"put it there by hand, or use {instead}") from None
    return path
