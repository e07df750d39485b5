"""Pretrain a small ViT, adapt it to another task by every method, compare: python train_vit.py --help."""

import sys
from dataclasses import replace

import torch
import torch.nn.functional as F

from svmini import ViT, ViTConfig, cli, compare, files, images, load_adapter, loop

COMMANDS = ("pretrain", "finetune", "compare", "predict", "merge")
DATA = {   # what --data names: (the set to pretrain on, the set to adapt to)
    "glyphs": ("A", "B"), "mnist": ("fashionmnist", "mnist"), "fashionmnist": ("mnist", "fashionmnist"),
}
PATCH = {24: 6, 28: 7}   # patch size for an image size: 4 x 4 patches either way
PRETRAIN = loop.Settings(steps=2000, lr=1e-3, batch_size=32, warmup=0.05, schedule="cosine",
                         weight_decay=0.05, betas=(0.9, 0.98))
FINETUNE = loop.Settings(steps=200, lr=0.0, batch_size=32, head_lr=4e-3)   # lr: put in from RATES, word by word
MAIN = ["head", "full", "svfit", "svft:pattern=plain", "svft:off_diagonals=2", "svft:off_diagonals=8",
        "lora:rank=1", "lora:rank=2", "lora:rank=8", "dora:rank=8", "vera:rank=256"]
QUICK = ["head", "full", "svft:off_diagonals=8", "lora:rank=8"]
RATES = {   # learning rates, found by: python train_vit.py compare --methods ... --tune 5
    "head": 8e-2, "full": 1e-3, "svfit": 6e-2, "svft:pattern=plain": 6e-2, "svft:off_diagonals=2": 2.5e-2,
    "svft:off_diagonals=8": 1e-2, "lora:rank=1": 2e-2, "lora:rank=2": 1e-2, "lora:rank=8": 5e-3,
    "dora:rank=8": 5e-3, "vera:rank=256": 5e-2,
}


def flags_of(argv):
    p = cli.parser("train_vit.py", __doc__.split(":")[0], COMMANDS, list(DATA))
    p.add_argument("--head-lr", type=cli.number(0, float, True), default=None, help="learning rate of the head")
    p.add_argument("--per-class", type=cli.number(1), default=None, help="training pictures a class of real data (50)")
    p.add_argument("--n-layer", type=cli.number(1), default=4, help="of the model that is pretrained")
    p.add_argument("--n-head", type=cli.number(1), default=4, help="of the model that is pretrained")
    p.add_argument("--d-model", type=cli.number(1), default=128, help="of the model that is pretrained")
    flags = p.parse_args(argv)
    cli.check_flags(p, flags, COMMANDS, list(DATA))
    if flags.head_lr is not None and flags.method == "head":
        raise ValueError("a head alone has one learning rate: give it as --lr")
    if flags.per_class is not None and flags.data == "glyphs":
        raise ValueError("--per-class belongs to real data; the glyphs have 50 a class")
    return flags


def set_name(flags, i):
    """The name of the set to pretrain on (i = 0) or to adapt to (1), as model files hold it."""
    which = DATA[flags.data][i]
    return f"glyphs {which}" if flags.data == "glyphs" else which


def load_data(flags, which, out, per_class):
    if flags.data == "glyphs":
        return images.glyphs(which, seed=flags.seed, cache=out)
    return images.load_pictures(which, flags.data_dir, seed=flags.seed, per_class=per_class)


def picture_task(pictures, device):
    """Classification of pictures as a loop.Task: cross entropy, accuracy in percent."""
    splits = {split: (x.to(device), y.to(device)) for split, (x, y) in pictures.splits.items()}

    def evaluate(model, split):
        x, y = splits[split]
        logits = torch.cat([model(part).float() for part in x.split(500)])      # (N, classes)
        return {"loss": F.cross_entropy(logits, y).item(),
                "metric": 100 * (logits.argmax(dim=1) == y).double().mean().item()}

    return loop.Task(
        name=pictures.name, metric_name="accuracy", higher_is_better=True, evaluate=evaluate,
        batch=lambda size, seed, step: images.batch(*splits["train"], size, seed, step),
        loss=lambda model, x, y: F.cross_entropy(model(x), y))


def pretrained(flags, out, machine):
    """The base model: from --init, from an earlier run in out, or pretrained now. Returns (model, about)."""
    if flags.init is not None:
        return loop.load_model(flags.init, ViT)
    which = DATA[flags.data][0]
    pictures = load_data(flags, which, out, per_class=None)
    size, channels = pictures.splits["train"][0].shape[-1], pictures.splits["train"][0].shape[1]
    config = ViTConfig(size, PATCH[size], channels, len(pictures.classes), flags.n_layer, flags.n_head, flags.d_model)
    settings = cli.pretrain_settings(flags, PRETRAIN)
    about = {"data": pictures.name, "classes": pictures.classes}
    torch.manual_seed(flags.seed)
    model = ViT(config)
    if flags.command != "pretrain":
        compare.check_words(compare.words_of(flags, MAIN, QUICK), model, flags.targets)
    return loop.pretrain(model, picture_task(pictures, machine.device), settings, machine,
                         out / "pretrain", about, flags.resume)


def make_setup(flags, out, machine):
    """What `compare` needs: the base with a fresh head, the pictures to adapt to, settings and rates."""
    pictures = load_data(flags, DATA[flags.data][1], out, flags.per_class or 50)   # first: it may fail
    base, _ = pretrained(flags, out, machine)
    base.new_head(len(pictures.classes))
    task = picture_task(pictures, machine.device)
    x, y = (t.to(machine.device) for t in pictures.splits["test"])
    settings = cli.finetune_settings(flags, FINETUNE)
    settings = replace(settings, head_lr=flags.head_lr or settings.head_lr)

    @torch.no_grad()
    def sample(model):   # what the model takes the first test pictures for
        return model.eval()(x[:24]).argmax(dim=1).tolist()

    sha = files.sha256_of(pictures.splits["train"][0])
    setup = compare.Setup(base, task, settings, machine, out, flags.targets, RATES, sample,
                          about={"data": pictures.name, "classes": pictures.classes},
                          run={"data": pictures.name, "sha256": sha}, resume=flags.resume, lr=flags.lr)
    return setup, pictures


def save_picture(out, pictures, rows):
    """out/pictures.png: test pictures, taken for what by a head alone and by the best adapter of the first seed."""
    first = [r for r in rows if r["seed"] == rows[0]["seed"] and r["metric"] is not None]
    head = next((r for r in first if r["method"] == "head"), None)
    best = max((r for r in first if r["method"] not in ("head", "full")), key=lambda r: r["metric"], default=None)
    if best is None:
        return
    x, y = pictures.splits["test"]
    images.save_grid(out / "pictures.png", x[:24], y[:24].tolist(), head and head["sample"], best["sample"],
                     pictures.classes)
    before = "before (head alone) and " if head else ""
    print(f"{out / 'pictures.png'}: test pictures {before}after ({best['method']})")


def predict(flags, out, machine):
    """Accuracy on a test split, and a picture of examples: of a model file on its own data, or, with an adapter, on
    the data to adapt to."""
    model, about = model_of(flags)
    sets = {set_name(flags, i): DATA[flags.data][i] for i in (0, 1)}
    pictures = load_data(flags, sets[about["data"]], out, flags.per_class or 50)
    model.to(machine.device)
    scores = loop.evaluate(model, picture_task(pictures, machine.device), "test")
    with torch.no_grad():
        guesses = model.eval()(pictures.splits["test"][0][:24].to(machine.device)).argmax(dim=1).tolist()
    x, y = pictures.splits["test"]
    images.save_grid(out / "predictions.png", x[:24], y[:24].tolist(), None, guesses, pictures.classes)
    print(f"{pictures.name}: accuracy {scores['metric']:.1f} on {len(y)} test pictures; {out / 'predictions.png'}")


def model_of(flags):
    """The model of --init, with --adapter on it where that is given. Returns (model, about)."""
    model, about = loop.load_model(flags.init, ViT)
    if about["data"] not in (set_name(flags, 0), set_name(flags, 1)):
        raise ValueError(f"{flags.init} was trained on {about['data']}, which does not go with --data {flags.data}")
    if flags.adapter is not None:
        head = files.load(flags.adapter, "adapter")["head"]
        if head is not None and len(head["bias"]) != model.config.num_classes:
            model.new_head(len(head["bias"]))
        load_adapter(model, flags.adapter)
        about = {"data": set_name(flags, 1)}
    return model, about


def main(argv=None):
    return cli.run(command, argv)


def command(argv):
    flags = flags_of(argv)
    machine = loop.pick_machine(flags.device, flags.dtype)
    out = cli.out_folder(flags, f"out/vit-{flags.data}")
    print(machine.reason)
    if flags.command == "pretrain":
        pretrained(flags, out, machine)
    elif flags.command == "predict":
        predict(flags, out, machine)
    elif flags.command == "merge":
        loop.save_merged(*model_of(flags), out / "merged.pt")
    else:
        setup, pictures = make_setup(flags, out, machine)
        rows = compare.run_command(flags, setup, MAIN, QUICK)
        save_picture(out, pictures, rows)


if __name__ == "__main__":
    sys.exit(main())
