"""What a run starts from, by its flags: a base model pretrained here or elsewhere, data, seeds, training settings."""

import pytest
import torch

import train_gpt
import train_vit
from fake_datasets import build, build_tree
from helpers import BYTES, SIZES, call, little, read, rows   # noqa: F401  little is a fixture
from svmini import GPT, GPTConfig, ViT, ViTConfig, model_file
from svmini.data import image_datasets
from svmini.model_file import load_model, save_model
from svmini.training import compare


@pytest.mark.parametrize("script, data, name, sizes", [
    (train_gpt, "arithmetic", "arithmetic +", {"vocab_size": 13, "block_size": 12}),
    (train_vit, "glyphs", "glyphs A", {"image_size": 24, "patch_size": 6, "num_classes": 34})])
def test_pretrain_uses_the_dataset_and_the_sizes_of_its_flags(script, data, name, sizes, little, tmp_path):
    argv = [script, "pretrain", "--data", data, "--n-layer", 2, "--steps", 3, "--out", tmp_path]
    assert f"pretraining on {name}," in call(*argv) and not (tmp_path / "results.json").exists()
    model, metadata = load_model(tmp_path / "pretrain" / "model.pt", ViT if script is train_vit else GPT)
    assert (SIZES | {"n_layer": 2} | sizes).items() <= vars(model.config).items()
    assert {"data": name, "steps": 3}.items() <= metadata["run_config"].items() and metadata["data"] == name
    assert "from an earlier run" in call(*argv, "--resume")
    error = call(*argv, "--lr", 0.5, "--weight-decay", 0.75, code=2)
    assert "lr was" in error and "weight_decay was" in error


def test_base_data_names_the_dataset_of_the_base_model_and_init_its_file(little, tmp_path, monkeypatch):
    prose = f"file:{little / 'prose.txt'}"
    argv = [train_gpt, "--methods", "svfit", "--steps", 1, "--out"]
    assert f"pretraining on {prose}" in call(*argv, tmp_path / "a", "--base-data", prose, "--block-size", 20)
    assert (read(tmp_path / "a")["task"], read(tmp_path / "a")["block_size"]) == ("topics", 20)
    argv += [tmp_path / "b", "--init", tmp_path / "a" / "pretrain" / "model.pt", "--block-size", 8]
    assert "pretraining" not in call(*argv) and read(tmp_path / "b")["block_size"] == 8
    for name in ("mnist", "cifar10", "cifar100"):
        build(name, tmp_path / "data", monkeypatch)
    for data, base, flags, size in (("cifar10", "cifar100", [], (32, 8, 3)),
                                    ("mnist", "glyphs A", ["--base-data", "glyphs"], (24, 6, 1))):
        out = tmp_path / data
        printed = call(train_vit, "--data", data, *flags, "--data-dir", tmp_path / "data", "--methods", "head",
                       "--per-class", 5, "--steps", 2, "--out", out)
        model, metadata = load_model(out / "pretrain" / "model.pt", ViT)
        assert f"pretraining on {base}" in printed and metadata["data"] == base and read(out)["per_class"] == 5
        assert (model.config.image_size, model.config.patch_size, model.config.in_channels) == size
        assert model.config.mean == (image_datasets.IMAGE_DATASETS[base].mean if base == "cifar100" else (0.5,))
        assert rows(out)[0]["head_params"] == 10 * 17
        assert not (out / "predictions.png").exists(), "there is no adapter whose predictions could be shown"


def test_published_weights_use_their_learning_rates_and_resume_refuses_another_n_head(tmp_path, monkeypatch):
    torch.save(GPT(GPTConfig(256, 24, 1, 2, 32)).to_gpt2(), tmp_path / "raw.pt")
    monkeypatch.setattr(model_file, "GPT2_VOCAB", 256)
    monkeypatch.setattr(train_gpt, "tokenizer_of", {"gpt2": train_gpt.bpe_tokenizer(BYTES)}.get)   # not GPT-2's
    argv = [train_gpt, "--init", tmp_path / "raw.pt", "--methods", "svfit", "--steps", 1, "--out", tmp_path]
    assert "give n_head" in call(*argv, code=2)
    call(*argv, "--n-head", 2)
    assert rows(tmp_path)[1]["lr"] == train_gpt.LEARNING_RATES["published"]["svfit"]
    assert read(tmp_path)["base"] == {"data": "raw", "published": True}
    assert "model.n_head was 2 and is 4" in call(*argv, "--n-head", 4, "--resume", code=2)


@pytest.fixture
def trained(monkeypatch):
    """(config, device_config, run_folder, a batch) of every training run of a command; nothing is trained."""
    seen = []
    monkeypatch.setattr(compare, "train", lambda model, task, config, device_config, folder, spec: seen.append(
        (config, device_config, folder, task.batch(12, config.seed, 0)[0])) or 1.0)
    return seen


def test_the_flags_of_training_reach_the_loop(trained, tmp_path):
    save_model(tmp_path / "base.pt", ViT(ViTConfig(24, 6, 1, 34, 1, 2, 16)), {"data": "glyphs A"})
    argv = [train_vit, "--methods", "svfit", "--init", tmp_path / "base.pt", "--out", tmp_path]
    call(*argv)
    call(*argv, "--steps", 3, "--batch-size", 5, "--grad-accum-steps", 2, "--lr", 0.5, "--head-lr", 0.25, "--compile",
         "--save-every", 4, "--eval-every", 6)
    first = train_vit.LEARNING_RATES["glyphs"]["svfit"], train_vit.ADAPT["head_lr"]
    assert [(c.steps, c.batch_size, c.grad_accum_steps, c.lr, c.head_lr, device.compile, folder.save_every,
             folder.eval_every) for c, device, folder, _ in trained] == [
        (8, train_vit.ADAPT["batch_size"], 1, *first, False, 0, 0), (3, 5, 2, 0.5, 0.25, True, 4, 6)]


def test_every_seed_has_its_own_draw_which_all_methods_share(trained, tmp_path, monkeypatch):
    """Images drawn by class are read once per draw, and test images once; the same for problems."""
    build_tree(tmp_path / "images", {"": 15})
    save_model(tmp_path / "base.pt", ViT(ViTConfig(8, 4, 3, 4, 1, 2, 16)), {})
    reads, read_images = [], image_datasets.read_images
    monkeypatch.setattr(image_datasets, "read_images", lambda *a: reads.append(a[-1].split()[-1]) or read_images(*a))
    images = [train_vit, "--init", tmp_path / "base.pt", "--data", f"folder:{tmp_path / 'images'}",
              "--per-class", 4, "--out", tmp_path / "vit"]
    call(*images, "--methods", "head", "svfit", "--seeds", 2, "--no-augment")
    assert reads == ["train", "val", "test", "train", "val"]
    call(train_gpt, "--data", "arithmetic", "--methods", "svfit", "full", "--seeds", 2, "--out", tmp_path / "gpt")
    for part in (trained[:4], trained[4:]):
        assert [config.seed for config, *_ in part] == [0, 0, 1, 1]
        a, again, b, _ = ({bytes(image.numpy().tobytes()) for image in x} for *_, x in part)
        assert a == again != b
    call(*images, "--methods", "head")
    assert not torch.equal(trained[-1][-1], trained[0][-1]), "natural images are augmented by default"
    assert "augment was False and is True" in call(*images, "--methods", "svfit", "--resume", code=2)
