"""Find the artifacts under a root, the generations, and the vector database that hold a passage.

All columns of doc_ids under the root are read, at some 10 million ids per second. Row groups whose statistics exclude the
id are skipped. The id of a document that ingest split finds its passages `doc#1`, `doc#2` and so on.
"""

import json
import re
from collections.abc import Iterator, Set
from typing import Any

import numpy as np
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
_PART = r"#\d+"
"""The end of a passage id, after the id of the document that it is a part of."""
_PART_OR_NONE = rb"(?:#\d+)?"
_WITH_IDS = ("report.json", ".jsonl")
"""Ends of the names of text files in which objects have doc_ids."""


def find(config: FindConfig) -> list[dict[str, Any]]:
    """Return a row per artifact that holds a passage, with keys `artifact`, `stage`, `generation` and `where`.

    The list is empty if none does. Blocks that were packed from a corpus with the passage are listed too; models are
    not. Passages `doc#1`, `doc#2` and so on are found by `doc`, too, and `where` names the first; they may also be of
    another document whose own id ends like this.

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
            found = _rows_of(file, doc_id)
            dead = _dead_rows(trace.location, final_name(name)) if found else frozenset()
            for row, found_id in sorted(found, key=lambda pair: pair[0] in dead):
                place = f"row {row:,} of {name}" + (f" ({found_id})" if found_id != doc_id else "")
                if row not in dead:
                    return place
                deleted = f"{place}, deleted; `readapt clean` removes it"
                break
        elif file.name.endswith(SINGLE_FILE_SUFFIX) and _is_ranked(file, doc_id):
            return file.name
        elif file.name.endswith(_WITH_IDS) and _is_named(file, doc_id):
            return name
    return deleted


def _is_ranked(file: Location, doc_id: str) -> bool:
    """Return whether a doc_id is in the third column of a TREC run. Other columns may look like ids."""
    line = rb"^\S+[ \t]+\S+[ \t]+" + re.escape(doc_id.encode()) + _PART_OR_NONE + rb"[ \t]"
    return re.search(line, file.read_bytes(), re.MULTILINE) is not None


def _is_named(file: Location, doc_id: str) -> bool:
    """Return whether a JSON file of a report, or of passages, has an object with this doc_id."""
    written = {json.dumps(doc_id, ensure_ascii=is_ascii)[1:-1].encode() for is_ascii in (True, False)}
    ids = b"|".join(map(re.escape, sorted(written)))
    return re.search(rb'"(?:doc_id|_id)":\s*"(?:' + ids + rb")" + _PART_OR_NONE + rb'"', file.read_bytes()) is not None


def _dead_rows(artifact: Location, name: str) -> Set[int]:
    """Return the row numbers of a file's dead rows, as plain pyarrow counts rows."""
    if not name.endswith(_IDS):
        return set(read_dead(artifact / name).tolist())
    dead = artifact / f"{name.removesuffix(_IDS)}.dead"
    return set(read_row_numbers(dead).tolist()) if dead.is_file() else set()


def _rows_of(file: Location, doc_id: str) -> list[tuple[int, str]]:
    """Return row and id of a passage, or of a document's passages, in a Parquet file; none if a killed writer left it."""
    try:
        return list(_rows_in(file, doc_id))
    except CorruptFileError:
        if name_when_whole(file.name) is None:
            raise
        return []


def _rows_in(file: Location, doc_id: str) -> Iterator[tuple[int, str]]:
    with explain_damage(file), file.open_input() as stream, pq.ParquetFile(stream) as parquet:
        if "doc_id" not in parquet.schema_arrow.names:
            return
        column, first = parquet.schema_arrow.names.index("doc_id"), 0
        for group in range(parquet.metadata.num_row_groups):
            metadata = parquet.metadata.row_group(group)
            if not _is_excluded(metadata.column(column).statistics, doc_id):
                ids = parquet.read_row_group(group, columns=["doc_id"])["doc_id"].combine_chunks()
                near = pc.or_(pc.equal(ids, pa.scalar(doc_id, ids.type)), pc.starts_with(ids, f"{doc_id}#"))
                for row in np.flatnonzero(pc.fill_null(near, False).to_numpy(zero_copy_only=False)).tolist():
                    found = ids[row].as_py()
                    if found == doc_id or re.fullmatch(_PART, found[len(doc_id) :]):
                        yield first + row, found
            first += metadata.num_rows


def _is_excluded(statistics: Any, doc_id: str) -> bool:
    if statistics is None or not statistics.has_min_max:
        return False
    behind = f"{doc_id}$"  # "$" comes after "#"
    return not (statistics.min <= behind and doc_id <= statistics.max)
