"""Run `readapt run`: first all checks, then stage after stage.

In: the config of a run. Out: its artifacts. `run.json` under the root records the steps and the last failure.
`readapt-run.log` beside it holds the log of every start of the run.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any

from readapt_ray import artifacts, library_logs, outputs
from readapt_ray.artifacts import Artifact
from readapt_ray.config import meant
from readapt_ray.errors import InputError, StorageError, first_line
from readapt_ray.progress import ProgressReporter
from readapt_ray.recipes import room_checks, run_checks, staleness, unlabelled
from readapt_ray.recipes.background import run_in_background
from readapt_ray.recipes.chain import (
    RUN_NAME,
    RUN_STAGES,
    RunConfig,
    Step,
    plan_steps,
    run_stage,
    runs_beside_next,
)
from readapt_ray.recipes.problems import Problems
from readapt_ray.recipes.staleness import StepState
from readapt_ray.storage import Location

logger = logging.getLogger("readapt_ray")

LOG_NAME = "readapt-run.log"


def run(
    config: RunConfig, *, overwrite: bool = False, from_stage: str | None = None, problems: Problems | None = None
) -> dict[str, Artifact]:
    """Run all stages, from the corpus to the report. Complete artifacts are not made again.

    Args:
        config: the options of the run.
        overwrite: make all stale artifacts again: those made with other options or from other inputs.
        from_stage: like overwrite, but only for this stage and later ones.
        problems: errors that were already found in the options of the config. They are raised together with those that
            are found here.

    Returns:
        The artifacts, by their folder under the root (`corpus`, `adapter`, `adapted`, `report` ...).

    Raises:
        InputError: one message with all errors that were found before the first stage. Then no stage was started.
        ReadaptError: a stage failed. It is recorded in `run.json`, and the same run resumes.
    """
    logger.info("checking the run before its first stage")
    problems = Problems() if problems is None else problems
    root = Location(config.root)
    if "root" not in problems.left_out:
        with problems.collecting("root"):
            room_checks.check_root(config.root)
    planned = plan_steps(config, problems)
    with problems.collecting("from_stage"):
        planned = _with_overwriting(planned, overwrite=overwrite, from_stage=from_stage)
    steps, before = planned, {}
    if "root" not in problems.left_out:
        with problems.collecting():
            steps = unlabelled.steps_for_corpus(config, planned)
        with problems.collecting():
            outputs.refuse_foreign_results(root / RUN_NAME, {"config", "steps"})
        before = read_record(root)
    stale = run_checks.check_run(config, steps, before.get("steps", []), problems)
    if stale:
        logger.info("made again: %s", staleness.summary(stale))
    record = _Record(root, config, steps, before)
    record.begin(stale)
    made: dict[str, Artifact] = {}
    with _logged(root), record.failures(), ProgressReporter("run", is_outline=True) as outline:
        _run_steps(config, planned, record, made, outline)
    return made


def read_record(root: Location) -> dict[str, Any]:
    """Return the content of `run.json` under a root; empty if it does not exist or readapt did not write it."""
    file = root / RUN_NAME
    try:
        values = json.loads(file.read_bytes()) if file.is_file() else {}
    except ValueError:
        return {}
    steps = values.get("steps") if isinstance(values, dict) else None
    is_ours = isinstance(steps, list) and all(
        isinstance(each, dict) and isinstance(each.get("stage"), str) and isinstance(each.get("output"), str)
        for each in steps
    )
    if not is_ours:
        return {}
    failed = values.pop("failed", None)
    is_failure = isinstance(failed, dict) and {"output", "error", "host"} <= failed.keys()
    return values | ({"failed": failed} if is_failure and isinstance(failed.get("time"), int | float) else {})


class _Record:
    """Writes `run.json`: the config, the steps with the options they were run with, and the last failure."""

    def __init__(self, root: Location, config: RunConfig, steps: Sequence[Step], before: Mapping[str, Any]) -> None:
        self._file = root / RUN_NAME
        self._values: dict[str, Any] = {"config": config.model_dump(mode="json")}
        known = {each["output"]: each for each in before.get("steps", [])}
        self._steps = {
            step.name: {**known.get(step.name, {}), "stage": step.stage, "output": step.name} for step in steps
        }
        self.current: Step | None = None

    def begin(self, stale: Sequence[StepState]) -> None:
        """Record which artifacts will be replaced, so that they stay marked as stale if the run is interrupted."""
        for each in stale:
            if each.is_complete and each.record:
                self._steps[each.step.name]["replaces"] = each.record["fingerprint"]
        self.write()

    def write(self, **changes: Any) -> None:
        """Write `run.json`, with some fields changed."""
        self._values |= changes
        self._file.write_text(json.dumps({**self._values, "steps": list(self._steps.values())}, indent=2) + "\n")

    def replace_steps(self, steps: Sequence[Step]) -> None:
        """Replace the recorded steps with these. What is known of each step is kept."""
        self._steps = {
            step.name: {**self._steps.get(step.name, {}), "stage": step.stage, "output": step.name} for step in steps
        }

    def record_artifact(self, step: Step, artifact: Artifact) -> None:
        """Record the fingerprint of a finished artifact and the options that the run asked for."""
        self._steps[step.name].pop("replaces", None)
        self._steps[step.name] |= {"fingerprint": artifact.fingerprint, "options": step.config.identity()}
        self.write()

    @contextlib.contextmanager
    def failures(self) -> Iterator[None]:
        """Record an error that a step raises inside the `with` block, for `readapt status`."""
        try:
            yield
        except Exception as error:
            step = self.current
            what = first_line(error)
            with contextlib.suppress(OSError, StorageError):
                self.write(
                    failed={
                        "output": step.name if step else "",
                        "error": what,
                        "time": time.time(),
                        "host": socket.gethostname(),
                    }
                )
            raise


def _with_overwriting(steps: Sequence[Step], *, overwrite: bool, from_stage: str | None) -> list[Step]:
    """Return the steps, with `overwrite` set in the config of each step that may replace a stale artifact."""
    if from_stage is not None and from_stage not in RUN_STAGES:
        hint = meant(from_stage, RUN_STAGES) or f"the stages are {', '.join(RUN_STAGES)}"
        raise InputError(f"--from {from_stage!r} is no stage of the run; {hint}")
    first = RUN_STAGES.index(from_stage) if from_stage else len(RUN_STAGES)
    first -= from_stage == "train"  # options of train decide how passages are packed, too
    return [
        dataclasses.replace(step, config=step.config.model_copy(update={"overwrite": True}))
        if overwrite or RUN_STAGES.index(step.stage) >= first
        else step
        for step in steps
    ]


def _run_steps(
    config: RunConfig,
    planned: Sequence[Step],
    record: _Record,
    made: dict[str, Artifact],
    outline: ProgressReporter,
) -> None:
    """Run the steps. After ingest, the remaining steps depend on whether the corpus has queries and qrels.

    Args:
        config: the options of the run.
        planned: the steps of a run with queries.
        record: writes `run.json`.
        made: takes the artifacts, by name of their step.
        outline: shows how many stages are done.
    """
    steps = unlabelled.steps_for_corpus(config, planned)
    number = 0
    beside: tuple[Step, Future[Artifact]] | None = None
    while number < len(steps):
        step = steps[number]
        outline.update(number, len(steps), unit="stages", note=f"{number} of {len(steps)} stages done")
        number += 1
        logger.info("[%d/%d] %s -> %s", number, len(steps), step.stage, step.config.output)
        record.current = step
        if runs_beside_next(steps, number - 1) and _leaves_gpus_idle(step):
            beside = step, run_in_background(functools.partial(run_stage, step.stage, step.config))
            continue
        try:
            made[step.name] = run_stage(step.stage, step.config)
        except Exception:
            if beside is not None:
                wait([beside[1]])
            raise
        if beside is not None:
            record.current = beside[0]
            made[beside[0].name] = beside[1].result()
            record.record_artifact(beside[0], made[beside[0].name])
            beside = None
        if step.name == "corpus":
            steps = unlabelled.steps_for_corpus(config, planned)
            record.replace_steps(steps)
            if steps[-1].stage == "drift":
                unlabelled.log_missing_queries(config)
        if step.is_general and step.stage == "ingest":
            unlabelled.check_general(config, steps)
        record.record_artifact(step, made[step.name])


def _leaves_gpus_idle(step: Step) -> bool:
    """Return whether a step (which uses no GPU) still has to run, and the cluster has GPUs."""
    if artifacts.read_manifest(step.config.output) is not None:
        return False
    from readapt_ray.cluster import connection

    return bool(connection.connect().num_gpus)


@contextlib.contextmanager
def _logged(root: Location) -> Iterator[None]:
    """Append log lines to `readapt-run.log` under a local root, with the traceback of a failure."""
    if not root.is_local:
        yield
        return
    with contextlib.suppress(OSError):  # the stage that writes there raises a better error
        root.local_path.mkdir(parents=True, exist_ok=True)
    handler = library_logs.LogFile(root.local_path / LOG_NAME, "%(asctime)s %(message)s")
    logger.addHandler(handler)
    try:
        with library_logs.written_to(root.local_path / LOG_NAME):
            yield
    except BaseException as error:
        if isinstance(error, Exception) and not isinstance(error, InputError):
            logger.error("the log of this run, with what its libraries said: %s", root.local_path / LOG_NAME)
        failure = logger.makeRecord(logger.name, logging.ERROR, "", 0, "the run ended here", (), sys.exc_info())
        handler.handle(failure)
        raise
    finally:
        logger.removeHandler(handler)
        handler.close()
