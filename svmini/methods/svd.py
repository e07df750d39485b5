"""Thin SVD with fixed signs, computed once per weight and process, and the cheapest exact way to apply its factors."""

import hashlib
from collections import OrderedDict

import torch
import torch.nn.functional as F

from .adapter import HALF_DTYPES, add_update

CACHE_BYTES = 2**30        # bound of the cache: the factors of two ViT-B models in float32
_cache = OrderedDict()     # key of a weight -> its factors, least recently used first: methods in a comparison share it


def clear_svd_cache():
    """Remove all cached factors."""
    _cache.clear()


@torch.inference_mode(False)   # tensors that are created in inference mode could not take part in training
def thin_svd(weight):
    """Return copies of the thin SVD's factors on the weight's device.

    weight (d_out, d_in) -> U (d_out, D), S (D,) descending, Vt (D, d_in), with D = min(d_out, d_in). The SVD is
    computed in float64 on the CPU and cast to the weight's dtype, or to float32 for bf16 and fp16. In every column of U
    the entry of largest absolute value is positive.

    The sign of a pair of singular vectors is arbitrary, and u_i v_jᵀ changes with it. The rule makes M mean the same on
    every machine. float32 would not suffice: single vectors are off by 3e-4 there, and the rule can tip over.
    """
    W = weight.detach().cpu()
    key = (hashlib.sha256(W.contiguous().view(-1).view(torch.uint8).numpy()).hexdigest(), W.shape, W.dtype)
    if key in _cache:
        _cache.move_to_end(key)
    else:
        tall = W.double() if W.shape[0] >= W.shape[1] else W.double().t()   # LAPACK is faster on the tall one
        U, S, Vt = torch.linalg.svd(tall, full_matrices=False)
        if tall.shape != W.shape:
            U, Vt = Vt.t(), U.t()
        largest = U.gather(0, U.abs().argmax(dim=0, keepdim=True))          # (1, D)
        sign = torch.where(largest < 0, -1.0, 1.0)                          # (1, D)
        dtype = torch.float32 if W.dtype in HALF_DTYPES else W.dtype
        _cache[key] = tuple(t.to(dtype).contiguous() for t in (U * sign, S, Vt * sign.t()))
        while sum(t.nbytes for factors in _cache.values() for t in factors) > CACHE_BYTES and len(_cache) > 1:
            _cache.popitem(last=False)
    return tuple(t.to(weight.device, copy=True) for t in _cache[key])


def apply_factors(x, U, core, Vt, bias):
    """x (..., d_in) -> x Wᵀ + b (..., d_out) with W = U core Vᵀ, core (D,) for a diagonal or (D, D).

    There are three exact orders. The cheapest one follows from counting the products of a training step, forward and
    backward to x and core (U and V are frozen), in units of T d_out d_in (T tokens, a = D / max(d_out, d_in)):
      diagonal core   build W first  3 + 2D/T                  through the activations  2 + 2a
      any core        build W first  3 + 2(1 + a)D/T           folded into the smaller factor  2 + 3a + 2aD/T
                                                               through the activations  2 + 5a
    So W is built for a square matrix and many tokens (T > 2D, T > D), and never for a wide or tall one (a below 1/2,
    1/3). Measured at D = 768 on a 2-core CPU, the orders cross at T = 1,300 (diagonal) and 720 (any core).
    """
    D, T = core.shape[0], x.numel() // x.shape[-1]
    a = D / max(U.shape[0], Vt.shape[1])
    if core.dim() == 1:
        if T * (2 * a - 1) > 2 * D:
            return F.linear(x, (U * core) @ Vt, bias)
        return F.linear(F.linear(x, Vt) * core, U, bias)
    if T <= D:
        return F.linear(F.linear(F.linear(x, Vt), core), U, bias)
    build = T * (3 * a - 1) > 2 * D
    if U.shape[0] >= Vt.shape[1]:
        C = core @ Vt                                                       # (D, d_in), square
        return F.linear(x, U @ C, bias) if build else F.linear(F.linear(x, C), U, bias)
    B = U @ core                                                            # (d_out, D), square
    return F.linear(x, B @ Vt, bias) if build else F.linear(F.linear(x, Vt), B, bias)


def builds_first(x, shape, r, dense=False):
    """Return True if it costs less to build W = W0 + U core Vᵀ first than to add a rank-r update to W0 x.

    Counts a training step, forward and backward, in units of one T x d_out x d_in product, as apply_factors does.
    x (..., d_in), shape (d_out, d_in), core (r,), or (r, r) if dense.
    """
    (d_out, d_in), T = shape, x.numel() // x.shape[-1]
    update = 2 + 2 * (r / d_out + r / d_in) + dense * 3 * r * r / (d_out * d_in)
    return T > 0 and 3 + 2 * r / T + dense * 2 * r * r / (T * d_in) < update


def apply_with_residual(x, W0, U, core, Vt, bias):
    """x (..., d_in) -> x Wᵀ + b (..., d_out) with W = W0 + U core Vᵀ, core (r,) for a diagonal or (r, r).

    Takes the cheaper of two exact orders by builds_first: W first, or W0 x and then the update.
    """
    dense, core = core.dim() == 2, core.to(U.dtype)
    if builds_first(x, W0.shape, len(core), dense):
        return F.linear(x, W0 + (U @ core if dense else U * core) @ Vt, bias)
    h = F.linear(x, Vt)                                                     # (..., r)
    return add_update(x, W0, bias, F.linear(h, core) if dense else h * core, U)
