"""Adapter files: they restore the model wherever they are read, and say so if they do not fit."""

import io

import pytest
import torch
import torch.nn as nn
from torch.nn.utils import prune

from helpers import ROOT, SQUARE, Net, adapt_spec, assert_close, move, noise, rejected, same, take_steps
from svmini import GPT, GPTConfig, adapt, count_trainable, files, load_adapter, merge, save_adapter
from svmini.methods import svfit, svft
from svmini.methods.svd import clear_svd_cache, thin_svd


def trained(spec="svft", base=None, **more):
    return move(adapt_spec(spec, base or Net(), **more))


def read(path):
    return files.load(path, "adapter")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "an adapter.pt"


# ---------------------------------------------------------------- a file restores the model


@pytest.mark.parametrize("spec", SQUARE)
def test_a_file_restores_the_model(spec, path, tmp_path):
    """On bases in float32 and float64 in evaluation mode. Saved again it is the same file."""
    model, x = trained(spec), noise(40, 16)
    save_adapter(model, path, {"data": "glyphs B", "classes": [1, 2]})
    clear_svd_cache()
    torch.manual_seed(777)
    for dtype in (torch.float32, torch.float64):
        fresh = Net().to(dtype).eval()                      # the same float32 values, exactly, in float64
        assert load_adapter(fresh, str(path)) is fresh
        assert_close(fresh(x.to(dtype)).float(), model(x))
        assert {p.dtype for p in fresh.parameters()} == {dtype} and not any(m.training for m in fresh.modules())
        assert fresh.adaptation | {"dtype": 0, "frozen": 0} == model.adaptation | {"dtype": 0, "frozen": 0}
        assert {n for n, p in fresh.named_parameters() if p.requires_grad} == {
            n for n, p in model.named_parameters() if p.requires_grad}
    save_adapter(again := load_adapter(Net(), path), tmp_path / "again.pt", {"data": "glyphs B", "classes": [1, 2]})
    assert same(read(path), read(tmp_path / "again.pt"))
    with rejected(again, "already adapted", "merge the model first"):
        load_adapter(again, path)


def test_file_objects_work_like_paths():
    model, buffer, other = trained(), io.BytesIO(), Net(seed=1)
    save_adapter(model, buffer)
    assert torch.equal(load_adapter(Net(), io.BytesIO(buffer.getvalue()))(noise(5, 16)), model(noise(5, 16)))
    with rejected(other, "BytesIO object", "it was trained on another base"):
        load_adapter(other, io.BytesIO(buffer.getvalue()))
    for damaged in (buffer, io.StringIO("text")):
        with rejected(other, "is not a readable svmini adapter"):   # the first one is at its end
            load_adapter(other, damaged)


def test_a_file_is_small_and_tied_weights_stay_tied(path):
    """Less than a fifth of the base: no frozen tensor is stored. The tied matrix is in the fingerprint once."""
    def base():
        torch.manual_seed(0)
        return GPT(GPTConfig(vocab_size=50, block_size=16, n_layer=4, n_head=4, d_model=64))

    tokens, model = torch.arange(8)[None], move(adapt(base(), "svft", pattern="plain"))
    save_adapter(model, path)
    assert path.stat().st_size < sum(p.numel() for p in base().parameters()) * 4 / 5
    loaded = load_adapter(base(), path)
    assert loaded.head.weight is loaded.token_embedding.weight
    assert_close(loaded(tokens), model(tokens))


# ---------------------------------------------------------------- everything that was trained is in the file


class Classified(nn.Module):
    """A classifier that is not called head, running statistics, a bare parameter, and a buffer that is not saved."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.token = nn.Parameter(torch.randn(16))
        self.encoder = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
        self.norm = nn.BatchNorm1d(16)
        self.bounded = nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16))
        self.classifier = nn.Linear(16, 3)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x):
        self.calls += 1
        return self.classifier(self.bounded(self.norm(self.encoder(x + self.token))))


@pytest.mark.parametrize("method, count", [("svft", 16 * 5 - 6), ("head", 0)])
def test_everything_that_training_changed_is_saved(method, count, path, tmp_path):
    """A classifier of any name, what was unfrozen by hand, running statistics. The base is still the same base."""
    model, other, x = Classified(), Classified().eval(), noise(5, 16)
    adapt(model, method, targets=("encoder.0",), also_train=("classifier",))
    by_hand = {"token": model.token, "encoder.2.bias": model.encoder[2].bias, "norm.weight": model.norm.weight}
    for p in by_hand.values():
        p.requires_grad_(True)
    take_steps(model, lambda m: m(noise(8, 16)).square().sum()).eval()
    save_adapter(model, path)
    assert read(path)["trained"].keys() == by_hand.keys() | {
        "classifier.weight", "classifier.bias", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked",
        "bounded.parametrizations.weight.0._u", "bounded.parametrizations.weight.0._v"}
    other.classifier.reset_parameters()                     # it is not part of the base
    assert torch.equal(load_adapter(other, path)(x), model(x)) and not any(b.requires_grad for b in other.buffers())
    assert count_trainable(other) == count_trainable(model) == {"adapter": count, "head": 51 + 48, "total": count + 99}
    save_adapter(other, tmp_path / "again.pt")
    assert same(read(path), read(tmp_path / "again.pt"))
    with rejected(changed := change(Classified(), "encoder.2.weight"), "another base"):
        load_adapter(changed, path)
    with rejected(change(model, "norm.bias"), "norm.bias has changed since adapt", "into also_train"):
        save_adapter(model, path)


def change(model, name, by=1e-3):
    model.state_dict()[name].view(-1)[1] += by
    return model


def with_parts(model, **parts):
    for name, part in parts.items():
        setattr(model, name, part)
    return model


@pytest.mark.parametrize("make, parts", [
    (lambda: change(trained(), "query.bias"), ("query.bias",)), (lambda: with_parts(trained(), shift=None), ("shift",)),
    (lambda: with_parts(trained(), extra=nn.Linear(2, 2).requires_grad_(False)), ("extra.weight",)),
    (lambda: with_parts(trained(), extra=nn.BatchNorm1d(2, affine=False)), ("extra.running_mean",)),
    *((lambda name=name: change(trained(), name, torch.inf), (name, "not finite", "diverged"))
      for name in ("query.M", "shift", "head.bias")),
    (lambda: adapt(Net(), "full"), ("save the model itself",)), (lambda: merge(trained()), ("not adapted",))])
def test_what_a_file_could_not_restore_is_not_saved(make, parts, path):
    with rejected(model := make(), *parts):
        save_adapter(model, path)
    with rejected(model := trained(), "plain values"):
        save_adapter(model, path, {"root": ROOT})
    assert not path.exists()


# ---------------------------------------------------------------- other bases


@pytest.mark.parametrize("make, parts", [
    *((lambda name=name: change(Net(), name), ("another base",))
      for name in ("query.weight", "query.bias", "norm.weight", "shift")),
    (lambda: Net(classes=5), ("head.bias of shape (3,)", "(5,)")),
    (lambda: with_parts(Net(), head=nn.Identity()), ("head.", "no such tensor")),
    (lambda: with_parts(Net(), head=nn.Linear(16, 3).bfloat16()), ("head.bias", "torch.float32", "torch.bfloat16")),
    (lambda: with_parts(Net(), value=prune.identity(nn.Linear(16, 16), "weight")), ("value", "hooks")),
    (lambda: with_parts(Net(), value=nn.Identity()), ("value", "Identity")),
    (lambda: nn.Sequential(nn.Linear(16, 16)), ("query, which is not in the model",))])
def test_another_base_is_rejected(make, parts, path):
    save_adapter(trained(), path)
    with rejected(model := make(), str(path), *parts):
        load_adapter(model, path)


def test_a_base_with_another_head_is_the_same_base(path):
    """The head is not part of the base: it is stored with the adapter and restored."""
    model, x = trained(), noise(5, 16)
    save_adapter(model, path)
    assert_close(load_adapter(change(Net(), "head.weight"), path)(x), model(x))


# ---------------------------------------------------------------- files of other methods, and other factors


@pytest.mark.parametrize("edit, part", [
    (lambda c, value: c.update(method="lorra"), "lorra"), (lambda c, value: value["options"].update(ranks=4), "ranks"),
    (lambda c, value: value["state"].pop("A"), "does not reproduce"),
    (lambda c, value: value["state"].update(extra=torch.zeros(3)), "extra"),
    (lambda c, value: value["options"].update(alpha=9), "does not reproduce")])
def test_a_file_of_a_method_that_has_changed_since_is_rejected(edit, part, path):
    save_adapter(trained("lora:rank=2"), path)
    content = read(path)
    edit(content, content["layers"]["value"])
    files.save(path, "adapter", content)
    with rejected(model := Net(), str(path), part):
        load_adapter(model, path)


@pytest.mark.parametrize("flipped, specs", [
    ("U", [spec for spec in SQUARE if spec.startswith("svf") and "basis" not in spec]),
    ("U V", ["svft:off_diagonals=2", "svft:pattern=random", "svft:pattern=topk"])])
def test_other_factors_of_the_same_base_are_rejected(flipped, specs, path, monkeypatch):
    """As another machine might compute them: a flipped vector, or a flipped pair, which is a valid decomposition, in
    which an M that is not diagonal means another matrix."""
    def flip(weight):
        U, S, Vt = thin_svd(weight)
        U[:, 4] *= -1
        Vt[4] *= -1 if "V" in flipped else 1
        return U, S, Vt

    for spec in specs:
        save_adapter(trained(spec), path)
        load_adapter(Net(), path)
        with monkeypatch.context() as patch:
            for module in (svfit, svft):
                patch.setattr(module, "thin_svd", flip)
            with rejected(model := Net(), str(path), "query", "factors"):
                load_adapter(model, path)
