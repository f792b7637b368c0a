"""What all stage configs share: frozen, keyword-only, validated where they are made.

A config is a pydantic model beside the stage that it configures, with a docstring under each
field; the command line, the YAML file and a notebook all make the same object.
"""

import json
from typing import Any, ClassVar, Self

import pydantic
from pydantic import BaseModel, ConfigDict

from readapt_ray.errors import InputError


class Config(BaseModel):
    """A frozen set of options. Unknown options and wrong values are refused by name."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @classmethod
    def parse(cls, values: dict[str, Any], *, where: str = "") -> Self:
        """Make a config from plain values (from YAML, JSON or flags).

        Args:
            values: option names and values; text is converted to numbers where a number is due.
            where: what to name in the error: a file, or a command.

        Raises:
            InputError: one message that names every wrong option, its value and what is allowed.
        """
        try:
            return cls.model_validate(values)
        except pydantic.ValidationError as error:
            raise InputError(_describe(error, where or cls.__name__, sorted(cls.model_fields))) from None


class StageConfig(Config):
    """The options that every stage has."""

    output: str
    """Folder or URI that the artifact is written to."""
    overwrite: bool = False
    """Replace an artifact there that was made otherwise, or left unfinished, instead of refusing."""

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


def _describe(error: pydantic.ValidationError, where: str, known: list[str]) -> str:
    lines = []
    for problem in error.errors(include_url=False):
        name = ".".join(str(part) for part in problem["loc"]) or "options"
        if problem["type"] == "extra_forbidden":
            lines.append(f"unknown option {name!r}; the options are {', '.join(known)}")
        elif problem["type"] == "missing":
            lines.append(f"option {name!r} is required and was not given")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            lines.append(f"{name} = {json.dumps(problem['input'], default=str)}: {message[0].lower()}{message[1:]}")
    return f"{where}: " + "; ".join(lines)
