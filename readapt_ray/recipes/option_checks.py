"""Check before a run that its options fit each other, the retriever's vectors, the installed packages and this machine.

Only options of steps that are not done yet are checked.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from readapt_ray.catalog import models
from readapt_ray.catalog.dense_layers import dense_layers
from readapt_ray.catalog.models import OpenModel
from readapt_ray.catalog.shapes import shape_of
from readapt_ray.cluster import placement, step_metrics
from readapt_ray.errors import InputError
from readapt_ray.evaluation.measure_options import cutoffs
from readapt_ray.recipes.problems import Problems
from readapt_ray.retrieval.bm25 import import_bm25s
from readapt_ray.retrieval.index_kinds import IndexOptions, index_spec

_PASSAGES = 1_000_000
"""Assumed number of passages of a corpus that is not ingested yet."""


def check_options(
    due: Mapping[str, Any],
    every: Mapping[str, Any],
    retriever: OpenModel | None,
    num_passages: int | None,
    problems: Problems,
) -> int | None:
    """Check the options of all stages that will run, and add those that do not fit to `problems`.

    Args:
        due: configs of the steps that will run, by stage.
        every: configs of all steps with valid options, by stage.
        retriever: the model that makes the vectors; None if it could not be opened.
        num_passages: passages of the corpus; None if it is not ingested yet.
        problems: collects the errors.

    Returns:
        The number of dimensions of the stored vectors; None if not known.
    """
    dimension = None
    if "embed" in every and retriever is not None:
        with problems.collecting():
            dimension = _dimension(every["embed"], retriever)
    for stage, check in (("ingest", _check_tokenizer), ("train", _check_trackers)):
        if stage in due:
            with problems.collecting():
                check(due[stage])
    for stage in ("train", "merge", "embed"):
        if stage in due:
            with problems.collecting():
                _check_workers(stage, due[stage])
    if "index" in due:
        with problems.collecting():
            _check_index(due["index"], every.get("embed"), dimension, num_passages or _PASSAGES)
    if "search" in due:
        for other, check_search in (("index", _check_mode), ("evaluate", _check_depth)):
            if other in every:
                with problems.collecting():
                    check_search(due["search"], every[other])
    return dimension


def _dimension(embed: Any, retriever: OpenModel) -> int:
    """Return the number of dimensions of the vectors that embed stores.

    Raises:
        ModelError: the retriever's config is of an unknown kind.
        InputError: the options ask for more dimensions than the retriever's vectors have.
    """
    if layers := dense_layers(retriever):
        width = layers[-1].out_features
    else:
        holder = retriever.base if retriever.is_adapter else retriever
        width = shape_of(holder.config, holder.name).hidden
    known = models.find_encoding(retriever)
    encoding = embed.encoding or (known[0] if known else None)
    wanted = embed.dimensions or (encoding and encoding.dimensions) or width
    if wanted > width:
        raise InputError(
            f"section 'embed': dimensions = {wanted}, but vectors of {embed.retriever!r} have {width} numbers; give at most that"
        )
    return int(wanted)


@contextlib.contextmanager
def _named(section: str) -> Iterator[None]:
    """Add the name of the section to the errors of a stage."""
    try:
        yield
    except InputError as error:
        raise InputError(f"section {section!r}: {error}") from None


def _check_tokenizer(ingest: Any) -> None:
    """Check that the tokenizer for split_tokens can be loaded."""
    from readapt_ray.sources.splitting import open_splitting

    if ingest.split_tokens is not None:
        open_splitting(ingest.split_tokens, ingest.overlap, ingest.tokenizer)


def _check_trackers(train: Any) -> None:
    step_metrics.check_trackers(train.trackers)


def _check_workers(stage: str, config: Any) -> None:
    """Check that the workers that a section asks for can be placed."""
    # Tasks of merge queue for the same CPUs, so if one fits, any number does.
    num_workers = config.num_workers and (1 if stage == "merge" else config.num_workers)
    if num_workers == 0:
        return
    placement.check_user_placement(
        placement.Placement(num_workers, config.num_cpus_per_worker), who=f"workers of section {stage!r}"
    )


def _check_index(index: Any, embed: Any, dimension: int | None, num_passages: int) -> None:
    """Check that FAISS is installed and can build the wanted index of these vectors."""
    from readapt_ray.retrieval.faiss_build import faiss

    if index.bm25:
        import_bm25s()
    if dimension is None or embed is None:
        return
    kind = index_kind(index, embed.vector_dtype, dimension, num_passages)
    with _named("index"):
        spec = index_spec(kind, num_passages, dimension)
    if index.factory is not None:
        try:
            faiss.index_factory(dimension, spec.factory, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise InputError(
                f"section 'index': factory = {index.factory!r} is no index of {dimension} numbers for FAISS "
                f"({str(error).splitlines()[-1].strip()}); give another, or a kind"
            ) from None


def index_kind(index: Any, vector_dtype: str | None, dimension: int, num_passages: int) -> IndexOptions:
    """Resolve the options of section 'index' for a corpus of `num_passages` vectors.

    Raises:
        InputError: no kind of index fits into `memory_gb`.
    """
    from readapt_ray.stages.index import index_options

    with _named("index"):
        return index_options(index, num_passages, dimension, vector_dtype)


def _check_mode(search: Any, index: Any) -> None:
    if search.mode != "dense" and not index.bm25:
        raise InputError(
            f"section 'search': mode = {search.mode!r} searches words, and section 'index' has no bm25; set bm25 = true there, or "
            f"leave mode out"
        )


def _check_depth(search: Any, evaluate: Any) -> None:
    deeper = [name for name, cutoff in cutoffs(evaluate.measures).items() if cutoff > search.top_k]
    if deeper:
        raise InputError(
            f"section 'search': top_k = {search.top_k} finds fewer results than {', '.join(deeper)} of section 'evaluate' "
            f"looks at; leave top_k out, or give other measures"
        )
