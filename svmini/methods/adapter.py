"""The contract that every method keeps."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..errors import InputError

TRAINABLE_DTYPES = (torch.float32, torch.float64)   # dtypes of trained numbers: in bf16 most small steps change nothing


class Adapter(nn.Module):
    """Stands where a frozen nn.Linear of weight W0 (d_out, d_in) and bias b stood, and adapts it.

    A method is a subclass in a file of its own, and one line in methods/__init__.py. It gives

        __init__(self, linear, *, rank=8)    the keyword defaults are its options: plain values, kept in self.options
        weight                               a property: the adapted weight, differentiable. The paper's equation
        forward(self, x)                     the same function by the cheapest exact path (default: through weight)
        count(d_out, d_in, *, rank=8)        trained numbers for a matrix of this shape, by the paper's formula
        check(d_out, d_in, *, rank=8)        raises ValueError that says why these options do not fit this shape

    The shared tests (tests/math, test_contract.py and test_gradients.py) ask of it, for every spec in `examples` and
    `test_options` and every shape that `check` accepts, in float32 and float64:
      - at the start weight equals W0, to rounding;
      - weight and forward agree, in value and in gradient, for few and many tokens and for none (x[:0]), and the
        gradient is that of finite differences. For this the trained numbers are moved, by noise of one size for all of
        them, so far that weight changes by at most 30 % of its norm;
      - what it trains is its nn.Parameters and nothing else: as many numbers as `count` says, in W0's dtype (under
        autocast too), and every one of them moves in a step;
      - merged, it is an nn.Linear of `weight`; saved and loaded on the same base it is what it was. It is built anew
        from the linear and self.options then, so what is drawn comes from a generator of its own, on the CPU, with a
        seed among the options. Only nn.Parameters, which the file holds, may be drawn from torch's global stream;
      - what can be made again from W0 and the options is held by `register_frozen`: it moves with the module and is not stored.
        What cannot is a persistent buffer (register_buffer), which is stored;
      - a step runs on the meta device, where tensors have no values: no `if` on a tensor, no tensor on another device.
    """
    examples = ()       # option specs such as "rank=8" or "rank=8@query,value": rows of --methods all, and tested
    test_options = ()   # further option specs that are only tested
    lr = 5e-3           # a first learning rate; the scripts hold tuned ones

    def __init__(self, linear, **options):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.check(self.out_features, self.in_features, **options)
        self.options = options
        self.frozen = set()   # names of the buffers that an adapter file leaves out
        self.register_frozen("bias", linear.bias)

    def register_frozen(self, name, tensor):
        """Register a buffer (or None) that can be recomputed from the base: state_dict() holds it, an adapter file does
        not."""
        self.register_buffer(name, None if tensor is None else tensor.detach())
        self.frozen.add(name)

    @property
    def weight(self):
        """The adapted weight (d_out, d_in), differentiable."""
        raise NotImplementedError(f"{type(self).__name__} must define weight")

    def forward(self, x):
        """x (..., d_in) -> x weightᵀ + b (..., d_out)."""
        return F.linear(x, self.weight, self.bias)

    @staticmethod
    def count(d_out, d_in):
        """Trained numbers for one matrix of this shape."""
        raise NotImplementedError

    @staticmethod
    def check(d_out, d_in):
        """Raise ValueError that says why these options do not fit this shape."""

    def _apply(self, fn, recurse=True):
        """.to(), .half() and their like come here. Refuses to round trained numbers."""
        check_conversion(fn)
        return super()._apply(fn, recurse)

    def __getattr__(self, name):
        """nn.Module says "no attribute 'weight'" where the code of `weight` lacks something: name that instead."""
        if isinstance(getattr(type(self), name, None), property):
            return getattr(type(self), name).fget(self)
        return super().__getattr__(name)


def check_conversion(fn):
    """Raise InputError if fn, which .to(), .half() and the like apply to every tensor, would round float32 parameters."""
    dtype = fn(torch.zeros(0, dtype=torch.float32, device="cpu")).dtype
    if dtype not in TRAINABLE_DTYPES:
        raise InputError(f"an adapter cannot become {dtype}, in which small training steps are lost: keep it in float32 "
                         "and use torch.autocast, or merge it first")


def add_update(x, W, bias, h, B):
    """x Wᵀ + b + h Bᵀ, the sum made in place: x (..., d_in), W (d_out, d_in), h (..., r), B (d_out, r) -> (..., d_out).

    Beside a product with a thin B, a further tensor of T x d_out is what costs time on a CPU, and memory everywhere.
    """
    y = F.linear(x.reshape(-1, W.shape[1]), W, bias)                        # (T, d_out)
    y.addmm_(h.reshape(-1, B.shape[1]).to(y.dtype), B.t().to(y.dtype))      # autocast leaves what is in place alone
    return y.view(*x.shape[:-1], W.shape[0])


def check_int(name, value, low, high=None):
    """Raise ValueError unless value is a whole number in [low, high]."""
    fits = isinstance(value, int) and not isinstance(value, bool) and value >= low and (high is None or value <= high)
    if not fits:
        limits = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} must be a whole number {limits}, not {value!r}")


def is_number(value):
    """A finite int or float, and not a bool, which Python counts as an int."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
