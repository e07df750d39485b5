"""Bad input: one line on stderr that says what would be right, exit code 2, and nothing written."""

import re

import pytest
import torch

import train_gpt
import train_vit
from svmini import GPT, GPTConfig, METHODS, ViT, ViTConfig, adapt, cli, images, loop, save_adapter, tasks, text

TINY = ["--n-layer", "1", "--n-head", "2", "--d-model", "16", "--device", "cpu"]
GPT_SIZES = {"n_layer": 1, "n_head": 2, "d_model": 16}


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """Files of every kind that can be handed in by mistake; {their folder} stands in the tables below."""
    folder = tmp_path_factory.mktemp("files of all kinds ü")
    torch.manual_seed(0)
    vit = ViT(ViTConfig(24, 6, 1, 34, 1, 2, 16))
    loop.save_model(folder / "vit.pt", vit, data="glyphs A", classes=["x"])
    loop.save_model(folder / "mnist.pt", ViT(ViTConfig(28, 7, 1, 10, 1, 2, 16)), data="mnist", classes=["0"])
    save_adapter(adapt(vit.new_head(26), "lora", rank=2), folder / "vit-adapter.pt")
    gpt = GPT(GPTConfig(tasks.Arithmetic.vocab_size, tasks.Arithmetic.length, **GPT_SIZES))
    loop.save_model(folder / "arithmetic.pt", gpt, data="arithmetic +", tokenizer="arithmetic")
    save_adapter(adapt(gpt, "svft"), folder / "gpt-adapter.pt")
    bytes_only = [bytes([b]).hex() for b in range(256)]
    loop.save_model(folder / "text.pt", GPT(GPTConfig(256, 128, **GPT_SIZES)), data="stdlib", tokenizer=bytes_only)
    (folder / "notes.pt").write_text("a text file\n", encoding="utf-8")
    (folder / "cut.pt").write_bytes((folder / "vit.pt").read_bytes()[:-200])
    (folder / "empty.txt").write_text("")
    (folder / "tiny.txt").write_text("too short\n")
    (folder / "one.txt").write_text("one paragraph only. " * 200)
    (folder / "latin.txt").write_bytes("Größe ".encode("latin-1") * 500)
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Small pictures and a short library: these tests are about words. No training must start in them."""
    for which in "AB":
        monkeypatch.setitem(images.GLYPHS[which], "sizes", {"train": 2, "val": 1, "test": 1})
    library = text.stdlib_source()[:30_000]
    monkeypatch.setattr(text, "stdlib_source", lambda: library)
    monkeypatch.setattr(loop, "train", lambda *a, **k: pytest.fail("training started"))


def refused(main, argv, words, tmp_path, capsys, cached=False):
    """main(argv) says one line that has all words, returns 2 and leaves tmp_path as it was.

    cached: pictures that were drawn on the way, and are what the next command needs, may lie in --out.
    """
    def listing():
        return {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")
                if not p.is_dir() and not (cached and p.name.startswith("glyphs-"))}
    before = listing()
    assert main(argv) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and captured.err.endswith("\n"), captured.err
    for word in words:
        assert word in lines[0], f"{word!r} is not in {lines[0]!r}"
    assert listing() == before


# For both scripts; what argparse or check_flags sees, before a folder is made.
FLAGS = [
    ("finetun --method svft", "no command 'finetun' (did you mean 'finetune'?)"),
    ("--quik", "--quik --help"),
    ("--no-such-flag 3", "--no-such-flag"),
    ("compare extra --methods svft", "extra"),
    ("finetune", "needs --method"),
    ("compare", "needs --methods"),
    ("--quick --all", "exclude each other"),
    ("--methods svft", "--methods belongs to compare, not to story"),
    ("compare --method svft --methods lora", "--method belongs to finetune"),
    ("finetune --method svft --tune 3", "--tune belongs to compare"),
    ("finetune --method svft --seeds 3", "--seeds belongs to"),
    ("pretrain --pretrain-steps 3", "--pretrain-steps belongs to"),
    ("pretrain --quick", "--quick belongs to story"),
    ("compare --all --methods svft", "--all belongs to story"),
    ("finetune --method svft --adapter x.pt", "--adapter belongs to"),
    ("merge --resume", "--resume belongs to"),
    ("merge --lr 0.1", "--lr belongs to"),
    # numbers
    ("--lr 0", "--lr above 0 '0'"),
    ("--lr -1", "--lr above 0 '-1'"),
    ("--lr nan", "--lr above 0 'nan'"),
    ("--lr inf", "--lr 'inf'"),
    ("--lr x", "--lr a number 'x'"),
    ("--steps 0", "--steps a whole number of at least 1"),
    ("--steps -3", "--steps of at least 1 '-3'"),
    ("--steps 2.5", "--steps a whole number '2.5'"),
    ("--steps x", "--steps a whole number 'x'"),
    ("--pretrain-steps 0", "--pretrain-steps of at least 1"),
    ("--batch-size 0", "--batch-size of at least 1"),
    ("--seed -1", "--seed of at least 0"),
    ("--seed x", "--seed a whole number"),
    ("--seeds 0", "--seeds of at least 1"),
    ("compare --methods svft --tune 0", "--tune of at least 1"),
    ("--save-every -1", "--save-every of at least 0"),
    ("--eval-every 1.5", "--eval-every a whole number"),
    ("--n-layer 0", "--n-layer of at least 1"),
    ("--d-model 0", "--d-model of at least 1"),
    ("--n-head x", "--n-head a whole number"),
    ("--lr", "--lr expected one argument"),
    # names
    ("--data glyps", "no data 'glyps'"),
    ("--data topic", "no data 'topic'"),
    ("--device gpu", "--device 'gpu' cpu cuda mps"),
    ("--dtype float8", "--dtype 'float8' bfloat16"),
    # method words
    ("finetune --method svtf", "there is no method 'svtf' (did you mean 'svft'?)"),
    ("compare --methods svft lroa:rank=8", "no method 'lroa' (did you mean 'lora'?)"),
    ("finetune --method lora:rnak=8", "lora has no option 'rnak' (did you mean 'rank'?)"),
    ("finetune --method svfit:off_diagonals=2", "svfit has no option 'off_diagonals' rank energy"),
    ("finetune --method full:rank=2", "full has no option 'rank' takes no options"),
    ("finetune --method lora:rank", "an option is name=value, not 'rank'"),
    ("finetune --method lora:rank=", "an option is name=value, not 'rank='"),
    ("finetune --method lora@", "after @ come targets"),
]


def both_scripts(table):
    return [pytest.param(main, argv, words, id=f"{name} {argv}") for argv, words in table
            for name, main in (("gpt", train_gpt.main), ("vit", train_vit.main))]


def split_words(words):
    """"--lr above 0 'x'" as its words, but a sentence that holds a quotation mark and a bracket as a whole."""
    return [words] if re.search(r"[a-z] [a-z]+ [a-z]|\(", words) and not words.startswith("--") else words.split()


@pytest.mark.parametrize("main, argv, words", both_scripts(FLAGS))
def test_flags(main, argv, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [words] if " belongs to" in words else words.split() if words.startswith("--") else [
        w for part in words.split(") ") for w in ([part] if "(" not in part else [part.split(" (")[0], part.split("(")[1]])]
    if argv.startswith(("svfit", "full")):
        words = words[0].split()
    refused(main, argv.split(), [w for part in words for w in (part.split() if "has no option" in part else [part])],
            tmp_path, capsys)
    assert not list(tmp_path.iterdir()), "no folder is made for a command that cannot work"
