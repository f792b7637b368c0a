"""Read a run's YAML file into its config, with changes of single options."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pydantic
import yaml

from readapt_ray.errors import InputError
from readapt_ray.recipes.chain import RunConfig
from readapt_ray.recipes.problems import Problems
from readapt_ray.storage import Location
from readapt_ray.yaml_files import options_of, read_yaml

_MARKS = ("[", "{", '"', "'")
"""What a YAML list, section or quoted text begins with."""


def read_run(file: str, changes: Mapping[str, Any], problems: Problems | None = None) -> RunConfig:
    """Read the config of a run from its file.

    Args:
        file: its YAML file.
        changes: options in place of the file's, by name (`root`, `train.lora_rank`), or as sections inside each other.
        problems: takes what is wrong with options, which are then left out. If omitted, it is raised.

    Raises:
        InputError: there is no such file, it holds something else, or an option is unknown or wrong.
    """
    what = "a run's options, one per line (source, pretrained, retriever and more; jobs/ has examples)"
    return changed(options_of(read_yaml(Location(file), what), repr(file), what), changes, problems, where=file)


def changed(
    values: dict[str, Any], changes: Mapping[str, Any], problems: Problems | None = None, *, where: str
) -> RunConfig:
    """Make the config of a run from options by name, some of them changed; see `read_run`."""
    found = Problems() if problems is None else problems
    for name, value in _by_name(changes):
        with found.noted(name.partition(".")[0]):
            _change(values, name, value)
    config = _parsed(values, found, where=where)
    if problems is None:
        found.raise_them()
    return config


def _parsed(values: dict[str, Any], problems: Problems, *, where: str) -> RunConfig:
    """Make a config of the options that are right. What is required and wrong or missing is empty, and left out."""
    wrong = _wrong_options(values)
    if wrong:
        with problems.noted(*wrong):
            RunConfig.parse(values, where=where)
    right = {name: value for name, value in values.items() if name not in wrong}
    empty = {name: "" for name in wrong & RunConfig.model_fields.keys() if RunConfig.model_fields[name].is_required()}
    return RunConfig.parse({**right, **empty}, where=where)


def _wrong_options(values: Mapping[str, Any]) -> set[str]:
    """Return the names of the options that are unknown, wrong, or required and missing."""
    try:
        RunConfig.model_validate(values)
    except pydantic.ValidationError as error:
        return {str(problem["loc"][0]) for problem in error.errors(include_url=False) if problem["loc"]}
    return set()


def parse_changes(texts: Iterable[str], problems: Problems) -> dict[str, Any]:
    """Split each `NAME=VALUE` into the name and the value, which is YAML; what is something else is noted."""
    changes: dict[str, Any] = {}
    for text in texts:
        with problems.noted(text.partition("=")[0].partition(".")[0]):
            name, value = parse_change(text)
            changes[name] = value
    return changes


def parse_change(text: str) -> tuple[str, Any]:
    """Split `NAME=VALUE` into the name and the value: a number, true or false, null, or a list or section in brackets, as
    in YAML, and any other text as it is: `query: {text}`, `notes #2.jsonl` and `2024-01-01` too.

    Raises:
        InputError: it is something else.
    """
    name, mark, value = text.partition("=")
    if not mark or not name:
        raise InputError(f"--set {text!r} is not NAME=VALUE, such as train.lora_rank=16")
    try:
        found = yaml.safe_load(value)
    except yaml.YAMLError:
        if value.lstrip().startswith(("[", "{")):
            raise InputError(f"--set {text!r}: {value!r} is not a whole YAML list or section") from None
        return name, value  # such as "a,b",c, which is a list of two
    is_yaml = found is None or isinstance(found, bool | int | float) or value.lstrip().startswith(_MARKS)
    return name, found if is_yaml else value.strip()


def _by_name(changes: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in changes.items():
        if isinstance(value, Mapping) and value:
            yield from _by_name(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _change(values: dict[str, Any], name: str, value: Any) -> None:
    *sections, option = name.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise InputError(f"{name} = {value!r} cannot be set: {section!r} is not a section")
    values[option] = value
