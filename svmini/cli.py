"""The command line that both scripts share: flags, method words, and errors as one line with exit code 2."""

import argparse
import ast
import sys
from dataclasses import replace
from pathlib import Path

import torch

from . import report
from .adapter import METHODS, TARGETS, check_options, nearest, options_of
from .loop import Diverged, Stopped


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, and whose flags are written out and have their help on one line."""

    def __init__(self, script, **more):
        wide = lambda prog: argparse.HelpFormatter(prog, max_help_position=46, width=140)
        super().__init__(f"python {script}", formatter_class=wide, allow_abbrev=False, **more)

    def error(self, message):
        raise ValueError(message + f" (see {self.prog} --help)")


def number(low, kind=int, above=False):
    """An argparse type: a number of at least `low`, or above it."""
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not (value > low if above else value >= low) or value == float("inf") or kind is int and value > 2**62:
            what = "a whole number" if kind is int else "a number"
            limit = f"{'above' if above else 'of at least'} {low}"
            raise argparse.ArgumentTypeError(f"must be {what} {limit}, not {text!r}")
        return value
    return convert


def parser(script, about, commands, data, theirs):
    """The flags of both scripts, each with its help on one line; scripts add their own. theirs: (another format for
    merged models, names of published weights)."""
    p = Parser(script, description=about,
               epilog="A method is one word: full, head, " + ", ".join(METHODS)
               + ", with options and targets: svft:pattern=banded,off_diagonals=8@query,value")
    a = p.add_argument
    a("command", nargs="?", default="story", metavar="command", help=" | ".join(commands) + " (none: the whole story)")
    a("--quick", action="store_true", help="story: four rows in under a minute, from an eighth of the pretraining")
    a("--all", action="store_true", help="story: every method's examples")
    a("--data", default=data[0], metavar="NAME", help=" | ".join(data))
    a("--data-dir", default=None, metavar="DIR", help="where real data lie, or are downloaded to")
    a("--out", default=None, metavar="DIR", help="where results go (default out/vit-DATA or out/gpt-DATA)")
    a("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="where to compute")
    a("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="of autocast")
    a("--seed", type=number(0), default=0, help="of everything that is drawn")
    a("--steps", type=number(1), default=None, help="fine-tuning steps; pretraining steps for pretrain")
    a("--pretrain-steps", type=number(1), default=None, help="pretraining steps where the base is not there yet")
    a("--batch-size", type=number(1), default=None, help="of fine-tuning; of pretraining for pretrain")
    a("--lr", type=number(0, float, True), default=None, help="learning rate in place of the tuned ones")
    a("--targets", default=",".join(TARGETS), metavar="A,B", help="layers to adapt, where a method's word names none")
    a("--method", default=None, metavar="M", help="finetune: the method's word")
    a("--methods", nargs="+", default=None, metavar="M", help="compare: the methods' words")
    a("--seeds", type=number(1), default=1, metavar="N", help="compare, story: runs of every method")
    a("--tune", type=number(1), default=None, metavar="N", help="compare: try N rates, a factor 2 apart, on validation")
    a("--init", default=None, metavar="FILE", help=f"model to start from: a file, or {theirs[1]}")
    a("--adapter", default=None, metavar="FILE", help="adapter file that goes with --init")
    a("--format", default="svmini", choices=("svmini", theirs[0]), help="merge: whose naming the file is in")
    a("--accumulate", type=number(1), default=1, metavar="N", help="parts in which a batch goes through")
    a("--compile", action="store_true", help="training steps through torch.compile")
    a("--save-every", type=number(0), default=0, metavar="N", help="steps between checkpoints (0: at the end)")
    a("--eval-every", type=number(0), default=0, metavar="N", help="steps between evaluations (0: at the end)")
    a("--resume", action="store_true", help="go on where the same command was stopped")
    a("--plot", action="store_true", help="also a picture of metric against parameters (needs matplotlib)")
    a("--debug", action="store_true", help="show the traceback of an error")
    return p


ADAPTING = ("story", "finetune", "compare")
BELONGS = {   # flags that only some commands know
    "quick": ("story",), "all": ("story",), "method": ("finetune",), "methods": ("compare",), "tune": ("compare",),
    "seeds": ("story", "compare"), "plot": ("story", "compare"),
    "adapter": ("generate", "predict", "merge"), "prompt": ("generate",), "length": ("generate",),
    "temperature": ("generate",), "top_k": ("generate",),
    "pretrain_steps": ADAPTING, "head_lr": ADAPTING, "targets": ADAPTING, "per_class": ADAPTING,
    **dict.fromkeys(("lr", "resume", "steps", "batch_size", "save_every", "eval_every", "n_layer", "d_model",
                     "accumulate", "compile"), ("pretrain", *ADAPTING)),
    "n_head": ("pretrain", *ADAPTING, "generate", "predict", "merge"),
    "format": ("merge",), "context": ("pretrain", *ADAPTING), "no_shake": ADAPTING,
    "image_size": (*ADAPTING, "predict", "merge"),
    "init": (*ADAPTING, "generate", "predict", "merge"),
}


def check_flags(p, flags, commands, data):
    """Raise ValueError for what argparse cannot see: words that are not there, and flags that do not go together."""
    if flags.command not in ("story", *commands):
        raise ValueError(f"no command {flags.command!r}{nearest(flags.command, commands)}; "
                         f"commands: {', '.join(commands)}, or none for the whole story")
    if flags.data not in data and not any(d.endswith(":PATH") and flags.data.startswith(d[:-4]) for d in data):
        raise ValueError(f"no data {flags.data!r}{nearest(flags.data, data)}; data: {', '.join(data)}")
    if flags.data.endswith(":"):
        raise ValueError(f"--data {flags.data} lacks the path that belongs behind the colon")
    for name, commands_of_it in BELONGS.items():
        if getattr(flags, name, None) != p.get_default(name) and flags.command not in commands_of_it:
            here = "the story (no command)" if flags.command == "story" else flags.command
            raise ValueError(f"--{name.replace('_', '-')} belongs to {' and '.join(commands_of_it)}, not to {here}")
    if flags.command == "finetune" and flags.method is None:
        raise ValueError("finetune needs --method, such as --method svft:off_diagonals=8")
    if flags.command == "compare" and flags.methods is None:
        raise ValueError("compare needs --methods, such as --methods head full svfit lora:rank=8")
    if flags.command == "merge" and flags.adapter is None:
        raise ValueError("merge needs --adapter FILE beside --init FILE")
    if flags.command in ("generate", "predict", "merge") and flags.init is None:
        raise ValueError(f"{flags.command} needs --init FILE, a model file such as OUT/pretrain/model.pt")
    for name in ("n_layer", "d_model", "pretrain_steps"):
        if flags.init is not None and getattr(flags, name) != p.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')} speaks of a model that is pretrained here, "
                             "not of one that --init brings")
    if flags.tune and flags.lr:
        raise ValueError("--tune looks for the learning rates that --lr gives: leave one of them out")
    if flags.quick and flags.all:
        raise ValueError("--quick and --all exclude each other")
    if flags.plot:
        report.need_matplotlib()
    flags.targets = tuple(t for t in flags.targets.split(",") if t)
    for word in [flags.method or "full", *(flags.methods or [])]:
        parse_method(word)


def pretrain_settings(flags, defaults):
    """defaults with what the flags say of pretraining: --steps, --lr and --batch-size speak of it in
    the command pretrain only."""
    own = flags.command == "pretrain"
    return replace(defaults, lr=own and flags.lr or defaults.lr,
                   batch_size=own and flags.batch_size or defaults.batch_size,
                   steps=(flags.steps if own else flags.pretrain_steps) or defaults.steps // (8 if flags.quick else 1),
                   seed=flags.seed, accumulate=flags.accumulate, save_every=flags.save_every,
                   eval_every=flags.eval_every)


def finetune_settings(flags, defaults):
    """defaults with what the flags say of fine-tuning, but for the learning rate, which is the method's."""
    return replace(defaults, steps=flags.steps or defaults.steps // (2 if flags.quick else 1),
                   batch_size=flags.batch_size or defaults.batch_size,
                   seed=flags.seed, accumulate=flags.accumulate, save_every=flags.save_every,
                   eval_every=flags.eval_every)


def out_folder(flags, default):
    """The folder of --out, made now: better than after an hour. Raises ValueError where it is a file."""
    out = Path(flags.out or default + ("-quick" if flags.quick else ""))
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: give a folder")
    out.mkdir(parents=True, exist_ok=True)
    return out


def parse_method(word):
    """"svft:pattern=topk@query,key" -> ("svft", {"pattern": "topk"}, ("query", "key")); targets None where not named.

    Raises ValueError for a method or option that is not there, or an option without a value.
    """
    body, at, targets = word.partition("@")
    method, _, listed = body.partition(":")
    options = {}
    for item in filter(None, listed.split(",")):
        name, equals, value = item.partition("=")
        if not equals or not value:
            raise ValueError(f"{word!r}: an option is name=value, not {item!r}")
        if name in options:
            raise ValueError(f"{word!r}: {name} is given twice")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value   # a bare word such as banded
    if method not in ("full", "head", *METHODS) and "," in method:
        raise ValueError(f"{word!r}: options follow a colon, as in svft:off_diagonals=8,seed=1")
    check_options(method, options)
    names = tuple(t for t in targets.split(",") if t)
    if at and not names:
        raise ValueError(f"{word!r}: after @ come targets, such as @query,value")
    if names and method in ("full", "head"):
        raise ValueError(f"{word!r}: {method} adapts no layers, so it takes no targets")
    return method, options, names or None


def same_method(word):
    """A form of a word that is equal for words that mean the same: all options written out, targets as a set."""
    method, options, targets = parse_method(word)
    return method, tuple(sorted((options_of(method) | options).items(), key=str)), frozenset(targets or TARGETS)


def run(main, argv):
    """Call main(argv) and return its exit code; bad input becomes one line on stderr and exit code 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return main(argv) or 0
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 130
    except KeyboardInterrupt:   # between two trainings, or a second Ctrl-C
        print("stopped; what trains goes on by the same command with --resume", file=sys.stderr)
        return 130
    except Diverged as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if "--debug" in argv or "alloc" not in str(error) and not isinstance(error, MemoryError):
            raise   # a mistake of ours
        print(f"error: not enough memory ({' '.join(str(error).split())[:120]}): try a smaller --batch-size, or "
              "--accumulate", file=sys.stderr)
        return 2
    except (ValueError, TypeError, OSError, ImportError) as error:
        if "--debug" in argv:
            raise
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
