"""Adapt a GPT by several methods, with several seeds, and compare them."""

import sys
from dataclasses import replace

import torch

from svmini import GPT, GPTConfig, analyze, cli, model_file
from svmini.data.arithmetic import Arithmetic
from svmini.data.qa import QuestionAnswering, split_pairs
from svmini.data.text import LanguageModeling, read_text, split_text
from svmini.data.tokenizers import bpe_tokenizer, tokenizer_of, train_bpe
from svmini.errors import InputError
from svmini.training import compare, pretrain, report
from svmini.training.loop import TrainConfig
from svmini.training.device import resolve_device
from svmini.training.learning_rates import GPT_LEARNING_RATES as LEARNING_RATES

TEXTS = ("topics", "tinyshakespeare", "stdlib", "file:PATH")
DATA = [*TEXTS[:1], "arithmetic", *TEXTS[1:], "gsm8k", "qa:PATH"]   # to adapt to
BLOCK_SIZE = 128
PRETRAIN = {
    "text": TrainConfig(steps=1300, lr=4e-3, batch_size=8, warmup_ratio=0.05, schedule="cosine", weight_decay=0.3,
                     betas=(0.9, 0.95)),
    "arithmetic": TrainConfig(steps=1300, lr=2e-3, batch_size=64, warmup_ratio=0.05, schedule="cosine", weight_decay=2.0,
                           betas=(0.9, 0.95)),
}
ADAPT = {   # lr: from LEARNING_RATES, spec by spec
    "text": TrainConfig(steps=200, lr=0.0, batch_size=8),
    "arithmetic": TrainConfig(steps=300, lr=0.0, batch_size=64),
    "pairs": TrainConfig(steps=200, lr=0.0, batch_size=8),
}
MODEL = {   # of a base of one's own
    "text": {"n_layer": 4, "n_head": 4, "d_model": 128},
    "arithmetic": {"n_layer": 3, "n_head": 4, "d_model": 128},
}
MAIN = ["full", "svfit", "svft:pattern=plain", "svft:off_diagonals=2", "svft:off_diagonals=8",
        "lora:rank=1", "lora:rank=2", "lora:rank=8", "dora:rank=8", "vera:rank=256"]
QUICK = ["full", "svft:off_diagonals=8", "lora:rank=8"]


def main(argv=None):
    return cli.run_command(adapt_and_compare, argv, pretrain=pretrain_alone)


def adapt_and_compare(argv):
    """One run, to be read downwards: the data, the base, for each seed and method adapt, train, test; the table."""
    flags = adapting_flags(argv)
    device_config, out = resolve_device(flags.device, flags.dtype, flags.compile), cli.out_folder(flags, "gpt")
    print(device_config.reason)
    kind = kind_of(flags.data)
    source = open_source(flags, kind)                           # what is missing is found out now
    if flags.init:
        base, metadata = model_file.load_base(flags.init, GPT, flags.n_head)
        metadata = metadata | {"tokenizer": model_file.tokenizer_of_model(base, metadata, flags.init)}
    else:
        base, base_task, metadata = new_base(flags, flags.base_data or default_base(kind), device_config)
    specs = compare.all_specs(MAIN, base, flags.targets) if flags.methods == ["all"] else flags.methods or (
        QUICK if flags.quick else MAIN)
    tuned = "published" if metadata["published"] else "arithmetic" if kind == "arithmetic" else "text"
    learning_rates = compare.plan(specs, base, flags.targets, LEARNING_RATES[tuned], flags.lr)    # specs that do not fit end here
    print(compare.describe_targets(base, flags.targets))
    task = open_task(flags, kind, source, base.config, metadata["tokenizer"], device_config)
    if not flags.init:
        train_config = PRETRAIN["arithmetic" if kind == "arithmetic" else "text"]
        train_config = replace(train_config, steps=train_config.steps // (4 if flags.quick else 1), seed=flags.seed)
        base, metadata = pretrain.pretrain(base, base_task, train_config, device_config, out / "pretrain", metadata,
                                        resume=flags.resume, save_every=flags.save_every)
    train_config = ADAPT[kind]
    steps = flags.steps or train_config.steps // (2 if flags.quick else 1)
    train_config = replace(train_config, steps=steps, seed=flags.seed, **cli.given(flags, "batch_size", "grad_accum_steps"))
    seeds = range(flags.seed, flags.seed + flags.seeds)
    if not flags.resume:
        compare.delete_runs(learning_rates, seeds, out)
    found = None
    if flags.lr_sweep:
        found = compare.lr_sweep(learning_rates, base, task, train_config, device_config, out, flags.lr_sweep, flags.resume)
        print("\n".join([f"learning learning rates by {task.metric} on validation data:", *report.lr_sweep_lines(found)]))
        learning_rates = {spec: found[spec]["best"] or lr for spec, lr in learning_rates.items()}
    rows = [compare.zero_shot_row(base, task, train_config, device_config)]
    print(report.line(rows[0]))
    for seed in seeds:
        for spec, lr in learning_rates.items():
            rows.append(compare.run(
                spec, base, task, replace(train_config, lr=lr, seed=seed), device_config, out, resume=flags.resume,
                save_every=flags.save_every, eval_every=flags.eval_every, metadata={"data": task.name}, base_metadata=metadata))
            print(report.line(rows[-1]))
    compare.fill_gap_recovered(rows)
    base_info = {key: value for key, value in metadata.items() if key != "tokenizer"}
    report.write(out, rows, {"task": task.name, "device": device_config.reason, "steps": train_config.steps, "base": base_info,
                             **task.data_config}, found)
    analyze.draw_best(out, rows, base)
    if flags.quick:
        print("a check that everything runs: this base is hardly trained, the order of its rows means nothing")
    show_samples(rows)


def pretrain_alone(argv):
    flags = pretraining_flags(argv)
    device_config, out = resolve_device(flags.device, flags.dtype, flags.compile), cli.out_folder(flags, "gpt")
    print(device_config.reason)
    model, task, metadata = new_base(flags, flags.data, device_config, flags)
    train_config = replace(PRETRAIN[kind_of(flags.data)], seed=flags.seed,
                       **cli.given(flags, "steps", "lr", "batch_size", "weight_decay", "grad_accum_steps"))
    pretrain.pretrain(model, task, train_config, device_config, out / "pretrain", metadata, resume=flags.resume,
                      save_every=flags.save_every, eval_every=flags.eval_every)


def adapting_flags(argv):
    p = cli.adapting_parser("train_gpt.py", __doc__, DATA, "a name such as gpt2, gpt2-medium")
    p.add_argument("--block-size", type=cli.number(2), metavar="N", help=f"tokens of text at a time ({BLOCK_SIZE})")
    flags = p.parse_args(argv)
    if flags.init is None and flags.n_head:
        p.error("--n-head speaks of the model that --init brings")
    if flags.block_size and kind_of(flags.data) != "text":
        p.error("--block-size belongs to text; problems have the context of their model")
    return flags


def pretraining_flags(argv):
    p = cli.pretraining_parser("train_gpt.py", "Train a GPT from scratch.", ["stdlib", "arithmetic", *TEXTS],
                                        n_layer=None, n_head=None, d_model=None, block_size=None)
    flags = p.parse_args(argv)
    if flags.block_size and flags.data == "arithmetic":
        p.error("--block-size belongs to text; problems have the context of their model")
    return flags


def kind_of(data):
    return "arithmetic" if data == "arithmetic" else "pairs" if data == "gsm8k" or data.startswith("qa:") else "text"


def default_base(kind):
    return "arithmetic" if kind == "arithmetic" else "stdlib"


def open_source(flags, kind):
    """What the data to adapt to are made of: a text, pairs, or nothing for arithmetic. The spec arithmetic means two
    sets: additions to pretrain on, subtractions to adapt to."""
    if kind == "text":
        text = read_text(flags.data, flags.data_dir)
        split_text(text)   # too short a text fails here, not after pretraining
        return text
    return split_pairs(flags.data, flags.data_dir) if kind == "pairs" else None


def open_task(flags, kind, source, config, tokenizer, device_config):
    """The task to adapt to, in the tokens of the base."""
    if (tokenizer == "arithmetic") != (kind == "arithmetic"):
        raise InputError(f"{flags.init or flags.base_data} speaks {'text' if kind == 'arithmetic' else 'arithmetic'}, "
                         f"which does not go with --data {flags.data}")
    if kind == "arithmetic":
        return Arithmetic("-", device_config.device)
    if kind == "text":
        if flags.block_size and flags.block_size > config.block_size:
            raise InputError(f"--block-size {flags.block_size} is longer than the model's, {config.block_size} tokens")
        context = min(flags.block_size or BLOCK_SIZE, config.block_size)
        task = LanguageModeling(flags.data, source, tokenizer_of(tokenizer), context, device_config.device, seed=flags.seed)
    else:
        task = QuestionAnswering(flags.data, source, tokenizer_of(tokenizer), config.block_size, device_config.device)
    print(task.describe())
    return task


def new_base(flags, data, device_config, sizes=None):
    """An untrained GPT for what `data` names, its task, and what is to be said about it. sizes: flags of pretrain."""
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
    shape = MODEL[kind_of(data)] | (cli.given(sizes, "n_layer", "n_head", "d_model") if sizes else {})
    torch.manual_seed(flags.seed)
    model = GPT(GPTConfig(vocab_size, block_size, **shape))
    return model, task, metadata | {"published": False}


def show_samples(rows):
    """Print what the base and the best adapter of the first seed make of the same prompt or problems."""
    first = [r for r in rows if r["seed"] == rows[0]["seed"] and r["sample"]]
    sign = 1 if rows[0]["higher_is_better"] else -1
    best = max((r for r in first if r["method"] not in ("zero-shot", "full")), default=None,
               key=lambda r: sign * r["metric"])
    for title, row in (("before", first[0]), (f"after, {best and best['method']}", best)):
        if row is not None:
            print(f"\n--- {title} ---\n" + "\n".join(row["sample"]))


if __name__ == "__main__":
    sys.exit(main())
