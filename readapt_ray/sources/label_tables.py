"""Read the columns of queries, judgements and lists of doc_ids from tables of any format.

Columns have well-known names, or names given by `--columns`. Judgements can also be in TREC files without header.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from readapt_ray.errors import CorpusError
from readapt_ray.progress import amount
from readapt_ray.sources.arrow_files import arrow_rows, parquet_rows, saved_files
from readapt_ray.sources.columns import ColumnChoice, first_of
from readapt_ray.sources.delimited import Wanted, delimited_rows
from readapt_ray.sources.formats import FORMATS
from readapt_ray.sources.json_files import json_rows
from readapt_ray.sources.lines import Line, plain_name, read_lines
from readapt_ray.sources.listing import DataFile, data_files
from readapt_ray.sources.read_options import ReadOptions
from readapt_ray.sources.source import BadRow
from readapt_ray.sources.tables import Values
from readapt_ray.storage import Location

logger = logging.getLogger("readapt_ray")

QUERY_TEXT_NAMES: Final = ("text", "query", "question", "contents", "body")
TREC_SUFFIXES: Final = (".txt", ".qrels", ".qrel", ".trec")
TABLE_SUFFIXES: Final = tuple(suffix for each in FORMATS.values() for suffix in each.suffixes)
SAVED_NAMES: Final = ("state.json", "dataset_info.json", "dataset_dict.json")
"""Files that `datasets.save_to_disk` writes beside the data."""


class Kind(NamedTuple):
    """A kind of table (queries, judgements, doc_ids): its fields, each with well-known names of its column."""

    what: str
    fields: dict[str, tuple[str, ...]]
    unnamed: tuple[tuple[str, ...], ...] = ()
    """Column names for TSV without header: one tuple per possible number of columns."""
    unnamed_text: str = ""
    """`unnamed` as text, for errors."""
    can_choose: bool = True
    """Whether the user can choose columns with `--columns`."""

    @property
    def is_judgements(self) -> bool:
        """Whether the table holds relevance judgements, which files in TREC format can also hold."""
        return "relevance" in self.fields


_QREL_FIELDS: Final = {
    "query_id": ("query_id", "query-id", "qid"),
    "doc_id": ("doc_id", "corpus-id", "docid", "corpus_id", "pid", "passage_id", "document_id", "docno"),
    "relevance": ("relevance", "score", "label"),
}
QUERIES: Final = Kind(
    "queries",
    {"query_id": ("query_id", "_id", "id", "qid", "query-id"), "query": QUERY_TEXT_NAMES},
    (("query_id", "query"),),
    "id and text",
)
QRELS: Final = Kind(
    "judgements",
    _QREL_FIELDS,
    (("query_id", "doc_id", "relevance"), ("query_id", "0", "doc_id", "relevance")),
    "query, document and relevance (or query, 0, document, relevance)",
)
DOC_IDS: Final = Kind("doc_ids", {"doc_id": _QREL_FIELDS["doc_id"]}, can_choose=False)
JUDGED_DOC_IDS: Final = QRELS._replace(can_choose=False)


def label_rows(location: Location, kind: Kind, choice: ColumnChoice) -> Iterator[Values | BadRow]:
    """Yield place (file and line) and values of each row of a file, or of all files of a folder.

    Values are raw, in the order of `kind.fields`. A row that cannot be read is yielded as a bad row.

    Args:
        location: a file, or a folder (see `label_files`).
        kind: which fields to read: `QUERIES`, `QRELS` or `DOC_IDS`.
        choice: columns that the user gave. For other fields, well-known names are tried.

    Raises:
        CorpusError: the path does not exist, no file is a table, a column is missing, or a file is cut short.
    """
    if location.is_file():
        yield from file_rows(location, location.name, kind, choice)
        return
    if not location.exists():
        raise CorpusError(f"no {kind.what} at {location.uri!r}: there is no such file or folder")
    suffixes = (*TABLE_SUFFIXES, *(TREC_SUFFIXES if kind.is_judgements else ()))
    files = label_files(location, suffixes)
    if not files:
        raise CorpusError(
            f"no {kind.what} in the folder {location.uri!r}: it has no file that ends with {' or '.join(suffixes)}"
        )
    for file in files:
        yield from file_rows(file.location, file.label, kind, choice)


def label_files(folder: Location, suffixes: tuple[str, ...] = TABLE_SUFFIXES) -> list[DataFile]:
    """List the tables in a folder, without its subfolders; for a saved `DatasetDict`, the tables of all splits."""
    is_dict = (folder / "dataset_dict.json").is_file()
    found = [file for file in data_files(folder, suffixes) if is_dict or "/" not in file.label]
    return saved_files(folder, [file for file in found if file.location.name not in SAVED_NAMES])


def file_rows(file: Location, label: str, kind: Kind, choice: ColumnChoice) -> Iterator[Values | BadRow]:
    """Yield place and values of each row of one file. Values are in the order of `kind.fields`.

    Args:
        file: the file.
        label: name of the file in places and errors.
        kind: which fields to read.
        choice: columns that the user gave.

    Raises:
        CorpusError: for the same reasons as `label_rows`.
    """

    def pick(found: Sequence[str]) -> list[str]:
        return _picked(found, label, kind, choice)

    options = ReadOptions()
    name = plain_name(file.name)
    table_format = next((each for each in FORMATS.values() if name.endswith(each.suffixes)), None)
    if kind.is_judgements and (name.endswith(TREC_SUFFIXES) or (name.endswith(".tsv") and not _has_tabs(file, label))):
        yield from trec_rows(file, label, kind, choice)
    elif table_format is None:
        raise CorpusError(
            f"{file.uri!r} is not a file of {kind.what} by its name; give one that ends with {' or '.join(TABLE_SUFFIXES)}"
            f"{f' (or {chr(44).join(TREC_SUFFIXES)} in TREC format)' if kind.is_judgements else ''}"
        )
    elif table_format.name == "parquet":
        yield from parquet_rows(file, label, pick)
    elif table_format.name == "arrow":
        yield from arrow_rows(file, label, pick)
    elif table_format.name in ("csv", "tsv"):
        wanted = _wanted(kind, choice)
        yield from delimited_rows(file, label, wanted, pick, options=options, is_tsv=table_format.name == "tsv")
    else:
        yield from json_rows(file, label, pick, options, is_lines=table_format.name == "jsonl")


def _wanted(kind: Kind, choice: ColumnChoice) -> Wanted:
    given = [name for names in choice.of(kind.fields).values() for name in names]
    ids, *others = kind.fields.values()
    texts = tuple(name for names in others for name in names)
    return Wanted((*given, *ids), texts, () if given else kind.unnamed, kind.unnamed_text)


def _picked(found: Sequence[str], label: str, kind: Kind, choice: ColumnChoice) -> list[str]:
    """Return the column of each field: the given one if the file has it, else one with a well-known name."""
    given = choice.of(kind.fields)
    picked: list[str] = []
    for field, known in kind.fields.items():
        chosen = first_of(given.get(field, ()), found)
        column = chosen or first_of(known, [name for name in found if name not in picked])
        if column is None:
            which = f"say which one it is with --columns {field}=COLUMN (in a run: ingest.columns)"
            advice = which if kind.can_choose else "rename it"
            raise CorpusError(
                f"{label} has no column {' or '.join(given.get(field, known))}; its columns are {', '.join(found) or 'none'}: {advice}"
            )
        if field in given and chosen is None:
            logger.info("%s has no column %s: %s is read from %s", label, "+".join(given[field]), field, column)
        picked.append(column)
    return picked


def _has_tabs(file: Location, label: str) -> bool:
    first = next((line for line in read_lines(file, label) if isinstance(line, Line)), None)
    return first is None or "\t" in first.text


def trec_rows(file: Location, label: str, kind: Kind, choice: ColumnChoice) -> Iterator[Values | BadRow]:
    """Yield place and values of each judgement of a file in TREC format. The first line may be a header.

    Fields are separated by tabs if a line has any, else by white space. Without a header they are query, document and
    relevance, or query, 0, document and relevance. Values are in the order of `kind.fields`. A line with another number
    of fields than the first is a bad row.

    Raises:
        CorpusError: without a header, the first line has neither 3 nor 4 fields; or a column is missing in the header.
    """
    order: list[int] = []
    width = 0
    for line in read_lines(file, label):
        if isinstance(line, BadRow):
            yield line
            continue
        fields = line.text.split("\t") if "\t" in line.text else line.text.split()
        if not order:
            width = len(fields)
            if first_of((*choice.of(kind.fields).get("query_id", ()), *_QREL_FIELDS["query_id"]), fields):
                order = [fields.index(name) for name in _picked(fields, label, kind, choice)]
                continue
            order = _trec_order(width, label)
        if len(fields) != width:
            yield BadRow(f"{label}:{line.number}", "wrong_columns", f"{len(fields)}, not {width}")
        else:
            yield f"{label}:{line.number}", tuple(fields[at] for at in order)


def _trec_order(width: int, label: str) -> list[int]:
    if width not in (3, 4):
        raise CorpusError(f"{label} has {amount(width, 'columns')}; give {QRELS.unnamed_text}, separated by tabs")
    return [0, 1, 2] if width == 3 else [0, 2, 3]
