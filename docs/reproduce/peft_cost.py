"""CPU time of a training step of LoRA, DoRA and VeRA in svmini, over that of Hugging Face's peft (pip install peft).

    OMP_NUM_THREADS=1 python docs/reproduce/peft_cost.py

One block of GPT-2's width, 4 x 256 tokens, float32. Each of eight rounds times every row once, every second one backwards.
"""

import copy
import statistics
import time

import torch
import torch.nn.functional as F
from peft import LoraConfig, VeraConfig, get_peft_model

from svmini import adapt
from svmini.bench import GPT_BLOCK, Blocks

torch.manual_seed(0)
base = Blocks(layers=1, width=768, heads=12, block=GPT_BLOCK)
x, y = torch.randn(4, 256, 768), torch.randint(0, 2, (4,))
shared = {"target_modules": list(base.targets), "modules_to_save": ["head"]}
configs = {"lora": ({"rank": 8}, LoraConfig(r=8, lora_alpha=8, **shared)),
           "dora": ({"rank": 8}, LoraConfig(r=8, lora_alpha=8, use_dora=True, **shared)),
           "vera": ({"rank": 256}, VeraConfig(r=256, **shared))}


def training_step(model):
    """Return a function that takes one step and returns its CPU time in seconds."""
    parameters = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)

    def step():
        started = time.process_time()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.process_time() - started

    step()   # the optimizer's state is created in the first step
    return step, sum(p.numel() for p in parameters)


steps = {}
for method, (options, config) in configs.items():
    steps[method, "svmini"], ours = training_step(adapt(copy.deepcopy(base), method, **options))
    steps[method, "peft"], theirs = training_step(get_peft_model(copy.deepcopy(base), config))
    assert ours == theirs, f"{method}: {ours} trainable parameters, peft has {theirs}"
seconds = {row: [] for row in steps}
for n in range(8):
    for row in list(steps)[::-1 if n % 2 else 1]:
        seconds[row].append(steps[row]())
for method in configs:
    ratios = [a / b for a, b in zip(seconds[method, "svmini"], seconds[method, "peft"])]
    print(f"{method}: {statistics.mean(ratios):.2f} ± {statistics.stdev(ratios):.2f}")
