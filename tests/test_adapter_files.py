"""Adapter files: they give back the model wherever they are read, and say so where they do not fit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn

import svmini.svd
from conftest import SHAPES, Net, assert_close, cases, move, parse, refused, tokens
from svmini import GPT, METHODS, GPTConfig, adapt, count_trainable, files, load_adapter, save_adapter
from svmini.adapter import adapters

ROOT = Path(__file__).parent.parent
TARGETS = ("query", "value")
VARIANTS = [*cases(), ("svfit", "rank=3"), ("boft", "block_size=2,factors=3"), ("vera", "rank=5,seed=4"),
            ("lora", "rank=3,alpha=7"), ("svft", "pattern=random,seed=9"), ("svft", "off_diagonals=15")]


def base(dtype=torch.float32, shape="square", **changes):
    return Net(*SHAPES[shape], dtype=dtype, **changes)


def trained(method="svft", example="", **changes):
    return move(adapt(base(**changes), method, targets=TARGETS, **parse(example)))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapter.pt"


def rewrite(path, change):
    """Read a file, change its content, write it back."""
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


@pytest.mark.parametrize("method, example", VARIANTS)
def test_it_gives_back_the_model(method, example, path):
    """On bases of either precision with the same weights, and with other generators, modes and devices' states."""
    model, x = trained(method, example), tokens(40, 16, torch.float32)
    save_adapter(model, path)
    torch.manual_seed(54321)
    svmini.svd._known.clear()
    for dtype in (torch.float32, torch.float64):
        fresh = base().to(dtype).eval()                     # the same float32 numbers, exactly, in float64
        assert load_adapter(fresh, path) is fresh
        assert_close(fresh(x.to(dtype)).float(), model(x), 1e-5)
        assert {p.dtype for p in fresh.parameters()} == {dtype} and not any(m.training for m in fresh.modules())
        assert count_trainable(fresh) == count_trainable(model) and fresh.adaptation == model.adaptation
        for name, layer in adapters(fresh).items():
            for key, t in layer.state_dict().items():
                assert torch.equal(t, model.get_submodule(name).state_dict()[key].to(t.dtype))


@pytest.mark.parametrize("method, example", VARIANTS)
def test_a_loaded_model_saves_the_same_file(method, example, path, tmp_path):
    save_adapter(trained(method, example), path)
    save_adapter(load_adapter(base(), path), tmp_path / "again.pt")
    first, again = (torch.load(p, weights_only=True) for p in (path, tmp_path / "again.pt"))

    def flat(value, name=""):
        if isinstance(value, dict):
            return {k: v for key, part in value.items() for k, v in flat(part, f"{name}/{key}").items()}
        return {name: value}

    first, again = flat(first), flat(again)
    assert first.keys() == again.keys()
    for key, value in first.items():
        if torch.is_tensor(value):
            assert value.dtype == again[key].dtype and torch.equal(value, again[key]), key
        else:
            assert value == again[key], key


IN_ANOTHER_PROCESS = """
import sys, torch
sys.path[:0] = sys.argv[2:4]
from conftest import SHAPES, Net, tokens
from svmini import load_adapter
torch.set_num_threads(2)
torch.manual_seed(777)
folder = sys.argv[1]
names = torch.load(folder + "/names.pt", weights_only=True)
out = {}
for n, (shape, dtype) in enumerate(names):
    model = Net(*SHAPES[shape], dtype=getattr(torch, dtype))
    load_adapter(model, f"{folder}/{n}.pt")
    out[n] = model(tokens(20, SHAPES[shape][1], getattr(torch, dtype))).detach()
torch.save(out, folder + "/out.pt")
"""


def test_another_process_with_other_threads_gives_the_same_outputs(tmp_path):
    names, expected = [], []
    for method, example in cases():
        for shape, dtype in (("square", "float32"), ("wide", "float32"), ("tall", "float64")):
            try:
                model = trained(method, example, shape=shape, dtype=getattr(torch, dtype))
            except ValueError:
                continue                                    # the options do not fit this shape
            save_adapter(model, tmp_path / f"{len(names)}.pt")
            names.append((shape, dtype))
            expected.append(model(tokens(20, SHAPES[shape][1], getattr(torch, dtype))).detach())
    assert len(names) >= 3 * len(cases()) - 6
    torch.save(names, tmp_path / "names.pt")
    environment = os.environ | {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive", "PYTHONHASHSEED": "5"}
    subprocess.run([sys.executable, "-c", IN_ANOTHER_PROCESS, str(tmp_path), str(ROOT), str(ROOT / "tests")],
                   check=True, env=environment, timeout=100)
    got = torch.load(tmp_path / "out.pt", weights_only=True)
    for n, (shape, dtype) in enumerate(names):
        assert_close(got[n], expected[n], 1e-5 if dtype == "float32" else 1e-10)


# ---------------------------------------------------------------- refusals


def one_weight_changed(where):
    model = base()
    with torch.no_grad():
        model.get_parameter(where).view(-1)[3] += 1e-3
    return model


@pytest.mark.parametrize("where", ("query.weight", "query.bias", "norm.weight", "value.weight"))
def test_another_base_is_refused(where, path):
    save_adapter(trained(), path)
    model = one_weight_changed(where)
    with refused(model, ValueError, "another base"):
        load_adapter(model, path)


def test_a_base_with_another_head_is_the_same_base(path):
    """The head is not of the base: it is stored with the adapter and put in place."""
    model, x = trained(), tokens(5, 16, torch.float32)
    save_adapter(model, path)
    assert_close(load_adapter(one_weight_changed("head.weight"), path)(x), model(x), 1e-5)


def drop(content, *keys):
    for key in keys[:-1]:
        content = content[key]
    del content[keys[-1]]


@pytest.mark.parametrize("method, example, key", [
    ("svft", "", "M"), ("svft", "pattern=topk", "where"), ("svft", "pattern=random", "where"), ("svfit", "", "s"),
    ("lora", "", "A"), ("dora", "", "m"), ("vera", "", "d"), ("boft", "", "Q")])
def test_a_missing_key_is_refused(method, example, key, path):
    save_adapter(trained(method, example), path)
    rewrite(path, lambda content: drop(content, "layers", "value", "state", key))
    model = base()
    with refused(model, ValueError, "value", key):
        load_adapter(model, path)


@pytest.mark.parametrize("method", METHODS)
def test_a_surplus_key_is_refused(method, path):
    save_adapter(trained(method), path)
    rewrite(path, lambda content: content["layers"]["value"]["state"].update(extra=torch.zeros(3)))
    model = base()
    with refused(model, ValueError, "value", "extra"):
        load_adapter(model, path)


def test_a_misshapen_tensor_is_refused(path):
    save_adapter(trained("lora", "rank=4"), path)
    rewrite(path, lambda content: content["layers"]["query"]["state"].update(A=torch.zeros(3, 16)))
    model = base()
    with refused(model, ValueError, "query", "A"):
        load_adapter(model, path)


TOP_KEYS = ("method", "options", "targets", "base", "layers", "head")   # `about` may be missing: it is for the reader


@pytest.mark.parametrize("key", TOP_KEYS + ("format", "kind"))
def test_a_file_without_one_of_its_parts_is_refused(key, path):
    save_adapter(trained(), path)
    assert set(torch.load(path, weights_only=True)) == {*TOP_KEYS, "about", "kind", "format"}
    rewrite(path, lambda content: content.pop(key))
    model = base()
    with refused(model, ValueError):
        load_adapter(model, path)


@pytest.mark.parametrize("keys", [("layers", "value", "options"), ("layers", "value", "state"),
                                  ("layers", "value", "probe"), ("head", "weight"), ("head", "bias")], ids=str)
def test_a_file_without_a_part_of_a_layer_is_refused(keys, path):
    save_adapter(trained(), path)
    rewrite(path, lambda content: drop(content, *keys))
    model = base()
    with refused(model, ValueError):
        load_adapter(model, path)


def test_a_file_with_other_layers_than_its_targets_is_refused(path):
    """One too many, and one too few, which would load half an adapter in silence."""
    for change, word in ((lambda layers: layers.update(elsewhere=layers["value"]), "elsewhere"),
                         (lambda layers: layers.pop("value"), "value")):
        save_adapter(trained(), path)
        rewrite(path, lambda content: change(content["layers"]))
        model = base()
        with refused(model, ValueError, "damaged", word):
            load_adapter(model, path)


@pytest.mark.parametrize("share", (0, 0.01, 0.3, 0.7, 0.95, 0.999))
def test_a_truncated_file_is_refused(share, path):
    save_adapter(trained(), path)
    content = path.read_bytes()
    path.write_bytes(content[:int(share * len(content))])
    model = base()
    with refused(model, ValueError, str(path), "readable"):
        load_adapter(model, path)


@pytest.mark.parametrize("method", ("svft", "lora"))
def test_a_flipped_byte_of_a_tensor_is_refused(method, path):
    """Whatever the archive says to it: the matrix would come out wrong."""
    model = trained(method)
    save_adapter(model, path)
    content = bytearray(path.read_bytes())
    numbers = bytes(next(iter(model.value.state_dict().values())).detach().numpy().tobytes())
    at = content.find(numbers)
    assert at > 0
    content[at + 3] ^= 0x7F                                 # sign and exponent of its first number
    path.write_bytes(content)
    fresh = base()
    with refused(fresh, ValueError, str(path)):
        load_adapter(fresh, path)


@pytest.mark.parametrize("version", (2, 17))
def test_a_later_format_is_refused(version, path):
    save_adapter(trained(), path)
    rewrite(path, lambda content: content.update(format=version))
    model = base()
    with refused(model, ValueError, f"format {version}", "newer"):
        load_adapter(model, path)


OTHERS = {"run": lambda path: files.save(path, "run", {"model": base().state_dict(), "step": 5}),
          "model": lambda path: files.save(path, "model", {"state": base().state_dict()}),
          "state dict": lambda path: torch.save(base().state_dict(), path),
          "dict": lambda path: torch.save({"a": 1, "format": 1}, path),
          "tensor": lambda path: torch.save(torch.zeros(3), path),
          "whole module": lambda path: torch.save(nn.Linear(2, 2), path),   # would run code: not unpickled
          "text": lambda path: path.write_text("not an adapter\nat all\n", encoding="utf-8"),
          "empty": lambda path: path.write_bytes(b"")}


@pytest.mark.parametrize("kind", OTHERS)
def test_another_kind_of_file_is_refused(kind, path):
    OTHERS[kind](path)
    model = base()
    with refused(model, ValueError, str(path), "svmini adapter"):
        load_adapter(model, path)


def test_an_adapter_is_not_taken_for_another_kind(path):
    save_adapter(trained(), path)
    with pytest.raises(ValueError, match="svmini adapter, not an svmini run"):
        files.load(path, "run")


def test_a_missing_file(path, tmp_path):
    model = base()
    for missing in (path, tmp_path, tmp_path / "no" / "folder.pt"):     # a folder is no file either
        with refused(model, FileNotFoundError, str(missing)):
            load_adapter(model, missing)
    assert not (tmp_path / "no").exists()


# ---------------------------------------------------------------- what would be wrong without an error


def with_factors(monkeypatch, change):
    """Let thin_svd return other factors of the same weights, as another machine might."""
    true = svmini.svd.thin_svd
    base_model = base()
    known = {}
    monkeypatch.setattr(svmini.svd, "_known", known)
    for name in TARGETS:
        true(base_model.get_submodule(name).weight)
    for key, (U, S, Vt) in list(known.items()):
        known[key] = change(U.clone(), S.clone(), Vt.clone())


def flip_u(U, S, Vt):
    U[:, 4] *= -1
    return U, S, Vt


def flip_pair(U, S, Vt):
    U[:, 4] *= -1
    Vt[4] *= -1
    return U, S, Vt


def rotate_pair(U, S, Vt):
    """Where two singular values coincide, any rotation of their vectors is a singular value decomposition too."""
    turn = torch.tensor([[0.8, -0.6], [0.6, 0.8]])
    U[:, 4:6] = U[:, 4:6] @ turn
    Vt[4:6] = turn.t() @ Vt[4:6]
    return U, S, Vt


@pytest.mark.parametrize("method, example", [
    ("svfit", ""), ("svfit", "rank=8"), *(("svft", e) for e in METHODS["svft"].examples)])
def test_a_flipped_singular_vector_is_refused(method, example, path, monkeypatch):
    save_adapter(trained(method, example), path)
    load_adapter(base(), path)
    with_factors(monkeypatch, flip_u)
    model = base()
    with refused(model, ValueError, "query", "factors"):
        load_adapter(model, path)


@pytest.mark.parametrize("example", ("off_diagonals=2", "off_diagonals=8", "pattern=random", "pattern=topk"))
@pytest.mark.parametrize("change", (flip_pair, rotate_pair))
def test_a_valid_svd_with_other_vectors_is_refused_where_m_is_not_diagonal(example, change, path, monkeypatch):
    """M would silently mean another matrix."""
    save_adapter(trained("svft", example), path)
    with_factors(monkeypatch, change)
    model = base()
    with refused(model, ValueError, "query", "factors"):
        load_adapter(model, path)


@pytest.mark.parametrize("method, example", [("svfit", ""), ("svft", "pattern=plain")])
def test_a_pair_that_flips_together_changes_nothing_where_m_is_diagonal(method, example, path, monkeypatch):
    model, x = trained(method, example), tokens(5, 16, torch.float32)
    save_adapter(model, path)
    with_factors(monkeypatch, flip_pair)
    assert_close(load_adapter(base(), path)(x), model(x), 1e-5)


@pytest.mark.parametrize("method, key", [("svft", "M"), ("svfit", "s"), ("lora", "A"), ("lora", "B"), ("dora", "m"),
                                         ("vera", "b"), ("vera", "d"), ("boft", "Q")])
@pytest.mark.parametrize("value", (0.5, float("nan"), float("inf")))
def test_changed_numbers_are_refused(method, key, value, path):
    save_adapter(trained(method), path)

    def change(content):
        content["layers"]["value"]["state"][key].view(-1)[2] += value
    rewrite(path, change)
    model = base()
    with refused(model, ValueError, "value"):
        load_adapter(model, path)


@pytest.mark.parametrize("example", ("pattern=random", "pattern=topk"))
def test_changed_positions_are_refused(example, path):
    save_adapter(trained("svft", example), path)

    def change(content):
        where = content["layers"]["value"]["state"]["where"]
        free = next(n for n in range(256) if n not in where.tolist())
        where[2] = free
    rewrite(path, change)
    model = base()
    with refused(model, ValueError, "value"):
        load_adapter(model, path)


@pytest.mark.parametrize("changes", [{"seed": 5}, {"seed": 0}])
def test_another_stream_of_veras_is_refused(changes, path):
    save_adapter(trained("vera", "rank=5,seed=4"), path)
    load_adapter(base(), path)
    rewrite(path, lambda content: content["layers"]["value"]["options"].update(changes))
    model = base()
    with refused(model, ValueError, "value"):
        load_adapter(model, path)


@pytest.mark.parametrize("method, example, changes", [
    ("lora", "rank=4", {"alpha": 9}), ("lora", "rank=4", {"rank": 5}), ("svfit", "", {"rank": 8}),
    ("svft", "", {"off_diagonals": 3}), ("boft", "", {"block_size": 2}), ("boft", "", {"factors": 1}),
    ("lora", "rank=4", {"ranks": 4}), ("lora", "rank=4", {"rank": 400})])
def test_changed_options_are_refused(method, example, changes, path):
    save_adapter(trained(method, example), path)
    rewrite(path, lambda content: content["layers"]["value"]["options"].update(changes))
    model = base()
    with refused(model, ValueError):
        load_adapter(model, path)


def test_another_method_is_refused(path):
    save_adapter(trained("lora", "rank=4"), path)
    for method in ("dora", "svft", "lorra"):
        rewrite(path, lambda content: content.update(method=method))
        model = base()
        with refused(model, ValueError):
            load_adapter(model, path)


# ---------------------------------------------------------------- heads


def without_head(seed=0):
    model = base(seed=seed)
    model.head = nn.Identity()
    return model


def test_a_head_of_another_size_is_refused(path):
    save_adapter(trained(), path)
    model = base(classes=5)
    with refused(model, ValueError, "weight (3, 16)", "weight (5, 16)"):
        load_adapter(model, path)


def test_a_head_with_another_bias_is_refused(path):
    save_adapter(trained(), path)
    model = base()
    model.head = nn.Linear(16, 3, bias=False)
    with refused(model, ValueError, "head", "bias"):
        load_adapter(model, path)


def test_a_head_that_is_on_one_side_only_is_refused(path):
    save_adapter(trained(), path)
    model = without_head()
    with refused(model, ValueError, "weight (3, 16)", "no head"):
        load_adapter(model, path)
    save_adapter(move(adapt(without_head(), "svft", targets=TARGETS)), path)
    model = base()
    with refused(model, ValueError, "no head", "3"):
        load_adapter(model, path)
    assert adapters(load_adapter(without_head(), path))     # and both without one are fine


# ---------------------------------------------------------------- models that are not as they should be


@pytest.mark.parametrize("now", [*METHODS])
def test_an_adapted_model_is_refused(now, path):
    save_adapter(trained(), path)
    model = trained(now)
    with refused(model, ValueError, "already adapted", "merge"):
        load_adapter(model, path)


def test_what_leaves_no_adapter_is_not_saved(path):
    for model, words in ((base(), ("adapt",)), (adapt(base(), "full"), ("full", "checkpoint"))):
        with refused(model, ValueError, *words):
            save_adapter(model, path)
    assert not path.exists() and not list(path.parent.iterdir())


def test_a_failed_save_leaves_what_was_there(path, monkeypatch):
    save_adapter(trained(), path)
    before = path.read_bytes()

    def full_disk(content, file):
        file.write(b"half")
        raise OSError("No space left on device")
    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_adapter(trained("lora"), path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


# ---------------------------------------------------------------- what a file holds


@pytest.mark.parametrize("method, example", VARIANTS)
def test_a_file_holds_what_was_trained_and_nothing_of_the_base(method, example, path):
    model = trained(method, example)
    save_adapter(model, path)
    content = torch.load(path, weights_only=True)           # tensors and plain values only
    assert content["kind"] == "svmini adapter" and content["format"] == 1 and content["method"] == method
    assert content["targets"] == list(TARGETS) and len(content["base"]) == 64
    for name, layer in adapters(model).items():
        saved = content["layers"][name]
        positions = {"where"} if method == "svft" and layer.options["pattern"] in ("random", "topk") else set()
        assert set(saved["state"]) == {n for n, _ in layer.named_parameters()} | positions
        assert saved["probe"].shape == (16,) and saved["probe"].dtype == torch.float64
        assert saved["options"].keys() == layer.options.keys()
        for tensor in saved["state"].values():              # U, V, W0, A and B of VeRA's: none is there
            for frozen in (b for n, b in layer.named_buffers() if n not in positions):
                assert tensor.shape != frozen.shape or not torch.equal(tensor, frozen)
    assert set(content["head"]) == {"weight", "bias"}


def test_a_file_is_small(path):
    """Numbers, probes and names of 24 matrices: less than a fifth of the base."""
    model = GPT(GPTConfig(vocab_size=50, block_size=16, n_layer=4, n_head=4, d_model=64))
    size = 4 * sum(p.numel() for p in model.parameters())
    adapt(model, "svft", pattern="plain")
    save_adapter(model, path)
    numbers = count_trainable(model)["adapter"]
    probes = 8 * sum(a.d_out for a in adapters(model).values())
    assert numbers == 24 * 64
    overhead = 2000 * len(adapters(model))                  # names, options, and alignment of each tensor
    assert path.stat().st_size < 4 * numbers + probes + overhead < size / 5
