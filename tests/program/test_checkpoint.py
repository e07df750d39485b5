"""A run stopped, killed or damaged at any moment continues to the same result, or is refused in one line."""

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
from helpers import (CPU, Toy, assert_same_folder, call, interrupt_at, little, log_of, run_folder, same,   # noqa: F401
                     score, timeless, tiny_gpt, train_config, walk)
from svmini import adapt, files
from svmini.errors import InputError
from svmini.training import compare, pretrain
from svmini.training.checkpoint import RUN_FILES, RunFolder, delete_run, differences, file_name
from svmini.training.loop import Stopped, make_optimizer, train

CONFIG = train_config(weight_decay=0.1)
RUN_CONFIG = {"data": "a", "lr": 1, "betas": (0.9, 0.999)}


# ---- stopped and resumed ----

@pytest.mark.parametrize("step, stage", [(0, "batch"), (4, "batch"), (5, "batch"), (8, "batch"), (11, "batch"),
                                         (1, "evaluate"), (2, "evaluate"), (4, "evaluate")])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_stopped_run_resumes_to_the_last_bit(tmp_path, dropout, step, stage):
    """Also if Ctrl-C arrives in a step with an evaluation (5, 8, 11; from 0), or during any evaluation."""
    model = tiny_gpt(dropout)
    train(model, Toy(), CONFIG, CPU, run_folder(tmp_path / "uninterrupted"))
    with pytest.raises(Stopped, match="of 12. Continue with the same command and --resume"):
        train(tiny_gpt(dropout), interrupt_at(step, stage), CONFIG, CPU, run_folder(tmp_path / "cut"))
    stopped_at = files.load(tmp_path / "cut" / "last.pt", "run")["step"]
    assert stopped_at == (step + 1 if stage == "batch" else min(3 * step + 1, 12)), "no step is interrupted halfway"
    torch.manual_seed(99)    # another process has another random state
    resumed, asked = tiny_gpt(dropout, seed=5), []
    task = Toy(batch=lambda *key: asked.append(key) or walk(*key))
    train(resumed, task, CONFIG, CPU, run_folder(tmp_path / "cut", resume=True))
    assert asked == [(4, 3, s) for s in range(stopped_at, 12)], "no step is repeated"
    assert same(dict(model.state_dict()), dict(resumed.state_dict()))
    assert_same_folder(tmp_path / "uninterrupted", tmp_path / "cut")


def test_the_test_above_would_notice_a_lost_random_state(tmp_path):
    with pytest.raises(Stopped):
        train(tiny_gpt(0.3), interrupt_at(4), CONFIG, CPU, run_folder(tmp_path / "cut"))
    content = files.load(tmp_path / "cut" / "last.pt", "run")
    torch.manual_seed(1)
    files.save(tmp_path / "cut" / "last.pt", "run", content | {"random": [torch.get_rng_state()]})
    train(tiny_gpt(0.3), Toy(), CONFIG, CPU, run_folder(tmp_path / "cut", resume=True))
    train(tiny_gpt(0.3), Toy(), CONFIG, CPU, run_folder(tmp_path / "uninterrupted"))
    assert log_of(tmp_path / "uninterrupted") != log_of(tmp_path / "cut")


def test_a_checkpoint_has_the_optimizer_and_the_trained_parameters_but_no_base(tmp_path):
    model = adapt(tiny_gpt(), "svft")
    train(model, Toy(), CONFIG, CPU, run_folder(tmp_path, run_config=RUN_CONFIG))
    content = files.load(tmp_path / "last.pt", "run")
    assert set(content["model"]) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert {"step", "optimizer", "scaler", "random", "log"} <= content.keys()
    assert content["run_config"] == {"data": "a", "lr": 1, "betas": [0.9, 0.999]}
    assert {float(s["step"]) for s in content["optimizer"]["state"].values()} == {12.0}


def test_running_statistics_are_resumed(tmp_path):
    """As those of a BatchNorm that a student adds: a buffer that counts the training steps stands for them."""
    class Counting(torch.nn.Identity):
        def __init__(self):
            super().__init__()
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x):
            self.steps += self.training
            return x

    def model():
        gpt = tiny_gpt()
        gpt.blocks[0].mlp.down = torch.nn.Sequential(gpt.blocks[0].mlp.down, Counting())
        return adapt(gpt, "svft", targets=("query",))

    with pytest.raises(Stopped):
        train(model(), interrupt_at(4), CONFIG, CPU, run_folder(tmp_path))
    train(resumed := model(), Toy(), CONFIG, CPU, run_folder(tmp_path, resume=True))
    assert resumed.blocks[0].mlp.down[1].steps == 12


def test_the_log_has_no_line_twice_and_no_line_after_its_checkpoint(tmp_path):
    """After a kill between an evaluation and the next checkpoint, the log is ahead of the checkpoint."""
    def killed(size, seed, step):
        if step == 8:
            raise SystemError("simulates a kill")
        return walk(size, seed, step)

    train(tiny_gpt(), Toy(), CONFIG, CPU, run_folder(tmp_path / "uninterrupted", eval_every=1))
    for name in ("cut", "more"):
        with pytest.raises(SystemError):
            train(tiny_gpt(), Toy(batch=killed), CONFIG, CPU, run_folder(tmp_path / name, eval_every=1))
    assert len(log_of(tmp_path / "cut")) == 8 and files.load(tmp_path / "cut" / "last.pt", "run")["step"] == 5
    with pytest.raises(Stopped):   # stopped again before the next evaluation
        train(tiny_gpt(), interrupt_at(5), CONFIG, CPU, run_folder(tmp_path / "cut", resume=True, eval_every=0))
    assert [line["step"] for line in log_of(tmp_path / "cut")] == [1, 2, 3, 4, 5]
    train(tiny_gpt(), Toy(), CONFIG, CPU, run_folder(tmp_path / "more", resume=True, eval_every=1))
    assert_same_folder(tmp_path / "uninterrupted", tmp_path / "more")
    lines = log_of(tmp_path / "more")
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert all(line.keys() == {"step", "split", "loss", "metric", "lr"} for line in lines), "the log has no times"


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    def batch(size, seed, step):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tiny_gpt(), Toy(batch=batch), CONFIG, CPU, run_folder(tmp_path))
    assert not list(tmp_path.iterdir())


def test_resume_starts_an_empty_run_and_leaves_a_finished_one(tmp_path):
    model, again = tiny_gpt(), tiny_gpt(seed=1)
    assert train(model, Toy(), CONFIG, CPU, run_folder(tmp_path, resume=True)) > 0
    assert train(again, Toy(batch=None, evaluate=None), CONFIG, CPU, run_folder(tmp_path, resume=True)) is None
    assert same(dict(model.state_dict()), dict(again.state_dict()))


def test_a_new_run_deletes_the_files_of_an_earlier_run_and_every_run_those_of_a_killed_write(tmp_path):
    unfinished, own = ["last.pt.0123abcd.tmp", "row.json.ffffffff.tmp"], ["notes.txt", "my.tmp", "a.0123ABCD.tmp"]
    for name in (*RUN_FILES, *unfinished, *own):
        (tmp_path / name).write_text("old")
    RunFolder(tmp_path, {}, resume=True)
    assert {p.name for p in tmp_path.iterdir()} == {*RUN_FILES, *own}
    RunFolder(tmp_path, {})
    assert {p.name for p in tmp_path.iterdir()} == set(own), "files of others stay"
    delete_run(tmp_path / "none")


@pytest.mark.parametrize("text, name", [("svft:off_diagonals=8@query,value", "svft_off_diagonals=8_query,value"),
                                        ("lora:rank=8", "lora_rank=8"), ("a/b\\c|d", "a_b_c_d")])
def test_a_file_name_is_readable(text, name):
    assert file_name(text) == name


def test_file_names_of_long_and_non_ascii_texts_are_short_and_distinct():
    texts = ["lora@" + ",".join(f"blocks.{i}.mlp.up" for i in range(n)) for n in (30, 31, 300)] + ["größe", "grösse"]
    names = set(map(file_name, texts))
    assert len(names) == len(texts) and all(name.isascii() and len(name) <= 113 for name in names)


# ---- another run config, damage ----

@pytest.mark.parametrize("now, message", [({"data": "b"}, "data was 'a' and is 'b'"), ({"lr": 2}, "lr was 1 and is 2"),
                                          ({"new": 5}, "new was None and is 5"),
                                          ({"betas": (0.5, 0.999)}, r"betas was \[0.9, 0.999\] and is \[0.5, 0.999\]")])
def test_a_checkpoint_with_another_run_config_is_refused_and_kept(tmp_path, now, message):
    train(tiny_gpt(), Toy(), CONFIG, CPU, run_folder(tmp_path, run_config=RUN_CONFIG))
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(InputError, match=f"last.pt was made with another run config: {message}. Give") as caught:
        train(tiny_gpt(), Toy(), CONFIG, CPU, run_folder(tmp_path, resume=True, run_config=RUN_CONFIG | now))
    assert str(caught.value).count(" was ") == 2, "only what differs"
    assert (tmp_path / "last.pt").read_bytes() == before


def test_a_tuple_equals_the_list_that_json_returns():
    assert differences({"a": [1, 2], "b": None}, {"a": (1, 2), "b": None}) == []
    assert differences({"a": 1, "gone": 3}, {"a": 2}) == ["a was 1 and is 2", "gone was 3 and is None"]


def test_a_checkpoint_of_another_model_and_a_damaged_one_are_refused(tmp_path):
    train(tiny_gpt(), Toy(), CONFIG, CPU, run_folder(tmp_path))
    with pytest.raises(InputError, match="another model or method"):
        train(adapt(tiny_gpt(), "lora", rank=2), Toy(), CONFIG, CPU, run_folder(tmp_path, resume=True))
    content = (tmp_path / "last.pt").read_bytes()
    middle = len(content) // 2
    for damaged in (b"", content[:10], content[:middle], content[:-1], content[:middle] + b"!" + content[middle + 1:]):
        (tmp_path / "last.pt").write_bytes(damaged)
        with pytest.raises(InputError, match="last.pt is (not a readable svmini run|damaged)") as caught:
            train(tiny_gpt(), Toy(), CONFIG, CPU, run_folder(tmp_path, resume=True))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "3", "null", "[]", "{}", '{"run_config": {}}', '{"row": {}}', 3000 * "[",
                                  '{"run_config": [1], "row": {}}', '{"run_config": {}, "row": 4}', b"\xff\xfe"])
def test_a_damaged_row_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "row.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=r"row.json is damaged: delete it, and the same command writes it again$"):
        RunFolder(tmp_path, {}, resume=True).finished_row("adapter.pt")
    assert (tmp_path / "row.json").is_file()


@pytest.mark.parametrize("spec, name", [("svft", "adapter.pt"), ("full", "model.pt")])
def test_a_finished_run_without_its_result_file_is_trained_again_and_a_damaged_file_is_refused(tmp_path, spec, name):
    def run(resume):
        return timeless(compare.run(spec, tiny_gpt(), Toy(), CONFIG, CPU, tmp_path, resume=resume))

    row, path = run(False), compare.run_path(tmp_path, spec, 3) / name
    content = path.read_bytes()
    path.unlink()
    assert run(True) == row and same(*(files.load(p, path.stem) for p in (path, path)))
    path.write_bytes(content[:len(content) // 2])
    with pytest.raises(InputError, match=f"{name} is not a readable svmini {path.stem}"):
        run(True)


# ---- killed ----

class Killed(BaseException):
    """Simulates a kill: no `except Exception` may catch it."""


SHORT = replace(CONFIG, steps=6, lr=0.05)


def adapt_toy(out, resume, **changes):
    """Run svft with dropout; returns its row."""
    return timeless(compare.run("svft", tiny_gpt(0.2), Toy(**changes), SHORT, CPU, out, resume=resume, save_every=2,
                                eval_every=3))


def pretrain_toy(out, resume, **changes):
    model, metadata = pretrain.pretrain(tiny_gpt(0.2), Toy(**changes), SHORT, CPU, out, {"data": "walk"}, resume=resume,
                                        save_every=2, eval_every=3)
    return dict(model.state_dict()), metadata


@pytest.mark.parametrize("work", [adapt_toy, pretrain_toy])
def test_a_run_killed_at_any_write_resumes_to_the_last_bit(work, tmp_path, monkeypatch):
    """Just before and just after each file appears."""
    expected, real, count = work(tmp_path / "uninterrupted", False), os.replace, [0]

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
            assert_same_folder(tmp_path / "uninterrupted", out)


@pytest.mark.parametrize("work", [adapt_toy, pretrain_toy])
def test_ctrl_c_in_the_test_evaluation_does_not_lose_the_run(work, tmp_path):
    expected = work(tmp_path / "uninterrupted", False)
    assert not list(tmp_path.rglob("last.pt")), "it is deleted once the row or the model is written"

    def interrupted(model, split):
        if split == "test":
            raise KeyboardInterrupt
        return score(model, split)

    with pytest.raises(KeyboardInterrupt):
        work(tmp_path / "cut", False, evaluate=interrupted)
    last, = (tmp_path / "cut").rglob("last.pt")
    assert files.load(last, "run")["step"] == 6
    assert same(work(tmp_path / "cut", True, batch=None), expected), "no step is repeated"
    assert_same_folder(tmp_path / "uninterrupted", tmp_path / "cut")


@pytest.fixture(scope="module")
def uninterrupted(little, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    call(train_gpt, *ARITHMETIC, "--out", out)
    return out


ARITHMETIC = ["--data", "arithmetic", "--methods", "svft", "lora:rank=2", "--steps", "100"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
@pytest.mark.parametrize("nth", [1, *(pytest.param(i, marks=pytest.mark.slow) for i in range(2, 12))])
@pytest.mark.parametrize("stage", ["runs", pytest.param("pretrain", marks=pytest.mark.slow)])
def test_a_process_killed_at_a_random_moment_resumes_to_the_last_bit(stage, nth, tmp_path, uninterrupted):
    argv = [sys.executable, str(Path(__file__).with_name("helpers.py")), "train_gpt", *ARITHMETIC, "--device", "cpu"]
    process = subprocess.Popen([*argv, "--save-every", "1", "--out", str(tmp_path)], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    limit = time.monotonic() + 120
    while not list(tmp_path.glob(f"{stage}/**/last.pt")) and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.002)
    time.sleep(random.uniform(0, 0.3))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the process ended before it was killed: make the run longer"
    assert not (tmp_path / "results.json").exists()
    call(train_gpt, *ARITHMETIC, "--out", tmp_path, "--resume")
    for part in ("pretrain", "runs"):
        assert_same_folder(uninterrupted / part, tmp_path / part)


def test_a_checkpoint_keeps_the_scale_of_float16(tmp_path):
    model = tiny_gpt()
    run_folder(tmp_path).after_step(5, 12, False, model, Toy(), CPU, make_optimizer(model, CONFIG),
                                    torch.amp.GradScaler("cpu", init_scale=8.0), 0.1)
    scaler = torch.amp.GradScaler("cpu")
    assert run_folder(tmp_path, resume=True).restore(model, make_optimizer(model, CONFIG), scaler) == 5
    assert scaler.get_scale() == 8.0
