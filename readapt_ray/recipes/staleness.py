"""Find which artifacts of a run are stale: the run would make them differently now.

In: the steps of a run, and the manifests and leases under its root. Out: for each step, whether its artifact exists and
why it is stale: made with other options, from another input, or from a stale artifact. Only small files are read, except
the weights of the given models (`reads_models`), whose hashes the stages need anyway.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from readapt_ray import artifacts
from readapt_ray.catalog import models
from readapt_ray.progress import duration
from readapt_ray.recipes.chain import Step

_MODELS = ("pretrained", "retriever")
_RESOLVED: tuple[Any, ...] = (None, "auto", "retriever", (), [])
"""Values of options that a stage resolves. Its manifest has the resolved value."""

_CAPPED = {("pack", "block_tokens")}
"""Options that a stage lowers to the limit of the model."""


@dataclass(frozen=True)
class StepState:
    """A step of a run, with the state of the artifact at its output."""

    step: Step
    record: Mapping[str, Any] | None = None
    """The manifest of a complete artifact, the lease of an unfinished one, or None."""
    is_complete: bool = False
    changes: tuple[str, ...] = ()
    """Changed options and inputs that make the artifact stale. Empty if there are none."""
    stale_inputs: tuple[str, ...] = ()
    """Names of the stale steps whose outputs the artifact was made from."""

    @property
    def is_stale(self) -> bool:
        """Whether the artifact was made with other options or inputs than the run would use now."""
        return bool(self.changes or self.stale_inputs)

    @property
    def seconds(self) -> float:
        """How many seconds it took to make the artifact (so far, if it is unfinished); 0 if there is none."""
        return float(self.record["seconds"]) if self.record else 0.0


def step_states(steps: Sequence[Step], noted: Sequence[Mapping[str, Any]], *, reads_models: bool) -> list[StepState]:
    """Compare each step of a run with the artifact at its output.

    Args:
        steps: all steps, in order.
        noted: the entries of the steps in `run.json`. An entry has an artifact's `fingerprint` and the `options` that the run
            asked for; `replaces` is the fingerprint of an artifact that an unfinished run was replacing.
        reads_models: whether to hash the given models, to find out whether they changed.

    Returns:
        The state of each step, in the same order.

    Raises:
        CorruptFileError: a manifest cannot be read.
    """
    found: dict[str, StepState] = {}
    asked = {each["fingerprint"]: each["options"] for each in noted if each.get("fingerprint") and "options" in each}
    replaced = {each["replaces"] for each in noted if each.get("replaces")}
    for step in steps:
        record, is_complete = record_of(step)
        state = StepState(step, record, is_complete)
        if record is not None:
            changes = list(_changed_options(step, record, asked.get(record["fingerprint"])))
            if not changes and record["fingerprint"] in replaced:
                changes.append("a run that did not end was about to make it again")
            stale = []
            for name, value in inputs_of(step):
                source = _source(value, found)
                if source is not None and source.is_stale:
                    stale.append(source.step.name)
                elif what := _change_of_input(step, name, value, record, source, reads_models=reads_models):
                    changes.append(f"{name}: {what}")
            state = dataclasses.replace(state, changes=tuple(changes), stale_inputs=tuple(dict.fromkeys(stale)))
        found[step.name] = state
    return list(found.values())


def record_of(step: Step) -> tuple[Mapping[str, Any] | None, bool]:
    """Return the manifest at a step's output and True; without one, the lease (or None) and False."""
    manifest = artifacts.read_manifest(step.config.output)
    if manifest is not None:
        return dataclasses.asdict(manifest), True
    return artifacts.read_lease(step.config.output), False


def _changed_options(step: Step, record: Mapping[str, Any], asked: Mapping[str, Any] | None) -> Iterator[str]:
    if record["stage"] != step.stage:
        yield f"it is the output of {record['stage']!r}"
        return
    before = record.get("config", {}) if asked is None else asked
    section = "train" if step.stage == "pack" else step.stage
    for name, value in step.config.identity(before).items():
        is_resolved = asked is None and (value in _RESOLVED or (step.stage, name) in _CAPPED)
        if before.get(name) != value and not is_resolved:
            yield f"{section}.{name}: {before.get(name)!r} there, {value!r} now"


def inputs_of(step: Step) -> Iterator[tuple[str, str]]:
    """Yield (option, value) for each input that a step reads, such as ("corpus", "run/corpus").

    Inputs are the options in `config.inputs`: artifacts, models, files and sources. An option with several values
    yields one pair per value; one that is not set yields none.
    """
    for name in sorted(step.config.inputs):
        value = getattr(step.config, name)
        if isinstance(value, str | tuple):
            yield from ((name, each) for each in ([value] if isinstance(value, str) else value))


def _source(value: str, found: Mapping[str, StepState]) -> StepState | None:
    """Return the step whose output is the input, or contains it; None if no step makes it."""
    path = f"{value.partition('?')[0]}/"
    return next(
        (each for each in found.values() if path.startswith(f"{each.step.config.output.partition('?')[0]}/")), None
    )


def _change_of_input(
    step: Step, name: str, value: str, record: Mapping[str, Any], source: StepState | None, *, reads_models: bool
) -> str:
    """Say how an input differs from the one that the artifact was made from, as far as is known without reading it."""
    inputs: Mapping[str, str] = record.get("inputs", {})
    known = inputs.get(name)
    if isinstance(getattr(step.config, name), tuple):
        return ""
    is_whole = source is not None and value == source.step.config.output
    if known is None:
        return "it was not given before" if is_whole and inputs else ""
    if not value:
        return "it is not given any more"
    if source is not None:
        made = source.record["fingerprint"] if source.record else ""
        return "its content changed" if is_whole and made and made != known else ""
    if name not in _MODELS or not reads_models:
        return ""
    model = models.open_model(value, with_weights=step.stage != "pack")
    same = known == (model.tokenizer_fingerprint if step.stage == "pack" else model.fingerprint)
    return "" if same else "its content changed"


def summary(stale: Sequence[StepState]) -> str:
    """Return text that says what is stale and why, and how long each artifact took to make."""
    reasons = dict.fromkeys(change for each in stale for change in each.changes)
    parts = [f"{each.step.name} ({duration(each.seconds)})" for each in stale]
    total = duration(sum(each.seconds for each in stale))
    return f"{'; '.join(reasons)}. Stale, with the time each took: {', '.join(parts)}; {total} in all"
