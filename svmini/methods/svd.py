"""Thin SVD with fixed signs, computed once a process for a weight, and the cheapest exact way to apply its factors."""

import hashlib

import torch
import torch.nn.functional as F

from .adapter import add_update

_known = {}   # a weight's bytes -> its factors, kept to the end: the methods of a comparison share them


def clear_svd_cache():
    """Drop the factors that are kept."""
    _known.clear()


@torch.inference_mode(False)   # what is made in inference mode could not be trained with later
def thin_svd(weight):
    """weight (d_out, d_in) -> U (d_out, D), S (D,) descending, Vt (D, d_in) with D = min(d_out, d_in), in weight's
    dtype and on its device. Computed in float64 on the CPU; in every column of U the entry of largest size is positive.

    A singular vector's sign is arbitrary, and u_i v_jᵀ changes with it: the rule makes one device_config's M mean the
    same on another. float32 would not do: single vectors are off by 3e-4 there, and the rule can tip over.
    """
    W = weight.detach().cpu()
    key = (hashlib.sha256(W.contiguous().numpy()).hexdigest(), W.shape, W.dtype)
    if key not in _known:
        tall = W.double() if W.shape[0] >= W.shape[1] else W.double().t()   # LAPACK is faster on the tall one
        U, S, Vt = torch.linalg.svd(tall, full_matrices=False)
        if tall.shape != W.shape:
            U, Vt = Vt.t(), U.t()
        largest = U.gather(0, U.abs().argmax(dim=0, keepdim=True))          # (1, D)
        sign = torch.where(largest < 0, -1.0, 1.0)                          # (1, D)
        _known[key] = tuple(t.to(W.dtype).contiguous() for t in (U * sign, S, Vt * sign.t()))
    return tuple(t.to(weight.device) for t in _known[key])


def apply_factors(x, U, core, Vt, bias):
    """x (..., d_in) -> x Wᵀ + b (..., d_out) with W = U core Vᵀ, core (D,) for a diagonal or (D, D).

    Three exact orders; which is cheapest follows from counting the products of a training step, forward and backward
    to x and core (U and V are frozen), in units of T d_out d_in (T tokens, a = D / max(d_out, d_in)):
      diagonal core   build W first  3 + 2D/T                  through the activations  2 + 2a
      any core        build W first  3 + 2(1 + a)D/T           folded into the smaller factor  2 + 3a + 2aD/T
                                                               through the activations  2 + 5a
    So a square matrix is built for many tokens (T > 2D, T > D), a wide or tall one (a below 1/2, 1/3) never. Measured
    at D = 768 on a 2-core CPU the orders cross at T = 1,300 (diagonal) and 720 (any): the rule is close enough.
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
    """Return True if W = W0 + U core Vᵀ costs less built first than applied as W0 x plus a rank-r update.

    Forward and backward, in units of one T x d_out x d_in product, as in apply_factors. x (..., d_in), shape
    (d_out, d_in), core (r,), or (r, r) if dense.
    """
    (d_out, d_in), T = shape, x.numel() // x.shape[-1]
    update = 2 + 2 * (r / d_out + r / d_in) + dense * 3 * r * r / (d_out * d_in)
    return T > 0 and 3 + 2 * r / T + dense * 2 * r * r / (T * d_in) < update


def apply_beside(x, W0, U, core, Vt, bias):
    """x (..., d_in) -> x Wᵀ + b (..., d_out) with W = W0 + U core Vᵀ, core (r,) for a diagonal or (r, r).

    Two exact orders, see builds_first: W built first, or W0 x and then the update.
    """
    dense = core.dim() == 2
    if builds_first(x, W0.shape, len(core), dense):
        return F.linear(x, W0 + (U @ core if dense else U * core) @ Vt, bias)
    h = F.linear(x, Vt)                                                     # (..., r)
    return add_update(x, W0, bias, F.linear(h, core) if dense else h * core, U)
