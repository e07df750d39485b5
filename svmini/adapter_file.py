"""Adapter files: what was trained, and what it belongs to.

M alone cannot be read again: it counts between singular vectors whose signs are arbitrary, and on one base only. So a
file also holds a fingerprint of the base and, for each adapted matrix, the product W z with one fixed vector z. The
loader builds the adapters anew from the base it is given, and refuses where these do not come out as they were.
"""

import torch
from tqdm import tqdm

from . import files
from .adapting import (adaptation_of, adapters_of, build, check_fit, digest, digests, exactly, fingerprint, is_inside,
                       modules_of, put, tensors_of, unadapted, unwrap, why_not)
from .errors import InputError
from .methods import check_options

CLOSE = 1e-4   # of the length of W z: what another device_config's rounding may change
PARTS = {"method": str, "options": dict, "targets": list, "also_train": list, "base": str, "metadata": dict,
         "layers": dict, "trained": dict}
PARTS_OF_A_LAYER = {"options": dict, "state": dict, "probe": torch.Tensor}


def save_adapter(model, path, metadata=None):
    """Write what was trained to one small file, whole or not at all. metadata: a dict of plain values for who reads it
    again, such as the data's name.

    It holds the method, its options, targets and layers, the fingerprint of the base, for each adapted layer the
    options as resolved there, the trained numbers (with the positions of svft's random and topk) and W z; and every
    other tensor that was trained, by name: the modules of also_train, and what was unfrozen by hand.
    Raises InputError for a model that was not adapted, or in full (which belongs into a checkpoint), for numbers that
    are not finite, and where something has changed that the file would not hold, such as the running statistics of a
    BatchNorm.
    """
    model = unwrap(model)
    what = adaptation_of(model, "there is no adapter to save")
    if what["method"] == "full":
        raise InputError("full fine-tuning changes every weight and leaves no adapter: save the model itself")
    adapters = adapters_of(model)
    for name, p in model.named_parameters():
        if p.requires_grad and not p.isfinite().all():
            raise InputError(f"{name} holds numbers that are not finite: the training has diverged, take a lower rate")
    with exactly(model), torch.no_grad():
        trained = on_cpu({name: t for name, t in tensors_of(model).items() if not is_inside(name, adapters)
                          and (t.requires_grad or is_inside(name, what["also_train"]))})
        check_unmoved(model, what["before"], adapters, trained)
        layers = {name: {"options": part.options, "state": on_cpu(part.state_dict()), "probe": probe(part.weight)}
                  for name, part in adapters.items()}
    content = {key: what[key] for key in ("method", "options", "targets", "also_train")} | {
        "base": fingerprint(what["before"], trained), "metadata": metadata or {}, "layers": layers, "trained": trained}
    check_parts("an adapter file", content, PARTS)
    files.save(path, "adapter", content)


def check_unmoved(model, before, adapters, trained):
    """Raise InputError where something of the base has changed since adapt that is not among what is trained."""
    now = {n: digest(t) for n, t in tensors_of(model).items() if not is_inside(n, adapters)}
    now |= {f"{n}.bias": digest(part.bias) for n, part in adapters.items() if part.bias is not None}
    left_out = trained.keys() | {f"{n}.weight" for n in adapters}
    for name in before | now:
        if name not in left_out and before.get(name) != now.get(name):
            part = name.rpartition(".")[0]
            raise InputError(f"{name} has changed since adapt, and is not among what is trained: keep it fixed "
                             "(BatchNorm in eval mode)" + (f", or adapt with {part!r} in also_train" if part else ""))


def load_adapter(model, path):
    """Build the adapters that a file holds on the plain base model they were trained on, in place; returns the model.

    Raises MissingFile, or InputError where the file is damaged, of another kind or format, made for another base, or
    where an adapted matrix does not come out as it was (W z within 1e-4). The model is then as it was.
    """
    content, inner = files.load(path, "adapter"), unadapted(model)
    with exactly(inner), torch.no_grad():
        before, tensors = digests(inner), tensors_of(inner)
        try:
            check_content(content, inner, tensors, before)
            layers = adapters_from(content, inner)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        put(inner, layers)
        for name, value in content["trained"].items():
            tensors[name].copy_(value)
            tensors[name].requires_grad_(isinstance(tensors[name], torch.nn.Parameter))
    inner.adaptation = {key: content[key] for key in ("method", "options", "targets", "also_train")} | {
        "layers": list(adapters_of(inner)), "before": before}
    return model


def check_content(content, model, tensors, before):
    """Raise InputError unless a file's content has all its parts and belongs to a model, of these tensors and
    digests."""
    check_parts("it", content, PARTS)
    check_options(content["method"], content["options"])
    modules = modules_of(model)
    for name in content["layers"]:
        reason = why_not(modules[name]) if name in modules else "is not in the model"
        if reason:
            raise InputError(f"it adapts {name}, which {reason}")
    for name, value in content["trained"].items():
        shape = tuple(value.shape) if isinstance(value, torch.Tensor) else "no tensor"
        has = tuple(tensors[name].shape) if name in tensors else "no such tensor"
        if shape != has:
            raise InputError(f"it holds {name} of shape {shape}, the model has {has}")
    if content["base"] != fingerprint(before, content["trained"]):
        raise InputError("it was trained on another base model: load the checkpoint or weights it started from, "
                         "a ViT at the same image size")


def check_parts(what, content, parts):
    """Raise InputError unless content is a dict of these parts {key: type}, and of no others."""
    if not isinstance(content, dict) or content.keys() != parts.keys():
        raise InputError(f"{what} should hold {', '.join(parts)}, and nothing else")
    for key, kind in parts.items():
        if not isinstance(content[key], kind):
            raise InputError(f"{what} should hold a {kind.__name__} as {key}, not a {type(content[key]).__name__}")


def adapters_from(content, model):
    """{path of a layer: its adapter} of a file's content, each checked against the model's layer and its own W z."""
    method, layers = content["method"], {}
    for name, saved in tqdm(content["layers"].items(), "load adapter", leave=False, delay=2, disable=None):
        check_parts(f"its layer {name}", saved, PARTS_OF_A_LAYER)
        check_options(method, saved["options"])
        linear = model.get_submodule(name)
        check_fit(name, linear, method, saved["options"])
        layers[name] = build(name, linear, method, saved["options"])
        try:
            layers[name].load_state_dict(saved["state"])
        except (RuntimeError, AttributeError) as error:
            raise InputError(f"its layer {name} does not fit: {files.one_line(error)}") from None
        Wz, was = probe(layers[name].weight), saved["probe"].double()
        if Wz.shape != was.shape or not (Wz - was).norm() <= CLOSE * was.norm():   # `not <=` also catches nan
            raise InputError(f"it does not give back the matrix that was trained at {name}: the factors of the base "
                             "have changed")
    return layers


def probe(weight):
    """W z (d_out,) in float64 for one fixed z, z_k = cos k: what tells one adapted matrix from another."""
    z = torch.arange(1, weight.shape[1] + 1, dtype=torch.float64, device="cpu").cos()
    return weight.detach().cpu().double() @ z


def on_cpu(state):
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
