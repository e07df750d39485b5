"""Bad input gives one line with what is wrong and what to do, exit code 2, and no files. Bugs keep their traceback."""

import argparse
import functools
import os
import sys
from pathlib import Path

import pytest
import torch

import train_gpt
import train_vit
from helpers import SIZES
from svmini import GPT, METHODS, GPTConfig, ViT, ViTConfig, cli, export, generate, predict
from svmini.data import glyphs, text
from svmini.data.arithmetic import Arithmetic
from svmini.errors import InputError, MissingFile
from svmini.methods import parse_spec, canonical_spec
from svmini.model_file import save_model
from svmini.training import compare, pretrain
from svmini.training.loop import Diverged, Stopped

TRAIN_BPE = functools.cache(train_gpt.train_bpe)
MAINS = {"gpt": train_gpt.main, "vit": train_vit.main} | {
    name: (lambda argv, tool=tool: cli.run_command(tool.command, argv))
    for name, tool in (("generate", generate), ("predict", predict), ("export", export))}


@pytest.fixture(scope="module")
def things(folder):
    """Add files of every kind that a user can give by mistake to the models; FILES in bad_commands.txt."""
    torch.manual_seed(0)
    save_model(folder / "nameless-vit.pt", ViT(ViTConfig(24, 6, 1, 34, **SIZES)), {})
    save_model(folder / "nameless.pt", GPT(GPTConfig(Arithmetic.vocab_size, Arithmetic.length, **SIZES)), {})
    (folder / "notes.pt").write_text("a text file\n", encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Use few images and a short library, and fail if training starts."""
    for which in "AB":
        monkeypatch.setitem(glyphs.GLYPHS[which], "sizes", {"train": 2, "val": 1, "test": 1})
    library = text.stdlib_source()[:30_000]
    monkeypatch.setattr(text, "stdlib_source", lambda: library)
    monkeypatch.setattr(train_gpt, "train_bpe", TRAIN_BPE)
    for module in (compare, pretrain):
        monkeypatch.setattr(module, "train", lambda *a, **k: pytest.fail("training started"))


def refused(main, argv, parts, folder, capsys):
    """Assert that main(argv) prints one line with all parts, returns 2 and makes no file."""
    def listing():
        return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    before = listing()
    assert main(argv) == 2, argv
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and error.endswith("\n"), error
    for part in parts:
        assert part in error, f"{argv}: {part!r} is not in {error!r}"
    assert listing() == before


def bad_commands():
    """Return {heading: [(arguments, parts of the message)]} of bad_commands.txt."""
    table = {}
    for line in Path(__file__).with_name("bad_commands.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            rows = table.setdefault(line.strip("[]"), [])
        elif line and not line.startswith("#"):
            argv, _, parts = line.partition(" -> ")
            rows.append((argv.split(), parts.split(" | ")))
    return table


@pytest.mark.parametrize("script", ["gpt", "vit"])
def test_a_bad_flag_is_refused_before_a_folder_is_made(script, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for argv, parts in bad_commands()["flags"]:
        refused(MAINS[script], argv, parts, tmp_path, capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", MAINS)
def test_bad_input_is_refused_before_training(name, things, tmp_path, capsys):
    before = {p: p.read_bytes() for p in things.glob("*.*")}
    for argv, parts in bad_commands()[name] + (bad_commands()["scripts"] if name in ("gpt", "vit") else []):
        argv = [part.replace("FILES", str(things)) for part in argv]
        argv += ["--device", "cpu"] if name != "export" else []
        argv += ["--out", str(tmp_path / "out")] if "--out" not in argv and name != "generate" else []
        refused(MAINS[name], argv, parts, tmp_path, capsys)
    assert {p: p.read_bytes() for p in things.glob("*.*")} == before


@pytest.mark.parametrize("script", ["gpt", "vit"])
def test_an_unusable_out_or_device_is_refused_at_the_start(script, tmp_path, capsys, monkeypatch):
    (tmp_path / "out").write_text("precious")
    refused(MAINS[script], ["--quick", "--out", str(tmp_path / "out")], ["out is a file", "folder"], tmp_path, capsys)
    refused(MAINS[script], ["--quick", "--out", str(tmp_path / "out" / "in")], ["out"], tmp_path, capsys)
    for device, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())):
        if not there:
            argv = ["--device", device, "--out", str(tmp_path / "new")]
            refused(MAINS[script], argv, [f"'{device}' is not available", "cpu"], tmp_path, capsys)
    monkeypatch.setattr(cli.tempfile, "TemporaryFile", lambda dir: os.open(f"{dir}/none/x", os.O_RDONLY))   # an OSError
    refused(MAINS[script], ["--out", str(tmp_path / "r")], [str(tmp_path / "r")], tmp_path, capsys)


def raises(error):
    def main(argv):
        raise error
    return main


def test_an_error_that_the_user_can_correct_is_one_line_and_a_code(capsys):
    for error, code in [
            (KeyboardInterrupt(), 130), (Stopped("go on by --resume"), 130), (Diverged("nan: try a lower --lr"), 1),
            (OSError(28, "disk full"), 2), (InputError("two\nlines"), 2), (MissingFile("gone"), 2), (MemoryError(), 2),
            (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 2),
            (RuntimeError("Storage size calculation overflowed with sizes=[2, 4611686018427387904]"), 2),
            (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), 2)]:
        assert cli.run_command(raises(error), []) == code, error
        assert capsys.readouterr().err.count("\n") == 1, error


def test_a_name_that_is_not_utf_8_is_refused(tmp_path, capsys):
    parts = ["'file:\\udcff.txt' is not valid UTF-8", "PYTHONUTF8=1"]
    for flag in ("--data", "--base-data", "--init"):
        refused(train_gpt.main, [flag, "file:\udcff.txt", "--out", str(tmp_path / "x")], parts, tmp_path, capsys)


def test_a_closed_stderr_does_not_stop_a_run(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert cli.run_command(lambda argv: sys.stderr.write("progress") and 0) == 0


def test_a_bug_keeps_its_traceback():
    for error in (ValueError("ours"), TypeError("ours"), KeyError("ours"), AssertionError(),
                  RuntimeError("a tensor whose data is not allocated yet")):
        with pytest.raises(type(error)):
            cli.run_command(raises(error), [])
    assert cli.run_command(lambda argv: None, []) == 0 == cli.run_command(lambda argv: 0, [])


@pytest.mark.parametrize("command, parts", [
    ("gpt", ["full, head", *METHODS, "--resume", "--lr-sweep", "--block-size", "topics"]), ("gpt pretrain", []),
    ("vit", ["full, head", *METHODS, "--head-lr", "--image-size", "glyphs"]), ("vit pretrain", []),
    ("generate", ["--top-k"]), ("predict", ["--data-dir"]), ("export", ["torchvision"])])
def test_help_has_a_text_for_every_flag_and_its_default(command, parts, capsys):
    name, *argv = command.split()
    with pytest.raises(SystemExit) as caught:
        MAINS[name]([*argv, "--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0 and all(part in out for part in parts)
    flags = [line for line in out.splitlines() if line.startswith("  --")]
    assert flags and all(len(line.split("  ")) > 2 for line in flags), "on the same line"
    if name in ("gpt", "vit"):
        for line in out.partition("options:")[2].partition("\n\n")[0].split("\n  -")[2:]:   # without -h
            assert "(default: " in " ".join(line.split()) and line.rstrip().endswith(")"), line


# ---- argparse types and method specs ----

def test_names_and_paths_are_parsed():
    assert cli.names("query,,value") == ("query", "value")
    assert cli.one_of(["a", "file:PATH"])("file:x:y") == "file:x:y"


def test_a_method_spec_is_parsed():
    for spec, *parsed in [
            ("svfit", "svfit", {}, None), ("full", "full", {}, None), ("lora:", "lora", {}, None),
            ("svft:pattern=banded,off_diagonals=8@query,value", "svft", {"pattern": "banded", "off_diagonals": 8},
             ("query", "value")),
            ("svft@query", "svft", {}, ("query",)), ("svfit:energy=0.9", "svfit", {"energy": 0.9}, None),
            ("svfit:rank=None", "svfit", {"rank": None}, None),
            ("dora:detach_norm=False", "dora", {"detach_norm": False}, None)]:
        assert parse_spec(spec) == tuple(parsed)


def test_specs_with_the_same_meaning_are_equal():
    for a, b in [("lora", "lora:rank=8"), ("lora:init=kaiming,rank=8", "lora:rank=8"), ("vera:d_init=0.1", "vera"),
                 ("svft@key,query", "svft@query,key"),
                 ("svft:off_diagonals=2,pattern=banded", "svft:pattern=banded,off_diagonals=2")]:
        assert canonical_spec(a) == canonical_spec(b)
    different = ["lora:rank=4", "lora", "lora:alpha=8", "svft@query", "svft", "dora", "svft:pattern=plain", "svfit"]
    assert len(set(map(canonical_spec, different))) == len(different)


def test_resume_without_an_earlier_run_says_so(tmp_path, capsys):
    flags = argparse.Namespace(out=tmp_path / "new", data="glyphs", resume=True)
    cli.out_folder(flags, "vit")
    assert "new contains no earlier run, so this one starts from the beginning" in capsys.readouterr().out
    (tmp_path / "new" / "row.json").touch()
    cli.out_folder(flags, "vit")
    assert capsys.readouterr().out == ""
