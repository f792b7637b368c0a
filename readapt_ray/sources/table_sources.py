"""Passages from files of rows, one file or a folder of them, with queries and judgements where there are some."""

import functools
import logging
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import pyarrow.fs as pafs

from readapt_ray.artifacts import fingerprint
from readapt_ray.damage import READ_ERRORS
from readapt_ray.errors import CorpusError
from readapt_ray.records import Qrel, Query
from readapt_ray.sources.judgements import iter_qrels, iter_queries
from readapt_ray.sources.lines import plain_name, refuse_damaged
from readapt_ray.sources.source import BadRow, Limits, Row, Source
from readapt_ray.sources.tables import JsonLines, TableFormat
from readapt_ray.storage import Location, state_of

logger = logging.getLogger("readapt_ray")

HIDDEN = (".", "_")
"""How a name begins that is not of data beside tables: `.git`, and `_SUCCESS`, `_temporary` of Spark."""


class DataFile(NamedTuple):
    """A file of a source: what to call it, where it is, and what the listing of its folder said of it."""

    label: str
    location: Location
    info: pafs.FileInfo | None = None

    def size_bytes(self) -> int:
        """Its length, without asking for it where the listing had it."""
        known = None if self.info is None else self.info.size
        return self.location.size_bytes() if known is None else int(known)

    def content(self) -> list[str]:
        """Its `content_fingerprint`, which on an object store is size and time, as the listing has them."""
        info = self.info
        if info is None or info.size is None or info.mtime_ns is None or self.location.is_local:
            return list(self.location.content_fingerprint().values())
        return [self.state()]

    def state(self) -> str:
        """Its size and time as they were when it was listed."""
        return state_of(self.info or self.location.info())


class TableSource(Source):
    """A file of rows, or a folder of them in the order of their names."""

    def __init__(self, location: Location, table_format: TableFormat, limits: Limits) -> None:
        self.format = table_format.name
        self._location, self._table_format, self._limits = location, table_format, limits

    @functools.cached_property
    def _files(self) -> list[DataFile]:
        return source_files(self._location, self._table_format.suffixes)

    def files(self) -> list[DataFile]:
        """Return the files in the order in which they are read."""
        return self._files

    def check(self) -> None:
        """The first file with rows has the columns."""
        files = self._files
        if not any(self._table_format.columns(file, label) for label, file, _ in files):
            raise CorpusError(
                f"{self._location} holds no rows: {len(files)} {self.format} file{'s' * (len(files) != 1)}"
                f"{', all empty' if files else ''}; give a corpus with at least one passage"
            )

    def rows(self) -> Iterator[Row | BadRow]:
        """File after file."""
        files = self._files
        sizes = [max(file.size_bytes(), 1) for file in files]
        total, before = sum(sizes), 0
        for (label, file, _), size in zip(files, sizes, strict=True):

            def advance(share: float, before: int = before, size: int = size) -> None:
                self.fraction_read = (before + share * size) / total

            yield from self._table_format.rows(file, label, self._limits, advance)
            before += size
            self.fraction_read = before / total

    def fingerprint(self) -> str:
        """By the content of its files."""
        return files_fingerprint(self._files)


class LabelledTableSource(TableSource):
    """Passages with queries and judgements beside them: a BEIR folder, or what `ingest` wrote."""

    def __init__(
        self,
        location: Location,
        table_format: TableFormat,
        limits: Limits,
        *,
        name: str,
        queries: Location | None,
        qrels: dict[str, Location],
    ) -> None:
        super().__init__(location, table_format, limits)
        self.format = name
        self.has_qrels = bool(qrels)
        self._queries, self._qrels = queries, qrels

    def queries(self) -> Iterator[Query | BadRow]:
        """From the file of queries."""
        if self._queries is not None:
            yield from iter_queries(self._queries)

    def qrels(self) -> dict[str, Iterator[Qrel | BadRow]]:
        """From the files of judgements, one a split."""
        return {split: iter_qrels(file) for split, file in self._qrels.items()}

    def fingerprint(self) -> str:
        """By the content of passages, queries and judgements."""
        queries = [DataFile("queries", self._queries)] if self._queries is not None else []
        qrels = [DataFile(f"qrels/{split}", file) for split, file in self._qrels.items()]
        return files_fingerprint([*self._files, *queries, *qrels])


def source_files(location: Location, suffixes: tuple[str, ...], *, hidden: tuple[str, ...] = HIDDEN) -> list[DataFile]:
    """A file, or the `data_files` of a folder; how many hidden ones were left out is logged."""
    info = location.info()
    if info.type == pafs.FileType.File:
        return [DataFile(location.name, location, info)]
    files = data_files(location, suffixes, hidden=())
    left_out = [file.label for file in files if not is_data(file.label, suffixes, hidden)]
    if left_out:
        begins = " or ".join(hidden)
        logger.info(
            "%s: left out %d files with a part in their path that begins with %s, %s first",
            *(location, len(left_out), begins, left_out[0]),
        )
    return [file for file in files if is_data(file.label, suffixes, hidden)]


def data_files(folder: Location, suffixes: tuple[str, ...], *, hidden: tuple[str, ...] = HIDDEN) -> list[DataFile]:
    """The files of some kinds under a folder, none of which has a hidden part in its relative path."""
    return [
        DataFile(name, folder / name, info)
        for name, info in folder.listing(recursive=True)
        if is_data(name, suffixes, hidden)
    ]


def is_data(name: str, suffixes: tuple[str, ...], hidden: tuple[str, ...] = HIDDEN) -> bool:
    """Whether a relative path is that of a file of some kinds, and no part of it begins as hidden ones do."""
    return plain_name(name).endswith(suffixes) and not any(part.startswith(hidden) for part in name.split("/"))


def files_fingerprint(files: Iterable[DataFile]) -> str:
    """Stands for the content of files and their names.

    Raises:
        CorpusError: one cannot be read.
    """
    contents = {}
    for file in files:
        try:
            contents[file.label] = file.content()
        except READ_ERRORS as error:
            refuse_damaged(file.label, "to its end", error)
            raise
    return fingerprint(contents)


class BeirSource(LabelledTableSource):
    """A folder in BEIR's layout: corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv; each may be gzipped."""

    def __init__(self, folder: Location, limits: Limits) -> None:
        corpus = beir_file(folder, "corpus.jsonl")
        if corpus is None:
            raise CorpusError(f"{folder} is not a BEIR folder: it has no corpus.jsonl; give another --format")
        qrels = {
            plain_name(file.name).removesuffix(".tsv"): file for _, file, _ in data_files(folder / "qrels", (".tsv",))
        }
        super().__init__(
            corpus, JsonLines(), limits, name="beir", queries=beir_file(folder, "queries.jsonl"), qrels=qrels
        )


def beir_file(folder: Location, name: str) -> Location | None:
    """A file of a BEIR folder, plain or gzipped."""
    return next((file for file in (folder / name, folder / f"{name}.gz") if file.is_file()), None)
