"""Read a run's YAML file into its config, with changes of single options."""

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from readapt_ray.errors import InputError
from readapt_ray.recipes.chain import RunConfig
from readapt_ray.storage import Location
from readapt_ray.yaml_files import options_of, read_yaml


def read_run(file: str, changes: Mapping[str, Any]) -> RunConfig:
    """Read the config of a run from its file.

    Args:
        file: its YAML file.
        changes: options in place of the file's, by name (`root`, `train.lora_rank`), or as sections inside each other.

    Raises:
        InputError: there is no such file, it holds something else, or an option is unknown or wrong.
    """
    what = "a run's options, one per line (source, pretrained, retriever and more; jobs/ has examples)"
    return changed(options_of(read_yaml(Location(file), what), repr(file), what), changes, where=file)


def changed(values: dict[str, Any], changes: Mapping[str, Any], *, where: str) -> RunConfig:
    """Make the config of a run from options by name, some of them changed; see `read_run`."""
    for name, value in _by_name(changes):
        _change(values, name, value)
    return RunConfig.parse(values, where=where)


def parse_change(text: str) -> tuple[str, Any]:
    """Split `NAME=VALUE` into the name and the value, which is YAML.

    Raises:
        InputError: it is something else.
    """
    name, mark, value = text.partition("=")
    if not mark or not name:
        raise InputError(f"--set {text!r} is not NAME=VALUE, such as train.lora_rank=16")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError:
        if value.lstrip().startswith(("[", "{")):
            raise InputError(f"--set {text!r}: {value!r} is not a whole YAML list or section") from None
        return name, value  # such as "a,b",c, which is a list of two


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
