"""Adapt a ViT with several methods and seeds, and compare the methods."""

import sys
from dataclasses import replace

import torch

from svmini import ViT, ViTConfig, analyze, cli, model_file
from svmini.data.image_datasets import IMAGE_DATASETS, open_images
from svmini.data.images import ImageClassification, describe, save_grid
from svmini.training import compare, pretrain, report
from svmini.training.device import prepare_device, resolve_device
from svmini.training.learning_rates import VIT_LEARNING_RATES as LEARNING_RATES
from svmini.training.loop import TrainConfig

# dataset to adapt to: dataset that a base model is pretrained on when --init is not given
DATA = {"glyphs": "glyphs"} | {name: d.base_data for name, d in IMAGE_DATASETS.items()} | {"folder:PATH": None}
MODEL = {"n_layer": 4, "n_head": 4, "d_model": 128}   # of a base model that is pretrained here
# a large weight decay moves the weights away from their random initialization: docs/results.md
PRETRAIN = TrainConfig(steps=1600, lr=2e-3, batch_size=32, warmup_ratio=0.05, schedule="cosine", weight_decay=2.0,
                       betas=(0.9, 0.98))
ADAPT = {"steps": 200, "batch_size": 32, "head_lr": 4e-3}   # of a TrainConfig; lr: LEARNING_RATES
MAIN = ["head", "full", "svfit", "svft:pattern=plain", "svft:off_diagonals=2", "svft:off_diagonals=8",
        "lora:rank=1", "lora:rank=2", "lora:rank=8", "dora:rank=8", "vera:rank=256"]
QUICK = ["head", "full", "svft:off_diagonals=8", "lora:rank=8"]


def main(argv=None):
    return cli.run_command(compare_methods, argv, pretrain=pretrain_only)


def compare_methods(argv):
    """Run a comparison; read downwards: data, base model, methods, then every seed and method, then the table."""
    flags = adapting_flags(argv)
    device_config, out = resolve_device(flags.device, flags.dtype, flags.compile), cli.out_folder(flags, "vit")
    name = "glyphs B" if flags.data == "glyphs" else flags.data                # a base is pretrained on glyphs A
    source = open_images(name, flags.data_dir, flags.seed, flags.per_class or 50, flags.val_per_class)
    print(describe(source))
    if flags.init:
        base, metadata = model_file.load_base(flags.init, ViT, flags.n_head)
        if flags.image_size:
            base.set_input_size(flags.image_size)
    else:
        base, base_task, metadata = new_base(flags, flags.base_data or DATA[flags.data], device_config)
    device_config = prepare_device(device_config, base)
    specs = flags.methods or (QUICK if flags.quick else MAIN)
    if specs == ["all"]:
        specs = compare.all_specs(MAIN, base, flags.targets)
    tuned = (LEARNING_RATES["published"] if metadata["published"] else
             LEARNING_RATES["glyphs"] | LEARNING_RATES.get(flags.data, {}))
    learning_rates = compare.plan(specs, base, flags.targets, tuned, flags.lr, flags.head_lr)   # a bad spec fails here
    print(compare.describe_targets(base, flags.targets))
    if not flags.init:
        config = replace(PRETRAIN, steps=PRETRAIN.steps // (4 if flags.quick else 1), seed=flags.seed)
        base, metadata = pretrain.pretrain(base, base_task, config, device_config, out / "pretrain", metadata,
                                           **cli.saving(flags))
    base.reset_classifier(len(source.classes))
    train_kwargs = ADAPT | ({"steps": ADAPT["steps"] // 2} if flags.quick else {}) | cli.training_flags(flags)
    metadata_of_adapters = {   # with which svmini.predict finds the images and names the classes
        "data_seed": flags.seed, "image_size": base.config.image_size, "classes": source.classes}
    rows, task = compare.run_all(
        learning_rates, range(flags.seed, flags.seed + flags.seeds), base,
        lambda seed: ImageClassification(source, seed, base.config, device_config.device, not flags.no_augment),
        train_kwargs, device_config, out, base_metadata=metadata, metadata=metadata_of_adapters, n_lrs=flags.lr_sweep,
        **cli.saving(flags))
    analyze.draw_best(out, rows, base)
    save_predictions(out, task, rows)
    if flags.quick:
        print(report.SMOKE_TEST)


def pretrain_only(argv):
    flags = pretraining_flags(argv)
    device_config, out = resolve_device(flags.device, flags.dtype, flags.compile), cli.out_folder(flags, "vit")
    model, task, metadata = new_base(flags, flags.data, device_config)
    device_config = prepare_device(device_config, model)
    config = replace(PRETRAIN, seed=flags.seed, **cli.training_flags(flags, "lr"))
    pretrain.pretrain(model, task, config, device_config, out / "pretrain", metadata, **cli.saving(flags))


def adapting_flags(argv):
    p = cli.adapting_parser("train_vit.py", __doc__, DATA, "a name such as vit_b_16, dinov2_vits14")
    p.flag("--head-lr", "X", cli.number(0, float, True), "learning rate of the head",
           shown=f"{ADAPT['head_lr']:g}; for the method head: a tuned one")
    p.flag("--per-class", "N", cli.number(2), "images per class of a real dataset, a fifth of them for validation",
           shown="50; papers: 10")
    p.flag("--val-per-class", "N", cli.number(1), "validation images per class, in addition to --per-class",
           shown="a fifth of --per-class")
    p.add_argument("--no-augment", action="store_true",
                   help="do not mirror and shift natural images (default: augment)")
    p.flag("--image-size", "N", cli.number(1), "side of the images in pixels", shown="by --init")
    flags = p.parse_args(argv)
    if flags.init is None and (flags.image_size or flags.n_head):
        p.error("--image-size and --n-head belong to the base model that --init loads: add --init")
    if flags.init is None and (flags.base_data or DATA.get(flags.data)) is None:
        p.error(f"there is no dataset for pretraining a base model for --data {flags.data}: give --init vit_b_16, a "
                "model file, or --base-data")
    if (flags.per_class or flags.val_per_class) and flags.data == "glyphs":
        p.error("--per-class and --val-per-class belong to real datasets; the glyphs have 50 images per class")
    return flags


def pretraining_flags(argv):
    sizes = {"image_size": None, "patch_size": None, **MODEL}
    return cli.pretraining_parser("train_vit.py", "Train a ViT from scratch.", DATA, **sizes).parse_args(argv)


def new_base(flags, data, device_config):
    """Return an untrained ViT for a dataset, its task and its metadata."""
    source = open_images("glyphs A" if data == "glyphs" else data, flags.data_dir, flags.seed)
    print(describe(source))
    side = min(source.side or 32, 32)
    sizes = {"image_size": side, "patch_size": side // 4, **MODEL}
    config = ViTConfig(in_channels=len(source.mean), num_classes=len(source.classes), mean=source.mean, std=source.std,
                       **sizes | cli.given(flags, *sizes))
    torch.manual_seed(flags.seed)
    model = ViT(config)
    metadata = {"data": source.name, "data_seed": flags.seed, "classes": source.classes, "published": False}
    return model, ImageClassification(source, flags.seed, config, device_config.device), metadata


def save_predictions(out, task, rows):
    """Save out/predictions.png: test images with the predictions of the linear probe and of the best adapter."""
    head = next((r["sample"] for r in rows if r["method"] == "head"), None)
    best = report.best_of(rows, lambda spec: spec not in ("head", "full"))
    if best is not None:
        save_grid(out / "predictions.png", *task.samples(), head, best["sample"], task.classes)
        before = "before (linear probe) and " if head else ""
        print(f"{out / 'predictions.png'}: test images with predictions {before}after {best['method']}")


if __name__ == "__main__":
    sys.exit(main())
