"""python docs/reproduce/precision.py WEIGHTS: rounding error of the methods at the start, on a pretrained ViT.

For bf16 autocast on a float32 base model, and for a bf16 base model: ‖y − y_float32‖ / ‖y_float32‖ of the features of four
random images of 98 x 98, and the megabytes of all weights and frozen factors. WEIGHTS: a DINOv2 ViT-S/14.
"""

import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from svmini import ViT, adapt
from svmini.methods import parse_spec

SPECS = ["base", "svft:pattern=plain", "svft:off_diagonals=8", "svfit", "lora:rank=8", "lora:rank=8,init=pissa",
         "dora:rank=8", "vera:rank=256", "boft", "random_mask"]


@torch.no_grad()
def main(weights):
    base = ViT.from_pretrained(weights, n_head=6, image_size=98).eval()
    base.head = torch.nn.Identity()
    x = torch.randn(4, 3, 98, 98, generator=torch.Generator().manual_seed(0))
    exact = base(x)
    print("| method | bf16 autocast | bf16 base model | MB, float32 base | MB, bf16 base |\n|---|---:|---:|---:|---:|")
    for spec in SPECS:
        cells = []
        for dtype in (torch.float32, torch.bfloat16):
            model = copy.deepcopy(base).to(dtype)
            if spec != "base":
                method, options, _ = parse_spec(spec)
                adapt(model, method, also_train=(), **options)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
                y = model(x.to(dtype)).float()
            size = sum(t.nbytes for t in (*model.parameters(), *model.buffers())) / 1e6
            cells.append((((y - exact).norm() / exact.norm()).item(), size))
        (autocast, mb), (half, half_mb) = cells
        print(f"| {spec} | {autocast:.4f} | {half:.4f} | {mb:.0f} | {half_mb:.0f} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
