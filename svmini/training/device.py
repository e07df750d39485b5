"""The device, the precision and the number of CPU threads of a run."""

import os
from dataclasses import dataclass, replace

import torch

from ..errors import InputError

SMALL_MODEL = 2_000_000   # parameters


@dataclass(frozen=True)
class DeviceConfig:
    """device: where a model runs. dtype: precision of autocast (float32: no autocast). reason: one line for the reader,
    with the reason for the choice. compile: whether training steps use torch.compile."""
    device: torch.device
    dtype: torch.dtype
    reason: str
    compile: bool = False

    def autocast(self):
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)


def resolve_device(device="auto", dtype="auto", compile=False):
    """Turn --device, --dtype and --compile into a DeviceConfig. Raises InputError if the device is not available."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(d for d, ok in available.items() if ok) if device == "auto" else device
    if not available.get(name):
        raise InputError(f"device {name!r} is not available: use auto or "
                         f"{' or '.join(d for d, ok in available.items() if ok)}")
    # compute capability 8 and higher has bf16 in hardware; emulated bf16 is slower than float32
    native = name == "cuda" and torch.cuda.get_device_capability()[0] >= 8
    if dtype == "auto":
        dtype = "float32" if name != "cuda" else "bfloat16" if native else "float16"
    n = torch.get_num_threads()
    details = torch.cuda.get_device_name() if name == "cuda" else f"{n} thread{'s' if n > 1 else ''}"
    reason = f"{name} ({details}, {'auto-selected' if device == 'auto' else 'set by --device'}), {dtype}"
    reason += " autocast" if dtype != "float32" else ""
    reason += ", compiled" if compile else ""
    return DeviceConfig(torch.device(name), getattr(torch, dtype), reason, compile)


def prepare_device(device_config, model):
    """Choose the number of CPU threads for a model, print the device line, and return the updated DeviceConfig.

    A small model gets one thread: its matrix products are so short that threads mostly wait for one another. Two threads
    are 1.4 times as fast on an idle machine, but 1.3 to 6 times slower next to a busy process (docs/ablations.md).
    OMP_NUM_THREADS takes precedence.
    """
    threads, size = torch.get_num_threads(), sum(p.numel() for p in model.parameters())
    if device_config.device.type == "cpu" and size < SMALL_MODEL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
        reason = device_config.reason.replace(f"{threads} threads", f"1 thread of {threads} because the model is small")
        device_config = replace(device_config, reason=reason)
    print(f"device: {device_config.reason}")
    return device_config
