"""Adapter files: they give back the model wherever they are read, and say so where they do not fit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from adapted import ONE_EACH, OURS, SPECS, Net, assert_close, fit, fits, gpt, move, numbers, refused, train

import svmini.methods.svd
from svmini import GPT, GPTConfig, adapt, count_trainable, files, load_adapter, merge, save_adapter
from svmini.errors import InputError

SQUARE = [spec for spec in SPECS if fits(spec, 16, 16)]


def trained(spec="svft", base=None, **more):
    return move(fit(spec, base or Net(), **more))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "an adapter.pt"


def sum_of(path):
    return files.sha256_of(files.load(path, "adapter"))


def rewrite(path, change):
    """A file of another content that is whole, as if an svmini had written it: read, change, write."""
    content = files.load(path, "adapter")
    change(content)
    files.save(path, "adapter", content)


# ---------------------------------------------------------------- it gives back the model


@pytest.mark.parametrize("spec", ONE_EACH)
def test_it_gives_back_the_model(spec, path, tmp_path):
    """On bases of either precision with the same weights, in another mode; saved again it is the same file."""
    model, x = trained(spec), numbers(40, 16)
    save_adapter(model, path, {"data": "glyphs B", "classes": [1, 2]})
    assert files.load(path, "adapter")["metadata"] == {"data": "glyphs B", "classes": [1, 2]}
    svmini.methods.svd.clear_svd_cache()
    for dtype in (torch.float32, torch.float64):
        fresh = Net().to(dtype).eval()                      # the same float32 numbers, exactly, in float64
        assert load_adapter(fresh, str(path)) is fresh
        assert_close(fresh(x.to(dtype)).float(), model(x))
        assert {p.dtype for p in fresh.parameters()} == {dtype} and not any(m.training for m in fresh.modules())
        assert fresh.adaptation == model.adaptation
        with refused(fresh, InputError, "already adapted", "merge the model first"):
            load_adapter(fresh, path)
        assert [(n, p.requires_grad) for n, p in fresh.named_parameters()] == [
            (n, p.requires_grad) for n, p in model.named_parameters()]
    save_adapter(load_adapter(Net(), path), tmp_path / "again.pt", {"data": "glyphs B", "classes": [1, 2]})
    assert sum_of(path) == sum_of(tmp_path / "again.pt")


IN_ANOTHER_PROCESS = """
import sys, torch
sys.path[:0] = sys.argv[2:4]
from adapted import Net, numbers
from svmini import load_adapter
torch.set_num_threads(2)
torch.manual_seed(777)
folder = sys.argv[1]
out = [load_adapter(Net(), f"{folder}/{n}.pt")(numbers(20, 16)).detach() for n in range(int(sys.argv[4]))]
torch.save(out, folder + "/out.pt")
"""


def test_another_process_with_other_threads_gives_the_same_outputs(tmp_path):
    models, here = [trained(spec) for spec in SQUARE], Path(__file__).parent
    for n, model in enumerate(models):
        save_adapter(model, tmp_path / f"{n}.pt")
    subprocess.run([sys.executable, "-c", IN_ANOTHER_PROCESS, str(tmp_path), str(here.parent.parent), str(here),
                    str(len(models))], check=True, env=os.environ | {"PYTHONHASHSEED": "5"}, timeout=100)
    for got, model in zip(torch.load(tmp_path / "out.pt", weights_only=True), models, strict=True):
        assert_close(got, model(numbers(20, 16)))


# ---------------------------------------------------------------- what a file holds: nothing trained is lost


def test_a_file_is_small(path):
    """Numbers, probes and names of 24 matrices: less than a fifth of the base."""
    model = GPT(GPTConfig(vocab_size=50, block_size=16, n_layer=4, n_head=4, d_model=64))
    size = 4 * sum(p.numel() for p in model.parameters())
    save_adapter(adapt(model, "svft", pattern="plain"), path)
    assert count_trainable(model)["adapter"] == 24 * 64 and path.stat().st_size < size / 5


class Classified(nn.Module):
    """A classifier that is not called head, a BatchNorm, a bare parameter, and a buffer that is not of its weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.token = nn.Parameter(torch.randn(16))
        self.encoder = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
        self.norm = nn.BatchNorm1d(16)
        self.classifier = nn.Linear(16, 3)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x):
        self.calls += 1
        return self.classifier(self.norm(self.encoder(x + self.token)))


def steps(model):
    return train(model, lambda m: m(numbers(8, 16)).square().sum()).eval()


def test_a_trained_classifier_of_any_name_is_saved(path):
    model, x = Classified().eval(), numbers(5, 16)
    adapt(model, "svft", targets=("encoder.0",), also_train=("classifier",))
    steps(model)
    save_adapter(model, path)
    assert set(files.load(path, "adapter")["trained"]) == {"classifier.weight", "classifier.bias"}
    other = Classified().eval()
    other.classifier.reset_parameters()                     # it is not of the base
    assert_close(load_adapter(other, path)(x), model(x))


def test_what_was_unfrozen_by_hand_is_saved_by_its_name(path):
    model, x = adapt(Classified().eval(), "svft", targets=("encoder.0",), also_train=()), numbers(5, 16)
    for p in (model.token, model.encoder[2].bias, model.norm.weight):
        p.requires_grad_(True)
    steps(model)
    save_adapter(model, path)
    assert set(files.load(path, "adapter")["trained"]) == {"token", "encoder.2.bias", "norm.weight"}
    loaded = load_adapter(Classified().eval(), path)
    assert_close(loaded(x), model(x))
    assert count_trainable(loaded) == count_trainable(model) == {"adapter": 16 * 5 - 6, "head": 48, "total": 122}


def test_running_statistics_that_moved_are_refused_or_stored(path):
    model, x = Classified().train(), numbers(5, 16)
    steps(adapt(model, "svft", targets=("encoder.0",), also_train=("classifier",)))
    with refused(model, InputError, "norm.num_batches_tracked has changed", "BatchNorm in eval mode", "also_train"):
        save_adapter(model, path)
    assert not path.exists()
    again = Classified().train()
    steps(adapt(again, "svft", targets=("encoder.0",), also_train=("classifier", "norm")))
    save_adapter(again, path)
    assert_close(load_adapter(Classified(), path).eval()(x), again(x))
    assert {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"} <= set(
        files.load(path, "adapter")["trained"])


@torch.no_grad()
def change(model, name):
    (dict(model.named_parameters()) | dict(model.named_buffers()))[name].view(-1)[1] += 1e-3
    return model


@pytest.mark.parametrize("damage, specs", [
    (lambda m: change(m, "norm.weight"), ("norm.weight", "'norm' in also_train")),
    (lambda m: change(m, "shift"), ("shift",)), (lambda m: change(m, "query.bias"), ("query.bias",)),
    (lambda m: setattr(m, "extra", nn.Linear(2, 2).requires_grad_(False)), ("extra.weight",)),
    (lambda m: m.query.M.data.fill_(float("nan")), ("query.M", "not finite", "diverged")),
    (lambda m: m.head.bias.data.fill_(float("inf")), ("head.bias", "not finite", "diverged"))])
def test_what_a_file_would_not_hold_is_not_saved_in_silence(damage, specs, path):
    model = trained()
    damage(model)
    with refused(model, InputError, *specs):
        save_adapter(model, path)
    assert not path.exists()


def test_what_no_file_could_hold_is_not_written(path):
    for model, metadata, spec in ((trained(), {"file": Path("x")}, "plain values"), (trained(), [1], "dict as metadata"),
                               (adapt(Net(), "full"), None, "save the model itself"),
                               (merge(trained()), None, "not adapted")):
        with refused(model, InputError, spec):
            save_adapter(model, path, metadata)
    assert not list(path.parent.iterdir())


# ---------------------------------------------------------------- other bases


@pytest.mark.parametrize("where", ("query.weight", "query.bias", "norm.weight", "shift"))
def test_another_base_is_refused(where, path):
    save_adapter(trained(), path)
    model = change(Net(), where)
    with refused(model, InputError, str(path), "another base"):
        load_adapter(model, path)


def test_a_base_with_another_head_is_the_same_base(path):
    """The head is not of the base: it is stored with the adapter and put in place. It must be of the same shape."""
    model, x = trained(), numbers(5, 16)
    save_adapter(model, path)
    assert_close(load_adapter(change(Net(), "head.weight"), path)(x), model(x))
    other = Net(classes=5)
    with refused(other, InputError, str(path), "head.weight of shape (3, 16)", "(5, 16)"):
        load_adapter(other, path)
    other.head = nn.Identity()
    with refused(other, InputError, str(path), "head.", "no such tensor"):
        load_adapter(other, path)


def test_a_base_that_cannot_be_adapted_is_refused(path):
    save_adapter(trained(), path)
    lower, hooked = Net().bfloat16(), Net()
    hooked.value.register_forward_hook(lambda *parts: None)
    for model, specs in ((lower, ("bfloat16", "float32")), (hooked, ("value", "hooks"))):
        with refused(model, InputError, str(path), *specs):
            load_adapter(model, path)


def test_tied_weights_stay_tied(path):
    """The tied matrix is once in the fingerprint, and one matrix after loading."""
    tokens = torch.arange(8)[None]
    model = move(adapt(gpt(), "svft"))
    save_adapter(model, path)
    loaded = load_adapter(gpt(), path)
    assert loaded.head.weight is loaded.token_embedding.weight
    assert_close(loaded(tokens), model(tokens))


# ---------------------------------------------------------------- damaged and malformed files


def test_every_lost_or_changed_byte_is_seen(path):
    """Whatever byte it is: the file is refused by its name, or holds the very same content (a byte of padding)."""
    save_adapter(trained("svft:pattern=plain"), path)
    whole, plain, refusals = path.read_bytes(), sum_of(path), 0
    places = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))[:60].tolist()
    model = trained("svft:pattern=plain")
    numbers_at = [whole.index(t.detach().numpy().tobytes()) for t in (model.head.weight, model.value.M)]
    for at in places + [n + 3 for n in numbers_at]:         # + 3: the sign of a number
        for damaged in (whole[:at] + bytes([whole[at] ^ 0x80]) + whole[at + 1:], whole[:at] + whole[at + 1:]):
            path.write_bytes(damaged)
            try:
                assert sum_of(path) == plain
            except InputError as error:
                assert str(path) in str(error) and "\n" not in str(error)
                refusals += 1
            else:
                assert at - 3 not in numbers_at
    assert refusals > 60                                    # every lost byte, and most of the changed ones


def replace(*keys, by):
    def change(content):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = by
    return change


EDITS = {   # by hand, with torch.load and torch.save: the checksum is not that of the content any more
    "a sign of M": lambda c: c["layers"]["value"]["state"]["M"][2:3].neg_(),
    "the head": lambda c: c["trained"]["head.weight"].view(-1)[:1].add_(1e-6),
    "nan in the head": lambda c: c["trained"]["head.weight"].fill_(float("nan")),
    "an option": lambda c: c["layers"]["value"]["options"].update(seed=1), "metadata": replace("metadata", "data", by="B"),
    "a layer less": lambda c: c["layers"].pop("value"), "the base": replace("base", by="0" * 64)}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_file_is_refused(edit, path):
    """Also a single sign of small numbers, which the product W z alone would not always tell."""
    save_adapter(move(fit("svft", Net()), 1e-3), path)
    file = torch.load(path, weights_only=True)
    EDITS[edit](file["content"])
    torch.save(file, path)
    model = Net()
    with refused(model, InputError, str(path), "damaged", "SHA-256"):
        load_adapter(model, path)


VALUE = ("layers", "value")
MALFORMED = {   # whole files whose content is not an adapter's
    "a part less": lambda c: c.pop("base"), "a part more": replace("extra", by=1),
    "None for a dict": replace("layers", by=None), "a list for a dict": replace("trained", by=[]),
    "a layer is a list": replace(*VALUE, by=[1, 2]), "a list for its state": replace(*VALUE, "state", by=[]),
    "an unknown layer": lambda c: c["layers"].update(elsewhere=c["layers"]["value"]),
    "a layer that is none": lambda c: c["layers"].update(norm=c["layers"]["value"]),
    "an unknown method": replace("method", by="lorra"), "another method": replace("method", by="dora"),
    "an unknown option": replace("options", "ranks", by=4), "another alpha": replace(*VALUE, "options", "alpha", by=9),
    "an option out of range": replace(*VALUE, "options", "rank", by=99),
    "a lost tensor": lambda c: c["layers"]["value"]["state"].pop("A"),
    "one tensor more": replace(*VALUE, "state", "extra", by=torch.zeros(3)),
    "a cut tensor": replace(*VALUE, "state", "A", by=torch.zeros(1, 16)),
    "None for a tensor": replace(*VALUE, "state", "A", by=None),
    "nan": lambda c: c["layers"]["value"]["state"]["A"].fill_(float("nan")),
    "a cut probe": replace(*VALUE, "probe", by=torch.zeros(1)),
    "a head of another name": lambda c: c["trained"].update(tail=c["trained"].pop("head.weight")),
    "no tensor as head": replace("trained", "head.weight", by=1),
    "less of the head": lambda c: c["trained"].pop("head.weight")}


@pytest.mark.parametrize("change", MALFORMED)
def test_a_malformed_file_is_refused(change, path):
    """One InputError that names the file, whatever is wrong; the model is as it was."""
    save_adapter(trained("lora:rank=2"), path)
    rewrite(path, MALFORMED[change])
    model = Net()
    with refused(model, InputError, str(path)):
        load_adapter(model, path)


# ---------------------------------------------------------------- what would be wrong without an error: W z


def with_factors(monkeypatch, change):
    """Let thin_svd return other factors of the same weights, as another device_config might."""
    base, known = Net(), {}
    monkeypatch.setattr(svmini.methods.svd, "_known", known)
    for name in OURS:
        svmini.methods.svd.thin_svd(base.get_submodule(name).weight)
    for key, (U, S, Vt) in list(known.items()):
        known[key] = change(U.clone(), S.clone(), Vt.clone())


def flip_u(U, S, Vt):
    U[:, 4] *= -1
    return U, S, Vt


def flip_pair(U, S, Vt):
    U[:, 4] *= -1
    Vt[4] *= -1
    return U, S, Vt


@pytest.mark.parametrize("change, specs", [
    (flip_u, [spec for spec in SQUARE if spec.startswith("svf") and "basis" not in spec]),
    (flip_pair, ["svft:off_diagonals=2", "svft:pattern=random", "svft:pattern=topk"])])
def test_other_factors_of_the_same_base_are_refused(change, specs, path, monkeypatch):
    """Flipped vectors; and another valid decomposition, where M is not diagonal and would mean another matrix."""
    for spec in specs:
        save_adapter(trained(spec), path)
        load_adapter(Net(), path)
        with monkeypatch.context() as patch:
            with_factors(patch, change)
            model = Net()
            with refused(model, InputError, str(path), "query", "factors"):
                load_adapter(model, path)
