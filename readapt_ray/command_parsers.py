"""Define the commands of `readapt`, a parser for each, and the script that completes them in a shell.

Flags, types, defaults and help come from the config classes.
"""

import argparse
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from readapt_ray.errors import InputError
from readapt_ray.stages import STAGES

if TYPE_CHECKING:
    from readapt_ray import flags
    from readapt_ray.config import Config

COMMANDS: dict[str, str] = {
    "quickstart": "run the main job on the docstrings of this machine's Python packages, and show the result",
    "run": "run the main job of a YAML file: adapt a retriever to a corpus, re-embed it, evaluate",
    **{name: stage.summary for name, stage in STAGES.items()},
    "compare": "compare retrievers on one corpus: quality, time and size, also after finetune and RE-AdaptIR",
    "paper": "reproduce the paper's experiments on one or several corpora",
    "serve": "serve a retriever and its index over HTTP",
    "refresh": "bring vectors, index and export to what a source holds now, reading and encoding what changed",
    "find": "find a passage in the artifacts under a root",
    "clean": "remove earlier generations of a root, and what is left of deleted passages",
    "encoding": "show how a model turns text into vectors (pooling, prompts, special tokens), or write it into its folder",
    "doctor": "check this machine, or all nodes of a cluster, for what will fail, and say how to fix it",
    "plan": "estimate what a run takes on a cluster: hours, memory, bytes and money, and what breaks first",
    "status": "show what is done, stale, running, failed and missing in the folder of a run",
}


def parser_of(command: str) -> "flags.Parser":
    """Return the argument parser of a command, such as "train"."""
    if command in _PARSERS:
        return _PARSERS[command]()
    from readapt_ray import flags
    from readapt_ray.recipes import chain, compare_plan
    from readapt_ray.recipes.paper import options
    from readapt_ray.recipes.refreshing import options as refreshing
    from readapt_ray.serving.options import ServeConfig

    others: dict[str, type[Config]] = {
        "compare": compare_plan.CompareConfig,
        "paper": options.PaperConfig,
        "serve": ServeConfig,
        "refresh": refreshing.RefreshConfig,
        "find": refreshing.FindConfig,
        "clean": refreshing.CleanConfig,
    }
    config_class = others[command] if command in others else chain.stage_parts(command)[0]
    return flags.config_parser(command, COMMANDS[command], config_class)


def completion(arguments: Sequence[str]) -> str:
    """Return the shell script that completes commands and options with the Tab key.

    Args:
        arguments: one name: bash, zsh or fish.

    Raises:
        InputError: the shell is unknown, or shtab is not installed.
    """
    if len(arguments) != 1 or arguments[0] not in _SHELLS:
        raise InputError(
            f"--completion {' '.join(arguments)}: give one of {', '.join(_SHELLS)}, such as: readapt --completion bash > "
            f"~/.local/share/bash-completion/completions/readapt"
        )
    try:
        import shtab
    except ImportError:
        raise InputError("--completion needs the package shtab; pip install 'readapt-ray[completion]'") from None
    parser = argparse.ArgumentParser(prog="readapt")
    commands = parser.add_subparsers(dest="command")
    for name, summary in COMMANDS.items():
        commands.add_parser(name, help=summary, parents=[parser_of(name)], add_help=False)
    return str(shtab.complete(parser, shell=arguments[0]))


def _run_parser(command: str) -> "flags.Parser":
    from readapt_ray import flags

    parser = flags.Parser(
        command,
        COMMANDS[command],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_sections(),
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE.yaml",
        help="File of the run: source, pretrained, retriever, and a section of options per stage. (required)",
    )
    parser.add_argument(
        "--root", metavar="URI", help="Folder or URI to write all artifacts to. If omitted, the root of the file."
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="Change one option of the file, such as train.lora_rank=16. Can be given several times.",
    )
    parser.add_argument(
        "--encoding",
        metavar="FILE.json",
        help="JSON file with the retriever's pooling, prompts and special tokens. If omitted, the encoding of the file, of the "
        "retriever's folder or of the catalog.",
    )
    return parser


def _pipeline_parser() -> "flags.Parser":
    parser = _run_parser("run")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="Make all stale artifacts again: those made with other options or inputs, and all made from them.",
    )
    parser.add_argument(
        "--from", dest="from_stage", metavar="STAGE", help="As --overwrite, but only for this stage and those after it."
    )
    return parser


def _sections() -> str:
    """Return the help text about the options and sections of a run's YAML file, made from the configs."""
    from readapt_ray.config import default
    from readapt_ray.recipes import chain

    fields = chain.RunConfig.model_fields
    steps = chain.plan_run(chain.RunConfig(source="-", pretrained="-", retriever="-"))
    configs = {step.stage: step.config for step in steps}
    lines = ["Options of the file:"]
    for name, field in fields.items():
        if name not in configs:
            lines += _entry(f"{name}: {field.description} {default(field)}")
    lines.append("Sections of the file, and the options in each; `readapt STAGE --help` explains them:")
    for name in (name for name in fields if name in configs):
        wired = (
            configs[name].model_fields_set & ({"output"} | configs[name].inputs)
            | chain.NOT_IN_A_RUN.get(name, {}).keys()
        )
        lines += _entry(f"{name}: {', '.join(each for each in type(configs[name]).model_fields if each not in wired)}")
    return "\n".join(lines)


def _entry(text: str) -> list[str]:
    return textwrap.wrap(
        " ".join(text.split()), 110, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
    )


def _plan_parser() -> "flags.Parser":
    from readapt_ray import flags, planner

    parser = _run_parser("plan")
    flags.add_flags(parser, planner.PlanConfig)
    parser.add_argument("--json", action="store_true", help="Print the plan as JSON.")
    return parser


def _doctor_parser() -> "flags.Parser":
    from readapt_ray import flags
    from readapt_ray.cluster import doctor

    parser = flags.Parser("doctor", COMMANDS["doctor"])
    groups = flags.add_flags(parser, doctor.DoctorConfig)
    groups[0].add_argument(
        "--config", metavar="FILE.yaml", help="File of a run: check its root, pretrained and retriever as well."
    )
    return parser


def _encoding_parser() -> "flags.Parser":
    from readapt_ray import flags

    parser = flags.Parser("encoding", COMMANDS["encoding"])
    parser.add_argument(
        "--model", required=True, help="A catalog name, a folder, a GGUF file, a URI or a hub id. (required)"
    )
    parser.add_argument(
        "--write", action="store_true", help="Write it as readapt.json into the model's folder, unless it is there."
    )
    return parser


def _status_parser() -> "flags.Parser":
    from readapt_ray import flags

    parser = flags.Parser("status", COMMANDS["status"])
    parser.add_argument(
        "--root", required=True, metavar="URI", help="Folder or URI that holds the artifacts. (required)"
    )
    parser.add_argument(
        "--cluster",
        metavar="FILE",
        help="File of the cluster that runs it, as for `readapt plan`, to show what it cost so far.",
    )
    parser.add_argument(
        "--prices", metavar="FILE.yaml", help="YAML file of machines and prices. If omitted, the table of this package."
    )
    parser.add_argument("--history", action="store_true", help="Show each refresh instead: counts, time and advice.")
    return parser


def _quickstart_parser() -> "flags.Parser":
    from readapt_ray import flags

    parser = flags.Parser("quickstart", COMMANDS["quickstart"])
    parser.add_argument(
        "--root",
        default="readapt-quickstart",
        metavar="DIR",
        help="Folder to write all artifacts to. (default: %(default)s)",
    )
    return parser


_PARSERS: dict[str, Callable[[], "flags.Parser"]] = {
    "run": _pipeline_parser,
    "plan": _plan_parser,
    "doctor": _doctor_parser,
    "encoding": _encoding_parser,
    "status": _status_parser,
    "quickstart": _quickstart_parser,
}
"""Parsers of the commands whose options do not come from a single config class."""
_SHELLS = ("bash", "zsh", "fish")
