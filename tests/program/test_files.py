"""The writer of files: whatever happens while one is written, the former one stays whole and nothing is left over."""

import errno
import hashlib
import os
import stat
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import torch

from svmini import files
from svmini.errors import InputError, MissingFile


def fail(*arguments, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


def write_part(file):
    """Half a file, then the disk is full."""
    file.write(b"half")
    fail()


def interrupted(file):
    file.write(b"half")
    raise KeyboardInterrupt


def names(folder):
    return sorted(p.name for p in folder.iterdir())


# ---------------------------------------------------------------- whole or not at all


@pytest.mark.parametrize("point", ["write", "fsync", "replace", "interrupt"])
@pytest.mark.parametrize("before", [b"the former content", None], ids=["replaced", "new"])
def test_a_crash_leaves_the_former_file(tmp_path, monkeypatch, point, before):
    path = tmp_path / "result.json"
    if before is not None:
        path.write_bytes(before)
    write = {"write": write_part, "interrupt": interrupted}.get(point, lambda file: file.write(b"new content"))
    if point in ("fsync", "replace"):
        monkeypatch.setattr(os, point, fail)
    with pytest.raises(KeyboardInterrupt if point == "interrupt" else OSError):
        files.write_whole(path, write)
    monkeypatch.undo()
    assert names(tmp_path) == ([] if before is None else ["result.json"])
    assert before is None or path.read_bytes() == before
    files.write_whole(path, lambda file: file.write(b"new content"))
    assert path.read_bytes() == b"new content" and names(tmp_path) == ["result.json"]


def test_the_order_of_flush_and_rename(tmp_path, monkeypatch):
    """The bytes must be on the disk before the name is: a power cut between the two must not leave an empty file."""
    seen, fsync, replace = [], os.fsync, os.replace

    def spy_fsync(number):
        seen.append(("fsync", os.fstat(number).st_size))
        fsync(number)

    def spy_replace(source, target):
        seen.append(("replace", os.path.getsize(source)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
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


def test_folders_of_any_name_are_made(tmp_path):
    path = tmp_path / "a b" / "ünïcödé 奇異値" / "é ß.pt"
    files.save(path, "run", {"x": torch.ones(2), "name": "größe"})
    assert files.load(path, "run")["name"] == "größe"
    files.write_text(path.with_name("Σ.txt"), "→ Σ\nb\n")
    assert path.with_name("Σ.txt").read_bytes() == "→ Σ\nb\n".encode("utf-8")   # unix line ends everywhere


# ---------------------------------------------------------------- told apart and checked when read


def test_kinds_are_told_apart(tmp_path):
    files.save(tmp_path / "file.pt", "run", {"x": 1})
    with pytest.raises(InputError, match="file.pt holds svmini run, not an svmini model"):
        files.load(tmp_path / "file.pt", "model")


def test_what_is_no_svmini_file(tmp_path):
    path = tmp_path / "file.pt"
    for content in ({"weight": torch.ones(2)}, [1, 2], None, {"kind": torch.zeros(3, 3)}):
        torch.save(content, path)
        with pytest.raises(InputError, match="not an svmini model") as caught:
            files.load(path, "model")
        assert "\n" not in str(caught.value)
    for content in (b"", b"a text file\n", bytes(1000)):
        path.write_bytes(content)
        with pytest.raises(InputError, match="not a readable svmini model") as caught:
            files.load(path, "model")
        assert "\n" not in str(caught.value)
    for missing in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(MissingFile, match="there is no model at"):
            files.load(missing, "model")


def test_code_in_a_file_is_not_run(tmp_path):
    """A pickle can call any function when it is read; ours must not."""
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made by the file"),)

    torch.save({"kind": "svmini model", "format": files.FORMAT, "x": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match="not a readable svmini model"):
        files.load(tmp_path / "evil.pt", "model")
    assert names(tmp_path) == ["evil.pt"]


@pytest.mark.parametrize("share", [0.3, 0.99])
def test_truncated_files_are_refused(tmp_path, share):
    path = tmp_path / "last.pt"
    files.save(path, "run", {"x": torch.arange(5000)})
    whole = path.read_bytes()
    path.write_bytes(whole[:int(share * len(whole))])
    with pytest.raises(InputError, match="cut short"):
        files.load(path, "run")


def test_another_format_is_refused(tmp_path):
    torch.save({"kind": "svmini adapter", "format": 1, "content": {}, "sha256": files.sha256_of({})}, tmp_path / "x.pt")
    with pytest.raises(InputError, match=f"x.pt has format 1; this svmini reads format {files.FORMAT}"):
        files.load(tmp_path / "x.pt", "adapter")


def test_a_changed_file_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    for change in (lambda f: f["content"]["x"].add_(1), lambda f: f["content"].update(step=2),
                   lambda f: f.pop("sha256"), lambda f: f["content"].pop("step"), lambda f: f.update(content=None)):
        files.save(path, "run", {"x": torch.ones(3), "step": 1})
        file = torch.load(path, weights_only=True)
        change(file)
        torch.save(file, path)
        with pytest.raises(InputError, match="x.pt is damaged: its SHA-256"):
            files.load(path, "run")


def test_the_checksum_tells_all_that_a_file_can_hold_apart():
    a = torch.arange(4)
    different = [a, a + 1, a.float(), a[:3], a[None], [a], [[a]], (a, 1), {"a": a}, {"b": a}, {"a": a, "b": 1},
                 {"b": 1, "a": a}, torch.zeros(0), torch.zeros(0, 2), None, True, 1, 1.0, "1", "", [], {}, "None",
                 [1, 23], [12, 3], [[1], 23], -0.0, 0.0, float("nan")]
    sums = [files.sha256_of(value) for value in different]
    assert len(set(sums)) == len(sums) and all(len(s) == 64 for s in sums)
    assert files.sha256_of(a, a) != files.sha256_of(a) == files.sha256_of(torch.arange(6)[:4])   # a slice is its own
    assert files.sha256_of(a.view(2, 2).t()) == files.sha256_of(torch.tensor([[0, 2], [1, 3]]))
    assert files.sha256_of(OrderedDict(a=[1, 2])) == files.sha256_of({"a": (1, 2)})   # who reads it may get the other
    # it is written into results and files: another version must not change it in silence
    expected = hashlib.sha256(b"\0\1\2\3torch.uint8 (4,)\n").hexdigest()
    assert files.sha256_of(a.to(torch.uint8)) == expected


@pytest.mark.parametrize("value", (np.float64(1), np.ones(2), {1}, torch.float32,
                                   defaultdict(int)), ids=str)
def test_what_could_not_be_read_again_is_not_written(tmp_path, value):
    with pytest.raises(InputError, match="tensors and plain values"):
        files.save(tmp_path / "x.pt", "run", {"deep": [{"x": value}]})
    assert names(tmp_path) == []
