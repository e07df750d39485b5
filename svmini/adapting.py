"""What is done with a model: adapt it by a method, merge what was trained into plain weights, count."""

from collections import Counter
from contextlib import contextmanager

import torch
import torch.nn as nn
from tqdm import tqdm

from .errors import InputError
from .files import one_line, sha256_of
from .methods import METHODS, WITHOUT_ADAPTERS, check_options, nearest, options_of
from .methods.adapter import TRAINABLE_DTYPES, Adapter


def adapt(model, method, targets=None, also_train=None, **options):
    """Put an adapter of this method in the place of every target layer, freeze the rest, in place; returns the model.

    model: any nn.Module that holds nn.Linears.  method: a word of METHODS, "full" (everything is trained) or "head".
    targets: which nn.Linears; a target matches the end of a layer's path at a dot: "up", "mlp.up", "blocks.0.mlp.up".
    also_train: paths of modules that are trained whole beside the adapters, such as a new classifier; saved and loaded
    with them. "head" trains them alone.  options: those of the method. Where targets or also_train are not given,
    the model's own class attributes of these names are taken (GPT and ViT have them).
    model.adaptation then says what was done; its "layers" names every layer that was taken.

    Every layer is checked before one is changed. Raises InputError that names the layer and says what would work; the
    model is then as it was.
    """
    inner = unadapted(model)
    check_options(method, options)
    also_train = list_of_names("also_train", getattr(inner, "also_train", ()) if also_train is None else also_train)
    heads = heads_of(inner, also_train)
    targets = getattr(inner, "targets", ()) if targets is None else targets
    if method == "head" and not heads:
        raise InputError("there is no head to train: name the modules that are trained whole by also_train")
    layers = {} if method in WITHOUT_ADAPTERS else fitting_linears(inner, method, targets, options, also_train)
    with exactly(inner):
        before = digests(inner)
        put(inner, {name: build(name, linear, method, options) for name, linear in tqdm(
            layers.items(), f"set up {method}", leave=False, delay=2, disable=None)})
        for part in [inner] if method == "full" else heads:
            part.requires_grad_(True)
    inner.adaptation = {"method": method, "options": options_of(method) | options, "targets": list(targets),
                        "layers": list(adapters_of(inner)), "also_train": also_train, "before": before}
    return model


def merge(model):
    """Put a plain nn.Linear of the adapted weight in the place of every adapter, in place; returns the model, all of it
    trainable, as a base for whatever comes next. Raises InputError for a model that was not adapted."""
    inner = unwrap(model)
    adaptation_of(inner, "there is nothing to merge")
    merged = {}
    with exactly(inner), torch.no_grad():
        for name, adapter in adapters_of(inner).items():
            if has_hooks(adapter):
                raise InputError(f"{name} has hooks, which a plain layer in its place would lose: remove them first")
            merged[name] = nn.Linear(adapter.in_features, adapter.out_features, device="meta")
            merged[name].weight = nn.Parameter(adapter.weight.clone())
            merged[name].bias = None if adapter.bias is None else nn.Parameter(adapter.bias.clone())
        put(inner, merged)
        inner.requires_grad_(True)
    del inner.adaptation
    return model


def count_trainable(model):
    """{"adapter": int, "head": int, "total": int}: numbers that training would change, a shared one once.

    "head" is what also_train names and what was unfrozen by hand, "adapter" the rest: the adapters' numbers, or in
    full fine-tuning the model without its head.
    """
    inner = unwrap(model)
    what = vars(inner).get("adaptation") or {"method": "full", "also_train": getattr(inner, "also_train", ())}
    trained = {id(p): p.numel() for p in inner.parameters() if p.requires_grad}
    if what["method"] == "full":
        apart = trained.keys() - {id(p) for head in heads_of(inner, what["also_train"]) for p in head.parameters()}
    else:
        apart = trained.keys() & {id(p) for part in adapters_of(inner).values() for p in part.parameters()}
    adapter, total = sum(trained[i] for i in apart), sum(trained.values())
    return {"adapter": adapter, "head": total - adapter, "total": total}


# ---- which layers ----

def find_linears(model, targets, also_train=()):
    """{path: nn.Linear} for every layer that a target matches, but for those that also_train trains whole. Raises
    InputError for a target that matches nothing, or something that cannot be adapted."""
    targets = list_of_names("targets", () if targets is None else targets)
    if not targets:
        raise InputError(f"give targets, the layers to adapt; {offers(model, also_train)}")
    modules, tied, found = modules_of(model), tied_parameters(model), {}
    # Target by target, and not as the layers follow one another: LoRA and DoRA draw A in this order from torch's
    # global stream, so another order is another start.
    for target in targets:
        matched = [name for name in modules if ends_in(name, target)]
        if not matched:
            raise InputError(f"target {target!r} matches no layer{no_layer_hint(target, modules)}; "
                             f"{offers(model, also_train)}")
        beside = [name for name in matched if not is_inside(name, also_train)]
        if not beside:
            raise InputError(f"{matched[0]} is trained whole, as also_train says: leave it out of the targets")
        for name in beside:
            reason = why_not(modules[name], tied)
            if reason:
                raise InputError(f"{name} {reason}; {offers(model, also_train)}")
            found[name] = modules[name]
    return found


def fitting_linears(model, method, targets, options, also_train=()):
    """What find_linears finds, each checked for the method's options. Raises InputError that names the layer."""
    layers = find_linears(model, targets, also_train)
    for name, linear in layers.items():
        check_fit(name, linear, method, options)
    return layers


def check_fit(name, linear, method, options):
    """Raise InputError that names the layer, where a method's options do not fit its shape."""
    try:
        METHODS[method].check(*linear.weight.shape, **options)
    except ValueError as error:
        shape = "x".join(map(str, linear.weight.shape))
        raise InputError(f"{method} does not fit {name} ({shape}): {one_line(error)}") from None


def build(name, linear, method, options):
    """One adapter. An InputError of the method, about the weight itself, then names the layer."""
    try:
        return METHODS[method](linear, **options)
    except InputError as error:
        raise InputError(f"{method} does not fit {name}: {error}") from None


def why_not(part, tied=()):
    """Why a module cannot be adapted, or None. tied: ids of parameters that stand in more than one place."""
    if type(part).__name__ == "Conv1D":
        return "is a Conv1D as in Hugging Face's GPT-2, no nn.Linear: take GPT.from_pretrained(model.state_dict())"
    if type(part).forward is not nn.Linear.forward or "forward" in vars(part) or hasattr(part, "parametrizations"):
        return f"is no plain nn.Linear but {part._get_name()}"
    if any(id(p) in tied for p in part.parameters()):
        return "shares its weight with another place, which would change with it"
    if has_hooks(part):
        return "has hooks, which an adapter in its place would lose: remove them first"
    if part.weight.dtype not in TRAINABLE_DTYPES:
        return (f"is {part.weight.dtype}: keep the weights in float32 and use autocast for speed, since small steps "
                "are lost in less")
    if not part.weight.isfinite().all():
        return "has weights that are not finite"


def offers(model, also_train=()):
    """In words, which targets would be accepted: the shortest ends of paths that match nothing else."""
    modules, tied = modules_of(model), tied_parameters(model)
    good = [name for name, part in modules.items() if not is_inside(name, also_train) and not why_not(part, tied)]
    bad, found = modules.keys() - good, {}
    for name in good:
        steps = name.split(".")
        ends = [".".join(steps[i:]) for i in range(len(steps)) if i == 0 or not steps[i].isdigit()]   # longest first
        ends = [end for end in ends if not any(ends_in(other, end) for other in bad)]
        found |= dict.fromkeys(ends[-1:])
    shown = ", ".join(list(found)[:20]) + (", ..." if len(found) > 20 else "")
    return f"targets can be: {shown}" if found else "there is no nn.Linear inside that a target could name"


def no_layer_hint(target, modules):
    last = target.rsplit(".", 1)[-1]
    if last.startswith("in_proj") and any(isinstance(part, nn.MultiheadAttention) for part in modules.values()):
        return " (nn.MultiheadAttention keeps query, key and value in one bare parameter, which is no layer)"
    return nearest(last, {name.rsplit(".", 1)[-1] for name, part in modules.items() if isinstance(part, nn.Linear)})


def ends_in(name, target):
    """Whether a path ends in a target, at a dot."""
    return f".{name}".endswith(f".{target}")


def is_inside(name, parts):
    """Whether a path is one of these, or leads into one."""
    return any(f"{name}.".startswith(f"{part}.") for part in parts)


def has_hooks(part):
    return any((part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks))


def modules_of(model):
    """{path: module} of all modules inside; one that stands in two places has two paths."""
    return {name: part for name, part in model.named_modules(remove_duplicate=False) if name}


def tied_parameters(model):
    """ids of the parameters that stand in more than one place."""
    places = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return {i for i, n in places.items() if n > 1}


# ---- what adapter_file.py needs as well ----

def adapters_of(model):
    """{path: Adapter} of an adapted model, in the order of its modules."""
    return {name: part for name, part in model.named_modules() if isinstance(part, Adapter)}


def adaptation_of(model, otherwise):
    """What adapt has written down about the model. Raises InputError that begins with `otherwise`, where it has not."""
    if "adaptation" not in vars(model):
        raise InputError(f"{otherwise}: the model was not adapted")
    return model.adaptation


def unadapted(model):
    """The model inside its wrappers. Raises InputError for one that is adapted, in whole or in part, or is part of one
    that is."""
    inner = unwrap(model)
    layers = list(adapters_of(inner))
    wholes = [name or "the model" for name, part in inner.named_modules() if "adaptation" in vars(part)]
    if layers or wholes:
        whole = [*wholes, "the model that it is part of"][0]
        raise InputError(f"{(layers + wholes)[0]} is already adapted: merge {whole} first")
    return inner


def heads_of(model, also_train):
    """The modules that also_train names. Raises InputError for a name that is not there, or is tied (GPT's head)."""
    modules, tied = modules_of(model), tied_parameters(model)
    for name in also_train:
        if name not in modules:
            raise InputError(f"also_train: there is no module {name!r}{nearest(name, modules)}")
        if any(id(p) in tied for p in modules[name].parameters()):
            raise InputError(f"also_train: {name} shares a weight with another place, which would change with it")
    return [modules[name] for name in also_train]


def put(model, layers):
    """Freeze the whole model, and set new layers in their places."""
    model.requires_grad_(False)
    for name, layer in layers.items():
        parent, _, last = name.rpartition(".")
        layer.train(model.get_submodule(name).training)
        setattr(model.get_submodule(parent), last, layer)


def tensors_of(model):
    """{name: tensor} of every parameter, a tied one once, and of every persistent buffer."""
    stored = model.state_dict()
    return dict(model.named_parameters()) | {name: b for name, b in model.named_buffers() if name in stored}


def digest(tensor):
    """SHA-256 of its values in float32, so that a model has one fingerprint in float32 and in float64."""
    return sha256_of(tensor.detach().float() if tensor.is_floating_point() else tensor)


def digests(model):
    """{name: digest} of all that tensors_of names."""
    return {name: digest(tensor) for name, tensor in sorted(tensors_of(model).items())}


def fingerprint(digests, without=()):
    """SHA-256 of a base model, from its digests, without the tensors that are trained whole beside the adapters."""
    return sha256_of({name: digest for name, digest in digests.items() if name not in without})


def unwrap(model):
    """The model inside torch.compile's, DataParallel's and DistributedDataParallel's wrappers."""
    while hasattr(model, "_orig_mod") or isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


@contextmanager
def exactly(model):
    """Within it, no autocast rounds what is computed, and what is made can be trained, also in inference mode."""
    device = next((p.device.type for p in model.parameters()), "cpu")
    device = device if torch.amp.is_autocast_available(device) else "cpu"
    with torch.inference_mode(False), torch.autocast("cpu", enabled=False), torch.autocast(device, enabled=False):
        yield


def list_of_names(what, names):
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) and name for name in names):
        raise InputError(f"{what} must be a list of names such as ('query', 'value'), not {one_line(repr(names))}")
    return list(names)
