"""The contract that every method keeps, and what is done with adapted models: adapt, merge, count, save, load."""

import difflib
import hashlib
import inspect
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from . import files

TARGETS = ("query", "key", "value", "out", "up", "down")
METHODS = {}   # word -> Adapter class; filled in __init__.py


class Adapter(nn.Module):
    """Stands in place of one frozen nn.Linear, of weight W0 (d_out, d_in) and bias b, and adapts it.

    A method gives: keyword defaults of __init__ (its options), weight(), count and check, and forward where there
    is a cheaper exact way than to build the weight. What it trains is its nn.Parameters and nothing else; what is
    frozen it keeps by `freeze`, or, where a file must hold it, as a persistent buffer.
    """
    examples = ()   # option words: a case in the shared tests and a row of the full table each
    lr = 5e-3       # a first learning rate

    def __init__(self, linear, **options):
        super().__init__()
        self.d_out, self.d_in = linear.weight.shape
        self.check(self.d_out, self.d_in, **options)
        self.options = options
        self.freeze("bias", linear.bias)

    def freeze(self, name, tensor):
        """Keep a tensor that can be made again from the base: it moves with the module and is not stored."""
        self.register_buffer(name, None if tensor is None else tensor.detach(), persistent=False)

    def weight(self):
        """The adapted weight (d_out, d_in), differentiable: the paper's equation itself."""
        raise NotImplementedError

    def forward(self, x):
        """x (..., d_in) -> (..., d_out), the same function as weight(), by the cheapest exact path."""
        return F.linear(x, self.weight(), self.bias)

    def learned(self):
        """For reports, of SVF-type methods: singular values before (D,) and after (D,), and M; None of others."""
        return None

    @staticmethod
    def count(d_out, d_in):
        """Trained numbers for one matrix of this shape, by the paper's formula."""
        raise NotImplementedError

    @staticmethod
    def check(d_out, d_in):
        """Raise ValueError that says why these options do not fit this shape."""


def add_update(x, W, bias, h, B):
    """x Wᵀ + b + h Bᵀ, the sum made in place: x (..., d_in), W (d_out, d_in), h (..., r), B (d_out, r) -> (..., d_out).

    Beside a product with a thin B, a further tensor of T x d_out is what costs time on a CPU, and memory everywhere.
    """
    y = F.linear(x.reshape(-1, x.shape[-1]), W, bias)                       # (T, d_out)
    y.addmm_(h.reshape(-1, h.shape[-1]).to(y.dtype), B.t().to(y.dtype))     # autocast leaves what is in place alone
    return y.view(*x.shape[:-1], -1)


def whole(name, value, low, high=None):
    """Raise ValueError unless value is a whole number in [low, high]."""
    fits = isinstance(value, int) and not isinstance(value, bool) and value >= low and (high is None or value <= high)
    if not fits:
        limits = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} must be a whole number {limits}, not {value!r}")


def is_number(value):
    """A finite int or float, and not a bool, which Python counts as an int."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def nearest(word, words):
    """' (did you mean X?)' or ''."""
    near = difflib.get_close_matches(str(word).lower(), list(words), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def options_of(method):
    """The options of a method and their defaults. Raises ValueError for a method that is not there."""
    if method in ("full", "head"):
        return {}
    if method not in METHODS:
        known = ["full", "head", *METHODS]
        raise ValueError(f"there is no method {method!r}{nearest(method, known)}; methods: {', '.join(known)}")
    parameters = inspect.signature(METHODS[method].__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def check_options(method, options):
    """Raise ValueError for an option that the method does not have."""
    known = options_of(method)
    for name in options:
        if name not in known:
            what = f"options: {', '.join(known)}" if known else "it takes no options"
            raise ValueError(f"{method} has no option {name!r}{nearest(name, known)}; {what}")


def adapters(model):
    """{name: Adapter} of an adapted model, in the order of its modules."""
    return {name: part for name, part in model.named_modules() if isinstance(part, Adapter)}


def head_of(model):
    """The classifier that is trained whole: `model.head` where it is an nn.Linear of its own, else None (GPT's is
    tied to its embedding)."""
    head = getattr(model, "head", None)
    return head if isinstance(head, nn.Linear) and id(head.weight) not in _tied(model) else None


def _tied(model):
    """ids of the parameters that stand in more than one place."""
    seen, tied = set(), set()
    for _, p in model.named_parameters(remove_duplicate=False):
        (tied if id(p) in seen else seen).add(id(p))
    return tied


def fingerprint(model):
    """SHA-256, in hex, of the float32 bytes of a base model's parameters without its head, in name order."""
    digest = hashlib.sha256()
    skip = "head." if head_of(model) is not None else None
    for name, p in sorted(model.named_parameters()):
        if skip is None or not name.startswith(skip):
            digest.update(p.detach().to("cpu", torch.float32).contiguous().numpy())
    return digest.hexdigest()


def find_linears(model, targets):
    """{name: nn.Linear} for every layer whose last name part is in targets. Raises ValueError or TypeError in a
    sentence for a target that matches nothing, or nothing that can be adapted."""
    if not isinstance(targets, (list, tuple)) or not targets or not all(isinstance(t, str) for t in targets):
        raise TypeError(f"targets must be a list of names such as ('query', 'value'), not {targets!r}")
    tied, found = _tied(model), {}
    last_parts = {}
    for name, part in model.named_modules():
        last_parts.setdefault(name.rsplit(".", 1)[-1], []).append((name, part))
    linears = sorted({last for last, parts in last_parts.items()
                      if any(type(p) is nn.Linear and n != "head" for n, p in parts)})
    for target in targets:
        if target not in last_parts:
            raise ValueError(f"target {target!r} matches no layer{nearest(target, linears)}; "
                             f"targets are last parts of layer names, here: {', '.join(linears)}")
        for name, part in last_parts[target]:
            if type(part) is not nn.Linear:
                raise ValueError(f"{name} is no plain nn.Linear but {type(part).__name__}; "
                                 f"targets can be: {', '.join(linears)}")
            if id(part.weight) in tied:
                raise ValueError(f"{name} is tied to another layer, which would change with it; "
                                 f"targets can be: {', '.join(t for t in linears if t != target)}")
            if part is getattr(model, "head", None):
                raise ValueError("head is trained whole beside the adapters; leave it out of the targets")
            if part.weight.dtype not in (torch.float32, torch.float64):
                raise ValueError(f"{name} is {part.weight.dtype}: keep the weights in float32 and "
                                 "use autocast for speed, since small steps are lost in less")
            if not part.weight.isfinite().all():
                raise ValueError(f"{name} has weights that are not finite")
            found[name] = part
    return found


def fitting_linears(model, method, targets, options):
    """What find_linears finds, each checked for the method's options. Raises ValueError that names the layer."""
    check_options(method, options)
    layers = find_linears(model, targets)
    for name, linear in layers.items():
        try:
            METHODS[method].check(*linear.weight.shape, **options)
        except ValueError as error:
            shape = "x".join(map(str, linear.weight.shape))
            raise ValueError(f"{method} does not fit {name} ({shape}): {error}") from None
    return layers


def adapt(model, method, targets=TARGETS, **options):
    """Wrap every target layer in an adapter of this method, in place, and freeze the rest; returns the model.

    model: any nn.Module that holds nn.Linears.  method: a word of METHODS, or "full" (train everything) or "head".
    targets: last parts of layer names.  options: those of the method.
    An nn.Linear of its own at model.head (ViT's) stays trainable; a tied one (GPT's) and any other is frozen.
    Every layer is checked before one is changed. Raises ValueError or TypeError that names the layer and says what
    would work; the model is then as it was.
    """
    check_options(method, options)
    _refuse_adapted(model)
    base = fingerprint(model)
    if method in ("full", "head"):
        if method == "head" and head_of(model) is None:
            raise ValueError("this model has no head of its own to train: its head is tied or missing")
        model.requires_grad_(method == "full")
        if head_of(model) is not None:
            head_of(model).requires_grad_(True)
    else:
        layers = fitting_linears(model, method, targets, options)
        _put(model, {name: METHODS[method](linear, **options)
                     for name, linear in tqdm(layers.items(), f"set up {method}", leave=False, delay=2, disable=None)})
    model.adaptation = {"method": method, "options": options_of(method) | options, "targets": list(targets),
                        "base": base}
    return model


def _refuse_adapted(model):
    if adapters(model):
        raise ValueError(f"{next(iter(adapters(model)))} is already adapted with {model.adaptation['method']}: "
                         "merge the model first")


def _put(model, layers):
    """Freeze the model but for its head, and set the new layers in their places."""
    model.requires_grad_(False)
    if head_of(model) is not None:
        head_of(model).requires_grad_(True)
    for name, layer in layers.items():
        parent, _, last = name.rpartition(".")
        layer.train(model.training)
        setattr(model.get_submodule(parent), last, layer)


def merge(model):
    """Replace every adapter by a plain nn.Linear of its adapted weight, in place; returns the model, all trainable,
    as a base for whatever comes next. Raises ValueError for a model that was not adapted."""
    if not hasattr(model, "adaptation"):
        raise ValueError("there is nothing to merge: the model was not adapted")
    merged = {}
    for name, adapter in adapters(model).items():
        merged[name] = nn.Linear(adapter.d_in, adapter.d_out, bias=adapter.bias is not None, device="meta")
        merged[name].weight = nn.Parameter(adapter.weight().detach().clone())
        if adapter.bias is not None:
            merged[name].bias = nn.Parameter(adapter.bias.clone())
    _put(model, merged)
    del model.adaptation
    return model.requires_grad_(True)


def count_trainable(model):
    """{"adapter": int, "head": int, "total": int}: numbers that training would change; shared ones count once.
    "adapter" is all that is not the head's, so in full fine-tuning the whole backbone."""
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    head = head_of(model)
    in_head = sum(p.numel() for p in head.parameters() if p.requires_grad) if head is not None else 0
    return {"adapter": total - in_head, "head": in_head, "total": total}


def probe(weight):
    """W z (d_out,) in float64 for one fixed z, z_k = cos k: what tells one adapted matrix from another."""
    z = torch.arange(1, weight.shape[1] + 1, dtype=torch.float64).cos()
    return weight.detach().cpu().double() @ z


def save_adapter(model, path, about=None):
    """Write what was trained to one small file, whole or not at all. about: plain values for who reads it again,
    such as the data's name.

    It holds the method, its options, the targets, the base's fingerprint, and for each adapted layer the options as
    resolved there, the trained numbers (with the positions of svft's random and topk) and W z; a ViT's head too.
    Raises ValueError for a model that was not adapted, or in full: that belongs into a checkpoint.
    """
    if not hasattr(model, "adaptation"):
        raise ValueError("there is no adapter to save: adapt the model first")
    if model.adaptation["method"] == "full":
        raise ValueError("full fine-tuning changes every weight and leaves no adapter: save a checkpoint of the model")
    layers = {name: {"options": a.options, "state": {k: v.cpu() for k, v in a.state_dict().items()},
                     "probe": probe(a.weight())} for name, a in adapters(model).items()}
    head = head_of(model)
    files.save(path, "adapter", model.adaptation | {
        "about": about or {}, "layers": layers,
        "head": None if head is None else {k: v.cpu() for k, v in head.state_dict().items()}})


def load_adapter(model, path):
    """Build the adapters that a file holds on the plain base model they were trained on, in place; returns the model.

    Raises FileNotFoundError, or ValueError where the file is damaged, of another kind or format, made for another
    base, or where an adapted matrix does not come out as it was (W z within 1e-4). The model is then as it was.
    """
    content = {"about": {}} | files.load(path, "adapter")
    _refuse_adapted(model)
    _same_keys(path, content, ("kind", "format", "method", "options", "targets", "base", "about", "layers", "head"))
    method, head = content["method"], head_of(model)
    check_options(method, content["options"])
    if content["base"] != fingerprint(model):
        raise ValueError(f"{path} was trained on another base model: load the checkpoint or weights it started from, "
                         "a ViT at the same image size")
    theirs, ours = _shapes(content["head"]), _shapes(None if head is None else head.state_dict())
    if theirs != ours:
        raise ValueError(f"{path} holds {theirs}, the model has {ours}")
    linears = {} if method == "head" else find_linears(model, content["targets"])
    _same_keys(path, content["layers"], linears)
    layers = {name: _load_layer(path, name, method, linears[name], saved) for name, saved in
              tqdm(content["layers"].items(), "load adapter", leave=False, delay=2, disable=None)}
    _put(model, layers)
    if head is not None:
        head.load_state_dict(content["head"])
    model.adaptation = {k: content[k] for k in ("method", "options", "targets", "base")}
    return model


def _load_layer(path, name, method, linear, saved):
    """One adapter as the file has it, if its W z comes out as it was."""
    _same_keys(path, saved, ("options", "state", "probe"))
    check_options(method, saved["options"])
    adapter = METHODS[method](linear, **saved["options"])
    try:
        adapter.load_state_dict(saved["state"])
        Wz = probe(adapter.weight())
    except (RuntimeError, IndexError) as error:   # missing, surplus and misshapen tensors; positions out of range
        raise ValueError(f"{path} does not fit {method} at {name}: {' '.join(str(error).split())}") from None
    if not (Wz - saved["probe"]).norm() <= 1e-4 * saved["probe"].norm():   # `not <=` also catches nan
        raise ValueError(f"{path} does not give back the matrix that was trained at {name}: "
                         "the file or the factors of the base have changed")
    return adapter


def _same_keys(path, part, expected):
    missing, surplus = [sorted(a - b) for a, b in ((set(expected), set(part)), (set(part), set(expected)))]
    if missing or surplus:
        raise ValueError(f"{path} is damaged: missing {missing or 'nothing'}, surplus {surplus or 'nothing'}")


def _shapes(head):
    """A head's state dict in words."""
    return "no head" if head is None else "a head of " + ", ".join(f"{k} {tuple(v.shape)}" for k, v in head.items())
