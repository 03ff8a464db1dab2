"""Why values do not make a configuration, in words of YAML."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from functools import reduce
from operator import getitem
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from pydantic import ValidationError

_WORDS = {  # of one, of several
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false"),
    str: ("text", "texts"),
}
_OF_TYPE = ("type", "parsing", "from")  # how pydantic's names of wrong types go on
_OF_LENGTH = ("too_short", "too_long")


def boolean_number(kind: Any, values: Any) -> tuple[str, bool] | None:
    """Where `true` or `false` stands for a number, which pydantic would take for 1 or 0."""
    kind = _only(kind)
    if not is_dataclass(kind) or not isinstance(values, Mapping):
        return None
    for name, value in values.items():
        declared = kind.__dataclass_fields__.get(name)
        if declared is None:
            continue
        types = {declared.type, *get_args(declared.type)}
        entries = [(name, value)]
        if get_origin(declared.type) is tuple:
            there = value if isinstance(value, list | tuple) else ()
            entries = [(f"{name}.{i}", each) for i, each in enumerate(there)]
        for where, each in entries:
            if isinstance(each, bool) and types & {int, float} and bool not in types:
                return where, each
        if found := boolean_number(declared.type, value):
            return f"{name}.{found[0]}", found[1]
    return None


def refusal(kind: type, error: ValidationError, values: Mapping[str, Any]) -> str:
    """The first thing that pydantic refuses, with its key, what should be there, and what is."""
    first = error.errors()[0]
    place = first["loc"]
    where = ".".join(map(str, place))
    if first["type"] == "unexpected_keyword_argument":
        known = list(_declared(kind, place[:-1])[1].__dataclass_fields__)
        close = difflib.get_close_matches(str(place[-1]), known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        return f"unknown key {where!r}. Known: {', '.join(known)}.{hint}"
    if first["type"] == "missing" and isinstance(place[-1], str):
        return f"{where} is missing"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return message if not where else f"{where}: {message}"
    keys, wanted = _declared(kind, place)
    of_type = first["type"].partition("_")[2].startswith(_OF_TYPE)
    within = keys != list(place) and (isinstance(wanted, UnionType) or _length(wanted))
    if _in_words(wanted) and (of_type or within or first["type"] in _OF_LENGTH):
        received = reduce(getitem, keys, values)
        return f"{'.'.join(map(str, keys))} must be {_in_words(wanted)}, got {received!r}"
    return f"{where}: {message}, got {first.get('input')!r}"


def _declared(kind: Any, place: Sequence[Any]) -> tuple[list[Any], Any]:
    """The keys on the way to a place, and the type there.

    Where there is a choice of types, or a list of a certain length, it is told as a whole.
    """
    keys: list[Any] = []
    for part in place:
        kind = _only(kind)
        if is_dataclass(kind) and part in kind.__dataclass_fields__:
            inner = kind.__dataclass_fields__[part].type
        elif get_origin(kind) is dict:
            inner = get_args(kind)[1]
        elif get_origin(kind) is tuple and not _length(kind):
            inner = get_args(kind)[0]
        else:
            break
        keys, kind = [*keys, part], inner
    return keys, _only(kind)


def _only(kind: Any) -> Any:
    """The type of what is optional."""
    others = [each for each in get_args(kind) if each is not NoneType]
    return others[0] if isinstance(kind, UnionType) and len(others) == 1 else kind


def _length(kind: Any) -> int:
    """How many entries a list must have; 0 where they may be any number, or it is none."""
    entries = get_args(kind) if get_origin(kind) is tuple else ()
    return 0 if entries[-1:] == (Ellipsis,) else len(entries)


def _in_words(kind: Any) -> str:
    """What should be there, in words of YAML; empty where pydantic says it better."""
    if isinstance(kind, UnionType):
        return " or ".join(map(_in_words, get_args(kind)))
    if get_origin(kind) is tuple:
        of = _WORDS.get(get_args(kind)[0])
        return "a list" + (f" of {_length(kind) or ''} {of[1]}".replace("  ", " ") if of else "")
    if get_origin(kind) is dict or is_dataclass(kind):
        return "keys and values"
    return _WORDS[kind][0] if kind in _WORDS else ""
