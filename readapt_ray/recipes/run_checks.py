"""Check everything about a run that can be checked before its first stage starts.

The checks cover: the source, both models and their encodings, whether the two models belong together, the head and layers
that training needs, lengths against the model's positions, files, combinations of options, disk space, memory, and what
the root already holds. One message lists all errors.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from readapt_ray import artifacts, leases, outputs
from readapt_ray.catalog import models, shapes
from readapt_ray.catalog.models import OpenModel
from readapt_ray.errors import ArtifactConflictError, CorpusError, InputError, ModelError
from readapt_ray.recipes import memory_checks, option_checks, room_checks, staleness
from readapt_ray.recipes.chain import GENERAL, RunConfig, Step, by_stage
from readapt_ray.recipes.problems import Problems
from readapt_ray.recipes.staleness import StepState
from readapt_ray.storage import Location

_CORPORA = ("corpus", f"{GENERAL}/corpus")
_MODEL_NAMES = frozenset({"tokenizer"})
"""Inputs in the user's sections that are not files."""


def check_run(
    config: RunConfig, steps: Sequence[Step], noted: Sequence[Mapping[str, Any]], problems: Problems
) -> list[StepState]:
    """Refuse a run that would fail later, if the reason can be known now.

    Args:
        config: the options of the run.
        steps: its steps, without those whose options are wrong. A step with `overwrite` in its config may replace a stale
            artifact.
        noted: the entries of the steps in `run.json`.
        problems: errors that were already found in the options.

    Returns:
        The steps whose artifacts are stale and will be made again.

    Raises:
        InputError: one message with all errors.
    """
    found: list[StepState] = []
    if "root" not in problems.left_out:
        with problems.collecting():
            found = staleness.step_states(_with_inputs(config, steps, problems), noted, reads_models=True)
        _check_root(config, steps, found, problems)
    done = {each.step.name for each in found if each.is_complete and not each.is_stale}
    every = by_stage(steps)
    due = by_stage(step for step in steps if step.name not in done)
    for step in steps:
        if step.stage == "ingest" and step.name not in done and "source" not in problems.left_out:
            with problems.collecting():
                _check_source(step.config)
    labels = {(search.queries, search.qrels): search for search in _searches(config, steps, done)}
    for search in labels.values():
        with problems.collecting():
            _check_labels(search)
    opened = dict(_opened(config, problems))
    _check_models(config, opened, every, problems)
    for step in steps:
        with problems.collecting():
            _check_files(config, step)
    corpora = {name: artifacts.read_manifest(Location(config.root) / name) for name in done if name in _CORPORA}
    corpus = corpora.get("corpus")
    num_passages = None if corpus is None else corpus.counts.get("num_passages")
    dimension = option_checks.check_options(due, every, opened.get("retriever"), num_passages, problems)
    if "root" not in problems.left_out:
        left = [step for step in steps if step.name not in done]
        with problems.collecting():
            room_checks.check_disk(config.root, left, opened.get("pretrained"), dimension, corpora)
    with problems.collecting():
        room_checks.check_batch(due.get("train"))
    with problems.collecting():
        memory_checks.check_memory(due, every, opened, problems, dimension=dimension, num_passages=num_passages)
    problems.raise_them()
    return [each for each in found if each.is_stale]


def _searches(config: RunConfig, steps: Sequence[Step], done: Collection[str]) -> Iterator[Any]:
    """Yield the configs of searches that will run on queries or qrels given by the user, if both files exist."""
    for step in steps:
        search: Any = step.config
        given: Any = config.general if step.is_general else config
        is_due = step.stage == "search" and step.name not in done and (given.queries or given.qrels) and search.qrels
        if is_due and all(Location(uri).exists() for uri in (search.queries, search.qrels)):
            yield search


def _check_labels(search: Any) -> None:
    """Check that queries and qrels can be read and belong together.

    Raises:
        CorpusError: they cannot be read, or no query has a judgement.
    """
    from readapt_ray.sources.judgements import keep_judged, read_qrels, read_queries

    if not keep_judged(read_queries(search.queries, search.columns), read_qrels(search.qrels, search.columns)):
        raise CorpusError(
            f"no query of {search.queries!r} is judged in {search.qrels!r}; give files that belong together"
        )


def _opened(config: RunConfig, problems: Problems) -> Iterator[tuple[str, OpenModel]]:
    """Yield the models that can be opened, each with the option that names it: pretrained, retriever."""
    for option in sorted({"pretrained", "retriever"} - problems.left_out):
        with problems.collecting():
            yield option, models.open_model(getattr(config, option))


def _check_models(
    config: RunConfig, opened: Mapping[str, OpenModel], configs: Mapping[str, Any], problems: Problems
) -> None:
    """Check that the two models fit the stages that use them, and that they belong together."""
    pretrained, retriever = opened.get("pretrained"), opened.get("retriever")
    if retriever is not None and "encoding" not in problems.left_out:
        with problems.collecting():
            _check_encoding(config, retriever)
    for stage, check in (("train", _check_layers), ("pack", _check_positions)):
        if pretrained is not None and stage in configs:
            with problems.collecting():
                check(pretrained, configs[stage])
    if pretrained is not None and retriever is not None and "merge" in configs:
        with problems.collecting():
            _check_pair(pretrained, retriever, configs["merge"])


def _with_inputs(config: RunConfig, steps: Sequence[Step], problems: Problems) -> list[Step]:
    """Return the steps whose inputs are all planned. Steps after one with wrong options are left out."""
    if not problems:
        return list(steps)
    kept: list[Step] = []
    for step in steps:
        made = tuple(f"{each.config.output.partition('?')[0]}/" for each in kept)
        paths = [f"{value.partition('?')[0]}/" for _, value in staleness.inputs_of(step)]
        root = f"{Location(config.root).uri.partition('?')[0]}/"
        if all(path.startswith(made) or not path.startswith(root) for path in paths):
            kept.append(step)
    return kept


def _check_source(ingest: Any) -> None:
    """Check that the source exists and has a known format. Of a corpus to download, only the name is checked."""
    from readapt_ray.sources.opening import check_source

    check_source(ingest.source, ingest.format, ingest.read_options())


def _check_pair(pretrained: OpenModel, retriever: OpenModel, merge: Any) -> None:
    """Check that the retriever was made from the pretrained model."""
    from readapt_ray.weights.merge_plan import check_pair

    if not pretrained.is_adapter:
        check_pair(pretrained, retriever, accept=merge.accept, layer_scales=merge.layer_scales)


def _check_encoding(config: RunConfig, retriever: OpenModel) -> None:
    """Check that merge and embed know the retriever's encoding, and that its lengths fit the model's positions."""
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
    """Check that the pretrained model has a language-model head, and layers for the adapter."""
    from readapt_ray.stages.train import resolve

    resolve(train, pretrained)


def _check_positions(pretrained: OpenModel, pack: Any) -> None:
    """Check that blocks are not longer than the pretrained model's number of positions."""
    from readapt_ray.stages.pack import within_positions

    try:
        within_positions(pack, pretrained)
    except ModelError as error:
        raise ModelError(f"section 'train': {error}") from None


def _check_files(config: RunConfig, step: Step) -> None:
    """Check that the files named in the user's sections exist, and queries and qrels."""
    section = "train" if step.stage == "pack" else step.stage
    given = config.general if step.is_general else config
    options = {} if step.is_general else getattr(config, section, {})
    for name in sorted(type(step.config).inputs & options.keys() - _MODEL_NAMES):
        value = getattr(step.config, name)
        if isinstance(value, str) and not Location(value).exists():
            raise InputError(f"section {section!r}: {name} = {value!r} is not there; give a file or folder that exists")
    if step.stage == "evaluate":
        absent = [name for name in ("queries", "qrels") if (uri := getattr(given, name)) and not Location(uri).exists()]
        if absent:
            where = f"section {GENERAL!r}: " if step.is_general else ""
            raise InputError(
                f"{where}{absent[0]} = {getattr(given, absent[0])!r} is not there; give a file that exists"
            )


def _check_root(config: RunConfig, steps: Sequence[Step], found: Sequence[StepState], problems: Problems) -> None:
    """Check all outputs: each must be free, or up to date, or allowed to be overwritten."""
    for step in steps:
        with problems.collecting():
            _check_output(step)
    stale = [each for each in found if each.is_stale]
    refused = [each for each in stale if not each.step.config.overwrite]
    if refused and not problems.left_out:  # if an option is unknown, everything may seem stale
        first = "train" if refused[0].step.stage == "pack" else refused[0].step.stage
        with problems.collecting():
            raise ArtifactConflictError(
                f"outputs under {config.root!r} were made with other options or inputs: {staleness.summary(stale)}. Make these again, and only "
                f"these, with --overwrite (or --from {first}), or give another --root"
            )


def _check_output(step: Step) -> None:
    """Check that an output is free, or holds an artifact of ours that no process is writing."""
    location = Location(step.config.output)
    record, is_complete = staleness.record_of(step)
    if record is None:
        outputs.refuse_what_is_there(location, step.config, {}, None)
    elif not is_complete and leases.is_alive(record):
        raise ArtifactConflictError(
            f"process {record['pid']} on {record['host']} is writing {location}; wait for it to end, or give another --root"
        )
