"""Where the work runs, and in which precision."""

from dataclasses import dataclass

import torch

from ..errors import InputError


@dataclass(frozen=True)
class DeviceConfig:
    """device: where the work runs.  dtype: of autocast, float32 for none.  reason: why, in a line for the reader.
    compile: whether training steps go through torch.compile."""
    device: torch.device
    dtype: torch.dtype
    reason: str
    compile: bool = False

    def autocast(self):
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)


def resolve_device(device="auto", dtype="auto", compile=False):
    """Resolve --device, --dtype and --compile to a DeviceConfig. Raises InputError for a device that is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(d for d, ok in there.items() if ok) if device == "auto" else device
    if not there.get(name):
        raise InputError(f"device {name!r} is not there: use auto or {' or '.join(d for d, ok in there.items() if ok)}")
    # emulated bf16 is slower than float32: only cards of compute capability 8 on do it themselves
    native = name == "cuda" and torch.cuda.get_device_capability()[0] >= 8
    if dtype == "auto":
        dtype = "float32" if name != "cuda" else "bfloat16" if native else "float16"
    why = "asked for" if device != "auto" else "the first of cuda, mps, cpu that is there"
    what = torch.cuda.get_device_name() if name == "cuda" else f"{torch.get_num_threads()} threads"
    reason = f"device {name} ({what}; {why}), {dtype}" + (" autocast" if dtype != "float32" else "")
    reason += ", compiled" if compile else ""
    return DeviceConfig(torch.device(name), getattr(torch, dtype), reason, compile)
