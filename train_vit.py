"""Adapt a ViT by several methods, with several seeds, and compare them."""

import sys
from dataclasses import replace

import torch

from svmini import ViT, ViTConfig, analyze, cli, model_file
from svmini.data.image_datasets import IMAGE_DATASETS, open_images
from svmini.data.images import ImageClassification, describe, save_grid
from svmini.training import compare, pretrain, report
from svmini.training.loop import TrainConfig
from svmini.training.device import resolve_device
from svmini.training.learning_rates import VIT_LEARNING_RATES as LEARNING_RATES

# what --data names, to adapt to: what a base for it is pretrained on, where no --init brings one
DATA = {"glyphs": "glyphs", **{name: dataset.base_data for name, dataset in IMAGE_DATASETS.items()}, "folder:PATH": None}
MODEL = {"n_layer": 4, "n_head": 4, "d_model": 128}   # of a base of one's own
# a large weight decay, so that the weights are learned and not still their random start: docs/results.md
PRETRAIN = TrainConfig(steps=1600, lr=2e-3, batch_size=32, warmup_ratio=0.05, schedule="cosine", weight_decay=2.0,
                    betas=(0.9, 0.98))
ADAPT = TrainConfig(steps=200, lr=0.0, batch_size=32, head_lr=4e-3)   # lr: from LEARNING_RATES, spec by spec
MAIN = ["head", "full", "svfit", "svft:pattern=plain", "svft:off_diagonals=2", "svft:off_diagonals=8",
        "lora:rank=1", "lora:rank=2", "lora:rank=8", "dora:rank=8", "vera:rank=256"]
QUICK = ["head", "full", "svft:off_diagonals=8", "lora:rank=8"]


def main(argv=None):
    return cli.run_command(adapt_and_compare, argv, pretrain=pretrain_alone)


def adapt_and_compare(argv):
    """One run, to be read downwards: the data, the base, for each seed and method adapt, train, test; the table."""
    flags = adapting_flags(argv)
    device_config, out = resolve_device(flags.device, flags.dtype, flags.compile), cli.out_folder(flags, "vit")
    print(device_config.reason)
    source = open_adaptation_images(flags)                      # what is missing is found out now
    print(describe(source))
    if flags.init:
        base, metadata = model_file.load_base(flags.init, ViT, flags.n_head)
        if flags.image_size:
            base.set_input_size(flags.image_size)
    else:
        base, base_task, metadata = new_base(flags, flags.base_data or DATA[flags.data], device_config)
    specs = compare.all_specs(MAIN, base, flags.targets) if flags.methods == ["all"] else flags.methods or (
        QUICK if flags.quick else MAIN)
    tuned = LEARNING_RATES["published"] if metadata["published"] else LEARNING_RATES["glyphs"] | LEARNING_RATES.get(flags.data, {})
    learning_rates = compare.plan(specs, base, flags.targets, tuned, flags.lr)           # specs that do not fit end here
    print(compare.describe_targets(base, flags.targets))
    if not flags.init:
        train_config = replace(PRETRAIN, steps=PRETRAIN.steps // (4 if flags.quick else 1), seed=flags.seed)
        base, metadata = pretrain.pretrain(base, base_task, train_config, device_config, out / "pretrain", metadata,
                                        resume=flags.resume, save_every=flags.save_every)
    base.reset_classifier(len(source.classes))
    steps = flags.steps or ADAPT.steps // (2 if flags.quick else 1)
    train_config = replace(ADAPT, steps=steps, **cli.given(flags, "batch_size", "grad_accum_steps", "head_lr"))
    seeds = range(flags.seed, flags.seed + flags.seeds)
    if not flags.resume:
        compare.delete_runs(learning_rates, seeds, out)
    rows, found = [], None
    for seed in seeds:
        task = ImageClassification(source, seed, base.config, device_config.device, not flags.no_augment)
        train_config = replace(train_config, seed=seed)
        if seed == flags.seed and flags.lr_sweep:
            found = compare.lr_sweep(learning_rates, base, task, train_config, device_config, out, flags.lr_sweep, flags.resume)
            print("\n".join([f"learning learning rates by {task.metric} on validation pictures:", *report.lr_sweep_lines(found)]))
            learning_rates = {spec: found[spec]["best"] or lr for spec, lr in learning_rates.items()}
        for spec, lr in learning_rates.items():
            rows.append(compare.run(
                spec, base, task, replace(train_config, lr=lr), device_config, out, resume=flags.resume,
                save_every=flags.save_every, eval_every=flags.eval_every, metadata=adapter_metadata(task, base, flags.seed),
                base_metadata=metadata))
            print(report.line(rows[-1]))
    compare.fill_gap_recovered(rows)
    report.write(out, rows, {"task": task.name, "device": device_config.reason, "steps": train_config.steps, "base": metadata,
                             **task.data_config}, found)
    analyze.draw_best(out, rows, base)
    if flags.quick:
        print("a check that everything runs: this base is hardly trained, the order of its rows means nothing")
    save_predictions(out, task, rows)


def pretrain_alone(argv):
    flags = pretraining_flags(argv)
    device_config, out = resolve_device(flags.device, flags.dtype, flags.compile), cli.out_folder(flags, "vit")
    print(device_config.reason)
    model, task, metadata = new_base(flags, flags.data, device_config, flags)
    train_config = replace(PRETRAIN, seed=flags.seed,
                       **cli.given(flags, "steps", "lr", "batch_size", "weight_decay", "grad_accum_steps"))
    pretrain.pretrain(model, task, train_config, device_config, out / "pretrain", metadata, resume=flags.resume,
                      save_every=flags.save_every, eval_every=flags.eval_every)


def adapting_flags(argv):
    p = cli.adapting_parser("train_vit.py", __doc__, DATA, "a name such as vit_b_16, dinov2_vits14")
    p.add_argument("--head-lr", type=cli.number(0, float, True), metavar="X", help="learning rate of the head")
    p.add_argument("--per-class", type=cli.number(2), metavar="N",
                   help="pictures a class of real data, a fifth of them to validate (50; papers: 10)")
    p.add_argument("--val-per-class", type=cli.number(1), metavar="N",
                   help="validate on N other pictures of each class instead, as --lr-sweep should where they are few")
    p.add_argument("--no-augment", action="store_true", help="no mirroring and shifting of natural pictures")
    p.add_argument("--image-size", type=cli.number(1), metavar="N", help="side of the pictures for --init")
    flags = p.parse_args(argv)
    if flags.init is None and (flags.image_size or flags.n_head):
        p.error("--image-size and --n-head speak of the model that --init brings")
    if flags.init is None and (flags.base_data or DATA.get(flags.data)) is None:
        p.error(f"for --data {flags.data} no base is pretrained: give --init vit_b_16, a model file, or --base-data")
    if (flags.per_class or flags.val_per_class) and flags.data == "glyphs":
        p.error("--per-class and --val-per-class belong to real data; the glyphs have 50 a class")
    return flags


def pretraining_flags(argv):
    p = cli.pretraining_parser("train_vit.py", "Train a ViT from scratch.", DATA, image_size=None,
                                        patch_size=None, **MODEL)
    return p.parse_args(argv)


def open_adaptation_images(flags):
    """The pictures to adapt to. The spec glyphs means two sets: A to pretrain on, B to adapt to."""
    if flags.data == "glyphs":
        return open_images("glyphs B", None, flags.seed)
    return open_images(flags.data, flags.data_dir, flags.seed, flags.per_class or 50, flags.val_per_class)


def new_base(flags, data, device_config, sizes=None):
    """An untrained ViT for pictures that `data` names, its task, and what is to be said about it. sizes: flags of
    pretrain."""
    source = open_images("glyphs A" if data == "glyphs" else data, flags.data_dir, flags.seed)
    print(describe(source))
    image_size = (sizes and sizes.image_size) or min(source.side or 32, 32)
    patch_size = (sizes and sizes.patch_size) or min(source.side or 32, 32) // 4
    shape = MODEL if sizes is None else cli.given(sizes, *MODEL)
    config = ViTConfig(image_size, patch_size, len(source.mean), len(source.classes), **shape,
                       mean=source.mean, std=source.std)
    torch.manual_seed(flags.seed)
    model = ViT(config)
    metadata = {"data": source.name, "data_seed": flags.seed, "classes": source.classes, "published": False}
    return model, ImageClassification(source, flags.seed, config, device_config.device), metadata


def adapter_metadata(task, base, data_seed):
    """What an adapter's file says of itself, so that svmini.predict finds the data and names the classes."""
    return {"data": task.name, "data_seed": data_seed, "image_size": base.config.image_size, "classes": task.classes}


def save_predictions(out, task, rows):
    """out/predictions.png: test pictures, and what a head alone and the best adapter of the first seed take them for."""
    first = [r for r in rows if r["seed"] == rows[0]["seed"] and r["sample"]]
    head = next((r["sample"] for r in first if r["method"] == "head"), None)
    best = max((r for r in first if r["method"] not in ("head", "full")), key=lambda r: r["metric"], default=None)
    if best is not None:
        save_grid(out / "predictions.png", *task.samples(), head, best["sample"], task.classes)
        before = "before is the head alone, " if head else ""
        print(f"{out / 'predictions.png'}: test pictures, {before}after {best['method']}")


if __name__ == "__main__":
    sys.exit(main())
