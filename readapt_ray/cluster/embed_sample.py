"""What a full run of embed would take, and what it would change, from a sample of the corpus.

In: an embedding job, and the vectors of an earlier run where there are any. Out: the sample's vectors, and an
estimate with its error bar of tokens, hours and bytes. It costs reading the corpus once and encoding the sample.
"""

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from readapt_ray.artifacts import Workspace
from readapt_ray.cluster.placement import Placement, place_actors
from readapt_ray.cluster.shard_encoder import EmbedJob
from readapt_ray.cluster.shard_runner import encode_shards
from readapt_ray.errors import InputError
from readapt_ray.progress import duration
from readapt_ray.retrieval import neighbours
from readapt_ray.retrieval.parquet_rows import ParquetRows
from readapt_ray.retrieval.shard_plan import (
    Contents,
    DataShard,
    first_rows,
    matching_rows,
    rows_of_ids,
    scan_passages,
    scan_vectors,
)
from readapt_ray.retrieval.vector_files import VECTOR_COLUMNS, Footer, matrix_of

logger = logging.getLogger("readapt_ray")

_STRATA = 20
_LEAST_ROWS = 200
_NORMAL_95 = 1.96
_MOST_COMPARED = 10_000


def sample_rows(spec: str, num_passages: int) -> int:
    """How many passages `1%` or `2000` are; at least 200 where the corpus has so many.

    Raises:
        InputError: it is neither a share nor a count.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", spec.strip())
    wanted = float(found[1]) * (num_passages / 100 if found[2] else 1) if found else 0.0
    if found is None or wanted <= 0 or (found[2] and float(found[1]) > 100) or (not found[2] and "." in found[1]):
        raise InputError(f"sample = {spec!r}; give a share such as 1%, or a number of passages such as 2000")
    return min(num_passages, max(_LEAST_ROWS, math.ceil(wanted)))


def estimate_full_run(
    spec: str, job: EmbedJob, placement: Placement, compared: ParquetRows | None, workspace: Workspace
) -> None:
    """Encode a sample, and put what follows from it into the manifest and before the user.

    Args:
        spec: the sample, as `sample_rows` takes it.
        job: of the full run; what it would copy is left out of the sample.
        placement: of the full run.
        compared: vectors of another encoder, to say how much the neighbours change.
    """
    contents = scan_passages(job.passages.folder, job.passages.counts)
    todo = first_rows(contents.hashes) == np.arange(len(contents))
    if job.earlier is not None:
        there = scan_vectors(job.earlier.folder, job.earlier.counts)
        todo &= matching_rows(contents.hashes, there.hashes) < 0
    rows = np.flatnonzero(todo)
    workspace.details |= {"num_passages": len(contents), "num_to_encode": len(rows), "dtype": job.dtype}
    if not len(rows):
        logger.info("embed: every passage has its vector already; a full run would only copy")
        return
    size = sample_rows(spec, len(rows))
    rows = np.sort(np.random.default_rng(0).choice(rows, size, replace=False))
    shards = [
        DataShard(number, part, np.arange(len(part)), np.full(len(part), -1), contents.hashes[part])
        for number, part in enumerate(np.array_split(rows, min(_STRATA, size)))
    ]
    footers = encode_shards(
        shards,
        replace(job, earlier=None),
        placement,
        lambda done, total: workspace.progress(done, total, unit="passages"),
    )
    num_workers, _, _ = place_actors(placement, len(contents))
    workspace.counts["num_vectors"] = size
    workspace.details |= _forecast(footers, int(todo.sum()), len(contents), num_workers)
    _tell_forecast(workspace.details, size)
    if compared is not None:
        workspace.details["neighbours"] = _compare_neighbours(contents, rows, job, shards, compared)


def _forecast(footers: Sequence[Footer], num_to_encode: int, num_passages: int, num_workers: int) -> dict[str, Any]:
    """Each a mean over strata times what is to be encoded, with the half-width of its 95% interval."""

    def scaled(name: str, factor: float) -> dict[str, float]:
        means = np.array([float(footer.metadata[name]) / footer.num_rows for footer in footers])
        weights = np.array([footer.num_rows for footer in footers]) / sum(footer.num_rows for footer in footers)
        spread = float(means.std(ddof=1)) / math.sqrt(len(means)) if len(means) > 1 else float("nan")
        return {
            "estimate": float(means @ weights) * num_to_encode * factor,
            "plus_minus": _NORMAL_95 * spread * num_to_encode * factor,
        }

    num_rows = sum(footer.num_rows for footer in footers)
    return {
        "tokens": scaled("num_tokens", 1),
        "hours": scaled("encode_s", 1 / 3600 / num_workers),
        "bytes": round(sum(footer.num_bytes for footer in footers) / num_rows * num_passages),
        "num_workers": num_workers,
    }


def _tell_forecast(details: dict[str, Any], size: int) -> None:
    tokens, hours = details["tokens"], details["hours"]
    logger.info(
        "embed: a full run would encode %s of %s passages: %s tokens (+- %s), %s (+- %s) on %d encoders in %s, besides "
        "their start, and leave %s of vectors; from %s passages%s",
        f"{details['num_to_encode']:,}",
        f"{details['num_passages']:,}",
        f"{tokens['estimate']:,.0f}",
        f"{tokens['plus_minus']:,.0f}",
        duration(3600 * hours["estimate"]),
        duration(3600 * hours["plus_minus"]) if math.isfinite(hours["plus_minus"]) else "unknown",
        details["num_workers"],
        details["dtype"],
        _size(details["bytes"]),
        f"{size:,}",
        f", the fewest that a sample has ({_LEAST_ROWS})" if size == _LEAST_ROWS else "",
    )


def _size(num_bytes: float) -> str:
    for unit in ("bytes", "KB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.3g} GB"


def _compare_neighbours(
    contents: Contents, rows: NDArray[np.int64], job: EmbedJob, shards: Sequence[DataShard], compared: ParquetRows
) -> dict[str, float]:
    """How many of a passage's 10 nearest in the sample are the same by the earlier vectors: the mean share."""
    earlier = rows_of_ids(contents.ids[rows], scan_vectors(compared.folder, compared.counts).ids)
    places = np.flatnonzero(earlier >= 0)[:_MOST_COMPARED]
    if len(places) <= neighbours.NUM_NEIGHBOURS:
        logger.warning(
            "embed: %d passages of the sample have earlier vectors; too few to compare neighbours", len(places)
        )
        return {"num_compared": len(places)}
    _, before = matrix_of(compared.take(earlier[places], VECTOR_COLUMNS), compared.folder)
    written = ParquetRows(job.vectors, tuple((shard.name, len(shard)) for shard in shards))
    doc_ids, vectors = matrix_of(written.take(np.arange(len(rows)), VECTOR_COLUMNS), job.vectors)
    order = rows_of_ids(contents.ids[rows[places]], np.fromiter(map(hash, doc_ids), np.int64, len(doc_ids)))
    shares = neighbours.shares_kept(before, vectors[order])
    result = {
        "num_compared": len(places),
        "overlap_at_10": round(float(shares.mean()), 4),
        "plus_minus": round(_NORMAL_95 * float(shares.std(ddof=1)) / math.sqrt(len(shares)), 4),
    }
    logger.info(
        "embed: of the 10 nearest passages within the sample, %.1f%% (+- %.1f) stay the same",
        100 * result["overlap_at_10"],
        100 * result["plus_minus"],
    )
    return result
