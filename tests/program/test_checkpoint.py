"""A run stopped, killed or damaged at any moment continues to the same result, or is refused in one line."""

import os
import signal
from dataclasses import replace

import pytest
import torch

from helpers import (CPU, Toy, all_tensors, assert_same_folder, interrupt_at, log_of, refused, run_folder, same, score,
                     timeless, tiny_gpt, train_config, walk)
from svmini import GPT, GPTConfig, adapt, files
from svmini.training import compare, pretrain
from svmini.training.checkpoint import RUN_FILES, RunFolder, file_name
from svmini.training.loop import Stopped, make_optimizer, train

CONFIG = train_config(weight_decay=0.1)
RUN_CONFIG = {"data": "a", "lr": 1, "betas": (0.9, 0.999)}


def run(folder, model=None, task=None, **options):
    """Train a model (with dropout) in a folder; returns it."""
    model = model or tiny_gpt(0.3)
    train(model, task or Toy(), CONFIG, CPU, run_folder(folder, **options))
    return model


# ---- stopped and resumed ----

@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder, run(folder)


@pytest.mark.parametrize("step, stage", [(0, "batch"), (4, "batch"), (5, "batch"), (11, "batch"),
                                         (1, "evaluate"), (4, "evaluate")])
def test_a_stopped_run_resumes_to_the_last_bit(tmp_path, uninterrupted, step, stage):
    """Also if Ctrl-C arrives in a step with an evaluation (5, 11; from 0), or during an evaluation."""
    with pytest.raises(Stopped, match="of 12. Continue with the same command and --resume"):
        run(tmp_path, task=interrupt_at(step, stage))
    stopped_at = files.load(tmp_path / "last.pt", "run")["step"]
    assert stopped_at == (step + 1 if stage == "batch" else min(3 * step + 1, 12)), "no step is interrupted halfway"
    torch.manual_seed(99)    # another process has another random state
    asked = []
    resumed = run(tmp_path, tiny_gpt(0.3, seed=5), Toy(batch=lambda *key: asked.append(key) or walk(*key)), resume=True)
    assert asked == [(4, 3, s) for s in range(stopped_at, 12)], "no step is repeated"
    assert same(dict(uninterrupted[1].state_dict()), dict(resumed.state_dict()))
    assert_same_folder(uninterrupted[0], tmp_path)


def test_a_checkpoint_has_what_was_trained_and_running_statistics_but_no_base(tmp_path):
    """A buffer that counts the training steps stands for the running statistics of a BatchNorm."""
    def count(model, inputs):
        model.steps += model.training

    def counting():
        model = tiny_gpt()
        model.register_buffer("steps", torch.zeros(()))
        model.register_forward_pre_hook(count)
        return adapt(model, "svft", targets=("query",))

    with pytest.raises(Stopped):
        run(tmp_path, counting(), interrupt_at(4))
    assert run(tmp_path, model := counting(), resume=True).steps == 12
    content = files.load(tmp_path / "last.pt", "run")
    assert set(content["model"]) == {"steps"} | {n for n, p in model.named_parameters() if p.requires_grad}


def test_the_log_has_no_line_after_its_checkpoint(tmp_path):
    """After a kill between an evaluation and the next checkpoint, the log is ahead of the checkpoint."""
    def killed(size, seed, step):
        if step == 8:
            raise SystemError("simulates a kill")
        return walk(size, seed, step)

    with pytest.raises(SystemError):
        run(tmp_path, task=Toy(batch=killed), eval_every=1)
    assert len(log_of(tmp_path)) == 8 and files.load(tmp_path / "last.pt", "run")["step"] == 5
    with pytest.raises(Stopped):   # stopped again before the next evaluation
        run(tmp_path, task=interrupt_at(5), resume=True, eval_every=0)
    assert [line["step"] for line in log_of(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    def batch(size, seed, step):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, task=Toy(batch=batch))
    assert not list(tmp_path.iterdir())


def test_a_new_run_deletes_the_files_of_an_earlier_run_and_every_run_those_of_a_killed_write(tmp_path):
    unfinished, own = ["last.pt.0123abcd.tmp", "row.json.ffffffff.tmp"], ["notes.txt", "my.tmp", "a.0123ABCD.tmp"]
    for name in (*RUN_FILES, *unfinished, *own):
        (tmp_path / name).write_text("old")
    for resume, kept in ((True, {*RUN_FILES, *own}), (False, set(own))):
        RunFolder(tmp_path, {}, resume)
        assert {p.name for p in tmp_path.iterdir()} == kept, "files of others stay"


def test_file_names_are_readable_and_those_of_long_and_non_ascii_texts_short_and_distinct():
    assert file_name("svft:off_diagonals=8@query,a/b\\c|d") == "svft_off_diagonals=8_query,a_b_c_d"
    texts = ["lora@" + ",".join(f"blocks.{i}.mlp.up" for i in range(n)) for n in (30, 31, 300)] + ["größe", "grösse"]
    names = set(map(file_name, texts))
    assert len(names) == len(texts) and all(name.isascii() and len(name) <= 113 for name in names)


def test_a_checkpoint_keeps_the_scale_of_float16(tmp_path):
    model, scaler = tiny_gpt(), torch.amp.GradScaler("cpu")
    optimizer = make_optimizer(model, CONFIG)
    run_folder(tmp_path).after_step(5, 12, False, model, Toy(), CPU, optimizer,
                                    torch.amp.GradScaler("cpu", init_scale=8.0), 0.1)
    assert run_folder(tmp_path, resume=True).restore(model, optimizer, scaler) == 5 and scaler.get_scale() == 8.0


# ---- another run config, damage ----

def test_a_checkpoint_of_another_run_config_or_model_or_a_damaged_one_is_refused_and_kept(tmp_path):
    run(tmp_path, run_config=RUN_CONFIG)
    before = (tmp_path / "last.pt").read_bytes()
    for now, message in (({"data": "b"}, "data was 'a' and is 'b'"), ({"new": 5}, "new was None and is 5"),
                         ({"betas": (0.5, 0.999)}, "betas was [0.9, 0.999] and is [0.5, 0.999]")):   # nothing else
        with refused(f"last.pt was made with another run config: {message}. Give the same flags"):
            run(tmp_path, resume=True, run_config=RUN_CONFIG | now)
    with refused("another model or method"):
        run(tmp_path, adapt(tiny_gpt(), "lora", rank=2), resume=True, run_config=RUN_CONFIG)
    assert (tmp_path / "last.pt").read_bytes() == before
    (tmp_path / "last.pt").write_bytes(before[:-1])
    with refused("last.pt is not a readable svmini run"):
        run(tmp_path, resume=True, run_config=RUN_CONFIG)


@pytest.mark.parametrize("text", ["{", "null", "{}", '{"row": {}}', '{"run_config": {}, "row": 4}', 3000 * "[",
                                  b"\xff\xfe"])
def test_a_damaged_row_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "row.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with refused("row.json is damaged: delete it, and the same command writes it again"):
        RunFolder(tmp_path, {}, resume=True).finished_row("adapter.pt")
    assert (tmp_path / "row.json").is_file()


# ---- killed ----

class Killed(BaseException):
    """Simulates a kill: no `except Exception` may catch it."""


SHORT = replace(CONFIG, steps=6, lr=0.05)
EVERY = {"save_every": 2, "eval_every": 3}


def adapt_toy(out, resume):
    """Run svft with dropout; returns its row."""
    return timeless(compare.run("svft", tiny_gpt(0.2), Toy(), SHORT, CPU, out, resume=resume, **EVERY))


def pretrain_toy(out, resume):
    model, metadata = pretrain.pretrain(tiny_gpt(0.2), Toy(), SHORT, CPU, out, {}, resume=resume, **EVERY)
    return dict(model.state_dict()), metadata


@pytest.mark.parametrize("work", [adapt_toy, pretrain_toy])
def test_a_run_killed_at_any_write_resumes_to_the_last_bit(work, tmp_path, monkeypatch):
    """Just before each file appears, and just after the last one. An interrupted test evaluation is one of these."""
    real, writes = os.replace, []
    monkeypatch.setattr(os, "replace", lambda a, b: writes.append(real(a, b)))
    expected, total = work(tmp_path / "uninterrupted", False), len(writes)
    assert total >= 6 and not list(tmp_path.rglob("last.pt")), "it is deleted after the last write"
    for survived in range(total + 1):
        def replace_or_die(a, b):
            if len(writes) == survived:
                raise Killed
            writes.append(real(a, b))
            if len(writes) == total:
                raise Killed

        del writes[:]
        out = tmp_path / str(survived)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(os, "replace", replace_or_die)
            work(out, False)
        assert same(work(out, True), expected)
        assert_same_folder(tmp_path / "uninterrupted", out)


def test_a_finished_run_without_its_result_file_is_trained_again_and_a_damaged_file_is_refused(tmp_path):
    row, path = adapt_toy(tmp_path, False), compare.run_path(tmp_path, "svft", 3) / "adapter.pt"
    path.unlink()
    assert adapt_toy(tmp_path, True) == row
    path.write_bytes(path.read_bytes()[:-9])
    with refused("adapter.pt is not a readable svmini adapter"):
        adapt_toy(tmp_path, True)


# ---- base models ----

def test_a_base_model_is_kept_and_reused_only_with_the_same_run_config(tmp_path, capsys):
    metadata = {"data": "walk", "tokenizer": ["00"]}
    first, measured = pretrain.pretrain(tiny_gpt(0.2), Toy(), SHORT, CPU, tmp_path, metadata)
    expected = metadata | {"published": False, "metric": score(first.eval(), "test")["metric"]}
    assert expected.items() <= measured.items()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "model.pt"]
    assert "pretraining on walk" in capsys.readouterr().out
    half = replace(CPU, dtype=torch.bfloat16)   # the dtype of another device
    again, kept = pretrain.pretrain(tiny_gpt(0.2, seed=9), Toy(batch=None), SHORT, half, tmp_path, metadata)
    assert same(dict(again.state_dict()), dict(first.state_dict())) and kept == measured
    assert f"model.pt, from an earlier run: {measured['result']}" in capsys.readouterr().out
    for config, dropout, data, difference in (
            (replace(SHORT, steps=13), 0.2, "walk", "steps was 6 and is 13"),
            (SHORT, 0.1, "walk", "model.dropout was"), (SHORT, 0.2, "x", "data was 'walk' and is 'x'")):
        with refused(f"another run config: {difference}", "--out"):
            pretrain.pretrain(tiny_gpt(dropout), Toy(data_config={"data": data}), config, CPU, tmp_path, metadata)


def test_weight_stats_tell_random_weights_from_trained_ones():
    torch.manual_seed(0)
    model = GPT(GPTConfig(7, 8, 1, 2, 64))
    start = all_tensors(model)
    noise = pretrain.weight_stats(model, start)
    assert noise["cosine"] == pytest.approx(1) and 0.25 < noise["energy"] < 0.6
    for p in model.parameters():
        p.data = torch.outer(torch.randn(len(p)), torch.randn(p.shape[-1])) if p.dim() == 2 else p
    trained = pretrain.weight_stats(model, start)
    assert trained["energy"] == pytest.approx(1) and abs(trained["cosine"]) < 0.1
