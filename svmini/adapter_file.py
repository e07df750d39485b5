"""Adapter files: what was trained, and the base model that it belongs to.

M alone would be ambiguous: it acts between singular vectors, whose signs are arbitrary, and only on one base. A file
therefore also holds a fingerprint of the base and, for each adapted matrix, the product W z with one fixed vector z.
The loader builds the adapters again from the base that it is given, and raises an error if they differ.
"""

import torch
from tqdm import tqdm

from . import files
from .adapting import (adaptation_of, adapters_of, digest, digests, dtype_of, exact_weight, fingerprint, full_precision,
                       install, is_inside, modules_of, tensors_of, unadapted, unwrap, why_not)
from .errors import InputError
from .methods import METHODS, check_options
from .methods.adapter import HALF_DTYPES

TOLERANCE = 1e-4            # of ‖W z‖: above the rounding of another machine
HALF_TOLERANCE = 2.0 ** -8  # between a half-precision base and a float32 base with the same values: U and V are rounded
RECORD = ("method", "options", "targets", "also_train")


def save_adapter(model, path, metadata=None):
    """Write what was trained to one small file, completely or not at all.

    path: a path, or a file object that is open for writing bytes.
    metadata: a dict of plain values to store with it, such as the name of the data.

    The file holds the method, its options and targets, the fingerprint and dtype of the base, and for each adapted
    layer the resolved options, the trainable parameters (with the positions of svft's random and topk) and W z. It also
    holds every other tensor that training changed, by name: the modules in also_train, parameters that were unfrozen by
    hand, and buffers that moved, such as the running statistics of a BatchNorm.

    Raises InputError if the model was not adapted or was fully fine-tuned (save the model itself), if a value is not
    finite, or if a frozen parameter has changed, which loading would not restore.
    """
    inner = unwrap(model)
    adaptation = adaptation_of(inner, "there is no adapter to save")
    if adaptation["method"] == "full":
        raise InputError("full fine-tuning changes every weight and leaves no adapter: save the model itself")
    adapters = adapters_of(inner)
    with full_precision(inner), torch.no_grad():
        trained = trained_tensors(inner, adaptation, adapters)
        for name, tensor in [*trained.items(), *inner.named_parameters()]:
            if (name in trained or tensor.requires_grad) and not tensor.isfinite().all():
                raise InputError(f"{name} is not finite: training has diverged, use a lower learning rate")
        layers = {name: {"options": adapter.options, "probe": probe(exact_weight(adapter)), "state": {
            key: tensor.cpu().clone() for key, tensor in adapter.state_dict().items() if key not in adapter.frozen}}
            for name, adapter in adapters.items()}
    content = {key: adaptation[key] for key in (*RECORD, "dtype")} | {
        "base": fingerprint(adaptation["base"], trained), "metadata": files.plain(metadata or {}), "layers": layers,
        "trained": {name: tensor.detach().cpu().clone() for name, tensor in trained.items()}}
    files.save(path, "adapter", content)


def trained_tensors(model, adaptation, adapters):
    """{name: tensor} of what training changed outside the adapters. Raises InputError if a frozen tensor moved."""
    base, frozen, tensors, trained = adaptation["base"], adaptation["frozen"], tensors_of(model), {}
    expected = base | frozen
    for name in expected | tensors:
        if is_inside(name, adapters) and name not in frozen:
            continue   # a weight of the base that an adapter replaces, or the adapter's own state
        tensor = tensors.get(name)
        if tensor is not None and (tensor.requires_grad or is_inside(name, adaptation["also_train"])):
            trained[name] = tensor
        elif tensor is None or digest(tensor) != expected.get(name):
            if tensor is None or isinstance(tensor, torch.nn.Parameter) or name in frozen or name not in base:
                raise InputError(f"{name} has changed since adapt, but is not trained: keep it fixed, put its module "
                                 "into also_train, or load a state dict only after adapting its own base")
            trained[name] = tensor   # a buffer, such as running statistics
    return trained


def load_adapter(model, path):
    """Build the adapters of a file on the plain base model that they were trained on, in place. Returns the model.

    path: a path, or a file object that is open for reading bytes.

    Raises MissingFile, or InputError if the file is damaged or of another kind or format, if the base is another one,
    or if an adapted matrix differs from the saved one (W z within 1e-4). The model is then as it was.
    """
    content, inner = files.load(path, "adapter"), unadapted(model)
    with full_precision(inner), torch.no_grad():
        base, tensors = digests(inner), tensors_of(inner)
        try:
            check_base(content, inner, tensors, base)
            adapters = {name: rebuild(name, inner.get_submodule(name), content, saved) for name, saved in tqdm(
                content["layers"].items(), "load adapter", leave=False, delay=2, disable=None)}
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        install(inner, adapters, base, **{key: content[key] for key in RECORD})
        for name, value in content["trained"].items():
            tensors[name].copy_(value)
            tensors[name].requires_grad_(isinstance(tensors[name], torch.nn.Parameter) and value.is_floating_point())
    return model


def check_base(content, model, tensors, base):
    """Raise InputError unless a file belongs to this model. tensors, base: the model's tensors and their digests."""
    modules = modules_of(model)
    for name in content["layers"]:
        reason = why_not(modules[name]) if name in modules else "is not in the model"
        if reason:
            raise InputError(f"it adapts {name}, which {reason}")
    for name, value in content["trained"].items():
        tensor = tensors.get(name)
        rounds = tensor is not None and tensor.dtype in HALF_DTYPES and tensor.dtype != value.dtype
        if tensor is None or tensor.shape != value.shape or rounds:
            has = "no such tensor" if tensor is None else f"{tuple(tensor.shape)} in {tensor.dtype}"
            raise InputError(f"it holds {name} of shape {tuple(value.shape)} in {value.dtype}, the model has {has}")
    if content["base"] != fingerprint(base, content["trained"]):
        raise InputError("it was trained on another base model: load the weights that training started from, a ViT at "
                         f"its image size (the base was in {content['dtype']}, this model is in {dtype_of(model)})")


def rebuild(name, linear, content, saved):
    """Build the adapter of one layer from the file. Raises InputError if it does not reproduce the saved W z."""
    check_options(content["method"], saved["options"])
    adapter = METHODS[content["method"]](linear, **saved["options"])
    try:
        adapter.load_state_dict(adapter.state_dict() | saved["state"])
    except RuntimeError as error:   # the method has changed since
        raise InputError(f"its layer {name} does not fit: {files.one_line(error)}") from None
    Wz, expected = probe(exact_weight(adapter)), saved["probe"]
    rounded = (adapter.base_dtype in HALF_DTYPES) != ("float16" in content["dtype"])
    if not (Wz - expected).norm() <= (HALF_TOLERANCE if rounded else TOLERANCE) * expected.norm():   # false for nan
        raise InputError(f"it does not reproduce the matrix trained at {name}: the factors of the base have changed")
    return adapter


def probe(weight):
    """W z (d_out,) in float64 for one fixed z, z_k = cos k, to tell one adapted matrix from another."""
    z = torch.arange(1, weight.shape[1] + 1, dtype=torch.float64, device="cpu").cos()
    return weight.detach().cpu().double() @ z
