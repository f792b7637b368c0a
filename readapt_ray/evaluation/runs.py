"""Read and write runs: ranked results in the TREC format, one `query_id Q0 doc_id rank score tag` per line.

trec_eval, ir-measures and pyserini read these text files. In memory a run is held in columns, so that ten million lines
take some seconds to read; `read_run` gives plain records.

The order is trec_eval's everywhere, in files too: by falling score as float32, ties by falling doc_id. So lists show
results in the order in which measures rank them.
"""

import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow import csv

from readapt_ray.errors import InputError
from readapt_ray.progress import amount
from readapt_ray.records import ScoredDoc
from readapt_ray.storage import Location

_FIELDS = ("query_id", "Q0", "doc_id", "rank", "score", "tag")
_SCHEMA = pa.schema([("query_id", pa.string()), ("doc_id", pa.string()), ("score", pa.float64())])

_Row = tuple[str, str, str, float]
"""Line of the file (for errors), query_id, doc_id, score."""


@dataclass(frozen=True, eq=False)
class Run:
    """Ranked results of many queries, best first, in trec_eval's order."""

    query_ids: list[str]
    """The queries with results, in the order in which the input first has them."""
    offsets: NDArray[np.int64]
    """[Q + 1]; the results of query i are rows offsets[i] to offsets[i + 1] (exclusive)."""
    doc_ids: list[str]
    """The distinct doc_ids."""
    codes: NDArray[np.int64]
    """[N], the index in `doc_ids` of each result."""
    scores: NDArray[np.float64]
    """[N], the score of each result."""

    @classmethod
    def of(cls, results: Mapping[str, Sequence[ScoredDoc]], *, name: str = "run") -> "Run":
        """Build a run from results in any order; a query without results is left out.

        Args:
            results: results by query_id.
            name: name of the run in errors.

        Raises:
            InputError: a score is not a finite number, or a query has a passage twice.
        """
        rows = (("", query_id, doc.doc_id, doc.score) for query_id, docs in results.items() for doc in docs)
        return _ranked(_checked(rows, name))

    def __len__(self) -> int:
        """Return the number of results."""
        return len(self.codes)

    @property
    def depth(self) -> int:
        """Return the largest number of results of any query; 0 if there are none."""
        return int(np.diff(self.offsets).max(initial=0))

    def top(self, index: int, num_docs: int | None = None) -> list[ScoredDoc]:
        """Return the first `num_docs` results of the query at `index` of `query_ids`, best first; all if None."""
        first, last = int(self.offsets[index]), int(self.offsets[index + 1])
        if num_docs is not None:
            last = min(last, first + num_docs)
        query_id, doc_ids = self.query_ids[index], self.doc_ids
        pairs = zip(self.codes[first:last].tolist(), self.scores[first:last].tolist(), strict=True)
        return [ScoredDoc(query_id, doc_ids[code], score) for code, score in pairs]


def write_run(uri: str, scored: Iterable[ScoredDoc], *, tag: str) -> None:
    """Write a run file, with the results of each query in trec_eval's order.

    Args:
        uri: the file; an existing one is replaced.
        scored: results in any order; all are held in memory.
        tag: the last field of every line; whitespace in it becomes a hyphen.

    Raises:
        InputError: an id is empty or has whitespace, a score is not finite, or a query has a passage twice.
    """
    write_tables(uri, [_checked((("", doc.query_id, doc.doc_id, doc.score) for doc in scored), uri)], tag=tag)


def write_tables(uri: str, tables: Iterable[pa.Table], *, tag: str) -> None:
    """Write a run file from a stream of tables, with one table in memory at a time.

    Args:
        uri: the file; an existing one is replaced.
        tables: query_id, doc_id and score (float64, finite). All results of a query must be in one table, each passage
            once; this is not checked.
        tag: as in `write_run`.

    Raises:
        InputError: an id is empty or has whitespace.
    """
    label = "-".join(tag.split()) or "run"
    with Location(uri).open_output() as stream:
        for table in tables:
            run = _ranked(table)
            for each in (*run.query_ids, *run.doc_ids):
                if each.encode().split() != [each.encode()]:
                    raise InputError(
                        f"id {each!r} is empty or has whitespace in it, which a TREC run cannot hold; rename it"
                    )
            for index in range(len(run.query_ids)):
                lines = [
                    f"{doc.query_id} Q0 {doc.doc_id} {rank} {doc.score!r} {label}\n"
                    for rank, doc in enumerate(run.top(index), start=1)
                ]
                stream.write("".join(lines).encode())


def read_run(uri: str) -> dict[str, list[ScoredDoc]]:
    """Read a run file, and return the results of each query in trec_eval's order, by query_id.

    Like trec_eval, this ignores the ranks in the file. All results are in memory; `load_run` takes less.

    Raises:
        InputError: as in `load_run`.
    """
    run = load_run(uri)
    return {query_id: run.top(index) for index, query_id in enumerate(run.query_ids)}


def load_run(uri: str) -> Run:
    """Read a run file into columns; 10 million lines take some six seconds on two cores.

    The ranks in the file are ignored; the scores decide the order.

    Raises:
        InputError: there is no such file, a line does not have six fields or is not UTF-8, a score is not finite, or a
            query has a passage twice; the message names file and line.
    """
    location = Location(uri)
    if not location.is_file():
        state = "is a folder" if location.exists() else "does not exist"
        raise InputError(f"no run at {uri!r}: it {state}; give a TREC run file, such as one of `readapt search`")
    run = _read_at_once(location)
    if run is None:
        run = _ranked(_checked(_lines(location), uri))
    return run


def _read_at_once(location: Location) -> Run | None:
    """Read with Arrow; return None if anything is unusual, so that the slower reader by lines can report it."""
    try:
        with location.filesystem.open_input_stream(location.path) as stream:
            table = csv.read_csv(
                stream,
                read_options=csv.ReadOptions(column_names=list(_FIELDS)),
                parse_options=csv.ParseOptions(delimiter=" ", quote_char=False, escape_char=False),
                convert_options=csv.ConvertOptions(
                    include_columns=_SCHEMA.names,
                    column_types=_SCHEMA,
                    null_values=[],
                    strings_can_be_null=False,
                ),
            )
    except pa.ArrowInvalid:
        return None
    if not pc.all(pc.is_finite(table["score"])).as_py():
        return None
    run = _ranked(table)
    keys = np.repeat(np.arange(len(run.query_ids)), np.diff(run.offsets)) * len(run.doc_ids) + run.codes
    keys.sort()
    return None if len(keys) > 1 and (keys[1:] == keys[:-1]).any() else run


def _lines(location: Location) -> Iterator[_Row]:
    """Yield the rows of a run file, with any whitespace between fields."""
    with io.BufferedReader(location.open_input()) as stream:  # type: ignore[type-var]
        for number, line in enumerate(stream, start=1):
            where = f"line {number}"
            fields = line.removeprefix(b"\xef\xbb\xbf").split() if number == 1 else line.split()
            if not fields:
                continue
            if len(fields) != len(_FIELDS):
                raise InputError(
                    f"{location}, {where}: {amount(len(fields), 'fields')}; a TREC run has six: {' '.join(_FIELDS)}; "
                    f"fix the line: {_excerpt(line)}"
                )
            try:
                query_id, doc_id = fields[0].decode(), fields[2].decode()
            except UnicodeDecodeError:
                raise InputError(f"{location}, {where}: not UTF-8: {_excerpt(line)}; convert the file") from None
            try:
                score = float(fields[4])
            except ValueError:
                raise InputError(
                    f"{location}, {where}: the score {_excerpt(fields[4])} is not a number; fix the line"
                ) from None
            yield where, query_id, doc_id, score


def _excerpt(line: bytes) -> str:
    text = line.decode(errors="replace").strip()
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _checked(rows: Iterable[_Row], name: str) -> pa.Table:
    """Collect rows in columns; check that scores are finite and that no query has a passage twice."""
    query_ids: list[str] = []
    doc_ids: list[str] = []
    scores: list[float] = []
    seen: dict[str, dict[str, str]] = {}
    for where, query_id, doc_id, score in rows:
        place = f"{name}, {where}" if where else name
        if not math.isfinite(score):
            raise InputError(
                f"{place}: the score of {doc_id!r} for query {query_id!r} is {score}, not a finite number; "
                f"see what made it"
            )
        docs = seen.setdefault(query_id, {})
        if doc_id in docs:
            first = f" (first on {docs[doc_id]})" if where else ""
            raise InputError(f"{place}: passage {doc_id!r} occurs twice for query {query_id!r}{first}; keep one")
        docs[doc_id] = where
        query_ids.append(query_id)
        doc_ids.append(doc_id)
        scores.append(float(score))
    return pa.table({"query_id": query_ids, "doc_id": doc_ids, "score": scores}, _SCHEMA)


def _ranked(table: pa.Table) -> Run:
    """Group rows by query and sort them into trec_eval's order, unless they are sorted already."""
    queries, docs = _encoded(table["query_id"]), _encoded(table["doc_id"])
    query_codes, codes = queries.indices.to_numpy().astype(np.int64), docs.indices.to_numpy().astype(np.int64)
    scores = table["score"].to_numpy()
    with np.errstate(over="ignore"):
        falling = scores.astype(np.float32)
    alphabetical = np.empty(len(docs.dictionary), np.int64)
    alphabetical[pc.sort_indices(docs.dictionary).to_numpy()] = np.arange(len(docs.dictionary))
    ties = alphabetical[codes]
    steps, before, after = np.diff(query_codes), falling[:-1], falling[1:]
    in_order = (steps > 0) | ((steps == 0) & ((before > after) | ((before == after) & (np.diff(ties) < 0))))
    if not in_order.all():
        order = np.lexsort((-ties, -falling, query_codes))
        query_codes, codes, scores = query_codes[order], codes[order], scores[order]
    counts = np.bincount(query_codes, minlength=len(queries.dictionary))
    return Run(
        query_ids=queries.dictionary.to_pylist(),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        doc_ids=docs.dictionary.to_pylist(),
        codes=codes,
        scores=scores,
    )


def _encoded(column: pa.ChunkedArray) -> pa.DictionaryArray:
    encoded = column.dictionary_encode().combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.chunk(0) if encoded.num_chunks else pa.array([], pa.string()).dictionary_encode()
    return encoded
