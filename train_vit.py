"""Pretrain a small ViT or take a published one, adapt it by every method, compare: python train_vit.py --help."""

import sys
from dataclasses import replace
from functools import lru_cache

import torch
import torch.nn.functional as F

from svmini import ViT, ViTConfig, cli, compare, files, glyphs, images, load_adapter, loop, picture_sets, rng, vit

COMMANDS = ("pretrain", "finetune", "compare", "predict", "merge")
DATA = {   # what --data names, to adapt to: the set to pretrain on where no --init brings a model
    "glyphs": "glyphs A", "mnist": "fashionmnist", "fashionmnist": "mnist", "cifar10": "cifar100",
    "cifar100": "cifar10", "eurosat": None, "flowers102": None, "food101": None, "folder:PATH": None,
}
SIZE = {"glyphs A": (24, 6), "mnist": (28, 7), "fashionmnist": (28, 7), "cifar10": (32, 8), "cifar100": (32, 8)}
PRETRAIN = loop.Settings(steps=2000, lr=1e-3, batch_size=32, warmup=0.05, schedule="cosine",
                         weight_decay=0.05, betas=(0.9, 0.98))
FINETUNE = loop.Settings(steps=200, lr=0.0, batch_size=32, head_lr=4e-3)   # lr: put in from RATES, word by word
MAIN = ["head", "full", "svfit", "svft:pattern=plain", "svft:off_diagonals=2", "svft:off_diagonals=8",
        "lora:rank=1", "lora:rank=2", "lora:rank=8", "dora:rank=8", "vera:rank=256"]
QUICK = ["head", "full", "svft:off_diagonals=8", "lora:rank=8"]
RATES = {   # learning rates
    # found by: python train_vit.py compare --methods ... --tune 5
    "glyphs": {
        "head": 8e-2, "full": 1e-3, "svfit": 6e-2, "svft:pattern=plain": 6e-2, "svft:off_diagonals=2": 2.5e-2,
        "svft:off_diagonals=8": 1e-2, "lora:rank=1": 2e-2, "lora:rank=2": 1e-2, "lora:rank=8": 5e-3,
        "dora:rank=8": 5e-3, "vera:rank=256": 5e-2},
    # likewise with --data mnist or fashionmnist, on 100 validation pictures (--per-class 50)
    "mnist": {
        "head": 8e-2, "full": 1e-3, "svfit": 1.2e-1, "svft:pattern=plain": 2.4e-1, "svft:off_diagonals=2": 1.25e-2,
        "svft:off_diagonals=8": 1e-2, "lora:rank=1": 2e-2, "lora:rank=2": 1e-2, "lora:rank=8": 1e-2,
        "dora:rank=8": 5e-3, "vera:rank=256": 2.5e-2},
    "fashionmnist": {
        "head": 4e-2, "full": 2e-3, "svfit": 6e-2, "svft:pattern=plain": 6e-2, "svft:off_diagonals=2": 5e-2,
        "svft:off_diagonals=8": 5e-3, "lora:rank=1": 1e-2, "lora:rank=2": 1.25e-3, "lora:rank=8": 2.5e-3,
        "dora:rank=8": 1e-2, "vera:rank=256": 5e-2},
    # for published weights: those of the SVFT authors' scripts for ViT-B/16 on CIFAR-100; svfit's is svft plain's
    "published": {
        "head": 4e-3, "full": 4e-5, "svfit": 5e-2, "svft:pattern=plain": 5e-2, "svft:off_diagonals=2": 5e-2,
        "svft:off_diagonals=8": 5e-3, "lora:rank=1": 4e-3, "lora:rank=2": 4e-3, "lora:rank=8": 4e-3,
        "dora:rank=8": 4e-3, "vera:rank=256": 2e-2, "boft:block_size=2,factors=2": 4e-3,
        "boft:block_size=4,factors=4": 4e-3},
}


def flags_of(argv):
    p = cli.parser("train_vit.py", __doc__.split(":")[0], COMMANDS, list(DATA), ("torchvision", "vit_b_16, ..."))
    p.add_argument("--head-lr", type=cli.number(0, float, True), default=None, help="learning rate of the head")
    p.add_argument("--per-class", type=cli.number(2), default=None,
                   help="pictures a class of real data, a fifth of them to validate (50; papers: 10)")
    p.add_argument("--no-shake", action="store_true", help="fine-tuning: no mirroring and shifting of natural pictures")
    p.add_argument("--image-size", type=cli.number(1), default=None, help="side of the pictures for --init's model")
    p.add_argument("--n-layer", type=cli.number(1), default=4, help="of the model that is pretrained")
    p.add_argument("--n-head", type=cli.number(1), default=None,
                   help="of the model that is pretrained (4), or of weights with heads of another width than 64")
    p.add_argument("--d-model", type=cli.number(1), default=128, help="of the model that is pretrained")
    flags = p.parse_args(argv)
    cli.check_flags(p, flags, COMMANDS, list(DATA))
    if flags.head_lr is not None and flags.method == "head":
        raise ValueError("a head alone has one learning rate: give it as --lr")
    if flags.per_class is not None and flags.data == "glyphs":
        raise ValueError("--per-class belongs to real data; the glyphs have 50 a class")
    if flags.image_size is not None and flags.init is None:
        raise ValueError("--image-size speaks of the model that --init brings")
    if flags.init is None and DATA.get(flags.data) is None:
        raise ValueError(f"--data {flags.data} is no set to pretrain for: give --init vit_b_16, or a model file")
    return flags


def open_data(flags, name, size, out):
    """A function draw(seed, per_class) -> Pictures of the set called name, for a model of this image size."""
    if name.startswith("glyphs"):   # drawn by --seed, so that every method and seed meets the same
        pictures = glyphs.glyphs(name[-1], seed=flags.seed, cache=out)
        return lambda seed, per_class: pictures
    return picture_sets.RealPictures(name, flags.data_dir, size).draw


def target(flags):
    """The name of the set to adapt to, as results and files have it."""
    return "glyphs B" if flags.data == "glyphs" else flags.data


def picture_task(pictures, about, size, device, shake=False):
    """Classification of pictures as a loop.Task: cross entropy, accuracy in percent.

    about: of the model, with the mean and std it expects. Small sets lie on the device, large ones come to it batch
    by batch, as bytes.
    """
    def near(x):
        return x.to(device) if x.numel() < 2**30 else x

    splits = {split: (near(x), near(y)) for split, (x, y) in pictures.splits.items()}
    chunk = 500 if size < 100 else 64

    def show(x):
        return images.prepare(x.to(device, non_blocking=True), size, about["mean"], about["std"])

    def batch(n, seed, step):
        x, y = images.batch(*splits["train"], n, seed, step)
        x = show(x)
        return (images.shake(x, seed, step) if shake and pictures.natural else x), y

    def evaluate(model, split):
        x, y = splits[split]
        logits = torch.cat([model(show(part)).float() for part in x.split(chunk)])      # (N, classes)
        y = y.to(device)
        return {"loss": F.cross_entropy(logits, y).item(),
                "metric": 100 * (logits.argmax(dim=1) == y).double().mean().item()}

    return loop.Task(name=pictures.name, metric_name="accuracy", higher_is_better=True, evaluate=evaluate, batch=batch,
                     loss=lambda model, x, y: F.cross_entropy(model(x), y))


def base_of(flags):
    """The model of --init, at --image-size. Returns (model, about)."""
    model, about = loop.load_base(flags.init, ViT, vit.torchvision_urls(), ViT.from_torchvision, flags.n_head)
    if about["published"]:
        about |= {"mean": images.IMAGENET[0], "std": images.IMAGENET[1]}
    if not {"data", "mean", "std"} <= about.keys():
        raise ValueError(f"{flags.init} does not say which pictures it was trained on, with which mean and std: "
                         "pretrain it again")
    if flags.image_size is not None:
        model.new_size(flags.image_size)
    return model, about


def pretrained(flags, out, machine):
    """The base model of an earlier run in out, or one that is pretrained now. Returns (model, about)."""
    which = DATA[flags.data]
    size, patch = SIZE[which]
    pictures = open_data(flags, which, size, out)(flags.seed, None)
    config = ViTConfig(size, patch, len(pictures.mean), len(pictures.classes),
                       flags.n_layer, flags.n_head or 4, flags.d_model)
    settings = cli.pretrain_settings(flags, PRETRAIN)
    about = {"data": pictures.name, "classes": pictures.classes, "mean": pictures.mean, "std": pictures.std,
             "published": False}
    torch.manual_seed(flags.seed)
    model = ViT(config)
    if flags.command != "pretrain":
        compare.check_words(compare.words_of(flags, MAIN, QUICK), model, flags.targets)
    task = picture_task(pictures, about, size, machine.device, shake=True)
    return loop.pretrain(model, task, settings, machine, out / "pretrain", about, flags.resume)


def make_setup(flags, out, machine):
    """What `compare` needs: the base with a fresh head, the pictures to adapt to, settings and rates."""
    given = base_of(flags) if flags.init is not None else None
    size = given[0].config.image_size if given else SIZE[DATA[flags.data]][0]
    draw = open_data(flags, target(flags), size, out)   # before pretraining: it may fail
    per_class = None if flags.data == "glyphs" else flags.per_class or 50
    pictures = draw(flags.seed, per_class)
    base, about = given or pretrained(flags, out, machine)
    base.new_head(len(pictures.classes))

    @lru_cache(maxsize=2)   # the first seed's, which every row asks for, and the one at work
    def task_of(seed):   # few pictures a class are drawn anew for every seed
        drawn = pictures if seed == flags.seed else draw(seed, per_class)
        return picture_task(drawn, about, size, machine.device, shake=not flags.no_shake)

    def sample(model):
        return guesses(model, shown(pictures)[0], about, machine.device)

    settings = cli.finetune_settings(flags, FINETUNE)
    settings = replace(settings, head_lr=flags.head_lr or settings.head_lr)
    rates = RATES["published"] if about["published"] else RATES.get(flags.data, RATES["glyphs"])
    run = {"data": pictures.name, "sha256": files.sha256_of(pictures.splits["test"][0]), "per_class": per_class,
           "shake": pictures.natural and not flags.no_shake}
    setup = compare.Setup(base, task_of, settings, machine, out, flags.targets, rates, sample,
                          about=about_adapted(about, flags), run=run, resume=flags.resume, lr=flags.lr)
    return setup, pictures


def about_adapted(about, flags):
    """What a model file of the adapted model says about itself, from what the base's said."""
    return {k: about[k] for k in ("mean", "std", "published")} | {"data": target(flags)}


def shown(pictures):
    """24 test pictures for a reader, the same every time: images (24, C, H, W), labels (24,)."""
    x, y = pictures.splits["test"]
    some = torch.randperm(len(y), generator=rng.generator("shown"))[:24]
    return x[some], y[some]


@torch.no_grad()
def guesses(model, x, about, device):
    """What the model takes pictures x (N, C, H, W) for: N class indices."""
    x = images.prepare(x.to(device), model.config.image_size, about["mean"], about["std"])
    return model.eval()(x).argmax(dim=1).tolist()


def save_picture(out, pictures, rows):
    """out/pictures.png: test pictures, taken for what by a head alone and by the best adapter of the first seed."""
    first = [r for r in rows if r["seed"] == rows[0]["seed"] and r["metric"] is not None]
    head = next((r for r in first if r["method"] == "head"), None)
    best = max((r for r in first if r["method"] not in ("head", "full")), key=lambda r: r["metric"], default=None)
    if best is None:
        return
    x, y = shown(pictures)
    images.save_grid(out / "pictures.png", x, y.tolist(), head and head["sample"], best["sample"],
                     pictures.classes)
    before = "before (head alone) and " if head else ""
    print(f"{out / 'pictures.png'}: test pictures {before}after ({best['method']})")


def predict(flags, out, machine):
    """Accuracy on a test split, and a picture of examples: of a model file on its own data, or, with an adapter, on
    the data to adapt to."""
    model, about = model_of(flags)
    size = model.config.image_size
    pictures = open_data(flags, about["data"], size, out)(flags.seed, 2)   # the test split is whole
    model.to(machine.device)
    task = picture_task(pictures, about, size, machine.device)
    with machine.autocast():
        scores = loop.evaluate(model, task, "test")
    x, y = shown(pictures)
    images.save_grid(out / "predictions.png", x, y.tolist(), None, guesses(model, x, about, machine.device),
                     pictures.classes)
    print(f"{pictures.name}: accuracy {scores['metric']:.1f} on {len(pictures.splits['test'][1])} test pictures; "
          f"{out / 'predictions.png'}")


def model_of(flags):
    """The model of --init, with --adapter on it where that is given. Returns (model, about)."""
    model, about = base_of(flags)
    known = (target(flags), DATA[flags.data]) if flags.data in DATA else (target(flags),)
    source = flags.init
    if flags.adapter is not None:
        content, source = files.load(flags.adapter, "adapter"), flags.adapter
        head = content["head"]
        if head is not None and len(head["bias"]) != model.config.num_classes:
            model.new_head(len(head["bias"]))
        load_adapter(model, flags.adapter)
        about = about_adapted(about, flags) | content.get("about", {})
    if about["data"] not in known:
        raise ValueError(f"{source} was trained on {about['data']}, which does not go with --data {flags.data}")
    return model, about


def main(argv=None):
    return cli.run(command, argv)


def command(argv):
    flags = flags_of(argv)
    machine = loop.pick_machine(flags.device, flags.dtype, flags.compile)
    out = cli.out_folder(flags, "out/vit-" + compare.slug(flags.data))
    print(machine.reason)
    if flags.command == "pretrain":
        pretrained(flags, out, machine)
    elif flags.command == "predict":
        predict(flags, out, machine)
    elif flags.command == "merge":
        loop.save_merged(*model_of(flags), out, flags.format, ViT.to_torchvision)
    else:
        setup, pictures = make_setup(flags, out, machine)
        rows = compare.run_command(flags, setup, MAIN, QUICK)
        save_picture(out, pictures, rows)


if __name__ == "__main__":
    sys.exit(main())
