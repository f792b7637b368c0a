"""Read the YAML file of a run into its config, and apply changes of single options (`--set`)."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pydantic
import yaml

from readapt_ray.errors import InputError
from readapt_ray.recipes.chain import RunConfig
from readapt_ray.recipes.problems import Problems
from readapt_ray.storage import Location
from readapt_ray.yaml_files import DistinctLoader, options_of, read_yaml

_MARKS = ("[", "{", '"', "'")
"""First characters of a YAML list, section or quoted text."""
_NULLS = ("null", "~")


def read_run(file: str, changes: Mapping[str, Any], problems: Problems | None = None) -> RunConfig:
    """Read the config of a run from its file.

    Args:
        file: path or URI of the YAML file.
        changes: values that replace those of the file, by name (`root`, `train.lora_rank`) or as nested sections.
        problems: collects errors of options, which are then left out of the config. If omitted, errors are raised.

    Raises:
        InputError: the file does not exist, holds something else, or an option is unknown or wrong.
    """
    what = "a run's options, one per line (source, pretrained, retriever and more; jobs/ has examples)"
    return changed(options_of(read_yaml(Location(file), what), repr(file), what), changes, problems, where=file)


def changed(
    values: dict[str, Any], changes: Mapping[str, Any], problems: Problems | None = None, *, where: str
) -> RunConfig:
    """Make the config of a run from a mapping of options and changes to it. See `read_run` for the arguments.

    `values` is changed in place. `where` is the name of the file in errors.
    """
    found = Problems() if problems is None else problems
    for name, value in _by_name(changes):
        with found.collecting(name.partition(".")[0]):
            _change(values, name, value)
    config = _parsed(values, found, where=where)
    if problems is None:
        found.raise_them()
    return config


def _parsed(values: dict[str, Any], problems: Problems, *, where: str) -> RunConfig:
    """Make a config of the valid options. A required option that is wrong or missing is set to empty text."""
    wrong = _wrong_options(values)
    if wrong:
        with problems.collecting(*wrong):
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
    """Parse each `NAME=VALUE` of `--set` into values by name (see `parse_change`). Errors are added to `problems`.

    Of a name that is given twice, the last value counts.
    """
    changes: dict[str, Any] = {}
    for text in texts:
        with problems.collecting(text.partition("=")[0].partition(".")[0]):
            name, value = parse_change(text)
            changes[name] = value
    return changes


def parse_change(text: str) -> tuple[str, Any]:
    """Split `NAME=VALUE` into the name and the parsed value.

    Numbers, true, false, null, quoted text, and lists or sections in brackets are parsed as YAML. Any other value is plain
    text, such as `query: {text}`, `notes #2.jsonl`, `2024-01-01` and nothing.

    Raises:
        InputError: the text is not NAME=VALUE, or a bracket is not closed.
    """
    name, mark, value = text.partition("=")
    if not mark or not name:
        raise InputError(f"--set {text!r} is not NAME=VALUE, such as train.lora_rank=16")
    try:
        found = yaml.load(value, DistinctLoader)
    except yaml.YAMLError as error:
        if value.lstrip().startswith(("[", "{")):
            problem = getattr(error, "problem", None) or "no YAML"
            raise InputError(f"--set {text!r}: {value!r} is not a whole YAML list or section: {problem}") from None
        return name, value  # such as "a,b",c, a comma list of two items
    is_null = found is None and value.strip().lower() in _NULLS  # `#2.jsonl` is a comment, and no null
    is_yaml = is_null or isinstance(found, bool | int | float) or value.lstrip().startswith(_MARKS)
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
