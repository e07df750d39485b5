"""Write files completely or not at all; check their kind, format and content when they are read."""

import hashlib
import os
import secrets
from collections import OrderedDict
from pathlib import Path

import torch

from .errors import InputError, MissingFile

FORMAT = 3   # of files written by `save`


def write_whole(path, write):
    """Call write(file) on a temporary binary file in the same folder, flush it to the disk, then rename it to `path`.

    After a crash, a full disk or a kill at any moment, `path` holds what it held before. A file object in place of the
    path is written directly. Raises OSError as it comes.
    """
    if hasattr(path, "write"):
        return write(path)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # not tempfile.mkstemp, whose files only their owner may read; cut, because a file name has at most 255 bytes
    temporary = path.with_name(f"{path.name[:40]}.{secrets.token_hex(4)}.tmp")
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
    """Write `text` as UTF-8 with \\n line ends, completely or not at all."""
    write_whole(path, lambda file: file.write(text.encode("utf-8")))


def sha256_of(*values):
    """SHA-256, in hex, of tensors, plain values, and dicts and lists of them. It tells which data a result was made
    with, and whether a file still holds what was written. Raises InputError for a value that no file could hold."""
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
    elif value is None or type(value) in (bool, int, float, str):   # no subclass, which torch.load would reject
        kind = repr(value)
    else:
        raise InputError(f"a file holds tensors and plain values, not a {type(value).__name__}: {one_line(value)}")
    digest.update(f"{kind}\n".encode("utf-8"))


def plain(value):
    """A value in the form in which a file can hold it: NumPy's scalars and arrays become Python's, also inside dicts
    and lists. All else is returned as it is."""
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") and not isinstance(value, torch.Tensor) else value


def save(path, kind, content):
    """Save a dict of tensors and plain values, its kind ("adapter", "model", or "run" for a checkpoint) and a SHA-256
    of all of it. path: a path or a binary file object. Raises InputError for a value that could not be read again."""
    header = {"kind": f"svmini {kind}", "format": FORMAT, "sha256": sha256_of(content)}
    write_whole(path, lambda file: torch.save(header | {"content": content}, file))


def load(path, kind):
    """Load the dict that save(path, kind, ...) wrote, on the CPU. path: a path or a binary file object.

    Raises MissingFile, or InputError if the file is damaged, was changed, or is of another kind or format.
    """
    if not hasattr(path, "read") and not Path(path).is_file():
        raise MissingFile(f"there is no {kind} at {path}")
    try:
        file = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:   # unpickling fails in many ways; each means that this is not such a file
        raise InputError(f"{path} is not a readable svmini {kind}: it is damaged, cut short or another kind of "
                         f"file ({one_line(error).split('. ')[0]})") from None
    return check(file, kind, path)


def check(file, kind, path):
    """Return the content of what torch.load returned for a file of `save`. Raises the InputErrors of `load`."""
    found = one_line(file.get("kind", "something else") if isinstance(file, dict) else "something else")
    if found != f"svmini {kind}":
        raise InputError(f"{path} holds an {found}, not an svmini {kind}" if found.startswith("svmini ")
                         else f"{path} holds {found}, not an svmini {kind}")
    if file.get("format") != FORMAT:
        raise InputError(f"{path} has format {file.get('format')}, but this svmini reads format {FORMAT}: write it "
                         "again, or use the svmini that wrote it")
    if file.get("sha256") != sha256_of(file.get("content")):
        raise InputError(f"{path} is damaged: its SHA-256 is not that of its content")
    return file["content"]


def one_line(error):
    """The message of an exception, or its class if it has none, in one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__
