"""The exercises of docs/lab.md that are functions. Put your code in the place of `raise ToDo`; then

    python -m pytest docs/lab -rs

grades them on random shapes. What you have not touched is skipped with its question. The docstrings say what is asked,
often as plain loops: these are right, but slow or blind to the structure, and yours shall have no Python loops, except
where it says so. Throughout, W0 (d_out, d_in) = U diag(S) Vt is the thin SVD, as svmini.methods.svd.thin_svd gives it:
U (d_out, D), S (D,) descending, Vt (D, d_in), D = min(d_out, d_in). Tensors are float64.
Exercise 2 is a file of your own in svmini/methods; 5 and 6 are commands.
"""

import torch

from svmini import METHODS


class ToDo(Exception):
    """Nobody has touched this exercise yet."""


def counts_of_a_matrix(d_out, d_in, d, r):
    """1. How many numbers do SVFT, LoRA and VeRA train in one matrix? Returns three whole numbers, by three formulas.

    SVFT with d off-diagonals, 0 <= d < D, as a loop:
        k = 0
        for i in range(D):
            for j in range(D):
                if abs(i - j) <= d:
                    k += 1
    LoRA and VeRA of rank r: count the entries of what they train (see the heads of lora.py and vera.py).
    """
    raise ToDo


def vit_b16():
    """1. Which matrices of ViT-B/16 do the counts of the SVFT paper speak of? Returns a dict of three.

    {"svft": count, "lora": count, "vera": count} of the whole model. ViT-B/16 has 12 blocks; in each, query, key, value
    and out are (768, 768), up is (3072, 768), down (768, 3072).
    "svft": banded with d = 2; the paper prints 0.28M.  "lora": rank 8; it prints 1.32M (cut off). Its text says that
    query, key, value, up and down are adapted in both. Do the numbers say so too?
    "vera": rank 1024 on query, key, value and out; it prints 0.09M for DeBERTaV3-base, whose shapes are the same.
    """
    raise ToDo


def gradient_of_M(U, Vt, G, where):
    """3. What is the gradient of SVFT's M at these places, from the gradient G = dL/dW (d_out, d_in)? Returns (k,).

    where: int64 (k, 2), the places (i, j). W = U (diag(S) + M) Vt is linear in M, so that

    for n, (i, j) in enumerate(where):
        M = zeros(D, D); M[i, j] = 1
        gradient[n] = (G * (U @ M @ Vt)).sum()

    That makes a (d_out, d_in) matrix for each number. Make none.
    """
    raise ToDo


def wrong_gradient(y, factor):
    """3. How do you plant a mistake that no value shows? Returns a tensor equal to y in every bit, through which the
    gradient comes `factor` times as large. One line will do."""
    raise ToDo


def caught(place):
    """3. Which checks see a gradient that is 1 % too large? Returns a set of their names; predict first, then grade.

    place: where wrong_gradient(.., 1.01) is planted in svmini/methods/svft.py, for svft:off_diagonals=3:
        "forward"   round what forward returns
        "weight"    round what weight returns
        "core"      round what core returns, which forward and weight both use
    The checks, of tests/math/test_contract.py and test_gradients.py:
        "start"                 weight is W0 before the first step
        "two roads"             weight and forward have equal values and equal gradients
        "finite differences"    of weight, and of forward, against autograd
        "closed form"           the gradient of a loss on forward's output, against gradient_of_M
    """
    raise ToDo


def train_both(linear, x, y, steps, lr):
    """4. Do SVFit and SVFT plain train alike? Returns (s, M), the trained vectors of both, each (D,).

    For METHODS["svfit"](linear) and for METHODS["svft"](linear, pattern="plain"): `steps` steps of torch.optim.AdamW
    with this lr and no weight decay, on the mean of (layer(x) - y)², over all of x (T, d_in) in each step.
    A loop over the steps is allowed. Look at s - S - M, and then at what weight_decay=0.1 makes of it.
    """
    raise ToDo


def weight_stats(W, start):
    """7. Are a weight's singular vectors learned, or still those of its random start? Returns (cosine, energy), floats.

    cosine = sum(W[i, j] * start[i, j]) / (norm(W) * norm(start)), sums over all entries
    energy = sum(S[i] ** 2 for i < D // 4) / sum(S[i] ** 2 for all i), S the singular values of W
    """
    raise ToDo


def band_share(W0, W, d):
    """8. How much of a change W - W0 lies in a band of the singular basis of W0? Returns a float, 0 to 1.

    inside = 0
    for i in range(D):
        for j in range(D):
            if abs(i - j) <= d:
                inside += (U[:, i] @ (W - W0) @ Vt[j]) ** 2
    share = inside / (sum of the squares of all entries of W - W0)
    """
    raise ToDo


def rank_k_and_rank_1(D, k):
    """9. Does the number of trained numbers fix the rank of the change?

    Returns two M (D, D), each with exactly k entries that are not zero, k <= D: the first of rank k, the second of
    rank 1. A loop is allowed.
    """
    raise ToDo


def after_flip(M, sign):
    """10. What becomes of M (D, D) when singular vectors change their signs? Returns the M that gives the same W.

    sign: (D,) of 1 and -1. u_i becomes sign[i] u_i, and v_i becomes sign[i] v_i, which leaves W0 what it was.
    Before: W = sum over i, j of (diag(S) + M)[i, j] * outer(U[:, i], Vt[j]).
    """
    raise ToDo


class TinyFile:
    """10. What must an adapter file hold, so that another machine reads it right, or refuses?

    M was trained between U and Vt. The reader's SVD of the same W0 may have other signs: both u_i and v_i flipped, for
    any i. Or he has another base. The file is to be small: beside M at most 2 (d_out + d_in) numbers, so no U and Vt.
    """

    @staticmethod
    def write(U, S, Vt, M):
        """Returns a dict {name: tensor}: M (D, D) as "M", and what else you need."""
        raise ToDo

    @staticmethod
    def read(content, U, S, Vt):
        """content: what write returned.  U, S, Vt: the reader's own. Returns W (d_out, d_in) as it was trained; raises
        ValueError where these factors are of another matrix, even one that differs by 1 % of its norm."""
        raise ToDo
