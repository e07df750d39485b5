"""python -m svmini.bench: what a training step of each method costs in a model's transformer blocks.

The blocks alone, with random weights on a fixed random input: embeddings and head cost every method the same, and
GPT-2's vocabulary would drown what differs. A linear head of two classes on the mean token gives a loss. Every row is
timed once a round, A B C then C B A, so that a drift of the machine hits all alike, and compared round by round.
"""

import argparse
import copy
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from . import files, svd
from .adapter import TARGETS, adapt, find_linears, fitting_linears, merge, options_of, save_adapter
from .cli import Parser, number, parse_method, run, same_method
from .loop import Machine, Settings, Stopped, make_optimizer, pick_machine
from .report import mean_and_spread, size
from .transformer import Block, init_linears

GPT, VIT = {"causal": True, "gelu": "tanh", "eps": 1e-5}, {"causal": False, "gelu": "none", "eps": 1e-6}
# layers, width, heads, block, sequences in a batch, tokens in a sequence
MODELS = {"tiny": (4, 128, 4, GPT, 8, 128), "vit_b_16": (12, 768, 12, VIT, 8, 197), "gpt2": (12, 768, 12, GPT, 4, 512)}
WORDS = ("head", "svfit", "svfit:rank=96", "svft:pattern=plain", "svft:off_diagonals=2", "svft:off_diagonals=8",
         "svft:pattern=random,off_diagonals=8", "lora:rank=8", "dora:rank=8", "vera:rank=256",
         "boft:block_size=4,factors=2")
PLAIN = {"frozen": 1, "base": 1, "merged": 1, "full": 2, "head": 0}   # which of x, W need a gradient


class Blocks(nn.Module):
    """The blocks of a model and a head of two classes; x (B, T, d) -> (B, 2)."""

    def __init__(self, layers, width, heads, block):
        super().__init__()
        self.blocks = nn.Sequential(*(Block(width, heads, 4 * width, **block) for _ in range(layers)))
        self.head = nn.Linear(width, 2)
        init_linears(self, std=0.02 * (768 / width) ** 0.5)

    def forward(self, x):
        return self.head(self.blocks(x).mean(dim=1))


@dataclass
class Bench:
    """What every row has in common. x (B, T, d) and classes y (B,) on the device.  inference: forward passes alone."""
    base: Blocks
    x: torch.Tensor
    y: torch.Tensor
    machine: Machine
    targets: tuple
    inference: bool


def row_model(word, bench):
    """A copy of the base for this row: frozen and base with the LayerNorms and the head trained, so that the gradient
    passes every layer; other words as adapt has them."""
    model = copy.deepcopy(bench.base)
    if word not in ("frozen", "base"):
        method, options, targets = parse_method(word)
        return adapt(model, method, targets or bench.targets, **options)
    for name, p in model.named_parameters():
        p.requires_grad_("norm" in name or name.startswith("head."))
    return model


def make_step(model, bench):
    """A function of no arguments: one training step by fused AdamW, or one forward pass. Moves the model."""
    model.to(bench.machine.device).train(not bench.inference)
    optimizer = None if bench.inference else make_optimizer(model, Settings(steps=1, lr=1e-6, batch_size=len(bench.x)))

    def step():
        with torch.inference_mode(bench.inference), bench.machine.autocast():
            logits = model(bench.x)
        if not bench.inference:
            F.cross_entropy(logits, bench.y).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return step


def units(word, d_out, d_in, T, inference=False):
    """Multiplications of one layer for T tokens, forward and backward, by the cheapest known order of its products, in
    units of T d_out d_in. None for a method that is not known here, or a rank that hangs on the weights."""
    if word in PLAIN:
        return 1 if inference else 1 + PLAIN[word]
    method, options, _ = parse_method(word)
    o, D = options_of(method) | options, min(d_out, d_in)
    r, a = o.get("rank"), D / max(d_out, d_in)

    def thin(k, gradients):   # (k, d_in) x, then (d_out, k) times that
        return [(k / d_out, gradients), (k / d_in, gradients)]

    # an order is a list of products (size, gradients): each of the two factors that needs a gradient costs a product
    # of the same size in the backward pass
    ways, frozen, fold = [], [(1, 1)], (a * D / T, 1)               # fold: Σ + M times the smaller of U and V
    if (method == "svfit" and r not in (None, D)) or method == "vera":
        ways = [frozen + thin(r, 1)]                                # W0 x + U_r ((s − σ) ⊙ V_rᵀ x), Λ_b B Λ_d A x
    elif (method == "svfit" and o["energy"] is None) or (method == "svft" and o["pattern"] == "plain"):
        ways = [[(D / T, 1), (1, 2)], thin(D, 1)]                   # (U diag(s) Vᵀ) x, or U (s ⊙ Vᵀ x)
    elif method == "svft":                                          # built, folded, or one by one
        ways = [[fold, (D / T, 1), (1, 2)], [fold, (a, 2), (1, 1)], [*thin(D, 1), (a, 2)]]
    elif method in ("lora", "dora"):                                # W0 x + B A x; DoRA's norm takes B A whole
        ways = [frozen + thin(r, 2) + ([(r / T, 0 if o["detach_norm"] else 2)] if method == "dora" else [])]
    elif method == "boft":                                          # W0 (R x), R in blocks of b 2^(m−1)
        ways = [frozen + [(o["block_size"] * 2 ** (o["factors"] - 1) / d_out, 2)]]
    return min((sum(n * (1 if inference else 1 + g) for n, g in way) for way in ways), default=None)


def predicted(word, reference, bench):
    """Ratio of word's operation count to reference's over all layers, q kᵀ and p v; None where units knows none. Not in
    it: AdamW, which for full runs over every weight; what goes number by number; and that the first block's query,
    key and value need no input gradient where the first LayerNorm is frozen."""
    def total(word):
        (B, T, d), passes = bench.x.shape, 1 if bench.inference or word == "head" else 3
        adapted = TARGETS if word in PLAIN else parse_method(word)[2] or bench.targets
        counts = [2 * T * d * passes * len(bench.base.blocks)]      # of attention, in units of B T
        for name, layer in find_linears(bench.base, TARGETS).items():
            n = units(word if name.split(".")[-1] in adapted else "frozen", *layer.weight.shape, B * T, bench.inference)
            counts.append(n and n * layer.weight.numel())
        return None if None in counts else sum(counts)

    return total(word) and total(word) / total(reference)


def time_rounds(steps, rounds, n, device):
    """{name: [ms per step, round by round]}. steps: {name: function}; n calls of each a round, one before the first."""
    wait = getattr(torch, device.type).synchronize   # torch.cpu has one too
    times = {name: [] for name in steps}
    plan = [(i, name) for i in range(rounds + 1) for name in list(steps)[::-1 if i % 2 else 1]]
    for i, name in tqdm(plan, "time", leave=False, disable=None):
        wait()
        began = time.perf_counter()
        for _ in range(n if i else 1):
            steps[name]()
        wait()
        if i:   # round 0 warms up
            times[name].append(1000 * (time.perf_counter() - began) / n)
    return times


def ratios(times, name, reference):
    """Round by round, how many times the reference's time."""
    return [t / r for t, r in zip(times[name], times[reference])]


def alike(times, reference):
    """{name: slower names that cannot be told from it}: the mean of the paired differences of their ratios to the
    reference lies within two of its standard errors."""
    order, found = sorted(times, key=lambda name: statistics.median(times[name])), {}
    for a, b in itertools.combinations(order, 2):
        d = [p - q for p, q in zip(ratios(times, b, reference), ratios(times, a, reference))]
        if abs(statistics.mean(d)) <= 2 * statistics.stdev(d) / len(d) ** 0.5:
            found.setdefault(a, []).append(b)
    return found


def sizes(word, model):
    """weights_mb: MB (10⁶ bytes) of parameters and buffers, a shared storage once. file_bytes: of the adapter file; for
    full of the blocks' weights; None where nothing is to be stored."""
    storages = [t.untyped_storage() for t in [*model.parameters(), *model.buffers()]]
    weights_mb = sum({s.data_ptr(): s.nbytes() for s in storages}.values()) / 1e6
    n_bytes = sum(p.numel() * p.element_size() for p in model.blocks.parameters()) if word == "full" else None
    if word != "full" and hasattr(model, "adaptation"):
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(model, Path(folder) / "adapter.pt")
            n_bytes = (Path(folder) / "adapter.pt").stat().st_size
    return {"weights_mb": weights_mb, "file_bytes": n_bytes}


def memory(model, bench):
    """What two steps need at their peak above the weights, in MB: activations, gradients, the optimizer's state and
    what is only there for a moment. None where the system does not tell. For a process from memory_of."""
    def resident(key):   # a line of Linux's own account, "VmRSS:   1234 kB"
        return 1024 * int(Path("/proc/self/status").read_text().partition(key + ":")[2].split()[0])

    make_step(model, bench)()   # loads code, which would count as memory of the first step
    svd.forget()
    gc.collect()
    cuda = bench.machine.device.type == "cuda"
    try:   # the peak starts anew
        torch.cuda.reset_peak_memory_stats() if cuda else Path("/proc/self/clear_refs").write_text("5")
        before = torch.cuda.memory_allocated() if cuda else resident("VmRSS")
        time_rounds({"": make_step(model, bench)}, 1, 1, bench.machine.device)
        return ((torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")) - before) / 1e6
    except (OSError, IndexError):   # no such file or line
        return None


def memory_of(word, argv):
    """MB of a row's step, from a fresh process; None where it fails or cannot tell. There glibc gives every tensor's
    memory back at once: else a step would fill unseen what the SVD left, and the peak would vary from run to run."""
    child = subprocess.run([sys.executable, "-m", "svmini.bench", *argv, "--memory-of", word], capture_output=True,
                           text=True, cwd=Path(__file__).parent.parent,
                           env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"})
    print(child.stderr, end="", file=sys.stderr)   # why, where it fails
    return json.loads("null" if child.returncode else child.stdout)


def table_lines(rows, references, unit):
    """The table as lines of Markdown, every column as wide as its widest cell."""
    cells = [["method", f"ms/{unit}", *(f"x {r}" for r in references), f"predicted x {references[-1]}",
              f"{unit} MB", "weights MB", "set-up s", "file"]]
    for row in rows:
        optional = [(row["predicted"], 2), (row["step_mb"], 1), (row["weights_mb"], 1), (row["setup_s"], 1)]
        cells.append([row["method"], f"{row['ms']:.1f}", *(mean_and_spread(row[f"x_{r}"], 2) for r in references),
                      *("-" if v is None else f"{v:.{digits}f}" for v, digits in optional), size(row["file_bytes"])])
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])])
    return ["| " + " | ".join([c[0].ljust(widths[0]), *map(str.rjust, c[1:], widths[1:])]) + " |" for c in cells]


def command(argv):
    p = Parser("-m svmini.bench", description="What a training step of each method costs.")
    a = p.add_argument
    a("--model", default="tiny", choices=tuple(MODELS), help="whose blocks, with random weights")
    a("--layers", type=number(1), metavar="N", help="blocks (default: as many as the model has)")
    a("--batch", type=number(1), metavar="N", help="sequences in a batch (default: by model)")
    a("--tokens", type=number(1), metavar="N", help="tokens in a sequence (default: by model)")
    a("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="where to compute")
    a("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="of autocast")
    a("--methods", nargs="+", default=WORDS, metavar="M", help="words beside frozen and full (default: every method)")
    a("--targets", default=",".join(TARGETS), metavar="A,B", help="layers to adapt, where a word names none")
    a("--rounds", type=number(3), default=5, metavar="N", help="every row once a round")
    a("--steps", type=number(1), default=2, metavar="N", help="steps of a row in a round")
    a("--inference", action="store_true", help="the forward pass alone, also of a merged model")
    a("--no-memory", action="store_true", help="leave out memory, which takes a process a row")
    a("--seed", type=number(0), default=0, metavar="N", help="of weights and input")
    a("--json", metavar="FILE", help="also write the numbers there")
    a("--memory-of", help=argparse.SUPPRESS)   # in a fresh process: print this row's step MB and no more
    flags = p.parse_args(argv)
    layers, *block, batch, tokens = MODELS[flags.model]
    machine = pick_machine(flags.device, flags.dtype)
    if flags.json is not None and (Path(flags.json).is_dir() or not Path(flags.json).absolute().parent.is_dir()):
        raise ValueError(f"--json {flags.json} is no place for a file: give a file in a folder that is there")
    torch.manual_seed(flags.seed)
    base = Blocks(flags.layers or layers, *block)
    x = torch.randn(flags.batch or batch, flags.tokens or tokens, base.head.in_features).to(machine.device)
    y = torch.arange(len(x), device=machine.device) % 2
    bench = Bench(base, x, y, machine, tuple(t for t in flags.targets.split(",") if t), flags.inference)
    references = ("base",) if flags.inference else ("frozen", "full")
    words = list({same_method(w): w for w in flags.methods if w not in references}.values())
    if flags.inference and not set(words) - set(PLAIN):
        raise ValueError("--inference merges a method: give at least one in --methods")
    find_linears(base, bench.targets)
    for method, options, targets in map(parse_method, words):   # before the work starts
        if method not in PLAIN:
            fitting_linears(base, method, targets or bench.targets, options)
    if flags.memory_of is not None:
        last = flags.memory_of == "merged"
        model = row_model(words[-1] if last else flags.memory_of, bench)
        print(json.dumps(memory(merge(model) if last else model, bench)))
        return
    try:
        measure(bench, references, words, flags, argv)
    except KeyboardInterrupt:
        raise Stopped("stopped: nothing was written") from None


def measure(bench, references, words, flags, argv):
    """Measure and print; the rows are references, then words, and for inference the last word's model merged."""
    (B, T, d), unit, rows, steps = bench.x.shape, "forward" if bench.inference else "step", {}, {}
    print(f"{bench.machine.reason}; torch {torch.__version__}\n{flags.model}: "
          f"{len(bench.base.blocks)} blocks of width {d}, {B} x {T} tokens, {flags.rounds} rounds of {flags.steps}\n")
    for word in tqdm([*references, *words, *["merged"] * bench.inference], "set up", leave=False, disable=None):
        svd.forget()
        began = time.perf_counter()
        model = merge(copy.deepcopy(model)) if word == "merged" else row_model(word, bench)
        rows[word] = {"method": word, "setup_s": None if word in PLAIN else time.perf_counter() - began,
                      "predicted": predicted(word, references[-1], bench), "step_mb": None, **sizes(word, model)}
        steps[word] = make_step(model, bench)
    svd.forget()
    times = time_rounds(steps, flags.rounds, flags.steps, bench.machine.device)
    del steps, model   # the memory is for the processes
    for word in tqdm([] if flags.no_memory else rows, "memory", leave=False, disable=None):
        rows[word]["step_mb"] = memory_of(word, argv)
    for word, row in rows.items():
        row |= {"ms": statistics.median(times[word]), "times_ms": times[word],
                **{f"x_{r}": ratios(times, word, r) for r in references}}
    same = alike(times, references[-1])
    print(*table_lines(rows.values(), references, unit), "", sep="\n")
    print("ms: median of the rounds; x: mean ± standard deviation of the ratios, round by round\n"
          "set-up s: each row with an SVD of its own; a comparison does it once for all")
    if not flags.no_memory and any(row["step_mb"] is None for row in rows.values()):
        print(f"{unit} MB: - where the system does not tell (Linux and CUDA do), or the process for it failed")
    print("cannot be told apart, within 2 standard errors of the paired difference:" + ("" if same else " none"),
          *(f"  {word} ~ {', '.join(slower)}" for word, slower in same.items()), sep="\n")
    if flags.json is not None:
        about = vars(flags) | {"layers": len(bench.base.blocks), "batch": B, "tokens": T, "methods": words, "width": d,
                               "machine": bench.machine.reason, "threads": torch.get_num_threads(),
                               "torch": torch.__version__}
        files.write_text(flags.json, json.dumps({"about": about, "rows": list(rows.values()), "alike": same},
                                                indent=1, ensure_ascii=False) + "\n")


def main(argv=None):
    return run(command, argv)


if __name__ == "__main__":
    sys.exit(main())
