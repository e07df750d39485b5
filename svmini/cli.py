"""The command line: flags that both scripts share, and errors as one line with exit code 2."""

import argparse
import sys
from pathlib import Path

from .errors import InputError
from .methods import METHODS, nearest, parse_spec
from .training.loop import Diverged, Stopped


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, and whose flags are written out and have their help on one line."""

    def __init__(self, command, about, **more):
        def wide(prog):
            return argparse.HelpFormatter(prog, max_help_position=36, width=140)
        super().__init__(f"python {command}", description=about, formatter_class=wide, allow_abbrev=False, **more)

    def error(self, message):
        what, _, words = message.partition("unrecognized arguments: ")
        if words:   # argparse itself suggests nothing
            message += nearest(words.split()[0], [*self._option_string_actions, "pretrain"])
        raise InputError(f"{message} (see {self.prog} --help)")


def number(low, kind=int, above=False):
    """An argparse type: a number of at least `low`, or above it."""
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not (value > low if above else value >= low) or value == float("inf") or kind is int and value > 2**62:
            what = "a whole number" if kind is int else "a number"
            bound = f"above {low}" if above else f"of at least {low}"
            raise argparse.ArgumentTypeError(f"must be {what} {bound}, not {text!r}")
        return value
    return convert


def names(text):
    """An argparse type: "query,value" -> ("query", "value")."""
    found = tuple(name for name in text.split(",") if name)
    if not found:
        raise argparse.ArgumentTypeError(f"must be names such as query,value, not {text!r}")
    return found


def method_spec(text):
    """An argparse type: a method's word, or all. Whether it fits the model is seen later."""
    try:
        return text if text == "all" else parse_spec(text) and text
    except InputError as error:
        raise argparse.ArgumentTypeError(error) from None


def one_of(known):
    """An argparse type: a word of `known`, or one with a path where known has "folder:PATH" or the like."""
    def convert(text):
        word, colon, path = text.partition(":")
        if text not in known and not (path and f"{word}:PATH" in known):
            raise argparse.ArgumentTypeError(f"there is no {text!r}{nearest(text, known)}; choose from "
                                             + ", ".join(known))
        return text
    return convert


def add_device(p):
    for flag, about, names in (("--device", "where to compute", ("auto", "cpu", "cuda", "mps")),
                               ("--dtype", "of autocast", ("auto", "float32", "bfloat16", "float16"))):
        p.add_argument(flag, default="auto", choices=names, metavar="NAME", help=f"{about}: {' | '.join(names)}")


def add_model(p, names="a name", adapter_required=False):
    """The flags that name a model and an adapter for it. names: what published weights are called, for the help."""
    p.add_argument("--init", required=True, metavar="MODEL", help=f"a model file, a file of weights, or {names}")
    p.add_argument("--adapter", required=adapter_required, metavar="FILE", help="an adapter file that goes with it")
    p.add_argument("--n-head", type=number(1), metavar="N", help="of weights whose heads are not of width 64")


def training_parser(command, about, data, default):
    """The flags of every training. data: what --data may name."""
    p = Parser(command, about)
    a = p.add_argument
    a("--data", default=default, type=one_of(data), metavar="NAME", help=" | ".join(data) + f" ({default})")
    a("--data-dir", metavar="DIR", help="where real data lie, or are downloaded to")
    a("--out", metavar="DIR", help="where results go (out/MODEL-DATA)")
    add_device(p)
    a("--compile", action="store_true", help="training steps through torch.compile")
    a("--seed", type=number(0), default=0, metavar="N", help="of everything that is drawn")
    a("--steps", type=number(1), metavar="N", help="training steps")
    a("--batch-size", type=number(1), metavar="N", help="examples a step")
    a("--grad-accum-steps", type=number(1), metavar="N", help="parts in which a batch goes through, to save memory")
    a("--save-every", type=number(0), default=0, metavar="N", help="steps between checkpoints (0: at the end)")
    a("--eval-every", type=number(0), default=0, metavar="N", help="steps between evaluations (0: at the end)")
    a("--resume", action="store_true", help="go on where the same command was stopped")
    return p


def adapting_parser(command, about, data, weights):
    """The flags of adapting a base by several methods. weights: names of published weights, for the help."""
    p = training_parser(command, f"{about} `{command} pretrain` trains a base alone.", data, next(iter(data)))
    p.epilog = ("A method is one word: full, head, " + ", ".join(METHODS) + ", with options and targets where wanted: "
                "svft:pattern=banded,off_diagonals=8@query,value")
    a = p.add_argument
    what, base, rates = (p.add_mutually_exclusive_group() for _ in range(3))
    what.add_argument("--methods", nargs="+", type=method_spec, metavar="M",
                      help="the methods' words; all: every method's examples")
    what.add_argument("--quick", action="store_true", help="a few rows in under a minute")
    base.add_argument("--init", metavar="MODEL", help=f"the base: a model file, a file of weights, or {weights}")
    base.add_argument("--base-data", metavar="NAME", help="what a base is pretrained on, where no --init brings one")
    rates.add_argument("--lr", type=number(0, float, True), metavar="X", help="a rate for all, no tuned ones")
    rates.add_argument("--lr-sweep", type=number(1), metavar="N", help="try N rates, a factor 2 apart, on validation data")
    a("--seeds", type=number(1), default=1, metavar="N", help="runs of every method")
    a("--targets", type=names, metavar="A,B", help="layers to adapt, where a method's word names none")
    a("--n-head", type=number(1), metavar="N", help="of --init's weights, where heads are not of width 64")
    return p


def pretraining_parser(command, about, data, **sizes):
    """The flags of training a base. sizes: of the model, by the name of their flag; None where the data decide."""
    p = training_parser(f"{command} pretrain", about, data, next(iter(data)))
    p.add_argument("--lr", type=number(0, float, True), metavar="X", help="learning rate")
    p.add_argument("--weight-decay", type=number(0, float), metavar="X", help="of AdamW: much of it unlearns the start")
    for name, value in sizes.items():
        p.add_argument("--" + name.replace("_", "-"), type=number(1), default=value, metavar="N",
                       help=f"of the model ({'by the data' if value is None else value})")
    return p


def given(flags, *names):
    """{name: value} of the flags that were given, for dataclasses.replace."""
    return {name: getattr(flags, name) for name in names if getattr(flags, name) is not None}


def out_folder(flags, model):
    """The folder of --out, made now: better than after an hour. Raises InputError where it is a file."""
    quick = "-quick" if getattr(flags, "quick", False) else ""
    data = "".join(c if c.isalnum() or c in "._-" else "_" for c in flags.data)
    out = Path(flags.out or f"out/{model}-{data}{quick}")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: give a folder")
    out.mkdir(parents=True, exist_ok=True)
    return out


def run_command(main, argv=None, **commands):
    """Call main(argv), or the command that the first word names, and return its exit code. What the user can mend
    becomes one line on stderr and exit code 2; a mistake of ours, or in a new method, keeps its traceback."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in commands:
        main, argv = commands[argv[0]], argv[1:]
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
    except (MemoryError, RuntimeError) as error:
        said = str(error).lower()
        if not isinstance(error, MemoryError) and "out of memory" not in said and "tried to allocate" not in said:
            raise
        print(f"error: not enough memory ({' '.join(str(error).split())[:120]}): try a smaller --batch-size, or "
              "--grad-accum-steps", file=sys.stderr)
        return 2
    except (InputError, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
