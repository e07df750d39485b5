"""python -m svmini.bench: what a training step of each method costs in the transformer blocks of a model.

Only the blocks run, with random weights on a fixed random input: embeddings and head cost every method the same, and
GPT-2's vocabulary would hide the differences. A linear head of two classes on the mean token gives a loss. Each round
times every row once, in the order A B C and then C B A, so that a drift of the machine affects all rows alike; rows are
compared round by round. FLOPs and memory are counted in a real step, not timed: they are the same in every run.
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
from .adapting import adapt, find_linears
from .cli import Parser, add_device, names, number, run_command
from .methods import parse_spec, svd
from .models.transformer import Block, init_linears
from .training import compare
from .training.device import DeviceConfig, resolve_device
from .training.loop import Stopped, TrainConfig, make_optimizer
from .training.report import markdown, spread

GPT_BLOCK = {"causal": True, "gelu": "tanh", "eps": 1e-5}
VIT_BLOCK = {"causal": False, "gelu": "none", "eps": 1e-6}
MODELS = {   # layers, width, heads, block, sequences per batch, tokens per sequence
    "tiny": (4, 128, 4, GPT_BLOCK, 8, 128), "vit_s_14": (12, 384, 6, VIT_BLOCK, 8, 50),
    "vit_b_16": (12, 768, 12, VIT_BLOCK, 8, 197), "gpt2": (12, 768, 12, GPT_BLOCK, 4, 512)}
REFERENCES = "frozen", "full"   # rows that the others are compared with
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
    """What all rows share: x (B, T, d) and classes y (B,) on the device."""
    base: Blocks
    x: torch.Tensor
    y: torch.Tensor
    device_config: DeviceConfig


class Step:
    """A function without arguments: one training step with fused AdamW, which changes the model."""

    def __init__(self, model, bench):
        self.forward, self.bench = model.to(bench.device_config.device).train(), bench
        self.optimizer = make_optimizer(model, TrainConfig(steps=1, lr=1e-6, batch_size=len(bench.x)))

    def __call__(self):
        with self.bench.device_config.autocast():
            logits = self.forward(self.bench.x)
        F.cross_entropy(logits, self.bench.y).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def row_model(spec, bench):
    """Return a copy of the base for a row. The row frozen trains only the LayerNorms and the head, so that the gradient
    passes every layer; the others are adapted."""
    model = copy.deepcopy(bench.base)
    if spec != "frozen":
        method, options, targets = parse_spec(spec)
        return adapt(model, method, targets, **options)
    for name, p in model.named_parameters():
        p.requires_grad_("norm" in name or name.startswith("head."))
    return model


def matmul_flops(work):
    """Count the multiplications and additions of all matrix products in work(), without AdamW and elementwise
    operations. Attention takes its plain form, whose products can be counted on every device."""
    def in_place(y, a, b, **_):   # y += a b, as in methods.adapter.add_update; torch's counter only knows y + a b
        return 2 * a[0] * a[1] * b[1]

    known = {torch.ops.aten.addmm_: in_place}
    with FlopCounterMode(display=False, custom_mapping=known) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return counter.get_total_flops()


def activation_bytes(model, work):
    """Count the bytes that autograd saves in work() for the backward pass: each storage once, without the weights."""
    own, saved = storages([*model.parameters(), *model.buffers()]), {}

    def pack(tensor):
        saved.update(storages([tensor]))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(size for place, size in saved.items() if place not in own)


def storages(tensors):
    """Return {address: bytes}; tensors that share a storage, or are views of one, count once."""
    return {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}


def measure_memory(step, model):
    """Run a step; return {"weights_mb", "activation_mb", "state_mb", "peak_mb", "flops"}, in MB (10⁶ bytes).

    state_mb: gradients and optimizer state. peak_mb: peak above the weights, on CUDA only.
    """
    def megabytes(tensors):
        return sum(storages(tensors).values()) / 1e6

    cuda = step.bench.device_config.device.type == "cuda"
    before = torch.cuda.memory_allocated() if cuda else 0
    row = {"weights_mb": megabytes([*model.parameters(), *model.buffers()]), "flops": matmul_flops(step)}
    row["activation_mb"] = activation_bytes(model, step) / 1e6
    state = [t for values in step.optimizer.state.values() for t in values.values()]
    row["state_mb"] = megabytes(state) + megabytes(step.optimizer.state)   # and a gradient per trained parameter
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        step()
        row["peak_mb"] = (torch.cuda.max_memory_allocated() - before) / 1e6
    return row


def time_rounds(steps, rounds, n, device):
    """Return {name: [ms per step in each round]}. steps: {name: function}, called n times per round after a warm-up."""
    wait = getattr(torch, device.type).synchronize   # torch.cpu has one too
    times = {name: [] for name in steps}
    order = [(i, name) for i in range(rounds + 1) for name in list(steps)[::-1 if i % 2 else 1]]
    for i, name in tqdm(order, "time", leave=False, disable=None):
        wait()
        started = time.perf_counter()
        for _ in range(n if i else 1):
            steps[name]()
        wait()
        if i:   # round 0 is the warm-up
            times[name].append(1000 * (time.perf_counter() - started) / n)
    return times


def measure(bench, specs, rounds, n):
    """Return one dict per row: the references, then the specs."""
    rows, steps = {}, {}
    for spec in tqdm([*REFERENCES, *specs], "set up", leave=False, disable=None):
        svd.clear_svd_cache()   # each row computes its own SVD
        started = time.perf_counter()
        model = row_model(spec, bench)
        rows[spec], steps[spec] = {"method": spec, "setup_s": time.perf_counter() - started}, Step(model, bench)
        rows[spec] |= measure_memory(steps[spec], model)
        if bench.device_config.compile:
            steps[spec].forward = torch.compile(model)
    svd.clear_svd_cache()
    times = time_rounds(steps, rounds, n, bench.device_config.device)
    for spec, row in rows.items():
        row |= {"ms": statistics.median(times[spec]), "times_ms": times[spec],
                "x_flops": row["flops"] / rows["full"]["flops"]}
        row |= {f"x_{r}": [t / u for t, u in zip(times[spec], times[r])] for r in REFERENCES}
    return list(rows.values())


def table_lines(rows):
    """Return the table as lines of Markdown, with the columns that were measured."""
    columns = {"weights_mb": "weights MB", "activation_mb": "activation MB", "state_mb": "gradients, AdamW MB",
               "peak_mb": "peak MB", "setup_s": "set-up s"}
    columns = {key: title for key, title in columns.items() if key in rows[0]}
    cells = [["method", "ms/step", *(f"x {r}" for r in REFERENCES), "matmul FLOPs x full", *columns.values()]]
    for row in rows:
        cells.append([row["method"], f"{row['ms']:.1f}", *(spread(row[f"x_{r}"], ".2f") for r in REFERENCES),
                      f"{row['x_flops']:.2f}", *(f"{row[key]:.1f}" for key in columns)])
    return markdown(cells, left=("method",))


def command(argv):
    p = Parser("-m svmini.bench", "Measure what a training step of each method costs.")
    p.flag("--model", "NAME", str, f"shape of the blocks: {' | '.join(MODELS)}", "tiny", choices=tuple(MODELS))
    p.flag("--layers", "N", number(1), "number of blocks", shown="depends on --model")
    p.flag("--batch", "N", number(1), "sequences per batch", shown="depends on --model")
    p.flag("--tokens", "N", number(1), "tokens per sequence", shown="depends on --model")
    p.flag("--methods", "SPEC", str, "method specs, or all", SPECS, "the main methods", nargs="+")
    p.flag("--targets", "A,B", names, "layers to adapt, for specs without targets", shown="all")
    p.flag("--rounds", "N", number(2), "rounds, which time every row once each", 5)
    p.flag("--steps", "N", number(1), "steps per row and round", 2)
    p.add_argument("--compile", action="store_true", help="compile the steps with torch.compile (default: off)")
    p.flag("--json", "FILE", str, "JSON file for all measurements", shown="none")
    add_device(p)
    flags = p.parse_args(argv)
    layers, *block, batch, tokens = MODELS[flags.model]
    device_config = resolve_device(flags.device, flags.dtype, flags.compile)
    torch.manual_seed(0)
    base = Blocks(flags.layers or layers, *block)
    x = torch.randn(flags.batch or batch, flags.tokens or tokens, base.head.in_features).to(device_config.device)
    bench = Bench(base, x, torch.arange(len(x), device=device_config.device) % 2, device_config)
    find_linears(base, flags.targets or base.targets)
    specs = compare.all_specs(SPECS, base, flags.targets) if flags.methods == ["all"] else flags.methods
    specs = [spec for spec in compare.plan(specs, base, flags.targets, {}) if spec not in REFERENCES]
    run_info = {"model": flags.model, "layers": len(base.blocks), "width": x.shape[2], "batch": len(x),
                "tokens": x.shape[1], "rounds": flags.rounds, "steps": flags.steps, "device": device_config.reason,
                "torch": torch.__version__}
    print(", ".join(f"{key}: {value}" for key, value in run_info.items()) + "\n")
    try:
        rows = measure(bench, specs, flags.rounds, flags.steps)
    except KeyboardInterrupt:
        raise Stopped("stopped: nothing was written") from None
    if flags.json is not None:
        content = {"run_info": run_info, "rows": rows}
        files.write_text(flags.json, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    print(*table_lines(rows), "", sep="\n")
    print("ms: median over the rounds; x: mean ± standard deviation of the ratios round by round\n"
          "matmul FLOPs: counted in a step; activation: what autograd saves for the backward pass\n"
          "set-up: with an SVD for each row; a comparison computes it once for all")


if __name__ == "__main__":
    sys.exit(run_command(command))
