"""python -m svmini.bench: what a training step of each method costs in a model's transformer blocks.

The blocks alone, with random weights on a fixed random input: embeddings and head cost every method the same, and
GPT-2's vocabulary would drown what differs. A linear head of two classes on the mean token gives a loss. Every row is
timed once a round, A B C then C B A, so that a drift of the device_config hits all alike, and compared round by round.
Products and memory are counted in a real step, not timed: they are the same in every run.
"""

import copy
import json
import statistics
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from . import files
from .adapting import adapt, find_linears, merge
from .cli import Parser, add_device, names, number, run_command
from .errors import InputError
from .methods import parse_spec, svd
from .models.transformer import Block, init_linears
from .training import compare
from .training.loop import TrainConfig, Stopped, make_optimizer
from .training.device import DeviceConfig, resolve_device
from .training.report import markdown, spread

GPT, VIT = {"causal": True, "gelu": "tanh", "eps": 1e-5}, {"causal": False, "gelu": "none", "eps": 1e-6}
# layers, width, heads, block, sequences in a batch, tokens in a sequence
MODELS = {"tiny": (4, 128, 4, GPT, 8, 128), "vit_s_14": (12, 384, 6, VIT, 8, 50),
          "vit_b_16": (12, 768, 12, VIT, 8, 197), "gpt2": (12, 768, 12, GPT, 4, 512)}
SPECS = ["head", "svfit", "svfit:rank=96", "svft:pattern=plain", "svft:off_diagonals=2", "svft:off_diagonals=8",
         "svft:pattern=random,off_diagonals=8", "lora:rank=8", "dora:rank=8", "vera:rank=256",
         "boft:block_size=4,factors=2"]


class Blocks(nn.Module):
    """The blocks of a model and a head of two classes; x (B, T, d) -> (B, 2)."""
    targets = ("query", "key", "value", "out", "up", "down")
    also_train = ("head",)

    def __init__(self, layers, width, heads, block):
        super().__init__()
        self.blocks = nn.Sequential(*(Block(width, heads, 4 * width, **block) for _ in range(layers)))
        self.head = nn.Linear(width, 2)
        init_linears(self, std=0.02 * (768 / width) ** 0.5)

    def forward(self, x):
        return self.head(self.blocks(x).mean(dim=1))


@dataclass(frozen=True)
class Bench:
    """What every row has in common. x (B, T, d) and classes y (B,) on the device.  inference: forward passes alone."""
    base: Blocks
    x: torch.Tensor
    y: torch.Tensor
    device_config: DeviceConfig
    inference: bool = False


class Step:
    """Called without arguments: one training step of a model by fused AdamW, or one forward pass. Moves the model."""

    def __init__(self, model, bench):
        self.forward, self.bench = model.to(bench.device_config.device).train(not bench.inference), bench
        train_config = TrainConfig(steps=1, lr=1e-6, batch_size=len(bench.x))
        self.optimizer = None if bench.inference else make_optimizer(model, train_config)

    def __call__(self):
        b = self.bench
        with torch.inference_mode(b.inference), b.device_config.autocast():
            logits = self.forward(b.x)
        if not b.inference:
            F.cross_entropy(logits, b.y).backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


def row_model(spec, bench):
    """A copy of the base for this row: frozen and base with the LayerNorms and the head trained, so that the gradient
    passes every layer; other specs as adapt has them."""
    model = copy.deepcopy(bench.base)
    if spec not in ("frozen", "base"):
        method, options, targets = parse_spec(spec)
        return adapt(model, method, targets, **options)
    for name, p in model.named_parameters():
        p.requires_grad_("norm" in name or name.startswith("head."))
    return model


def flops_of(work):
    """Multiplications and additions of all matrix products in work(). Not in it: AdamW, and what goes number by number.
    Attention takes its plain form, whose products can be counted on every device."""
    def in_place(y, a, b, **_):   # y += a b, as in methods.adapter.add_update; torch's counter knows only y + a b
        return 2 * a[0] * a[1] * b[1]

    known = {torch.ops.aten.addmm_: in_place}
    with FlopCounterMode(display=False, custom_mapping=known) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return counter.get_total_flops()


def saved_bytes(model, work):
    """Bytes that autograd saves in work() for the backward pass, each storage once, the model's own weights not."""
    own, saved = storages([*model.parameters(), *model.buffers()]), {}

    def pack(tensor):
        saved.update(storages([tensor]))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(size for place, size in saved.items() if place not in own)


def storages(tensors):
    """{place in memory: bytes}: tensors that share a storage, or are views of one, count once."""
    return {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}


def account(step, model):
    """{"weights_mb", "saved_mb", "state_mb", "peak_mb", "flops"} of a step, in MB (10⁶ bytes): the model's weights,
    what autograd saves, gradients with the optimizer's state, on CUDA the peak above the weights. Runs the step."""
    def megabytes(tensors):
        return sum(storages(tensors).values()) / 1e6

    cuda = step.bench.device_config.device.type == "cuda"
    before = torch.cuda.memory_allocated() if cuda else 0
    row = {"weights_mb": megabytes([*model.parameters(), *model.buffers()]), "flops": flops_of(step)}
    if step.optimizer is not None:
        row["saved_mb"] = saved_bytes(model, step) / 1e6
        state = [t for values in step.optimizer.state.values() for t in values.values()]
        row["state_mb"] = megabytes(state) + megabytes(step.optimizer.state)   # a gradient for each that is trained
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        step()
        row["peak_mb"] = (torch.cuda.max_memory_allocated() - before) / 1e6
    return row


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


def measure(bench, references, specs, rounds, n):
    """One dict a row: the references, then specs, and for inference the last spec's model merged."""
    rows, steps, model = {}, {}, None
    for spec in tqdm([*references, *specs, *["merged"] * bench.inference], "set up", leave=False, disable=None):
        svd.clear_svd_cache()   # each row pays for its own
        began = time.perf_counter()
        model = merge(copy.deepcopy(model)) if spec == "merged" else row_model(spec, bench)
        rows[spec], steps[spec] = {"method": spec, "setup_s": time.perf_counter() - began}, Step(model, bench)
        rows[spec] |= account(steps[spec], model)
        if bench.device_config.compile:
            steps[spec].forward = torch.compile(model)
    svd.clear_svd_cache()
    times = time_rounds(steps, rounds, n, bench.device_config.device)
    for spec, row in rows.items():
        row |= {"ms": statistics.median(times[spec]), "times_ms": times[spec],
                "x_flops": row["flops"] / rows[references[-1]]["flops"]}
        row |= {f"x_{r}": [t / u for t, u in zip(times[spec], times[r])] for r in references}
    return list(rows.values())


def table_lines(rows, references, inference):
    """The table as lines of Markdown, with the columns that there are here."""
    columns = {"weights_mb": "weights MB", "saved_mb": "activation MB", "state_mb": "gradients, AdamW MB",
               "peak_mb": "peak MB", "setup_s": "set-up s"}
    columns = {key: title for key, title in columns.items() if key in rows[0]}
    cells = [["method", "ms/forward" if inference else "ms/step", *(f"x {r}" for r in references),
              f"matmul FLOPs x {references[-1]}", *columns.values()]]
    for row in rows:
        cells.append([row["method"], f"{row['ms']:.1f}", *(spread(row[f"x_{r}"], ".2f") for r in references),
                      f"{row['x_flops']:.2f}", *(f"{row[key]:.1f}" for key in columns)])
    return markdown(cells, left=("method",))


def command(argv):
    p = Parser("-m svmini.bench", "What a training step of each method costs.")
    a = p.add_argument
    a("--model", default="tiny", choices=tuple(MODELS), help="whose blocks, with random weights (tiny)")
    a("--layers", type=number(1), metavar="N", help="blocks (as many as the model has)")
    a("--batch", type=number(1), metavar="N", help="sequences in a batch (by model)")
    a("--tokens", type=number(1), metavar="N", help="tokens in a sequence (by model)")
    a("--methods", nargs="+", default=SPECS, metavar="M", help="beside frozen and full (the main ones); all: every one")
    a("--targets", type=names, metavar="A,B", help="layers to adapt, where a spec names none (all)")
    a("--rounds", type=number(2), default=5, metavar="N", help="every row once a round (5)")
    a("--steps", type=number(1), default=2, metavar="N", help="steps of a row in a round (2)")
    a("--inference", action="store_true", help="the forward pass alone, also of a merged model")
    a("--compile", action="store_true", help="through torch.compile")
    a("--json", metavar="FILE", help="also write the numbers there")
    add_device(p)
    flags = p.parse_args(argv)
    layers, *block, batch, tokens = MODELS[flags.model]
    device_config = resolve_device(flags.device, flags.dtype, flags.compile)
    torch.manual_seed(0)
    base = Blocks(flags.layers or layers, *block)
    x = torch.randn(flags.batch or batch, flags.tokens or tokens, base.head.in_features).to(device_config.device)
    bench = Bench(base, x, torch.arange(len(x), device=device_config.device) % 2, device_config, flags.inference)
    references = ("base",) if flags.inference else ("frozen", "full")
    find_linears(base, flags.targets or base.targets)
    specs = compare.all_specs(SPECS, base, flags.targets) if flags.methods == ["all"] else flags.methods
    specs = [spec for spec in compare.plan(specs, base, flags.targets, {}) if spec not in references]
    if flags.inference and not set(specs) - {"full", "head"}:
        raise InputError("--inference merges a method: give at least one in --methods")
    run_info = {"model": flags.model, "layers": len(base.blocks), "width": x.shape[2], "batch": len(x),
             "tokens": x.shape[1], "rounds": flags.rounds, "steps": flags.steps, "device_config": device_config.reason,
             "torch": torch.__version__}
    print(", ".join(f"{key} {value}" for key, value in run_info.items()) + "\n")
    try:
        rows = measure(bench, references, specs, flags.rounds, flags.steps)
    except KeyboardInterrupt:
        raise Stopped("stopped: nothing was written") from None
    print(*table_lines(rows, references, flags.inference), "", sep="\n")
    print("ms: median of the rounds; x: mean ± standard deviation of the ratios, round by round\n"
          "products: of matrices, counted in a step; saved: what autograd keeps for the backward pass\n"
          "set-up: each row with an SVD of its own; a comparison does it once for all")
    if flags.json is not None:
        files.write_text(flags.json, json.dumps({"run_info": run_info, "rows": rows}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(run_command(command))
