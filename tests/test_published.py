"""Weights from elsewhere, from their file to an adapted, merged model that goes back where it came from."""

import contextlib
import io
import json

import pytest
import torch
import torchvision

import train_vit
from fake_sets import build_tree
from svmini import ViT, ViTConfig, adapt, glyphs, images, loop, picture_sets, save_adapter, vit

SIZES = dict(image_size=16, patch_size=8, num_layers=1, num_heads=1, hidden_dim=16, mlp_dim=24, num_classes=5)


def theirs(**changes):
    """A random torchvision model whose heads have nothing at zero."""
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(**SIZES | changes).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """raw.pt, in torchvision's naming, and pictures, four classes of nine."""
    out = tmp_path_factory.mktemp("published ü")
    torch.save(theirs().state_dict(), out / "raw.pt")
    build_tree(out / "pictures", {"": 9})
    return out


def load(source):
    return loop.load_base(source, ViT, vit.torchvision_urls(), ViT.from_torchvision)


def call(*argv, code=0):
    """What train_vit prints; it must return `code`."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        got = train_vit.main([str(a) for a in (*argv, "--device", "cpu")])
    assert got == code, error.getvalue()
    return out.getvalue()


# ---- where a base comes from ----

def test_a_file_in_their_naming(folder):
    model, about = load(folder / "raw.pt")
    assert about == {"data": "raw", "published": True} and model.config.image_size == 16
    x = torch.randn(2, 3, 16, 16)
    assert (model.eval()(x) - theirs()(x)).abs().max() < 1e-5


def test_a_name_is_downloaded(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url",
                        lambda url, **options: asked.append(url) or theirs().state_dict())
    model, about = load("vit_b_16")
    assert asked == [vit.torchvision_urls()["vit_b_16"]] and about == {"data": "vit_b_16", "published": True}
    assert isinstance(model, ViT)


def test_a_model_file_of_ours(tmp_path):
    kept = ViT(ViTConfig(16, 8, 3, 5, 1, 2, 16))
    loop.save_model(tmp_path / "m.pt", kept, data="d", mean=(0.5,), published=False)
    model, about = load(tmp_path / "m.pt")
    assert about == {"data": "d", "mean": (0.5,), "published": False} and model.config == kept.config
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), kept.state_dict().values()))


def test_files_that_are_no_base(folder, tmp_path):
    model = ViT.from_torchvision(folder / "raw.pt")
    save_adapter(adapt(model, "lora", rank=2), tmp_path / "adapter.pt")
    whole = (folder / "raw.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[:-500])
    torch.save({"a": torch.ones(2)}, tmp_path / "other.pt")
    for name, error, words in (("adapter.pt", ValueError, "svmini adapter, not an svmini model"),
                               ("cut.pt", ValueError, "cut.pt is no file of weights that torch can read"),
                               ("other.pt", ValueError, "no torchvision VisionTransformer state dict"),
                               ("none.pt", FileNotFoundError, "none.pt' is neither a file nor one of vit_b_16,"),
                               ("vit_b_17", FileNotFoundError, "neither a file nor one of vit_b_16,")):
        with pytest.raises(error, match=words) as caught:
            load(str(tmp_path / name))
        assert "\n" not in str(caught.value)


# ---- and back ----

def test_merged_it_loads_into_torchvisions_model(folder, tmp_path, capsys):
    adapted = ViT.from_torchvision(folder / "raw.pt", num_classes=7, image_size=24).eval()
    adapt(adapted, "svft", off_diagonals=2)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape)
        x = torch.randn(3, 3, 24, 24)
        expected = adapted(x)
    loop.save_merged(adapted, {}, tmp_path, "torchvision", ViT.to_torchvision)
    printed = capsys.readouterr().out
    assert str(tmp_path / "merged-torchvision.pt") in printed and "torchvision's naming" in printed
    assert [p.name for p in tmp_path.iterdir()] == ["merged-torchvision.pt"]
    back = theirs(image_size=24, num_classes=7)
    back.load_state_dict(torch.load(tmp_path / "merged-torchvision.pt", weights_only=True), strict=True)
    with torch.no_grad():
        assert (back(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
        base = ViT.from_torchvision(folder / "raw.pt", num_classes=7, image_size=24).eval()
        assert (base(x) - expected).abs().max() > 0.1, "it is the adapted model, not the base"


# ---- the script ----

@pytest.fixture(scope="module")
def run(folder):
    """The flags of a run of two methods on raw.pt at twice its size, and its folder."""
    out = folder / "out"
    flags = ["--init", folder / "raw.pt", "--image-size", 32, "--data", f"folder:{folder / 'pictures'}"]
    call("compare", *flags, "--methods", "full", "svft:off_diagonals=2", "--per-class", 5, "--seeds", 2, "--steps", 3,
         "--batch-size", 4, "--out", out)
    return flags, out


def row_of(out, word, seed=0):
    rows = json.loads((out / "results.json").read_text())["rows"]
    return next(r for r in rows if (r["method"], r["seed"]) == (word, seed))


def test_predict_and_merge_give_back_the_row(run, tmp_path):
    flags, out = run
    adapter = out / "runs" / "svft_off_diagonals=2-seed0" / "adapter.pt"
    said = f"accuracy {row_of(out, 'svft:off_diagonals=2')['metric']:.1f} on 4 test pictures"
    assert said in call("predict", *flags, "--adapter", adapter, "--out", tmp_path)
    assert (tmp_path / "predictions.png").read_bytes().startswith(b"\x89PNG")
    call("merge", *flags, "--adapter", adapter, "--out", tmp_path)
    call("merge", *flags, "--adapter", adapter, "--out", tmp_path, "--format", "torchvision")
    assert said in call("predict", "--init", tmp_path / "merged.pt", *flags[-2:], "--out", tmp_path)
    said = f"accuracy {row_of(out, 'full')['metric']:.1f} on 4 test pictures"
    full = out / "runs" / "full-seed0" / "model.pt"
    assert said in call("predict", "--init", full, *flags[-2:], "--out", tmp_path)
    ours = loop.load_model(tmp_path / "merged.pt", ViT)[0].eval()
    back = theirs(image_size=32, num_classes=4)
    back.load_state_dict(torch.load(tmp_path / "merged-torchvision.pt", weights_only=True), strict=True)
    x = torch.randn(2, 3, 32, 32)
    assert (ours(x) - back(x)).abs().max() < 1e-5 and ours(x).abs().max() > 0


def test_a_merged_model_is_shown_what_the_published_one_was(run, tmp_path):
    flags, out = run
    call("merge", *flags, "--adapter", out / "runs" / "svft_off_diagonals=2-seed1" / "adapter.pt", "--out", tmp_path)
    model, about = load(tmp_path / "merged.pt")
    assert (about["mean"], about["std"]) == images.IMAGENET and about["published"] and about["data"] == flags[-1]
    assert model.config.image_size == 32 and model.config.num_classes == 4
    call("finetune", "--method", "svfit", "--init", tmp_path / "merged.pt", *flags[-2:], "--per-class", 2, "--steps", 2,
         "--out", tmp_path)
    rate = json.loads((tmp_path / "runs" / "svfit-seed0" / "row.json").read_text())["row"]["lr"]
    assert rate == train_vit.RATES["published"]["svfit"]


def test_an_adapter_of_another_size_is_refused(run, tmp_path, capsys):
    flags, out = run
    adapter = out / "runs" / "svft_off_diagonals=2-seed0" / "adapter.pt"
    argv = ["predict", *flags, "--adapter", adapter, "--out", tmp_path, "--device", "cpu"]
    argv[4] = 16
    assert train_vit.main([str(a) for a in argv]) == 2
    assert "trained on another base" in capsys.readouterr().err


def spied(monkeypatch, folder, *argv):
    """The training pictures of every run of a command, as bytes, and how often pictures were read from files."""
    trained, reads = [], []
    train, read = loop.train, picture_sets.read

    def spy(model, task, s, *arguments, **options):
        x, y = task.batch(12, 0, 0)   # 3 of 4 classes: more cannot be drawn without repeats
        trained.append((s.seed, frozenset(bytes(p.flatten().numpy().tobytes()) for p in x)))
        return train(model, task, s, *arguments, **options)

    monkeypatch.setattr(train_vit.compare, "train", spy)
    monkeypatch.setattr(picture_sets, "read", lambda *a: reads.append(a[-1].split()[-1]) or read(*a))
    call("compare", "--init", folder / "raw.pt", "--data", f"folder:{folder / 'pictures'}", "--per-class", 4,
         "--steps", 1, "--batch-size", 2, *argv)
    return trained, reads


def test_every_seed_draws_its_own_pictures(folder, tmp_path, monkeypatch):
    trained, reads = spied(monkeypatch, folder, "--methods", "head", "svfit", "full", "--seeds", 3, "--no-shake",
                           "--out", tmp_path)
    assert [seed for seed, _ in trained] == [0] * 3 + [1] * 3 + [2] * 3
    pictures = [{drawn for s, drawn in trained if s == seed} for seed in (0, 1, 2)]
    assert all(len(p) == 1 for p in pictures), "every method of a seed meets the same"
    assert len(set.union(*pictures)) == 3
    assert reads == ["train", "val", "test"] + ["train", "val"] * 2, "each draw is read once, the test pictures too"


def test_shaking_is_for_natural_pictures_and_can_be_left_out(folder, tmp_path, monkeypatch):
    plain, _ = spied(monkeypatch, folder, "--methods", "head", "--no-shake", "--out", tmp_path / "a")
    monkeypatch.undo()
    shaken, _ = spied(monkeypatch, folder, "--methods", "head", "--out", tmp_path / "b")
    assert plain[0][1] != shaken[0][1] and len(plain[0][1]) == 12


def test_only_natural_pictures_are_shaken_and_only_to_train():
    x, y = torch.randint(256, (40, 3, 16, 16)).to(torch.uint8), torch.arange(40)
    about = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    for natural in (True, False):
        splits = dict.fromkeys(("train", "test"), (x, y))
        pictures = images.Pictures("p", splits, list(range(40)), *about.values(), natural)
        task = train_vit.picture_task(pictures, about, 16, torch.device("cpu"), shake=True)
        got, labels = task.batch(8, 0, 0)
        plain = x[labels] / 255
        assert torch.equal(got, images.shake(plain, 0, 0) if natural else plain)
        seen = []
        task.evaluate(lambda part: seen.append(part) or torch.zeros(len(part), 40), "test")
        assert torch.equal(torch.cat(seen), x / 255)


def test_resume_keeps_draws_of_another_kind_apart(run, tmp_path):
    flags, _ = run
    argv = ["compare", *flags, "--methods", "svfit", "--steps", 1, "--batch-size", 2, "--out", tmp_path]
    call(*argv, "--per-class", 3)
    call(*argv, "--per-class", 3, "--resume")
    for other in (["--per-class", 4], ["--per-class", 3, "--no-shake"]):
        call(*argv, *other, "--resume", code=2)


def test_glyphs_are_shown_in_three_channels_and_at_its_size(folder, tmp_path, monkeypatch):
    """24 x 24 of one channel, to a model for 16 x 16 of three."""
    monkeypatch.setitem(glyphs.GLYPHS["B"], "sizes", {"train": 2, "val": 1, "test": 1})
    flags = ["--init", folder / "raw.pt", "--out", tmp_path]
    call("finetune", "--method", "lora:rank=2", *flags, "--steps", 2)
    adapter = tmp_path / "runs" / "lora_rank=2-seed0" / "adapter.pt"
    assert "glyphs B: accuracy" in call("predict", *flags, "--adapter", adapter)


def test_accumulate_and_compile_reach_the_loop(folder, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train_vit.compare, "train", lambda model, task, s, machine, *a, **k: seen.append(
        (s.accumulate, machine.compile)) or {"ms_per_step": 1.0, "log": []})
    argv = ["finetune", "--method", "svfit", "--init", folder / "raw.pt", "--data", f"folder:{folder / 'pictures'}",
            "--per-class", 2, "--out", tmp_path]
    assert ", compiled" in call(*argv, "--accumulate", 3, "--compile")
    assert ", compiled" not in call(*argv)
    assert seen == [(3, True), (1, False)]


def test_heads_of_another_width_are_given_by_hand(tmp_path):
    """A file in torchvision's naming does not tell how many heads there are."""
    torch.save(theirs(num_heads=4).state_dict(), tmp_path / "raw.pt")
    source, urls = tmp_path / "raw.pt", vit.torchvision_urls()
    x, expected = torch.randn(2, 3, 16, 16), theirs(num_heads=4)
    given, _ = loop.load_base(source, ViT, urls, ViT.from_torchvision, n_head=4)
    assert (given.eval()(x) - expected(x)).abs().max() < 1e-5
    guessed, _ = load(source)
    assert (guessed.eval()(x) - expected(x)).abs().max() > 1e-3
    loop.save_model(tmp_path / "ours.pt", given, data="d")
    with pytest.raises(ValueError, match="says itself how many heads"):
        loop.load_base(tmp_path / "ours.pt", ViT, urls, ViT.from_torchvision, n_head=2)


def test_weights_of_float64_are_taken_in_float32(tmp_path):
    torch.save({k: v.double() for k, v in theirs().state_dict().items()}, tmp_path / "raw.pt")
    model, _ = load(tmp_path / "raw.pt")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_an_adapter_says_which_pictures_it_is_for(folder, tmp_path, capsys):
    """Else merge and predict would believe --data, and its default."""
    data = ["--init", folder / "raw.pt", "--out", tmp_path]
    pictures = ["--data", f"folder:{folder / 'pictures'}"]
    call("finetune", "--method", "svfit", "--per-class", 3, "--steps", 1, *pictures, *data)
    adapter = tmp_path / "runs" / "svfit-seed0" / "adapter.pt"
    for command in ("predict", "merge"):
        assert train_vit.main([command, "--adapter", str(adapter), *map(str, data)]) == 2
        said = capsys.readouterr().err
        assert "adapter.pt was trained on folder:" in said and "--data glyphs" in said and said.count("\n") == 1
    call("merge", "--adapter", adapter, *pictures, *data)
    assert "folder:" in call("predict", "--init", tmp_path / "merged.pt", *pictures, "--out", tmp_path)


def test_how_a_batch_is_cut_is_no_other_base(tmp_path, monkeypatch):
    for which in "AB":
        monkeypatch.setitem(glyphs.GLYPHS[which], "sizes", {"train": 2, "val": 1, "test": 1})
    argv = ["finetune", "--method", "svfit", "--steps", 2, "--pretrain-steps", 2, "--n-layer", 1, "--d-model", 16,
            "--out", tmp_path]
    call(*argv)
    assert "is reused" in call(*argv, "--accumulate", 2, "--resume")
