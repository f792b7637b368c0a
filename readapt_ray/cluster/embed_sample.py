"""Estimate the time and size of a full run of embed, and how it would change neighbours, from a sample of the corpus.

In: an embedding job, and earlier vectors if there are any. Out: the sample's vectors; estimates of tokens and hours,
each with a 95% interval; an estimate of bytes. It costs reading and encoding the sample; with earlier vectors, also a
join of all digests on the cluster.
"""

import itertools
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from readapt_ray.artifacts import Workspace
from readapt_ray.cluster import connection
from readapt_ray.cluster.bounded_tasks import run_bounded
from readapt_ray.cluster.earlier_vectors import NUM_BINS, Joined, bin_bounds, join_digests
from readapt_ray.cluster.embed_job import EmbedJob
from readapt_ray.cluster.placement import Placement, place_actors
from readapt_ray.cluster.shard_runner import encode_shards
from readapt_ray.errors import InputError
from readapt_ray.progress import duration, size_text
from readapt_ray.retrieval import neighbours
from readapt_ray.retrieval.parquet_rows import ParquetRows, RowCounts, read_rows
from readapt_ray.retrieval.shard_ledger import ShardLedger
from readapt_ray.retrieval.shard_plan import DataShard, ranges_between
from readapt_ray.retrieval.vector_files import VECTOR_COLUMNS, matrix_of
from readapt_ray.storage import Location

logger = logging.getLogger("readapt_ray")

_STRATA = 20
_LEAST_ROWS = 200
_NORMAL_95 = 1.96
_MOST_COMPARED = 10_000
_FIND_TASKS = 256


def sample_rows(spec: str, num_passages: int) -> int:
    """Return the number of passages of a sample given as `1%` or `2000`: at least 200, at most `num_passages`.

    A share is rounded up.

    Args:
        spec: the user's option.
        num_passages: number of passages to draw from.

    Raises:
        InputError: `spec` is neither a percentage nor a number.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", spec.strip())
    wanted = float(found[1]) * (num_passages / 100 if found[2] else 1) if found else 0.0
    if found is None or wanted <= 0 or (found[2] and float(found[1]) > 100) or (not found[2] and "." in found[1]):
        raise InputError(f"sample = {spec!r}; give a share such as 1%, or a number of passages such as 2000")
    return min(num_passages, max(_LEAST_ROWS, math.ceil(wanted)))


def estimate_full_run(
    spec: str,
    job: EmbedJob,
    passages: ParquetRows,
    placement: Placement,
    *,
    compared: ParquetRows | None,
    workspace: Workspace,
) -> None:
    """Encode a sample of passages; log the estimates for the full run, and add them to the manifest.

    The vectors of the sample are written to the job's folder. If every passage has its vector already, nothing is
    encoded and the log says so.

    Args:
        spec: size of the sample, as a part of the passages to encode; see `sample_rows`.
        job: job of the full run; passages whose vector it would copy are left out of the sample.
        passages: passages of the corpus.
        placement: the user's options for the encoding actors of the full run.
        compared: vectors of another encoder, to measure how many neighbours change; None to skip this.
        workspace: receives the progress, and the details of the manifest.
    """
    joined = join_digests(passages, job.earlier, job.output / "join") if job.earlier else None
    num_to_encode = passages.num_rows if joined is None else int(joined.num_to_encode.sum())
    workspace.details |= {"num_passages": passages.num_rows, "num_to_encode": num_to_encode, "dtype": job.dtype}
    if num_to_encode:
        size = sample_rows(spec, num_to_encode)
        shards = _strata(passages, joined, size)
        ledger = encode_shards(
            shards,
            replace(job, earlier=None, matches=joined.matches if joined else None),
            placement,
            lambda done, total: workspace.progress(done, total, unit="passages"),
        )
        num_workers, _, _ = place_actors(placement, passages.num_rows)
        workspace.counts["num_vectors"] = ledger.num_vectors
        workspace.details |= _forecast(ledger, num_to_encode, passages.num_rows, num_workers)
        _tell_forecast(workspace.details, size)
        if compared is not None:
            workspace.details["neighbours"] = _compare_neighbours(job, ledger, compared)
    else:
        logger.info("embed: every passage has its vector already; a full run would only copy")
    if joined is not None:
        joined.matches.remove()


def _strata(passages: ParquetRows, joined: Joined | None, size: int) -> list[DataShard]:
    """Cut the corpus into 20 strata with about equally many passages to encode; draw the same share of each."""
    bounds = bin_bounds(passages.num_rows)
    todo = np.diff(bounds) if joined is None else joined.num_to_encode
    ends = np.concatenate([[0], np.cumsum(todo)])
    cuts = np.searchsorted(ends, np.linspace(0, ends[-1], min(_STRATA, size) + 1))
    cuts[-1] = NUM_BINS
    shards: list[DataShard] = []
    num_drawn = 0
    for first, last in itertools.pairwise(np.unique(np.concatenate([[0], cuts])).tolist()):
        due = round(size * int(ends[last]) / int(ends[-1]))
        if due > num_drawn:
            start, end = int(bounds[first]), int(bounds[last])
            ranges = tuple(ranges_between(passages.counts, start, end))
            shards.append(DataShard(len(shards), start, ranges, num_drawn=due - num_drawn))
            num_drawn = due
    return shards


def _forecast(ledger: ShardLedger, num_to_encode: int, num_passages: int, num_workers: int) -> dict[str, Any]:
    """Estimate the full run from the means per passage of the strata, with half the width of each 95% interval."""
    num_rows = np.array([len(shard) for shard in ledger.shards])

    def scaled(name: str, factor: float) -> dict[str, float]:
        means = ledger.figures[name] / num_rows
        spread = float(means.std(ddof=1)) / math.sqrt(len(means)) if len(means) > 1 else float("nan")
        return {
            "estimate": float(means @ (num_rows / num_rows.sum())) * num_to_encode * factor,
            "plus_minus": _NORMAL_95 * spread * num_to_encode * factor,
        }

    return {
        "tokens": scaled("num_tokens", 1),
        "hours": scaled("encode_s", 1 / 3600 / num_workers),
        "bytes": round(float(ledger.figures["num_bytes"].sum() / num_rows.sum()) * num_passages),
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
        size_text(details["bytes"]),
        f"{size:,}",
        f", the fewest that a sample has ({_LEAST_ROWS})" if size == _LEAST_ROWS else "",
    )


def _compare_neighbours(job: EmbedJob, ledger: ShardLedger, compared: ParquetRows) -> dict[str, float]:
    """Return the mean share of a passage's 10 nearest passages in the sample that are the same by earlier vectors."""
    names = [shard.name for shard in ledger.shards]
    written = ParquetRows(job.vectors, tuple(zip(names, ledger.figures["num_rows"].tolist(), strict=True)))
    doc_ids, vectors = matrix_of(written.take(np.arange(written.num_rows), VECTOR_COLUMNS), job.vectors)
    before_ids, before = _vectors_of(compared, doc_ids)
    if len(before_ids) <= neighbours.NUM_NEIGHBOURS:
        logger.warning(
            "embed: %d passages of the sample have earlier vectors; too few to compare neighbours", len(before_ids)
        )
        return {"num_compared": len(before_ids)}
    place = {doc_id: row for row, doc_id in enumerate(doc_ids)}
    order = [place[doc_id] for doc_id in before_ids]
    shares = neighbours.shares_kept(before, vectors[order])
    result = {
        "num_compared": len(before_ids),
        "overlap_at_10": round(float(shares.mean()), 4),
        "plus_minus": round(_NORMAL_95 * float(shares.std(ddof=1)) / math.sqrt(len(shares)), 4),
    }
    logger.info(
        "embed: of the 10 nearest passages within the sample, %.1f%% (+- %.1f) stay the same",
        100 * result["overlap_at_10"],
        100 * result["plus_minus"],
    )
    return result


def _vectors_of(compared: ParquetRows, doc_ids: Sequence[str]) -> tuple[list[str], NDArray[np.float32]]:
    """Find the earlier vectors of up to 10,000 passages in Ray tasks; return sorted doc_ids and vectors [N, D]."""
    import ray

    wanted = ray.put(pa.array(doc_ids[:_MOST_COMPARED]))
    find = ray.remote(num_cpus=1)(_found_in)
    slots = max(1, connection.connect().num_cpus)
    shares = [compared.counts[first::_FIND_TASKS] for first in range(min(_FIND_TASKS, len(compared.counts)))]
    tables = list(run_bounded(lambda share: find.remote(compared.folder, share, wanted), shares, slots))
    return matrix_of(pa.concat_tables(tables).sort_by("doc_id"), compared.folder)


def _found_in(folder: Location, counts: RowCounts, wanted: pa.Array) -> pa.Table:
    """Return the rows of some files whose doc_id is in `wanted`."""
    tables = [read_rows(folder / counts[0][0], 0, 0, VECTOR_COLUMNS)]
    for name, num_rows in counts:
        ids = read_rows(folder / name, 0, num_rows, ("doc_id",))["doc_id"]
        rows = np.flatnonzero(pc.is_in(ids, wanted).to_numpy())
        if len(rows):
            tables.append(ParquetRows(folder, ((name, num_rows),)).take(rows, VECTOR_COLUMNS))
    return pa.concat_tables(tables)
