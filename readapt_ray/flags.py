"""Make the flags of a command from its config (types, defaults, help), and parse them over an optional YAML file."""

import argparse
import types
import typing
from collections.abc import Sequence
from typing import Any, NoReturn

from pydantic.fields import FieldInfo

from readapt_ray.config import Config, default, flag, is_list, meant
from readapt_ray.errors import InputError
from readapt_ray.storage import Location
from readapt_ray.yaml_files import options_of, read_yaml

C = typing.TypeVar("C", bound=Config)


class Parser(argparse.ArgumentParser):
    """An argument parser that raises an InputError of one line, where argparse would print the usage and exit."""

    def __init__(self, command: str, description: str, **options: Any) -> None:
        super().__init__(prog=f"readapt {command}", description=description, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raise an error of argparse as an InputError.

        Raises:
            InputError: always.
        """
        raise InputError(f"{self.prog}: {message}; `{self.prog} --help` shows the options")

    def parsed(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse a command line.

        Raises:
            InputError: an option is unknown or lacks its value. For an unknown one the message suggests a similar one.
        """
        known = [name for action in self._actions for name in action.option_strings]
        for name in (each.partition("=")[0] for each in arguments):
            if name.startswith("--") and name not in known:
                hint = meant(name, known) or f"`{self.prog} --help` shows the options"
                raise InputError(f"{self.prog}: unknown option {name!r}; {hint}")
        return self.parse_args(list(arguments))


class _Once(argparse.Action):
    """Refuse a list option that is given twice: the second would silently replace the values of the first."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if getattr(namespace, self.dest, None) is not None:
            parser.error(f"{option_string} is given twice; give it once, with commas between its values")
        setattr(namespace, self.dest, values)


def parse(command: str, description: str, config_class: type[C], arguments: Sequence[str]) -> C:
    """Parse flags into a config. If `--config` names a YAML file, flags override its options.

    Raises:
        InputError: an option is unknown, missing or wrong.
    """
    options = config_parser(command, description, config_class).parsed(arguments)
    values = {} if options.config is None else read_options(options.config)
    return config_class.parse(values | given(config_class, options), where=f"readapt {command}", flags=True)


def config_parser(command: str, description: str, config_class: type[Config]) -> Parser:
    """Return the parser of a command whose options are the fields of a config class, and `--config` (a YAML file)."""
    parser = Parser(command, description, epilog=_notes(config_class))
    groups = add_flags(parser, config_class)
    groups[0].add_argument(
        "--config",
        metavar="FILE.yaml",
        help="YAML file of options, by name with underscores. Options on the command line override it.",
    )
    return parser


def given(config_class: type[Config], options: argparse.Namespace) -> dict[str, Any]:
    """Return the options of a config that the command line sets, by name. `options` is what the parser returned."""
    found = {name: getattr(options, name, None) for name in config_class.model_fields}
    return {name: value for name, value in found.items() if value is not None}


GROUPS = ("Input and output", "Settings", "Speed and memory", "Safety")
"""The groups of options in --help, most important first."""


def add_flags(parser: Parser, config_class: type[Config]) -> list[argparse._ArgumentGroup]:
    """Add a flag to the parser for each option of a config that is not a section; return the argument groups.

    A section is an option that is a dict; only a YAML file can hold it. A boolean option also gets `--no-NAME`. The
    usage line is replaced, so add other required flags before.

    Returns:
        A group per title in GROUPS, in that order.
    """
    groups = [parser.add_argument_group(title) for title in GROUPS]
    fields = sorted(config_class.model_fields.items(), key=lambda item: _rank(*item))
    required = [f"{action.option_strings[0]} {action.metavar}" for action in parser._actions if action.required]
    required += [f"{flag(name)} {_metavar(field.annotation)}" for name, field in fields if field.is_required()]
    parser.usage = " ".join([parser.prog, *required, "[OPTIONS]"])
    for name, field in fields:
        text = (field.description or "").replace("%", "%%")
        group = groups[_group_of(config_class, name)]
        if typing.get_origin(field.annotation) is dict:
            continue  # a section of options, which only a file can hold
        if field.annotation is bool or bool in typing.get_args(field.annotation):
            group.add_argument(
                flag(name), action=argparse.BooleanOptionalAction, help=f"{text} {default(field)}".rstrip()
            )
        else:
            group.add_argument(
                flag(name),
                action=_Once if _has_several(field.annotation) else "store",
                metavar=_metavar(field.annotation),
                help=f"{text} {default(field)}".rstrip(),
            )
    return groups


def _rank(name: str, field: FieldInfo) -> tuple[bool, bool]:
    """Return the sort key of an option: required options come first, `output` after its neighbours."""
    return not field.is_required(), name == "output"


def _group_of(config_class: type[Config], name: str) -> int:
    """Return the index in GROUPS of an option's group."""
    if name in config_class.safety:
        return 3
    if name in config_class.operational:
        return 2
    return 0 if name in config_class.inputs or name in ("output", "root") else 1


def _notes(config_class: type[Config]) -> str:
    """Return notes for the end of --help: how to quote commas, and which sections only a file can hold."""
    fields = config_class.model_fields
    sections = [name for name, field in fields.items() if typing.get_origin(field.annotation) is dict]
    notes = ["An item that contains a comma is quoted: '\"a,b\",c' has two items."] * any(
        is_list(field.annotation) for field in fields.values()
    )
    if sections:
        notes.append(
            f"The file of --config can also hold the sections {', '.join(sections)}: options of these stages by name."
        )
    return " ".join(notes)


def _has_several(annotation: Any) -> bool:
    """Return whether an option takes several values: a list, or values by name."""
    return is_list(annotation) or any(typing.get_origin(each) is dict for each in typing.get_args(annotation))


def _metavar(annotation: Any) -> str:
    arguments = [each for each in typing.get_args(annotation) if each is not type(None)]
    if typing.get_origin(annotation) is typing.Literal:
        return "{" + ",".join(map(str, arguments)) + "}"
    if is_list(annotation):
        return "A,B,..."
    if typing.get_origin(annotation) is typing.Annotated:
        return _metavar(arguments[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType) and arguments:
        return _metavar(arguments[0])
    return {int: "N", float: "X", str: "TEXT"}.get(annotation, "FILE")


def read_options(uri: str) -> dict[str, Any]:
    """Read the options of a command from a YAML file.

    Raises:
        InputError: the file does not exist, or holds something else.
    """
    what = "the options of the command, one per line"
    return options_of(read_yaml(Location(uri), what), repr(uri), what)
