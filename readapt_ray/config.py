"""Base classes of all stage configs: frozen, keyword-only, validated when they are made.

A config is a pydantic model in the file of the stage that it configures. The docstring under each field is its help
text. The command line, a YAML file and a notebook all make the same object.
"""

import difflib
import inspect
import json
import os
import re
import textwrap
import types
import typing
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

import pydantic
from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo

from readapt_ray.comma_lists import items_with_empty, split_list
from readapt_ray.errors import InputError

_ALLOWED = {
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a section of options by name",
    "model_type": "a file, or a section of options by name",
    "greater_than": "more than {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than": "less than {lt}",
    "less_than_equal": "{le} or less",
}
"""For each pydantic error type: what the value must be."""


UsedWith = Mapping[str, tuple[str, tuple[Any, ...]]]


class OptionError(ValueError):
    """An error that a validator raises if options do not go together.

    Args:
        text: the message. `{name}` is replaced by that option as the user wrote it: `--top-k`, or `top_k`.
        values: values for placeholders that are not options.
    """

    def __init__(self, text: str, **values: object) -> None:
        super().__init__(text.format_map(_Names(values)))
        self._text = text
        self._values = values

    def as_flags(self) -> str:
        """Return the message with each option written as a flag: `--top-k`."""
        return self._text.format_map(_Names(self._values, flag))


class _Names(dict[str, object]):
    """The values for the placeholders of an `OptionError`: given values, else the option's name as `spelled` writes it."""

    def __init__(self, values: dict[str, object], spelled: Callable[[str], str] = str) -> None:
        super().__init__(values)
        self._spelled = spelled

    def __missing__(self, name: str) -> str:
        return self._spelled(name)


def options_text(config_class: type[BaseModel]) -> str:
    """Return a docstring section that lists each option of a config with its meaning and default."""
    lines = ["Options:"]
    for name, field in config_class.model_fields.items():
        text = " ".join(f"{name}: {field.description or ''} {default(field)}".split())
        lines += textwrap.wrap(
            text,
            108,
            initial_indent="    ",
            subsequent_indent="        ",
            break_on_hyphens=False,
            break_long_words=False,
        )
    return "\n".join(lines)


def default(field: FieldInfo) -> str:
    """Return "(default: ...)" or "(required)" for an option; empty text if the default is None or empty."""
    if field.is_required():
        return "(required)"
    if field.default is None or field.default in ("", ()) or field.default_factory is not None:
        return ""
    value = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
    if isinstance(value, bool):
        value = "yes" if value else "no"
    return f"(default: {value})"


class Config(BaseModel):
    """A frozen set of options. Unknown options and wrong values raise an error that names them."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    inputs: ClassVar[frozenset[str]] = frozenset()
    """Options that name inputs. The fingerprint has the content of an input, not its path."""
    operational: ClassVar[frozenset[str]] = frozenset()
    """Options that change how the work is done (speed, memory), but never the result."""
    may_change: ClassVar[frozenset[str]] = frozenset()
    """Options that decide how much work is done. An output made with another value is resumed, not refused."""
    safety: ClassVar[frozenset[str]] = frozenset()
    """Options that decide what is refused, replaced, retried or kept."""
    used_with: ClassVar[UsedWith] = {}
    """Options that work only together with another option: (that option, its values that allow it). No values means
    any value but the default."""

    def __init__(self, /, *given: Any, **values: Any) -> None:
        """Make a config from options by name.

        Raises:
            InputError: one message that names every wrong option, its value and what is allowed.
        """
        if given:
            raise InputError(
                f"{type(self).__name__}: {given[0]!r} has no name; give each option by its name, such as "
                f"{next(iter(type(self).model_fields))}=..."
            )
        try:
            super().__init__(**values)
        except pydantic.ValidationError as error:
            raise self._refusal(error, type(self).__name__) from None

    # With this mark pydantic calls our __init__ only for the outermost config; it collects the errors of nested ones.
    vars(__init__)["__pydantic_base_init__"] = True

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """List the options in the docstring, for `help` and notebooks."""
        cls.__doc__ = "\n\n".join((inspect.cleandoc(cls.__doc__ or cls.__name__), options_text(cls)))

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse every change: a config is frozen.

        Raises:
            InputError: always.
        """
        raise InputError(
            f"{type(self).__name__}: {name} = {value!r}: a config cannot be changed; make another with "
            f"config.model_copy(update={{{name!r}: {value!r}}})"
        )

    @pydantic.model_validator(mode="before")
    @classmethod
    def _plain_values(cls, values: Any) -> Any:
        """Convert paths to text, and comma-separated text to lists for list options, from any source of values."""
        if not isinstance(values, dict):
            return values
        return {name: cls._plain(name, value) for name, value in values.items()}

    @pydantic.model_validator(mode="after")
    def _refuse_idle_options(self) -> Self:
        """Refuse options that were given but have no effect."""
        for name, (other, values) in self.used_with.items():
            value = getattr(self, other)
            is_used = value in values if values else value != type(self).model_fields[other].get_default()
            if not is_used and getattr(self, name) != type(self).model_fields[name].get_default(
                call_default_factory=True
            ):
                if not values:
                    raise OptionError(f"{{{name}}} does nothing without {{{other}}}; give both, or neither")
                raise OptionError(
                    f"{{{name}}} does nothing with {{{other}}} = {{value!r}}, only with {{allowed}}; leave one out",
                    value=value,
                    allowed=" or ".join(map(str, values)),
                )
        return self

    @classmethod
    def _plain(cls, name: str, value: Any) -> Any:
        field = cls.model_fields.get(name)
        if isinstance(value, str) and not value and field is not None and field.default is None:
            # Without this, `--exclude "$FILE"` with a variable that is not set would exclude nothing.
            raise OptionError(
                f"{{{name}}} is empty, as one from a variable that is not set; give a value, or leave it out"
            )
        if isinstance(value, bool) and field is not None and is_only_number(field.annotation):
            return str(value).lower()  # pydantic takes `yes` of YAML for the number 1
        if isinstance(value, os.PathLike) and field is not None and is_only_list(field.annotation):
            return [os.fspath(value)]  # a comma in a path's name does not split it
        return cls._split_text(name, value) if isinstance(value, str) else _without_paths(value)

    @classmethod
    def _split_text(cls, name: str, text: str) -> str | list[str]:
        field = cls.model_fields.get(name)
        if field is None or not is_list(field.annotation):
            return text
        items = items_with_empty(text)
        if not all(items[: max((place for place, item in enumerate(items) if item), default=0)]):
            raise OptionError(f"{{{name}}} = {{value!r}}: an item between commas is empty; remove a comma", value=text)
        parts = split_list(text)
        return parts[0] if len(parts) == 1 and not is_only_list(field.annotation) else parts

    @classmethod
    def parse(cls, values: dict[str, Any], *, where: str = "", flags: bool = False) -> Self:
        """Make a config from plain values (from YAML, JSON or flags).

        Args:
            values: option names and values; text is converted to numbers where a number is expected.
            where: the file or command that errors name; empty means the name of the class.
            flags: whether errors write options as flags (`--top-k`).

        Raises:
            InputError: one message that names every wrong option, its value and what is allowed.
        """
        try:
            return cls.model_validate(values)
        except pydantic.ValidationError as error:
            raise cls._refusal(error, where or cls.__name__, flags=flags) from None

    @classmethod
    def _refusal(cls, error: pydantic.ValidationError, where: str, *, flags: bool = False) -> InputError:
        problems = _join(_describe(problem, cls, flags) for problem in error.errors(include_url=False))
        return InputError(f"{where}: {problems}")


class StageConfig(Config):
    """The options that every stage has."""

    output: str
    """Folder or URI to write the artifact to."""
    overwrite: bool = False
    """Replace an artifact in the output that was made or begun with other options. Without this such an output is
    refused."""

    safety: ClassVar[frozenset[str]] = frozenset({"overwrite"})

    def settings(self) -> dict[str, Any]:
        """Return every option as JSON values."""
        return dict(self.model_dump(mode="json"))

    def identity(self, known: Container[str] | None = None) -> dict[str, Any]:
        """Return the options that the fingerprint of the output is made from, as JSON values.

        Left out are `output`, `overwrite`, the options that never change the result (`operational`), and those that
        name inputs (`inputs`): the fingerprint has the content of an input, not its path.

        Args:
            known: names of the options that an older release had. Newer options with their default value are left out,
                so that outputs of that release keep their fingerprint. None means all options.
        """
        left_out = {"output", "overwrite"} | self.inputs | self.operational
        if known is not None:
            left_out |= {
                name
                for name, field in type(self).model_fields.items()
                if name not in known and getattr(self, name) == field.get_default(call_default_factory=True)
            }
        return {name: value for name, value in self.settings().items() if name not in left_out}

    def changed_back(self, options: Mapping[str, Any]) -> Self:
        """Return the config with each `may_change` option set to its value in `options`, those of an earlier run."""
        return self.model_copy(update={name: options[name] for name in self.may_change if name in options})


def _without_paths(value: Any) -> Any:
    """Return the value with each path in it converted to text."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if type(value) in (list, tuple):
        return type(value)(map(_without_paths, value))
    return {name: _without_paths(each) for name, each in value.items()} if type(value) is dict else value


def is_list(annotation: Any) -> bool:
    """Return whether an option takes several values: its type is a tuple or list, or a union with one."""
    return any(typing.get_origin(each) in (tuple, list) for each in _alternatives(annotation))


def is_only_list(annotation: Any) -> bool:
    """Return whether an option takes only a list, never a single value."""
    return all(typing.get_origin(each) in (tuple, list) for each in _alternatives(annotation))


def is_only_number(annotation: Any) -> bool:
    """Return whether an option takes only a number: its type is int or float, or None."""
    return all(each in (int, float) for each in _alternatives(annotation))


def _alternatives(annotation: Any) -> list[Any]:
    """Return the types of an option; `None` is left out."""
    if typing.get_origin(annotation) not in (typing.Union, types.UnionType):
        return [annotation]
    return [each for each in typing.get_args(annotation) if each is not type(None)]


def flag(option: str) -> str:
    """Return an option as a flag of the command line: `--top-k` for `top_k`."""
    return f"--{option.replace('_', '-')}"


def meant(word: str, known: Iterable[str]) -> str:
    """Return a question that suggests the known word most like `word`; empty text if none is similar.

    `embd` suggests `embed`. `k` suggests `top_k`, unless another option has a part `k` between underscores.
    """
    by_lower = {each.lower(): each for each in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1)
    if not close:
        close = [each for each in by_lower if word.lower() in each.split("_")]
        close = close if len(close) == 1 else []
    return f"did you mean {by_lower[close[0]]!r}?" if close else ""


class _Problem(typing.NamedTuple):
    option: str
    """The option with its value; empty if the problem belongs to no single option."""
    text: str
    is_allowed: bool = False
    """Whether the text says what is allowed ("a number"). Otherwise it says what is wrong."""


def _join(problems: Iterable[_Problem]) -> str:
    """Join problems into one message. An option with several possible types has a problem per type: one clause."""
    clauses: dict[str, str] = {}
    for option, text, is_allowed in problems:
        if option in clauses:
            clauses[option] += f" or {text}"
        else:
            clauses[option or text] = f"{option}{'must be ' if is_allowed else ''}{text}"
    return "; ".join(clauses.values())


def _known_at(config_class: type[Config], path: Sequence[Any]) -> list[str]:
    """Return the options of a config, or of the nested config that a path of option names leads to."""
    for part in path[:-1]:
        field = config_class.model_fields.get(str(part))
        inner = _alternatives(field.annotation) if field else []
        config_class = next(
            (each for each in inner if isinstance(each, type) and issubclass(each, Config)), config_class
        )
    return sorted(config_class.model_fields)


def _what_it_is(config_class: type[Config], option: str) -> str:
    """Return the first sentence of an option's help in parentheses; empty text for an option of a nested config."""
    field = config_class.model_fields.get(option)
    sentence = " ".join(((field and field.description) or "").split()).partition(". ")[0].rstrip(".")
    return f" ({sentence})" if sentence else ""


def _describe(problem: Any, config_class: type[Config], flags: bool) -> _Problem:
    known = _known_at(config_class, problem["loc"])
    # for a value of several possible types, pydantic adds the type that it tried to the path: leave it out
    path = ".".join(
        str(part) for part in problem["loc"] if part in config_class.model_fields or not _TYPE_NAME.fullmatch(str(part))
    )
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        hint = meant(path.rpartition(".")[2], known) or "the options are " + ", ".join(known)
        return _Problem("", f"unknown option {path!r}; {hint}")
    if kind == "missing":
        named = f"option {flag(path) if flags else repr(path)}"
        return _Problem("", f"{named} is required and was not given{_what_it_is(config_class, path)}")
    option = f"{flag(path) if flags else path} = {json.dumps(problem['input'], default=str)}: " if path else ""
    cause = context.get("error")
    if not path and flags and isinstance(cause, OptionError):
        return _Problem("", cause.as_flags())
    if kind in _ALLOWED:
        return _Problem(option, _ALLOWED[kind].format(**context), is_allowed=True)
    if kind == "literal_error":
        choices = [each.strip("'") for each in re.split(", | or ", context["expected"])]
        question = meant(str(problem["input"]), choices)
        return _Problem(option, f"one of {', '.join(choices)}{question and f'; {question}'}", is_allowed=True)
    text = str(cause or problem["msg"])
    return _Problem(option, f"{text[0].lower()}{text[1:]}")


_TYPE_NAME = re.compile(r"str|int|float|bool|(tuple|list|dict|function-\w+)\[.*\]")
