"""Read queries, relevance judgements (qrels) and lists of doc_ids from files or folders in common formats.

    queries     tables of any format (`sources/label_tables.py`), such as BEIR's .jsonl; .tsv without header (id, text)
    qrels       tables, such as BEIR's .tsv; .tsv without header; TREC (query, 0, document, relevance)
    doc_ids     one per line, or those of qrels

A folder of such files can be read too, such as that of an ingest artifact. Text files may be compressed. Ids are cleaned
like the ids of passages (`cleaning.clean_id`), so that they match.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from readapt_ray.errors import CorpusError
from readapt_ray.records import Qrel, Query
from readapt_ray.sources.cleaning import clean_id, clean_text, id_text, is_unicode, shown, text_fault
from readapt_ray.sources.columns import ColumnChoice, first_of, is_absent
from readapt_ray.sources.label_tables import (
    DOC_IDS,
    JUDGED_DOC_IDS,
    QRELS,
    QUERIES,
    SAVED_NAMES,
    TABLE_SUFFIXES,
    TREC_SUFFIXES,
    file_rows,
    label_rows,
    trec_rows,
)
from readapt_ray.sources.lines import Line, plain_name, read_lines
from readapt_ray.sources.listing import data_files
from readapt_ray.sources.source import REASONS, BadRow
from readapt_ray.sources.tables import Values
from readapt_ray.storage import Location

_Record = TypeVar("_Record", Query, Qrel)


def read_queries(uri: str, columns: Sequence[str] = ()) -> list[Query]:
    """Read the queries of a file or folder, in its order.

    Args:
        uri: a file, or a folder. Of a folder, its file or subfolder `queries` is read; without one, the tables in it.
        columns: columns to read, as items FIELD=COLUMN like `--columns`. Empty means well-known names.

    Raises:
        CorpusError: the path does not exist or has no queries, or a row is not a query (named by file and line) or
            repeats an id.
    """
    location = _queries_in(Location(uri))
    return _all_good(iter_queries(location, ColumnChoice.parse(columns, ())), uri, "query")


def read_qrels(uri: str, columns: Sequence[str] = ()) -> list[Qrel]:
    """Read the judgements of a file or folder, in its order. A judgement that is repeated counts once.

    Args:
        uri: a file or folder. Of a folder with a subfolder `qrels`, that subfolder is read; it must have a single
            split.
        columns: columns to read, as items FIELD=COLUMN like `--columns`. Empty means well-known names.

    Raises:
        CorpusError: the path does not exist or has no judgements or several splits, or a row is not a judgement or
            contradicts an earlier one (named by file and line).
    """
    location = Location(uri)
    if (location / "qrels").is_folder():
        location = location / "qrels"
        files = [file.label for file in data_files(location, (*TABLE_SUFFIXES, *TREC_SUFFIXES))]
        splits = sorted({name.split("/", 1)[0] for name in files} - set(SAVED_NAMES))
        if len(splits) != 1:
            raise CorpusError(
                f"{uri!r} has judgements of {len(splits)} splits; give one: {location}/{{{','.join(splits)}}}"
            )
        location = location / splits[0]
    return _all_good(iter_qrels(location, choice=ColumnChoice.parse(columns, ())), uri, "judgement")


def read_doc_ids(uri: str) -> frozenset[str]:
    """Read the doc_ids of a file: one per line, the column doc_id of a table, or all doc_ids in qrels.

    Raises:
        CorpusError: the file does not exist or has no doc_id, or a row has none (named by file and line).
    """
    file = Location(uri)
    if not file.is_file():
        raise CorpusError(f"no file {uri!r}; give a list of doc_ids, one a line, or qrels")
    found = set()
    for row in _doc_ids(file):
        if isinstance(row, BadRow):
            raise CorpusError(f"{row.place} is not a doc_id: {REASONS[row.reason]}; fix or remove that line")
        found.add(row)
    if not found:
        raise CorpusError(f"{uri!r} lists no doc_id; give one a line")
    return frozenset(found)


def _doc_ids(file: Location) -> Iterator[str | BadRow]:
    name, label = plain_name(file.name), file.name
    first = [] if name.endswith((".parquet", ".arrow", ".feather")) else _first_fields(file, label)
    is_list = name.endswith(".csv") and first_of(DOC_IDS.fields["doc_id"], first) is None
    if name.endswith(TABLE_SUFFIXES) and not name.endswith(".tsv") and not is_list:
        rows, at = file_rows(file, label, DOC_IDS, ColumnChoice()), 0
    elif _are_qrels(name, first):
        rows, at = trec_rows(file, label, JUDGED_DOC_IDS, ColumnChoice()), 1
    else:
        for line in read_lines(file, label):
            yield line if isinstance(line, BadRow) else clean_id(line.text)
        return
    for row in rows:
        yield row if isinstance(row, BadRow) else _identifier(row[1][at]) or BadRow(row[0], "missing_id")


def _first_fields(file: Location, label: str) -> list[str]:
    first = next((line.text for line in read_lines(file, label) if isinstance(line, Line)), "")
    return [field.strip(' "') for field in first.replace(",", " ").split()]


def _are_qrels(name: str, fields: Sequence[str]) -> bool:
    """Return whether a text file has qrels, and not one id per line, judged by its name and the fields of its first line."""
    if len(fields) < 2:
        return False
    is_header = any(field.lower() in QRELS.fields["query_id"] for field in fields)
    is_judgement = len(fields) in (3, 4) and _whole_number(fields[-1]) is not None
    return name.endswith((".tsv", ".qrels", ".qrel")) or is_header or is_judgement


def keep_judged(queries: Iterable[Query], qrels: Iterable[Qrel]) -> list[Query]:
    """Return the queries that have at least one judgement (of any relevance), in the same order."""
    judged = {qrel.query_id for qrel in qrels}
    return [query for query in queries if query.query_id in judged]


def iter_queries(location: Location, choice: ColumnChoice | None = None) -> Iterator[Query | BadRow]:
    """Yield the queries of a file or folder with cleaned texts, and a bad row for each row that is not a query.

    A line break in a text becomes a space. A query whose id an earlier one has is a bad row.

    Args:
        location: a file, or a folder of tables.
        choice: columns that the user gave; None means well-known names.

    Raises:
        CorpusError: the path does not exist, the kind of file is unknown, a column is missing, or a file is cut short.
    """
    seen: set[str] = set()
    for row in label_rows(location, QUERIES, choice or ColumnChoice()):
        if isinstance(row, BadRow):
            yield row
            continue
        place, (query_id, text) = row
        record = _query(place, query_id, text)
        if isinstance(record, Query):
            if record.query_id in seen:
                yield BadRow(place, "duplicate_id", shown(record.query_id))
                continue
            seen.add(record.query_id)
        yield record


def _query(place: str, query_id: object, text: object) -> Query | BadRow:
    identifier = _identifier(query_id)
    if identifier is None:
        return BadRow(place, "missing_id")
    if not isinstance(text, str):
        return BadRow(place, text_fault(text), "" if is_absent(text) else shown(text))
    if not (is_unicode(text) and is_unicode(identifier)):
        return BadRow(place, "not_utf8")
    cleaned = clean_text(text).replace("\n", " ")
    return Query(identifier, cleaned) if cleaned else BadRow(place, "empty_text")


def iter_qrels(*locations: Location, choice: ColumnChoice | None = None) -> Iterator[Qrel | BadRow]:
    """Yield the judgements of files or folders, and a bad row for each row that is not a judgement.

    A repeated judgement is left out. If it has another relevance, it is a bad row.

    Args:
        locations: files, or folders of tables, of one split, in their order.
        choice: columns that the user gave; None means well-known names.

    Raises:
        CorpusError: for the same reasons as `iter_queries`.
    """
    rows = (label_rows(each, QRELS, choice or ColumnChoice()) for each in locations)
    yield from without_repeats(map(_qrel, itertools.chain.from_iterable(rows)))


def _qrel(row: Values | BadRow) -> tuple[str, Qrel] | BadRow:
    if isinstance(row, BadRow):
        return row
    place, (query_id, doc_id, value) = row
    pair, relevance = (_identifier(query_id), _identifier(doc_id)), _whole_number(value)
    if pair[0] is None or pair[1] is None:
        return BadRow(place, "missing_id")
    if not (is_unicode(pair[0]) and is_unicode(pair[1])):
        return BadRow(place, "not_utf8")
    if relevance is None:
        return BadRow(place, "bad_relevance", shown(value))
    return place, Qrel(pair[0], pair[1], relevance)


def without_repeats(judgements: Iterable[tuple[str, Qrel] | BadRow]) -> Iterator[Qrel | BadRow]:
    """Yield each judgement once, and a bad row for one that gives an earlier query and passage another relevance.

    Args:
        judgements: judgements with their places, or bad rows, which are yielded unchanged.
    """
    seen: dict[tuple[str, str], int] = {}
    for each in judgements:
        if isinstance(each, BadRow):
            yield each
            continue
        place, qrel = each
        pair = qrel.query_id, qrel.doc_id
        if pair not in seen:
            seen[pair] = qrel.relevance
            yield qrel
        elif seen[pair] != qrel.relevance:
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
    return int(number) if number.is_integer() and abs(number) < 1 << 63 else None


def _all_good(records: Iterable[_Record | BadRow], uri: str, what: str) -> list[_Record]:
    found = []
    for record in records:
        if isinstance(record, BadRow):
            value = f" ({record.value})" if record.value else ""
            raise CorpusError(
                f"{record.place} is not a {what}: {REASONS[record.reason]}{value}; fix or remove that line"
            )
        found.append(record)
    if not found:
        raise CorpusError(f"{uri!r} holds no {what}; give a file with at least one")
    return found


def _queries_in(location: Location) -> Location:
    """Return the file or subfolder `queries` of a folder; without one, the location itself."""
    if not location.is_folder():
        return location
    names = sorted(name for name, _ in location.listing() if plain_name(name).rpartition(".")[0] == "queries")
    if names:
        return location / names[0]
    return location / "queries" if (location / "queries").is_folder() else location
