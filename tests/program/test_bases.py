"""What a run starts from, by its flags: a base model pretrained here or elsewhere, data, seeds, training settings."""

import hashlib

import pytest
import torch

import train_gpt
import train_vit
from fake_datasets import build, build_tree
from helpers import PROSE, call, little, read, rows   # noqa: F401  little is a fixture
from svmini import GPT, GPTConfig, ViT, ViTConfig, model_file
from svmini.data import image_datasets
from svmini.model_file import load_model, save_model
from svmini.training import compare


# ---- what a base model is pretrained on ----

def test_pretrain_uses_the_dataset_and_the_sizes_of_its_flags(little, tmp_path):
    prose, small = f"file:{little / 'prose.txt'}", ["--n-layer", 2, "--n-head", 2, "--d-model", 16, "--steps", 3]
    for script, data, name, sizes in (
            (train_gpt, prose, prose, {"block_size": 20}), (train_gpt, "topics", "topics", {"block_size": 128}),
            (train_gpt, "arithmetic", "arithmetic +", {"vocab_size": 13, "block_size": 12}),
            (train_vit, "glyphs", "glyphs A", {"image_size": 24, "patch_size": 6, "num_classes": 34})):
        out = tmp_path / name.replace("/", "_")
        argv = [script, "pretrain", "--data", data, *small, *["--block-size", 20][:2 * (data == prose)], "--out", out]
        assert f"pretraining on {name}," in call(*argv) and not (out / "results.json").exists()
        model, metadata = load_model(out / "pretrain" / "model.pt", ViT if script is train_vit else GPT)
        assert metadata["data"].startswith(name) and metadata["run_config"]["data"] == name
        shape = model.config.n_layer, model.config.n_head, model.config.d_model
        assert shape == (2, 2, 16) and sizes.items() <= vars(model.config).items()
        assert metadata["run_config"]["steps"] == 3
        assert data != prose or metadata["run_config"]["sha256"] == hashlib.sha256(PROSE.encode()).hexdigest()
        if data in ("arithmetic", "glyphs"):   # the quickest of each script
            assert "from an earlier run" in call(*argv, "--resume")
            error = call(*argv, "--lr", 0.5, "--weight-decay", 0.75, code=2)
            assert "lr was" in error and "weight_decay was" in error
    init = tmp_path / prose.replace("/", "_") / "pretrain" / "model.pt"
    argv = [train_gpt, "--init", init, "--data", prose, "--methods", "svfit", "--steps", 2, "--out"]
    assert "pretraining" not in call(*argv, tmp_path / "b") and read(tmp_path / "b")["block_size"] == 20
    call(*argv, tmp_path / "c", "--block-size", 8)
    assert read(tmp_path / "c")["block_size"] == 8 and rows(tmp_path / "c") != rows(tmp_path / "b")


def test_base_data_names_the_dataset_of_the_base_model(little, tmp_path, monkeypatch):
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
        assert rows(out)[0]["head_params"] == 10 * 17
        assert not (out / "predictions.png").exists(), "there is no adapter whose predictions could be shown"


def test_published_weights_use_their_learning_rates_and_resume_refuses_another_n_head(tmp_path, monkeypatch):
    torch.manual_seed(0)
    torch.save(GPT(GPTConfig(256, 24, 1, 2, 32)).to_gpt2(), tmp_path / "raw.pt")
    single_bytes = train_gpt.bpe_tokenizer([f"{b:02x}" for b in range(256)])   # in place of GPT-2's
    monkeypatch.setattr(model_file, "GPT2_VOCAB", 256)
    monkeypatch.setattr(train_gpt, "tokenizer_of", {"gpt2": single_bytes}.get)
    argv = [train_gpt, "--init", tmp_path / "raw.pt", "--methods", "svfit", "--steps", 1, "--out", tmp_path]
    assert "give n_head" in call(*argv, code=2)
    call(*argv, "--n-head", 2)
    assert rows(tmp_path)[1]["lr"] == train_gpt.LEARNING_RATES["published"]["svfit"]
    assert read(tmp_path)["base"] == {"data": "raw", "published": True}
    assert "model.n_head was 2 and is 4" in call(*argv, "--n-head", 4, "--resume", code=2)


def test_the_flags_of_training_reach_the_loop(little, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(compare, "train", lambda model, task, config, device_config, folder, spec: seen.append((
        config.steps, config.batch_size, config.grad_accum_steps, config.lr, config.head_lr, device_config.compile,
        folder.save_every, folder.eval_every)) or 1.0)
    torch.manual_seed(0)
    save_model(tmp_path / "base.pt", ViT(ViTConfig(24, 6, 1, 34, 1, 2, 16)), {"data": "glyphs A"})
    argv = [train_vit, "--methods", "svfit", "--init", tmp_path / "base.pt", "--out", tmp_path]
    call(*argv)
    call(*argv, "--steps", 3, "--batch-size", 5, "--grad-accum-steps", 2, "--lr", 0.5, "--head-lr", 0.25, "--compile",
         "--save-every", 4, "--eval-every", 6)
    first = train_vit.LEARNING_RATES["glyphs"]["svfit"], train_vit.ADAPT["head_lr"]
    assert seen == [(8, train_vit.ADAPT["batch_size"], 1, *first, False, 0, 0), (3, 5, 2, 0.5, 0.25, True, 4, 6)]


@pytest.fixture
def trained(monkeypatch):
    """(seed, the images or problems of a batch) of every training run that a command starts; nothing is trained."""
    seen = []

    def spy(model, task, config, *arguments):
        x, _ = task.batch(12, config.seed, 0)
        seen.append((config.seed, frozenset(bytes(part.numpy().tobytes()) for part in x)))
        return 1.0

    monkeypatch.setattr(compare, "train", spy)
    return seen


def test_every_seed_has_its_own_draw_which_all_methods_share(trained, tmp_path, monkeypatch):
    """Images drawn by class are read once per draw, and test images once; the same for problems."""
    build_tree(tmp_path / "images", {"": 15})
    save_model(tmp_path / "base.pt", ViT(ViTConfig(8, 4, 3, 4, 1, 2, 16)), {})
    reads, read_images = [], image_datasets.read_images
    monkeypatch.setattr(image_datasets, "read_images", lambda *a: reads.append(a[-1].split()[-1]) or read_images(*a))
    images = [train_vit, "--init", tmp_path / "base.pt", "--data", f"folder:{tmp_path / 'images'}",
              "--per-class", 4, "--out", tmp_path / "vit"]
    call(*images, "--methods", "head", "svfit", "full", "--seeds", 3, "--no-augment")
    assert reads == ["train", "val", "test"] + ["train", "val"] * 2
    plain = trained[0][1]
    call(train_gpt, "--data", "arithmetic", "--methods", "svfit", "full", "--seeds", 3, "--out", tmp_path / "gpt")
    for part, methods in ((trained[:9], 3), (trained[-6:], 2)):
        assert [seed for seed, _ in part] == [seed for seed in range(3) for _ in range(methods)]
        drawn = [{batch for s, batch in part if s == seed} for seed in range(3)]
        assert all(len(batches) == 1 for batches in drawn) and len(set.union(*drawn)) == 3
    call(*images, "--methods", "head")
    assert trained[-1][0] == 0 and trained[-1][1] != plain, "natural images are augmented by default"
    assert "augment was False and is True" in call(*images, "--methods", "svfit", "--resume", code=2)
