"""Adapt a GPT by several methods, with several seeds, and compare them."""

import sys
from dataclasses import replace

import torch

from svmini import GPT, GPTConfig, command_line, learned, model_file
from svmini.data.questions import Arithmetic, Pairs, split_pairs
from svmini.data.text import Text, read_text, split_text
from svmini.data.tokenizers import bpe_tokenizer, tokenizer_of, train_bpe
from svmini.errors import InputError
from svmini.training import compare, pretrain, report
from svmini.training.loop import Settings
from svmini.training.machine import pick_machine
from svmini.training.rates import GPT as RATES

TEXTS = ("topics", "tinyshakespeare", "stdlib", "file:PATH")
DATA = [*TEXTS[:1], "arithmetic", *TEXTS[1:], "gsm8k", "qa:PATH"]   # to adapt to
CONTEXT = 128
PRETRAIN = {
    "text": Settings(steps=1300, lr=4e-3, batch_size=8, warmup=0.05, schedule="cosine", weight_decay=0.3,
                     betas=(0.9, 0.95)),
    "arithmetic": Settings(steps=1300, lr=2e-3, batch_size=64, warmup=0.05, schedule="cosine", weight_decay=2.0,
                           betas=(0.9, 0.95)),
}
ADAPT = {   # lr: from RATES, word by word
    "text": Settings(steps=200, lr=0.0, batch_size=8),
    "arithmetic": Settings(steps=300, lr=0.0, batch_size=64),
    "pairs": Settings(steps=200, lr=0.0, batch_size=8),
}
MODEL = {   # of a base of one's own
    "text": {"n_layer": 4, "n_head": 4, "d_model": 128},
    "arithmetic": {"n_layer": 3, "n_head": 4, "d_model": 128},
}
MAIN = ["full", "svfit", "svft:pattern=plain", "svft:off_diagonals=2", "svft:off_diagonals=8",
        "lora:rank=1", "lora:rank=2", "lora:rank=8", "dora:rank=8", "vera:rank=256"]
QUICK = ["full", "svft:off_diagonals=8", "lora:rank=8"]


def main(argv=None):
    return command_line.run(adapt_and_compare, argv, pretrain=pretrain_alone)


def adapt_and_compare(argv):
    """One run, to be read downwards: the data, the base, for each seed and method adapt, train, test; the table."""
    flags = adapting_flags(argv)
    machine, out = pick_machine(flags.device, flags.dtype, flags.compile), command_line.out_folder(flags, "gpt")
    print(machine.reason)
    kind = kind_of(flags.data)
    source = open_source(flags, kind)                           # what is missing is found out now
    if flags.init:
        base, about = model_file.load_base(flags.init, GPT, flags.n_head)
        about = about | {"tokenizer": model_file.tokenizer_word(base, about, flags.init)}
    else:
        base, base_task, about = new_base(flags, flags.base_data or default_base(kind), machine)
    words = compare.all_words(MAIN, base, flags.targets) if flags.methods == ["all"] else flags.methods or (
        QUICK if flags.quick else MAIN)
    tuned = "published" if about["published"] else "arithmetic" if kind == "arithmetic" else "text"
    rates = compare.plan(words, base, flags.targets, RATES[tuned], flags.lr)    # words that do not fit end here
    print(compare.adapted_line(base, flags.targets))
    task = open_task(flags, kind, source, base.config, about["tokenizer"], machine)
    if not flags.init:
        settings = PRETRAIN["arithmetic" if kind == "arithmetic" else "text"]
        settings = replace(settings, steps=settings.steps // (4 if flags.quick else 1), seed=flags.seed)
        base, about = pretrain.pretrain(base, base_task, settings, machine, out / "pretrain", about,
                                        resume=flags.resume, save_every=flags.save_every)
    settings = ADAPT[kind]
    steps = flags.steps or settings.steps // (2 if flags.quick else 1)
    settings = replace(settings, steps=steps, seed=flags.seed, **command_line.given(flags, "batch_size", "accumulate"))
    seeds = range(flags.seed, flags.seed + flags.seeds)
    if not flags.resume:
        compare.begin_anew(rates, seeds, out)
    found = None
    if flags.tune:
        found = compare.tune(rates, base, task, settings, machine, out, flags.tune, flags.resume)
        print("\n".join([f"learning rates by {task.metric} on validation data:", *report.tuning_lines(found)]))
        rates = {word: found[word]["best"] or lr for word, lr in rates.items()}
    rows = [compare.start_row(base, task, settings, machine)]
    print(report.line(rows[0]))
    for seed in seeds:
        for word, lr in rates.items():
            rows.append(compare.run(
                word, base, task, replace(settings, lr=lr, seed=seed), machine, out, resume=flags.resume,
                save_every=flags.save_every, eval_every=flags.eval_every, about={"data": task.name}, about_base=about))
            print(report.line(rows[-1]))
    compare.recover(rows)
    said = {key: value for key, value in about.items() if key != "tokenizer"}
    report.write(out, rows, {"task": task.name, "device": machine.reason, "steps": settings.steps, "base": said,
                             **task.facts}, found)
    learned.draw_best(out, rows, base)
    if flags.quick:
        print("a check that everything runs: this base is hardly trained, the order of its rows means nothing")
    show_samples(rows)


def pretrain_alone(argv):
    flags = pretraining_flags(argv)
    machine, out = pick_machine(flags.device, flags.dtype, flags.compile), command_line.out_folder(flags, "gpt")
    print(machine.reason)
    model, task, about = new_base(flags, flags.data, machine, flags)
    settings = replace(PRETRAIN[kind_of(flags.data)], seed=flags.seed,
                       **command_line.given(flags, "steps", "lr", "batch_size", "weight_decay", "accumulate"))
    pretrain.pretrain(model, task, settings, machine, out / "pretrain", about, resume=flags.resume,
                      save_every=flags.save_every, eval_every=flags.eval_every)


def adapting_flags(argv):
    p = command_line.adapting_parser("train_gpt.py", __doc__, DATA, "a name such as gpt2, gpt2-medium")
    p.add_argument("--context", type=command_line.number(2), metavar="N", help=f"tokens of text at a time ({CONTEXT})")
    flags = p.parse_args(argv)
    if flags.init is None and flags.n_head:
        p.error("--n-head speaks of the model that --init brings")
    if flags.context and kind_of(flags.data) != "text":
        p.error("--context belongs to text; problems have the context of their model")
    return flags


def pretraining_flags(argv):
    p = command_line.pretraining_parser("train_gpt.py", "Train a GPT from scratch.", ["stdlib", "arithmetic", *TEXTS],
                                        n_layer=None, n_head=None, d_model=None, context=None)
    flags = p.parse_args(argv)
    if flags.context and flags.data == "arithmetic":
        p.error("--context belongs to text; problems have the context of their model")
    return flags


def kind_of(data):
    return "arithmetic" if data == "arithmetic" else "pairs" if data == "gsm8k" or data.startswith("qa:") else "text"


def default_base(kind):
    return "arithmetic" if kind == "arithmetic" else "stdlib"


def open_source(flags, kind):
    """What the data to adapt to are made of: a text, pairs, or nothing for arithmetic. The word arithmetic means two
    sets: additions to pretrain on, subtractions to adapt to."""
    if kind == "text":
        text = read_text(flags.data, flags.data_dir)
        split_text(text)   # too short a text fails here, not after pretraining
        return text
    return split_pairs(flags.data, flags.data_dir, flags.seed) if kind == "pairs" else None


def open_task(flags, kind, source, config, tokenizer, machine):
    """The task to adapt to, in the tokens of the base."""
    if (tokenizer == "arithmetic") != (kind == "arithmetic"):
        raise InputError(f"{flags.init or flags.base_data} speaks {'text' if kind == 'arithmetic' else 'arithmetic'}, "
                         f"which does not go with --data {flags.data}")
    if kind == "arithmetic":
        return Arithmetic("-", machine.device)
    if kind == "text":
        if flags.context and flags.context > config.block_size:
            raise InputError(f"--context {flags.context} is longer than the model's, {config.block_size} tokens")
        context = min(flags.context or CONTEXT, config.block_size)
        return Text(flags.data, source, tokenizer_of(tokenizer), context, machine.device, seed=flags.seed)
    task = Pairs(flags.data, source, tokenizer_of(tokenizer), config.block_size, machine.device)
    print(f"{task.name}: " + ", ".join(f"{len(pairs)} pairs to {split}" for split, pairs in source.items()))
    if task.left_out:
        print(f"{task.left_out} of {len(source['train'])} training pairs do not fit into the model's context of "
              f"{config.block_size} tokens and are left out")
    return task


def new_base(flags, data, machine, sizes=None):
    """An untrained GPT for what `data` names, its task, and what is to be said about it. sizes: flags of pretrain."""
    if data == "arithmetic":
        task, vocab_size, block_size = Arithmetic("+", machine.device), Arithmetic.vocab_size, Arithmetic.length
        about = {"data": task.name, "tokenizer": "arithmetic"}
    else:
        text, block_size = read_text(data, flags.data_dir), flags.context or CONTEXT
        ranks = train_bpe(text)
        task = Text(data, text, bpe_tokenizer(ranks), block_size, machine.device, seed=flags.seed)
        vocab_size = len(ranks)
        about = {"data": f"{data} {task.facts['sha256'][:12]}", "tokenizer": ranks}
    shape = MODEL[kind_of(data)] | (command_line.given(sizes, "n_layer", "n_head", "d_model") if sizes else {})
    torch.manual_seed(flags.seed)
    model = GPT(GPTConfig(vocab_size, block_size, **shape))
    return model, task, about | {"published": False}


def show_samples(rows):
    """Print what the base and the best adapter of the first seed make of the same prompt or problems."""
    first = [r for r in rows if r["seed"] == rows[0]["seed"] and r["sample"]]
    sign = 1 if rows[0]["higher_is_better"] else -1
    best = max((r for r in first if r["method"] not in ("start", "full")), default=None,
               key=lambda r: sign * r["metric"])
    for title, row in (("before", first[0]), (f"after, {best and best['method']}", best)):
        if row is not None:
            print(f"\n--- {title} ---\n" + "\n".join(row["sample"]))


if __name__ == "__main__":
    sys.exit(main())
