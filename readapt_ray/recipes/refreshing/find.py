"""Find the artifacts under a root, the generations, and the vector database that hold a passage.

All columns of doc_ids under the root are read, at some 10 million ids per second. Row groups whose statistics exclude the
id are skipped.
"""

import re
from collections.abc import Set
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from readapt_ray import generations
from readapt_ray.artifact_files import SINGLE_FILE_SUFFIX, final_name
from readapt_ray.dead_rows import read_dead, read_row_numbers
from readapt_ray.errors import CorruptFileError, InputError
from readapt_ray.evaluation.tables import aligned_table
from readapt_ray.recipes.refreshing.options import FindConfig
from readapt_ray.recipes.refreshing.traces import Trace, derived_from, traces
from readapt_ray.retrieval.parquet_rows import explain_damage
from readapt_ray.storage import Location, name_when_whole

_IDS = ".ids.parquet"


def find(config: FindConfig) -> list[dict[str, Any]]:
    """Return a row per artifact that holds a passage, with keys `artifact`, `stage`, `generation` and `where`.

    The list is empty if none does. Blocks that were packed from a corpus with the passage are listed too; models are
    not.

    Raises:
        InputError: the root does not exist.
        CorruptFileError: a file was cut short or altered.
    """
    root = Location(config.root)
    if not root.is_folder():
        raise InputError(f"no folder {config.root!r}; give the root of `readapt refresh`")
    there = generations.read(root)
    all_traces = traces(root, there)
    present = there[-1].number if there else None
    places = {each.name: _place(each, config.doc_id) for each in all_traces}
    holders = [each for each in all_traces if places[each.name]]
    corpora = [each for each in holders if each.stage == "ingest"]
    blocks = [each for each in derived_from(corpora, all_traces) if each.stage == "pack" and each not in holders]
    places |= {each.name: "its tokens" for each in blocks}
    return [_row(each, places[each.name], present) for each in all_traces if places[each.name]]


def as_text(rows: list[dict[str, Any]], doc_id: str, root: str) -> str:
    """Return the rows of `find` as an aligned text table; a sentence with `doc_id` and `root` if there are none."""
    if not rows:
        return f"nothing under {root} holds {doc_id!r}"
    lines = [("artifact", "stage", "generation", "where")]
    lines += [(row["artifact"], row["stage"], row["generation"], row["where"]) for row in rows]
    return aligned_table(lines)


def _row(trace: Trace, place: str, present: int | None) -> dict[str, Any]:
    named = [f"{number} (present)" if number == present else str(number) for number in trace.generations]
    target = trace.details.get("target") if present in trace.generations else None
    return {
        "artifact": trace.name,
        "stage": trace.stage,
        "generation": ", ".join(named) or "none",
        "where": f"{place}, and {target}" if target else place,
    }


def _place(trace: Trace, doc_id: str) -> str:
    """Return file and row of a passage in an artifact as text; empty text if the artifact does not hold it."""
    if not trace.holds_passages:
        return ""
    deleted = ""
    for file in trace.files():
        name = file.path[len(trace.location.path) + 1 :]
        if file.name.endswith(".parquet"):
            row = _row_of(file, doc_id)
            if row is not None and row not in _dead_rows(trace.location, final_name(name)):
                return f"row {row:,} of {name}"
            if row is not None:
                deleted = f"row {row:,} of {name}, deleted; `readapt clean` removes it"
        elif file.name.endswith(SINGLE_FILE_SUFFIX) and _is_ranked(file, doc_id):
            return file.name
    return deleted


def _is_ranked(file: Location, doc_id: str) -> bool:
    """Return whether a doc_id is in the third column of a TREC run. Other columns may look like ids."""
    line = rb"^\S+[ \t]+\S+[ \t]+" + re.escape(doc_id.encode()) + rb"[ \t]"
    return re.search(line, file.read_bytes(), re.MULTILINE) is not None


def _dead_rows(artifact: Location, name: str) -> Set[int]:
    """Return the row numbers of a file's dead rows, as plain pyarrow counts rows."""
    if not name.endswith(_IDS):
        return set(read_dead(artifact / name).tolist())
    dead = artifact / f"{name.removesuffix(_IDS)}.dead"
    return set(read_row_numbers(dead).tolist()) if dead.is_file() else set()


def _row_of(file: Location, doc_id: str) -> int | None:
    """Return the row of a passage in a Parquet file; None if it is not there, or a killed writer left the file."""
    try:
        return _row_in(file, doc_id)
    except CorruptFileError:
        if name_when_whole(file.name) is None:
            raise
        return None


def _row_in(file: Location, doc_id: str) -> int | None:
    with explain_damage(file), file.open_input() as stream, pq.ParquetFile(stream) as parquet:
        if "doc_id" not in parquet.schema_arrow.names:
            return None
        column, first = parquet.schema_arrow.names.index("doc_id"), 0
        for group in range(parquet.metadata.num_row_groups):
            metadata = parquet.metadata.row_group(group)
            if not _is_excluded(metadata.column(column).statistics, doc_id):
                ids = parquet.read_row_group(group, columns=["doc_id"])["doc_id"].combine_chunks()
                row = pc.index(ids, pa.scalar(doc_id, ids.type)).as_py()
                if row >= 0:
                    return first + int(row)
            first += metadata.num_rows
    return None


def _is_excluded(statistics: Any, doc_id: str) -> bool:
    if statistics is None or not statistics.has_min_max:
        return False
    return not statistics.min <= doc_id <= statistics.max
