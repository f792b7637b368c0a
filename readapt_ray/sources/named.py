"""Read public collections by their name in the package ir_datasets (`ir_datasets:beir/nfcorpus/test`).

The extra `datasets` installs the package. It downloads each collection once, into its cache.
"""

import importlib.util
import itertools
from collections.abc import Iterator
from typing import Any

from readapt_ray.artifacts import fingerprint
from readapt_ray.errors import CorpusError, InputError
from readapt_ray.records import Qrel, Query
from readapt_ray.sources.cleaning import clean_id
from readapt_ray.sources.columns import TEXT_NAMES, ColumnChoice, Columns, kept_schema, passage_columns, type_of_values
from readapt_ray.sources.judgements import without_repeats
from readapt_ray.sources.label_tables import QUERY_TEXT_NAMES
from readapt_ray.sources.read_options import ReadOptions
from readapt_ray.sources.source import MISSING, BadRow, Row, Source

PREFIX = "ir_datasets:"
_PEEKED_DOCUMENTS = 100
_SPLITS = ("train", "dev", "test")


class NamedSource(Source):
    """A collection of ir_datasets as a source: its documents, and its queries and judgements if it has any.

    Raises:
        InputError: the package ir_datasets is not installed.
        CorpusError: the package has no collection of this name.
    """

    format = "ir_datasets"

    def __init__(self, name: str, options: ReadOptions) -> None:
        if importlib.util.find_spec("ir_datasets") is None:
            raise InputError(
                f"{PREFIX}{name} needs the package ir_datasets, which is not installed; pip install 'readapt-ray[datasets]'"
            )
        import ir_datasets

        self._name, self._choice = name, options.columns
        self._columns: Columns | None = None
        try:
            self._dataset: Any = ir_datasets.load(name)
        except KeyError as error:
            raise CorpusError(
                f"ir_datasets has no collection {name!r}; its names are on https://ir-datasets.com, such as beir/nfcorpus/test"
            ) from error
        self.has_qrels = bool(self._dataset.has_qrels())

    def check(self) -> None:
        """Check that the collection has documents, and the columns that the user chose. It is downloaded for this.

        Raises:
            CorpusError: it has no documents, cannot be downloaded, or lacks a column.
        """
        if not self._dataset.has_docs():
            raise CorpusError(f"{PREFIX}{self._name} has no documents; name a collection that has them")
        peeked = list(itertools.islice(self._documents(), _PEEKED_DOCUMENTS if self._choice.keep else 1))
        if not peeked:
            raise CorpusError(f"{PREFIX}{self._name} has no documents: it is empty")
        if self._choice != ColumnChoice():
            self._columns = passage_columns(peeked[0]._fields, f"{PREFIX}{self._name}", self._choice)
            types = [type_of_values(getattr(each, name) for each in peeked) for name in self._columns.kept]
            self.kept = kept_schema(self._choice, types)

    def rows(self) -> Iterator[Row | BadRow]:
        """Yield a row per document."""
        total = self._expected_rows()
        for number, document in enumerate(self._documents(), start=1):
            place, title = f"{self._name}:{number}", getattr(document, "title", None)
            if self._columns:
                yield self._columns.row(place, [getattr(document, each, MISSING) for each in self._columns.names])
            else:
                yield Row(place, document.doc_id, title, _text(document, TEXT_NAMES))
            self.fraction_read = number / total if total else 0.0

    def _documents(self) -> Iterator[Any]:
        return self._read("docs_iter")

    def _read(self, what: str) -> Iterator[Any]:
        """Yield the records of one of the package's iterators, and turn its errors into ours.

        Raises:
            CorpusError: the collection cannot be downloaded or read.
        """
        try:
            yield from getattr(self._dataset, what)()
        except (OSError, RuntimeError, ValueError) as error:
            raise CorpusError(
                f"{PREFIX}{self._name} cannot be read: {error}; check the network, or give a folder that has it"
            ) from error

    def _expected_rows(self) -> int:
        """Return the number of documents from the package's metadata, without a download; 0 if unknown."""
        return int(self._dataset.metadata().get("docs", {}).get("count") or 0)

    def queries(self) -> Iterator[Query | BadRow]:
        """Yield the queries of the collection, if it has any, and a bad row for each one without text."""
        if self._dataset.has_queries():
            for number, query in enumerate(self._read("queries_iter"), start=1):
                text = _text(query, QUERY_TEXT_NAMES)
                place = f"{self._name} query {number}"
                yield (
                    Query(clean_id(query.query_id), text.strip())
                    if isinstance(text, str) and text.strip()
                    else BadRow(place, "empty_text")
                )

    def qrels(self) -> dict[str, Iterator[Qrel | BadRow]]:
        """Return the judgements of the collection, under the split in its name ("test" if the name has none).

        A repeated judgement is left out; with another relevance, it is a bad row. Empty if the collection has no
        judgements. The iterator can be read once.
        """
        if not self.has_qrels:
            return {}
        split = next((part for part in reversed(self._name.split("/")) if part in _SPLITS), "test")
        qrels = (
            (f"{self._name} qrel {number}", Qrel(clean_id(each.query_id), clean_id(each.doc_id), int(each.relevance)))
            for number, each in enumerate(self._read("qrels_iter"), start=1)
        )
        return {split: without_repeats(qrels)}

    def fingerprint(self) -> str:
        """Hash the name only. The content of a published collection does not change."""
        return fingerprint({"ir_datasets": self._name})


def _text(record: Any, names: tuple[str, ...]) -> object:
    for name in names:
        if hasattr(record, name):
            return getattr(record, name)
    return record.default_text() if hasattr(record, "default_text") else MISSING
