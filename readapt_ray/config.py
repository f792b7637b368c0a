"""What all stage configs share: frozen, keyword-only, validated where they are made.

A config is a pydantic model beside the stage that it configures, with a docstring under each
field; the command line, the YAML file and a notebook all make the same object.
"""

import difflib
import json
import re
from collections.abc import Iterable
from typing import Any, ClassVar, Self

import pydantic
from pydantic import BaseModel, ConfigDict

from readapt_ray.errors import InputError

_MEANING = {
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "dict_type": "must be a section of options by name",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be {ge} or more",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be {le} or less",
}
"""What is wrong with a value, by pydantic's name for it."""


class Config(BaseModel):
    """A frozen set of options. Unknown options and wrong values are refused by name."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @classmethod
    def parse(cls, values: dict[str, Any], *, where: str = "", flags: bool = False) -> Self:
        """Make a config from plain values (from YAML, JSON or flags).

        Args:
            values: option names and values; text is converted to numbers where a number is due.
            where: what to name in the error: a file, or a command.
            flags: whether errors call options as the command line does.

        Raises:
            InputError: one message that names every wrong option, its value and what is allowed.
        """
        try:
            return cls.model_validate(values)
        except pydantic.ValidationError as error:
            lines = [_describe(problem, sorted(cls.model_fields), flags) for problem in error.errors(include_url=False)]
            raise InputError(f"{where or cls.__name__}: {'; '.join(lines)}") from None


class StageConfig(Config):
    """The options that every stage has."""

    output: str
    """Folder or URI that the artifact is written to."""
    overwrite: bool = False
    """Replace an artifact there that was made or begun with other options, instead of refusing."""

    inputs: ClassVar[frozenset[str]] = frozenset()
    """Fields that name inputs: known by what they hold, not by where they lie."""
    operational: ClassVar[frozenset[str]] = frozenset()
    """Fields that change how the work is done, and never what comes out."""

    def settings(self) -> dict[str, Any]:
        """Every option as JSON values."""
        return dict(self.model_dump(mode="json"))

    def identity(self) -> dict[str, Any]:
        """The options that decide what comes out."""
        left_out = {"output", "overwrite"} | self.inputs | self.operational
        return {name: value for name, value in self.settings().items() if name not in left_out}


def flag(option: str) -> str:
    """An option as the command line calls it."""
    return f"--{option.replace('_', '-')}"


def meant(word: str, known: Iterable[str]) -> str:
    """Which of the known words was meant, as a question; empty where none is like it."""
    by_lower = {each.lower(): each for each in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return f"did you mean {by_lower[close[0]]!r}?" if close else ""


def _describe(problem: Any, known: list[str], flags: bool) -> str:
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown option {path!r}; {meant(path, known) or 'the options are ' + ', '.join(known)}"
    if problem["type"] == "missing":
        return f"option {flag(path) if flags else repr(path)} is required and was not given"
    message = _meaning(problem)
    if path:
        return f"{flag(path) if flags else path} = {json.dumps(problem['input'], default=str)}: {message}"
    return re.sub(rf"\b({'|'.join(known)})\b", lambda name: flag(name[0]), message) if flags else message


def _meaning(problem: Any) -> str:
    kind, context = problem["type"], problem.get("ctx", {})
    if kind in _MEANING:
        return _MEANING[kind].format(**context)
    if kind == "literal_error":
        choices = [each.strip("'") for each in re.split(", | or ", context["expected"])]
        question = meant(str(problem["input"]), choices)
        return f"must be one of {', '.join(choices)}{question and f'; {question}'}"
    message: str = problem["msg"].removeprefix("Value error, ")
    return f"{message[0].lower()}{message[1:]}"
