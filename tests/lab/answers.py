"""Model answers of docs/lab. If you work on the lab, look here last."""

import torch
import torch.nn as nn

from svmini import METHODS
from svmini.methods.adapter import Adapter, check_int
from svmini.methods.svd import thin_svd


def count_parameters(d_out, d_in, d, r):
    D = min(d_out, d_in)
    return D * (2 * d + 1) - d * (d + 1), r * (d_in + d_out), d_out + r


def counts_in_the_paper():
    """out is adapted too: without it, SVFT would have 0.23M and LoRA 1.18M."""
    square, up, down = (768, 768), (3072, 768), (768, 3072)
    six = [count_parameters(*shape, 2, 8) for shape in 4 * [square] + [up, down]]
    return {"svft": 12 * sum(svft for svft, _, _ in six), "lora": 12 * sum(lora for _, lora, _ in six),
            "vera": 12 * 4 * (768 + 1024)}


class Columns(Adapter):
    """W = W0 diag(g): svmini/methods/columns.py."""
    examples = ("",)

    def __init__(self, linear):
        super().__init__(linear)
        self.register_frozen("W0", linear.weight)
        self.g = nn.Parameter(linear.weight.new_ones(self.in_features))

    @property
    def weight(self):
        return (self.W0 * self.g).to(self.base_dtype)

    @staticmethod
    def count(d_out, d_in):
        return d_in


class LoRAXS(Adapter):
    """W = W0 + U_r Σ_r R V_rᵀ: svmini/methods/lora_xs.py."""
    examples = ("rank=8", "rank=1")

    def __init__(self, linear, *, rank=8):
        super().__init__(linear, rank=rank)
        U, S, Vt = thin_svd(linear.weight)
        self.register_frozen("W0", linear.weight)
        self.register_frozen("L", (U[:, :rank] * S[:rank]).to(linear.weight.dtype))     # (d_out, r)
        self.register_frozen("Vt", Vt[:rank].to(linear.weight.dtype))                   # (r, d_in)
        self.R = nn.Parameter(linear.weight.new_zeros(rank, rank))

    @property
    def weight(self):
        return (self.W0 + self.L.to(self.R.dtype) @ self.R @ self.Vt.to(self.R.dtype)).to(self.base_dtype)

    @staticmethod
    def count(d_out, d_in, *, rank=8):
        return rank ** 2

    @staticmethod
    def check(d_out, d_in, *, rank=8):
        check_int("rank", rank, 1, min(d_out, d_in))


def gradient_of_M(U, Vt, G, positions):
    i, j = positions.t()
    return (U.t() @ G @ Vt.t())[i, j]


def wrong_gradient(y, factor):
    return y + (factor - 1) * (y - y.detach())


def caught_by(place):
    """An error in core changes both paths equally, and the closed form uses forward alone."""
    return {"forward": {"two paths", "finite differences", "closed form"},
            "weight": {"two paths", "finite differences"},
            "core": {"finite differences", "closed form"}}[place]


def train_both(linear, x, y, steps, lr, weight_decay=0):
    trained = []
    for layer in (METHODS["svfit"](linear), METHODS["svft"](linear, pattern="plain")):
        optimizer = torch.optim.AdamW(layer.parameters(), lr=lr, weight_decay=weight_decay)
        for _ in range(steps):
            optimizer.zero_grad()
            (layer(x) - y).square().mean().backward()
            optimizer.step()
        trained += layer.parameters()
    return tuple(trained)


def weight_stats(W, start):
    squares = torch.linalg.svdvals(W).square()
    return (((W * start).sum() / (W.norm() * start.norm())).item(),
            (squares[:len(squares) // 4].sum() / squares.sum()).item())


def band_share(W0, W, d):
    U, S, Vt = thin_svd(W0)
    C = U.t() @ (W - W0) @ Vt.t()
    return (C.triu(-d).tril(d).square().sum() / (W - W0).square().sum()).item()


def rank_k_and_rank_1(D, k):
    diagonal, row = torch.zeros(D, D), torch.zeros(D, D)
    diagonal.diagonal()[:k] = 1
    row[0, :k] = 1
    return diagonal, row


def after_flip(M, sign):
    return sign[:, None] * M * sign


class TinyFile:
    """The row in which each u_i is largest and its sign there; W z for one fixed z detects all other differences."""

    @staticmethod
    def write(U, S, Vt, M):
        row = U.abs().argmax(dim=0, keepdim=True)
        z = torch.arange(Vt.shape[1]).double().cos()
        return {"M": M, "row": row, "sign": U.gather(0, row)[0].sign(), "Wz": U @ (torch.diag(S) + M) @ Vt @ z}

    @staticmethod
    def read(content, U, S, Vt, close=1e-6):
        sign = content["sign"] * U.gather(0, content["row"])[0].sign()
        W = U @ (torch.diag(S) + after_flip(content["M"], sign)) @ Vt
        off = W @ torch.arange(Vt.shape[1]).double().cos() - content["Wz"]
        if off.norm() > close * content["Wz"].norm():
            raise ValueError("these factors belong to another matrix: use the base model that M was trained on")
        return W


def same_matrices(rank):
    return f"svft:rank={rank},off_diagonals={rank - 1}"
