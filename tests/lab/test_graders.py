"""The graders of docs/lab accept the model answers, reject wrong ones, and skip an exercise that is not started."""

import re
import sys
from pathlib import Path

import pytest
import torch

import answers
from svmini import METHODS, ViT, ViTConfig
from svmini.cli import method_spec
from svmini.model_file import load_base, save_model

LAB = Path(__file__).parents[2] / "docs" / "lab"
sys.path.append(str(LAB))

import exercises
import test_lab
import truncate
import update

right = answers.TinyFile


def file(write=right.write, read=right.read):
    return type("File", (), {"write": staticmethod(write), "read": staticmethod(read)})


def own_signs(c, U, S, Vt):
    return right.read(c | {"sign": U.gather(0, c["row"])[0].sign()}, U, S, Vt)


def sum_of(U, S, Vt, M):   # recognizes the base by the sum of its entries, which another base may share
    return right.write(U, S, Vt, M) | {"sum": (U * S @ Vt).sum()[None]}


def by_sums(c, U, S, Vt):   # the sums of U's columns and of V's, which do not change if rows are permuted
    sign = U.sum(0).sign() * c["U"].sign()
    if not all(torch.allclose(a, b) for a, b in ((U.sum(0) * sign, c["U"]), (Vt.sum(1) * sign, c["V"]), (S, c["S"]))):
        raise ValueError
    return U @ (torch.diag(S) + answers.after_flip(c["M"], sign)) @ Vt


def hooked(y, factor):
    z = y * 1
    z.register_hook(lambda grad: grad * factor)
    return z


def by_sum(c, U, S, Vt):
    if not torch.allclose((U * S @ Vt).sum()[None], c["sum"]):
        raise ValueError
    return right.read(c, U, S, Vt, close=float("inf"))


WRONG = {
    "count_parameters": [lambda d_out, d_in, d, r: (min(d_out, d_in) * (2 * d + 1), r * (d_in + d_out), d_out + r),
                         lambda d_out, d_in, d, r: answers.count_parameters(d_in, d_out, d, r)],
    "counts_in_the_paper": [lambda: answers.counts_in_the_paper() | {"svft": 230040}],   # without out
    "gradient_of_M": [lambda U, Vt, G, positions: answers.gradient_of_M(U, Vt, G, positions.flip(1))],
    "wrong_gradient": [lambda y, factor: y, lambda y, factor: factor * y, hooked,
                       lambda y, factor: factor * y - ((factor - 1) * y).detach()],      # the last bits change
    "caught_by": [lambda place: {"finite differences", "closed form"}],
    "train_both": [lambda *a: answers.train_both(*a, weight_decay=0.1), lambda *a: answers.train_both(*a)[::-1],
                   lambda *a: answers.train_both(*a[:3], 19, a[4])],
    "weight_stats": [lambda W, start: (abs(answers.weight_stats(W, start)[0]), answers.weight_stats(W, start)[1]),
                     lambda W, start: (answers.weight_stats(W, start)[0], answers.weight_stats(start, W)[1])],
    "band_share": [lambda W0, W, d: answers.band_share(W, W0, d), lambda W0, W, d: answers.band_share(W0, W, d + 1),
                   lambda W0, W, d: answers.band_share(W0, W, d) / answers.band_share(W0, W, 99)],   # of C, not of ΔW
    "rank_k_and_rank_1": [lambda D, k: answers.rank_k_and_rank_1(D, k)[::-1], lambda D, k: (torch.eye(D),) * 2],
    "after_flip": [lambda M, sign: M, lambda M, sign: M * sign],
    "TinyFile": [file(read=own_signs), file(write=sum_of, read=by_sum),
                 file(lambda U, S, Vt, M: {"M": M, "U": U.sum(0), "V": Vt.sum(1), "S": S}, by_sums),
                 file(lambda U, S, Vt, M: right.write(U, S, Vt, M) | {"U": U, "Vt": Vt})],
    "same_matrices": [lambda rank: f"svft:rank={rank},pattern=plain",
                      lambda rank: f"svft:rank={rank},off_diagonals={rank - 1},basis=random"],
}
METHODS_OF_THE_LAB = {   # the answer, and what is changed in it to make a wrong one
    "columns": (answers.Columns, {"weight": property(lambda self: self.W0 * self.g[:1])}, {"examples": ()},
                {"forward": lambda self, x: (x * self.g) @ self.W0.t()}),                # no bias
    "lora_xs": (answers.LoRAXS, {"weight": property(lambda self: self.W0 + self.L @ self.R.t() @ self.Vt)},
                {"examples": ("rank=1",)}),
}


def test_every_exercise_has_a_grader_and_answers():
    stubs = re.findall(r"^(?:def|class) (\w+)[^\n]*\n    \"\"\"\d+\. ", (LAB / "exercises.py").read_text("utf-8"), re.M)
    assert len(stubs) == 12 and stubs == list(WRONG)
    assert {f"test_{name}" for name in stubs} <= vars(test_lab).keys()


@pytest.mark.parametrize("name", WRONG)
def test_a_stub_is_skipped_and_only_the_answer_is_accepted(name, monkeypatch):
    def to_do(*args):
        raise exercises.ToDo("exercise 7")
    grader = getattr(test_lab, f"test_{name}")
    monkeypatch.setattr(exercises, name, file(to_do) if name == "TinyFile" else to_do)
    with pytest.raises(pytest.skip.Exception, match="exercise 7"):
        grader()
    monkeypatch.setattr(exercises, name, getattr(answers, name))
    grader()
    for wrong in WRONG[name]:
        monkeypatch.setattr(exercises, name, wrong)
        with pytest.raises((AssertionError, ValueError, pytest.fail.Exception)):
            grader()


@pytest.mark.parametrize("name", METHODS_OF_THE_LAB)
def test_only_a_right_method_is_accepted(name, monkeypatch, tmp_path):
    grader, (answer, *changes) = getattr(test_lab, f"test_{name}"), METHODS_OF_THE_LAB[name]
    monkeypatch.delitem(METHODS, name, raising=False)
    with pytest.raises(pytest.skip.Exception, match=name):
        grader(tmp_path)
    monkeypatch.setitem(METHODS, name, answer)
    grader(tmp_path)
    for change in changes:
        monkeypatch.setitem(METHODS, name, type("Wrong", (answer,), change))
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            grader(tmp_path)


def test_update_prints_the_shares(monkeypatch, capsys, tmp_path):
    for seed in (0, 1):
        torch.manual_seed(seed)
        save_model(tmp_path / f"{seed}.pt", ViT(ViTConfig(8, 4, 3, 4 + seed, 1, 2, 16)), {})
    monkeypatch.setattr(update, "band_share", answers.band_share)
    update.main(str(tmp_path / "0.pt"), str(tmp_path / "1.pt"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(ViT.targets)
    shares = [float(x) for x in lines[1].split()[4:13]]
    assert shares[1::3] == [0.0625, 0.2891, 0.7812] and all(0 < x < 1 for x in shares)
    assert lines[1].split()[14:17] == ["16", "of", "16"]


def test_update_tells_a_band_from_a_preference_for_the_leading_directions(monkeypatch):
    """Without structure besides its rows and columns, C has the share of `leading`; a diagonal C has far more."""
    monkeypatch.setattr(update, "band_share", answers.band_share)
    W0, decay = torch.randn(24, 16, dtype=torch.float64), 0.7 ** torch.arange(16, dtype=torch.float64)
    U, _, Vt = torch.linalg.svd(W0, full_matrices=False)
    share, _, leading = update.update_of(W0, W0 + U @ torch.outer(decay, decay) @ Vt)[:3]
    assert share == pytest.approx(leading) and share > 0.2
    share, _, leading = update.update_of(W0, W0 + U @ Vt)[:3]
    assert (share, leading) == (pytest.approx(1), pytest.approx(1 / 16))


def test_truncate_keeps_the_first_singular_values(tmp_path):
    torch.manual_seed(0)
    model = ViT(ViTConfig(8, 4, 3, 4, 1, 2, 16))
    save_model(tmp_path / "base.pt", model, {"data": "glyphs A"})
    truncate.main(str(tmp_path / "base.pt"), 5, tmp_path / "cut.pt")
    cut, metadata = load_base(tmp_path / "cut.pt", ViT)
    assert metadata["data"] == "glyphs A" and torch.equal(cut.head.weight, model.head.weight)
    before, after = (m.blocks[0].mlp.down.weight.detach() for m in (model, cut))
    U, S, Vt = torch.linalg.svd(before, full_matrices=False)
    torch.testing.assert_close(after, U[:, :5] * S[:5] @ Vt[:5], rtol=0, atol=1e-5)


def test_commands_in_lab_md_are_valid(monkeypatch):
    for name, (answer, *_) in METHODS_OF_THE_LAB.items():
        monkeypatch.setitem(METHODS, name, answer)
    text = (LAB.parent / "lab.md").read_text(encoding="utf-8")
    specs = re.findall(r"(?:svft|lora|vera|svfit|random_mask|lora_xs):[\w=,.]+", text)
    assert len(specs) > 25 and all(method_spec(spec) for spec in specs)
    monkeypatch.syspath_prepend(str(LAB.parents[1]))
    import train_vit
    commands = re.findall(r"^python train_vit.py (.*)$", re.sub("SPECS?", "svfit", text.replace("\\\n", " ")), re.M)
    assert len(commands) > 5
    for words in map(str.split, commands):
        train_vit.pretraining_flags(words[1:]) if words[0] == "pretrain" else train_vit.adapting_flags(words)
