"""Methods compared at equal effort: which specs run, at which learning rates, and what is kept, resumed and refused."""

import json
import math
from dataclasses import replace

import pytest
import torch

from helpers import (CPU, Toy, all_tensors, assert_close, image_task, refused, same, score, timeless, tiny_gpt,
                     tiny_vit, train_config, walk)
from svmini import GPT, METHODS, adapt, files, load_adapter
from svmini.methods.lora import LoRA
from svmini.model_file import load_model
from svmini.training import compare
from svmini.training.loop import Diverged

CONFIG = train_config(steps=6)
SWEEP = {"steps": 6, "batch_size": 4, "seed": 3}   # CONFIG without its learning rate


def run(spec, out, task=None, base=None, device_config=CPU, **changes):
    config = replace(CONFIG, **{key: changes.pop(key) for key in list(changes) if hasattr(CONFIG, key)})
    return compare.run(spec, base or tiny_gpt(0.2), task or Toy(), config, device_config, out, **changes)


# ---- which specs, at which learning rates ----

def test_learning_rates_are_looked_up_before_targets_are_written_into_the_spec():
    tuned, model = {"lora:rank=2": 0.5, "full": 0.25}, tiny_gpt()
    planned = compare.plan(["full", "lora:rank=2", "lora:rank=2@up", "svfit", "svft:pattern=plain"], model,
                           ("query", "value"), tuned)
    assert planned == {"full": 0.25, "lora:rank=2@query,value": 0.5, "lora:rank=2@up": LoRA.lr,
                       "svfit@query,value": METHODS["svfit"].lr, "svft:pattern=plain@query,value": METHODS["svft"].lr}
    assert compare.plan(["lora:init=kaiming,rank=2"], model, None, tuned) == {"lora:init=kaiming,rank=2": 0.5}
    specs, tuned = ["head", "full"], {"head": 0.5, "full": 0.25}
    for given, expected in (({}, tuned), ({"head_lr": 2.0}, {"head": 2.0, "full": 0.25}),
                            ({"lr": 3.0, "head_lr": 2.0}, {"head": 2.0, "full": 3.0})):
        assert compare.plan(specs, tiny_vit(), None, tuned, **given) == expected


@pytest.mark.parametrize("targets, specs, left", [
    (None, ["lora:rank=8", "lora", "full", "lora:alpha=None,rank=8", "lora:rank=4", "full"],
     ["lora:rank=8", "full", "lora:rank=4"]),
    (None, ["svft@up,down", "svft@down,up", "svft", "svft@query,key,value,out,up,down"], ["svft@up,down", "svft"]),
    (("query",), ["svft", "svft@query", "svft:off_diagonals=2"], ["svft@query"])])
def test_equal_methods_run_once(targets, specs, left):
    assert list(compare.plan(specs, tiny_gpt(), targets, {})) == left


def test_a_spec_that_does_not_fit_is_refused():
    for spec, targets, message in (("svfit:rank=99", None, "svfit does not fit blocks.0.attention.query"),
                                   ("head", None, "no head"), ("svft", ("quer",), "'quer' matches no layer")):
        with refused(message):
            compare.plan(["full", spec], tiny_gpt(), targets, {})


def test_a_run_names_the_adapted_and_the_frozen_layers():
    model = tiny_gpt()                                       # one block, and a tied head, which is no layer
    assert compare.describe_targets(model, None) == ("adapted layers: query, key, value, out, up, down (6 in total), "
                                                     "unless a method spec names its own targets")
    assert compare.describe_targets(model, ("up",)).endswith("; frozen: down, key, out, query, value")
    assert "frozen" not in compare.describe_targets(tiny_vit(), None), "the head of a ViT is trained"


class Picky(LoRA):
    examples = ("rank=8", "rank=1@query", "rank=9")   # too large for tiny_gpt


def test_all_means_the_main_specs_and_every_example_that_fits(monkeypatch, capsys):
    monkeypatch.setitem(METHODS, "picky", Picky)
    specs = compare.all_specs(["full", "lora:rank=8", "vera:rank=99999999"], tiny_gpt(), None)
    assert specs[:2] == ["full", "lora:rank=8"] and {"svfit", "picky:rank=8", "picky:rank=1@query"} <= set(specs)
    printed = capsys.readouterr().out
    assert "skipped: picky:rank=9: picky does not fit blocks.0.attention.query (8x8): rank must be" in printed
    skipped = {line.split(": ")[1] for line in printed.splitlines()}
    meant = {compare.check_spec(spec, tiny_gpt(), None) for spec in specs}
    assert len(meant) == len(specs), "each once"
    examples = {f"{m}:{e}".rstrip(":") for m, cls in METHODS.items() for e in cls.examples}
    assert all(compare.check_spec(spec, tiny_gpt(), None) in meant for spec in examples - skipped)


# ---- one run ----

def test_a_run_returns_its_row_and_writes_what_it_tested(tmp_path):
    base = tiny_gpt(0.2)
    row = run("lora:rank=2@query,up", tmp_path, base=base, metadata={"data": "walk"}, eval_every=4)
    folder = tmp_path / "runs" / "lora_rank=2_query,up-seed3"
    assert {p.name for p in folder.iterdir()} == {"adapter.pt", "metrics.jsonl", "row.json"}
    assert timeless(row) | {"metric": 0} == {
        "metric": 0, "method": "lora:rank=2@query,up", "trainable_params": 2 * 16 + 2 * 40, "head_params": 0,
        "trainable_percent": 100 * 112 / sum(p.numel() for p in base.parameters()), "metric_name": "loss",
        "higher_is_better": False, "gap_recovered": None, "peak_mb": None, "seed": 3, "lr": 1e-2,
        "adapter_bytes": (folder / "adapter.pt").stat().st_size, "sample": ["shown"]}
    assert row["seconds"] > 0 and row["ms_per_step"] > 0
    assert json.loads((folder / "row.json").read_text())["row"] == row
    assert same(all_tensors(base), all_tensors(tiny_gpt())) and not hasattr(base, "adaptation")
    again = load_adapter(tiny_gpt(0.2), folder / "adapter.pt").eval()
    assert score(again, "test")["metric"] == row["metric"]
    assert files.load(folder / "adapter.pt", "adapter")["metadata"] == {"data": "walk"}


def test_full_fine_tuning_writes_a_model_that_can_be_a_base_again(tmp_path):
    of_base = {"tokenizer": ["00"], "published": True, "data": "x", "metric": 1}
    row = run("full", tmp_path, metadata={"data": "walk"}, base_metadata=of_base)
    model, metadata = load_model(tmp_path / "runs" / "full-seed3" / "model.pt", GPT)
    assert metadata == {"tokenizer": ["00"], "published": True, "data": "walk"}
    assert row["trainable_percent"] == 100 and row["metric"] == score(model.eval(), "test")["metric"]


def test_trainable_percent_is_of_the_base_without_its_head():
    base = tiny_vit()
    size = sum(p.numel() for n, p in base.named_parameters() if not n.startswith("head."))
    row = compare.empty_row("x", Toy(), 3, 0.1, {"adapter": 1000, "head": 27}, base)
    assert (row["trainable_percent"], row["head_params"]) == (100 * 1000 / size, 27)


def test_the_zero_shot_row_is_the_base_model_itself():
    row = compare.zero_shot_row(base := tiny_gpt(0.5), Toy(), 3, CPU)
    expected = {"method": "zero-shot", "lr": None, "trainable_params": 0, "trainable_percent": 0}
    assert (expected | {"metric": score(base.eval(), "test")["metric"]}).items() <= row.items()


def test_the_seed_determines_the_batches_and_the_initialization_of_lora(tmp_path):
    keys, starts = [], []
    task = Toy(batch=lambda size, seed, step: keys.append(seed) or walk(size, seed, step), evaluate=lambda m, split: (
        starts.append(m.blocks[0].attention.query.A.detach().clone()), {"loss": None, "metric": 1.0})[1])
    for seed in (0, 1, 0):
        run("lora:rank=2", tmp_path, task, steps=1, lr=1e-12, seed=seed)
        torch.randn(3)   # what another method draws in between
    assert keys == [0, 1, 0]
    (a, b, again), base = starts[1::2], tiny_gpt()
    torch.manual_seed(1)   # the seed is set immediately before the copy is adapted
    assert_close(b, adapt(base, "lora", rank=2).blocks[0].attention.query.A)
    assert torch.equal(a, again) and (a - b).abs().max() > 0.01


def test_the_linear_probe_uses_its_learning_rate_as_head_lr_also_in_a_sweep(tmp_path, monkeypatch):
    seen, real = [], compare.train
    monkeypatch.setattr(compare, "train", lambda model, task, config, *a: (
        seen.append((config.lr, config.head_lr)), real(model, task, config, *a))[1])
    for spec in ("head", "svfit"):
        assert run(spec, tmp_path, image_task(), tiny_vit(), lr=0.5, head_lr=0.25)["lr"] == 0.5
    compare.lr_sweep({"head": 0.125, "svfit": 0.125}, tiny_vit(), image_task(), SWEEP | {"head_lr": 0.25}, CPU,
                     tmp_path, 1)
    assert seen == [(0.5, 0.5), (0.5, 0.25), (0.125, 0.125), (0.125, 0.25)]


def test_a_diverged_run_gives_a_row_and_is_not_kept(tmp_path):
    row = run("lora:rank=2", tmp_path, lr=1e30)
    assert row["metric"] is None and "step" in row["failed"] and row["trainable_params"] > 0
    assert not list(tmp_path.rglob("row.json")) and not list(tmp_path.rglob("adapter.pt"))
    task = Toy(evaluate=lambda model, split: {"loss": None, "metric": math.nan if split == "test" else 1.0})
    assert "metric on test is nan" in run("svfit", tmp_path, task)["failed"]
    start = compare.zero_shot_row(tiny_gpt(), Toy(), 3, CPU)
    with pytest.raises(Diverged, match="every run diverged: try a lower --lr"):
        compare.check_not_all_diverged([start, row, row])
    compare.check_not_all_diverged([start, row, row | {"metric": 1.0}])


def test_a_bug_in_a_method_keeps_its_traceback(tmp_path, monkeypatch):
    def forward(self, x):
        raise ValueError("einsum(): a student's bug")

    monkeypatch.setattr(LoRA, "forward", forward)
    for work in (lambda: run("lora:rank=2", tmp_path),
                 lambda: compare.lr_sweep({"lora:rank=2": 1.0}, tiny_gpt(), Toy(), SWEEP, CPU, tmp_path, 1)):
        with pytest.raises(ValueError) as caught:
            work()
        assert type(caught.value) is ValueError


# ---- kept, resumed, refused ----

def test_a_row_with_another_run_config_is_refused_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "run_path", lambda out, spec, seed: tmp_path / "one")
    run("svfit", tmp_path)
    before = (tmp_path / "one" / "row.json").read_bytes()
    monkeypatch.setattr(compare, "train", lambda *a: pytest.fail("training started"))
    assert run("svfit", tmp_path, resume=True)["method"] == "svfit"
    for message, change in (
            ("steps was", {"steps": 5}), ("head_lr was", {"head_lr": 0.5}), ("betas was", {"betas": (0.5, 0.5)}),
            ("data was 'walk' and is 'other'", {"task": Toy(data_config={"data": "other"})}),
            ("base was", {"base": tiny_gpt(0.2, seed=8)}), ("model.dropout was", {"base": tiny_gpt(0.1)}),
            ("dtype was 'torch.float32'", {"device_config": replace(CPU, dtype=torch.bfloat16)}),
            ("method was", {"spec": "svft"}), ("options.rank was", {"spec": "svfit:rank=3"}),
            ("targets was", {"spec": "svfit@query"})):
        with refused("row.json was made with another run config", message):
            run(**{"spec": "svfit", "out": tmp_path, "resume": True} | change)
        assert (tmp_path / "one" / "row.json").read_bytes() == before


def test_a_new_comparison_deletes_what_an_earlier_one_left(tmp_path):
    for name in ("svfit-seed3", "full-seed4", "svft-seed3"):
        for file in ("row.json", "adapter.pt"):
            files.write_text(tmp_path / "runs" / name / file, "old")
    compare.delete_runs(["svfit", "full"], range(3, 10**12), tmp_path)
    assert [p.parent.name for p in tmp_path.rglob("*.*")] == ["svft-seed3"] * 2


# ---- learning-rate sweep ----

@pytest.fixture
def tried(monkeypatch):
    """The (label, learning rate) of every training run; the model knows its learning rate."""
    seen, train = [], compare.train

    def spy(model, task, config, *arguments):
        seen.append((arguments[-1], config.lr))
        model.lr = config.lr
        return train(model, task, replace(config, lr=1e-3, steps=1), *arguments)

    monkeypatch.setattr(compare, "train", spy)
    return seen


@pytest.mark.parametrize("higher, val, best", [
    (False, {-1: 2, 0: 3, 1: 1}, 0.2), (True, {-1: 1, 0: 3, 1: 3}, 0.1), (False, {-1: 1, 0: 1, 1: 1}, 0.05)])
def test_the_learning_rate_is_chosen_on_validation_data(tmp_path, tried, higher, val, best):
    """The test split says the opposite. Of equal scores, the smaller learning rate wins."""
    def evaluate(model, split):
        value = val[round(math.log2(model.lr / 0.1))]
        return {"loss": None, "metric": float(value if split == "val" else -value)}

    task = Toy(evaluate=evaluate, higher_is_better=higher)
    found = compare.lr_sweep({"svfit": 0.1}, tiny_gpt(), task, SWEEP, CPU, tmp_path, 3)
    assert found == {"svfit": {"lr": [0.05, 0.1, 0.2], "val": [val[-1], val[0], val[1]], "best": best}}
    assert [lr for _, lr in tried] == [0.05, 0.1, 0.2], "a factor of 2 to each side"
    assert not (tmp_path / "runs").exists(), "a sweep keeps no runs"


def test_a_sweep_depends_on_its_seed_alone_and_never_chooses_a_learning_rate_that_diverges(tmp_path):
    one, other = (compare.lr_sweep(lrs, tiny_gpt(0.2), Toy(), SWEEP | {"steps": 12}, CPU, tmp_path, 1)
                  for lrs in ({"full": 1e30, "lora:rank=2": 0.1}, {"lora:rank=2": 0.1}))
    assert one["full"] == {"lr": [1e30], "val": [None], "best": None}
    assert one["lora:rank=2"] == other["lora:rank=2"] and one["lora:rank=2"]["best"] == 0.1


def sweep_toy(out, specs, resume, n=3, **changes):
    task = Toy(data_config={"data": "walk", "shape": (1, 2)})
    return compare.lr_sweep(dict.fromkeys(specs, 0.1), tiny_gpt(), task, SWEEP | changes, CPU, out, n, resume)


def test_a_resumed_sweep_continues_and_shows_the_methods_that_were_asked_for(tmp_path, tried):
    found = sweep_toy(tmp_path, ["svfit"], False)
    more = sweep_toy(tmp_path, ["svfit", "lora:rank=2"], True)
    assert [spec for spec, _ in tried[3:]] == [f"lora:rank=2 lr {lr}" for lr in (0.05, 0.1, 0.2)]
    assert more == found | {"lora:rank=2": more["lora:rank=2"]}
    fewer = sweep_toy(tmp_path, ["svfit"], True)
    assert fewer == found == json.loads((tmp_path / "lr_sweep.json").read_text())["found"]
    assert sweep_toy(tmp_path, ["svfit", "lora:rank=2"], True) == more and len(tried) == 6, "no score is lost"


def test_a_sweep_with_another_number_or_run_config_or_a_damaged_file_is_refused(tmp_path, tried):
    sweep_toy(tmp_path, ["svfit"], False)
    for changes, different in (({"n": 5}, "lr_sweep was 3 and is 5"), ({"schedule": "cosine"}, "schedule was")):
        with refused(f"lr_sweep.json was made with another run config: {different}"):
            sweep_toy(tmp_path, ["svfit"], True, **changes)
    (tmp_path / "lr_sweep.json").write_text('{"run_config": {}, "scores": 3}')
    with refused("lr_sweep.json is damaged"):
        sweep_toy(tmp_path, ["svfit"], True)
    with refused("rank"):
        sweep_toy(tmp_path, ["svfit:rank=99"], False)
    assert not (tmp_path / "lr_sweep.json").exists(), "a new sweep deletes the file, so a later --resume cannot find it"
