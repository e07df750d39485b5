"""python -m svmini.export: merge an adapter into its base model and write plain weights."""

import sys
from pathlib import Path

import torch

from . import files
from .adapting import merge
from .cli import Parser, add_model, run_command
from .errors import InputError
from .model_file import derived_metadata, load_adapted, save_model

FORMATS = {"GPT": "gpt2", "ViT": "torchvision"}


def command(argv):
    p = Parser("-m svmini.export", "Merge an adapter into its base model: plain weights, as fast as the base model.")
    add_model(p, adapter_required=True)
    p.flag("--format", "NAME", str, "state-dict format: svmini | gpt2 | torchvision", "svmini",
           choices=("svmini", "gpt2", "torchvision"))
    p.flag("--out", "FILE", str, "file to write", shown="merged.pt in the folder of the adapter")
    flags = p.parse_args(argv)
    path = Path(flags.out or Path(flags.adapter).parent / "merged.pt")
    if any(path.exists() and Path(name).exists() and path.samefile(name) for name in (flags.init, flags.adapter)):
        raise InputError(f"--out {path} would overwrite what is merged: give another file")
    model, metadata = load_adapted(flags.init, flags.adapter, n_head=flags.n_head)
    kind = type(model).__name__
    if flags.format not in ("svmini", FORMATS[kind]):
        raise InputError(f"--format {flags.format} does not fit a {kind}: choose svmini or {FORMATS[kind]}")
    merge(model)
    if flags.format == "svmini":
        kept = {key: metadata[key] for key in ("data", "data_seed", "classes") if key in metadata}
        save_model(path, model, derived_metadata(metadata, kept))
    else:
        state = model.to_gpt2() if flags.format == "gpt2" else model.to_torchvision()
        files.write_whole(path, lambda file: torch.save(state, file))
    print(f"{path}: the merged model" + ("" if flags.format == "svmini" else
          f" in {flags.format}'s format, which does not record its {model.config.n_head} heads"))


if __name__ == "__main__":
    sys.exit(run_command(command))
