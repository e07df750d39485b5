"""Bad input gives one line with what is wrong and what to do, exit code 2, and no files. Bugs keep their traceback."""

import functools
import io
import os
import sys

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
    """Add files of every kind that a user can give by mistake to the models; FILES in the tables below."""
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


# What both scripts refuse before they make a folder: the command line, and parts of the message.
FLAGS = [
    ("finetune --methods svft", "finetune", "--help"), ("--method svft", "--method"), ("--n-layer 2", "--n-layer"),
    ("--lr-sweep 3 --lr 0.1", "--lr", "not allowed with", "--lr-sweep"),
    ("--init x.pt --base-data glyphs", "--base-data", "not allowed with", "--init"),
    ("--n-head 2", "--n-head", "--init"),
    *((f"pretrain {flag}", flag) for flag in ("--quick", "--methods", "--init", "--lr-sweep", "--seeds")),
    ("--steps 0", "--steps", "of at least 1"), ("--grad-accum-steps 0", "--grad-accum-steps", "of at least 1"),
    ("pretrain --n-layer 0", "--n-layer", "of at least 1"), ("--lr 0", "above 0"),
    ("--lr nan", "above 0", "'nan'"), ("--lr inf", "--lr", "'inf'"), ("--lr x", "a number", "'x'"),
    ("--steps 2.5", "an integer", "'2.5'"), (f"--steps {2**63}", "an integer"),
    ("--seed -1", "--seed", "of at least 0"), (f"--seed {2**62 + 1}", f"from 0 to {2**62}"),
    ("--seeds 0", "from 1 to 1000"), (f"--lr-sweep {10**9}", "from 1 to 100"),
    ("--save-every -1", "--save-every", "of at least 0"),
    ("--data xyz", "no 'xyz'", "choose from"), ("--targets ,", "--targets", "query,value"),
    ("--methods svft lroa:rank=8", "did you mean 'lora'?"),
    ("--methods lora:rnak=8", "lora has no option 'rnak'", "did you mean 'rank'?"),
    ("--methods full:rank=2", "full has no option 'rank'", "it has no options"), ("--methods lora:rank", "name=value"),
    ("--methods lora:rank=", "name=value"), ("--methods lora@", "targets follow the @"),
    ("--methods lora:=8", "has no option ''"), ("--methods LoRA", "no method 'LoRA'"),
    ("--methods full@up", "no targets"), ("--methods lora:rank=1,rank=2", "rank is given twice"),
    ("--methods svfit,rank=8", "options follow a colon"),
]


@pytest.mark.parametrize("script", ["gpt", "vit"])
def test_a_bad_flag_is_refused_before_a_folder_is_made(script, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for argv, *parts in FLAGS:
        refused(MAINS[script], argv.split(), parts, tmp_path, capsys)
    assert not list(tmp_path.iterdir())


# What is refused once the model, a file or the data are known, but before pretraining. FILES: see `things`.
BOTH = [
    ("--methods lora:rank=x", "rank must be an integer", "'x'"),
    ("--methods full svft svfit:rank=999", "svfit does not fit blocks.0.attention.query (128x128)", "128"),
    ("--methods svft --targets quer", "'quer' matches no layer", "targets can be: query, key, value"),
    ("--methods all svft", "no method 'all'"),
    ("--base-data xyz", "xyz"), ("--init FILES", "is neither a file nor one of"),
    ("--init FILES/notes.pt", "notes.pt is not a file of weights that torch can read"),
    ("--init FILES/arithmetic-adapter.pt", "svmini adapter, not an svmini model"),
]
TABLES = {
    "gpt": BOTH + [
        ("--methods head", "no head that could be trained alone"),
        ("--data topic", "no 'topic'", "did you mean 'topics'?"), ("--data file:", "no 'file:'"),
        ("--data file:FILES/none.txt", "there is no file", "none.txt"),
        ("--init FILES/vit.pt", "holds a ViT, not a GPT"),
        ("--init FILES/raw-arithmetic.pt", "give n_head"),
        ("--init FILES/raw-arithmetic.pt --n-head 2", "has 13 tokens and GPT-2's tokenizer 50,257"),
        ("--init FILES/text.pt --n-head 2", "contains its number of heads"),
        ("--init FILES/nameless.pt", "does not name its tokenizer"),
        ("--data arithmetic --init FILES/text.pt", "text.pt", "does not go with --data arithmetic"),
        ("--data topics --base-data arithmetic", "arithmetic was trained on arithmetic", "--data topics"),
        ("--block-size 17 --init FILES/text.pt", "--block-size 17 exceeds the 16 tokens"),
        ("--data arithmetic --block-size 64", "text"), ("pretrain --data gsm8k", "no 'gsm8k'", "stdlib"),
        ("pretrain --data arithmetic --block-size 64", "--block-size belongs to text"),
        ("pretrain --n-head 3", "divisible")],
    "vit": BOTH + [
        ("--data glyps", "no 'glyps'", "did you mean 'glyphs'?"), ("--head-lr 0", "--head-lr", "above 0"),
        ("--per-class 1", "--per-class", "of at least 2", "'1'"), ("--per-class 10", "--per-class", "real data"),
        ("--image-size 224", "--image-size", "add --init"),
        ("pretrain --image-size 25", "image_size=25 is not divisible"), ("pretrain --n-head 3", "divisible"),
        ("--data food101", "base model for --data food101", "--init vit_b_16", "--base-data"),
        ("--data folder:FILES", "there is no dataset for pretraining"), ("--data mnist", "--data-dir"),
        ("--init FILES/arithmetic.pt", "holds a GPT, not a ViT"),
        ("--init vit_b_17", "'vit_b_17' is neither a file nor one of vit_b_16, vit_b_32")],
    "generate": [
        ("--prompt 1", "--init"), ("--init FILES/arithmetic.pt", "--prompt"),
        ("--init FILES/text.pt --prompt=", "at least one"),
        *((f"--init FILES/arithmetic.pt --prompt 1 {flag}", flag.split()[0], "of at least") for flag in (
            "--temperature nan", "--max-new-tokens 0", "--top-k 0")),
        ("--init FILES/arithmetic.pt --prompt 12x4=é", "0123456789+-=", "'x'", "'é'"),
        ("--init FILES/vit.pt --prompt 1", "holds a ViT, not a GPT"),
        ("--init FILES/nameless.pt --prompt 1", "does not name its tokenizer"),
        ("--init FILES/raw-arithmetic.pt --n-head 2 --prompt 1", "50,257"),
        ("--init FILES/text.pt --adapter FILES/arithmetic-adapter.pt --prompt 1", "trained on another base")],
    "predict": [
        ("--init FILES/arithmetic.pt", "holds a GPT, not a ViT"), ("--init FILES/nameless-vit.pt", "give it as --data"),
        ("--init FILES/vit.pt --data glyphs", "but the model has 34"),
        ("--init FILES/vit.pt --adapter FILES/arithmetic-adapter.pt", "arithmetic-adapter.pt"),
        ("--init FILES/vit.pt --out FILES/notes.pt", "notes.pt")],
    "export": [
        ("--init FILES/vit.pt", "--adapter"), ("--adapter FILES/vit-adapter.pt", "--init"),
        ("--init FILES/vit.pt --adapter FILES/vit-adapter.pt --format gpt2", "does not fit a ViT", "torchvision"),
        ("--init FILES/arithmetic.pt --adapter FILES/arithmetic-adapter.pt --format torchvision",
         "choose svmini or gpt2"),
        ("--init FILES/vit.pt --adapter FILES/vit-adapter.pt --out FILES", "directory")]}


@pytest.mark.parametrize("name", TABLES)
def test_bad_input_is_refused_before_training(name, things, tmp_path, capsys):
    before = {p: p.read_bytes() for p in things.glob("*.*")}
    for argv, *parts in TABLES[name]:
        argv = [part.replace("FILES", str(things)) for part in argv.split()]
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


@pytest.mark.parametrize("encoding, shown", [("ascii", "? 3 ?"), ("cp1252", "± 3 ?")])
def test_printing_replaces_what_the_terminal_cannot_show(encoding, shown, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    assert cli.run_command(lambda argv: print("± 3 █"), []) == 0
    stream.flush()
    assert stream.buffer.getvalue().decode(encoding).strip() == shown


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
