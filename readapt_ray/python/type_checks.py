"""Check an argument against the type of its parameter.

In: a name, a value and an annotation. Out: an error text, empty if the value fits. All items of lists and mappings are
checked. Anything with a length that can be iterated counts as a list, such as a column of pandas or a numpy array.
"""

import numbers
import os
import reprlib
import types
import typing
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from readapt_ray.config import meant

_WORDS: dict[Any, str] = {
    str: "text",
    Path: "a path",
    os.PathLike: "a path",
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    Mapping: "a dict",
    Sequence: "a list",
    type(None): "None",
}
_CLASSES: dict[Any, Any] = {int: numbers.Integral, float: numbers.Real, Path: os.PathLike}
"""Wider classes that an annotation accepts, so that numbers of numpy are accepted too."""


def mismatch(name: str, value: Any, annotation: Any) -> str:
    """Return an error text if a value does not fit an annotation; else an empty text.

    Such as "top_k = '5': must be a whole number". In a list or mapping, the text is about the first wrong item. Numbers
    of numpy fit int and float; True and False do not, and a string is no list.

    Args:
        name: name of the parameter, for the text.
        value: the argument.
        annotation: type of the parameter.
    """
    alternatives = _alternatives(annotation)
    kind = next((each for each in alternatives if _takes(each, value)), None)
    if kind is None:
        allowed = " or ".join(dict.fromkeys(map(_words, alternatives)))
        choices = [each for kind in alternatives if _origin(kind) is typing.Literal for each in typing.get_args(kind)]
        hint = meant(str(value), choices)
        return f"{name} = {reprlib.repr(value)}: must be {allowed}{hint and f'; {hint}'}"
    arguments = typing.get_args(kind)
    if _origin(kind) not in (Sequence, Mapping) or arguments[-1] is Any:
        return ""
    inside = value.values() if isinstance(value, Mapping) else value
    one_of_each_type = {type(item): item for item in inside}.values()
    if not typing.get_args(arguments[-1]) and all(_takes(arguments[-1], each) for each in one_of_each_type):
        return ""
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    found = (mismatch(f"{name}[{key!r}]", item, arguments[-1]) for key, item in items)
    return next(filter(None, found), "")


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    is_union = _origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _origin(annotation: Any) -> Any:
    return typing.get_origin(annotation) or annotation


def _takes(annotation: Any, value: Any) -> bool:
    """Return whether a value is of a type, without a check of its items."""
    kind = _origin(annotation)
    if kind is typing.Literal:
        return any(value is each or (isinstance(value, str) and value == each) for each in typing.get_args(annotation))
    if kind is Sequence:
        is_list = hasattr(value, "__len__") and hasattr(value, "__iter__")
        return is_list and not isinstance(value, str | bytes | Mapping | Set | type)
    if not isinstance(kind, type):
        return True
    if isinstance(value, bool):
        return kind in (bool, object)
    return isinstance(value, _CLASSES.get(kind, kind))


def _words(annotation: Any) -> str:
    kind, arguments = _origin(annotation), typing.get_args(annotation)
    if kind is typing.Literal:
        return f"one of {', '.join(map(str, arguments))}"
    words = _WORDS.get(kind) or f"{'an' if kind.__name__[0] in 'AEIOU' else 'a'} {kind.__name__}"
    return f"{words} of {_words(arguments[0])}" if kind is Sequence else words
