"""What a run starts from and on what, by its flags: a base pretrained here or elsewhere, data, seeds, train_config."""

import hashlib

import pytest
import torch

import train_gpt
import train_vit
from fake_datasets import build, build_tree
from little import PROSE, call, little, read, rows   # noqa: F401  little is a fixture
from svmini import GPT, GPTConfig, ViT, ViTConfig, model_file
from svmini.data import image_datasets
from svmini.model_file import load_model, save_model
from svmini.training import compare


# ---- what a base is pretrained on ----

def test_pretrain_trains_on_what_the_words_say(little, tmp_path):
    prose, small = f"file:{little / 'prose.txt'}", ["--n-layer", 2, "--n-head", 2, "--d-model", 16, "--steps", 3]
    for script, data, name, sizes in (
            (train_gpt, prose, prose, {"block_size": 20}), (train_gpt, "topics", "topics", {"block_size": 128}),
            (train_gpt, "arithmetic", "arithmetic +", {"vocab_size": 13, "block_size": 12}),
            (train_vit, "glyphs", "glyphs A", {"image_size": 24, "patch_size": 6, "num_classes": 34})):
        out = tmp_path / name.replace("/", "_")
        argv = [script, "pretrain", "--data", data, *small, *(["--block-size", 20] if data == prose else []), "--out", out]
        assert f"pretraining on {name}," in call(*argv) and not (out / "results.json").exists()
        model, metadata = load_model(out / "pretrain" / "model.pt", ViT if script is train_vit else GPT)
        assert metadata["data"].startswith(name) and metadata["run_config"]["data"] == name
        shape = model.config.n_layer, model.config.n_head, model.config.d_model
        assert shape == (2, 2, 16) and sizes.items() <= vars(model.config).items() and metadata["run_config"]["steps"] == 3
        assert data != prose or metadata["run_config"]["sha256"] == hashlib.sha256(PROSE.encode()).hexdigest()
        assert "kept from" in call(*argv, "--resume")
        assert "lr was" in call(*argv, "--lr", 0.5, code=2)
        assert "weight_decay was" in call(*argv, "--weight-decay", 0.75, code=2)
    init = tmp_path / prose.replace("/", "_") / "pretrain" / "model.pt"
    argv = [train_gpt, "--init", init, "--data", prose, "--methods", "svfit", "--steps", 2, "--out"]
    assert "pretraining" not in call(*argv, tmp_path / "b") and read(tmp_path / "b")["block_size"] == 20
    call(*argv, tmp_path / "c", "--block-size", 8)
    assert read(tmp_path / "c")["block_size"] == 8 and rows(tmp_path / "c") != rows(tmp_path / "b")


def test_base_data_names_what_the_base_is_pretrained_on(little, tmp_path, monkeypatch):
    prose = f"file:{little / 'prose.txt'}"
    printed = call(train_gpt, "--base-data", prose, "--methods", "svfit", "--steps", 1, "--out", tmp_path / "a")
    assert f"pretraining on {prose}" in printed and read(tmp_path / "a")["task"] == "topics"
    for name in ("mnist", "fashionmnist", "cifar10", "cifar100"):
        build(name, tmp_path / "data", monkeypatch)
    for data, base, flags, size in (("mnist", "fashionmnist", [], (28, 7, 1)), ("cifar10", "cifar100", [], (32, 8, 3)),
                                    ("mnist", "glyphs A", ["--base-data", "glyphs"], (24, 6, 1))):
        out = tmp_path / f"{data} {base}"
        printed = call(train_vit, "--data", data, *flags, "--data-dir", tmp_path / "data", "--methods", "head",
                       "--per-class", 5, "--steps", 2, "--out", out)
        model, metadata = load_model(out / "pretrain" / "model.pt", ViT)
        assert f"pretraining on {base}" in printed and metadata["data"] == base and read(out)["per_class"] == 5
        assert (model.config.image_size, model.config.patch_size, model.config.in_channels) == size
        real = image_datasets.IMAGE_DATASETS.get(base)
        assert (model.config.mean, model.config.std) == ((real.mean, real.std) if real else ((0.5,), (0.5,)))
        assert rows(out)[0]["head_params"] == 10 * 17 and (out / "predictions.png").exists() is False, "no adapter to show"


def test_published_weights_take_published_rates_and_resume_keeps_other_heads_apart(tmp_path, monkeypatch):
    torch.manual_seed(0)
    torch.save(GPT(GPTConfig(256, 24, 1, 2, 32)).to_gpt2(), tmp_path / "raw.pt")
    bytes_alone = train_gpt.bpe_tokenizer([f"{b:02x}" for b in range(256)])   # in place of GPT-2's, which is not here
    monkeypatch.setattr(model_file, "GPT2_VOCAB", 256)
    monkeypatch.setattr(train_gpt, "tokenizer_of", {"gpt2": bytes_alone}.get)
    argv = [train_gpt, "--init", tmp_path / "raw.pt", "--methods", "svfit", "--steps", 1, "--out", tmp_path]
    assert "give n_head" in call(*argv, code=2)
    call(*argv, "--n-head", 2)
    assert rows(tmp_path)[1]["lr"] == train_gpt.LEARNING_RATES["published"]["svfit"]
    assert read(tmp_path)["base"] == {"data": "raw", "published": True}
    assert "model.n_head was 2 and is 4" in call(*argv, "--n-head", 4, "--resume", code=2)


def test_flags_reach_the_loop(little, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(compare, "train", lambda model, task, s, device_config, run, spec: seen.append(
        (s.steps, s.batch_size, s.grad_accum_steps, s.lr, s.head_lr, device_config.compile, run.save_every, run.eval_every)) or 1.0)
    torch.manual_seed(0)
    save_model(tmp_path / "base.pt", ViT(ViTConfig(24, 6, 1, 34, 1, 2, 16)), {"data": "glyphs A"})
    argv = [train_vit, "--methods", "svfit", "--init", tmp_path / "base.pt", "--out", tmp_path]
    call(*argv)
    call(*argv, "--steps", 3, "--batch-size", 5, "--grad-accum-steps", 2, "--lr", 0.5, "--head-lr", 0.25, "--compile",
         "--save-every", 4, "--eval-every", 6)
    first = train_vit.LEARNING_RATES["glyphs"]["svfit"], train_vit.ADAPT.head_lr
    assert seen == [(8, train_vit.ADAPT.batch_size, 1, *first, False, 0, 0), (3, 5, 2, 0.5, 0.25, True, 4, 6)]


@pytest.fixture
def trained(monkeypatch):
    """(seed, the pictures or problems of a batch) of every training that a command starts; nothing is trained."""
    seen = []

    def spy(model, task, s, *arguments):
        x, _ = task.batch(12, s.seed, 0)
        seen.append((s.seed, frozenset(bytes(part.numpy().tobytes()) for part in x)))
        return 1.0

    monkeypatch.setattr(compare, "train", spy)
    return seen


def test_every_seed_has_its_own_draw_and_every_method_of_a_seed_the_same(trained, tmp_path, monkeypatch):
    """Of pictures drawn by class, which are read once a draw, the test pictures once; and of problems."""
    build_tree(tmp_path / "pictures", {"": 15})
    save_model(tmp_path / "base.pt", ViT(ViTConfig(8, 4, 3, 4, 1, 2, 16)), {})
    reads, read_pictures = [], image_datasets.read_images
    monkeypatch.setattr(image_datasets, "read_images", lambda *a: reads.append(a[-1].split()[-1]) or read_pictures(*a))
    pictures = [train_vit, "--init", tmp_path / "base.pt", "--data", f"folder:{tmp_path / 'pictures'}",
                "--per-class", 4, "--out", tmp_path / "vit"]
    call(*pictures, "--methods", "head", "svfit", "full", "--seeds", 3, "--no-augment")
    assert reads == ["train", "val", "test"] + ["train", "val"] * 2
    plain = trained[0][1]
    call(train_gpt, "--data", "arithmetic", "--methods", "svfit", "full", "--seeds", 3, "--out", tmp_path / "gpt")
    for part, methods in ((trained[:9], 3), (trained[-6:], 2)):
        assert [seed for seed, _ in part] == [seed for seed in range(3) for _ in range(methods)]
        drawn = [{batch for s, batch in part if s == seed} for seed in range(3)]
        assert all(len(batches) == 1 for batches in drawn) and len(set.union(*drawn)) == 3
    call(*pictures, "--methods", "head")
    assert trained[-1][0] == 0 and trained[-1][1] != plain, "natural pictures are augmented, where nothing is said"
    assert "augment was False and is True" in call(*pictures, "--methods", "svfit", "--resume", code=2)
