"""The command `readapt`: every stage with its options as flags, and what ties stages together.

Flags, types, defaults and help come from the stages' configs. Exit code 0 on success, 2 on bad input,
1 on a failure, 130 after Ctrl-C.
"""

import argparse
import logging
import os
import sys
import types
import typing
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import yaml
from pydantic.fields import FieldInfo

from readapt_ray import recipes
from readapt_ray.artifacts import Artifact
from readapt_ray.config import Config
from readapt_ray.errors import InputError, PlacementError, ReadaptError
from readapt_ray.storage import Location

C = typing.TypeVar("C", bound=Config)

_COMMANDS: dict[str, str] = {
    "quickstart": "run the main job on this machine's own docstrings, and show what it found",
    "run": "run the main job as a YAML file says: corpus, pretrained model, retriever",
    **recipes.STAGES,
    "compare": "measure several retrievers on one corpus: quality, time, bytes; also finetuned and RE-adapted",
    "paper": "repeat the paper's experiments, one or all, on one corpus or many",
    "serve": "serve a retriever and its index over HTTP",
    "plan": "say what a run would take on a cluster: hours, memory, bytes, money, and what breaks first",
    "status": "show what is done, running and missing under a root",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `readapt` with these arguments; the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    _set_up_output()
    command = given[0] if given else "--help"
    try:
        if command in ("-h", "--help"):
            print(_overview())
            return 0
        if command == "--version":
            from importlib.metadata import version

            print(version("readapt-ray"))
            return 0
        if command not in _COMMANDS:
            raise InputError(f"no command {command!r}; the commands are {', '.join(_COMMANDS)}")
        if command in _RUNNERS:
            _RUNNERS[command](given[1:])
        else:
            _run_stage(command, given[1:])
    except ReadaptError as error:
        print(f"readapt: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nreadapt: interrupted; run the same command again and it goes on where it stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("READAPT_DEBUG"):
            raise
        print(f"readapt: failed: {type(error).__name__}: {error} (READAPT_DEBUG=1 shows where)", file=sys.stderr)
        return 1
    return 0


def _set_up_output() -> None:
    warnings.filterwarnings("ignore")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logger = logging.getLogger("readapt_ray")
    logger.handlers = [handler]
    logger.setLevel(os.environ.get("READAPT_LOG_LEVEL", "INFO").upper())
    logger.propagate = False


def _overview() -> str:
    width = max(map(len, _COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, text in _COMMANDS.items()]
    return (
        "usage: readapt COMMAND [OPTIONS]\n\n"
        + "\n".join(lines)
        + "\n\n`readapt COMMAND --help` shows the options of a command."
    )


def _run_stage(command: str, arguments: Sequence[str]) -> None:
    config_class, stage = recipes.stage_parts(command)
    if command == "train":
        stage = recipes.train_on_passages
    artifact: Artifact = stage(_parse(command, config_class, arguments))
    print(artifact.uri)


def _run_parser(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"readapt {command}", description=_COMMANDS[command], allow_abbrev=False)
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE.yaml",
        help="the run: source, pretrained, retriever, and a section a stage",
    )
    parser.add_argument("--root", metavar="URI", help="folder under which every artifact lies (default: the file's)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change one option, such as train.lora_rank=16; may be repeated",
    )
    return parser


def _run_config(options: argparse.Namespace) -> recipes.RunConfig:
    values = _read_yaml(options.config)
    for change in options.set:
        _set_option(values, change)
    if options.root:
        values["root"] = options.root
    return recipes.RunConfig.parse(values, where=options.config)


def _run_pipeline(arguments: Sequence[str]) -> None:
    made = recipes.run(_run_config(_run_parser("run").parse_args(list(arguments))))
    report = made.get("report")
    if report is not None:
        print((report.location / "report.md").read_text())
    for name, artifact in made.items():
        print(f"{name:20} {artifact.uri}")


def _plan(arguments: Sequence[str]) -> None:
    import json

    from readapt_ray import planner
    from readapt_ray.planner import report

    parser = _run_parser("plan")
    _add_flags(parser, planner.PlanConfig)
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    options = parser.parse_args(list(arguments))
    given = {name: getattr(options, name) for name in planner.PlanConfig.model_fields}
    found = planner.plan(
        _run_config(options), planner.PlanConfig.parse(_given(planner.PlanConfig, given), where="readapt plan")
    )
    print(json.dumps(report.values(found), indent=2) if options.json else report.text(found))
    if found.problems:
        raise PlacementError("; ".join(found.problems))


def _compare(arguments: Sequence[str]) -> None:
    from readapt_ray import compare

    print(compare.to_markdown(compare.compare(_parse("compare", compare.CompareConfig, arguments))))


def _paper(arguments: Sequence[str]) -> None:
    from readapt_ray.paper import experiments

    for text in experiments.run(_parse("paper", experiments.PaperConfig, arguments)).values():
        print(text)


def _serve(arguments: Sequence[str]) -> None:
    from readapt_ray.serving.options import ServeConfig
    from readapt_ray.serving.server import serve

    serve(_parse("serve", ServeConfig, arguments))


def _status(arguments: Sequence[str]) -> None:
    from readapt_ray import status

    parser = argparse.ArgumentParser(prog="readapt status", description=_COMMANDS["status"], allow_abbrev=False)
    parser.add_argument("--root", required=True, metavar="URI", help="folder under which the artifacts lie")
    parser.add_argument(
        "--cluster", metavar="FILE", help="the cluster that runs it, as for plan: shows what it cost so far"
    )
    parser.add_argument("--prices", metavar="FILE.yaml", help="machines and prices; default: the table of the package")
    options = parser.parse_args(list(arguments))
    usd_per_hour = None
    if options.cluster:
        from readapt_ray.planner.machines import read_cluster
        from readapt_ray.planner.prices import read_prices

        usd_per_hour = read_cluster(options.cluster, read_prices(options.prices)).usd_per_hour
    print(status.table(Location(options.root), usd_per_hour))


def _quickstart(arguments: Sequence[str]) -> None:
    from readapt_ray import quickstart

    parser = argparse.ArgumentParser(prog="readapt quickstart", description=_COMMANDS["quickstart"], allow_abbrev=False)
    parser.add_argument(
        "--root", default="readapt-quickstart", metavar="DIR", help="folder of the artifacts (default: %(default)s)"
    )
    quickstart.run(parser.parse_args(list(arguments)).root)


_RUNNERS: dict[str, Callable[[Sequence[str]], None]] = {
    "run": _run_pipeline,
    "compare": _compare,
    "paper": _paper,
    "serve": _serve,
    "status": _status,
    "quickstart": _quickstart,
    "plan": _plan,
}


def _read_yaml(uri: str) -> dict[str, Any]:
    location = Location(uri)
    if not location.is_file():
        raise InputError(f"no file {uri!r}; give a YAML file")
    try:
        values = yaml.safe_load(location.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{uri!r} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{uri!r} holds {type(values).__name__}; it must hold options by name")
    return values


def _set_option(values: dict[str, Any], change: str) -> None:
    name, mark, text = change.partition("=")
    if not mark or not name:
        raise InputError(f"--set {change!r} is not NAME=VALUE, such as train.lora_rank=16")
    *sections, option = name.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise InputError(f"--set {change!r}: {section!r} is not a section")
    values[option] = yaml.safe_load(text)


def _parse(command: str, config_class: type[C], arguments: Sequence[str]) -> C:
    """Flags, and a YAML file under them where `--config` names one, as a config."""
    parser = _parser(command, config_class)
    given = vars(parser.parse_args(list(arguments)))
    file = given.pop("config")
    values = _read_yaml(file) if file else {}
    return config_class.parse(values | _given(config_class, given), where=f"readapt {command}")


def _given(config_class: type[Config], flags: dict[str, Any]) -> dict[str, Any]:
    """The options that were set, lists split at their commas."""
    lists = {name for name, field in config_class.model_fields.items() if _is_list(field.annotation)}
    return {
        name: [part for part in value.split(",") if part] if name in lists else value
        for name, value in flags.items()
        if value is not None
    }


def _parser(command: str, config_class: type[Config]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"readapt {command}", description=_COMMANDS.get(command), allow_abbrev=False, argument_default=None
    )
    parser.add_argument(
        "--config", metavar="FILE.yaml", help="options from a file, by name with underscores; flags go before it"
    )
    _add_flags(parser, config_class)
    return parser


def _add_flags(parser: argparse.ArgumentParser, config_class: type[Config]) -> None:
    for name, field in config_class.model_fields.items():
        flag = f"--{name.replace('_', '-')}"
        text = (field.description or "").replace("%", "%%")
        if typing.get_origin(field.annotation) is dict:
            continue  # a section of options, for the file
        if field.annotation is bool:
            parser.add_argument(
                flag,
                action=argparse.BooleanOptionalAction,
                help=f"{text} (default: {'yes' if field.default else 'no'})",
            )
        else:
            parser.add_argument(flag, metavar=_metavar(field.annotation), help=f"{text} {_default(field)}")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "(required)"
    if field.default is None or field.default == "":
        return ""
    value = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
    return f"(default: {value})"


def _metavar(annotation: Any) -> str:
    arguments = [each for each in typing.get_args(annotation) if each is not type(None)]
    if typing.get_origin(annotation) is typing.Literal:
        return "{" + ",".join(map(str, arguments)) + "}"
    if _is_list(annotation):
        return "A,B,..."
    if typing.get_origin(annotation) in (typing.Union, types.UnionType) and arguments:
        return _metavar(arguments[0])
    return {int: "N", float: "X", str: "TEXT"}.get(annotation, "FILE")


def _is_list(annotation: Any) -> bool:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return any(_is_list(each) for each in typing.get_args(annotation))
    return typing.get_origin(annotation) in (tuple, list)


if __name__ == "__main__":
    sys.exit(main())
