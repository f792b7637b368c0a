"""The command `readapt`: one command per stage, with its options as flags, and commands that run several stages.

Flags, types, defaults and help come from the stages' configs. Exit codes: 0 on success, 2 on bad input, 1 on a failure,
130 after Ctrl-C, 143 after SIGTERM, 141 if the reader of stdout has closed it (`readapt ... | head`). A server that is
asked to stop exits with 0.
"""

import argparse
import contextlib
import functools
import itertools
import logging
import os
import select
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from readapt_ray import environment, library_logs, log_output, termination
from readapt_ray.command_parsers import COMMANDS, completion, parser_of
from readapt_ray.errors import (
    UNREADABLE,
    InputError,
    PlacementError,
    ReadaptError,
    unreadable,
)

if TYPE_CHECKING:
    from readapt_ray.artifacts import Artifact
    from readapt_ray.recipes import chain
    from readapt_ray.recipes.problems import Problems

logger = logging.getLogger("readapt_ray")

_PROVENANCE = "## Where the runs are from"
"""Heading of the last part of a report (evaluation/report.py), which is in the file but is not printed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command `readapt` and return its exit code.

    It changes this process: signal handlers, log handlers and warnings. Errors are printed to stderr. With
    READAPT_DEBUG set, an unexpected one is raised instead.

    Args:
        arguments: the command and its flags; None means those of this process.

    Raises:
        SystemExit: after `COMMAND --help`, with code 0.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = given[0] if given else "--help"
    ending = _Ending(command)
    _replace_closed_streams()
    try:
        warnings.filterwarnings("ignore")
        termination.handle_sigterm(ending.give_up if command != "serve" else None, is_ray_gone=_is_ray_gone)
        log_output.write_to_terminal()
        library_logs.silence()
        try:
            _run_command(command, given[1:])
        finally:
            sys.stdout.flush()
    except ReadaptError as error:
        print(f"readapt: error: {error}", file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, SystemExit) as stop:
        is_terminated = termination.is_from_sigterm(stop)
        if isinstance(stop, SystemExit) and not is_terminated:
            raise
        return ending.print_once(is_terminated=is_terminated)
    except UNREADABLE as error:
        print(f"readapt: error: {unreadable(error)}", file=sys.stderr)
        return InputError.exit_code
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _is_unread():
            return 141
        if environment.shows_tracebacks():
            raise
        print(f"readapt: failed: {type(error).__name__}: {error} (READAPT_DEBUG=1 shows where)", file=sys.stderr)
        return 1
    return 0


def _replace_closed_streams() -> None:
    """Open the null device in place of closed standard streams (`readapt ... >&-`).

    Without this, the next file that is opened would get the number of the stream, and what C++ code prints.
    """
    for name, mode in (("stdin", os.O_RDONLY), ("stdout", os.O_WRONLY), ("stderr", os.O_WRONLY)):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, mode), "r" if mode == os.O_RDONLY else "w"))


class _Ending:
    """Print once that a signal ended the command, after the cleanup or when the cleanup takes too long."""

    def __init__(self, command: str) -> None:
        self._command = command
        self._lock = threading.Lock()
        self._code: int | None = None

    def print_once(self, *, is_terminated: bool) -> int:
        """Print the message if it was not printed yet, and return the exit code."""
        with self._lock:
            if self._code is None:
                how = (
                    ""
                    if self._command in _WITHOUT_STATE
                    else "; run the same command again and it resumes where it stopped"
                )
                what, self._code = ("terminated", 143) if is_terminated else ("interrupted", 130)
                print(f"\nreadapt: {what}{how}", file=sys.stderr, flush=True)
        return self._code

    def give_up(self) -> None:
        """End this process now, without cleanup, as if it were killed."""
        os._exit(self.print_once(is_terminated=termination.has_sigterm()))


def _is_ray_gone() -> bool:
    """Return whether the Ray processes that this process started have ended."""
    connection = sys.modules.get("readapt_ray.cluster.connection")
    return connection is not None and connection.has_ended()


def _is_unread() -> bool:
    """Return whether the reader of stdout has closed it. If so, discard all further output."""
    with contextlib.suppress(OSError, ValueError):  # stdout may not be a real file
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        if poll.poll(0):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return True
    return False


def _run_command(command: str, arguments: Sequence[str]) -> None:
    if command in ("-h", "--help"):
        print(_overview())
    elif command == "--completion" or command.startswith("--completion="):
        print(completion([*command.split("=")[1:], *arguments]))
    elif command == "--version":
        from importlib.metadata import version

        print(version("readapt-ray"))
    elif command not in COMMANDS:
        from readapt_ray.config import meant

        raise InputError(
            f"no command {command!r}; {meant(command, COMMANDS) or 'the commands are ' + ', '.join(COMMANDS)}"
        )
    elif command in _RUNNERS:
        _RUNNERS[command](arguments)
    else:
        _run_stage(command, arguments)


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, text in COMMANDS.items()]
    return (
        "usage: readapt COMMAND [OPTIONS]\n\n"
        + "\n".join(lines)
        + "\n\n`readapt COMMAND --help` shows the options of a command, `readapt --completion bash|zsh|fish` a script that\n"
        "completes them with the Tab key. Exit code 0 on success, 2 on bad input, 1 on a "
        "failure,\n130 after Ctrl-C, 143 after SIGTERM, 141 if the reader of the output has closed it (`readapt ... | head`);\n"
        "a server that is told to stop ends with 0."
    )


def _run_stage(command: str, arguments: Sequence[str]) -> None:
    from readapt_ray import flags
    from readapt_ray.recipes import chain

    config_class, stage = chain.stage_parts(command)
    if command == "train":
        stage = chain.train_on_passages
    artifact = stage(flags.parse(command, COMMANDS[command], config_class, arguments))
    _print_result(artifact)
    print(artifact.uri)
    _end_by_requirements([artifact])


def _print_result(artifact: "Artifact") -> None:
    """Print the tables and verdicts of a report, or log how many rows of a corpus were left out."""
    if artifact.manifest.stage in ("evaluate", "drift"):
        lines = (artifact.location / "report.md").read_text().splitlines()
        print("\n".join(itertools.takewhile(lambda line: line != _PROVENANCE, lines)))
    elif artifact.manifest.stage == "ingest":
        _log_left_out(artifact.manifest.details)


def _end_by_requirements(made: Iterable["Artifact"]) -> None:
    """Check the requirements of all reports, so that the command exits with 1 if one does not hold.

    Raises:
        ReadaptError: a requirement does not hold.
    """
    checked = [each for artifact in made for each in artifact.manifest.details.get("requirements", ())]
    if failed := [each["sentence"] for each in checked if not each["holds"]]:
        raise ReadaptError(f"{len(failed)} of {len(checked)} requirements do not hold: {' '.join(failed)}")


def _log_left_out(details: dict[str, Any]) -> None:
    from readapt_ray.sources.source import in_words

    duplicates, bad = details["duplicates"]["dropped"], details["bad_rows"]
    reasons = in_words(bad["by_reason"])
    if duplicates or reasons:
        logger.info(
            "ingest: left out as duplicates: %s; as bad rows: %s%s",
            f"{duplicates:,}",
            f"{bad['total']:,}",
            f" ({reasons})" if reasons else "",
        )


def _run_config(options: argparse.Namespace, problems: "Problems | None" = None) -> "chain.RunConfig":
    """Return the config of a run. Wrong options are added to `problems`; without `problems` they are raised."""
    from readapt_ray.recipes import run_file
    from readapt_ray.recipes.problems import Problems

    found = Problems() if problems is None else problems
    changes = run_file.parse_changes(options.set, found)
    given = {name: value for name in ("root", "encoding") if (value := getattr(options, name)) is not None}
    config = run_file.read_run(options.config, changes | given, found)
    if problems is None:
        found.raise_them()
    return config


def _run_pipeline(arguments: Sequence[str]) -> None:
    from readapt_ray.recipes import run_end, running
    from readapt_ray.recipes.problems import Problems

    options, problems = parser_of("run").parsed(arguments), Problems()
    config = _run_config(options, problems)
    made = running.run(config, overwrite=options.overwrite, from_stage=options.from_stage, problems=problems)
    for name, artifact in made.items():
        if name != run_end.GENERAL_REPORT or "report" not in made:  # the report contains its table
            _print_result(artifact)
    print(run_end.closing(config, made))
    _end_by_requirements(made.values())


def _plan(arguments: Sequence[str]) -> None:
    import json

    from readapt_ray import flags, planner
    from readapt_ray.planner import plan_report

    options = parser_of("plan").parsed(arguments)
    plan_options = flags.given(planner.PlanConfig, options)
    found = planner.plan(_run_config(options), planner.PlanConfig.parse(plan_options, where="readapt plan", flags=True))
    print(json.dumps(plan_report.values(found), indent=2) if options.json else plan_report.text(found))
    unfilled = found.setting.cluster.unfilled
    if found.problems or unfilled:
        raise PlacementError("; ".join([*found.problems, *filter(None, [unfilled])]))


def _doctor(arguments: Sequence[str]) -> None:
    from readapt_ray import flags
    from readapt_ray.cluster import doctor

    options = parser_of("doctor").parsed(arguments)
    values = flags.given(doctor.DoctorConfig, options)
    if options.config is not None:
        run = flags.read_options(options.config)
        values.setdefault("models", [run[name] for name in ("pretrained", "retriever") if name in run])
        values.setdefault("root", run.get("root"))
    report = doctor.examine(doctor.DoctorConfig.parse(values, where="readapt doctor", flags=True))
    print(report.text())
    if report.num_failing:
        raise ReadaptError(f"will fail: {report.num_failing}; fix what is listed, and run doctor again")


def _compare(arguments: Sequence[str]) -> None:
    from readapt_ray import flags
    from readapt_ray.recipes import compare
    from readapt_ray.recipes.compare_plan import CompareConfig

    print(compare.to_markdown(compare.compare(flags.parse("compare", COMMANDS["compare"], CompareConfig, arguments))))


def _paper(arguments: Sequence[str]) -> None:
    from readapt_ray import flags
    from readapt_ray.recipes.paper import experiments
    from readapt_ray.recipes.paper.options import PaperConfig

    for text in experiments.run(flags.parse("paper", COMMANDS["paper"], PaperConfig, arguments)).values():
        print(text)


def _serve(arguments: Sequence[str]) -> None:
    from readapt_ray import flags
    from readapt_ray.serving.options import ServeConfig
    from readapt_ray.serving.server import serve

    serve(flags.parse("serve", COMMANDS["serve"], ServeConfig, arguments))


def _keep_up(command: str, arguments: Sequence[str]) -> None:
    from readapt_ray.recipes.refreshing import commands

    print(commands.output_of(command, COMMANDS[command], arguments))


def _encoding(arguments: Sequence[str]) -> None:
    from readapt_ray.catalog.contracts import show_contract

    options = parser_of("encoding").parsed(arguments)
    print(show_contract(options.model, write=options.write))


def _status(arguments: Sequence[str]) -> None:
    from readapt_ray import root_status
    from readapt_ray.storage import Location

    options = parser_of("status").parsed(arguments)
    if options.history:
        from readapt_ray.recipes.refreshing import history

        print(history.as_text(Location(options.root)))
        return
    usd_per_hour = None
    if options.cluster is not None:
        from readapt_ray.planner.cluster_files import read_cluster
        from readapt_ray.planner.prices import read_prices

        usd_per_hour = read_cluster(options.cluster, read_prices(options.prices)).usd_per_hour_of
    print(root_status.status_table(Location(options.root), usd_per_hour))


def _quickstart(arguments: Sequence[str]) -> None:
    from readapt_ray.recipes import quickstart

    quickstart.run(parser_of("quickstart").parsed(arguments).root)


_RUNNERS: dict[str, Callable[[Sequence[str]], None]] = {
    "run": _run_pipeline,
    "compare": _compare,
    "paper": _paper,
    "serve": _serve,
    **{name: functools.partial(_keep_up, name) for name in ("refresh", "find", "clean")},
    "status": _status,
    "quickstart": _quickstart,
    "plan": _plan,
    "doctor": _doctor,
    "encoding": _encoding,
}
_WITHOUT_STATE = ("serve", "find", "plan", "status", "doctor", "encoding")


if __name__ == "__main__":
    sys.exit(main())
