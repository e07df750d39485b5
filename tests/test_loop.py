"""Runs that survive: stop, kill and resume to the last bit; loss that is not finite; schedule, optimizer, model files."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import train_gpt
import train_vit
from svmini import GPT, GPTConfig, ViT, ViTConfig, adapt, compare, files, loop, report, save_adapter, tasks
from svmini.rng import generator

ROOT = Path(__file__).resolve().parent.parent
CPU = loop.pick_machine("cpu")


# ---- a toy: predict the next of seven tokens, which are a walk of constant step ----

def walk(size, seed, step):
    g = generator("walk", seed, step)
    start, stride = torch.randint(7, (2, size, 1), generator=g)
    tokens = (start + stride * torch.arange(9)) % 7             # (size, 9)
    return tokens[:, :-1], tokens[:, 1:]


def token_loss(model, x, y):
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def score(model, split):
    value = token_loss(model, *walk(16, split, 0)).item()
    return {"loss": value, "metric": value}


def toy(**changes):
    return loop.Task(**{"name": "walk", "metric_name": "loss", "higher_is_better": False, "batch": walk,
                        "loss": token_loss, "evaluate": score, **changes})


def tiny_gpt(dropout=0.0, seed=0):
    torch.manual_seed(seed)
    return GPT(GPTConfig(7, 8, 1, 2, 8, dropout))


def tiny_vit(classes=3):
    torch.manual_seed(0)
    return ViT(ViTConfig(4, 2, 1, classes, 1, 2, 8))


def interrupt_at(step, stage="batch"):
    """A toy that gets Ctrl-C while it makes the batch of a step, or at its n-th evaluation."""
    evaluations = []

    def batch(size, seed, now):
        if stage == "batch" and now == step:
            signal.raise_signal(signal.SIGINT)
        return walk(size, seed, now)

    def evaluate(model, split):
        evaluations.append(split)
        if stage == "evaluate" and len(evaluations) == step:
            signal.raise_signal(signal.SIGINT)
        return score(model, split)

    return toy(batch=batch, evaluate=evaluate)


def same(a, b):
    """Equal to the last bit: dicts, lists, tensors and plain values."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_same_run(a, b):
    """Two folders of a run hold the same: checkpoints, with all that the next step needs, and the log."""
    names = {p.name for p in a.iterdir()}
    assert names == {p.name for p in b.iterdir()} and {"last.pt", "best.pt", "metrics.jsonl"} <= names
    for name in names:
        if name.endswith(".pt"):
            one, other = (torch.load(f / name, weights_only=True) for f in (a, b))
            assert same(one, other), f"{name} differs"
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()


def settings(**changes):
    return loop.Settings(**{"steps": 12, "lr": 1e-2, "batch_size": 4, **changes})


SETTINGS = settings(weight_decay=0.1, seed=3, eval_every=3, save_every=5)


# ---- stop and resume ----

@pytest.mark.parametrize("step, stage", [(0, "batch"), (4, "batch"), (5, "batch"), (8, "batch"), (11, "batch"),
                                         (1, "evaluate"), (2, "evaluate"), (4, "evaluate")])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_stopped_run_goes_on_to_the_last_bit(tmp_path, dropout, step, stage):
    """Also where Ctrl-C comes at a step that is evaluated (0-based 5, 8, 11) or during an evaluation."""
    whole = tiny_gpt(dropout)
    loop.train(whole, toy(), SETTINGS, CPU, tmp_path / "whole", {"a": 1})
    with pytest.raises(loop.Stopped, match="--resume"):
        loop.train(tiny_gpt(dropout), interrupt_at(step, stage), SETTINGS, CPU, tmp_path / "cut", {"a": 1})
    stopped_at = files.load(tmp_path / "cut" / "last.pt", "run")["step"]
    assert stopped_at == step + 1 or stage == "evaluate"
    torch.manual_seed(99)    # what the new process happens to have
    again = tiny_gpt(dropout, seed=5)
    asked = []
    task = toy(batch=lambda *key: asked.append(key) or walk(*key))
    loop.train(again, task, SETTINGS, CPU, tmp_path / "cut", {"a": 1}, resume=True)
    assert asked == [(4, 3, s) for s in range(stopped_at, 12)], "done steps are not done again"
    assert same(dict(whole.state_dict()), dict(again.state_dict()))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_dropout_and_the_random_state_matter_here(tmp_path):
    """The test above would see a random state that is not restored."""
    with pytest.raises(loop.Stopped):
        loop.train(tiny_gpt(0.3), interrupt_at(4), SETTINGS, CPU, tmp_path / "cut", {})
    path = tmp_path / "cut" / "last.pt"
    content = torch.load(path, weights_only=True)
    torch.manual_seed(1)
    torch.save(content | {"random": [torch.get_rng_state()]}, path)
    loop.train(tiny_gpt(0.3), toy(), SETTINGS, CPU, tmp_path / "cut", {}, resume=True)
    whole = tiny_gpt(0.3)
    loop.train(whole, toy(), SETTINGS, CPU, tmp_path / "whole", {})
    assert (tmp_path / "whole" / "metrics.jsonl").read_bytes() != (tmp_path / "cut" / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("word", ["svft", "svfit:rank=3", "lora:rank=2", "vera:rank=4", "full"])
def test_fine_tuning_goes_on_to_the_last_bit(tmp_path, word):
    rows = []
    for name in ("whole", "cut"):
        if name == "cut":
            with pytest.raises(loop.Stopped):
                compare.finetune(word, toy_setup(tmp_path / name, task=interrupt_at(6)), 3)
        row = compare.finetune(word, toy_setup(tmp_path / name, resume=name == "cut"), 3)
        rows.append({k: v for k, v in row.items() if k not in ("seconds", "ms_per_step")})
    assert rows[0] == rows[1]
    folder = f"runs/{compare.slug(word)}-seed3"
    assert_same_run(tmp_path / "whole" / folder, tmp_path / "cut" / folder)


def test_lines_after_the_checkpoint_are_cut(tmp_path):
    """Killed after an evaluation and before the next checkpoint, the log is ahead of the checkpoint."""
    s = settings(steps=12, lr=1e-2, eval_every=1, save_every=5)
    loop.train(tiny_gpt(), toy(), s, CPU, tmp_path / "whole", {})

    def killed(size, seed, step):
        if step == 8:
            raise SystemError("as good as a kill")
        return walk(size, seed, step)

    with pytest.raises(SystemError):
        loop.train(tiny_gpt(), toy(batch=killed), s, CPU, tmp_path / "cut", {})
    assert len((tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()) == 8
    loop.train(tiny_gpt(), toy(), s, CPU, tmp_path / "cut", {}, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    lines = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert all(set(line) == {"step", "split", "loss", "metric", "lr"} for line in lines), "no clock in it"


def test_lines_after_the_checkpoint_are_cut_at_once(tmp_path):
    """Stopped again before its next evaluation, a resumed run has no line that its checkpoint does not know."""
    loop.train(tiny_gpt(), toy(), settings(steps=12, eval_every=1, save_every=5), CPU, tmp_path, {})
    with pytest.raises(loop.Stopped):
        loop.train(tiny_gpt(), interrupt_at(3), settings(steps=12, eval_every=1), CPU, tmp_path / "early", {})
    (tmp_path / "early" / "metrics.jsonl").write_bytes((tmp_path / "metrics.jsonl").read_bytes())   # 12 lines
    with pytest.raises(loop.Stopped):
        loop.train(tiny_gpt(), interrupt_at(5), settings(steps=12), CPU, tmp_path / "early", {}, resume=True)
    assert len((tmp_path / "early" / "metrics.jsonl").read_text().splitlines()) == 4


def test_resume_where_there_is_nothing_starts_and_a_finished_run_is_done(tmp_path):
    model = tiny_gpt()
    loop.train(model, toy(), SETTINGS, CPU, tmp_path / "run", {}, resume=True)
    again = tiny_gpt(seed=1)
    loop.train(again, toy(batch=None), SETTINGS, CPU, tmp_path / "run", {}, resume=True)   # asks for no batch
    assert same(dict(model.state_dict()), dict(again.state_dict()))


@pytest.mark.parametrize("now, word", [({"data": "b"}, "data was 'a' and is 'b'"), ({"lr": 2}, "lr was 1 and is 2"),
                                       ({"new": 5}, "new was None and is 5")])
def test_resume_with_other_flags_is_refused(tmp_path, now, word):
    loop.train(tiny_gpt(), toy(), SETTINGS, CPU, tmp_path, {"data": "a", "lr": 1})
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(ValueError) as caught:
        loop.train(tiny_gpt(), toy(), SETTINGS, CPU, tmp_path, {"data": "a", "lr": 1} | now, resume=True)
    assert word in str(caught.value) and "last.pt" in str(caught.value)
    assert str(caught.value).count(" was ") == 1, "only what differs"
    assert (tmp_path / "last.pt").read_bytes() == before


def test_resume_with_another_model_or_a_damaged_checkpoint_is_refused(tmp_path):
    loop.train(tiny_gpt(), toy(), SETTINGS, CPU, tmp_path, {})
    with pytest.raises(ValueError, match="another model or method"):
        loop.train(adapt(tiny_gpt(), "lora", rank=2), toy(), SETTINGS, CPU, tmp_path, {}, resume=True)
    whole = (tmp_path / "last.pt").read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "last.pt").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="last.pt is not a readable svmini run"):
            loop.train(tiny_gpt(), toy(), SETTINGS, CPU, tmp_path, {}, resume=True)


def test_a_second_interrupt_does_not_wait(tmp_path):
    def batch(size, seed, step):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        loop.train(tiny_gpt(), toy(batch=batch), SETTINGS, CPU, tmp_path, {})
    assert not list(tmp_path.iterdir())


def test_the_handler_of_before_comes_back_and_threads_can_train():
    before = signal.getsignal(signal.SIGINT)
    loop.train(tiny_gpt(), toy(), SETTINGS, CPU)
    assert signal.getsignal(signal.SIGINT) is before
    results = []
    thread = threading.Thread(target=lambda: results.append(loop.train(tiny_gpt(), toy(), SETTINGS, CPU)))
    thread.start()
    thread.join()
    assert len(results[0]["log"]) == 4


# ---- pretrain and compare ----

def toy_setup(out, task=None, **changes):
    base, task = tiny_gpt(dropout=0.2), task or toy()
    return compare.Setup(**{
        "base": base, "task_of": lambda seed: task, "settings": SETTINGS, "machine": CPU, "out": out,
        "targets": ("query", "up"), "rates": {}, "sample": lambda model: None, "run": {"data": "walk"}, **changes})


def test_pretraining_is_kept_reused_resumed_and_guarded(tmp_path, capsys):
    about = {"data": "walk", "classes": ["x"]}
    with pytest.raises(loop.Stopped):
        loop.pretrain(tiny_gpt(0.2), interrupt_at(6), SETTINGS, CPU, tmp_path / "cut", about)
    assert not (tmp_path / "cut" / "model.pt").exists()
    one, _ = loop.pretrain(tiny_gpt(0.2), toy(), SETTINGS, CPU, tmp_path / "cut", about, resume=True)
    other, its_about = loop.pretrain(tiny_gpt(0.2), toy(), SETTINGS, CPU, tmp_path / "whole", about)
    assert same(dict(one.state_dict()), dict(other.state_dict())) and its_about["classes"] == ["x"]
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    capsys.readouterr()
    again, _ = loop.pretrain(tiny_gpt(0.2, seed=9), toy(batch=None), SETTINGS, CPU, tmp_path / "cut", about)
    assert "is reused" in capsys.readouterr().out and same(dict(again.state_dict()), dict(one.state_dict()))
    for s, model, data, word in (
            (replace(SETTINGS, steps=13), tiny_gpt(0.2), "walk", "steps was 12 and is 13"),
            (SETTINGS, tiny_gpt(0.1), "walk", "model was"), (SETTINGS, tiny_gpt(0.2), "run", "data was 'walk'")):
        with pytest.raises(ValueError, match=f"{word}.*--out"):
            loop.pretrain(model, toy(), s, CPU, tmp_path / "cut", {"data": data})


def test_how_often_files_are_written_is_no_other_run(tmp_path):
    """--save-every and --eval-every may change between a start and its resume."""
    about = {"data": "walk"}
    with pytest.raises(loop.Stopped):
        loop.pretrain(tiny_gpt(), interrupt_at(6), SETTINGS, CPU, tmp_path, about)
    s = replace(SETTINGS, save_every=1, eval_every=0)
    loop.pretrain(tiny_gpt(), toy(), s, CPU, tmp_path, about, resume=True)


def test_compare_goes_on_where_it_stopped(tmp_path, monkeypatch):
    words, seeds = ["full", "svft", "lora:rank=2"], (0, 1)
    whole = compare.compare(words, toy_setup(tmp_path / "whole"), seeds)
    started, train = [], compare.train

    def spy(model, task, s, machine, folder, *arguments):
        started.append(folder.name)
        return train(model, interrupt_at(6) if len(started) == 5 else task, s, machine, folder, *arguments)

    monkeypatch.setattr(compare, "train", spy)
    with pytest.raises(loop.Stopped):
        compare.compare(words, toy_setup(tmp_path / "cut"), seeds)
    assert started == ["full-seed0", "svft-seed0", "lora_rank=2-seed0", "full-seed1", "svft-seed1"]
    del started[:]
    monkeypatch.setattr(compare, "train", lambda *a: started.append(a[4].name) or train(*a))
    rows = compare.compare(words, toy_setup(tmp_path / "cut", resume=True), seeds)
    assert started == ["svft-seed1", "lora_rank=2-seed1"]
    assert [r["method"] for r in rows] == ["start", *words, *words]

    def numbers(rows):
        return [{k: v for k, v in r.items() if k not in ("seconds", "ms_per_step")} for r in rows]
    assert numbers(rows) == numbers(whole)
    del started[:]
    compare.compare(words, toy_setup(tmp_path / "cut"), seeds)
    assert len(started) == 6, "without --resume everything is made again"


@pytest.mark.parametrize("changes, word", [
    ({"targets": ("query",)}, "targets"), ({"run": {"data": "other"}}, "data was 'walk' and is 'other'"), ({"lr": 0.5}, "lr"),
    ({"settings": replace(SETTINGS, steps=5)}, "steps was 12 and is 5"),
    ({"base": tiny_gpt(seed=8)}, "base"),
])
def test_compare_does_not_take_rows_of_other_runs(tmp_path, changes, word):
    compare.compare(["svfit"], toy_setup(tmp_path), (0,))
    with pytest.raises(ValueError, match=word) as caught:
        compare.compare(["svfit"], toy_setup(tmp_path, resume=True, **changes), (0,))
    assert "row.json" in str(caught.value)


def test_tuning_goes_on_and_is_guarded(tmp_path, monkeypatch):
    setup = toy_setup(tmp_path)
    found = compare.tune(["svfit", "full"], setup, 3)
    assert {w: len(t["val"]) for w, t in found.items()} == {"svfit": 3, "full": 3}
    assert found["svfit"]["lr"] == pytest.approx([0.05, 0.1, 0.2]), "its default, a factor 2 to each side"
    for t in found.values():
        assert t["best"] == t["lr"][t["val"].index(min(t["val"]))]
    asked, train = [], compare.train
    monkeypatch.setattr(compare, "train", lambda *a, **k: asked.append(k["label"]) or train(*a, **k))
    resumed = compare.tune(["svfit", "full", "lora:rank=2"], toy_setup(tmp_path, resume=True), 3)
    assert len(asked) == 3 and all("lora" in label for label in asked)
    assert {w: resumed[w] for w in found} == found
    with pytest.raises(ValueError, match="tune.json was made with other settings: steps was 12 and is 7"):
        compare.tune(["svfit"], toy_setup(tmp_path, resume=True,
                                          settings=replace(SETTINGS, steps=7)), 3)
    (tmp_path / "tune.json").write_text("{")
    with pytest.raises(ValueError, match="tune.json is damaged"):
        compare.tune(["svfit"], toy_setup(tmp_path, resume=True), 3)


# ---- a loss that is not finite ----

def finite(path):
    return all(t.isfinite().all() for t in files.load(path, "run")["model"].values())


def test_divergence_stops_with_step_rate_and_hint_and_writes_nothing_of_it(tmp_path):
    def loss(model, x, y):
        return token_loss(model, x, y) * (math.nan if model.steps == 7 else 1)

    def batch(size, seed, step):
        model.steps = step
        return walk(size, seed, step)

    model = tiny_gpt()
    s = settings(steps=40, lr=1e-2, warmup=0, eval_every=1, save_every=1, schedule="linear")
    with pytest.raises(loop.Diverged) as caught:
        loop.train(model, toy(batch=batch, loss=loss), s, CPU, tmp_path, {}, label="lora:rank=8")
    for word in ("lora:rank=8", "nan", "step 8", "0.0085", "--lr"):     # 1e-2 * (40 - 7) / 39
        assert word in str(caught.value), f"{word!r} is not in {str(caught.value)!r}"
    assert files.load(tmp_path / "last.pt", "run")["step"] == 7 and finite(tmp_path / "last.pt")
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_divergence_is_seen_within_ten_steps_where_nothing_is_written():
    seen = []
    task = toy(batch=lambda *key: seen.append(key) or walk(*key))
    with pytest.raises(loop.Diverged):
        loop.train(tiny_gpt(), task, settings(steps=500, lr=1e30), CPU)
    assert len(seen) == 10


def test_a_finite_loss_whose_step_ruins_the_weights(tmp_path):
    """The loss is read before the step: a gradient that is not finite shows in the weights only."""
    def loss(model, x, y):
        return token_loss(model, x, y) + (0 * model.norm.weight.sum()).sqrt()   # 0, with a gradient of 0 * inf

    task = toy(loss=loss, evaluate=lambda model, split: {"loss": None, "metric": 3.8})   # as accuracy is, of any weights
    with pytest.raises(loop.Diverged):
        loop.train(tiny_gpt(), task, settings(steps=1, lr=1e-3), CPU, tmp_path, {})
    assert not (tmp_path / "last.pt").exists() and not (tmp_path / "best.pt").exists()


def test_a_score_that_is_not_finite_is_no_result(tmp_path):
    task = toy(evaluate=lambda model, split: {"loss": math.nan, "metric": 3.8})
    with pytest.raises(loop.Diverged, match="loss on val is nan"):
        loop.train(tiny_gpt(), task, SETTINGS, CPU, tmp_path, {})
    assert not list(tmp_path.iterdir())


def test_compare_goes_on_after_a_divergence(tmp_path):
    setup = toy_setup(tmp_path, rates={"lora:rank=2": 1e30})
    rows = compare.compare(["lora:rank=2", "svfit"], setup, (0,))
    assert [r["method"] for r in rows] == ["start", "lora:rank=2", "svfit"]
    assert rows[1]["metric"] is None and "step" in rows[1]["failed"] and math.isfinite(rows[2]["metric"])
    table = "\n".join(report.table_lines(rows))
    assert "diverged" in table and "nan" not in table
    assert not (tmp_path / "runs" / "lora_rank=2-seed0" / "adapter.pt").exists()
    found = compare.tune(["svfit"], toy_setup(tmp_path, lr=1e30), 1)
    assert found["svfit"]["best"] is None and found["svfit"]["val"] == [None]


# ---- schedule, optimizer, evaluation ----

@pytest.mark.parametrize("schedule, step, expected", [
    ("linear", 0, 0.5), ("linear", 1, 1.0), ("linear", 2, 1.0), ("linear", 6, 0.5), ("linear", 9, 0.125),
    ("cosine", 0, 0.5), ("cosine", 1, 1.0), ("cosine", 2, 1.0), ("cosine", 4, 0.8535533905932737), ("cosine", 6, 0.5),
    ("cosine", 8, 0.1464466094067262),
])
def test_schedule_at_points_worked_out_by_hand(schedule, step, expected):
    """Ten steps, two of them warm-up: eight steps down, cosine as (1 + cos(π (1 − left))) / 2."""
    assert loop.rate(step, settings(steps=10, lr=1.0, warmup=0.2, schedule=schedule)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_runs_have_a_rate(steps):
    rates = [loop.rate(i, settings(steps=steps, lr=1.0)) for i in range(steps)]
    assert rates[0] == 1 and all(0 < r <= 1 for r in rates)


def test_the_rate_is_what_the_optimizer_uses():
    """One step of Adam from rest moves every number by its rate, whatever the gradient."""
    model = adapt(tiny_vit(), "svfit")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    x, y = torch.randn(6, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    with torch.no_grad():
        model.head.weight += 0.1 * torch.randn(3, 8)    # from zeros nothing but the head has a gradient
        before["head.weight"] = model.head.weight.clone()
    task = toy(batch=lambda size, seed, step: (x, y), loss=lambda m, x, y: F.cross_entropy(m(x), y),
               evaluate=lambda m, split: {"loss": None, "metric": 1.0})
    loop.train(model, task, settings(steps=1, lr=1e-3, head_lr=1e-2, clip=1e9), CPU)
    for name, p in model.named_parameters():
        moved = (p.detach() - before[name]).abs().max().item()
        assert moved == pytest.approx(1e-2 if name.startswith("head") else 1e-3 if p.requires_grad else 0, rel=1e-2)


def test_groups_of_the_optimizer():
    model = adapt(tiny_vit(), "lora", rank=2)
    optimizer = loop.make_optimizer(model, settings(lr=1e-3, head_lr=1e-2, weight_decay=0.1))
    found = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    expected = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            expected[id(p)] = (1e-2 if name.startswith("head") else 1e-3, 0.1 if p.dim() > 1 else 0.0)
    assert found == expected and len(expected) < len(list(model.parameters()))
    optimizer = loop.make_optimizer(model, settings(lr=1e-3))
    assert {g["lr"] for g in optimizer.param_groups} == {1e-3}, "without head_lr the head has lr"
    with pytest.raises(ValueError, match="nothing to train"):
        loop.make_optimizer(model.requires_grad_(False), settings(lr=1e-3))


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_is_in_eval_mode_and_without_autograd(training):
    model, seen = tiny_gpt(0.5).train(training), []

    def look(m, split):
        seen.append((split, m.training, m.blocks[0].training, torch.is_grad_enabled(),
                     torch.is_inference_mode_enabled()))
        return {"loss": None, "metric": 1.0}

    assert loop.evaluate(model, toy(evaluate=look), "test") == {"loss": None, "metric": 1.0}
    assert seen == [("test", False, False, False, True)]
    assert model.training is training and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("higher, best", [(True, 6), (False, 9)])
def test_best_and_last_are_separate(tmp_path, higher, best):
    """Validation gives 2, 3, 1, 3: of equal ones the earlier stays."""
    values = iter([2.0, 3.0, 1.0, 3.0])
    task = toy(higher_is_better=higher, evaluate=lambda m, split: {"loss": None, "metric": next(values)})
    loop.train(tiny_gpt(), task, SETTINGS, CPU, tmp_path, {})
    b, last = (files.load(tmp_path / name, "run") for name in ("best.pt", "last.pt"))
    assert (b["step"], last["step"]) == (best, 12) and not same(b["model"], last["model"])
    log = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["metric"] for line in log] == [2, 3, 1, 3] and last["log"] == log
    assert log[0]["lr"] == pytest.approx(1e-2 * 10 / 11)   # step 3 is number 2, after one of warm-up: (12 - 2) / 11


def test_a_checkpoint_holds_what_is_trained_and_no_base(tmp_path):
    model = adapt(tiny_gpt(), "svft")
    loop.train(model, toy(), SETTINGS, CPU, tmp_path, {"x": 1})
    content = files.load(tmp_path / "last.pt", "run")
    assert set(content["model"]) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert {"step", "optimizer", "scaler", "random", "flags"} <= content.keys() and content["flags"] == {"x": 1}


# ---- a batch in parts, compiled steps ----

def some_targets(size, seed, step):
    """The walk with few targets, unequally many a text: 1 of 8 in the first text, 2 in the second, and so on."""
    x, y = walk(size, seed, step)
    hidden = torch.arange(8) > torch.arange(size).unsqueeze(1)
    return x, y.masked_fill(hidden, tasks.NO_LOSS)


def no_targets_in_front(size, seed, step):
    x, y = walk(size, seed, step)
    return x, y.masked_fill(torch.arange(size).unsqueeze(1) < 2, tasks.NO_LOSS)


def in_parts(parts, task, size=7, word=None):
    """(the weights after three steps of a batch that goes through in parts, the sizes of the parts)"""
    sizes = []

    def loss(model, x, y):
        sizes.append(len(x))
        return task.loss(model, x, y)

    model = tiny_gpt().double()
    model = adapt(model, word) if word else model
    s = settings(steps=3, batch_size=size, accumulate=parts, warmup=0, lr=1e-3, clip=0.5)
    loop.train(model, replace(task, loss=loss), s, CPU)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), sizes


@pytest.mark.parametrize("batch", [walk, some_targets, no_targets_in_front])
@pytest.mark.parametrize("parts, sizes", [(1, [7]), (2, [4, 3]), (3, [3, 3, 1]), (7, [1] * 7), (20, [1] * 7)])
def test_a_batch_in_parts_makes_the_step_of_the_whole(batch, parts, sizes):
    if batch is no_targets_in_front:   # a part without a target is left out
        sizes = sizes[2:] if len(sizes) == 7 else sizes
    whole, _ = in_parts(1, toy(batch=batch))
    got, seen = in_parts(parts, toy(batch=batch))
    assert seen == 3 * sizes
    assert (got - whole).abs().max() <= 1e-10


def test_the_share_of_each_part_matters_here():
    """The test above would see parts that all count the same."""
    def equal(model, x, y):   # as if every part had the same share: what train multiplies by is divided out
        whole = some_targets(7, 0, 0)[1] != tasks.NO_LOSS
        return token_loss(model, x, y) / ((y != tasks.NO_LOSS).sum() / whole.sum()) / 2

    whole, _ = in_parts(1, toy(batch=some_targets))
    got, _ = in_parts(2, toy(batch=some_targets, loss=equal))
    assert (got - whole).abs().max() > 1e-6


def test_an_adapter_trains_in_parts_too():
    task = toy(batch=some_targets)
    assert (in_parts(3, task, word="svft")[0] - in_parts(1, task, word="svft")[0]).abs().max() <= 1e-10


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_steps_train_to_the_same_weights(backend):
    """By tracing alone, which takes seconds; the slow one also through the C++ compiler of this machine."""
    if backend == "inductor" and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        pytest.skip("there is no C++ compiler")
    models = [adapt(tiny_gpt(), "lora", rank=2) for _ in range(2)]
    compiled = loop.pick_machine("cpu", compile=True)
    assert compiled.compile and compiled.reason.endswith(", compiled") and not CPU.compile
    calls, real = [], torch.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda model: calls.append(model) or real(model, backend=backend))
        for model, machine in zip(models, (CPU, compiled)):
            loop.train(model, toy(), settings(steps=4, eval_every=2), machine)
    assert calls == [models[1]]
    start = adapt(tiny_gpt(), "lora", rank=2)
    for a, b, before in zip(*(m.parameters() for m in (*models, start)), strict=True):
        assert torch.allclose(a, b, atol=1e-6) and (not a.requires_grad or not torch.equal(a, before))


# ---- the machine ----

def test_machine():
    machine = loop.pick_machine("cpu", "auto")
    assert machine.device.type == "cpu" and machine.dtype == torch.float32 and "asked for" in machine.reason
    half = loop.pick_machine("cpu", "bfloat16")
    with half.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with machine.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    auto = loop.pick_machine()
    assert auto.device.type == ("cuda" if torch.cuda.is_available() else
                                "mps" if torch.backends.mps.is_available() else "cpu")


@pytest.mark.parametrize("name, there", [("cuda", torch.cuda.is_available), ("mps", torch.backends.mps.is_available)])
def test_a_machine_that_is_not_there(name, there):
    if there():
        pytest.skip(f"{name} is there")
    with pytest.raises(ValueError, match=f"device '{name}' is not there: use auto or cpu"):
        loop.pick_machine(name)


# ---- model files ----

def test_model_files_come_back_whole(tmp_path):
    for model, inputs in ((tiny_gpt(), walk(2, 0, 0)[0]), (tiny_vit(), torch.randn(2, 1, 4, 4))):
        loop.save_model(tmp_path / "m.pt", model, classes=["ä"], data="d")
        again, about = loop.load_model(tmp_path / "m.pt", type(model))
        assert about == {"classes": ["ä"], "data": "d"} and again.config == model.config
        assert torch.equal(model.eval()(inputs), again.eval()(inputs))
    assert again.head.weight.shape == (3, 8)
    loop.save_model(tmp_path / "m.pt", tiny_vit().new_head(5))
    assert loop.load_model(tmp_path / "m.pt", ViT)[0].config.num_classes == 5


def test_files_of_another_kind_are_named(tmp_path):
    loop.save_model(tmp_path / "vit.pt", tiny_vit())
    save_adapter(adapt(tiny_gpt(), "lora", rank=2), tmp_path / "adapter.pt")
    loop.train(tiny_gpt(), toy(), SETTINGS, CPU, tmp_path / "run", {})
    (tmp_path / "text.pt").write_text("a text")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "vit.pt").read_bytes()[:-100])
    for name, words in (("vit.pt", "holds a ViT, not a GPT"), ("adapter.pt", "svmini adapter.*not an svmini model"),
                        ("run/last.pt", "svmini run.*not an svmini model"), ("text.pt", "not a readable svmini model"),
                        ("cut.pt", "cut short")):
        with pytest.raises(ValueError, match=words):
            loop.load_model(tmp_path / name, GPT)
    with pytest.raises(FileNotFoundError, match="no model at"):
        loop.load_model(tmp_path / "none.pt", GPT)


# ---- the scripts, stopped and killed ----

TINY = ["--n-layer", "1", "--n-head", "2", "--d-model", "16", "--device", "cpu"]
PRETRAIN = ["pretrain", "--data", "arithmetic", *TINY, "--steps", "120", "--eval-every", "40"]
FINETUNE = ["finetune", "--method", "svft", "--steps", "120", "--eval-every", "30", "--device", "cpu"]


def test_ctrl_c_ends_with_one_line_and_130(tmp_path, monkeypatch, capsys):
    batch = train_gpt.tasks.Arithmetic.batch

    def interrupted(self, size, seed, step):
        if step == 17:
            signal.raise_signal(signal.SIGINT)
        return batch(self, size, seed, step)

    argv = [*PRETRAIN[:-2], "--out", str(tmp_path / "with a space ü")]
    monkeypatch.setattr(train_gpt.tasks.Arithmetic, "batch", interrupted)
    assert train_gpt.main(argv) == 130
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "step 18 of 120" in error and "--resume" in error
    monkeypatch.undo()
    assert train_gpt.main([*argv, "--resume", "--lr", "0.5"]) == 2
    assert "lr was 0.002 and is 0.5" in capsys.readouterr().err
    assert train_gpt.main([*argv, "--resume"]) == 0


def kill_at_random(script, argv, last):
    """Start a script, kill it at a random moment after its first checkpoint; returns the moment in seconds."""
    process = subprocess.Popen([sys.executable, str(ROOT / script), *argv], cwd=last.anchor,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    limit = time.monotonic() + 60
    while not last.is_file() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.002)
    moment = random.uniform(0, 0.25)
    time.sleep(moment)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed: make the run longer"
    return moment


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
@pytest.mark.parametrize("nth", [1, 2, *(pytest.param(i, marks=pytest.mark.slow) for i in range(3, 13))])
@pytest.mark.parametrize("what", ["pretrain", "finetune"])
def test_killed_at_a_random_moment_it_goes_on_to_the_last_bit(tmp_path, what, nth):
    if what == "pretrain":
        script, main, argv, run = "train_gpt.py", train_gpt.main, PRETRAIN, "pretrain"
    else:
        torch.manual_seed(0)
        loop.save_model(tmp_path / "base.pt", ViT(ViTConfig(24, 6, 1, 34, 1, 2, 16)), data="glyphs A",
                        mean=(0.5,), std=(0.5,), published=False)
        script, main, argv = "train_vit.py", train_vit.main, [*FINETUNE, "--init", str(tmp_path / "base.pt")]
        run = "runs/svft-seed0"
    assert main([*argv, "--out", str(tmp_path / "whole")]) == 0
    cut = [*argv, "--out", str(tmp_path / "cut")]
    moment = kill_at_random(script, [*cut, "--save-every", "1"], tmp_path / "cut" / run / "last.pt")
    step = files.load(tmp_path / "cut" / run / "last.pt", "run")["step"]
    assert 1 <= step <= 120, f"killed after {moment:.3f} s"
    assert main([*cut, "--resume"]) == 0
    for left in (tmp_path / "cut").rglob("*.tmp"):
        left.unlink()    # what a kill left of the file it was writing
    for side in ("whole", "cut"):
        (tmp_path / side / run / "row.json").unlink(missing_ok=True)    # it tells the time
    assert_same_run(tmp_path / "whole" / run, tmp_path / "cut" / run)
