"""Make signatures and docstrings of the functions of `import readapt_ray` from the configs of flags and `--help`.

`inspect.signature`, `help` and completion in notebooks show them. `readapt_ray/__init__.pyi` has the same signatures
for editors and type checkers, which do not run code.
"""

import functools
import inspect
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from pydantic.fields import FieldInfo

from readapt_ray.config import Config, meant, options_text
from readapt_ray.errors import InputError
from readapt_ray.python.type_checks import mismatch

P = ParamSpec("P")
R = TypeVar("R")

_MORE_PATHS = frozenset({"output", "root", "exclude", "only", "previous", "api_keys", "negatives", "require_report"})
_NO_PATHS = frozenset({"host", "name"})
"""Options that a config lists as inputs although they are not paths."""


def signature_of(config_class: type[Config], returns: Any) -> inspect.Signature:
    """Make a signature with the options of a config as keyword-only parameters, required ones first.

    Annotations are the types that a caller may pass: also Path for an option that is a path, any sequence for a list,
    and a file for an encoding.

    Args:
        config_class: the config.
        returns: annotation of the return value.
    """
    fields = sorted(config_class.model_fields.items(), key=lambda item: not item[1].is_required())
    paths = (config_class.inputs | _MORE_PATHS) - _NO_PATHS
    parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=_default(field),
            annotation=_accepted(field.annotation, is_path=name in paths),
        )
        for name, field in fields
    ]
    return inspect.Signature(parameters, return_annotation=returns)


def docstring_of(summary: str, config_class: type[Config], returns: str) -> str:
    """Make a docstring: the summary, the options of a config with their docs, Returns and Raises.

    Args:
        summary: what the function does, without a capital or period.
        config_class: the config.
        returns: the whole section Returns, with its heading.
    """
    how = f"Give the options by name, or all of them as one {config_class.__name__}."
    raises = "Raises:\n    InputError: an option is unknown, missing or wrong, or an input cannot be used; it is named."
    return "\n\n".join([f"{summary[0].upper()}{summary[1:]}.", how, options_text(config_class), returns, raises])


def check_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap a function to check its arguments: an unknown, missing or wrongly typed one raises an InputError.

    The message names all wrong arguments, and suggests the nearest spelling of an unknown name. Values are passed on
    unchanged. Parameters must have annotations; `self` is not checked.
    """
    signature = inspect.signature(function)
    known = [name for name in signature.parameters if name != "self"]
    by_name = [name for name in known if signature.parameters[name].kind is inspect.Parameter.KEYWORD_ONLY]
    name = f"ra.{function.__qualname__.removesuffix('.__init__')}"

    @functools.wraps(function)
    def call(*given: P.args, **options: P.kwargs) -> R:
        try:
            bound = signature.bind(*given, **options).arguments
        except TypeError as error:
            unknown = [each for each in options if each not in known]
            hints = [
                f"unknown option {each!r}; {meant(each, known) or 'the options are ' + ', '.join(known)}"
                for each in unknown
            ]
            if not hints and by_name and "positional" in str(error):
                hints = [f"{error}; give options by name: {', '.join(f'{each}=...' for each in by_name)}"]
            raise InputError(f"{name}: {'; '.join(hints) or error}") from None
        given_wrong = (
            mismatch(each, bound[each], signature.parameters[each].annotation) for each in known if each in bound
        )
        if wrong := list(filter(None, given_wrong)):
            raise InputError(f"{name}: {'; '.join(wrong)}")
        return function(*given, **options)

    return call


@functools.cache
def public(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap a function for export as `readapt_ray.NAME`: check its arguments, and set its `__module__` to readapt_ray.

    The function itself is not changed; each call with it returns the same wrapper.
    """
    call = check_arguments(function)
    call.__module__ = "readapt_ray"
    return call


def _default(field: FieldInfo) -> Any:
    return inspect.Parameter.empty if field.is_required() else field.get_default(call_default_factory=True)


def _accepted(annotation: Any, *, is_path: bool) -> Any:
    """Return the types that a caller may pass for an option: also Path for a path, any sequence for a list, a file for
    an encoding.
    """
    if annotation is str:
        return str | Path if is_path else str
    arguments = [each for each in typing.get_args(annotation) if each is not Ellipsis]
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _accepted(arguments[0], is_path=is_path)
    if origin in (typing.Union, types.UnionType):
        return typing.Union[tuple(_accepted(each, is_path=is_path) for each in arguments)]  # noqa: UP007
    if origin is tuple:
        return Sequence[_accepted(arguments[0], is_path=is_path)]  # type: ignore[misc]
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return annotation | str | Path
    return annotation


def written(signature: inspect.Signature) -> tuple[list[str], str]:
    """Return the parameters and the return type of a signature as Python source code.

    Such as (["root: str | Path", "overwrite: bool = False"], "Results"). The marks `*` and `/` are left out.
    """
    parameters = [
        f"{each.name}: {_written(each.annotation)}"
        + ("" if each.default is inspect.Parameter.empty else f" = {each.default!r}")
        for each in signature.parameters.values()
    ]
    return parameters, _written(signature.return_annotation)


def _written(annotation: Any) -> str:
    arguments = [each for each in typing.get_args(annotation) if each is not Ellipsis]
    origin = typing.get_origin(annotation)
    if annotation is None or annotation is type(None):
        return "None"
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(_written, arguments))
    if origin is typing.Literal:
        return f"Literal[{', '.join(map(repr, arguments))}]"
    if origin is not None:
        return f"{origin.__name__}[{', '.join(map(_written, arguments))}]"
    return getattr(annotation, "__name__", str(annotation))
