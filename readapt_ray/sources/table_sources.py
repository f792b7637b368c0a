"""Read passages from tables: one file, or a folder of files; also with queries and judgements beside them."""

import fnmatch
import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from readapt_ray.artifacts import fingerprint
from readapt_ray.errors import CorpusError
from readapt_ray.records import Qrel, Query
from readapt_ray.sources.arrow_files import saved_files
from readapt_ray.sources.columns import FIELDS, kept_schema
from readapt_ray.sources.judgements import iter_qrels, iter_queries
from readapt_ray.sources.listing import DataFile, Listing, check_unchanged, contents_of, count_not_read, listed
from readapt_ray.sources.read_options import ReadOptions
from readapt_ray.sources.source import BadRow, Row, Source
from readapt_ray.sources.tables import Layout, TableFormat
from readapt_ray.storage import Location

logger = logging.getLogger("readapt_ray")

_USUAL = frozenset({*FIELDS, "_id", "id"})
"""Usual column names. If only these are read, the log does not mention the choice of columns."""


class TableSource(Source):
    """A table, or a folder of tables in the order of their names, as a source."""

    def __init__(
        self, location: Location, table_format: TableFormat, options: ReadOptions, *, only: Sequence[str] = ()
    ) -> None:
        """Make a source of the files at a location.

        Args:
            location: a file or folder.
            table_format: the format of the files.
            options: how to read them.
            only: patterns of the relative names of the files to read. Empty means all.
        """
        self.format = table_format.name
        self.options = options
        self._location, self.table_format = location, table_format
        self._only = tuple(only)
        self.name = str(location)
        self._columns: dict[str, Any] = {}
        self.contents: dict[str, list[str]] = {}
        """Digests of the content of each file of passages, by its label. Known after `fingerprint`."""

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the listing of files, which may be large: a task that reads queries and judgements does not need it."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_listing", "contents")}

    @functools.cached_property
    def _listing(self) -> Listing:
        found = listed(self._location, self.table_format.suffixes)
        files = found.files
        if self._only:
            files = [file for file in files if any(fnmatch.fnmatch(file.label, pattern) for pattern in self._only)]
        if self.table_format.name == "arrow":
            files = saved_files(self._location, files)
        found = Listing(files, found.not_read | count_not_read(found.files, files))
        found.log_not_read(self._location)
        return found

    @property
    def _files(self) -> list[DataFile]:
        return self._listing.files

    def files(self) -> list[DataFile]:
        """Return the files in the order in which they are read."""
        return self._files

    def check(self) -> None:
        """Check that the first file with rows has the required columns. `kept` is known afterwards.

        Raises:
            CorpusError: no file has a row, or a column is missing.
        """
        files = self._files
        layouts = (self.table_format.layout(file, label, self.options) for label, file, _ in files)
        layout = next(filter(None, layouts), None)
        if layout is None:
            raise CorpusError(
                f"{self._location} holds no rows: {len(files)} {self.format} file{'s' * (len(files) != 1)}"
                f"{', all empty' if files else ''}; give a corpus with at least one passage"
            )
        self.kept = kept_schema(self.options.columns, layout.kept_types)
        self._columns = _described(layout)

    def description(self) -> dict[str, Any]:
        """Return the files and columns that are read, and those that are not. Columns are known after `check`."""
        return {"files": len(self._files), "files_not_read": self._listing.counts(), "columns": self._columns}

    def rows(self) -> Iterator[Row | BadRow]:
        """Yield the rows of all files, one file after the other.

        Raises:
            CorpusError: a file is damaged, or changed since it was listed.
        """
        files = self._files
        sizes = [max(file.size_bytes(), 1) for file in files]
        total, before = sum(sizes), 0
        for (label, file, _), size in zip(files, sizes, strict=True):

            def advance(share: float, before: int = before, size: int = size) -> None:
                self.fraction_read = (before + share * size) / total

            yield from self.table_format.rows(file, label, self.options, advance)
            before += size
            self.fraction_read = before / total
        check_unchanged(self._location, self.table_format.suffixes, files)

    def fingerprint(self) -> str:
        """Return a hash of the content of all files, and set `contents`: the digests of each file, by its label.

        On an object store, sizes and modification times are hashed instead of the content.

        Raises:
            CorpusError: a file is damaged or missing.
        """
        self.contents = contents_of(self._files)
        return fingerprint(self.contents)


def _described(layout: Layout) -> dict[str, Any]:
    """Return which columns are read and which are not. Log it unless only columns with usual names are there."""
    columns = layout.columns
    used = dict(zip(FIELDS, ([columns.doc_id], list(columns.title), list(columns.text)), strict=True))
    not_read = [name for name in layout.found if name not in columns.names]
    if not_read or any(set(names) - _USUAL for names in used.values()):
        logger.info(
            "columns read: %s%s%s",
            ", ".join(f"{field} from {' + '.join(names)}" for field, names in used.items() if names),
            f"; kept: {', '.join(columns.kept)}" if columns.kept else "",
            f"; not read: {', '.join(not_read)} (--keep carries columns along)" if not_read else "",
        )
    return {**used, "kept": list(columns.kept), "not_read": not_read}


class LabelledTableSource(TableSource):
    """Tables of passages with queries and judgements beside them: a BEIR folder, or an output of `ingest`."""

    def __init__(
        self,
        location: Location,
        table_format: TableFormat,
        options: ReadOptions,
        *,
        name: str,
        queries: Location | None,
        qrels: dict[str, Location],
    ) -> None:
        """Make a source of passages, queries and judgements.

        Args:
            location: file or folder of the passages.
            table_format: the format of the passages.
            options: how to read all of them.
            name: name of the format on the command line, such as "beir".
            queries: file or folder of the queries; None if there are none.
            qrels: file or folder of the judgements of each split, by the split's name.
        """
        super().__init__(location, table_format, options)
        self.format = name
        self.has_qrels = bool(qrels)
        self._queries, self._qrels = queries, qrels

    def queries(self) -> Iterator[Query | BadRow]:
        """Yield the queries, if the source has any."""
        if self._queries is not None:
            yield from iter_queries(self._queries, self.options.columns)

    def qrels(self) -> dict[str, Iterator[Qrel | BadRow]]:
        """Return the judgements by split, one file per split."""
        return {split: iter_qrels(file, choice=self.options.columns) for split, file in self._qrels.items()}

    def fingerprint(self) -> str:
        """Hash the content of passages, queries and judgements. `contents` is set for the passages."""
        queries = [DataFile("queries", self._queries)] if self._queries is not None else []
        qrels = [DataFile(f"qrels/{split}", file) for split, file in self._qrels.items()]
        self.contents = contents_of(self._files)
        return fingerprint(self.contents | contents_of([*queries, *qrels]))
