"""Read passages, queries and judgements from parts of one folder, as data sets of the hub have them.

    corpus      corpus.jsonl (perhaps compressed), or a folder `corpus` of JSON Lines or Parquet
    queries     the same under `queries`
    judgements  files named by split under `qrels` or `data`

The parts of a configuration have its name before theirs: `de-corpus`, `de-queries`, `de-qrels`.
"""

import itertools
import re
from collections.abc import Iterator

from readapt_ray.records import Qrel
from readapt_ray.sources.formats import FORMATS
from readapt_ray.sources.judgements import iter_qrels
from readapt_ray.sources.lines import plain_name
from readapt_ray.sources.listing import data_files
from readapt_ray.sources.read_options import ReadOptions
from readapt_ray.sources.source import BadRow
from readapt_ray.sources.table_sources import LabelledTableSource, beir_file
from readapt_ray.storage import Location

ROLES = ("corpus", "queries", "qrels")
PART = re.compile(rf"(?:(.+)[-_.])?({'|'.join(ROLES)})")
"""A part's name: that of its configuration, and what it holds."""
_QREL_SUFFIXES = (".tsv", ".jsonl", ".parquet")
_SPLITS = {"validation": "dev", "valid": "dev"}


class PartsSource(LabelledTableSource):
    """A folder of parts."""

    def qrels(self) -> dict[str, Iterator[Qrel | BadRow]]:
        """Yield the judgements of a split; it may have several files."""
        parts: dict[str, list[Location]] = {}
        for name, file in sorted(self._qrels.items()):
            parts.setdefault(_split(name), []).append(file)
        return {split: itertools.chain.from_iterable(map(iter_qrels, files)) for split, files in parts.items()}


def parts_source(
    folder: Location, options: ReadOptions, *, name: str, config: str = "", qrels_beside: Location | None = None
) -> PartsSource | None:
    """Return the source of a folder that has a corpus; None if it has none.

    Args:
        folder: the data set.
        options: of reading.
        name: of the format.
        config: configuration whose parts are read.
        qrels_beside: another folder of judgements, where this one has none.
    """
    corpus = _part(folder, "corpus", config)
    if corpus is None:
        return None
    qrels = qrel_files(folder, config) or (qrel_files(qrels_beside) if qrels_beside else {})
    queries = _part(folder, "queries", config)
    return PartsSource(corpus, FORMATS[_format(corpus)], options, name=name, queries=queries, qrels=qrels)


def _part(folder: Location, role: str, config: str) -> Location | None:
    """Return the file or the folder of the corpus or of the queries."""
    if not config:
        return beir_file(folder, f"{role}.jsonl") or (folder / role if (folder / role).is_folder() else None)
    for above in (folder, folder / "data"):
        for between in "-_.":
            part = above / f"{config}{between}{role}"
            if part.is_folder():
                return part
    return beir_file(folder / config, f"{role}.jsonl")


def _format(location: Location) -> str:
    names = (
        [location.name] if location.is_file() else [name for name, *_ in data_files(location, (".jsonl", ".parquet"))]
    )
    return "jsonl" if any(plain_name(name).endswith(".jsonl") for name in names) else "parquet"


def qrel_files(folder: Location, config: str = "") -> dict[str, Location]:
    """Return the files of judgements by relative name: under `qrels` or `data`, or beside nothing else at the top."""
    if config:
        part = _part(folder, "qrels", config) or folder / config / "qrels"
        found = data_files(part, _QREL_SUFFIXES) if part.is_folder() else []
        return {file.label: file.location for file in found}
    for part in (folder / "qrels", folder / "data", folder):
        found = data_files(part, _QREL_SUFFIXES) if part.is_folder() else []
        files = {file.label: file.location for file in found}
        if part is folder:
            files = {name: file for name, file in files.items() if not name.startswith(("corpus", "queries"))}
        if files:
            return files
    return {}


def _split(name: str) -> str:
    """Return `test` for `test.tsv` and for `test-00000-of-00001.parquet`."""
    stem = name.rsplit("/", 1)[-1].split(".", 1)[0].split("-", 1)[0]
    return _SPLITS.get(stem, stem)
