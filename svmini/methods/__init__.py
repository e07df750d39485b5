"""The methods, one file each, and the words by which a command line names them."""

import ast
import difflib
import inspect

from ..errors import InputError
from .boft import BOFT
from .dora import DoRA
from .entries import Entries
from .lora import LoRA
from .svfit import SVFit
from .svft import SVFT
from .vera import VeRA

METHODS = {   # one line a method: its word, and the class that does it
    "svfit": SVFit,
    "svft": SVFT,
    "lora": LoRA,
    "dora": DoRA,
    "vera": VeRA,
    "boft": BOFT,
    "entries": Entries,
}
WHOLE = ("full", "head")   # words without adapters: everything is trained, or the modules of also_train alone


def options_of(method):
    """The options of a method and their defaults. Raises InputError for a method that is not there."""
    if method in WHOLE:
        return {}
    if method not in METHODS:
        known = [*WHOLE, *METHODS]
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


def parse_word(word):
    """"svft:pattern=topk@query,key" -> ("svft", {"pattern": "topk"}, ("query", "key")); targets None where not named.

    Raises InputError for a method or option that is not there, or an option without a value.
    """
    body, at, targets = word.partition("@")
    method, _, listed = body.partition(":")
    options = {}
    for item in filter(None, listed.split(",")):
        name, equals, value = item.partition("=")
        if not equals or not value:
            raise InputError(f"{word!r}: an option is name=value, not {item!r}")
        if name in options:
            raise InputError(f"{word!r}: {name} is given twice")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value   # a bare word such as banded
    if method not in (*WHOLE, *METHODS) and "," in method:
        raise InputError(f"{word!r}: options follow a colon, as in svft:off_diagonals=8,seed=1")
    check_options(method, options)
    names = tuple(t for t in targets.split(",") if t)
    if at and not names:
        raise InputError(f"{word!r}: after @ come targets, such as @query,value")
    if names and method in WHOLE:
        raise InputError(f"{word!r}: {method} adapts no layers, so it takes no targets")
    return method, options, names or None


def same_word(word):
    """A form of a word that is equal for words that mean the same: all options written out, targets as a set."""
    method, options, targets = parse_word(word)
    return method, tuple(sorted((options_of(method) | options).items(), key=str)), targets and frozenset(targets)


def nearest(word, words):
    """' (did you mean X?)' or ''."""
    near = difflib.get_close_matches(str(word).lower(), list(words), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
