"""The methods, one file each, and the method specs that name them on the command line."""

import ast
import difflib
import inspect

from ..errors import InputError
from .boft import BOFT
from .dora import DoRA
from .lora import LoRA
from .random_mask import RandomMask
from .svfit import SVFit
from .svft import SVFT
from .vera import VeRA

METHODS = {   # one line per method: its name in a spec, and its class
    "svfit": SVFit,
    "svft": SVFT,
    "lora": LoRA,
    "dora": DoRA,
    "vera": VeRA,
    "boft": BOFT,
    "random_mask": RandomMask,
}
WITHOUT_ADAPTERS = ("full", "head")   # specs without adapters: full fine-tuning, and only the modules in also_train

for method in METHODS.values():
    if not method.examples or isinstance(method.examples, str):
        raise TypeError(f'{method.__name__} needs examples, such as examples = ("rank=8",), or ("",) for a method '
                        "without options: without them no test and no row of --methods all would cover it")


def options_of(method):
    """Return the options of a method with their defaults. Raises InputError if the method does not exist."""
    if method in WITHOUT_ADAPTERS:
        return {}
    if method not in METHODS:
        known = [*WITHOUT_ADAPTERS, *METHODS]
        raise InputError(f"there is no method {method!r}{nearest(method, known)}; methods: {', '.join(known)}" + (
            "; adapt takes options as keywords: adapt(model, 'svft', off_diagonals=2)" if ":" in str(method) else ""))
    parameters = inspect.signature(METHODS[method].__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def check_options(method, options):
    """Raise InputError for an option that the method does not have."""
    known = options_of(method)
    for name in options:
        if name not in known:
            what = f"options: {', '.join(known)}" if known else "it has no options"
            raise InputError(f"{method} has no option {name!r}{nearest(name, known)}; {what}")


def parse_spec(spec):
    """Parse "svft:pattern=topk@query,key" into ("svft", {"pattern": "topk"}, ("query", "key")).

    The targets are None if the spec has none. Raises InputError for an unknown method or option, or an option without a
    value.
    """
    body, at, targets = spec.partition("@")
    method, _, listed = body.partition(":")
    options = {}
    for item in filter(None, listed.split(",")):
        name, equals, value = item.partition("=")
        if not equals or not value:
            raise InputError(f"{spec!r}: an option has the form name=value, not {item!r}")
        if name in options:
            raise InputError(f"{spec!r}: {name} is given twice")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value   # a string without quotes, such as banded
    if method not in (*WITHOUT_ADAPTERS, *METHODS) and "," in method:
        raise InputError(f"{spec!r}: options follow a colon, as in svft:off_diagonals=8,seed=1")
    check_options(method, options)
    names = tuple(t for t in targets.split(",") if t)
    if at and not names:
        raise InputError(f"{spec!r}: targets follow the @, as in @query,value")
    if names and method in WITHOUT_ADAPTERS:
        raise InputError(f"{spec!r}: {method} adapts no layers, so it has no targets")
    return method, options, names or None


def canonical_spec(spec):
    """Return a form that is equal for specs with the same meaning: all options written out, targets as a set."""
    method, options, targets = parse_spec(spec)
    return method, tuple(sorted((options_of(method) | options).items(), key=str)), targets and frozenset(targets)


def nearest(name, names):
    """Return " (did you mean 'X'?)" for the most similar name, or ""."""
    near = difflib.get_close_matches(str(name).lower(), list(names), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
