"""Check everything that can be known of a run before its first stage starts.

Models and how they take text, the head and the layers that training needs, lengths against positions, files, room on
the disk, and what stands under the root already. All that is wrong is said in one message.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from readapt_ray import leases, outputs
from readapt_ray.catalog import models, shapes
from readapt_ray.catalog.models import OpenModel
from readapt_ray.errors import ArtifactConflictError, InputError, ModelError
from readapt_ray.recipes import room_checks, standing
from readapt_ray.recipes.chain import Problems, RunConfig, Step
from readapt_ray.recipes.standing import Standing
from readapt_ray.storage import Location


def check_run(
    config: RunConfig, steps: Sequence[Step], noted: Sequence[Mapping[str, Any]], problems: Problems
) -> list[Standing]:
    """Refuse a run that would fail later for what is known now.

    Args:
        config: the run.
        steps: its steps, without those whose options are wrong; those whose config says `overwrite` may replace what is
            stale.
        noted: what `run.json` notes of each step.
        problems: what is wrong with the options.

    Returns:
        The steps whose artifacts are stale and are to be made again.

    Raises:
        InputError: one message with all that is wrong.
    """
    is_whole = not problems
    by_stage: dict[str, Any] = {step.stage: step.config for step in steps}
    pretrained = retriever = None
    with problems.noted():
        retriever = models.open_model(config.retriever)
    with problems.noted():
        pretrained = models.open_model(config.pretrained)
    if retriever is not None:
        with problems.noted():
            _check_encoding(config, retriever)
    for stage, check in (("train", _check_layers), ("pack", _check_positions)):
        if pretrained is not None and stage in by_stage:
            with problems.noted():
                check(pretrained, by_stage[stage])
    if "index" in by_stage and importlib.util.find_spec("faiss") is None:
        with problems.noted():
            importlib.import_module("readapt_ray.retrieval.faiss_build")  # its error says what to install
    for step in steps:
        with problems.noted():
            _check_files(config, step)
    found: list[Standing] = []
    if is_whole and pretrained is not None and retriever is not None:
        with problems.noted():
            found = standing.standings(steps, noted, reads_models=True)
            _check_root(config, found)
        by_name = {each.step.name: each for each in found}
        with problems.noted():
            room_checks.check_disk(config, by_name, pretrained, retriever)
        with problems.noted():
            room_checks.check_batch(by_name.get("adapter"))
        if not problems:
            with problems.noted():
                room_checks.check_memory(by_name.get("adapter"), by_stage["pack"].block_tokens, pretrained)
    problems.raise_them()
    return [each for each in found if each.is_stale]


def _check_encoding(config: RunConfig, retriever: OpenModel) -> None:
    """Check that merge and embed know how the retriever takes text, and that it has the positions for it."""
    own = [getattr(config, stage).get("encoding") or config.encoding for stage in ("merge", "embed")]
    if None in own:
        try:
            own.append(retriever.encoding)
        except ModelError as error:
            raise ModelError(
                f"{error}; in a run, --encoding FILE.json or `encoding: FILE.json` at the top of its file serves all stages"
            ) from None
    base = retriever.base if retriever.is_adapter else retriever
    positions = shapes.usable_positions(base.config, base.name)
    for encoding in own:
        longest = 0 if encoding is None or isinstance(encoding, str) else encoding.max_passage_tokens
        if positions is not None and longest > positions:
            raise ModelError(
                f"the encoding allows {longest} tokens, and {config.retriever!r} has {positions} positions; lower max_query_tokens "
                f"and max_passage_tokens"
            )


def _check_layers(pretrained: OpenModel, train: Any) -> None:
    """Check that the pretrained model has a head to train with and layers that take an adapter."""
    from readapt_ray.stages.train import resolve

    resolve(train, pretrained)


def _check_positions(pretrained: OpenModel, pack: Any) -> None:
    """Check that blocks are no longer than the pretrained model's positions."""
    from readapt_ray.stages.pack import within_positions

    try:
        within_positions(pack, pretrained)
    except ModelError as error:
        raise ModelError(f"section 'train': {error}") from None


def _check_files(config: RunConfig, step: Step) -> None:
    """Check that the files which the user's sections name are there, and queries and qrels."""
    section = "train" if step.stage == "pack" else step.stage
    for name in sorted(type(step.config).inputs & getattr(config, section, {}).keys()):
        value = getattr(step.config, name)
        if isinstance(value, str) and not Location(value).exists():
            raise InputError(f"section {section!r}: {name} = {value!r} is not there; give a file or folder that exists")
    if step.stage == "evaluate":
        absent = [
            name for name in ("queries", "qrels") if (uri := getattr(config, name)) and not Location(uri).exists()
        ]
        if absent:
            raise InputError(f"{absent[0]} = {getattr(config, absent[0])!r} is not there; give a file that exists")


def _check_root(config: RunConfig, found: Sequence[Standing]) -> None:
    """Check that all outputs are free, or ours and what the run would make, or may be overwritten."""
    for each in found:
        location = Location(each.step.config.output)
        if each.record is None:
            outputs.refuse_what_is_there(location, each.step.config, {}, None)
        elif not each.is_complete and leases.is_alive(each.record):
            raise ArtifactConflictError(
                f"process {each.record['pid']} on {each.record['host']} is writing {location}; wait for it to end, or give "
                f"another --root"
            )
    stale = [each for each in found if each.is_stale]
    if refused := [each for each in stale if not each.step.config.overwrite]:
        first = "train" if refused[0].step.stage == "pack" else refused[0].step.stage
        raise ArtifactConflictError(
            f"under {config.root!r} stands what was made otherwise: {standing.summary(stale)}. Make these again, and only "
            f"these, with --overwrite (or --from {first}), or give another --root"
        )
