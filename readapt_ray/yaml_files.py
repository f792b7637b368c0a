"""Read YAML files of users. Every mistake becomes an error of one line that names the file and the position."""

from typing import Any

import yaml

from readapt_ray.errors import InputError, first_line
from readapt_ray.storage import Location


class TwiceError(yaml.MarkedYAMLError):
    """A YAML mapping contains the same key twice."""


class DistinctLoader(yaml.SafeLoader):
    """A safe YAML loader that refuses duplicate keys. PyYAML would silently keep the last one."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose a mapping, and check that its keys are distinct.

        Raises:
            TwiceError: a key occurs twice.
        """
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        known = set()
        for name, _ in node.value:
            if isinstance(name, yaml.ScalarNode) and (name.tag, name.value) in known:
                raise TwiceError(problem=f"{name.value!r} is given twice", problem_mark=name.start_mark)
            known.add((name.tag, str(name.value)))
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """Construct a value from a node.

        Raises:
            ConstructorError: the text of the node cannot be such a value, as a date in month 13 (`2024-13-01`).
        """
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError):  # PyYAML lets the errors of Python's constructors through
            kind = node.tag.rpartition(":")[2]
            problem = f"{str(node.value)[:40]!r} is no valid {kind}; write text in quotes"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


_WORDS: dict[type, str] = {type(None): "nothing", str: "text", list: "a list"}


def read_yaml(location: Location, what: str) -> list[Any]:
    """Read all documents of a YAML file.

    Args:
        location: the file.
        what: what the file should be, for the error: "a price table".

    Raises:
        InputError: the file does not exist, or is not YAML in UTF-8.
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
    """Parse all documents of a YAML text.

    Args:
        text: the YAML.
        where: the name of the text in errors, such as its file.

    Raises:
        InputError: the text is not YAML, or a mapping contains a key twice.
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
    except RecursionError:
        raise InputError(f"{where} is nested too deeply to be read; write fewer brackets inside brackets") from None


def options_of(documents: list[Any], where: str, what: str) -> dict[str, Any]:
    """Return the only document of a YAML file, which must be a mapping of options.

    Args:
        documents: the documents of the file.
        where: the name of the file in errors.
        what: what the file should be, for the error.

    Raises:
        InputError: there are several documents, or it is not a mapping.
    """
    found = documents[0] if documents else None
    if len(documents) > 1:
        raise InputError(f"{where} holds {len(documents)} YAML documents; it must be {what}, in one")
    if not isinstance(found, dict):
        raise InputError(f"{where} holds {_WORDS.get(type(found)) or type(found).__name__}; it must be {what}")
    return found
