"""Adapt a model, merge its adapters into plain layers, and count its trainable parameters."""

import copy
import functools
import warnings
from collections import Counter
from contextlib import contextmanager

import torch
import torch.nn as nn
from torch.nn.parameter import is_lazy
from tqdm import tqdm

from . import files
from .errors import InputError
from .methods import METHODS, WITHOUT_ADAPTERS, check_options, nearest, options_of
from .methods.adapter import HALF_DTYPES, TRAINABLE_DTYPES, Adapter, check_conversion


def adapt(model, method, targets=None, also_train=None, **options):
    """Replace every target layer by an adapter and freeze the rest of the model, in place. Returns the model.

    model: any nn.Module that contains nn.Linear layers, in float32, float64, bfloat16 or float16. The frozen tensors
    keep the dtype of their layer; the trainable parameters of an adapter are float32 or float64.
    method: a key of METHODS, "full" (train everything) or "head" (train the modules in also_train only).
    targets: the layers to adapt. A target matches the end of a layer's path at a dot: "up", "mlp.up",
    "blocks.0.mlp.up". Default: the model's own attribute `targets`, which GPT and ViT have.
    also_train: paths of modules to train in full, such as a new classifier; peft calls them modules_to_save. They are
    saved and loaded with the adapters. Default: the model's own attribute `also_train`. They keep their dtype, with a
    warning for half precision: bfloat16 loses steps below 0.2 to 0.4 % of a weight, and AdamW diverges in float16. Call
    model.classifier.float() before adapt, and train and evaluate under torch.autocast.
    options: options of the method, such as rank=8.

    The dict model.adaptation then records the method, its options, and in "layers" the path of every adapted layer.

    Raises InputError, which names the layer and says what would work. Every layer is checked before the first one is
    changed, so the model is then as it was.
    """
    inner = unadapted(model)
    options = files.plain(options)
    targets, also_train = names_for(inner, "targets", targets), names_for(inner, "also_train", also_train)
    check_options(method, options)
    heads = heads_of(inner, also_train)
    if method == "head" and not heads:
        raise InputError("there is no head to train: list the modules to train in also_train")
    layers = {} if method in WITHOUT_ADAPTERS else fitting_linears(inner, method, targets, options, also_train)
    trained = [inner] if method == "full" else heads
    if any(p.dtype in HALF_DTYPES for module in trained for p in module.parameters()):
        warnings.warn("half precision loses small steps of the modules that are trained in full: convert them to "
                      "float32 before adapt, and train under torch.autocast", stacklevel=2)
    with full_precision(inner):
        base = digests(inner)
        adapters = {name: METHODS[method](linear, **options) for name, linear in tqdm(
            layers.items(), f"set up {method}", leave=False, delay=2, disable=None)}
        install(inner, adapters, base, method=method, options=options_of(method) | options, targets=targets,
                also_train=also_train)
        for module in trained:
            set_trainable(module)
    return model


def merge(model, dtype=None):
    """Replace every adapter by a plain nn.Linear with the adapted weight, in place. Returns the model.

    dtype: None keeps the dtype of each base layer. In a half-precision model this rounds the sum of base weight and
    update, and an update smaller than half a unit in the last place of the weight is lost. dtype=torch.float32 keeps
    the update and converts the whole model, so that its layers still fit together.

    All parameters can be trained afterwards. Raises InputError if the model was not adapted or a layer cannot be
    replaced; the model is then as it was.
    """
    inner = unwrap(model)
    adaptation_of(inner, "there is nothing to merge")
    check_tensors(inner)
    merged = {}
    with full_precision(inner), torch.no_grad():
        for name, adapter in adapters_of(inner).items():
            if has_hooks(adapter):
                raise InputError(f"{name} has hooks, which a merged layer would lose: remove them first")
            merged[name] = nn.Linear(adapter.in_features, adapter.out_features, device="meta")
            for key, value in (("weight", exact_weight(adapter)), ("bias", adapter.bias)):
                value = None if value is None else nn.Parameter(value.to(dtype or adapter.base_dtype, copy=True))
                setattr(merged[name], key, value)
        replace(inner, merged)
        if dtype:
            inner.to(dtype)
        set_trainable(inner)
    del inner.adaptation
    return model


def count_trainable(model):
    """Count trainable parameters, a shared one once: {"adapter": int, "head": int, "total": int}.

    "head" counts the modules in also_train and parameters that were unfrozen by hand, "adapter" the rest: the adapters,
    or after full fine-tuning the model without its head.
    """
    inner = unwrap(model)
    record = vars(inner).get("adaptation") or {"method": "full", "also_train": getattr(inner, "also_train", ())}
    counts = {"adapter": 0, "head": 0}
    for name, p in inner.named_parameters():
        full = record["method"] == "full" and not is_inside(name, record["also_train"])
        key = "adapter" if full or is_inside(name, record.get("layers", ())) else "head"
        counts[key] += p.numel() * p.requires_grad
    return counts | {"total": sum(counts.values())}


# ---- which layers are adapted ----

def find_linears(model, targets, also_train=()):
    """{path: nn.Linear} of every layer that a target matches, without those inside the modules of also_train. Raises
    InputError for a target that matches no layer, or one that cannot be adapted."""
    if not targets:
        raise InputError(f"give targets, the layers to adapt; {offers(model, also_train)}")
    modules, tied, found = modules_of(model), tied_parameters(model), {}
    # Loop over targets, not over layers: LoRA and DoRA draw A in this order from torch's global stream, so another
    # order is another initialization.
    for target in targets:
        matched = [name for name in modules if ends_in(name, target)]
        if not matched:
            fused = "in_proj" in target and any(isinstance(m, nn.MultiheadAttention) for m in modules.values())
            reason = " (nn.MultiheadAttention holds query, key and value in one parameter)" if fused else ""
            raise InputError(f"target {target!r} matches no layer{reason}; {offers(model, also_train, target)}")
        adapted = [name for name in matched if not is_inside(name, also_train)]
        if not adapted:
            raise InputError(f"{matched[0]} is trained in full by also_train: remove {target!r} from the targets")
        for name in adapted:
            reason = why_not(modules[name], tied)
            if reason:
                raise InputError(f"{name} {reason}; {offers(model, also_train)}")
            found[name] = modules[name]
    return found


def fitting_linears(model, method, targets, options, also_train=()):
    """The result of find_linears, after a check that the options fit every layer. Raises InputError that names it."""
    layers = find_linears(model, targets, also_train)
    for name, linear in layers.items():
        try:
            METHODS[method].check(*linear.weight.shape, **options)
        except ValueError as error:
            shape = "x".join(map(str, linear.weight.shape))
            raise InputError(f"{method} does not fit {name} ({shape}): {files.one_line(error)}") from None
    return layers


def why_not(module, tied=()):
    """Return why a module cannot be adapted, or None. tied: ids of parameters that occur in more than one place."""
    if type(module).__name__ == "Conv1D":
        return "is a Conv1D of Hugging Face's GPT-2, not an nn.Linear: use GPT.from_pretrained(model.state_dict())"
    own_forward = type(module).forward is not nn.Linear.forward or "forward" in vars(module)
    if own_forward or hasattr(module, "parametrizations"):
        return f"is not a plain nn.Linear but {module._get_name()}"
    if any(id(p) in tied for p in module.parameters()):
        return "shares its weight with another module, which would change with it"
    if has_hooks(module):
        return "has hooks, which an adapter would lose: remove them first"
    if module.weight.dtype not in (*TRAINABLE_DTYPES, *HALF_DTYPES):
        return f"has weights in {module.weight.dtype}: convert the model to float32 or bfloat16"
    if not module.weight.numel():
        return f"has a weight of size zero, {tuple(module.weight.shape)}"
    if not module.weight.isfinite().all():
        return "has weights that are not finite"


def offers(model, also_train=(), target=""):
    """List targets that would be accepted: for each layer the shortest end of its path that matches nothing else.
    target: a name that matched no layer; the most similar target is then suggested."""
    modules, tied = modules_of(model), tied_parameters(model)
    good = [name for name, module in modules.items() if not is_inside(name, also_train) and not why_not(module, tied)]
    bad, found = modules.keys() - good, {}
    for name in good:
        steps = name.split(".")
        ends = [".".join(steps[i:]) for i in range(len(steps)) if i == 0 or not steps[i].isdigit()]   # longest first
        ends = [end for end in ends if not any(ends_in(other, end) for other in bad)]
        found |= dict.fromkeys(ends[-1:])
    shown = ", ".join(list(found)[:20]) + (", ..." if len(found) > 20 else "") + nearest(target, found)
    return f"targets can be: {shown}" if found else "this model has no nn.Linear that can be adapted"


def ends_in(name, target):
    """Return True if a path ends in a target, at a dot."""
    return f".{name}".endswith(f".{target}")


def is_inside(name, paths):
    """Return True if a path is one of these paths, or leads into one."""
    return any(f"{name}.".startswith(f"{path}.") for path in paths)


def has_hooks(module):
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def modules_of(model):
    """{path: module} of all modules inside; a module that occurs twice has two paths."""
    return {name: module for name, module in model.named_modules(remove_duplicate=False) if name}


def tied_parameters(model):
    """ids of the parameters that occur in more than one place."""
    places = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return {i for i, n in places.items() if n > 1}


def heads_of(model, also_train):
    """The modules that also_train names. Raises InputError for an unknown name or a tied module (GPT's head)."""
    modules, tied = modules_of(model), tied_parameters(model)
    for name in also_train:
        if name not in modules:
            raise InputError(f"also_train: there is no module {name!r}{nearest(name, modules)}")
        if any(id(p) in tied for p in modules[name].parameters()):
            raise InputError(f"also_train: {name} shares a weight with another module, which would change with it")
    return [modules[name] for name in also_train]


def names_for(model, attribute, names):
    """The names as a list, by default those in the model's own attribute. Raises InputError for anything else."""
    names = files.plain(getattr(model, attribute, ()) if names is None else names)
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise InputError(f"{attribute} must be a list of names, not {files.one_line(repr(names))}")
    return names


# ---- the state of an adapted model, which adapter_file.py needs as well ----

def adapters_of(model):
    """{path: Adapter} of an adapted model, in the order of its modules."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}


def exact_weight(adapter):
    """The adapted weight (d_out, d_in), in float32 for a layer in half precision: not rounded to the layer's dtype."""
    return (copy.deepcopy(adapter).float() if adapter.base_dtype in HALF_DTYPES else adapter).weight


def adaptation_of(model, otherwise):
    """What adapt recorded about the model. Raises InputError that begins with `otherwise` if it was not adapted."""
    if "adaptation" not in vars(model):
        raise InputError(f"{otherwise}: the model was not adapted")
    return model.adaptation


def unadapted(model):
    """The model inside its wrappers. Raises InputError if it is adapted, contains an adapted model or is part of one,
    or has tensors that cannot be used."""
    inner = unwrap(model)
    layers = list(adapters_of(inner))
    models = [name or "the model" for name, module in inner.named_modules() if "adaptation" in vars(module)]
    if layers or models:
        first = [*models, "the model that it is part of"][0]
        raise InputError(f"{(layers + models)[0]} is already adapted: merge {first} first")
    check_tensors(inner)
    return inner


def check_tensors(model):
    """Raise InputError if a tensor of the model has no values or cannot take part in training."""
    for name, tensor in tensors_of(model).items():
        if is_lazy(tensor):
            raise InputError(f"{name} is not initialized yet: run one batch through the model first")
        if tensor.is_meta:
            raise InputError(f"{name} is on the meta device, without values: load the weights first")
        if tensor.is_inference():
            raise InputError(f"{name} was created in inference mode and cannot be trained: build the model outside it")


def install(model, adapters, base, **record):
    """Freeze the model, set the adapters in place and record what was done. base: the digests of the plain model."""
    frozen = {f"{path}.{name}": digest(buffer) for path, adapter in adapters.items()
              for name, buffer in adapter.named_buffers() if name in adapter.frozen}
    dtype = dtype_of(model)
    model.requires_grad_(False)
    replace(model, adapters)
    model.adaptation = record | {"layers": list(adapters_of(model)), "dtype": dtype, "base": base, "frozen": frozen}


def replace(model, layers):
    """Set new layers {path: module} in their places, and guard the dtype of the modules that then contain adapters."""
    for name, layer in layers.items():
        parent, _, last = name.rpartition(".")
        layer.train(model.get_submodule(name).training)
        setattr(model.get_submodule(parent), last, layer)
    for module in model.modules():
        vars(module).pop("_apply", None)
        if adapters_of(module):
            module._apply = functools.partial(guarded_apply, module)


def guarded_apply(module, fn, *args, **kwargs):
    """Run module._apply, through which .to(), .half() and the like pass, unless the adapters inside would reject it.
    nn.Module converts child by child, so their own check would come after the first layers were converted."""
    check_conversion(fn)
    return type(module)._apply(module, fn, *args, **kwargs)


def set_trainable(module):
    """Unfreeze the parameters of a module, except those that cannot have a gradient, such as int8 weights."""
    for p in module.parameters():
        p.requires_grad_(p.is_floating_point() or p.is_complex())


def tensors_of(model):
    """{name: tensor} of every parameter, a tied one once, and of every persistent buffer."""
    stored = model.state_dict()
    return dict(model.named_parameters()) | {name: b for name, b in model.named_buffers() if name in stored}


def dtype_of(model):
    """The floating-point dtypes of a model's parameters, such as "float32" or "bfloat16, float32"."""
    return ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()}))


def digest(tensor):
    """SHA-256 of the values in float32, so that equal values have one digest in every dtype."""
    return files.sha256_of(tensor.detach().float() if tensor.is_floating_point() else tensor)


def digests(model):
    """{name: digest} of all tensors that tensors_of returns."""
    return {name: digest(tensor) for name, tensor in sorted(tensors_of(model).items())}


def fingerprint(digests, without=()):
    """SHA-256 of a base model, from its digests, without the tensors that are trained in full."""
    return files.sha256_of({name: digest for name, digest in digests.items() if name not in without})


def unwrap(model):
    """The model inside the wrappers of torch.compile, DataParallel and DistributedDataParallel."""
    while hasattr(model, "_orig_mod") or isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


@contextmanager
def full_precision(model):
    """Inside it autocast rounds nothing, and tensors that are created can be trained, also in inference mode."""
    device = next((p.device.type for p in model.parameters()), "cpu")
    device = device if torch.amp.is_autocast_available(device) else "cpu"
    with torch.inference_mode(False), torch.autocast("cpu", enabled=False), torch.autocast(device, enabled=False):
        yield
