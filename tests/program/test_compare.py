"""Methods compared at equal effort: which specs are run, at which learning_rates, tuned on what, kept and resumed how."""

import json
import math
from dataclasses import replace

import pytest
import torch

from svmini import GPT, METHODS, adapt, load_adapter
from svmini.errors import InputError
from svmini.methods.lora import LoRA
from svmini.model_file import load_model
from svmini.training import compare
from svmini.training.loop import Stopped
from toy import (CPU, Toy, assert_same_folder, interrupt_at, same, train_config, timeless, tiny_gpt, tiny_vit,
                 token_loss, walk)

TRAIN_CONFIG = train_config(steps=6)


def run(spec, out, task=None, base=None, **changes):
    more = {key: changes.pop(key) for key in ("resume", "eval_every", "metadata", "base_metadata") if key in changes}
    return compare.run(spec, base or tiny_gpt(0.2), task or Toy(), replace(TRAIN_CONFIG, **changes), CPU, out, **more)


# ---- which specs, at which learning_rates ----

def test_rates_are_looked_up_by_the_word_before_targets_are_written_into_it():
    learning_rates = {"lora:rank=2": 0.5, "full": 0.25}
    planned = compare.plan(["full", "lora:rank=2", "lora:rank=2@up", "svfit", "svft:pattern=plain"], tiny_gpt(),
                           ("query", "value"), learning_rates)
    assert planned == {"full": 0.25, "lora:rank=2@query,value": 0.5, "lora:rank=2@up": LoRA.lr,
                       "svfit@query,value": METHODS["svfit"].lr, "svft:pattern=plain@query,value": METHODS["svft"].lr}
    assert compare.plan(["lora:init=kaiming,rank=2"], tiny_gpt(), None, learning_rates) == {"lora:init=kaiming,rank=2": 0.5}
    assert compare.plan(["full", "lora:rank=2"], tiny_gpt(), None, learning_rates, lr=3.0) == {"full": 3.0, "lora:rank=2": 3.0}


@pytest.mark.parametrize("targets, specs, left", [
    (None, ["lora:rank=8", "lora", "lora:alpha=None,rank=8", "lora:rank=4"], ["lora:rank=8", "lora:rank=4"]),
    (None, ["svft@up,down", "svft@down,up", "svft@up"], ["svft@up,down", "svft@up"]),
    (None, ["svft", "svft@query,key,value,out,up,down"], ["svft"]),
    (("query",), ["svft", "svft@query", "svft:off_diagonals=2"], ["svft@query"]),
    (None, ["full", "svft:pattern=plain", "full", "svfit"], ["full", "svft:pattern=plain", "svfit"])])
def test_equal_methods_are_run_once(targets, specs, left):
    assert list(compare.plan(specs, tiny_gpt(), targets, {})) == left


@pytest.mark.parametrize("spec, targets, said", [
    ("svfit:rank=99", None, "svfit does not fit blocks.0.attention.query"), ("head", None, "no head of its own"),
    ("svft@valeu", None, "'valeu' matches no layer"), ("svft", ("quer",), "'quer' matches no layer"),
    ("svtf", None, "no method 'svtf'")])
def test_a_word_that_does_not_fit_ends_here(spec, targets, said):
    with pytest.raises(InputError, match=said):
        compare.plan(["full", spec], tiny_gpt(), targets, {})


def test_a_run_says_which_layers_it_takes_and_which_it_leaves():
    model = tiny_gpt()                                       # one block; its head is tied, so no layer to leave out
    assert compare.describe_targets(model, None) == ("adapted, where a spec names no targets: query, key, "
                                                 "value, out, up, down, 6 layers")
    model.blocks[0].mlp.gate = torch.nn.Linear(8, 32)
    assert compare.describe_targets(model, None).endswith("6 layers; left as they are: gate")
    assert compare.describe_targets(model, ("up",)) .endswith("up, 1 layers; left as they are: down, gate, key, out, "
                                                            "query, value")
    assert compare.describe_targets(tiny_vit(), None).endswith("6 layers")   # a ViT's head is trained whole


class Picky(LoRA):
    examples = ("rank=8", "rank=1@query", "rank=9")

    @staticmethod
    def check(d_out, d_in, *, rank=8, alpha=None, init="kaiming"):
        if rank > 8:
            raise ValueError("rank is too much")


def test_all_is_the_main_words_and_every_example_and_what_does_not_fit_is_said(monkeypatch, capsys):
    monkeypatch.setattr(compare, "METHODS", METHODS)
    monkeypatch.setitem(METHODS, "picky", Picky)
    specs = compare.all_specs(["full", "lora:rank=8", "vera:rank=99999999"], tiny_gpt(), None)
    assert specs[:2] == ["full", "lora:rank=8"] and {"svfit", "picky:rank=8", "picky:rank=1@query"} <= set(specs)
    said = capsys.readouterr().out.splitlines()
    why = "left out: picky:rank=9: picky does not fit blocks.0.attention.query (8x8): rank is too much"
    assert "picky:rank=9" not in specs and any(line.startswith(why) for line in said)
    examples = {f"{m}:{e}".rstrip(":") for m, cls in METHODS.items() for e in cls.examples}
    left_out = {line.split(": ")[1] for line in said}
    meant = {compare.fitting(spec, tiny_gpt(), None) for spec in specs}
    assert len(meant) == len(specs), "each once"
    assert all(spec in left_out or compare.fitting(spec, tiny_gpt(), None) in meant for spec in examples)
    compare.all_specs([], tiny_gpt(), ("up",))
    assert "left out: picky:rank=9: picky does not fit blocks.0.mlp.up" in capsys.readouterr().out


# ---- one run ----

def test_a_row_and_what_it_leaves(tmp_path):
    base = tiny_gpt(0.2)
    start = {k: v.clone() for k, v in base.state_dict().items()}
    row = run("lora:rank=2@query,up", tmp_path, base=base, metadata={"data": "walk"}, eval_every=4)
    folder = tmp_path / "runs" / "lora_rank=2_query,up-seed3"
    assert {p.name for p in folder.iterdir()} == {"adapter.pt", "metrics.jsonl", "row.json"}
    size = sum(p.numel() for p in base.parameters())
    assert {k: v for k, v in row.items() if k not in ("seconds", "ms_per_step", "metric")} == {
        "method": "lora:rank=2@query,up", "trainable_params": 2 * 16 + 2 * 40, "head_params": 0, "trainable_percent": 100 * 112 / size,
        "metric_name": "loss", "higher_is_better": False, "gap_recovered": None, "peak_mb": None, "seed": 3, "lr": 1e-2,
        "adapter_bytes": (folder / "adapter.pt").stat().st_size, "sample": ["shown"]}
    assert row["seconds"] > 0 and row["ms_per_step"] > 0
    assert json.loads((folder / "row.json").read_text())["row"] == row
    assert same(dict(base.state_dict()), start), "the base stays as it was"
    assert not any(p.requires_grad != q.requires_grad for p, q in zip(base.parameters(), tiny_gpt().parameters()))
    again = load_adapter(tiny_gpt(0.2), folder / "adapter.pt").eval()
    assert token_loss(again, *walk(16, "test", 0)).item() == row["metric"], "what was tested is what is kept"
    assert torch.load(folder / "adapter.pt", weights_only=True)["content"]["metadata"] == {"data": "walk"}


def test_full_leaves_a_model_that_is_a_base_again(tmp_path):
    of_base = {"tokenizer": ["00"], "published": True, "data": "x", "metric": 1}
    row = run("full", tmp_path, metadata={"data": "walk"}, base_metadata=of_base)
    model, metadata = load_model(tmp_path / "runs" / "full-seed3" / "model.pt", GPT)
    assert metadata == {"tokenizer": ["00"], "published": True, "data": "walk"}
    assert token_loss(model.eval(), *walk(16, "test", 0)).item() == row["metric"]
    assert row["trainable_percent"] == 100 and row["head_params"] == 0


def test_the_percentage_is_of_the_base_without_its_head():
    base = tiny_vit()
    counts = {"adapter": 1000, "head": 27}
    size = sum(p.numel() for n, p in base.named_parameters() if not n.startswith("head."))
    row = compare.empty_row("x", Toy(), TRAIN_CONFIG, counts, base)
    assert row["trainable_percent"] == 100 * 1000 / size and (row["trainable_params"], row["head_params"]) == (1000, 27)


def test_the_start_row_is_the_base_as_it_is():
    base = tiny_gpt(0.5)
    row = compare.zero_shot_row(base, Toy(), TRAIN_CONFIG, CPU)
    assert row["metric"] == token_loss(base.eval(), *walk(16, "test", 0)).item()
    assert (row["method"], row["lr"], row["trainable_params"], row["trainable_percent"], row["sample"]) == ("zero-shot", None, 0, 0, ["shown"])


def test_the_seed_decides_batches_and_the_start_of_lora(tmp_path):
    starts, keys = {}, []

    def batch(size, seed, step):
        keys.append((seed, step))
        return walk(size, seed, step)

    def look(model, split):
        starts.setdefault(split, []).append(model.blocks[0].attention.query.A.detach().clone())
        return {"loss": None, "metric": 1.0}

    task = Toy(batch=batch, evaluate=look)
    for seed in (0, 1, 0):
        run("lora:rank=2", tmp_path, task, steps=1, lr=1e-12, seed=seed)
        torch.randn(3)   # what another method draws in between
    a, b, again = starts["test"]
    assert torch.equal(a, again) and (a - b).abs().max() > 0.01
    assert keys == [(0, 0), (1, 0), (0, 0)]
    base = tiny_gpt()
    torch.manual_seed(1)   # the stream is set right before the copy is adapted
    assert torch.allclose(adapt(base, "lora", rank=2).blocks[0].attention.query.A, b, atol=1e-6)


def test_a_head_alone_takes_its_one_rate_as_head_lr(tmp_path):
    """In a run as in tuning."""
    seen, real = [], compare.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "train", lambda model, task, s, *a: seen.append((s.lr, s.head_lr)) or real(
            model, task, s, *a))
        x, y = torch.randn(4, 1, 4, 4), torch.tensor([0, 1, 2, 0])
        task = Toy(batch=lambda *key: (x, y), loss=lambda m, x, y: torch.nn.functional.cross_entropy(m(x), y),
                   evaluate=lambda m, split: {"loss": None, "metric": 1.0})
        for spec in ("head", "svfit"):
            row = run(spec, tmp_path, task, tiny_vit(), lr=0.5, head_lr=0.25)
            assert row["lr"] == 0.5
        s = replace(TRAIN_CONFIG, head_lr=0.25)
        compare.lr_sweep({"head": 0.125, "svfit": 0.125}, tiny_vit(), task, s, CPU, tmp_path, 1)
    assert seen == [(0.5, 0.5), (0.5, 0.25), (0.125, 0.125), (0.125, 0.25)]


def test_a_divergence_is_a_row_and_is_not_kept(tmp_path):
    row = run("lora:rank=2", tmp_path, lr=1e30)
    assert row["metric"] is None and "step" in row["failed"] and row["trainable_params"] > 0
    assert not list(tmp_path.rglob("row.json")) and not list(tmp_path.rglob("adapter.pt"))
    task = Toy(evaluate=lambda model, split: {"loss": None, "metric": math.nan if split == "test" else 1.0})
    assert "metric on test is nan" in run("svfit", tmp_path, task)["failed"]


def test_a_mistake_in_a_method_keeps_its_traceback(tmp_path, monkeypatch):
    def forward(self, x):
        raise ValueError("einsum(): a student's mistake")

    monkeypatch.setattr(LoRA, "forward", forward)
    for work in (lambda: run("lora:rank=2", tmp_path),
                 lambda: compare.lr_sweep({"lora:rank=2": 1.0}, tiny_gpt(), Toy(), TRAIN_CONFIG, CPU, tmp_path, 1)):
        with pytest.raises(ValueError, match="a student's mistake") as caught:
            work()
        assert not isinstance(caught.value, InputError)


# ---- kept, resumed, refused ----

def test_a_comparison_goes_on_where_it_stopped(tmp_path, monkeypatch):
    jobs = [(spec, seed) for seed in (0, 1) for spec in ("full", "svft", "lora:rank=2")]
    whole = [run(spec, tmp_path / "whole", seed=seed) for spec, seed in jobs]
    started, train = [], compare.train
    monkeypatch.setattr(compare, "train", lambda *a: started.append((a[5], a[2].seed)) or train(*a))
    with pytest.raises(Stopped):
        for i, (spec, seed) in enumerate(jobs):
            run(spec, tmp_path / "cut", interrupt_at(3) if i == 4 else None, seed=seed)
    assert started == jobs[:5]
    del started[:]
    rows = [run(spec, tmp_path / "cut", seed=seed, resume=True) for spec, seed in jobs]
    assert started == jobs[4:]
    assert list(map(timeless, rows)) == list(map(timeless, whole))
    assert_same_folder(tmp_path / "whole", tmp_path / "cut")
    del started[:]
    run("full", tmp_path / "cut", seed=0)
    assert started == [("full", 0)], "without --resume it is made again"


OTHERS = [   # what a row must not be taken over from, and what is then said
    *(({key: value}, f"{key} was") for key, value in (
        ("steps", 5), ("lr", 0.5), ("batch_size", 3), ("head_lr", 0.5), ("warmup_ratio", 0.5), ("schedule", "cosine"),
        ("weight_decay", 0.5), ("betas", (0.5, 0.5)), ("grad_clip", 0.5), ("grad_accum_steps", 2))),
    ({"task": Toy(data_config={"data": "other"})}, "data was 'walk' and is 'other'"), ({"spec": "svft"}, "method was"),
    ({"base": (0.2, 8)}, "base was"), ({"base": (0.1, 0)}, "model.dropout was"),   # arguments of tiny_gpt
    ({"device_config": replace(CPU, dtype=torch.bfloat16)}, "dtype was 'torch.float32'"),
    ({"spec": "svfit:rank=3"}, "options.rank was"), ({"spec": "svfit@query"}, "targets was")]


@pytest.mark.parametrize("change, said", OTHERS, ids=[said for _, said in OTHERS])
def test_a_row_under_other_conditions_is_refused(tmp_path, change, said, monkeypatch):
    monkeypatch.setattr(compare, "run_path", lambda out, spec, seed: tmp_path / "one")
    run("svfit", tmp_path)
    before = (tmp_path / "one" / "row.json").read_bytes()
    monkeypatch.setattr(compare, "train", lambda *a: pytest.fail("training started"))
    assert run("svfit", tmp_path, resume=True)["method"] == "svfit"
    now = {"spec": "svfit", "base": tiny_gpt(0.2), "task": Toy(), "device_config": CPU} | {
        k: tiny_gpt(*v) if k == "base" else v for k, v in change.items() if k in ("spec", "base", "task", "device_config")}
    s = replace(TRAIN_CONFIG, **{k: v for k, v in change.items() if k not in now})
    with pytest.raises(InputError, match="row.json was made with another run config") as caught:
        compare.run(now["spec"], now["base"], now["task"], s, now["device_config"], tmp_path, resume=True)
    assert said in str(caught.value) and (tmp_path / "one" / "row.json").read_bytes() == before


def test_a_comparison_begun_anew_deletes_what_an_older_one_left(tmp_path):
    run("svfit", tmp_path)
    run("full", tmp_path, seed=4)
    run("svft", tmp_path)
    compare.delete_runs(["svfit", "full"], (3, 4), tmp_path)
    assert {p.parent.name for p in tmp_path.rglob("row.json")} == {"svft-seed3"}
    assert {p.parent.name for p in tmp_path.rglob("*.pt")} == {"svft-seed3"}


# ---- learning learning_rates ----

def by_rate(val, test, higher=False):
    """A task whose score is what `val` and `test` say of the learning rate, as a power of two times 0.1."""
    def evaluate(model, split):
        return {"loss": None, "metric": float((val if split == "val" else test)[round(math.log2(model.rate / 0.1))])}

    return Toy(evaluate=evaluate, higher_is_better=higher)


@pytest.fixture
def rates_seen(monkeypatch):
    """Every training's rate, which the model is told too."""
    seen, train = [], compare.train

    def spy(model, task, s, *arguments):
        seen.append((arguments[-1], s.lr))
        model.rate = s.lr
        return train(model, task, replace(s, lr=1e-3, steps=1), *arguments)

    monkeypatch.setattr(compare, "train", spy)
    return seen


@pytest.mark.parametrize("higher, val, best", [
    (False, {-1: 3, 0: 1, 1: 2}, 0.1), (True, {-1: 3, 0: 1, 1: 2}, 0.05), (False, {-1: 2, 0: 3, 1: 1}, 0.2),
    (True, {-1: 1, 0: 3, 1: 3}, 0.1), (False, {-1: 1, 0: 1, 1: 1}, 0.05)])
def test_the_rate_is_chosen_on_the_validation_split_alone(tmp_path, rates_seen, higher, val, best):
    """The test split says the opposite. Of equal ones the smaller rate is taken."""
    opposite = {exponent: -value for exponent, value in val.items()}
    found = compare.lr_sweep({"svfit": 0.1}, tiny_gpt(), by_rate(val, opposite, higher), TRAIN_CONFIG, CPU, tmp_path, 3)
    assert found == {"svfit": {"lr": [0.05, 0.1, 0.2], "val": [val[-1], val[0], val[1]], "best": best}}
    assert [lr for _, lr in rates_seen] == [0.05, 0.1, 0.2], "a factor 2 to each side"
    assert not (tmp_path / "runs").exists(), "a trial keeps nothing"


def test_a_rate_that_diverges_is_never_chosen(tmp_path):
    base, grid = tiny_gpt(), {"svfit": 1e-2, "full": 1e30}
    found = compare.lr_sweep(grid, base, Toy(), train_config(steps=12), CPU, tmp_path, 1)
    assert found["full"] == {"lr": [1e30], "val": [None], "best": None}
    assert found["svfit"]["best"] == 1e-2 and math.isfinite(found["svfit"]["val"][0])


def test_what_a_trial_draws_is_by_its_seed_and_not_by_what_ran_before(tmp_path):
    one, other = (compare.lr_sweep({spec: 0.1 for spec in specs}, tiny_gpt(0.2), Toy(), TRAIN_CONFIG, CPU, tmp_path, 2)
                  for specs in (["svfit", "lora:rank=2"], ["lora:rank=2"]))
    assert one["lora:rank=2"] == other["lora:rank=2"]


def test_tuning_goes_on_and_is_guarded(tmp_path, rates_seen):
    def lr_sweep(learning_rates, resume, points=3, **changes):
        task = Toy(data_config={"data": "walk", "shape": (1, 2)})
        return compare.lr_sweep(learning_rates, tiny_gpt(), task, replace(TRAIN_CONFIG, **changes), CPU, tmp_path, points, resume)

    found = lr_sweep({"svfit": 0.1, "full": 0.1}, False)
    del rates_seen[:]
    resumed = lr_sweep({"svfit": 0.1, "full": 0.1, "lora:rank=2": 0.1}, True)
    assert [spec for spec, _ in rates_seen] == [f"lora:rank=2 lr {lr}" for lr in (0.05, 0.1, 0.2)]
    assert {spec: resumed[spec] for spec in found} == found
    with pytest.raises(InputError, match="lr_sweep.json was made with another run config: schedule was 'linear' and is"):
        lr_sweep({"svfit": 0.1}, True, schedule="cosine")
    for text in ("{", "[]", "{}", '{"run_config": {}, "found": 3}', ""):
        (tmp_path / "lr_sweep.json").write_text(text)
        with pytest.raises(InputError, match="lr_sweep.json is damaged"):
            lr_sweep({"svfit": 0.1}, True)
    with pytest.raises(InputError):
        lr_sweep({"svfit:rank=99": 0.1}, False)
    assert not (tmp_path / "lr_sweep.json").exists(), "begun anew, and killed: a later --resume must not meet the old one"
