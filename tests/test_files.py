"""The atomic writer: whatever happens while a file is written, the former one stays whole and nothing is left over."""

import errno
import os
import stat

import pytest
import torch

from svmini import files


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


@pytest.mark.parametrize("point", ["open", "write", "fsync", "replace", "interrupt"])
@pytest.mark.parametrize("before", [b"the former content", None], ids=["replaced", "new"])
def test_a_crash_leaves_the_former_file(tmp_path, monkeypatch, point, before):
    path = tmp_path / "result.json"
    if before is not None:
        path.write_bytes(before)
    write = {"write": write_part, "interrupt": interrupted}.get(point, lambda file: file.write(b"new content"))
    if point in ("fsync", "replace"):
        monkeypatch.setattr(os, point, fail)
    if point == "open":
        monkeypatch.setattr("builtins.open", fail)
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


@pytest.mark.parametrize("crash", ["fsync", "replace"])
def test_a_checkpoint_survives_a_crash_of_the_next(tmp_path, monkeypatch, crash):
    path = tmp_path / "last.pt"
    files.save(path, "run", {"step": 1, "x": torch.arange(1000)})
    monkeypatch.setattr(os, crash, fail)
    with pytest.raises(OSError):
        files.save(path, "run", {"step": 2, "x": torch.zeros(1000)})
    content = files.load(path, "run")
    assert content["step"] == 1 and torch.equal(content["x"], torch.arange(1000)) and names(tmp_path) == ["last.pt"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_is_an_oserror(tmp_path):
    """torch.save into a full disk must come out as what write_whole promises."""
    with pytest.raises(OSError), open("/dev/full", "wb") as full:
        torch.save({"x": torch.zeros(100_000)}, full)


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_mode_follows_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        files.write_text(tmp_path / "x", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o666 & ~umask


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path):
    path = tmp_path / "x"
    files.write_text(path, "old")
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError):
            files.write_text(path, "new")
    finally:
        tmp_path.chmod(0o700)
    assert path.read_text() == "old" and names(tmp_path) == ["x"]


@pytest.mark.parametrize("folder", ["with spaces in it", "ünïcödé 奇異値", "a/b/c"])
def test_folders_of_any_name_are_made(tmp_path, folder):
    path = tmp_path / folder / "é ß.pt"
    files.save(path, "run", {"x": torch.ones(2), "name": "größe"})
    assert files.load(path, "run")["name"] == "größe"
    files.write_text(tmp_path / folder / "Σ.txt", "→ Σ\n")
    assert (tmp_path / folder / "Σ.txt").read_bytes() == "→ Σ\n".encode("utf-8")


def test_text_keeps_unix_line_ends(tmp_path):
    files.write_text(tmp_path / "x", "a\nb\n")
    assert (tmp_path / "x").read_bytes() == b"a\nb\n"


def test_files_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files.write_text("plain.txt", "x")
    assert names(tmp_path) == ["plain.txt"]


@pytest.mark.parametrize("saved, wanted", [("model", "adapter"), ("run", "model"), ("adapter", "run")])
def test_kinds_are_told_apart(tmp_path, saved, wanted):
    path = tmp_path / "file.pt"
    files.save(path, saved, {"x": 1})
    with pytest.raises(ValueError) as caught:
        files.load(path, wanted)
    for word in (str(path), f"svmini {saved}", f"svmini {wanted}"):
        assert word in str(caught.value)


def test_what_is_no_svmini_file(tmp_path):
    path = tmp_path / "file.pt"
    for content in ({"weight": torch.ones(2)}, [1, 2], torch.ones(3)):
        torch.save(content, path)
        with pytest.raises(ValueError, match="not an svmini model"):
            files.load(path, "model")
    for content in (b"", b"a text file\n", "Größe\n".encode("utf-16"), bytes(1000)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a readable svmini model") as caught:
            files.load(path, "model")
        assert "\n" not in str(caught.value)
    for missing in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no model at"):
            files.load(missing, "model")


def test_code_in_a_file_is_not_run(tmp_path):
    """A pickle can call any function when it is read; ours must not."""
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made by the file"),)

    torch.save({"kind": "svmini model", "format": 1, "x": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="not a readable svmini model"):
        files.load(tmp_path / "evil.pt", "model")
    assert names(tmp_path) == ["evil.pt"]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.99])
def test_truncated_files_are_refused(tmp_path, share):
    path = tmp_path / "last.pt"
    files.save(path, "run", {"x": torch.arange(5000)})
    whole = path.read_bytes()
    path.write_bytes(whole[:int(share * len(whole))])
    with pytest.raises(ValueError, match="cut short"):
        files.load(path, "run")


def test_a_later_format_is_refused(tmp_path):
    torch.save({"kind": "svmini adapter", "format": 2}, tmp_path / "later.pt")
    with pytest.raises(ValueError, match="format 2.*newer svmini"):
        files.load(tmp_path / "later.pt", "adapter")


def test_the_checksum_sees_values_and_is_fixed():
    a, b = torch.arange(4), torch.ones(2)
    assert files.sha256_of(a, b) != files.sha256_of(a, b + 1)
    # SHA-256 of the bytes 0, 1, 2, from the standard: sha256(b"\x00\x01\x02")
    expected = "ae4b3280e56e2faf83f414a6e3dabe9d5fbe18976544c05fed121accb85b53fc"
    assert files.sha256_of(torch.arange(3, dtype=torch.uint8)) == expected
    assert files.sha256_of(torch.arange(6, dtype=torch.uint8)[:3]) == expected, "a slice is its own numbers only"
