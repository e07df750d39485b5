"""Files that appear whole or not at all, and that are told apart and checked when read."""

import hashlib
import os
import secrets
from collections import OrderedDict
from pathlib import Path

import torch

from .errors import InputError, MissingFile

FORMAT = 3   # of the files that `save` writes


def write_whole(path, write):
    """Call write(binary file) on a temporary file beside `path`, flush it to the disk, then rename it to `path`.

    A crash, a full disk or a kill at any moment leaves what stood at `path` before. Raises OSError as it comes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # not tempfile.mkstemp, whose files only their owner may read
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path, text):
    """Write `text` as UTF-8 with \\n line ends, whole or not at all."""
    write_whole(path, lambda file: file.write(text.encode("utf-8")))


def sha256_of(*values):
    """SHA-256, in hex, of tensors, plain values, and dicts and lists of them: which data a result was made with, and
    whether a file still holds what was written. Raises InputError for anything else, which no file of ours could hold.
    """
    digest = hashlib.sha256()
    for value in values:
        _feed(digest, value)
    return digest.hexdigest()


def _feed(digest, value):
    if isinstance(value, torch.Tensor):
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        kind = f"{value.dtype} {tuple(value.shape)}"
    elif type(value) in (dict, OrderedDict, list, tuple):
        for part in [x for item in value.items() for x in item] if isinstance(value, dict) else value:
            _feed(digest, part)
        kind = f"{'dict' if isinstance(value, dict) else 'list'} {len(value)}"
    elif value is None or type(value) in (bool, int, float, str):   # no subclass, such as numpy's: it would not be read
        kind = repr(value)
    else:
        raise InputError(f"a file holds tensors and plain values, not a {type(value).__name__}: {one_line(value)}")
    digest.update(f"{kind}\n".encode("utf-8"))


def save(path, kind, content):
    """Save a dict of tensors and plain values under a name for its kind (adapter, model, or run, a checkpoint), with a
    SHA-256 of all of it. Raises InputError for a value that could not be read again."""
    head = {"kind": f"svmini {kind}", "format": FORMAT, "sha256": sha256_of(content)}
    write_whole(path, lambda file: torch.save(head | {"content": content}, file))


def load(path, kind):
    """The dict that save(path, kind, ...) wrote, on the CPU.

    Raises MissingFile, or InputError where the file is damaged, was changed, or is of another kind or format.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFile(f"there is no {kind} at {path}")
    try:
        file = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:   # unpickling fails in many ways; each means that this is not such a file
        raise InputError(f"{path} is not a readable svmini {kind}: it is damaged, cut short or another kind of "
                         f"file ({one_line(error).split('. ')[0]})") from None
    found = one_line(file.get("kind", "something else") if isinstance(file, dict) else "something else")
    if found != f"svmini {kind}":
        raise InputError(f"{path} holds {found}, not an svmini {kind}")
    if file.get("format") != FORMAT:
        raise InputError(f"{path} has format {file.get('format')}; this svmini reads format {FORMAT}: "
                         "make it again, or use the svmini that wrote it")
    if not isinstance(file.get("content"), dict) or file.get("sha256") != sha256_of(file["content"]):
        raise InputError(f"{path} is damaged: its SHA-256 is not that of its content")
    return file["content"]


def one_line(error):
    """An exception's message, or its class where it has none, in a line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__
