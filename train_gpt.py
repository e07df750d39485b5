"""Pretrain a small GPT or take GPT-2, adapt it by every method, compare: python train_gpt.py --help."""

import sys

import torch
import torch.nn.functional as F

from svmini import GPT, GPTConfig, cli, compare, gpt, load_adapter, loop, tasks, text

COMMANDS = ("pretrain", "finetune", "compare", "generate", "merge")
# to adapt to; a model that is to speak is pretrained on stdlib, where no --init brings one
DATA = ["topics", "arithmetic", "tinyshakespeare", "file:PATH", "gsm8k", "qa:PATH"]
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
    "pairs": loop.Settings(steps=200, lr=0.0, batch_size=8),
}
MARKED = {   # problems that are marked; answers of text take long
    "arithmetic": {"val": 1000, "test": 1000}, "pairs": {"val": 100, "test": None},
}
LAYERS = {"text": 4, "arithmetic": 3}
MAIN = ["full", "svfit", "svft:pattern=plain", "svft:off_diagonals=2", "svft:off_diagonals=8",
        "lora:rank=1", "lora:rank=2", "lora:rank=8", "dora:rank=8", "vera:rank=256"]
QUICK = ["full", "svft:off_diagonals=8", "lora:rank=8"]
RATES = {   # learning rates
    # found by: python train_gpt.py compare --methods ... --tune 5 [--data arithmetic]; pairs take those of text
    "text": {
        "full": 4e-3, "svfit": 1.6e-1, "svft:pattern=plain": 1.6e-1, "svft:off_diagonals=2": 8e-2,
        "svft:off_diagonals=8": 4e-2, "lora:rank=1": 4e-2, "lora:rank=2": 2e-2, "lora:rank=8": 2e-2,
        "dora:rank=8": 2e-2, "vera:rank=256": 1e-1},
    "arithmetic": {
        "full": 4e-3, "svfit": 8e-2, "svft:pattern=plain": 8e-2, "svft:off_diagonals=2": 4e-2,
        "svft:off_diagonals=8": 4e-2, "lora:rank=1": 2e-2, "lora:rank=2": 1e-2, "lora:rank=8": 1e-2,
        "dora:rank=8": 2e-2, "vera:rank=256": 1e-1},
    # for published weights: svft's are those of its authors' scripts for Gemma-2B, the others a customary first try
    "published": {
        "full": 5e-5, "svfit": 5e-2, "svft:pattern=plain": 5e-2, "svft:off_diagonals=2": 5e-3,
        "svft:off_diagonals=8": 5e-3, "lora:rank=1": 5e-4, "lora:rank=2": 5e-4, "lora:rank=8": 5e-4,
        "dora:rank=8": 5e-4, "vera:rank=256": 2e-2},
}


def flags_of(argv):
    p = cli.parser("train_gpt.py", __doc__.split(":")[0], COMMANDS, DATA, ("gpt2", "gpt2, gpt2-medium, ..."))
    p.add_argument("--prompt", default=None, metavar="TEXT", help="generate: what to continue")
    p.add_argument("--length", type=cli.number(1), default=100, help="generate: tokens to add")
    p.add_argument("--temperature", type=cli.number(0, float), default=0.8, help="generate: 0 is greedy")
    p.add_argument("--top-k", type=cli.number(1), default=None, help="generate: draw from the k likeliest tokens")
    p.add_argument("--context", type=cli.number(2), default=CONTEXT, help="tokens of text at a time (128)")
    p.add_argument("--n-layer", type=cli.number(1), default=None, help="of the model that is pretrained (4; 3)")
    p.add_argument("--n-head", type=cli.number(1), default=None,
                   help="of the model that is pretrained (4), or of weights with heads of another width than 64")
    p.add_argument("--d-model", type=cli.number(1), default=128, help="of the model that is pretrained")
    flags = p.parse_args(argv)
    cli.check_flags(p, flags, COMMANDS, DATA)
    pairs = flags.data == "gsm8k" or flags.data.startswith("qa:")
    if flags.context != CONTEXT and flags.data == "arithmetic":
        raise ValueError("--context belongs to text; a problem of arithmetic has 12 tokens")
    if flags.context != CONTEXT and pairs and flags.init is not None:
        raise ValueError("--context speaks of text, or of a model that is pretrained here; pairs have the context of "
                         "the model that --init brings")
    flags.kind = "arithmetic" if flags.data == "arithmetic" else "pairs" if pairs else "text"
    return flags


def cross_entropy(model, x, y):
    """Mean loss over tokens x, y (B, T), those of y = -100 left out."""
    return F.cross_entropy(model(x).flatten(0, 1).float(), y.flatten())


def text_task(corpus, context, device):
    """Language modelling as a loop.Task: cross entropy on at most 400 windows of val or test, `context` tokens each."""
    splits = {split: tokens.to(device) for split, tokens in corpus.splits.items()}
    windows = {split: text.windows(splits[split], context) for split in ("val", "test")}   # too short fails here

    def evaluate(model, split):
        x, y = (t[:400] for t in windows[split])
        n = max(1, 4096 // context)
        losses = [cross_entropy(model, a, b).item() * len(a) for a, b in zip(x.split(n), y.split(n))]
        return {"loss": sum(losses) / len(x), "metric": sum(losses) / len(x)}

    return loop.Task(
        name=corpus.name, metric_name="loss", higher_is_better=False, evaluate=evaluate, loss=cross_entropy,
        batch=lambda size, seed, step: text.batch(splits["train"], size, context, seed, step))


def answer_task(name, data, sizes):
    """Arithmetic or question-answer pairs as a loop.Task: loss on the answers, exact match in percent.

    sizes: {"val", "test"}: how many problems are marked, None for all.
    """
    problems = {split: data.problems(split, n) for split, n in sizes.items()}

    def evaluate(model, split):
        loss = data.loss(model, split) if hasattr(data, "loss") else None
        return {"loss": loss, "metric": tasks.exact_match(model, *problems[split], data)[0]}

    return loop.Task(name=name, metric_name="exact match", higher_is_better=True,
                     evaluate=evaluate, loss=cross_entropy, batch=data.batch)


def base_of(flags):
    """The model of --init. Returns (model, about)."""
    model, about = loop.load_base(flags.init, GPT, gpt.GPT2_URLS, GPT.from_gpt2, flags.n_head)
    if about["published"]:
        about["tokenizer"] = "gpt2"
        if model.config.vocab_size != text.GPT2_VOCAB:
            raise ValueError(f"{flags.init} knows {model.config.vocab_size:,} tokens, and GPT-2's tokenizer "
                             f"{text.GPT2_VOCAB:,}: give weights that were trained with it")
    if not {"data", "tokenizer"} <= about.keys():
        raise ValueError(f"{flags.init} does not say what it was trained on, with which tokenizer: pretrain it again")
    return model, about


def pretrained(flags, out, machine):
    """The base model of an earlier run in out, or one that is pretrained now. Returns (model, about)."""
    if flags.kind == "arithmetic":
        about = {"data": "arithmetic +", "tokenizer": "arithmetic", "published": False}
        task = answer_task("arithmetic +", tasks.Arithmetic("+"), MARKED["arithmetic"])
        vocab_size = tasks.Arithmetic.vocab_size
        block_size = tasks.Arithmetic.length
    else:
        source = text.read_text("stdlib")
        ranks = text.train_bpe(source)
        corpus = text.make_corpus("stdlib", source, text.bpe_tokenizer(ranks))
        about = {"data": f"stdlib {corpus.sha256[:12]}", "tokenizer": ranks, "published": False}
        task, vocab_size = text_task(corpus, flags.context, machine.device), len(ranks)
        block_size = flags.context
    kind = "arithmetic" if flags.kind == "arithmetic" else "text"
    config = GPTConfig(vocab_size, block_size, flags.n_layer or LAYERS[kind], flags.n_head or 4, flags.d_model)
    settings = cli.pretrain_settings(flags, PRETRAIN[kind])
    torch.manual_seed(flags.seed)
    model = GPT(config)
    if flags.command != "pretrain":
        compare.check_words(compare.words_of(flags, MAIN, QUICK), model, flags.targets)
    return loop.pretrain(model, task, settings, machine, out / "pretrain", about, flags.resume)


def make_setup(flags, out, machine):
    """What `compare` needs: the base, the data to adapt to, settings, rates and what to show of a model."""
    if flags.kind == "text":   # a file that cannot be used is found out now, not after pretraining
        source = text.read_text(flags.data, flags.data_dir)
        text.split_text(source)
    elif flags.kind == "pairs":
        splits = tasks.split_pairs(flags.data, flags.data_dir, flags.seed)
    base, about = base_of(flags) if flags.init is not None else pretrained(flags, out, machine)
    if (about["tokenizer"] == "arithmetic") != (flags.kind == "arithmetic"):
        raise ValueError(f"{flags.init} speaks {'text' if flags.kind == 'arithmetic' else 'arithmetic'}, "
                         f"which does not go with --data {flags.data}")
    if flags.context != CONTEXT and flags.context > base.config.block_size:
        raise ValueError(f"--context {flags.context} is longer than the model's, {base.config.block_size} tokens")
    if flags.kind == "text":
        tokenizer = tokenizer_of(about)
        corpus = text.make_corpus(flags.data, source, tokenizer)
        context = min(flags.context, base.config.block_size)
        task, sha = text_task(corpus, context, machine.device), corpus.sha256
        prompt = corpus.splits["test"][None, :24].to(machine.device)

        def sample(model):   # the test text's first tokens, continued
            g = torch.Generator(machine.device).manual_seed(flags.seed)
            tokens = model.generate(prompt, 80, temperature=0.8, top_k=40, generator=g)
            return [tokenizer.decode(tokens[0].tolist())]
    else:
        if flags.kind == "arithmetic":
            data, name, sha = tasks.Arithmetic("-"), "arithmetic -", "made by the program"
        else:
            data = tasks.Pairs(splits, tokenizer_of(about), base.config.block_size)
            name, sha = flags.data, data.sha256
            print(f"{name}: " + ", ".join(f"{len(pairs)} pairs to {split}" for split, pairs in splits.items()))
            if data.left_out:
                print(f"{data.left_out} of {len(splits['train'])} training pairs do not fit into the model's context "
                      f"of {base.config.block_size} tokens and are left out")
        sizes = MARKED[flags.kind]
        task = answer_task(name, data, sizes)
        prompts, answers = (part[:8] for part in data.problems("test", sizes["test"]))

        def sample(model):   # a few problems, as solved
            guesses = tasks.greedy(model, prompts, data.max_new, data.end)
            return [data.show(*each) for each in zip(prompts, answers, guesses)]
    settings = cli.finetune_settings(flags, FINETUNE[flags.kind])
    rates = RATES["published"] if about["published"] else RATES["arithmetic" if flags.kind == "arithmetic" else "text"]
    run = {"data": flags.data, "sha256": sha} | ({"context": context} if flags.kind == "text" else {})
    return compare.Setup(base, lambda seed: task, settings, machine, out, flags.targets, rates, sample,
                         about={k: about[k] for k in ("data", "tokenizer", "published")},
                         run=run, resume=flags.resume, lr=flags.lr)


def tokenizer_of(about):
    return text.gpt2_tokenizer() if about["tokenizer"] == "gpt2" else text.bpe_tokenizer(about["tokenizer"])


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
    model, about = base_of(flags)
    if flags.adapter is not None:
        load_adapter(model, flags.adapter)
        about = {"data": "adapted", "tokenizer": about["tokenizer"], "published": about["published"]}
    return model, about


def generate(flags, machine):
    """Continue --prompt and print the whole, as far as the token that ends an answer."""
    if not flags.prompt:
        raise ValueError("generate needs --prompt TEXT with at least one character")
    model, about = model_of(flags)
    model.to(machine.device)
    generator = torch.Generator(machine.device).manual_seed(flags.seed)
    if about["tokenizer"] == "arithmetic":
        prompt, length, end, decode = tasks.encode(flags.prompt), min(flags.length, tasks.ANSWER), None, tasks.decode
    else:
        tokenizer, length = tokenizer_of(about), flags.length
        prompt, end = torch.tensor(tokenizer.encode_ordinary(flags.prompt)), tasks.end_token(tokenizer)
        decode = lambda tokens: tokenizer.decode(tokens.tolist())
    print(machine.reason, file=sys.stderr)
    tokens = prompt[None].to(machine.device)
    new = model.generate(tokens, length, flags.temperature, flags.top_k, generator)[0, len(prompt):].cpu()
    if end in new.tolist():
        new = new[:new.tolist().index(end)]
    print(decode(torch.cat([prompt, new])))


def main(argv=None):
    return cli.run(command, argv)


def command(argv):
    flags = flags_of(argv)
    machine = loop.pick_machine(flags.device, flags.dtype, flags.compile)
    if flags.command == "generate":   # whose output is the text alone
        generate(flags, machine)
        return
    out = cli.out_folder(flags, "out/gpt-" + compare.slug(flags.data))
    print(machine.reason)
    if flags.command == "pretrain":
        pretrained(flags, out, machine)
    elif flags.command == "merge":
        loop.save_merged(*model_of(flags), out, flags.format, GPT.to_gpt2)
    else:
        rows = compare.run_command(flags, make_setup(flags, out, machine), MAIN, QUICK)
        show_samples(rows)


if __name__ == "__main__":
    sys.exit(main())
