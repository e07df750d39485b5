"""The functions that docs/lab.md asks for. Replace `raise ToDo(...)` by your code, then grade it:

    python -m pytest docs/lab

The docstrings state what each function returns. Some define it by loops, which are correct but slow. Write yours
without Python loops, unless the docstring permits one. In this file, W0 (d_out, d_in) = U diag(S) Vt is the thin SVD of
a weight, as svmini.methods.svd.thin_svd returns it: U (d_out, D), S (D,) in descending order, Vt (D, d_in), with
D = min(d_out, d_in). Tensors are float64. Exercises 2 and 11 are files of your own in svmini/methods; 5 and 6 are
commands.
"""

import pytest
import torch

from svmini import METHODS


class ToDo(pytest.skip.Exception):
    """Raised by an exercise that is not started: pytest then skips its grader."""


def count_parameters(d_out, d_in, d, r):
    """1. How many parameters do SVFT, LoRA and VeRA train in one matrix?

    Return three ints, from three formulas without loops.

    SVFT, banded with d off-diagonals, 0 <= d < D, has k of them:
        k = 0
        for i in range(D):
            for j in range(D):
                if abs(i - j) <= d:
                    k += 1
    LoRA and VeRA, rank r: count the entries of what they train (the first lines of lora.py and vera.py state it).
    """
    raise ToDo("exercise 1, count_parameters")


def counts_in_the_paper():
    """1. Which matrices do the parameter counts of the SVFT paper include?

    Return {"svft": count, "lora": count, "vera": count}, each for the model named below. Both models have 12 blocks
    with the same shapes: query, key, value and out are (768, 768), up is (3072, 768), down is (768, 3072).

    "svft": ViT-B/16, banded with d = 2. The paper prints 0.28M.
    "lora": ViT-B/16, rank 8. The paper prints 1.32M, which is cut off, not rounded.
    "vera": DeBERTaV3-base, rank 1024, adapts query, key, value and out. The paper prints 0.09M.
    The text of the paper says that SVFT and LoRA adapt query, key, value, up and down. Do the counts agree?
    """
    raise ToDo("exercise 1, counts_in_the_paper")


def gradient_of_M(U, Vt, G, positions):
    """3. What is the gradient of the trained entries of M, given G = dL/dW (d_out, d_in)?

    positions: int64 (k, 2), the rows (i, j) of the trained entries. Return the gradient (k,).

    W = U (diag(S) + M) Vt is linear in M, so
        for n, (i, j) in enumerate(positions):
            M = zeros(D, D)
            M[i, j] = 1
            gradient[n] = (G * (U @ M @ Vt)).sum()
    This computes a (d_out, d_in) matrix for every entry. Compute none (the grader does not check that).
    """
    raise ToDo("exercise 3, gradient_of_M")


def wrong_gradient(y, factor):
    """3. How do you plant an error that no value shows?

    Return a tensor that equals y (torch.equal), also under torch.no_grad(), but whose gradient with respect to y is
    `factor` instead of 1. One line is enough.
    """
    raise ToDo("exercise 3, wrong_gradient")


def caught_by(place):
    """3. Which checks catch a gradient that is 1 % too large?

    Return the set of their names. Predict before you grade.

    place: which result in svmini/methods/svft.py goes through wrong_gradient(..., 1.01), for svft:off_diagonals=3:
        "forward"   what `forward` returns
        "weight"    what `weight` returns
        "core"      what `core` returns, which both `forward` and `weight` use
    The checks (tests/math/test_contract.py and test_gradients.py):
        "start"                 weight equals W0 before the first step
        "two paths"             weight and forward have equal values and equal gradients
        "finite differences"    the gradients of weight and of forward equal finite differences
        "closed form"           the gradient of a loss on the output of forward equals gradient_of_M
    """
    raise ToDo("exercise 3, caught_by")


def train_both(linear, x, y, steps, lr):
    """4. Do SVFit and plain SVFT train alike?

    Return (s, M): the trained vectors (D,) of METHODS["svfit"](linear) and METHODS["svft"](linear, pattern="plain").
    Train each for `steps` steps of torch.optim.AdamW with this lr and weight_decay=0, on the mean of (layer(x) - y)²
    over all of x (T, d_in). A loop over the steps is permitted.
    """
    raise ToDo("exercise 4, train_both")


def weight_stats(W, start):
    """7. Has pretraining replaced the random start of a weight?

    Return (cosine, energy), two floats:
        cosine = sum(W[i, j] * start[i, j]) / (norm(W) * norm(start))          over all i and j
        energy = sum(S[i] ** 2 for i < D // 4) / sum(S[i] ** 2 for all i)      S: the singular values of W
    """
    raise ToDo("exercise 7, weight_stats")


def band_share(W0, W, d):
    """8. Which share of the update W - W0 is in a band of the singular basis of W0?

    Return a float from 0 to 1:
        inside = 0
        for i in range(D):
            for j in range(D):
                if abs(i - j) <= d:
                    inside += (U[:, i] @ (W - W0) @ Vt[j]) ** 2
        share = inside / (sum of the squares of all entries of W - W0)
    """
    raise ToDo("exercise 8, band_share")


def rank_k_and_rank_1(D, k):
    """9. Does the number of trained entries determine the rank of the update?

    Return two matrices M (D, D), each with exactly k nonzero entries, 1 <= k <= D: the first of rank k, the second of
    rank 1. A loop is permitted.
    """
    raise ToDo("exercise 9, rank_k_and_rank_1")


def after_flip(M, sign):
    """10. Which M gives the same W after singular vectors have changed their signs?

    sign: (D,) of 1 and -1. u_i becomes sign[i] * u_i and v_i becomes sign[i] * v_i, so W0 stays the same. Return the
    new M (D, D). Before the flip, W = sum over i and j of (diag(S) + M)[i, j] * outer(U[:, i], Vt[j]).
    """
    raise ToDo("exercise 10, after_flip")


class TinyFile:
    """10. What must an adapter file contain so that another machine reads it correctly, but not on another base?

    M was trained between U and Vt. The reader computes U, S and Vt again. They may differ from the writer's in one way
    only: u_i and v_i have changed their signs *together*, for any i. Everything else means that the reader has another
    base model, even if only one of U, S and Vt differs. The file may contain at most 2 (d_out + d_in) numbers in
    addition to M, so U and Vt do not fit.
    """

    @staticmethod
    def write(U, S, Vt, M):
        """Return a dict {name: tensor} with M (D, D), unchanged, as "M" and whatever else you need."""
        raise ToDo("exercise 10, TinyFile")

    @staticmethod
    def read(content, U, S, Vt):
        """Return the trained W (d_out, d_in). content: what write returned.  U, S, Vt: those of the reader.

        Raises ValueError if they belong to another matrix, even if that differs from W0 by only 1 % of its norm.
        """
        raise ToDo("exercise 10, TinyFile")


def same_matrices(rank):
    """11. Which spec of svft reaches the same matrices as LoRA-XS of this rank?

    Return the spec, a string such as "svft:off_diagonals=2". It must train as many parameters as LoRA-XS.
    """
    raise ToDo("exercise 11, same_matrices")
