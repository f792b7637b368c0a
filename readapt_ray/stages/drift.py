"""The drift stage: measure without queries how much an adaptation changed loss, vectors and neighbours.

In: the adapter of a run, and the vectors of the retriever before and after adaptation. Out: `report.json`, `report.md`
and `report.html` with the language-model loss on passages that were withheld from training (`--withhold`), how far
vectors moved, and how many nearest neighbours stayed the same. Vectors of at most 40 shards are read, one at a time.
"""

import json
import math
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from readapt_ray import artifacts
from readapt_ray.artifacts import Artifact, Workspace
from readapt_ray.catalog import models
from readapt_ray.cluster.encoding_dtype import encoding_dtype
from readapt_ray.config import OptionError, StageConfig
from readapt_ray.dead_rows import name_without_mark
from readapt_ray.errors import CorpusError, FingerprintMismatchError, WorkerError, first_line
from readapt_ray.made_of import open_input
from readapt_ray.retrieval import neighbours
from readapt_ray.seeds import random_generator
from readapt_ray.storage import Location

_MAX_SHARDS = 40
_NORMAL_95 = 1.96


class DriftConfig(StageConfig):
    """The options of `readapt drift`."""

    adapter: str
    """Output of `readapt train`. It names the pretrained model and the blocks that it was trained on."""
    vectors: tuple[str, ...]
    """Vectors of the retriever before and after adaptation, separated by a comma: two outputs of `readapt embed` for the
    same corpus."""
    num_passages: int = Field(default=2000, ge=1)
    """Maximum number of passages whose vectors are compared."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type that the language model computes in; auto is bfloat16 on GPUs and on CPUs with AMX or AVX512_BF16, else
    float32."""

    inputs: ClassVar[frozenset[str]] = frozenset({"adapter", "vectors"})

    @model_validator(mode="after")
    def _two(self) -> Self:
        if len(self.vectors) != 2:
            raise OptionError("{vectors} = {value!r}; give two, before and after adaptation", value=list(self.vectors))
        return self


def drift(config: DriftConfig) -> Artifact:
    """Measure without queries how much an adaptation changed loss, vectors and neighbours, and write a report.

    Differences are after minus before. If no passage was withheld from training, or a worker fails, the report has a
    note instead of the loss. Does nothing if the output holds a report of the same options and inputs.

    Raises:
        ArtifactMissingError: the adapter or the vectors are not the output of their stage.
        CorpusError: the vectors are of different corpora or dimensions, or in shards that have no passage in common.
        FingerprintMismatchError: the blocks or the corpus of the adapter were replaced since it was trained.
        CorruptFileError: a file was cut short, altered, or is missing.
        ArtifactConflictError: the output holds something else, or a result of other options and `overwrite` is not set.
    """
    adapter = artifacts.open_artifact(config.adapter, "train")
    before, after = (artifacts.open_artifact(uri, "embed") for uri in config.vectors)
    if before.manifest.inputs["corpus"] != after.manifest.inputs["corpus"]:
        raise CorpusError(
            f"{before.uri!r} and {after.uri!r} hold vectors of different corpora; embed one corpus with both models"
        )
    inputs = {"adapter": adapter.fingerprint, "vectors": artifacts.fingerprint([before.fingerprint, after.fingerprint])}

    def work(workspace: Workspace) -> None:
        found = {
            "loss": _loss_change(config, adapter, workspace),
            "vectors": _vector_change(before, after, config.num_passages),
            "truncation": after.manifest.details.get("truncation"),
        }
        _write(found, workspace)

    return artifacts.produce("drift", config, inputs=inputs, work=work)


def _write(found: dict[str, Any], workspace: Workspace) -> None:
    from readapt_ray.evaluation import drift_report

    folder = workspace.location
    (folder / "report.json").write_text(json.dumps(found, indent=2) + "\n")
    (folder / "report.md").write_text(drift_report.to_markdown(found))
    (folder / "report.html").write_text(drift_report.to_html(found))
    workspace.counts = {"num_passages": found["vectors"]["num_passages"]}
    workspace.details = found


def _loss_change(config: DriftConfig, adapter: Artifact, workspace: Workspace) -> dict[str, Any]:
    """Measure the loss per token on withheld passages before and after training; return a note if it cannot be."""
    from readapt_ray.cluster.loss_task import measure_losses

    blocks = _made_of(adapter, "pack")
    numbers = blocks.manifest.details.get("withheld", [])
    if not numbers:
        return {"note": "not measured: no passage was withheld from training (`readapt train --withhold 200`)"}
    texts = _texts(_made_of(blocks, "ingest"), numbers)
    workspace.progress(0, len(texts), unit="passages")
    try:
        losses = measure_losses(
            models.open_model(adapter.manifest.config["pretrained"]),
            models.open_model(adapter.uri),
            texts,
            objective=adapter.manifest.config["objective"],
            max_tokens=blocks.manifest.config["block_tokens"],
            dtype=encoding_dtype(config, config.dtype),
        )
    except WorkerError as error:
        return {"note": f"not measured: {first_line(error)}"}
    workspace.progress(len(texts), len(texts), unit="passages")
    losses = losses[:, ~np.isnan(losses).any(axis=0)]
    if losses.shape[1] < 2:
        return {"note": f"not measured: {losses.shape[1]} of the withheld passages have tokens to predict"}
    change = losses[1] - losses[0]
    half = _half_width(change)
    return {
        "before": float(losses[0].mean()),
        "after": float(losses[1].mean()),
        "difference": float(change.mean()),
        "low": float(change.mean()) - half,
        "high": float(change.mean()) + half,
        "num_passages": losses.shape[1],
    }


def _made_of(made: Artifact, stage: str) -> Artifact:
    """Open the blocks of an adapter, or the corpus of blocks. Refuse a replaced one: its passage numbers differ."""
    found = open_input(made, "corpus", stage)
    if found.fingerprint != made.manifest.inputs["corpus"]:
        raise FingerprintMismatchError(
            f"{found.uri!r} is not what {made.uri!r} was made of, so which passages were withheld is not known; train an adapter "
            f"on what is there now"
        )
    return found


def _half_width(values: NDArray[np.float64]) -> float:
    """Return the half-width of the 95% interval of a mean."""
    return _NORMAL_95 * float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _texts(corpus: Artifact, numbers: list[int]) -> list[str]:
    """Return title and text of passages by number; a number counts the rows of all files in order."""
    from readapt_ray.retrieval.footers import named_footers, row_counts
    from readapt_ray.retrieval.parquet_rows import ParquetRows

    folder = corpus.location / "passages"
    table = ParquetRows(folder, row_counts(named_footers(folder))).take(np.asarray(numbers), ("title", "text"))
    columns = (table[name].to_pylist() for name in ("title", "text"))
    return [f"{title or ''} {text or ''}".strip() for title, text in zip(*columns, strict=True)]


def _vector_change(before: Artifact, after: Artifact, num_passages: int) -> dict[str, Any]:
    """Measure how far the vectors of some passages moved, and which share of their neighbours stayed the same."""
    one, other = _sampled(before.location / "vectors", after.location / "vectors", num_passages)
    if one.shape[1] != other.shape[1]:
        raise CorpusError(
            f"{before.uri!r} has vectors of {one.shape[1]} numbers, {after.uri!r} of {other.shape[1]}; none moved into another"
        )
    if not len(one):
        raise CorpusError(
            f"{before.uri!r} and {after.uri!r} are cut into different shards; embed both with the same --rows-per-shard"
        )
    cosines = neighbours.cosines(one, other)
    found = {
        "num_passages": len(one),
        "mean_cosine": float(cosines.mean()),
        "low_cosine": float(np.percentile(cosines, 5)),
    }
    if len(one) > neighbours.NUM_NEIGHBOURS:
        kept = neighbours.shares_kept(one, other)
        found |= {"neighbours_kept": float(kept.mean()), "plus_minus": _half_width(kept)}
    return found


def _sampled(before: Location, after: Location, num_passages: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Draw passages from some shards of the corpus; return their vectors by both models, float32 [N, D] each."""
    random = random_generator(0, "drift")
    one_named, other_named = (
        {name_without_mark(name): name for name, _ in each.listing(".parquet")} for each in (before, after)
    )
    names = sorted(one_named.keys() & other_named.keys())
    names = [names[place] for place in sorted(random.permutation(len(names))[:_MAX_SHARDS].tolist())]
    pairs, left = [], num_passages
    for index, name in enumerate(names):
        (ids, one), (other_ids, other) = _shard(before / one_named[name]), _shard(after / other_named[name])
        _, rows, other_rows = np.intersect1d(ids, other_ids, return_indices=True)
        taken = random.permutation(len(rows))[: -(-left // (len(names) - index))]
        left -= len(taken)
        pairs.append((one[rows[taken]], other[other_rows[taken]]))
    none = np.empty((0, 1), np.float32)
    return (
        (np.concatenate([one for one, _ in pairs]), np.concatenate([other for _, other in pairs]))
        if pairs
        else (none, none)
    )


def _shard(file: Location) -> tuple[list[str], NDArray[np.float32]]:
    from readapt_ray.retrieval.parquet_rows import read_rows
    from readapt_ray.retrieval.vector_files import VECTOR_COLUMNS, matrix_of, read_footer

    return matrix_of(read_rows(file, 0, read_footer(file).num_rows, VECTOR_COLUMNS), file)
