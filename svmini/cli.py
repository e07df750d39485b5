"""The command line: flags that the scripts and tools share, and errors as one line with exit code 2."""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from .errors import InputError
from .methods import METHODS, nearest, parse_spec
from .training.checkpoint import RUN_FILES, delete_temporary, file_name
from .training.loop import Diverged, Stopped

SIZES = {"n_layer": "transformer blocks", "n_head": "attention heads", "d_model": "width of the model",
         "block_size": "tokens of context", "image_size": "side of the images in pixels",
         "patch_size": "side of a patch in pixels"}
BY_DATA = "depends on --data"


class Parser(argparse.ArgumentParser):
    """An argparse parser with one-line errors, without abbreviated flags, and with one line of help per flag."""

    def __init__(self, command, description):
        super().__init__(f"python {command}", description=description, allow_abbrev=False,
                         formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=150))

    def flag(self, name, metavar, kind, text, default=None, shown=None, group=None, **more):
        """Add a flag. Its help ends with the default, or with `shown` if that says more. kind: an argparse type."""
        end = "required" if more.get("required") else f"default: {shown or default}"
        (group or self).add_argument(name, metavar=metavar, type=kind, default=default, help=f"{text} ({end})", **more)

    def error(self, message):
        _, _, unknown = message.partition("unrecognized arguments: ")
        if unknown:
            message += nearest(unknown.split()[0], [*self._option_string_actions, "pretrain"])
        raise InputError(f"{message} (see {self.prog} --help)")


# ---- argparse types ----

def number(low, kind=int, above=False, high=2**62):
    """Return an argparse type: a number of at least `low` (or above it) and at most `high`."""
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not (value > low if above else value >= low) or value == float("inf") or kind is int and value > high:
            noun = "an integer" if kind is int else "a number"
            limited = high < 2**62 or value > high
            bound = f"above {low}" if above else f"from {low} to {high}" if limited else f"of at least {low}"
            raise argparse.ArgumentTypeError(f"must be {noun} {bound}, not {text!r}")
        return value
    return convert


def names(text):
    """An argparse type: "query,value" -> ("query", "value")."""
    found = tuple(name for name in text.split(",") if name)
    if not found:
        raise argparse.ArgumentTypeError(f"must be names such as query,value, not {text!r}")
    return found


def method_spec(text):
    """An argparse type: a method spec or "all". Whether a spec fits the model is checked later."""
    try:
        return text if text == "all" else parse_spec(text) and text
    except InputError as error:
        raise argparse.ArgumentTypeError(error) from None


def utf8(text):
    """An argparse type: a name that can be stored in a JSON file, unlike some file names."""
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise argparse.ArgumentTypeError(f"{ascii(text)} is not valid UTF-8: rename the file, or set PYTHONUTF8=1")
    return text


def one_of(known):
    """Return an argparse type: a name in `known`, or a prefix with a path if "folder:PATH" or the like is in it."""
    def convert(text):
        prefix, _, path = utf8(text).partition(":")
        if text not in known and not (path and f"{prefix}:PATH" in known):
            raise argparse.ArgumentTypeError(f"there is no {text!r}{nearest(text, known)}; choose from "
                                             + ", ".join(known))
        return text
    return convert


# ---- flags ----

def add_device(p):
    p.flag("--device", "NAME", str, "device: auto | cpu | cuda | mps", "auto",
           "auto, the first of cuda, mps, cpu that is available", choices=("auto", "cpu", "cuda", "mps"))
    p.flag("--dtype", "NAME", str, "autocast: auto | float32 | bfloat16 | float16", "auto",
           "auto, half precision on CUDA only", choices=("auto", "float32", "bfloat16", "float16"))


def add_model(p, names="a name of published weights", adapter_required=False):
    """Add the flags of a base model and its adapter. names: how the help refers to published weights."""
    p.flag("--init", "MODEL", str, f"base model: a model file, a file of published weights, or {names}", required=True)
    p.flag("--adapter", "FILE", str, "adapter file for the base model", shown="none", required=adapter_required)
    add_n_head(p)


def add_n_head(p):
    p.flag("--n-head", "N", number(1), "attention heads of published weights", shown="width / 64")


def training_parser(command, description, data):
    """Return a parser with the flags of every training run. data: the names that --data accepts, the default first."""
    p = Parser(command, description)
    p.flag("--data", "NAME", one_of(data), f"dataset: {' | '.join(data)}", next(iter(data)))
    p.flag("--data-dir", "DIR", str, "folder of downloaded datasets", shown="data for text, none for images")
    p.flag("--out", "DIR", str, "folder for the results", shown="out/MODEL-DATA")
    add_device(p)
    p.add_argument("--compile", action="store_true", help="compile training steps with torch.compile (default: off)")
    p.flag("--seed", "N", number(0), "seed of everything that is drawn", 0)
    p.flag("--steps", "N", number(1), "training steps", shown=BY_DATA)
    p.flag("--batch-size", "N", number(1), "examples per step", shown=BY_DATA)
    p.flag("--grad-accum-steps", "N", number(1), "split each batch into N micro-batches to save memory", shown=1)
    p.flag("--save-every", "N", number(0), "steps between checkpoints", 0, "0, only after the last")
    p.flag("--eval-every", "N", number(0), "steps between evaluations on validation data", 0, "0, only after the last")
    p.add_argument("--resume", action="store_true",
                   help="continue what the same command began in --out (default: start again)")
    return p


def adapting_parser(command, description, data, weights):
    """Return a parser with the flags of a comparison. weights: examples of published weights, for the help."""
    p = training_parser(command, f"{description} `{command} pretrain` only pretrains a base model.", data)
    p.epilog = ("A method spec is a name with optional arguments and target layers: "
                f"svft:pattern=banded,off_diagonals=8@query,value. Names: full, head, {', '.join(METHODS)}.")
    base, lrs = (p.add_mutually_exclusive_group() for _ in range(2))
    p.flag("--methods", "SPEC", method_spec, "method specs to compare; all adds every method's examples", nargs="+",
           shown="the main methods")
    p.add_argument("--quick", action="store_true",
                   help="smoke test: fewer steps, and fewer methods unless --methods is given (default: off)")
    p.flag("--init", "MODEL", utf8, f"base model: a file or {weights}", shown="pretrain one", group=base)
    p.flag("--base-data", "NAME", utf8, "dataset for pretraining the base model when --init is not given",
           shown=BY_DATA, group=base)
    p.flag("--lr", "X", number(0, float, True), "learning rate of every method", shown="tuned per method", group=lrs)
    p.flag("--lr-sweep", "N", number(1, high=100), "number of learning rates to try per method, on validation data",
           shown="no sweep", group=lrs)
    p.flag("--seeds", "N", number(1, high=1000), "runs per method, with seeds from --seed on", 1)
    p.flag("--targets", "A,B", names, "layers to adapt, for specs without targets", shown="query,key,value,out,up,down")
    add_n_head(p)
    return p


def pretraining_parser(command, description, data, **sizes):
    """Return a parser with the flags of pretraining. sizes: of the model; None if the default depends on the data."""
    p = training_parser(f"{command} pretrain", description, data)
    p.flag("--lr", "X", number(0, float, True), "peak learning rate", shown=BY_DATA)
    p.flag("--weight-decay", "X", number(0, float), "weight decay of AdamW", shown=BY_DATA)
    for name, value in sizes.items():
        p.flag("--" + name.replace("_", "-"), "N", number(1), SIZES[name], value, value or BY_DATA)
    return p


def given(flags, *names):
    """Return {name: value} of the flags that were given."""
    return {name: getattr(flags, name) for name in names if getattr(flags, name, None) is not None}


def training_flags(flags, *more):
    """Return the arguments of a TrainConfig that were given as flags. Learning rate and seed: only if named in more."""
    return given(flags, "steps", "batch_size", "grad_accum_steps", "head_lr", "weight_decay", *more)


def saving(flags):
    """Return the flags that say when a run folder is saved, evaluated and resumed."""
    return given(flags, "resume", "save_every", "eval_every")


def out_folder(flags, model):
    """Return the folder of --out, created and tested now rather than after an hour. Raises InputError or OSError."""
    quick = "-quick" if getattr(flags, "quick", False) else ""
    out = Path(flags.out or f"out/{file_name(f'{model}-{flags.data}')}{quick}")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: give a folder")
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()   # fails if the folder is read-only
    delete_temporary(out)
    if flags.resume and not any(path.name in (*RUN_FILES, "lr_sweep.json") for path in out.rglob("*")):
        print(f"--resume: {out} contains no earlier run, so this one starts from the beginning")
    return out


# ---- a command ----

def run_command(main, argv=None, **commands):
    """Call main(argv), or the command named by the first argument, and return its exit code.

    An error that the user can correct becomes one line on stderr and exit code 2 (1 if training diverged). A bug, ours
    or one in a new method, keeps its traceback.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in commands:
        main, argv = commands[argv[0]], argv[1:]
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")   # a character that the terminal cannot show becomes "?"
    sys.stderr = sys.stderr or open(os.devnull, "w")   # None if it is closed, which tqdm does not expect
    try:
        return main(argv) or 0
    except (Stopped, KeyboardInterrupt) as stopped:   # KeyboardInterrupt: between two runs, or the second Ctrl-C
        message, code = str(stopped) or "stopped. Training continues with the same command and --resume", 130
    except Diverged as error:
        message, code = f"error: {error}", 1
    except (MemoryError, RuntimeError) as error:
        signs = ("out of memory", "tried to allocate", "storage size calculation overflowed")
        if not isinstance(error, MemoryError) and not any(sign in str(error).lower() for sign in signs):
            raise
        reason = " ".join(str(error).split())[:120]
        message, code = f"error: not enough memory ({reason}): use a smaller --batch-size, or --grad-accum-steps", 2
    except (InputError, OSError) as error:
        message, code = f"error: {error}", 2
    print(" ".join(message.split()), file=sys.stderr)
    return code
