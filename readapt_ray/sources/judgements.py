"""Queries and relevance judgements from the files that people have them in.

    queries     BEIR .jsonl (`_id`, `text`); .tsv (id, text); .parquet (`query_id`, `text`)
    qrels       BEIR .tsv (query-id, corpus-id, score); TREC (query, 0, document, relevance);
                .jsonl and .parquet with columns of those names

or a folder of such files, as an ingest artifact has. Text files may be gzipped. Lists of doc_ids, too: one a line,
or the doc_ids of qrels. Ids are as those of passages (`cleaning.clean_id`), so that they meet.
"""

import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TypeVar

from readapt_ray.errors import CorpusError
from readapt_ray.progress import amount
from readapt_ray.records import Qrel, Query
from readapt_ray.sources.arrow_files import parquet_rows
from readapt_ray.sources.cleaning import clean_id, clean_text, id_text, is_unicode, text_fault
from readapt_ray.sources.columns import first_of
from readapt_ray.sources.json_files import parsed_object
from readapt_ray.sources.lines import Line, plain_name, read_lines
from readapt_ray.sources.source import MISSING, REASONS, BadRow
from readapt_ray.storage import Location

_QREL_NAMES = (
    ("query_id", "query-id", "qid"),
    ("doc_id", "corpus-id", "docid", "corpus_id"),
    ("relevance", "score", "label"),
)
QUERY_ID_NAMES = ("query_id", "_id", "id", "qid", "query-id")
QUERY_TEXT_NAMES = ("text", "query", "question", "contents", "body")
_DOC_ID_NAMES = (_QREL_NAMES[1],)
_QUERY_NAMES = (QUERY_ID_NAMES, QUERY_TEXT_NAMES)
_TABLE_SUFFIXES = (".jsonl", ".ndjson", ".tsv", ".parquet")
_TREC_SUFFIXES = (".txt", ".qrels", ".qrel", ".trec")
_PEEKED_ROWS = 100

_Record = TypeVar("_Record", Query, Qrel)
_Values = tuple[str, tuple[object, ...]]


def read_queries(uri: str) -> list[Query]:
    """The queries of a file or a folder, in its order.

    Raises:
        CorpusError: nothing there, no queries in it, or a row that is not a query (by file and line).
    """
    location = _one_of(Location(uri), ("queries.jsonl", "queries.jsonl.gz", "queries"))
    return _all_good(iter_queries(location), uri, "query")


def read_qrels(uri: str) -> list[Qrel]:
    """The judgements of a file or a folder, in its order; the same judgement twice counts once.

    Raises:
        CorpusError: nothing there, no judgements in it, or a row that is not one (by file and line).
    """
    location = Location(uri)
    if (location / "qrels").is_folder():
        splits = sorted(name for name, _ in (location / "qrels").listing())
        if len(splits) != 1:
            raise CorpusError(
                f"{uri!r} has judgements of {len(splits)} splits; give one: {uri}/qrels/{{{','.join(splits)}}}"
            )
        location = location / "qrels" / splits[0]
    return _all_good(iter_qrels(location), uri, "judgement")


def read_doc_ids(uri: str) -> frozenset[str]:
    """The doc_ids of a file: one a line, the column doc_id of a table, or those that qrels judge, whatever the relevance.

    Raises:
        CorpusError: there is no such file, it has no doc_id, or a row without one (by file and line).
    """
    file = Location(uri)
    if not file.is_file():
        raise CorpusError(f"no file {uri!r}; give a list of doc_ids, one a line, or qrels")
    found = set()
    for row in _doc_ids(file):
        if isinstance(row, BadRow):
            raise CorpusError(f"{row.place} is not a doc_id: {REASONS[row.reason]}; mend or remove that line")
        found.add(row)
    if not found:
        raise CorpusError(f"{uri!r} lists no doc_id; give one a line")
    return frozenset(found)


def _doc_ids(file: Location) -> Iterator[str | BadRow]:
    name, label = plain_name(file.name), file.name
    if name.endswith((".jsonl", ".ndjson", ".parquet")):
        for row in _file_rows(file, label, _DOC_ID_NAMES, "doc_ids"):
            yield row if isinstance(row, BadRow) else _identifier(row[1][0]) or BadRow(row[0], "missing_id")
    elif _holds_qrels(file, label):
        for row in _text_rows(file, label, _QREL_NAMES):
            yield row if isinstance(row, BadRow) else _identifier(row[1][1]) or BadRow(row[0], "missing_id")
    else:
        for line in read_lines(file, label):
            yield line if isinstance(line, BadRow) else clean_id(line.text)


def _holds_qrels(file: Location, label: str) -> bool:
    """Whether a text file is one of qrels, not of one id a line: by its name, or by the fields of its first line."""
    first = next((line for line in read_lines(file, label) if isinstance(line, Line)), None)
    fields = [] if first is None else first.text.split()
    if len(fields) < 2:
        return False
    named = plain_name(file.name).endswith((".tsv", ".qrels", ".qrel"))
    is_header = any(field.lower() in _QREL_NAMES[0] for field in fields)
    return named or is_header or (len(fields) in (3, 4) and _whole_number(fields[-1]) is not None)


def keep_judged(queries: Iterable[Query], qrels: Iterable[Qrel]) -> list[Query]:
    """The queries with at least one judgement of any relevance, in their order."""
    judged = {qrel.query_id for qrel in qrels}
    return [query for query in queries if query.query_id in judged]


def iter_queries(location: Location) -> Iterator[Query | BadRow]:
    """The queries of a file or folder with their text cleaned; what is none of them as a bad row.

    Raises:
        CorpusError: nothing there, an unknown kind of file, a missing column, a file cut short.
    """
    seen: set[str] = set()
    for row in _rows(location, _QUERY_NAMES, "queries"):
        if isinstance(row, BadRow):
            yield row
            continue
        place, (query_id, text) = row
        record = _query(place, query_id, text)
        if isinstance(record, Query):
            if record.query_id in seen:
                yield BadRow(place, "duplicate_id")
                continue
            seen.add(record.query_id)
        yield record


def _query(place: str, query_id: object, text: object) -> Query | BadRow:
    identifier = _identifier(query_id)
    if identifier is None:
        return BadRow(place, "missing_id")
    if not isinstance(text, str):
        return BadRow(place, text_fault(text))
    if not is_unicode(text):
        return BadRow(place, "not_utf8")
    cleaned = clean_text(text).replace("\n", " ")
    return Query(identifier, cleaned) if cleaned else BadRow(place, "empty_text")


def iter_qrels(location: Location) -> Iterator[Qrel | BadRow]:
    """The judgements of a file or folder; what is none of them as a bad row.

    Raises:
        CorpusError: as `iter_queries`.
    """
    seen: dict[tuple[str | None, str | None], int] = {}
    for row in _rows(location, _QREL_NAMES, "judgements"):
        if isinstance(row, BadRow):
            yield row
            continue
        place, (query_id, doc_id, value) = row
        pair, relevance = (_identifier(query_id), _identifier(doc_id)), _whole_number(value)
        if pair[0] is None or pair[1] is None:
            yield BadRow(place, "missing_id")
        elif relevance is None:
            yield BadRow(place, "bad_relevance")
        elif pair not in seen:
            seen[pair] = relevance
            yield Qrel(pair[0], pair[1], relevance)
        elif seen[pair] != relevance:
            yield BadRow(place, "conflicting_judgement")


def _identifier(value: object) -> str | None:
    return id_text(value) or None


def _whole_number(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return int(number) if number.is_integer() else None


def _all_good(records: Iterable[_Record | BadRow], uri: str, what: str) -> list[_Record]:
    found = []
    for record in records:
        if isinstance(record, BadRow):
            raise CorpusError(f"{record.place} is not a {what}: {REASONS[record.reason]}; mend or remove that line")
        found.append(record)
    if not found:
        raise CorpusError(f"{uri!r} holds no {what}; give a file with at least one")
    return found


def _one_of(location: Location, names: Sequence[str]) -> Location:
    """What a folder keeps under one of some names, else the folder itself."""
    return next((location / name for name in names if (location / name).exists()), location)


def _rows(location: Location, names: Sequence[Collection[str]], what: str) -> Iterator[_Values | BadRow]:
    if location.is_file():
        yield from _file_rows(location, location.name, names, what)
        return
    if not location.exists():
        raise CorpusError(f"no {what} at {location.uri!r}: there is no such file or folder")
    suffixes = (*_TABLE_SUFFIXES, *(_TREC_SUFFIXES if names is _QREL_NAMES else ()))
    labels = [name for name, _ in location.listing() if plain_name(name).endswith(suffixes)]
    if not labels:
        raise CorpusError(
            f"no {what} in the folder {location.uri!r}: it has no file that ends with {' or '.join(suffixes)}"
        )
    for label in labels:
        yield from _file_rows(location / label, label, names, what)


def _file_rows(file: Location, label: str, names: Sequence[Collection[str]], what: str) -> Iterator[_Values | BadRow]:
    name = plain_name(file.name)
    if name.endswith(".parquet"):
        yield from parquet_rows(file, label, lambda found: _pick(found, names, label))
    elif name.endswith((".jsonl", ".ndjson")):
        yield from _json_rows(file, label, names)
    elif name.endswith((".tsv", *_TREC_SUFFIXES)):
        yield from _text_rows(file, label, names)
    else:
        raise CorpusError(
            f"{file.uri!r} is not a file of {what} by its name; give one that ends with {' or '.join(_TABLE_SUFFIXES)}"
            f"{f' (or {chr(44).join(_TREC_SUFFIXES)} in TREC format)' if names is _QREL_NAMES else ''}"
        )


def _pick(found: Iterable[str], names: Sequence[Collection[str]], label: str) -> list[str]:
    have = list(found)
    picked = []
    for wanted in names:
        column = first_of(tuple(wanted), have)
        if column is None:
            raise CorpusError(
                f"{label} has no column {' or '.join(wanted)}; its columns are {', '.join(have) or 'none'}"
            )
        picked.append(column)
    return picked


def _json_rows(file: Location, label: str, names: Sequence[Collection[str]]) -> Iterator[_Values | BadRow]:
    parsed = ((line, parsed_object(line, label)) for line in read_lines(file, label))
    peeked = list(itertools.islice(parsed, _PEEKED_ROWS))
    keys = dict.fromkeys(key for _, value in peeked if not isinstance(value, BadRow) for key in value)
    if not peeked:
        return
    columns = _pick(keys, names, label)
    for line, value in itertools.chain(peeked, parsed):
        if isinstance(value, BadRow):
            yield value
        elif isinstance(line, Line):
            yield f"{label}:{line.number}", tuple(value.get(name, MISSING) for name in columns)


def _text_rows(file: Location, label: str, names: Sequence[Collection[str]]) -> Iterator[_Values | BadRow]:
    """Fields set apart by tabs (in qrels by any white space); the first line may name the columns."""
    splits_anywhere = len(names) == 3
    order: list[int] | None = None
    width = 0
    for line in read_lines(file, label):
        if isinstance(line, BadRow):
            yield line
            continue
        fields = line.text.split("\t") if "\t" in line.text or not splits_anywhere else line.text.split()
        if order is None:
            order, is_header = _field_order(fields, names, label)
            width = len(fields)
            if is_header:
                continue
        if len(fields) != width:
            yield BadRow(f"{label}:{line.number}", "wrong_columns")
        else:
            yield f"{label}:{line.number}", tuple(fields[at] for at in order)


def _field_order(fields: list[str], names: Sequence[Collection[str]], label: str) -> tuple[list[int], bool]:
    """Where the wanted fields stand, and whether the first line is one of names."""
    header = [field.strip().lower() for field in fields]
    if any(header.count(name) for name in names[0]):
        return [header.index(column) for column in _pick(header, names, label)], True
    if len(fields) == len(names):
        return list(range(len(names))), False
    if len(names) == 3 and len(fields) == 4:
        return [0, 2, 3], False
    wanted = "query, document and relevance (or query, 0, document, relevance)" if len(names) == 3 else "id and text"
    raise CorpusError(f"{label} has {amount(len(fields), 'columns')}; give {wanted}, set apart by tabs")
