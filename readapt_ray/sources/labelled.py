"""Read passages, queries and judgements from the parts of one folder, such as a BEIR folder or a data set of the hub.

    corpus      corpus.jsonl, or a table of another format; or a folder `corpus` of tables
    queries     the same with the name `queries`
    judgements  files or folders named by split, under `qrels` or `data`; or `qrels.tsv`, `qrels-dev.csv` and so on

The parts of a configuration have its name in front: `de-corpus`, `de-queries`, `de-qrels`.
"""

import re
from collections.abc import Iterator
from typing import Final

from readapt_ray.records import Qrel
from readapt_ray.sources.arrow_files import saved_files
from readapt_ray.sources.formats import FORMATS
from readapt_ray.sources.judgements import iter_qrels
from readapt_ray.sources.label_tables import SAVED_NAMES, TABLE_SUFFIXES, TREC_SUFFIXES
from readapt_ray.sources.lines import plain_name
from readapt_ray.sources.listing import data_files
from readapt_ray.sources.read_options import ReadOptions
from readapt_ray.sources.source import BadRow
from readapt_ray.sources.table_sources import LabelledTableSource
from readapt_ray.storage import Location

ROLES = ("corpus", "queries", "qrels")
PART = re.compile(rf"(?:(.+)[-_.])?({'|'.join(ROLES)})")
"""Pattern of a part's name: an optional configuration, and the role."""
_SPLITS: Final = {"train": "train", "dev": "dev", "test": "test", "validation": "dev", "valid": "dev"}
_SPLIT = re.compile(rf"(?:^|[-_.])({'|'.join(_SPLITS)})(?:$|[-_.])")
_QRELS = re.compile(r"(^|[-_.])qrels?($|[-_.])")
_SHARD = re.compile(r"-\d+-of-\d+.*")
_FORMAT_ORDER: Final = ("jsonl", "parquet", "arrow", "csv", "tsv", "json")


class PartsSource(LabelledTableSource):
    """A folder with the parts corpus, queries and qrels as a source."""

    def qrels(self) -> dict[str, Iterator[Qrel | BadRow]]:
        """Return the judgements by split. A split may have several files."""
        parts: dict[str, list[Location]] = {}
        for name, file in sorted(self._qrels.items()):
            parts.setdefault(_split(name), []).append(file)
        choice = self.options.columns
        return {split: iter_qrels(*files, choice=choice) for split, files in parts.items()}


def parts_source(
    folder: Location, options: ReadOptions, *, name: str, config: str = "", qrels_beside: Location | None = None
) -> PartsSource | None:
    """Return a folder of parts as a source; None if it has no part `corpus`.

    Args:
        folder: the data set.
        options: how to read it.
        name: name of the format: "beir" or "hub". In a BEIR folder fewer files count as judgements (see `qrel_files`).
        config: configuration to read; empty means the parts without one.
        qrels_beside: another folder, whose judgements are used if this one has none.
    """
    corpus = _part(folder, "corpus", config)
    if corpus is None:
        return None
    qrels = qrel_files(folder, config, is_beir=name == "beir" and corpus.is_file())
    qrels = qrels or (qrel_files(qrels_beside) if qrels_beside else {})
    queries = _part(folder, "queries", config)
    return PartsSource(corpus, FORMATS[_formats(corpus)[0]], options, name=name, queries=queries, qrels=qrels)


def has_corpus(folder: Location) -> bool:
    """Return whether a folder has a part that holds passages: a file such as `corpus.jsonl`, or a folder `corpus`."""
    return _part(folder, "corpus", "") is not None


def _part(folder: Location, role: str, config: str) -> Location | None:
    """Return the file or folder of a role (corpus, queries, qrels); None if there is none."""
    if not config:
        part = folder / role
        return _table(folder, role) or (part if part.is_folder() and _formats(part) else None)
    for above in (folder, folder / "data"):
        for between in "-_.":
            part = above / f"{config}{between}{role}"
            if part.is_folder():
                return part
    return _table(folder / config, role)


def _table(folder: Location, role: str) -> Location | None:
    """Return the table in a folder that is named after its role, such as `corpus.jsonl`; None if there is none."""
    if not folder.is_folder():
        return None
    names = [name for name, _ in folder.listing()]
    wanted = [f"{role}{suffix}" for kind in _FORMAT_ORDER for suffix in FORMATS[kind].suffixes]
    return next((folder / name for each in wanted for name in names if plain_name(name) == each), None)


def _formats(location: Location) -> list[str]:
    """Return the formats of a file, or of the files in a folder. JSON comes last, as it may describe other tables."""
    if location.is_file():
        names = [plain_name(location.name)]
    else:
        names = [plain_name(name) for name, *_ in data_files(location, TABLE_SUFFIXES)]
        names = [name for name in names if name.rpartition("/")[2] not in SAVED_NAMES]
    return [kind for kind in _FORMAT_ORDER if any(name.endswith(FORMATS[kind].suffixes) for name in names)]


def qrel_files(folder: Location, config: str = "", *, is_beir: bool = False) -> dict[str, Location]:
    """Find the files of judgements: under `qrels`, else under `data`, else in the folder itself, known by their names.

    Args:
        folder: the data set.
        config: configuration whose judgements to find; empty means the judgements without one.
        is_beir: whether this is a BEIR folder. Then `data` is ignored, and files directly in the folder must have "qrels"
            in their name.

    Returns:
        The files by their name relative to the folder of judgements; empty if there are none.
    """
    if config:
        part = _part(folder, "qrels", config) or folder / config / "qrels"
        return _judgements(part) if part.is_folder() else {}
    if (folder / "qrels").is_folder() and (files := _judgements(folder / "qrels")):
        return files
    if not is_beir and (folder / "data").is_folder() and (files := _judgements(folder / "data")):
        return files
    at_top = {name: file for name, file in _judgements(folder).items() if "/" not in name}
    return {
        name: file
        for name, file in at_top.items()
        if _QRELS.search(_stem(name)) or (not is_beir and _SPLIT.search(_stem(name)))
    }


def _judgements(folder: Location) -> dict[str, Location]:
    files = data_files(folder, (*TABLE_SUFFIXES, *TREC_SUFFIXES))
    files = saved_files(folder, [file for file in files if file.location.name not in SAVED_NAMES])
    return {file.label: file.location for file in files}


def _stem(name: str) -> str:
    """Return a file's name without suffixes and without the number of its shard."""
    return _SHARD.sub("", plain_name(name.rsplit("/", 1)[-1]).rpartition(".")[0])


def _split(name: str) -> str:
    """Return the split of a file of judgements.

    It is `test` for `test.tsv`, `test-00000-of-00001.parquet`, `qrels.csv` and `test/data-00000-of-00001.arrow`.
    """
    folder, _, _ = name.rpartition("/")
    stem = _QRELS.sub("", _stem(name)) or "test"
    if folder and _stem(name) in ("data", "part"):
        stem = folder.split("/", 1)[0]
    return _SPLITS.get(stem, stem)
