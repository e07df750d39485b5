"""Adapt a GPT with several methods and seeds, and compare the methods."""

import sys
from dataclasses import replace

import torch

from svmini import GPT, GPTConfig, analyze, cli, model_file
from svmini.data.arithmetic import Arithmetic
from svmini.data.qa import QuestionAnswering, split_pairs
from svmini.data.text import LanguageModeling, read_text
from svmini.data.tokenizers import bpe_tokenizer, tokenizer_of, train_bpe
from svmini.errors import InputError
from svmini.training import compare, pretrain, report
from svmini.training.device import prepare_device, resolve_device
from svmini.training.learning_rates import GPT_LEARNING_RATES as LEARNING_RATES
from svmini.training.loop import TrainConfig

TEXTS = ("topics", "tinyshakespeare", "stdlib", "file:PATH")
DATA = [*TEXTS[:1], "arithmetic", *TEXTS[1:], "gsm8k", "qa:PATH"]   # datasets to adapt to
BLOCK_SIZE = 128
PRETRAIN = {
    "text": TrainConfig(steps=1300, lr=4e-3, batch_size=8, warmup_ratio=0.05, schedule="cosine", weight_decay=0.3,
                        betas=(0.9, 0.95)),
    "arithmetic": TrainConfig(steps=1300, lr=2e-3, batch_size=64, warmup_ratio=0.05, schedule="cosine",
                              weight_decay=2.0, betas=(0.9, 0.95)),
}
ADAPT = {   # of a TrainConfig; lr: LEARNING_RATES
    "text": {"steps": 200, "batch_size": 8},
    "arithmetic": {"steps": 300, "batch_size": 64},
    "pairs": {"steps": 200, "batch_size": 8},
}
MODEL = {   # of a base model that is pretrained here
    "text": {"n_layer": 4, "n_head": 4, "d_model": 128},
    "arithmetic": {"n_layer": 3, "n_head": 4, "d_model": 128},
}
MAIN = ["full", "svfit", "svft:pattern=plain", "svft:off_diagonals=2", "svft:off_diagonals=8",
        "lora:rank=1", "lora:rank=2", "lora:rank=8", "dora:rank=8", "vera:rank=256"]
QUICK = ["full", "svft:off_diagonals=8", "lora:rank=8"]


def main(argv=None):
    return cli.run_command(compare_methods, argv, pretrain=pretrain_only)


def compare_methods(argv):
    """Run a comparison; read downwards: data, base model, methods, then every seed and method, then the table."""
    flags = adapting_flags(argv)
    device_config, out = resolve_device(flags.device, flags.dtype, flags.compile), cli.out_folder(flags, "gpt")
    kind = kind_of(flags.data)
    base_kind = "text" if kind == "pairs" else kind   # pairs have the base model and the learning rates of text
    if flags.init:
        base, metadata = model_file.load_base(flags.init, GPT, flags.n_head)
        metadata = metadata | {"tokenizer": model_file.tokenizer_of_model(base, metadata, flags.init)}
    else:
        base_data = flags.base_data or ("stdlib" if base_kind == "text" else "arithmetic")
        base, base_task, metadata = new_base(flags, base_data, device_config)
    device_config = prepare_device(device_config, base)
    specs = flags.methods or (QUICK if flags.quick else MAIN)
    if specs == ["all"]:
        specs = compare.all_specs(MAIN, base, flags.targets)
    tuned = LEARNING_RATES["published" if metadata["published"] else base_kind]
    learning_rates = compare.plan(specs, base, flags.targets, tuned, flags.lr)   # a spec that does not fit fails here
    print(compare.describe_targets(base, flags.targets))
    task = open_task(flags, kind, base.config, metadata["tokenizer"], device_config)   # missing data fails here
    if not flags.init:
        config = PRETRAIN[base_kind]
        config = replace(config, steps=config.steps // (4 if flags.quick else 1), seed=flags.seed)
        base, metadata = pretrain.pretrain(base, base_task, config, device_config, out / "pretrain", metadata,
                                           **cli.saving(flags))
    quick = {"steps": ADAPT[kind]["steps"] // 2} if flags.quick else {}
    rows, _ = compare.run_all(
        learning_rates, range(flags.seed, flags.seed + flags.seeds), base, lambda seed: task,
        ADAPT[kind] | quick | cli.training_flags(flags), device_config, out, base_metadata=metadata, metadata={},
        n_lrs=flags.lr_sweep, **cli.saving(flags))
    analyze.draw_best(out, rows, base)
    if flags.quick:
        print(report.SMOKE_TEST)
    show_samples(rows)


def pretrain_only(argv):
    flags = pretraining_flags(argv)
    device_config, out = resolve_device(flags.device, flags.dtype, flags.compile), cli.out_folder(flags, "gpt")
    model, task, metadata = new_base(flags, flags.data, device_config)
    device_config = prepare_device(device_config, model)
    config = replace(PRETRAIN[kind_of(flags.data)], seed=flags.seed, **cli.training_flags(flags, "lr"))
    pretrain.pretrain(model, task, config, device_config, out / "pretrain", metadata, **cli.saving(flags))


def adapting_flags(argv):
    p = cli.adapting_parser("train_gpt.py", __doc__, DATA, "a name such as gpt2, gpt2-medium")
    p.flag("--block-size", "N", cli.number(2), "tokens of context", shown=BLOCK_SIZE)
    flags = p.parse_args(argv)
    if flags.init is None and flags.n_head:
        p.error("--n-head belongs to the base model that --init loads: add --init")
    if flags.block_size and kind_of(flags.data) != "text":
        p.error("--block-size belongs to text; problems use the context of their model")
    return flags


def pretraining_flags(argv):
    data = list(dict.fromkeys(["stdlib", "arithmetic", *TEXTS]))   # the default first
    p = cli.pretraining_parser("train_gpt.py", "Train a GPT from scratch.", data,
                               n_layer=None, n_head=None, d_model=None, block_size=None)
    flags = p.parse_args(argv)
    if flags.block_size and flags.data == "arithmetic":
        p.error("--block-size belongs to text; problems use the context of their model")
    return flags


def kind_of(data):
    """Return "text", "arithmetic" or "pairs": the kind of a dataset, which determines its task."""
    return "arithmetic" if data == "arithmetic" else "pairs" if data == "gsm8k" or data.startswith("qa:") else "text"


def open_task(flags, kind, config, tokenizer, device_config):
    """Return the task to adapt to, in the tokens of the base model. config: of the base model.

    --data arithmetic means two datasets: additions for pretraining, subtractions for adaptation.
    """
    if (tokenizer == "arithmetic") != (kind == "arithmetic"):
        was, needed = ("text", "arithmetic") if kind == "arithmetic" else ("arithmetic", "text")
        raise InputError(f"{flags.init or flags.base_data} was trained on {was}, which does not go with --data "
                         f"{flags.data}: give a base model for {needed}")
    if kind == "arithmetic":
        return Arithmetic("-", device_config.device)
    if kind == "text":
        if flags.block_size and flags.block_size > config.block_size:
            raise InputError(f"--block-size {flags.block_size} exceeds the {config.block_size} tokens of the model: "
                             "give a smaller one")
        text, block_size = read_text(flags.data, flags.data_dir), min(flags.block_size or BLOCK_SIZE, config.block_size)
        task = LanguageModeling(flags.data, text, tokenizer_of(tokenizer), block_size, device_config.device,
                                seed=flags.seed)
    else:
        pairs = split_pairs(flags.data, flags.data_dir)
        task = QuestionAnswering(flags.data, pairs, tokenizer_of(tokenizer), config.block_size, device_config.device)
    print(task.describe())
    return task


def new_base(flags, data, device_config):
    """Return an untrained GPT for a dataset, its task and its metadata."""
    if data == "arithmetic":
        task, vocab_size, block_size = Arithmetic("+", device_config.device), Arithmetic.vocab_size, Arithmetic.length
        metadata = {"data": task.name, "tokenizer": "arithmetic"}
    else:
        text, block_size = read_text(data, flags.data_dir), flags.block_size or BLOCK_SIZE
        ranks = train_bpe(text)
        task = LanguageModeling(data, text, bpe_tokenizer(ranks), block_size, device_config.device, seed=flags.seed)
        print(task.describe())
        vocab_size = len(ranks)
        metadata = {"data": f"{data} {task.data_config['sha256'][:12]}", "tokenizer": ranks}
    shape = MODEL[kind_of(data)]
    shape = shape | cli.given(flags, *shape)
    torch.manual_seed(flags.seed)
    model = GPT(GPTConfig(vocab_size, block_size, **shape))
    return model, task, metadata | {"published": False}


def show_samples(rows):
    """Print how the base model and the best adapter of the first seed continue the same prompt or solve the same
    problems."""
    best = report.best_of(rows, lambda spec: spec not in ("zero-shot", "full"))
    for title, row in (("before", rows[0]), (f"after, {best and best['method']}", best)):
        if row is not None and row["sample"]:
            print(f"\n--- {title} ---\n" + "\n".join(row["sample"]))


if __name__ == "__main__":
    sys.exit(main())
