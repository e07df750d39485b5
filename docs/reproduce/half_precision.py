"""What half precision costs in accuracy and saves in memory. Run it from the repository root:

    python docs/reproduce/half_precision.py start WEIGHTS          # rounding error of the output before training
    python docs/reproduce/half_precision.py memory                 # weights and saved activations, GPT-2's shape
    python docs/reproduce/half_precision.py train WEIGHTS IMAGES   # loss and accuracy; also draws half_precision.png

The last part takes an hour on a CPU without instructions for half precision.

WEIGHTS: a DINOv2 ViT-S/14. IMAGES: a folder with train and test, and class folders in each.
"""

import copy
import statistics
import sys
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))   # svmini, from any working directory

from figures import GRAY, gray_axes  # noqa: E402
from svmini import ViT, adapt, bench  # noqa: E402
from svmini.data.image_datasets import open_images  # noqa: E402
from svmini.data.images import ImageClassification  # noqa: E402
from svmini.methods import parse_spec  # noqa: E402
from svmini.training.checkpoint import RunFolder  # noqa: E402
from svmini.training.device import resolve_device  # noqa: E402
from svmini.training.loop import TrainConfig, evaluate, train  # noqa: E402

PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_, torch.ops.aten.bmm, torch.ops.aten.baddbmm)
START = ["base", "svft:pattern=plain", "svft:off_diagonals=8", "svfit", "lora:rank=8", "lora:rank=8,init=pissa",
         "dora:rank=8", "vera:rank=256", "boft", "random_mask"]
MEMORY = ["frozen", "full", "svfit", "svft:pattern=plain", "svft:off_diagonals=8", "lora:rank=8", "dora:rank=8",
          "vera:rank=256"]
TRAIN = {"svft:off_diagonals=2": 1e-3, "lora:rank=8": 1e-3}   # peak learning rates, chosen in float32
SETTINGS = {"float32": "float32", "fp16 base": "float16"}   # and the precision of autocast


class RoundOnce(TorchDispatchMode):
    """Matrix products of half-precision tensors as a GPU computes them: summed in float32, and the result rounded.

    A CPU without instructions for half precision needs fifty times as long for torch's own products.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        half = [a.dtype for a in args if isinstance(a, torch.Tensor) and a.dtype in (torch.bfloat16, torch.float16)]
        if function.overloadpacket not in PRODUCTS or not half:
            return function(*args, **(kwargs or {}))
        exact = [a.float() if isinstance(a, torch.Tensor) else a for a in args]
        result = function(*exact, **(kwargs or {}))
        return args[0].copy_(result) if function.overloadpacket is torch.ops.aten.addmm_ else result.to(half[0])


def start(weights):
    """Print ‖y − y_float32‖ / ‖y_float32‖ of the features of four random images of 98 x 98."""
    base = ViT.from_pretrained(weights, n_head=6, image_size=98).eval()
    base.head = torch.nn.Identity()
    x = torch.randn(4, 3, 98, 98, generator=torch.Generator().manual_seed(0))
    exact = base(x)
    print("| method | bf16 autocast | bf16 base model | MB, float32 base | MB, bf16 base |\n|---|---:|---:|---:|---:|")
    for spec in START:
        errors, sizes = [], []
        for dtype in (torch.float32, torch.bfloat16):
            model = copy.deepcopy(base).to(dtype)
            if spec != "base":
                method, options, _ = parse_spec(spec)
                adapt(model, method, also_train=(), **options)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
                y = model(x.to(dtype)).float()
            errors.append(((y - exact).norm() / exact.norm()).item())
            sizes.append(sum(t.nbytes for t in (*model.parameters(), *model.buffers())) / 1e6)
        print(f"| {spec} | {errors[0]:.4f} | {errors[1]:.4f} | {sizes[0]:.0f} | {sizes[1]:.0f} |", flush=True)


def memory():
    """Print the MB of weights and of saved activations in a training step: twelve blocks of width 768, 512 tokens."""
    layers, *block, _, tokens = bench.MODELS["gpt2"]
    torch.manual_seed(0)
    base, x = bench.Blocks(layers, *block), torch.randn(1, tokens, block[0])
    print("| method | float32 | bf16 autocast | bf16 base |\n|---|---:|---:|---:|")
    for spec in MEMORY:
        cells = []
        for dtype, base_dtype in (("float32", torch.float32), ("bfloat16", torch.float32), ("bfloat16", torch.bfloat16)):
            this = copy.deepcopy(base)
            this.blocks.to(base_dtype)   # the head is trained, in float32
            setting = bench.Bench(this, x.to(base_dtype), torch.tensor([0]), resolve_device("cpu", dtype))
            model = bench.row_model(spec, setting)
            with RoundOnce():
                activations = bench.activation_bytes(model, bench.Step(model, setting))
            weights = sum(bench.storages([*model.parameters(), *model.buffers()]).values())
            cells.append(f"{weights / 1e6:.0f} + {activations / 1e6:.0f}")
        print(f"| {spec} | {' | '.join(cells)} |", flush=True)


def compare_training(weights, images):
    """Train the same three draws in each setting; print the test accuracy and draw the validation loss over steps."""
    losses, accuracy = {}, {}
    for spec, lr in TRAIN.items():
        for setting in SETTINGS:
            runs = [train_once(weights, images, spec, lr, draw, setting) for draw in range(3)]
            accuracy[spec, setting] = [metric for metric, _ in runs]
            losses[spec, setting] = [statistics.mean(values) for values in zip(*(loss for _, loss in runs))]
            print(spec, setting, runs, flush=True)
    for (spec, setting), values in accuracy.items():
        change = [a - b for a, b in zip(values, accuracy[spec, "float32"])]
        print(f"| {spec} | {setting} | {mean(values)} | {mean(change, '+')} | {losses[spec, setting][-1]:.3f} |")
    draw_losses(losses, ROOT / "docs" / "half_precision.png")


def train_once(weights, images, spec, lr, draw, setting):
    """Return (test accuracy, [validation loss every 20 steps]) of one draw of 10 images per class, 8 for training."""
    source, device_config = open_images(f"folder:{images}", None, draw, 10, 20), resolve_device("cpu", SETTINGS[setting])
    base = ViT.from_pretrained(weights, n_head=6, image_size=98)
    torch.manual_seed(draw)
    base.reset_classifier(len(source.classes))
    if setting == "fp16 base":
        base.half().head.float()   # what also_train names is trained, in float32; autocast casts its input
    task = ImageClassification(source, draw, base.config, device_config.device)
    method, options, _ = parse_spec(spec)
    torch.manual_seed(draw)
    model, run_folder = adapt(base, method, **options), RunFolder(eval_every=20)
    config = TrainConfig(steps=80, lr=lr, head_lr=4e-3, batch_size=8, seed=draw)
    with RoundOnce(), sdpa_kernel(SDPBackend.MATH):
        train(model, task, config, device_config, run_folder, f"{spec}, {setting}")
        metric = evaluate(model, task, "test", device_config)["metric"]
    return metric, [entry["loss"] for entry in run_folder.log]


def mean(values, sign=""):
    return f"{statistics.mean(values):{sign}.1f} ± {statistics.stdev(values):.1f}"


def draw_losses(losses, path):
    """Draw one panel per method and one line per setting, in colors that read on a light and on a dark page."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    for axes, spec in zip(figure.subplots(1, len(TRAIN), sharey=True), TRAIN):
        for i, setting in enumerate(SETTINGS):
            values = losses[spec, setting]
            axes.plot(range(20, 20 * len(values) + 1, 20), values, ["-", "--"][i], color=f"C{i}", label=setting)
        axes.set_title(spec, color=GRAY)
        axes.set_xlabel("step", color=GRAY)
        gray_axes(axes)
    figure.axes[0].set_ylabel("validation loss", color=GRAY)
    figure.axes[0].legend(frameon=False, labelcolor=GRAY)
    figure.savefig(path, dpi=120, transparent=True)


if __name__ == "__main__":
    parts = {"start": start, "memory": memory, "train": compare_training}
    if len(sys.argv) < 2 or sys.argv[1] not in parts:
        sys.exit(__doc__)
    with torch.set_grad_enabled(sys.argv[1] != "start"):
        parts[sys.argv[1]](*sys.argv[2:])
