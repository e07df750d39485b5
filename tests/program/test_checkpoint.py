"""Runs that survive: stopped, killed and resumed to the last bit; nothing of another run is taken for this one's."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train_gpt
import train_vit
from svmini import ViT, ViTConfig, adapt, files
from svmini.data.arithmetic import Arithmetic
from svmini.errors import InputError
from svmini.model_file import save_model
from svmini.training import compare, pretrain
from svmini.training.checkpoint import RunFolder, differences, delete_run
from svmini.training.loop import Stopped, make_optimizer, train
from toy import (CPU, Toy, assert_same_folder, interrupt_at, log_of, run, same, score, train_config, timeless,
                 tiny_gpt, walk)

ROOT = Path(__file__).resolve().parents[2]
TRAIN_CONFIG = train_config(weight_decay=0.1)
CONDITIONS = {"data": "a", "lr": 1, "betas": (0.9, 0.999)}


# ---- stopped and resumed ----

@pytest.mark.parametrize("step, stage", [(0, "batch"), (4, "batch"), (5, "batch"), (8, "batch"), (11, "batch"),
                                         (1, "evaluate"), (2, "evaluate"), (4, "evaluate")])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_stopped_run_goes_on_to_the_last_bit(tmp_path, dropout, step, stage):
    """Also where Ctrl-C comes at a step that is evaluated (0-based 5, 8, 11), or during an evaluation, the last too."""
    whole = tiny_gpt(dropout)
    train(whole, Toy(), TRAIN_CONFIG, CPU, run(tmp_path / "whole"))
    with pytest.raises(Stopped, match="of 12; the same command with --resume goes on"):
        train(tiny_gpt(dropout), interrupt_at(step, stage), TRAIN_CONFIG, CPU, run(tmp_path / "cut"))
    stopped_at = files.load(tmp_path / "cut" / "last.pt", "run")["step"]
    assert stopped_at == (step + 1 if stage == "batch" else min(3 * step + 1, 12)), "a step is never cut in two"
    torch.manual_seed(99)    # what the new process happens to have
    again, asked = tiny_gpt(dropout, seed=5), []
    task = Toy(batch=lambda *key: asked.append(key) or walk(*key))
    train(again, task, TRAIN_CONFIG, CPU, run(tmp_path / "cut", resume=True))
    assert asked == [(4, 3, s) for s in range(stopped_at, 12)], "done steps are not done again"
    assert same(dict(whole.state_dict()), dict(again.state_dict()))
    assert_same_folder(tmp_path / "whole", tmp_path / "cut")


def test_dropout_and_the_random_state_matter_here(tmp_path):
    """The test above would see a random state that is not restored."""
    with pytest.raises(Stopped):
        train(tiny_gpt(0.3), interrupt_at(4), TRAIN_CONFIG, CPU, run(tmp_path / "cut"))
    content = files.load(tmp_path / "cut" / "last.pt", "run")
    torch.manual_seed(1)
    files.save(tmp_path / "cut" / "last.pt", "run", content | {"random": [torch.get_rng_state()]})
    train(tiny_gpt(0.3), Toy(), TRAIN_CONFIG, CPU, run(tmp_path / "cut", resume=True))
    train(tiny_gpt(0.3), Toy(), TRAIN_CONFIG, CPU, run(tmp_path / "whole"))
    assert log_of(tmp_path / "whole") != log_of(tmp_path / "cut")


def test_the_optimizer_and_what_is_trained_are_kept_and_no_base(tmp_path):
    model = adapt(tiny_gpt(), "svft")
    train(model, Toy(), TRAIN_CONFIG, CPU, run(tmp_path, run_config=CONDITIONS))
    content = files.load(tmp_path / "last.pt", "run")
    assert set(content["model"]) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert {"step", "optimizer", "scaler", "random", "log"} <= content.keys()
    assert content["run_config"] == {"data": "a", "lr": 1, "betas": [0.9, 0.999]}
    assert {float(s["step"]) for s in content["optimizer"]["state"].values()} == {12.0}


def test_no_line_stands_twice_and_none_without_its_checkpoint(tmp_path):
    """Killed after an evaluation and before the next checkpoint, the log is ahead of the checkpoint."""
    def killed(size, seed, step):
        if step == 8:
            raise SystemError("as good as a kill")
        return walk(size, seed, step)

    train(tiny_gpt(), Toy(), TRAIN_CONFIG, CPU, run(tmp_path / "whole", eval_every=1))
    with pytest.raises(SystemError):
        train(tiny_gpt(), Toy(batch=killed), TRAIN_CONFIG, CPU, run(tmp_path / "cut", eval_every=1))
    assert len(log_of(tmp_path / "cut")) == 8 and files.load(tmp_path / "cut" / "last.pt", "run")["step"] == 5
    with pytest.raises(Stopped):   # and stopped again before its next evaluation
        train(tiny_gpt(), interrupt_at(5), TRAIN_CONFIG, CPU, run(tmp_path / "cut", resume=True, eval_every=0))
    assert [line["step"] for line in log_of(tmp_path / "cut")] == [1, 2, 3, 4, 5]
    with pytest.raises(SystemError):
        train(tiny_gpt(), Toy(batch=killed), TRAIN_CONFIG, CPU, run(tmp_path / "more", eval_every=1))
    train(tiny_gpt(), Toy(), TRAIN_CONFIG, CPU, run(tmp_path / "more", resume=True, eval_every=1))
    assert_same_folder(tmp_path / "whole", tmp_path / "more")
    lines = log_of(tmp_path / "more")
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert all(line.keys() == {"step", "split", "loss", "metric", "lr"} for line in lines), "no clock in it"


def test_a_second_interrupt_does_not_wait(tmp_path):
    def batch(size, seed, step):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tiny_gpt(), Toy(batch=batch), TRAIN_CONFIG, CPU, run(tmp_path))
    assert not list(tmp_path.iterdir())


def test_resume_where_there_is_nothing_starts_and_a_run_that_is_done_is_done(tmp_path):
    model, again = tiny_gpt(), tiny_gpt(seed=1)
    assert train(model, Toy(), TRAIN_CONFIG, CPU, run(tmp_path, resume=True)) > 0
    assert train(again, Toy(batch=None, evaluate=None), TRAIN_CONFIG, CPU, run(tmp_path, resume=True)) is None
    assert same(dict(model.state_dict()), dict(again.state_dict()))


def test_a_run_begun_anew_deletes_what_an_older_one_left(tmp_path):
    left = ("last.pt", "metrics.jsonl", "row.json", "adapter.pt", "model.pt")
    for name in (*left, "notes.txt"):
        (tmp_path / name).write_text("old")
    RunFolder(tmp_path, {}, resume=True)
    assert len(list(tmp_path.iterdir())) == 6
    RunFolder(tmp_path, {})
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"], "what it did not write stays"
    delete_run(tmp_path / "none")


# ---- other run_config, damage ----

@pytest.mark.parametrize("now, specs", [({"data": "b"}, "data was 'a' and is 'b'"), ({"lr": 2}, "lr was 1 and is 2"),
                                        ({"new": 5}, "new was None and is 5"),
                                        ({"betas": (0.5, 0.999)}, r"betas was \[0.9, 0.999\] and is \[0.5, 0.999\]")])
def test_a_checkpoint_under_other_conditions_is_refused(tmp_path, now, specs):
    train(tiny_gpt(), Toy(), TRAIN_CONFIG, CPU, run(tmp_path, run_config=CONDITIONS))
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(InputError, match=f"last.pt was made with another run config: {specs}. Give") as caught:
        train(tiny_gpt(), Toy(), TRAIN_CONFIG, CPU, run(tmp_path, resume=True, run_config=CONDITIONS | now))
    assert str(caught.value).count(" was ") == 2, "only what differs"
    assert (tmp_path / "last.pt").read_bytes() == before


def test_a_tuple_is_a_list_when_it_comes_back():
    assert differences({"a": [1, 2], "b": None}, {"a": (1, 2), "b": None}) == []
    assert differences({"a": 1, "gone": 3}, {"a": 2}) == ["a was 1 and is 2", "gone was 3 and is None"]


def test_another_model_and_a_damaged_checkpoint_are_refused(tmp_path):
    train(tiny_gpt(), Toy(), TRAIN_CONFIG, CPU, run(tmp_path))
    with pytest.raises(InputError, match="another model or method"):
        train(adapt(tiny_gpt(), "lora", rank=2), Toy(), TRAIN_CONFIG, CPU, run(tmp_path, resume=True))
    whole = (tmp_path / "last.pt").read_bytes()
    middle = len(whole) // 2
    for damaged in (b"", whole[:10], whole[:middle], whole[:-1], whole[:middle] + b"!" + whole[middle + 1:]):
        (tmp_path / "last.pt").write_bytes(damaged)
        with pytest.raises(InputError, match="last.pt is (not a readable svmini run|damaged)") as caught:
            train(tiny_gpt(), Toy(), TRAIN_CONFIG, CPU, run(tmp_path, resume=True))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "3", "null", "[]", "{}", '{"run_config": {}}', '{"row": {}}',
                                  '{"run_config": [1], "row": {}}', '{"run_config": {}, "row": 4}', b"\xff\xfe"])
def test_a_damaged_row_is_one_line(tmp_path, text):
    (tmp_path / "row.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=r"row.json is damaged: delete it to have it made again$"):
        RunFolder(tmp_path, {}, resume=True).finished()
    assert (tmp_path / "row.json").is_file()


# ---- killed ----

class Killed(BaseException):
    """As good as a kill: no `except Exception` may hold it."""


SHORT = replace(TRAIN_CONFIG, steps=6, lr=0.05)


def adapt_toy(out, resume, **changes):
    """A run of svft with dropout, and its row."""
    return timeless(compare.run("svft", tiny_gpt(0.2), Toy(**changes), SHORT, CPU, out, resume=resume, save_every=2,
                                eval_every=3))


def pretrain_toy(out, resume, **changes):
    model, metadata = pretrain.pretrain(tiny_gpt(0.2), Toy(**changes), SHORT, CPU, out, {"data": "walk"}, resume=resume,
                                     save_every=2, eval_every=3)
    return dict(model.state_dict()), metadata


@pytest.mark.parametrize("work", [adapt_toy, pretrain_toy])
def test_killed_at_any_write_it_goes_on_to_the_last_bit(work, tmp_path, monkeypatch):
    """Before each file that appears, and right after it."""
    expected, real, count = work(tmp_path / "whole", False), os.replace, [0]

    def replace_or_die(a, b, at=None, after=False):
        count[0] += 1
        if count[0] == at and not after:
            raise Killed
        real(a, b)
        if count[0] == at:
            raise Killed

    monkeypatch.setattr(os, "replace", replace_or_die)
    work(tmp_path / "counted", False)
    writes = count[0]
    assert writes >= 6
    for at in range(1, writes + 1):
        for after in (False, True):
            count[0], out = 0, tmp_path / f"{at}{after}"
            monkeypatch.setattr(os, "replace", lambda a, b: replace_or_die(a, b, at, after))
            with pytest.raises(Killed):
                work(out, False)
            monkeypatch.setattr(os, "replace", real)
            assert same(work(out, True), expected)
            for left in out.rglob("last.pt"):   # killed between the row and its deletion
                assert at == writes and after
                left.unlink()
            assert_same_folder(tmp_path / "whole", out)


@pytest.mark.parametrize("work", [adapt_toy, pretrain_toy])
def test_ctrl_c_in_the_test_evaluation_does_not_lose_the_run(work, tmp_path):
    expected = work(tmp_path / "whole", False)
    assert not list(tmp_path.rglob("last.pt")), "it is deleted once the row or the model is there"

    def interrupted(model, split):
        if split == "test":
            raise KeyboardInterrupt
        return score(model, split)

    with pytest.raises(KeyboardInterrupt):
        work(tmp_path / "cut", False, evaluate=interrupted)
    last, = (tmp_path / "cut").rglob("last.pt")
    assert files.load(last, "run")["step"] == 6
    assert same(work(tmp_path / "cut", True, batch=None), expected), "no step is made again"
    assert_same_folder(tmp_path / "whole", tmp_path / "cut")


PRETRAIN = ["pretrain", "--data", "arithmetic", "--n-layer", "1", "--n-head", "2", "--d-model", "16", "--steps", "120"]
ADAPT = ["--methods", "svft", "lora:rank=2", "--steps", "60"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
@pytest.mark.parametrize("nth", [1, *(pytest.param(i, marks=pytest.mark.slow) for i in range(2, 12))])
@pytest.mark.parametrize("what", ["pretrain", "adapt"])
def test_a_process_killed_at_a_random_moment_goes_on_to_the_last_bit(what, nth, tmp_path):
    if what == "pretrain":
        script, main, argv, kept = "train_gpt.py", train_gpt.main, PRETRAIN, "pretrain"
    else:
        torch.manual_seed(0)
        save_model(tmp_path / "base.pt", ViT(ViTConfig(24, 6, 1, 34, 1, 2, 16)), {"data": "glyphs A"})
        script, main, argv, kept = "train_vit.py", train_vit.main, [*ADAPT, "--init", str(tmp_path / "base.pt")], "runs"
    argv = [*argv, "--device", "cpu", "--eval-every", "60", "--out"]
    process = subprocess.Popen([sys.executable, str(ROOT / script), *argv, str(tmp_path / "cut"), "--save-every", "1"],
                               cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    limit = time.monotonic() + 120
    while not list((tmp_path / "cut").rglob("last.pt")) and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.002)
    time.sleep(random.uniform(0, 0.4))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed: make the run longer"
    assert not list((tmp_path / "cut" / kept).glob("**/model.pt")) and not (tmp_path / "cut" / "results.json").exists()
    for name, resume in (("whole", []), ("cut", ["--resume"])):
        assert main([*argv, str(tmp_path / name), *resume]) == 0
    for left in (tmp_path / "cut").rglob("*.tmp"):
        left.unlink()    # what a kill left of the file it was writing
    for left in (tmp_path / "cut").rglob("last.pt"):
        left.unlink()    # killed between a row and its deletion
    assert_same_folder(tmp_path / "whole" / kept, tmp_path / "cut" / kept)


def test_ctrl_c_ends_with_one_line_and_130(tmp_path, monkeypatch, capsys):
    batch, argv = Arithmetic.batch, [*PRETRAIN, "--device", "cpu", "--out", str(tmp_path / "with a space ü")]

    def interrupted(self, size, seed, step):
        if step == 17:
            signal.raise_signal(signal.SIGINT)
        return batch(self, size, seed, step)

    with monkeypatch.context() as patch:
        patch.setattr(Arithmetic, "batch", interrupted)
        assert train_gpt.main(argv) == 130
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "step 18 of 120" in error and "--resume" in error
    assert train_gpt.main([*argv, "--resume", "--lr", "0.5"]) == 2
    error = capsys.readouterr().err
    assert "lr was 0.002 and is 0.5" in error and error.count("\n") == 1
    content = json.loads(json.dumps(files.load(next(tmp_path.rglob("last.pt")), "run")["run_config"]))
    assert content["lr"] == 0.002 and content["model"]["d_model"] == 16 and content["schedule"] == "cosine"


def test_the_scale_of_float16_is_kept(tmp_path):
    model = tiny_gpt()
    run(tmp_path).after_step(5, 12, False, model, Toy(), CPU, make_optimizer(model, TRAIN_CONFIG),
                             torch.amp.GradScaler("cpu", init_scale=8.0), 0.1)
    scaler = torch.amp.GradScaler("cpu")
    assert run(tmp_path, resume=True).restore(model, make_optimizer(model, TRAIN_CONFIG), scaler) == 5
    assert scaler.get_scale() == 8.0
