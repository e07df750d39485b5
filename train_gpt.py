"""Pretrain a small GPT, adapt it to another task by every method, compare: python train_gpt.py --help."""

import sys

import torch
import torch.nn.functional as F

from svmini import GPT, GPTConfig, cli, compare, load_adapter, loop, tasks, text

COMMANDS = ("pretrain", "finetune", "compare", "generate", "merge")
DATA = ["topics", "arithmetic", "tinyshakespeare", "file:PATH"]   # to adapt to; text is pretrained on stdlib
CONTEXT = 128
PRETRAIN = {
    "text": loop.Settings(steps=2600, lr=3e-3, batch_size=8, warmup=0.05, schedule="cosine",
                          weight_decay=0.1, betas=(0.9, 0.95)),
    "arithmetic": loop.Settings(steps=1500, lr=2e-3, batch_size=64, warmup=0.05, schedule="cosine",
                                weight_decay=0.1, betas=(0.9, 0.95)),
}
FINETUNE = {   # lr: put in from RATES, word by word
    "text": loop.Settings(steps=200, lr=0.0, batch_size=8),
    "arithmetic": loop.Settings(steps=300, lr=0.0, batch_size=64),
}
LAYERS = {"text": 4, "arithmetic": 3}
MAIN = ["full", "svfit", "svft:pattern=plain", "svft:off_diagonals=2", "svft:off_diagonals=8",
        "lora:rank=1", "lora:rank=2", "lora:rank=8", "dora:rank=8", "vera:rank=256"]
QUICK = ["full", "svft:off_diagonals=8", "lora:rank=8"]
RATES = {   # learning rates, found by: python train_gpt.py compare --methods ... --tune 5 [--data arithmetic]
    "text": {
        "full": 4e-3, "svfit": 1.6e-1, "svft:pattern=plain": 1.6e-1, "svft:off_diagonals=2": 8e-2,
        "svft:off_diagonals=8": 4e-2, "lora:rank=1": 4e-2, "lora:rank=2": 2e-2, "lora:rank=8": 2e-2,
        "dora:rank=8": 2e-2, "vera:rank=256": 1e-1},
    "arithmetic": {
        "full": 4e-3, "svfit": 8e-2, "svft:pattern=plain": 8e-2, "svft:off_diagonals=2": 4e-2,
        "svft:off_diagonals=8": 4e-2, "lora:rank=1": 2e-2, "lora:rank=2": 1e-2, "lora:rank=8": 1e-2,
        "dora:rank=8": 2e-2, "vera:rank=256": 1e-1},
}


def flags_of(argv):
    p = cli.parser("train_gpt.py", __doc__.split(":")[0], COMMANDS, DATA)
    p.add_argument("--prompt", default=None, metavar="TEXT", help="generate: what to continue")
    p.add_argument("--length", type=cli.number(1), default=100, help="generate: tokens to add")
    p.add_argument("--temperature", type=cli.number(0, float), default=0.8, help="generate: 0 is greedy")
    p.add_argument("--top-k", type=cli.number(1), default=None, help="generate: draw from the k likeliest tokens")
    p.add_argument("--n-layer", type=cli.number(1), default=None, help="of the model that is pretrained (4; 3)")
    p.add_argument("--n-head", type=cli.number(1), default=4, help="of the model that is pretrained")
    p.add_argument("--d-model", type=cli.number(1), default=128, help="of the model that is pretrained")
    flags = p.parse_args(argv)
    cli.check_flags(p, flags, COMMANDS, DATA)
    flags.kind = "arithmetic" if flags.data == "arithmetic" else "text"
    return flags


def cross_entropy(model, x, y):
    """Mean loss over tokens x, y (B, T), those of y = -100 left out."""
    return F.cross_entropy(model(x).flatten(0, 1).float(), y.flatten())


def text_task(corpus, device):
    """Language modelling as a loop.Task: cross entropy on at most 400 windows of val or test."""
    splits = {split: tokens.to(device) for split, tokens in corpus.splits.items()}
    windows = {split: text.windows(splits[split], CONTEXT) for split in ("val", "test")}   # too short fails here

    def evaluate(model, split):
        x, y = (t[:400] for t in windows[split])
        losses = [cross_entropy(model, a, b).item() * len(a) for a, b in zip(x.split(32), y.split(32))]
        return {"loss": sum(losses) / len(x), "metric": sum(losses) / len(x)}

    return loop.Task(
        name=corpus.name, metric_name="loss", higher_is_better=False, evaluate=evaluate, loss=cross_entropy,
        batch=lambda size, seed, step: text.batch(splits["train"], size, CONTEXT, seed, step))


def arithmetic_task(arithmetic, device):
    """Addition or subtraction as a loop.Task: loss on the answer, exact match in percent over 1,000 problems."""
    problems = {split: [t.to(device) for t in arithmetic.problems(split, 1000)] for split in ("val", "test")}

    def evaluate(model, split):
        return {"loss": None, "metric": tasks.exact_match(model, *problems[split])[0]}

    return loop.Task(
        name=f"arithmetic {arithmetic.operation}", metric_name="exact match", higher_is_better=True,
        evaluate=evaluate, loss=cross_entropy, batch=arithmetic.batch)


def pretrained(flags, out, machine):
    """The base model: from --init, from an earlier run in out, or pretrained now. Returns (model, about)."""
    if flags.init is not None:
        model, about = loop.load_model(flags.init, GPT)
        if (about["tokenizer"] == "arithmetic") != (flags.kind == "arithmetic"):
            raise ValueError(f"{flags.init} speaks {about['tokenizer'] if flags.kind == 'text' else 'text'}, "
                             f"which does not go with --data {flags.data}")
        return model, about
    if flags.kind == "arithmetic":
        about = {"data": "arithmetic +", "tokenizer": "arithmetic"}
        task, vocab_size = arithmetic_task(tasks.Arithmetic("+"), machine.device), tasks.Arithmetic.vocab_size
        block_size = tasks.Arithmetic.length
    else:
        source = text.read_text("stdlib")
        ranks = text.train_bpe(source)
        corpus = text.make_corpus("stdlib", source, text.bpe_tokenizer(ranks))
        about = {"data": f"stdlib {corpus.sha256[:12]}", "tokenizer": ranks}
        task, vocab_size, block_size = text_task(corpus, machine.device), len(ranks), CONTEXT
    config = GPTConfig(vocab_size, block_size, flags.n_layer or LAYERS[flags.kind], flags.n_head, flags.d_model)
    settings = cli.pretrain_settings(flags, PRETRAIN[flags.kind])
    torch.manual_seed(flags.seed)
    model = GPT(config)
    if flags.command != "pretrain":
        compare.check_words(compare.words_of(flags, MAIN, QUICK), model, flags.targets)
    return loop.pretrain(model, task, settings, machine, out / "pretrain", about, flags.resume)


def make_setup(flags, out, machine):
    """What `compare` needs: the base, the data to adapt to, settings, rates and what to show of a model."""
    if flags.kind == "text":
        source = text.read_text(flags.data, flags.data_dir)
        text.split_text(source)   # a file that cannot be used is found out now, not after pretraining
    base, about = pretrained(flags, out, machine)
    if flags.kind == "arithmetic":
        arithmetic = tasks.Arithmetic("-")
        task, sha = arithmetic_task(arithmetic, machine.device), "made by the program"
        prompts, answers = (t.to(machine.device) for t in arithmetic.problems("test", 1000))

        def sample(model):   # a few problems, as solved
            _, guesses = tasks.exact_match(model, prompts[:8], answers[:8])
            return [tasks.show(p.cpu(), a.cpu(), g.cpu()) for p, a, g in zip(prompts, answers, guesses)]
    else:
        tokenizer = tokenizer_of(about)
        corpus = text.make_corpus(flags.data, source, tokenizer)
        task, sha = text_task(corpus, machine.device), corpus.sha256
        prompt = corpus.splits["test"][None, :24].to(machine.device)

        def sample(model):   # the test text's first tokens, continued
            g = torch.Generator(machine.device).manual_seed(flags.seed)
            tokens = model.generate(prompt, 80, temperature=0.8, top_k=40, generator=g)
            return [tokenizer.decode(tokens[0].tolist())]
    settings = cli.finetune_settings(flags, FINETUNE[flags.kind])
    return compare.Setup(base, task, settings, machine, out, flags.targets, RATES[flags.kind], sample,
                         about={k: about[k] for k in ("data", "tokenizer")},
                         run={"data": flags.data, "sha256": sha}, resume=flags.resume, lr=flags.lr)


def tokenizer_of(about):
    return text.bpe_tokenizer(about["tokenizer"])


def show_samples(rows):
    """Print what the base and the best adapter made of the same prompt or problems."""
    first = [r for r in rows if r["seed"] == rows[0]["seed"] and r["metric"] is not None]
    sign = 1 if rows[0]["higher_is_better"] else -1
    best = max((r for r in first if r["method"] not in ("start", "full")), default=None,
               key=lambda r: sign * r["metric"])
    for title, row in (("before", first[0]), (f"after, {best and best['method']}", best)):
        if row is not None and row["sample"]:
            print(f"\n--- {title} ---\n" + "\n".join(row["sample"]))


def model_of(flags):
    """The model of --init, with --adapter on it where that is given. Returns (model, about)."""
    model, about = loop.load_model(flags.init, GPT)
    if flags.adapter is not None:
        load_adapter(model, flags.adapter)
        data = "arithmetic -" if about["tokenizer"] == "arithmetic" else "text"
        about = {"data": data, "tokenizer": about["tokenizer"]}
    return model, about


def generate(flags, machine):
    """Continue --prompt and print the whole."""
    if not flags.prompt:
        raise ValueError("generate needs --prompt TEXT with at least one character")
    model, about = model_of(flags)
    model.to(machine.device)
    generator = torch.Generator(machine.device).manual_seed(flags.seed)
    if about["tokenizer"] == "arithmetic":
        tokens = tasks.encode(flags.prompt)[None].to(machine.device)
        length = min(flags.length, tasks.ANSWER)
    else:
        tokens = torch.tensor([tokenizer_of(about).encode_ordinary(flags.prompt)], device=machine.device)
        length = flags.length
    print(machine.reason, file=sys.stderr)
    tokens = model.generate(tokens, length, flags.temperature, flags.top_k, generator)[0].cpu()
    print(tasks.decode(tokens) if about["tokenizer"] == "arithmetic" else tokenizer_of(about).decode(tokens.tolist()))


def main(argv=None):
    return cli.run(command, argv)


def command(argv):
    flags = flags_of(argv)
    machine = loop.pick_machine(flags.device, flags.dtype)
    if flags.command == "generate":   # whose output is the text alone
        generate(flags, machine)
        return
    out = cli.out_folder(flags, "out/gpt-" + compare.slug(flags.data))
    print(machine.reason)
    if flags.command == "pretrain":
        pretrained(flags, out, machine)
    elif flags.command == "merge":
        loop.save_merged(*model_of(flags), out / "merged.pt")
    else:
        rows = compare.run_command(flags, make_setup(flags, out, machine), MAIN, QUICK)
        show_samples(rows)


if __name__ == "__main__":
    sys.exit(main())
