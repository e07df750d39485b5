"""The methods, one file each, and the specs by which a command line names them."""

import ast
import difflib
import inspect

from ..errors import InputError
from .boft import BOFT
from .dora import DoRA
from .random_mask import RandomMask
from .lora import LoRA
from .svfit import SVFit
from .svft import SVFT
from .vera import VeRA

METHODS = {   # one line a method: its spec, and the class that does it
    "svfit": SVFit,
    "svft": SVFT,
    "lora": LoRA,
    "dora": DoRA,
    "vera": VeRA,
    "boft": BOFT,
    "random_mask": RandomMask,
}
WITHOUT_ADAPTERS = ("full", "head")   # specs without adapters: everything is trained, or the modules of also_train alone


def options_of(method):
    """The options of a method and their defaults. Raises InputError for a method that is not there."""
    if method in WITHOUT_ADAPTERS:
        return {}
    if method not in METHODS:
        known = [*WITHOUT_ADAPTERS, *METHODS]
        raise InputError(f"there is no method {method!r}{nearest(method, known)}; methods: {', '.join(known)}")
    parameters = inspect.signature(METHODS[method].__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def check_options(method, options):
    """Raise InputError for an option that the method does not have."""
    known = options_of(method)
    for name in options:
        if name not in known:
            what = f"options: {', '.join(known)}" if known else "it takes no options"
            raise InputError(f"{method} has no option {name!r}{nearest(name, known)}; {what}")


def parse_spec(spec):
    """"svft:pattern=topk@query,key" -> ("svft", {"pattern": "topk"}, ("query", "key")); targets None where not named.

    Raises InputError for a method or option that is not there, or an option without a value.
    """
    body, at, targets = spec.partition("@")
    method, _, listed = body.partition(":")
    options = {}
    for item in filter(None, listed.split(",")):
        name, equals, value = item.partition("=")
        if not equals or not value:
            raise InputError(f"{spec!r}: an option is name=value, not {item!r}")
        if name in options:
            raise InputError(f"{spec!r}: {name} is given twice")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value   # a bare spec such as banded
    if method not in (*WITHOUT_ADAPTERS, *METHODS) and "," in method:
        raise InputError(f"{spec!r}: options follow a colon, as in svft:off_diagonals=8,seed=1")
    check_options(method, options)
    names = tuple(t for t in targets.split(",") if t)
    if at and not names:
        raise InputError(f"{spec!r}: after @ come targets, such as @query,value")
    if names and method in WITHOUT_ADAPTERS:
        raise InputError(f"{spec!r}: {method} adapts no layers, so it takes no targets")
    return method, options, names or None


def canonical_spec(spec):
    """A form of a spec that is equal for specs that mean the same: all options written out, targets as a set."""
    method, options, targets = parse_spec(spec)
    return method, tuple(sorted((options_of(method) | options).items(), key=str)), targets and frozenset(targets)


def nearest(spec, specs):
    """' (did you mean X?)' or ''."""
    near = difflib.get_close_matches(str(spec).lower(), list(specs), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
