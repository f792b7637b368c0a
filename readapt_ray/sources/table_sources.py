"""Passages from files of rows, one file or a folder of them, with queries and judgements where there are some."""

from collections.abc import Iterator

from readapt_ray.artifacts import fingerprint
from readapt_ray.errors import CorpusError
from readapt_ray.records import Qrel, Query
from readapt_ray.sources.judgements import iter_qrels, iter_queries
from readapt_ray.sources.lines import plain_name, unreadable
from readapt_ray.sources.source import BadRow, Limits, Row, Source
from readapt_ray.sources.tables import JsonLines, TableFormat
from readapt_ray.storage import Location


class TableSource(Source):
    """A file of rows, or a folder of them in the order of their names."""

    def __init__(self, location: Location, table_format: TableFormat, limits: Limits) -> None:
        self.format = table_format.name
        self._location, self._table_format, self._limits = location, table_format, limits

    def _files(self) -> list[tuple[str, Location]]:
        if self._location.is_file():
            return [(self._location.name, self._location)]
        return data_files(self._location, self._table_format.suffixes)

    def check(self) -> None:
        """The first file with rows has the columns."""
        files = self._files()
        if not any(self._table_format.columns(file, label) for label, file in files):
            raise CorpusError(
                f"{self._location} holds no rows: {len(files)} {self.format} file{'s' * (len(files) != 1)}"
                f"{', all empty' if files else ''}; give a corpus with at least one passage"
            )

    def rows(self) -> Iterator[Row | BadRow]:
        """File after file."""
        files = self._files()
        sizes = [max(file.size_bytes(), 1) for _, file in files]
        total, before = sum(sizes), 0
        for (label, file), size in zip(files, sizes, strict=True):

            def advance(share: float, before: int = before, size: int = size) -> None:
                self.fraction_read = (before + share * size) / total

            yield from self._table_format.rows(file, label, self._limits, advance)
            before += size
            self.fraction_read = before / total

    def fingerprint(self) -> str:
        """By the content of its files."""
        return files_fingerprint(self._files())


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
        queries = [("queries", self._queries)] if self._queries is not None else []
        return files_fingerprint([*self._files(), *queries, *((f"qrels/{k}", file) for k, file in self._qrels.items())])


def data_files(folder: Location, suffixes: tuple[str, ...]) -> list[tuple[str, Location]]:
    """The files of some kinds under a folder by relative name; those whose path has a part in `.` or `_` are not data."""
    return [
        (name, folder / name)
        for name, _ in folder.listing(recursive=True)
        if plain_name(name).endswith(suffixes) and not any(part.startswith((".", "_")) for part in name.split("/"))
    ]


def files_fingerprint(files: list[tuple[str, Location]]) -> str:
    """Stands for the content of files and their names.

    Raises:
        CorpusError: one cannot be read.
    """
    contents = {}
    for label, file in files:
        try:
            contents[label] = list(file.content_fingerprint().values())
        except OSError as error:
            raise unreadable(label, "to its end", error) from error
    return fingerprint(contents)


class BeirSource(LabelledTableSource):
    """A folder in BEIR's layout: corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv; each may be gzipped."""

    def __init__(self, folder: Location, limits: Limits) -> None:
        corpus = beir_file(folder, "corpus.jsonl")
        if corpus is None:
            raise CorpusError(f"{folder} is not a BEIR folder: it has no corpus.jsonl; give another --format")
        qrels = {
            plain_name(file.name).removesuffix(".tsv"): file for _, file in data_files(folder / "qrels", (".tsv",))
        }
        super().__init__(
            corpus, JsonLines(), limits, name="beir", queries=beir_file(folder, "queries.jsonl"), qrels=qrels
        )


def beir_file(folder: Location, name: str) -> Location | None:
    """A file of a BEIR folder, plain or gzipped."""
    return next((file for file in (folder / name, folder / f"{name}.gz") if file.is_file()), None)
