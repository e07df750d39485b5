"""Bad input: one line on stderr that says what would be right, exit code 2, and nothing written."""

import pytest
import torch

import train_gpt
import train_vit
from svmini import GPT, GPTConfig, METHODS, ViT, ViTConfig, adapt, cli, glyphs, loop, save_adapter, tasks, text

TINY = ["--n-layer", "1", "--n-head", "2", "--d-model", "16", "--device", "cpu"]
GPT_SIZES = {"n_layer": 1, "n_head": 2, "d_model": 16}


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """Files of every kind that can be handed in by mistake; {their folder} stands in the tables below."""
    folder = tmp_path_factory.mktemp("files of all kinds ü")
    torch.manual_seed(0)
    vit = ViT(ViTConfig(24, 6, 1, 34, 1, 2, 16))
    scale = {"mean": (0.5,), "std": (0.5,), "published": False}
    loop.save_model(folder / "vit.pt", vit, data="glyphs A", **scale)
    loop.save_model(folder / "mnist.pt", ViT(ViTConfig(28, 7, 1, 10, 1, 2, 16)), data="mnist", **scale)
    loop.save_model(folder / "old.pt", vit, data="glyphs A", classes=["x"])   # from before it said its scale
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
    (folder / "one.txt").write_text("one paragraph only. " * 600)
    (folder / "latin.txt").write_bytes("Größe ".encode("latin-1") * 500)
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Small pictures and a short library: these tests are about words. No training must start in them."""
    for which in "AB":
        monkeypatch.setitem(glyphs.GLYPHS[which], "sizes", {"train": 2, "val": 1, "test": 1})
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


# What both scripts see before they make a folder: the command line, and words that the message must have.
FLAGS = [
    ("finetun --method svft", "no command 'finetun'", "did you mean 'finetune'?"),
    ("--no-such-flag 3", "--no-such-flag"),
    ("compare extra --methods svft", "extra"),
    ("finetune", "needs --method"),
    ("compare", "needs --methods"),
    ("--quick --all", "exclude each other"),
    # flags of another command
    ("--methods svft", "--methods belongs to compare, not to the story"),
    ("compare --method svft --methods lora", "--method belongs to finetune"),
    ("finetune --method svft --tune 3", "--tune belongs to compare"),
    ("compare --methods svft --tune 3 --lr 0.1", "--tune looks for the learning rates that --lr gives"),
    ("finetune --method full@query", "full adapts no layers"),
    ("finetune --method svfit,rank=8", "options follow a colon"),
    ("finetune --method svft --seeds 3", "--seeds belongs to"),
    ("pretrain --pretrain-steps 3", "--pretrain-steps belongs to"),
    ("pretrain --quick", "--quick belongs to story"),
    ("compare --all --methods svft", "--all belongs to story"),
    ("finetune --method svft --adapter x.pt", "--adapter belongs to"),
    ("finetune --method svft --plot", "--plot belongs to"),
    ("merge --resume", "--resume belongs to"),
    ("merge --lr 0.1", "--lr belongs to"),
    # numbers
    ("--lr 0", "--lr", "above 0", "'0'"),
    ("--lr -1", "--lr", "above 0", "'-1'"),
    ("--lr nan", "--lr", "above 0", "'nan'"),
    ("--lr inf", "--lr", "'inf'"),
    ("--lr x", "--lr", "a number", "'x'"),
    ("--lr", "--lr", "expected one argument"),
    ("--steps 0", "--steps", "a whole number of at least 1"),
    ("--steps -3", "--steps", "of at least 1", "'-3'"),
    ("--steps 2.5", "--steps", "a whole number", "'2.5'"),
    ("--steps x", "--steps", "a whole number", "'x'"),
    ("--pretrain-steps 0", "--pretrain-steps", "of at least 1"),
    ("--batch-size 0", "--batch-size", "of at least 1"),
    ("--seed -1", "--seed", "of at least 0"),
    ("--seed x", "--seed", "a whole number"),
    ("--seeds 0", "--seeds", "of at least 1"),
    ("compare --methods svft --tune 0", "--tune", "of at least 1"),
    ("--save-every -1", "--save-every", "of at least 0"),
    ("--eval-every 1.5", "--eval-every", "a whole number"),
    ("--n-layer 0", "--n-layer", "of at least 1"),
    ("--d-model 0", "--d-model", "of at least 1"),
    ("--n-head x", "--n-head", "a whole number"),
    ("--accumulate 0", "--accumulate", "of at least 1"),
    ("--accumulate x", "--accumulate", "a whole number", "'x'"),
    ("merge --accumulate 2", "--accumulate belongs to pretrain and story"),
    ("merge --compile", "--compile belongs to pretrain and story"),
    ("finetune --method svft --format svmini --format pth", "--format", "'pth'", "svmini"),
    ("merge --init x.pt --adapter y.pt --n-layer 2", "--n-layer belongs to"),
    ("finetune --method svft --init x.pt --pretrain-steps 3", "--pretrain-steps speaks of a model that is pretrained"),
    # names
    ("--data xyz", "no data 'xyz'", "data: "),
    ("--device gpu", "--device", "'gpu'", "cpu", "cuda", "mps"),
    ("--dtype float8", "--dtype", "'float8'", "bfloat16"),
    # words for methods
    ("finetune --method svtf", "no method 'svtf'", "did you mean 'svft'?"),
    ("compare --methods svft lroa:rank=8", "no method 'lroa'", "did you mean 'lora'?"),
    ("finetune --method lora:rnak=8", "lora has no option 'rnak'", "did you mean 'rank'?"),
    ("finetune --method svfit:off_diagonals=2", "svfit has no option 'off_diagonals'", "rank, energy"),
    ("finetune --method full:rank=2", "full has no option 'rank'", "takes no options"),
    ("finetune --method lora:rank", "an option is name=value, not 'rank'"),
    ("finetune --method lora:rank=", "an option is name=value, not 'rank='"),
    ("finetune --method lora@", "after @ come targets"),
]
SCRIPTS = {"gpt": train_gpt.main, "vit": train_vit.main}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("argv, words", [(argv, words) for argv, *words in FLAGS], ids=[row[0] for row in FLAGS])
def test_flags(script, argv, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(SCRIPTS[script], argv.split(), words, tmp_path, capsys)
    assert not list(tmp_path.iterdir()), "no folder is made for a command that cannot work"


# What only one script has, or what is seen with the model or the files at hand. FILES is the folder of `things`.
WORDS = [
    ("finetune --method lora:rank=x", "rank must be a whole number", "'x'"),
    ("finetune --method lora:rank=2.5", "rank must be a whole number", "2.5"),
    ("finetune --method lora:rank=0", "rank", "0"),
    ("finetune --method lora:rank=17", "lora does not fit blocks.0.attention", "16"),
    ("finetune --method svfit:rank=99", "svfit does not fit blocks.0.attention", "16"),
    ("finetune --method svft:off_diagonals=16", "svft does not fit", "off_diagonals", "15"),
    ("finetune --method svft:pattern=diagonal", "pattern", "'diagonal'", "banded"),
    ("finetune --method svft:pattern=topk", "svft does not fit", "up (64x16)", "topk", "square"),
    ("finetune --method svfit:rank=2,energy=0.9", "rank or energy, not both"),
    ("finetune --method svfit:energy=1.5", "energy", "1.5"),
    ("finetune --method vera:rank=-1", "rank must be a whole number"),
    ("finetune --method boft:block_size=3", "block_size must be even"),
    ("finetune --method boft:factors=9", "not divisible"),
    ("compare --methods full svft svfit:rank=99", "svfit does not fit"),
    ("finetune --method svft@query,valeu", "'valeu' matches no layer", "did you mean 'value'?"),
    ("finetune --method svft --targets quer", "'quer' matches no layer", "did you mean 'query'?"),
    ("finetune --method svft --targets norm1", "LayerNorm"),
    ("finetune --method svft --targets ,", "targets must be a list of names"),
    ("finetune --method svft --targets head", "head"),
    ("--quick --n-head 3", "divisible"),
]
DATA = {"gpt": ["--data", "arithmetic"], "vit": []}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("argv, words", [(argv, words) for argv, *words in WORDS], ids=[row[0] for row in WORDS])
def test_what_does_not_fit_the_model_is_found_before_pretraining(script, argv, words, tmp_path, capsys):
    refused(SCRIPTS[script], [*argv.split()[:1], *DATA[script], "--out", str(tmp_path), *TINY, *argv.split()[1:]], words,
            tmp_path, capsys, cached=True)


GPT_ONLY = [
    ("--data topic", "no data 'topic'", "did you mean 'topics'?"),
    ("predict", "no command 'predict'", "generate"),
    ("finetune --method head --data arithmetic", "no head of its own"),
    ("merge --prompt 1", "--prompt belongs to generate"),
    ("merge --top-k 3", "--top-k belongs to generate"),
    ("merge --temperature 0.5", "--temperature belongs to generate"),
    ("generate --init FILES/arithmetic.pt", "needs --prompt"),
    ("generate --prompt 1+1=", "needs --init"),
    ("generate --prompt 1 --temperature -1", "--temperature", "of at least 0"),
    ("generate --prompt 1 --temperature nan", "--temperature", "'nan'"),
    ("generate --prompt 1 --length 0", "--length", "of at least 1"),
    ("generate --prompt 1 --top-k 0", "--top-k", "of at least 1"),
    ("generate --init FILES/arithmetic.pt --prompt 12x4=é", "0123456789+-=", "'x'", "'é'"),
    ("generate --init FILES/none.pt --prompt 1", "none.pt' is neither a file nor one of gpt2, gpt2-medium"),
    ("generate --init FILES --prompt 1", "is neither a file nor one of gpt2"),
    ("generate --init vit_b_16 --prompt 1", "'vit_b_16' is neither a file nor one of gpt2"),
    ("generate --init FILES/notes.pt --prompt 1", "notes.pt is no file of weights that torch can read"),
    ("generate --init FILES/gpt-adapter.pt --prompt 1", "svmini adapter, not an svmini model"),
    ("generate --init FILES/vit.pt --prompt 1", "holds a ViT, not a GPT"),
    ("generate --init FILES/arithmetic.pt --adapter FILES/arithmetic.pt --prompt 1", "svmini model, not an svmini adapter"),
    ("generate --init FILES/arithmetic.pt --adapter FILES/none.pt --prompt 1", "there is no adapter at"),
    ("generate --init FILES/arithmetic.pt --adapter FILES/notes.pt --prompt 1", "not a readable svmini adapter"),
    ("generate --init FILES/text.pt --adapter FILES/gpt-adapter.pt --prompt 1", "trained on another base"),
    ("generate --init FILES/arithmetic.pt --adapter FILES/vit-adapter.pt --prompt 1", "vit-adapter.pt was trained on another"),
    ("merge --init FILES/arithmetic.pt", "merge needs --adapter"),
    ("merge", "merge needs --adapter"),
    ("finetune --method svft --data arithmetic --init FILES/text.pt", "text.pt", "does not go with --data arithmetic"),
    ("finetune --method svft --data topics --init FILES/arithmetic.pt", "arithmetic", "does not go with --data topics"),
    ("finetune --method svft --data arithmetic --init FILES/vit.pt", "holds a ViT, not a GPT"),
    ("finetune --method svft --data arithmetic --init FILES/gpt-adapter.pt", "not an svmini model"),
    ("finetune --method svft --data file:", "--data file: lacks the path"),
    ("finetune --method svft --data file:FILES/none.txt", "there is no file", "none.txt"),
    ("finetune --method svft --data file:FILES", "there is no file"),
    ("finetune --method svft --data file:FILES/empty.txt", "too short to train on", "0 characters", "1000"),
    ("finetune --method svft --data file:FILES/tiny.txt", "too short to train on"),
    ("finetune --method svft --data file:FILES/one.txt", "paragraphs", "at least 10"),
    ("finetune --method svft --data file:FILES/latin.txt", "latin.txt is not UTF-8 text", "save it as UTF-8"),
]
VIT_ONLY = [
    ("--data glyps", "no data 'glyps'", "did you mean 'glyphs'?"),
    ("generate", "no command 'generate'", "predict"),
    ("--head-lr 0", "--head-lr", "above 0"),
    ("--per-class 0", "--per-class", "of at least 2"),
    ("--per-class 1", "--per-class", "of at least 2", "'1'"),
    ("--per-class 10", "--per-class belongs to real data"),
    ("pretrain --data cifar10 --per-class 10", "--per-class belongs to"),
    ("--image-size 224", "--image-size speaks of the model that --init brings"),
    ("--image-size 0 --init FILES/vit.pt", "--image-size", "of at least 1"),
    ("pretrain --image-size 24", "--image-size belongs to"),
    ("predict --init FILES/vit.pt --no-shake", "--no-shake belongs to"),
    ("finetune --method svft --init FILES/vit.pt --image-size 25", "image_size=25 is not divisible by patch_size=6"),
    ("--data food101", "--data food101 is no set to pretrain for", "--init vit_b_16"),
    ("pretrain --data eurosat", "--data eurosat is no set to pretrain for"),
    ("--data folder:FILES", "is no set to pretrain for", "--init vit_b_16"),
    ("--data folder", "no data 'folder'", "folder:PATH"),
    ("finetune --method svft --data folder: --init FILES/vit.pt", "--data folder: lacks the path"),
    ("finetune --method svft --data folder:FILES/none --init FILES/vit.pt", "there is no folder", "none"),
    ("finetune --method svft --data folder:FILES --init FILES/vit.pt", "no folder of class folders"),
    ("finetune --method svft --data food101 --init FILES/vit.pt", "--data-dir"),
    ("merge --init FILES/vit.pt --adapter FILES/vit-adapter.pt --format gpt2", "--format", "'gpt2'", "torchvision"),
    ("finetune --method svft --format torchvision", "--format belongs to merge"),
    ("finetune --method svft --init vit_b_17", "'vit_b_17' is neither a file nor one of vit_b_16, vit_b_32"),
    ("finetune --method svft --init gpt2", "'gpt2' is neither a file nor one of vit_b_16"),
    ("predict --init FILES/old.pt", "old.pt does not say which pictures", "mean and std", "pretrain it again"),
    ("predict --head-lr 1", "--head-lr belongs to"),
    ("predict", "needs --init"),
    ("--data mnist", "--data-dir", "--data glyphs"),
    ("predict --init FILES/arithmetic.pt", "holds a GPT, not a ViT"),
    ("predict --init FILES/vit-adapter.pt", "svmini adapter, not an svmini model"),
    ("predict --init FILES/cut.pt", "cut.pt is no file of weights that torch can read"),
    ("predict --init FILES/mnist.pt", "was trained on mnist", "does not go with --data glyphs"),
    ("predict --init FILES/vit.pt --adapter FILES/gpt-adapter.pt", "gpt-adapter.pt was trained on another base"),
    ("predict --init FILES/mnist.pt --adapter FILES/vit-adapter.pt", "vit-adapter.pt was trained on another base"),
    ("merge --init FILES/vit.pt", "merge needs --adapter"),
    ("finetune --method svft --init FILES/arithmetic.pt", "holds a GPT, not a ViT"),
    ("finetune --method svft --init FILES/notes.pt", "notes.pt is no file of weights that torch can read"),
]


@pytest.mark.parametrize("script, argv, words", [
    pytest.param(script, argv, words, id=f"{script}: {argv}")
    for script, table in (("gpt", GPT_ONLY), ("vit", VIT_ONLY)) for argv, *words in table])
def test_input_of_one_script(script, argv, words, things, tmp_path, capsys):
    argv = [part.replace("FILES", str(things)) for part in argv.split()]
    if argv[0] != "--data":
        argv += ["--device", "cpu"]
    before = {p: p.read_bytes() for p in things.iterdir()}
    refused(SCRIPTS[script], [*argv, "--out", str(tmp_path / "out")], words, tmp_path, capsys, cached=True)
    assert {p: p.read_bytes() for p in things.iterdir()} == before


@pytest.mark.parametrize("script", SCRIPTS)
def test_out_that_is_a_file(script, tmp_path, capsys):
    (tmp_path / "out").write_text("precious")
    refused(SCRIPTS[script], ["--quick", *TINY, "--out", str(tmp_path / "out")], ["out is a file", "folder"], tmp_path, capsys)
    refused(SCRIPTS[script], ["--quick", *TINY, "--out", str(tmp_path / "out" / "in")], ["out"], tmp_path, capsys)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there(script, device, tmp_path, capsys):
    if {"cuda": torch.cuda, "mps": torch.backends.mps}[device].is_available():
        pytest.skip(f"{device} is there")
    refused(SCRIPTS[script], ["--device", device, "--out", str(tmp_path / "new")], [f"'{device}' is not there", "cpu"],
            tmp_path, capsys)


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt(), 130), (loop.Stopped("go on by --resume"), 130),
                                         (loop.Diverged("nan: try a lower --lr"), 1), (OSError(28, "disk full"), 2)])
def test_every_end_is_one_line_and_a_code(error, code, capsys):
    def main(argv):
        raise error

    assert cli.run(main, []) == code
    assert capsys.readouterr().err.count("\n") == 1


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(ValueError, match="needs --init"):
        train_vit.main(["predict", "--debug", "--out", str(tmp_path)])


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_flag_on_one_line(script, capsys):
    with pytest.raises(SystemExit) as caught:
        SCRIPTS[script](["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    for word in ("full, head", *METHODS, "--save-every", "--resume", "--targets", "pretrain | finetune | compare"):
        assert word in out


# ---- method words ----

@pytest.mark.parametrize("word, parsed", [
    ("svfit", ("svfit", {}, None)),
    ("full", ("full", {}, None)),
    ("head", ("head", {}, None)),
    ("lora:rank=8", ("lora", {"rank": 8}, None)),
    ("lora:rank=8,init=pissa", ("lora", {"rank": 8, "init": "pissa"}, None)),
    ("svft:pattern=banded,off_diagonals=8@query,value",
     ("svft", {"pattern": "banded", "off_diagonals": 8}, ("query", "value"))),
    ("svft@query", ("svft", {}, ("query",))),
    ("svfit:energy=0.9", ("svfit", {"energy": 0.9}, None)),
    ("svfit:rank=None", ("svfit", {"rank": None}, None)),
    ("dora:detach_norm=False", ("dora", {"detach_norm": False}, None)),
    ("lora:", ("lora", {}, None)),
])
def test_parse_method(word, parsed):
    assert cli.parse_method(word) == parsed


@pytest.mark.parametrize("word, words", [
    ("", "there is no method ''"), ("lora rank=8", "no method"), ("LoRA", "no method 'LoRA'"), (":rank=8", "no method ''"),
    ("lora:rank=8@", "after @"), ("lora:=8", "has no option ''"), ("lora:rank", "name=value"),
])
def test_parse_method_refuses(word, words):
    with pytest.raises(ValueError, match=words):
        cli.parse_method(word)


def test_every_example_is_a_word():
    for method, cls in METHODS.items():
        for example in cls.examples:
            name, options, targets = cli.parse_method(f"{method}:{example}")
            again = ",".join(f"{k}={v}" for k, v in options.items())
            assert (name, targets) == (method, None) and cli.parse_method(f"{name}:{again}") == (name, options, None)


@pytest.mark.parametrize("a, b, equal", [
    ("lora", "lora:rank=8", True), ("lora:init=kaiming,rank=8", "lora:rank=8", True), ("svft", "svft:off_diagonals=2", True),
    ("svft:off_diagonals=2,pattern=banded", "svft:pattern=banded,off_diagonals=2", True),
    ("svft@query,key,value,out,up,down", "svft", True), ("svft@key,query", "svft@query,key", True),
    ("lora:rank=4", "lora:rank=8", False), ("svft@query", "svft", False), ("lora", "dora", False),
    ("svft:pattern=plain", "svfit", False), ("vera:d_init=0.1", "vera", True), ("lora:alpha=8", "lora", False),
])
def test_same_method(a, b, equal):
    assert (cli.same_method(a) == cli.same_method(b)) is equal
