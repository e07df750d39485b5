"""The contract that every method follows."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..errors import InputError

TRAINABLE_DTYPES = (torch.float32, torch.float64)   # of trainable parameters: in bf16, most small steps change nothing
HALF_DTYPES = (torch.bfloat16, torch.float16)       # of base models whose trainable parameters are in float32
PLAIN_TYPES = (bool, int, float, str, type(None))   # of options, so that an adapter file can hold them
MAX_SEED = 2**63 - 1                                # two streams take the seeds 2 * seed and 2 * seed + 1


class Adapter(nn.Module):
    """Replace a frozen nn.Linear with weight W0 (d_out, d_in) and bias b by an adapted one.

    A method is a subclass in a file of its own, plus one line in methods/__init__.py. It defines

        __init__(self, linear, *, rank=8)    the keyword defaults are its options: plain values, stored in self.options
        weight                               a property: the adapted weight, differentiable. The equation of the paper
        forward(self, x)                     the same function by the cheapest exact path (default: through weight)
        count(d_out, d_in, *, rank=8)        the trainable parameters of one matrix, by the paper's formula
        check(d_out, d_in, *, rank=8)        raises ValueError that explains why these options do not fit this shape

    The shared tests (tests/math, test_contract.py and test_gradients.py) require the following for every entry of
    `examples` and `test_options` and every shape that `check` accepts, in float32 and float64:
      - At the start, weight equals W0 up to rounding.
      - weight and forward agree in value and gradient, for few tokens, many tokens and none (x[:0]). The gradient
        equals finite differences. The tests first move the trainable parameters by noise of one scale for all of them,
        so far that weight changes by at most 30 % of its norm.
      - The nn.Parameters are trained and nothing else. There are as many as `count` returns, and every one moves in a
        step, under autocast too.
      - A merged layer is an nn.Linear with `weight`. A saved layer loads on the same base model as it was. The loader
        builds it again from the linear and self.options, so a random draw uses a generator of its own, on the CPU, with
        a seed among the options. Only nn.Parameters, which the file holds, may be drawn from torch's global generator.
      - `register_frozen` holds what can be computed again from W0 and the options: state_dict() contains it, an adapter
        file does not. A buffer that cannot be computed again uses register_buffer, and the file holds it.
      - A step runs on the meta device, where tensors have no values: no `if` on a tensor, no tensor on another device.
      - On a bf16 or fp16 layer, frozen tensors keep the base's dtype and this class makes parameters float32. A method
        does nothing for this, except that `weight` ends with .to(self.base_dtype), a matrix product in it casts the
        frozen factor to the parameter's dtype, and a `forward` of its own casts the parameters to the dtype of W0.
    """
    examples = ()       # options such as "rank=8" or "rank=8@query,value": rows of --methods all and test cases
    test_options = ()   # further test cases
    lr = 5e-3           # default learning rate; the scripts have tuned ones

    def __init__(self, linear, **options):
        super().__init__()
        for name, value in options.items():
            if type(value) not in PLAIN_TYPES:
                raise ValueError(f"{name} must be a plain Python value, not a {type(value).__module__}."
                                 f"{type(value).__name__}: convert it with .item() or str()")
        self.out_features, self.in_features = linear.weight.shape
        self.check(self.out_features, self.in_features, **options)
        self.options = options
        self.frozen = set()   # names of the buffers that an adapter file leaves out
        self.register_frozen("bias", linear.bias)

    def register_frozen(self, name, tensor):
        """Register a buffer (or None) that can be computed again from the base model and the options."""
        self.register_buffer(name, None if tensor is None else tensor.detach())
        self.frozen.add(name)

    def register_parameter(self, name, param):
        """Register a parameter, which `self.A = nn.Parameter(...)` calls: bf16 and fp16 become float32."""
        if param is not None and param.dtype in HALF_DTYPES:
            param = nn.Parameter(param.detach().float())
        super().register_parameter(name, param)

    @property
    def weight(self):
        """The adapted weight (d_out, d_in), differentiable, in the dtype of the base layer, as other modules expect."""
        raise NotImplementedError(f"{type(self).__name__} must define weight")

    @property
    def base_dtype(self):
        """The dtype of the base layer, and so of the layer's products: that of the first buffer, the bias or W0."""
        found = [b.dtype for b in self.buffers() if b.is_floating_point()]
        if not found:
            raise ValueError(f"{type(self).__name__} has no frozen tensor: pass W0 to register_frozen")
        return found[0]

    def forward(self, x):
        """x (..., d_in) -> x weightᵀ + b (..., d_out)."""
        return F.linear(x, self.weight.to(self.base_dtype), self.bias)

    @staticmethod
    def count(d_out, d_in):
        """Return the number of trainable parameters for one matrix of this shape."""
        raise NotImplementedError

    @staticmethod
    def check(d_out, d_in):
        """Raise ValueError that explains why these options do not fit this shape."""

    def _apply(self, fn, recurse=True):
        """Convert or move all tensors, as .to() and .half() do. Raises InputError if parameters would be rounded."""
        check_conversion(fn)
        return super()._apply(fn, recurse)

    def __getattr__(self, name):
        """Name the attribute that the code of a property lacks. nn.Module would report the property as missing."""
        if isinstance(getattr(type(self), name, None), property):
            return getattr(type(self), name).fget(self)
        return super().__getattr__(name)


def check_conversion(fn):
    """Raise InputError if fn, which .to(), .half() and the like apply to tensors, would round float32 parameters."""
    dtype = fn(torch.zeros(0, dtype=torch.float32, device="cpu")).dtype
    if dtype not in TRAINABLE_DTYPES:
        raise InputError(f"an adapter cannot become {dtype}, in which small training steps are lost: keep it in "
                         "float32 and use torch.autocast, or merge it first")


def add_update(x, W, bias, h, B):
    """x Wᵀ + b + h Bᵀ, summed in place: x (..., d_in), W (d_out, d_in), h (..., r), B (d_out, r) -> (..., d_out).

    The product with a thin B is cheap. A further tensor of T x d_out would cost time on a CPU and memory everywhere.
    """
    y = F.linear(x.reshape(-1, W.shape[1]), W, bias)                        # (T, d_out)
    y.addmm_(h.reshape(-1, B.shape[1]).to(y.dtype), B.t().to(y.dtype))      # autocast does not cast in-place operations
    return y.view(*x.shape[:-1], W.shape[0])


def check_int(name, value, low, high=None):
    """Raise ValueError unless value is an integer in [low, high]."""
    fits = isinstance(value, int) and not isinstance(value, bool) and value >= low and (high is None or value <= high)
    if not fits:
        limits = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} must be an integer {limits}, not {value!r}")


def is_number(value):
    """Return True for an int or float that float32 can represent. A bool, which Python counts as an int, is none."""
    limits = torch.finfo(torch.float32)
    return (isinstance(value, (int, float)) and not isinstance(value, bool)
            and (value == 0 or limits.tiny <= abs(value) <= limits.max))
