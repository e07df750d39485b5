"""python -m svmini.export: merge an adapter into its base and write plain weights, in our naming or another."""

import sys
from pathlib import Path

import torch

from . import files
from .adapting import merge
from .cli import Parser, add_model, run_command
from .errors import InputError
from .model_file import derived_metadata, class_of, load_adapted, save_model

FORMATS = {"GPT": "gpt2", "ViT": "torchvision"}


def command(argv):
    p = Parser("-m svmini.export", "Merge an adapter into its base: plain weights, as fast as the base.")
    add_model(p, adapter_required=True)
    p.add_argument("--format", default="svmini", choices=("svmini", "gpt2", "torchvision"), metavar="NAME",
                   help="whose naming: svmini | gpt2 | torchvision")
    p.add_argument("--out", metavar="FILE", help="the file to write (merged.pt beside the adapter)")
    flags = p.parse_args(argv)
    model_class = class_of(flags.init)
    if flags.format not in ("svmini", FORMATS[model_class.__name__]):
        raise InputError(f"--format {flags.format} does not go with a {model_class.__name__}: "
                         f"it is svmini or {FORMATS[model_class.__name__]}")
    model, metadata = load_adapted(flags.init, flags.adapter, model_class, flags.n_head)
    merge(model)
    path = Path(flags.out or Path(flags.adapter).parent / "merged.pt")
    if flags.format == "svmini":
        kept = {key: metadata[key] for key in ("data", "data_seed", "classes") if key in metadata}
        save_model(path, model, derived_metadata(metadata, kept))
    else:
        state = model.to_gpt2() if flags.format == "gpt2" else model.to_torchvision()
        files.write_whole(path, lambda file: torch.save(state, file))
    print(f"{path}: the merged model" + ("" if flags.format == "svmini" else
          f", in {flags.format}'s naming, which does not tell its {model.config.n_head} heads"))


if __name__ == "__main__":
    sys.exit(run_command(command))
