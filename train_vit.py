"""Adapt a ViT by several methods, with several seeds, and compare them."""

import sys
from dataclasses import replace

import torch

from svmini import ViT, ViTConfig, command_line, learned, model_file
from svmini.data.picture_sets import REAL, open_pictures
from svmini.data.pictures import Pictures, save_grid
from svmini.training import compare, pretrain, report
from svmini.training.loop import Settings
from svmini.training.machine import pick_machine
from svmini.training.rates import VIT as RATES

# what --data names, to adapt to: what a base for it is pretrained on, where no --init brings one
DATA = {"glyphs": "glyphs", **{word: real.base for word, real in REAL.items()}, "folder:PATH": None}
SIZES = {"glyphs": (24, 6), "mnist": (28, 7), "fashionmnist": (28, 7)}   # image and patch; others: 32 and 8
MODEL = {"n_layer": 4, "n_head": 4, "d_model": 128}   # of a base of one's own
# a large weight decay, so that the weights are learned and not still their random start: docs/results.md
PRETRAIN = Settings(steps=1600, lr=2e-3, batch_size=32, warmup=0.05, schedule="cosine", weight_decay=2.0,
                    betas=(0.9, 0.98))
ADAPT = Settings(steps=200, lr=0.0, batch_size=32, head_lr=4e-3)   # lr: from RATES, word by word
MAIN = ["head", "full", "svfit", "svft:pattern=plain", "svft:off_diagonals=2", "svft:off_diagonals=8",
        "lora:rank=1", "lora:rank=2", "lora:rank=8", "dora:rank=8", "vera:rank=256"]
QUICK = ["head", "full", "svft:off_diagonals=8", "lora:rank=8"]


def main(argv=None):
    return command_line.run(adapt_and_compare, argv, pretrain=pretrain_alone)


def adapt_and_compare(argv):
    """One run, to be read downwards: the data, the base, for each seed and method adapt, train, test; the table."""
    flags = adapting_flags(argv)
    machine, out = pick_machine(flags.device, flags.dtype, flags.compile), command_line.out_folder(flags, "vit")
    print(machine.reason)
    source = open_adapting_pictures(flags)                      # what is missing is found out now
    if flags.init:
        base, about = model_file.load_base(flags.init, ViT, flags.n_head)
        if flags.image_size:
            base.new_size(flags.image_size)
    else:
        base, base_task, about = new_base(flags, flags.base_data or DATA[flags.data], machine)
    words = compare.all_words(MAIN, base, flags.targets) if flags.methods == ["all"] else flags.methods or (
        QUICK if flags.quick else MAIN)
    tuned = RATES["published"] if about["published"] else RATES["glyphs"] | RATES.get(flags.data, {})
    rates = compare.plan(words, base, flags.targets, tuned, flags.lr)           # words that do not fit end here
    print(compare.adapted_line(base, flags.targets))
    if not flags.init:
        settings = replace(PRETRAIN, steps=PRETRAIN.steps // (4 if flags.quick else 1), seed=flags.seed)
        base, about = pretrain.pretrain(base, base_task, settings, machine, out / "pretrain", about,
                                        resume=flags.resume, save_every=flags.save_every)
    base.new_head(len(source.classes))
    steps = flags.steps or ADAPT.steps // (2 if flags.quick else 1)
    settings = replace(ADAPT, steps=steps, **command_line.given(flags, "batch_size", "accumulate", "head_lr"))
    seeds = range(flags.seed, flags.seed + flags.seeds)
    if not flags.resume:
        compare.begin_anew(rates, seeds, out)
    rows, found = [], None
    for seed in seeds:
        task = Pictures(source, seed, base.config, machine.device, not flags.no_shake)
        settings = replace(settings, seed=seed)
        if seed == flags.seed and flags.tune:
            found = compare.tune(rates, base, task, settings, machine, out, flags.tune, flags.resume)
            print("\n".join([f"learning rates by {task.metric} on validation pictures:", *report.tuning_lines(found)]))
            rates = {word: found[word]["best"] or lr for word, lr in rates.items()}
        for word, lr in rates.items():
            rows.append(compare.run(
                word, base, task, replace(settings, lr=lr), machine, out, resume=flags.resume,
                save_every=flags.save_every, eval_every=flags.eval_every, about=about_adapted(task, base),
                about_base=about))
            print(report.line(rows[-1]))
    compare.recover(rows)
    report.write(out, rows, {"task": task.name, "device": machine.reason, "steps": settings.steps, "base": about,
                             **task.facts}, found)
    learned.draw_best(out, rows, base)
    if flags.quick:
        print("a check that everything runs: this base is hardly trained, the order of its rows means nothing")
    save_pictures(out, task, rows)


def pretrain_alone(argv):
    flags = pretraining_flags(argv)
    machine, out = pick_machine(flags.device, flags.dtype, flags.compile), command_line.out_folder(flags, "vit")
    print(machine.reason)
    model, task, about = new_base(flags, flags.data, machine, flags)
    settings = replace(PRETRAIN, seed=flags.seed,
                       **command_line.given(flags, "steps", "lr", "batch_size", "weight_decay", "accumulate"))
    pretrain.pretrain(model, task, settings, machine, out / "pretrain", about, resume=flags.resume,
                      save_every=flags.save_every, eval_every=flags.eval_every)


def adapting_flags(argv):
    p = command_line.adapting_parser("train_vit.py", __doc__, DATA, "a name such as vit_b_16, dinov2_vits14")
    p.add_argument("--head-lr", type=command_line.number(0, float, True), metavar="X", help="learning rate of the head")
    p.add_argument("--per-class", type=command_line.number(2), metavar="N",
                   help="pictures a class of real data, a fifth of them to validate (50; papers: 10)")
    p.add_argument("--val-per-class", type=command_line.number(1), metavar="N",
                   help="validate on N other pictures of each class instead, as --tune should where they are few")
    p.add_argument("--no-shake", action="store_true", help="no mirroring and shifting of natural pictures")
    p.add_argument("--image-size", type=command_line.number(1), metavar="N", help="side of the pictures for --init")
    flags = p.parse_args(argv)
    if flags.init is None and (flags.image_size or flags.n_head):
        p.error("--image-size and --n-head speak of the model that --init brings")
    if flags.init is None and (flags.base_data or DATA.get(flags.data)) is None:
        p.error(f"for --data {flags.data} no base is pretrained: give --init vit_b_16, a model file, or --base-data")
    if (flags.per_class or flags.val_per_class) and flags.data == "glyphs":
        p.error("--per-class and --val-per-class belong to real data; the glyphs have 50 a class")
    return flags


def pretraining_flags(argv):
    p = command_line.pretraining_parser("train_vit.py", "Train a ViT from scratch.", DATA, image_size=None,
                                        patch_size=None, **MODEL)
    return p.parse_args(argv)


def open_adapting_pictures(flags):
    """The pictures to adapt to. The word glyphs means two sets: A to pretrain on, B to adapt to."""
    if flags.data == "glyphs":
        return open_pictures("glyphs B", None, flags.seed)
    return open_pictures(flags.data, flags.data_dir, flags.seed, flags.per_class or 50, flags.val_per_class)


def new_base(flags, data, machine, sizes=None):
    """An untrained ViT for pictures that `data` names, its task, and what is to be said about it. sizes: flags of
    pretrain."""
    source = open_pictures("glyphs A" if data == "glyphs" else data, flags.data_dir, flags.seed)
    image_size, patch_size = SIZES.get(data, (32, 8))
    if sizes is not None:
        image_size, patch_size = sizes.image_size or image_size, sizes.patch_size or patch_size
    shape = MODEL if sizes is None else command_line.given(sizes, *MODEL)
    config = ViTConfig(image_size, patch_size, len(source.mean), len(source.classes), **shape,
                       mean=source.mean, std=source.std)
    torch.manual_seed(flags.seed)
    model = ViT(config)
    about = {"data": source.name, "classes": source.classes, "published": False}
    return model, Pictures(source, flags.seed, config, machine.device), about


def about_adapted(task, base):
    """What an adapter's file says of itself, so that svmini.predict finds the data and names the classes."""
    return {"data": task.name, "image_size": base.config.image_size, "classes": task.classes}


def save_pictures(out, task, rows):
    """out/pictures.png: test pictures, and what a head alone and the best adapter of the first seed take them for."""
    first = [r for r in rows if r["seed"] == rows[0]["seed"] and r["sample"]]
    head = next((r["sample"] for r in first if r["method"] == "head"), None)
    best = max((r for r in first if r["method"] not in ("head", "full")), key=lambda r: r["metric"], default=None)
    if best is not None:
        save_grid(out / "pictures.png", *task.shown(), head, best["sample"], task.classes)
        before = "before is the head alone, " if head else ""
        print(f"{out / 'pictures.png'}: test pictures, {before}after {best['method']}")


if __name__ == "__main__":
    sys.exit(main())
