"""Both scripts from their command line to their files, with tiny models, few steps and little data."""

import contextlib
import io
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_gpt
import train_vit
from conftest import method_of_the_readme
from fake_sets import build
from svmini import GPT, METHODS, ViT, cli, compare, glyphs, images, load_adapter, loop, picture_sets, tasks, text

ROOT = Path(__file__).resolve().parent.parent
MODEL = ["--n-layer", "1", "--n-head", "2", "--d-model", "16", "--pretrain-steps", "4", "--device", "cpu"]
STEPS = ["--steps", "4"]
ROW = {"method", "adapter", "head", "percent", "metric", "metric_name", "higher_is_better", "recovered", "seconds",
       "ms_per_step", "peak_mb", "adapter_bytes", "seed", "lr", "learned"}
# name: script, its flags, what stands for no adapter, metric, better when higher, what is pretrained on
STORIES = {
    "glyphs": (train_vit, [], "head", "accuracy", True, ViT),
    "topics": (train_gpt, [], "start", "loss", False, GPT),
    "arithmetic": (train_gpt, ["--data", "arithmetic"], "start", "exact match", True, GPT),
}


@pytest.fixture(scope="module", autouse=True)
def little_data():
    """A few pictures of every class, the first pages of both texts, and forty problems."""
    with pytest.MonkeyPatch.context() as patch:
        for which in "AB":
            patch.setitem(glyphs.GLYPHS[which], "sizes", {"train": 4, "val": 2, "test": 3})
        library, topics = text.stdlib_source()[:40_000], text.reference_topics()[:30_000]
        patch.setattr(text, "stdlib_source", lambda: library)
        patch.setattr(text, "reference_topics", lambda: topics)
        problems = tasks.Arithmetic.problems
        kept = {}

        def few(self, split, n):
            key = (self.operation, split)
            if key not in kept:
                kept[key] = problems(self, split, 40)
            return kept[key]

        patch.setattr(tasks.Arithmetic, "problems", few)
        yield


def call(script, *argv, code=0):
    """What script.main(argv) prints; it must return `code`."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        got = script.main([str(a) for a in argv])
    assert got == code, error.getvalue()
    return out.getvalue()


@pytest.fixture(scope="module", params=STORIES)
def story(request, tmp_path_factory):
    """(name, folder, what it printed) of one quick story each."""
    script, flags, *_ = STORIES[request.param]
    out = tmp_path_factory.mktemp("an out folder ü") / request.param
    return request.param, out, call(script, "--quick", *flags, *MODEL, *STEPS, "--eval-every", 2, "--out", out)


def read(out):
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def numbers(out):
    """The rows without what the clock says."""
    return [{k: v for k, v in r.items() if k not in ("seconds", "ms_per_step")} for r in read(out)["rows"]]


def base_of(name, out):
    return loop.load_model(out / "pretrain" / "model.pt", STORIES[name][-1])[0]


# ---- the story ----

def test_results(story):
    name, out, printed = story
    script, _, reference, metric, higher, _ = STORIES[name]
    content, model = read(out), base_of(name, out)
    assert content["python"] == platform.python_version() and content["torch"] == torch.__version__
    assert content["device"].startswith("device cpu") and content["steps"] == 4 and content["tuning"] is None
    if name == "arithmetic":
        assert content["sha256"] == "made by the program"
    else:
        assert re.fullmatch("[0-9a-f]{64}", content["sha256"])
    rows = {r["method"]: r for r in content["rows"]}
    assert list(rows) == (["start"] if reference == "start" else []) + script.QUICK
    size = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("head."))
    for word, row in rows.items():
        assert set(row) == ROW
        assert (row["metric_name"], row["higher_is_better"], row["seed"]) == (metric, higher, 0)
        assert math.isfinite(row["metric"]) and row["peak_mb"] is None
        assert row["percent"] == pytest.approx(100 * row["adapter"] / size)
        assert row["head"] == (0 if reference == "start" else 26 * 17)
        assert (row["adapter_bytes"] > 0) == (row["seconds"] > 0) == (word != "start")
    assert rows["full"]["percent"] == 100 and rows[reference]["percent"] == 0
    d, r = 16, 8
    assert rows["lora:rank=8"]["adapter"] == 4 * r * 2 * d + 2 * r * 5 * d
    assert rows["svft:off_diagonals=8"]["adapter"] == 6 * (d * 17 - 8 * 9)
    start, full = rows[reference]["metric"], rows["full"]["metric"]
    for word in script.QUICK:
        if (full > start) == higher and full != start:
            assert rows[word]["recovered"] == pytest.approx((rows[word]["metric"] - start) / (full - start))
        else:
            assert rows[word]["recovered"] is None


def test_files_of_a_story(story):
    name, out, printed = story
    names = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert {"results.json", "results.md", "pretrain/model.pt", "pretrain/last.pt", "pretrain/best.pt",
            "pretrain/metrics.jsonl"} <= names
    assert not [n for n in names if n.endswith(".tmp")]
    assert ("pictures.png" in names) == (name == "glyphs")
    for word in STORIES[name][0].QUICK:
        folder = f"runs/{compare.slug(word)}-seed0"
        result = "model.pt" if word == "full" else "adapter.pt"
        assert {f"{folder}/{n}" for n in ("last.pt", "best.pt", "metrics.jsonl", "row.json", result)} <= names
        log = [json.loads(line) for line in (out / folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        assert [line["step"] for line in log] == [2, 4]
        assert all(line.keys() == {"step", "split", "loss", "metric", "lr"} and line["split"] == "val" for line in log)
    table = (out / "results.md").read_text(encoding="utf-8")
    for row in read(out)["rows"]:
        assert row["method"] in table and row["method"] in printed
    assert "one seed" in table and f"- python: {platform.python_version()}" in table


def test_a_story_shows_what_was_learned_and_samples(story):
    name, out, printed = story
    learned = {r["method"]: r["learned"] for r in read(out)["rows"]}
    assert {w for w, x in learned.items() if x} == {"svft:off_diagonals=8"}
    assert set(learned["svft:off_diagonals=8"]) == {"query", "key", "value", "out", "up", "down"}
    assert all(x["max_M"] > 0 and x["before"] > 0 for x in learned["svft:off_diagonals=8"].values())
    assert "largest singular value before → after" in printed and "query " in printed
    if name != "glyphs":
        assert "--- before ---" in printed and "--- after" in printed
    if name == "arithmetic":
        assert re.search(r"\d{3}-\d{3}=\d+  model: ", printed)


def test_the_base_is_reused_and_the_same_seed_gives_the_same_numbers(story, tmp_path):
    name, out, first = story
    script, flags, *_ = STORIES[name]
    assert "pretraining on" in first and "is reused" not in first
    before, rows = (out / "pretrain" / "model.pt").read_bytes(), numbers(out)
    argv = ["--quick", *flags, *MODEL, *STEPS, "--eval-every", 2, "--out"]
    printed = call(script, *argv, out)
    assert "is reused" in printed and "pretraining on" not in printed
    assert (out / "pretrain" / "model.pt").read_bytes() == before and numbers(out) == rows
    call(script, *argv, tmp_path / "again")
    assert numbers(tmp_path / "again") == rows
    for log in out.rglob("metrics.jsonl"):
        assert log.read_bytes() == (tmp_path / "again" / log.relative_to(out)).read_bytes()


def test_another_seed_gives_other_numbers(story, tmp_path):
    name, out, _ = story
    script, flags, *_ = STORIES[name]
    call(script, "finetune", "--method", "lora:rank=8", *flags, *STEPS, "--seed", 1, "--eval-every", 2, "--device", "cpu",
         "--init", out / "pretrain" / "model.pt", "--out", tmp_path)
    one, other = ((f / "metrics.jsonl").read_text() for f in (out / "runs/lora_rank=8-seed0", tmp_path / "runs/lora_rank=8-seed1"))
    assert one != other or name == "arithmetic"   # where four steps solve nothing the exact match is 0 both times
    assert numbers(tmp_path / "runs" / "lora_rank=8-seed1")[-1]["seed"] == 1


def test_an_adapter_gives_back_its_row(story):
    name, out, _ = story
    model = base_of(name, out)
    if name == "glyphs":
        model.new_head(26)
    load_adapter(model, out / "runs" / "svft_off_diagonals=8-seed0" / "adapter.pt")
    last = torch.load(out / "runs" / "svft_off_diagonals=8-seed0" / "last.pt", weights_only=True)["model"]
    ours = dict(model.named_parameters())
    assert last.keys() and all(torch.equal(ours[k], v) for k, v in last.items())


# ---- the commands ----

def test_merge_and_predict(story, tmp_path):
    """The merged model computes what base and adapter compute, and its file can be handed to what follows."""
    name, out, _ = story
    script, flags, *_, kind = STORIES[name]
    base, adapter = out / "pretrain" / "model.pt", out / "runs" / "lora_rank=8-seed0" / "adapter.pt"
    call(script, "merge", *flags, "--init", base, "--adapter", adapter, "--out", tmp_path)
    merged = loop.load_model(tmp_path / "merged.pt", kind)[0].eval()
    model = base_of(name, out)
    if name == "glyphs":
        model.new_head(26)
        inputs = images.prepare(glyphs.glyphs("B").splits["test"][0][:30], 24, (0.5,), (0.5,))
    else:
        inputs = torch.arange(12)[None] % model.config.vocab_size
    with torch.no_grad():
        start = model.eval()(inputs)
        expected = load_adapter(model, adapter)(inputs)
        assert (merged(inputs) - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert (start - expected).abs().max() > 1e-5 * expected.abs().max(), "four steps must have changed it"
    pairs = (("--init", base, "--adapter", adapter), ("--init", tmp_path / "merged.pt"))
    if name == "glyphs":
        said = [call(script, "predict", *pair, "--device", "cpu", "--out", tmp_path) for pair in pairs]
        metric = next(r["metric"] for r in read(out)["rows"] if r["method"] == "lora:rank=8")
        assert all(f"glyphs B: accuracy {metric:.1f} on 78" in s for s in said)
        assert (tmp_path / "predictions.png").read_bytes().startswith(b"\x89PNG")
        assert "glyphs A: accuracy" in call(script, "predict", "--init", base, "--device", "cpu", "--out", tmp_path)
    else:
        prompt = "417-259=" if name == "arithmetic" else "The "
        said = [call(script, "generate", *flags, *pair, "--prompt", prompt, "--temperature", 0, "--length", 6,
                     "--device", "cpu", "--out", tmp_path) for pair in pairs]
        assert said[0] == said[1] and said[0].startswith(prompt) and len(said[0]) > len(prompt) + 1
    call(script, "finetune", *flags, "--method", "svfit", "--init", tmp_path / "merged.pt", "--steps", 2, "--device", "cpu",
         "--out", tmp_path)
    assert [r["method"] for r in read(tmp_path / "runs" / "svfit-seed0")["rows"]][-1] == "svfit"


def test_generate_depends_on_its_seed_and_flags(story, tmp_path):
    name, out, _ = story
    if name != "topics":
        pytest.skip("one text is enough")
    argv = ["generate", "--init", out / "pretrain" / "model.pt", "--prompt", "Größe: ", "--length", 12, "--device", "cpu",
            "--out", tmp_path]
    first = call(train_gpt, *argv)
    assert first.startswith("Größe: ") and call(train_gpt, *argv) == first
    assert call(train_gpt, *argv, "--seed", 1) != first
    assert call(train_gpt, *argv, "--top-k", 1) == call(train_gpt, *argv, "--temperature", 0)


@pytest.mark.parametrize("name", ["glyphs", "arithmetic"])
def test_pretrain(name, tmp_path):
    script, flags, *_ = STORIES[name]
    argv = ["pretrain", *flags, *MODEL[:-4], "--device", "cpu", "--steps", 3, "--out", tmp_path]
    printed = call(script, *argv)
    assert "3 steps" in printed and not (tmp_path / "results.json").exists()
    model, about = loop.load_model(tmp_path / "pretrain" / "model.pt", STORIES[name][-1])
    assert model.config.n_layer == 1 and model.config.d_model == 16 and about["flags"]["steps"] == 3
    assert "is reused" in call(script, *argv)
    other = [*argv[:-3], 5, "--out", tmp_path]
    with contextlib.redirect_stderr(io.StringIO()) as error:
        assert script.main([str(a) for a in other]) == 2
    assert "steps was 3 and is 5" in error.getvalue()


def test_compare_with_seeds_and_tuning(story, tmp_path):
    name, out, _ = story
    script, flags, reference, *_ = STORIES[name]
    words = [*(["head"] if reference == "head" else []), "full", "svfit", "lora:rank=8"]
    printed = call(script, "compare", *flags, "--methods", *words, "--seeds", 2, "--tune", 2, "--steps", 2, "--device", "cpu",
                   "--init", out / "pretrain" / "model.pt", "--out", tmp_path)
    content = read(tmp_path)
    rows = [r for r in content["rows"] if r["method"] != "start"]
    assert [(r["method"], r["seed"]) for r in rows] == [(w, s) for s in (0, 1) for w in words]
    assert list(content["tuning"]) == words
    for word, found in content["tuning"].items():
        rate = script.RATES["text" if name == "topics" else name][word]
        assert found["lr"] == pytest.approx([rate, 2 * rate])
        better = max if rows[0]["higher_is_better"] else min
        assert found["val"][found["lr"].index(found["best"])] == better(found["val"])
        assert {r["lr"] for r in rows if r["method"] == word} == {found["best"]}
    assert "minus lora:rank=8, paired" in printed and "mean ± standard deviation over seeds 0, 1" in printed
    digits = 3 if name == "topics" else 1
    full = [r["metric"] for r in rows if r["method"] == "full"]
    line = next(line for line in (tmp_path / "results.md").read_text(encoding="utf-8").splitlines() if line.startswith("| full"))
    assert f"{statistics.mean(full):.{digits}f} ± {statistics.stdev(full):.{digits}f}" in line
    assert (tmp_path / "tune.json").is_file() and len(list((tmp_path / "runs").iterdir())) == 2 * len(words)


@pytest.mark.parametrize("data, base, size", [("mnist", "fashionmnist", (28, 7, 1)), ("cifar10", "cifar100", (32, 8, 3))])
def test_real_pictures_from_their_files_to_a_prediction(data, base, size, tmp_path, monkeypatch):
    """Pretrained on one set, adapted to the other; both lie in --data-dir."""
    for name in (data, base):
        build(name, tmp_path / "data", monkeypatch)
    where = ["--data", data, "--data-dir", tmp_path / "data", "--out", tmp_path / "out", "--device", "cpu"]
    call(train_vit, "compare", "--methods", "head", "svft", *where, "--per-class", 5, *STEPS, *MODEL[:-2])
    kept = tmp_path / "out" / "pretrain" / "model.pt"
    model, about = loop.load_model(kept, ViT)
    assert (model.config.image_size, model.config.patch_size, model.config.in_channels) == size
    mean, std = picture_sets.REAL[base][1]
    assert (about["data"], about["mean"], about["std"], about["published"]) == (base, mean, std, False)
    row = next(r for r in read(tmp_path / "out")["rows"] if r["method"] == "svft")
    assert row["head"] == 10 * 17 and (tmp_path / "out" / "pictures.png").is_file()
    assert f"{base}: accuracy" in call(train_vit, "predict", *where, "--init", kept)
    adapter = tmp_path / "out" / "runs" / "svft-seed0" / "adapter.pt"
    said = call(train_vit, "predict", *where, "--init", kept, "--adapter", adapter)
    assert f"{data}: accuracy {row['metric']:.1f} on 30 test pictures" in said


def test_lr_and_targets_reach_the_runs(tmp_path):
    call(train_vit, "compare", "--methods", "lora:rank=2", "lora:rank=2@up", "--lr", 0.003, "--head-lr", 0.02, "--targets",
         "query,value", *MODEL, "--steps", 2, "--out", tmp_path)
    rows = read(tmp_path)["rows"]
    assert [r["adapter"] for r in rows] == [2 * 2 * 32, 2 * (16 + 64)] and {r["lr"] for r in rows} == {0.003}
    flags = json.loads((tmp_path / "runs" / "lora_rank=2-seed0" / "row.json").read_text(encoding="utf-8"))["flags"]
    assert (flags["lr"], flags["head_lr"], flags["targets"]) == (0.003, 0.02, ["query", "value"])


def test_a_finished_compare_is_not_made_again_with_resume(story, monkeypatch):
    name, out, _ = story
    script, flags, *_ = STORIES[name]
    rows = read(out)["rows"]
    monkeypatch.setattr(compare, "train", lambda *a, **k: pytest.fail("a run was made again"))
    argv = ["--quick", *flags, *MODEL, *STEPS, "--eval-every", 2, "--resume", "--out", out]
    call(script, *argv)
    assert read(out)["rows"] == rows
    with contextlib.redirect_stderr(io.StringIO()) as error:
        assert script.main([str(a) for a in [*argv, "--batch-size", 3]]) == 2
    assert "batch_size was" in error.getvalue() and "and is 3" in error.getvalue()


def test_a_diverged_method_is_shown_and_the_next_goes_on(tmp_path):
    printed = call(train_gpt, "compare", "--data", "arithmetic", "--methods", "full", "svfit", "--lr", 1e30, *MODEL,
                   "--steps", 12, "--out", tmp_path)
    rows = read(tmp_path)["rows"]
    assert [(r["method"], r["metric"]) for r in rows[1:]] == [("full", None), ("svfit", None)]
    cells = [line for line in printed.splitlines() if line.startswith("|") and "diverged" in line]
    assert len(cells) == 2 and "try a lower --lr" in printed and "nan |" not in printed


# ---- every method ----

LoRAXS = method_of_the_readme()


@pytest.mark.parametrize("name", ["glyphs", "arithmetic"])
def test_all_has_every_example_also_of_a_method_dropped_in(name, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "loraxs", LoRAXS)
    script, flags, *_ = STORIES[name]
    printed = call(script, "--all", *flags, *MODEL, "--steps", 1, "--out", tmp_path)
    rows = {r["method"]: r for r in read(tmp_path)["rows"]}
    done = [cli.same_method(w) for w in rows if w != "start"]
    assert len(set(done)) == len(done) and list(rows)[-len(done):][:len(script.MAIN)] == script.MAIN
    for method, cls in METHODS.items():
        for example in cls.examples:
            word = f"{method}:{example}".rstrip(":")
            if word == "svft:pattern=topk":
                word += "@query,key,value,out"     # up and down are not square
            assert cli.same_method(word) in done, word
    for peer in ("svft:pattern=banded@query,key,value,out", "svft:pattern=random@query,key,value,out"):
        assert cli.same_method(peer) in done
    assert rows["loraxs:rank=8"]["adapter"] == 6 * 64 and rows["loraxs:rank=8"]["lr"] == LoRAXS.lr
    assert "loraxs:rank=8" in printed
    told = {w for w, r in rows.items() if r["learned"]}
    assert told == {w for w in rows if w.startswith(("svf"))}
    assert (tmp_path / "runs" / "loraxs_rank=8-seed0" / "adapter.pt").is_file()


# ---- as a process ----

@pytest.mark.parametrize("script", ["train_gpt.py", "train_vit.py"])
def test_a_real_process(script, tmp_path):
    """From another working directory: --help works, and a bad flag is one line and exit code 2."""
    def process(*argv):
        return subprocess.run([sys.executable, str(ROOT / script), *argv], cwd=tmp_path, capture_output=True, text=True,
                              encoding="utf-8", env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120)

    good = process("--help")
    assert good.returncode == 0 and good.stderr == "" and "--save-every" in good.stdout
    bad = process("--lr", "0")
    assert bad.returncode == 2 and bad.stdout == ""
    assert len(bad.stderr.splitlines()) == 1 and "--lr" in bad.stderr and "Traceback" not in bad.stderr
    assert not list(tmp_path.iterdir())
