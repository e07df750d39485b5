"""The graders of docs/lab accept the model answers and refuse wrong ones; an untouched exercise is skipped."""

import re
import sys
from pathlib import Path

import pytest
import torch

import answers
from svmini import METHODS, ViT, ViTConfig, adapt
from svmini.cli import method_spec
from svmini.model_file import load_base, save_model

LAB = Path(__file__).parents[2] / "docs" / "lab"
sys.path.append(str(LAB))

import exercises
import test_lab
import truncate
import update

STUBS = [name.removeprefix("test_") for name, x in vars(test_lab).items() if hasattr(x, "grade")]
right = answers.TinyFile


def file(write=right.write, read=right.read):
    return type("File", (), {"write": staticmethod(write), "read": staticmethod(read)})


def own_signs(c, U, S, Vt):
    return right.read(c | {"sign": U.gather(0, c["row"])[0].sign()}, U, S, Vt)


def sum_of(U, S, Vt, M):
    return right.write(U, S, Vt, M) | {"Wz": (U * S @ Vt).sum()[None]}


def by_sum(c, U, S, Vt):   # that base's sum of entries, which another base may share
    if not torch.allclose((U * S @ Vt).sum()[None], c["Wz"]):
        raise ValueError
    sign = c["sign"] * U.gather(0, c["row"])[0].sign()
    return U @ (torch.diag(S) + answers.after_flip(c["M"], sign)) @ Vt


WRONG = {
    "counts_of_a_matrix": [lambda d_out, d_in, d, r: (min(d_out, d_in) * (2 * d + 1), r * (d_in + d_out), d_out + r),
                           lambda d_out, d_in, d, r: answers.counts_of_a_matrix(d_in, d_out, d, r)],
    "vit_b16": [lambda: answers.vit_b16() | {"svft": 230040}, lambda: answers.vit_b16() | {"vera": 129024}],
    "gradient_of_M": [lambda U, Vt, G, where: answers.gradient_of_M(U, Vt, G, where.flip(1)),
                      lambda U, Vt, G, where: 2 * answers.gradient_of_M(U, Vt, G, where)],
    "wrong_gradient": [lambda y, factor: y, lambda y, factor: factor * y,
                       lambda y, factor: factor * y - ((factor - 1) * y).detach()],   # the last bits change
    "caught": [lambda place: {"finite differences", "closed form"}, lambda place: {"two roads", "finite differences"}],
    "train_both": [lambda *a: answers.train_both(*a, weight_decay=0.1), lambda *a: answers.train_both(*a)[::-1],
                   lambda *a: answers.train_both(*a[:3], 19, a[4])],
    "weight_stats": [lambda W, start: (abs(answers.weight_stats(W, start)[0]), answers.weight_stats(W, start)[1]),
                    lambda W, start: (1.0, answers.weight_stats(W, start)[1]),
                    lambda W, start: (answers.weight_stats(W, start)[0], answers.weight_stats(start, W)[1])],
    "band_share": [lambda W0, W, d: answers.band_share(W, W0, d), lambda W0, W, d: answers.band_share(W0, W, d + 1),
                   lambda W0, W, d: answers.band_share(W0, W, d) / answers.band_share(W0, W, 99)],   # of C, not of ΔW
    "rank_k_and_rank_1": [lambda D, k: answers.rank_k_and_rank_1(D, k)[::-1], lambda D, k: (torch.eye(D),) * 2],
    "after_flip": [lambda M, sign: M, lambda M, sign: M * sign],
    "TinyFile": [file(read=own_signs), file(write=sum_of, read=by_sum),
                 file(read=lambda *a: right.read(*a, close=float("inf"))),
                 file(lambda U, S, Vt, M: right.write(U, S, Vt, M) | {"U": U, "Vt": Vt})],
}


def start_elsewhere(self, linear):
    answers.Columns.__init__(self, linear)
    self.g.data += 0.01


def trains_W0(self, linear):
    answers.Columns.__init__(self, linear)
    self.W0 = torch.nn.Parameter(self.W0.clone())


WRONG_COLUMNS = [type("Columns", (answers.Columns,), wrong) for wrong in (
    {"weight": property(lambda self: self.W0 * self.g[:1])}, {"count": staticmethod(lambda d_out, d_in: d_out)},
    {"weight": property(lambda self: self.W0 * self.g.detach())}, {"__init__": trains_W0}, {"__init__": start_elsewhere},
    {"examples": ()}, {"forward": lambda self, x: (x * self.g) @ self.W0.t()})]   # no bias


def test_every_exercise_has_a_grader_and_answers():
    assert len(STUBS) == 11 and set(STUBS) == WRONG.keys() <= vars(answers).keys()
    asked = re.findall(r"^(?:def|class) (\w+)[^\n]*\n    \"\"\"\d+\. ", (LAB / "exercises.py").read_text("utf-8"), re.M)
    assert asked == STUBS


@pytest.mark.parametrize("name", STUBS)
def test_a_stub_is_skipped_the_answer_accepted_and_wrong_ones_refused(name, monkeypatch):
    def to_do(*args):
        raise exercises.ToDo
    grader, stub = getattr(test_lab, f"test_{name}"), file(to_do) if name == "TinyFile" else lambda *args: to_do()
    stub.__doc__ = "7. Why, and\n    what for? Returns a number."
    monkeypatch.setattr(exercises, name, stub)
    with pytest.raises(pytest.skip.Exception, match=r"^7\. Why, and what for\?$"):
        grader()
    monkeypatch.setattr(exercises, name, getattr(answers, name))
    grader()
    for wrong in WRONG[name]:
        monkeypatch.setattr(exercises, name, wrong)
        with pytest.raises((AssertionError, ValueError, pytest.fail.Exception)):
            grader()


def test_a_method_of_ones_own(monkeypatch, tmp_path):
    monkeypatch.delitem(METHODS, "columns", raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"^2\. "):
        test_lab.test_columns(tmp_path)
    monkeypatch.setitem(METHODS, "columns", answers.Columns)
    test_lab.test_columns(tmp_path)
    for wrong in WRONG_COLUMNS:
        monkeypatch.setitem(METHODS, "columns", wrong)
        with pytest.raises((AssertionError, RuntimeError, pytest.fail.Exception)):
            test_lab.test_columns(tmp_path)


def test_update_prints_the_shares(monkeypatch, capsys, tmp_path):
    for seed in (0, 1):
        torch.manual_seed(seed)
        save_model(tmp_path / f"{seed}.pt", ViT(ViTConfig(8, 4, 3, 4 + seed, 1, 2, 16)), {})
    monkeypatch.setattr(update, "band_share", answers.band_share)
    update.main(str(tmp_path / "0.pt"), str(tmp_path / "1.pt"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(ViT.targets)
    shares = [float(x) for x in lines[1].split()[4:10]]
    assert shares[1::2] == [0.0625, 0.2891, 0.7812] and all(0 < x < 1 for x in shares)
    W0, W = (load_base(tmp_path / f"{i}.pt", ViT)[0].blocks[0].mlp.down.weight.double() for i in (0, 1))
    S = torch.linalg.svdvals(W - W0)
    assert lines[-1].split()[10:] == [f"{S.norm() / W0.norm():.2f}", "16", "of", "16",
                                      f"{S[:2].square().sum() / S.square().sum():.2f}"]


def test_truncate_keeps_the_first_singular_values(tmp_path):
    torch.manual_seed(0)
    model = ViT(ViTConfig(8, 4, 3, 4, 1, 2, 16))
    save_model(tmp_path / "base.pt", model, {"data": "glyphs A"})
    truncate.main(str(tmp_path / "base.pt"), 5, tmp_path / "cut.pt")
    cut, about = load_base(tmp_path / "cut.pt", ViT)
    assert about["data"] == "glyphs A" and torch.equal(cut.head.weight, model.head.weight)
    for target in ViT.targets:
        name = next(name for name, _ in model.named_modules() if name.endswith(f".{target}"))
        before, after = (m.get_submodule(name).weight.double() for m in (model, cut))
        U, S, Vt = torch.linalg.svd(before, full_matrices=False)
        torch.testing.assert_close(after, U[:, :5] * S[:5] @ Vt[:5], rtol=0, atol=1e-6)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():   # U_r (Σ_r + M) V_rᵀ from M = 0
        expected = cut(x)
        torch.testing.assert_close(adapt(cut, "svft", rank=5, off_diagonals=2)(x), expected)


def test_the_commands_of_lab_md(monkeypatch):
    monkeypatch.setitem(METHODS, "columns", answers.Columns)
    text = (LAB.parent / "lab.md").read_text(encoding="utf-8")
    specs = re.findall(r"(?:svft|lora|vera|svfit|entries):[\w=,.]+", text)
    assert len(specs) > 25 and all(method_spec(spec) for spec in specs)
    monkeypatch.syspath_prepend(str(LAB.parents[1]))
    import train_vit
    commands = re.findall(r"^python train_vit.py (.*)$", text.replace("\\\n", " ").replace("SPECS", "svfit"), re.M)
    assert len(commands) == 6
    for specs in map(str.split, commands):
        train_vit.pretraining_flags(specs[1:]) if specs[0] == "pretrain" else train_vit.adapting_flags(specs)
