"""Files are written completely or not at all, and checked when they are read."""

import hashlib
import os
import stat
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import torch

from helpers import refused
from svmini import files
from svmini.errors import MissingFile


def names(folder):
    return sorted(p.name for p in folder.iterdir())


# ---------------------------------------------------------------- completely or not at all


@pytest.mark.parametrize("point", ["write", "fsync", "replace"])
def test_a_crash_leaves_the_former_file(tmp_path, monkeypatch, point):
    def fail(*arguments):
        raise KeyboardInterrupt

    (tmp_path / "old").write_bytes(b"the former content")
    if point != "write":
        monkeypatch.setattr(os, point, fail)
    for name in ("old", "new"):
        with pytest.raises(KeyboardInterrupt):
            files.write_whole(tmp_path / name, lambda file: file.write(b"half") and point == "write" and fail())
    assert names(tmp_path) == ["old"] and (tmp_path / "old").read_bytes() == b"the former content"


def test_the_bytes_are_on_the_disk_before_the_name(tmp_path, monkeypatch):
    """A power cut between the two must not leave an empty file."""
    seen, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: seen.append(("fsync", os.fstat(number).st_size)) or fsync(number))
    monkeypatch.setattr(os, "replace", lambda a, b: seen.append(("replace", os.path.getsize(a))) or replace(a, b))
    files.write_whole(tmp_path / "x", lambda file: file.write(b"12345"))
    assert seen == [("fsync", 5), ("replace", 5)]


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
def test_the_mode_follows_umask(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_text(tmp_path / "x", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


def test_any_name_that_the_system_allows_is_allowed(tmp_path):
    path = tmp_path / "a b" / "ünïcödé 奇異値" / ("é ß" + "x" * 249)           # 255 bytes
    files.save(path, "run", {"x": torch.ones(2), "name": "größe"})
    assert files.load(path, "run")["name"] == "größe"
    files.write_text(path.with_name("Σ.txt"), "→ Σ\nb\n")
    assert path.with_name("Σ.txt").read_bytes() == "→ Σ\nb\n".encode("utf-8")   # unix line ends everywhere


# ---------------------------------------------------------------- checked when they are read


def test_what_is_not_the_expected_file_is_rejected(tmp_path):
    path = tmp_path / "file.pt"
    files.save(path, "run", {"x": 1})
    with refused("file.pt holds an svmini run, not an svmini model"):
        files.load(path, "model")
    torch.save({"kind": "svmini adapter", "format": 1, "content": {}, "sha256": files.sha256_of({})}, path)
    with refused(f"file.pt has format 1, but this svmini reads format {files.FORMAT}"):
        files.load(path, "adapter")
    for content in ({"weight": torch.ones(2)}, [1, 2], {"kind": torch.zeros(3, 3)}):
        torch.save(content, path)
        with refused("file.pt holds ", "not an svmini model"):
            files.load(path, "model")
    files.save(path, "model", {"x": torch.arange(5000)})
    content = path.read_bytes()
    for content in (b"", b"a text file\n", content[:-9], content[:999] + content[1000:]):
        path.write_bytes(content)
        with refused("file.pt is not a readable svmini model"):
            files.load(path, "model")
    for missing in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(MissingFile, match="there is no model at"):
            files.load(missing, "model")


def test_code_in_a_file_is_not_run(tmp_path):
    """A pickle can call any function when it is read."""
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made by the file"),)

    torch.save({"kind": "svmini model", "format": files.FORMAT, "x": Evil()}, tmp_path / "evil.pt")
    with refused("not a readable svmini model"):
        files.load(tmp_path / "evil.pt", "model")
    assert names(tmp_path) == ["evil.pt"]


def test_a_changed_file_is_rejected(tmp_path):
    path = tmp_path / "x.pt"
    for change in (lambda f: f["content"]["x"].add_(1), lambda f: f["content"].update(step=2),
                   lambda f: f.pop("sha256"), lambda f: f["content"].pop("step")):
        files.save(path, "run", {"x": torch.ones(3), "step": 1})
        file = torch.load(path, weights_only=True)
        change(file)
        torch.save(file, path)
        with refused("x.pt is damaged: its SHA-256"):
            files.load(path, "run")


def test_the_checksum_differs_for_different_values():
    a = torch.arange(4)
    different = [a, a + 1, a.float(), a[:3], a[None], [a], [[a]], (a, 1), {"a": a}, {"b": a}, {"a": a, "b": 1},
                 {"b": 1, "a": a}, torch.zeros(0), torch.zeros(0, 2), None, True, 1, 1.0, "1", "", [], {}, "None",
                 [1, 23], [12, 3], [[1], 23], -0.0, 0.0, float("nan")]
    assert len(set(map(files.sha256_of, different))) == len(different)
    assert files.sha256_of(a, a) != files.sha256_of(a) == files.sha256_of(torch.arange(6)[:4])   # a slice, not its base
    assert files.sha256_of(a.view(2, 2).t()) == files.sha256_of(torch.tensor([[0, 2], [1, 3]]))
    assert files.sha256_of(OrderedDict(a=[1, 2])) == files.sha256_of({"a": (1, 2)})   # torch.load may return the other
    # it is written into results and files, so another version must not change it
    assert files.sha256_of(a.to(torch.uint8)) == hashlib.sha256(b"\0\1\2\3torch.uint8 (4,)\n").hexdigest()


def test_what_could_not_be_read_again_is_not_written(tmp_path):
    for value in (np.float64(1), np.ones(2), {1}, torch.float32, defaultdict(int)):
        with refused("tensors and plain values"):
            files.save(tmp_path / "x.pt", "run", {"deep": [{"x": value}]})
    assert names(tmp_path) == []
