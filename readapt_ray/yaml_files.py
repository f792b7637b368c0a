"""Read YAML that users wrote: every mistake becomes one line that names the file and the place."""

from typing import Any

import yaml

from readapt_ray.errors import InputError, first_line
from readapt_ray.storage import Location


class TwiceError(yaml.MarkedYAMLError):
    """A mapping has a name twice."""


class DistinctLoader(yaml.SafeLoader):
    """A safe loader that refuses a name that a mapping has twice; PyYAML keeps the last of them without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose a mapping.

        Raises:
            TwiceError: it has a name twice.
        """
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        known = set()
        for name, _ in node.value:
            if isinstance(name, yaml.ScalarNode) and (name.tag, name.value) in known:
                raise TwiceError(problem=f"{name.value!r} is given twice", problem_mark=name.start_mark)
            known.add((name.tag, str(name.value)))
        return node


_WORDS: dict[type, str] = {type(None): "nothing", str: "text", list: "a list"}


def read_yaml(location: Location, what: str) -> list[Any]:
    """Return the documents of a YAML file.

    Args:
        location: the file.
        what: what it should be, for the error: "a price table".

    Raises:
        InputError: there is no such file, or it is not YAML in UTF-8.
    """
    if not location.is_file():
        problem = f"{location.uri!r} is a folder" if location.is_folder() else f"no file {location.uri!r}"
        raise InputError(f"{problem}; give {what} as a YAML file")
    try:
        text = location.read_text()
    except UnicodeDecodeError as error:
        raise InputError(f"{location.uri!r} is not YAML: byte {error.start:,} is not UTF-8; save it as UTF-8") from None
    return parse_yaml(text, repr(location.uri))


def parse_yaml(text: str, where: str) -> list[Any]:
    """Return the documents of a YAML text; errors call it `where`.

    Raises:
        InputError: it is not YAML, or a mapping has a name twice.
    """
    try:
        return list(yaml.load_all(text, DistinctLoader))
    except TwiceError as error:
        mark = error.problem_mark
        assert mark is not None
        raise InputError(f"{where}, line {mark.line + 1}: {error.problem}; keep one of them") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = "" if mark is None else f" in line {mark.line + 1}, column {mark.column + 1}"
        raise InputError(f"{where} is not YAML: {error.problem or error.context}{place}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{where} is not YAML: {first_line(error)}") from None


def options_of(documents: list[Any], where: str, what: str) -> dict[str, Any]:
    """Return the one document that holds options by name.

    Raises:
        InputError: there are several, or none that holds options by name.
    """
    found = documents[0] if documents else None
    if len(documents) > 1:
        raise InputError(f"{where} holds {len(documents)} YAML documents; it must be {what}, in one")
    if not isinstance(found, dict):
        raise InputError(f"{where} holds {_WORDS.get(type(found)) or type(found).__name__}; it must be {what}")
    return found
