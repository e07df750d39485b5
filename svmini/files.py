"""Files that appear whole or not at all, and that are told apart when read."""

import hashlib
import os
import secrets
from pathlib import Path

import torch


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


def sha256_of(*tensors):
    """SHA-256, in hex, of tensors' bytes: which data a result was made with."""
    digest = hashlib.sha256()
    for t in tensors:
        digest.update(t.detach().cpu().contiguous().numpy())
    return digest.hexdigest()


def save(path, kind, content):
    """Save a dict of tensors and plain values under a name for its kind (adapter, model, or run, a checkpoint)."""
    write_whole(path, lambda file: torch.save({"kind": f"svmini {kind}", "format": 1, **content}, file))


def load(path, kind):
    """The dict that save(path, kind, ...) wrote, on the CPU.

    Raises FileNotFoundError, or ValueError where the file is damaged, of another kind or of a later format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no {kind} at {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:   # unpickling fails in many ways; each means that this is not such a file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is not a readable svmini {kind}: it is damaged, cut short or another kind of "
                         f"file ({reason.split('. ')[0]})") from None
    found = content.get("kind") if isinstance(content, dict) else None
    if found != f"svmini {kind}":
        raise ValueError(f"{path} holds {f'an {found}' if found else 'something else'}, not an svmini {kind}")
    if content.get("format") != 1:
        raise ValueError(f"{path} has format {content.get('format')}; this svmini reads format 1: use a newer svmini")
    return content
