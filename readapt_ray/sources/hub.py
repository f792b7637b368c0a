"""Corpora on the Hugging Face hub (`hub:BeIR/scifact`): fetched once into its own cache, then read as files.

    corpus      corpus.jsonl (perhaps .gz), or a folder `corpus` of JSON Lines or Parquet
    queries     the same under `queries`
    judgements  files named by split under `qrels` or `data`; else in the data set of the same name with `-qrels` behind it, as
                BEIR's own data sets have them

A data set without such a corpus is read as a folder of rows, as any other. The layouts are those of BEIR and of mteb.
"""

import itertools
import re
from collections.abc import Iterator

from readapt_ray.errors import CorpusError, first_line
from readapt_ray.records import Qrel
from readapt_ray.sources.judgements import iter_qrels
from readapt_ray.sources.lines import plain_name
from readapt_ray.sources.source import BadRow, Limits, Source
from readapt_ray.sources.table_sources import LabelledTableSource, TableSource, beir_file, data_files
from readapt_ray.sources.tables import FORMATS
from readapt_ray.storage import Location

PREFIX = "hub:"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FETCHED = ("*.jsonl", "*.jsonl.gz", "*.tsv", "*.tsv.gz", "*.parquet")
_QREL_SUFFIXES = (".tsv", ".jsonl", ".parquet")
_SPLITS = {"validation": "dev", "valid": "dev"}


class HubSource(LabelledTableSource):
    """A data set of the hub in BEIR's layout."""

    def qrels(self) -> dict[str, Iterator[Qrel | BadRow]]:
        """From the files of judgements; a split may have several."""
        parts: dict[str, list[Location]] = {}
        for name, file in sorted(self._qrels.items()):
            parts.setdefault(_split(name), []).append(file)
        return {split: itertools.chain.from_iterable(map(iter_qrels, files)) for split, files in parts.items()}


def open_hub(hub_id: str, limits: Limits) -> Source:
    """The source of a data set of the hub.

    Raises:
        CorpusError: it cannot be fetched, or has no rows.
    """
    if not _HUB_ID.fullmatch(hub_id):
        raise CorpusError(f"{PREFIX}{hub_id} is not a hub id; write {PREFIX}OWNER/NAME, such as {PREFIX}BeIR/scifact")
    folder = _fetch(hub_id)
    assert folder is not None
    corpus = _labelled_part(folder, "corpus")
    if corpus is None:
        return _rows_of(hub_id, folder, limits)
    qrels = _qrel_files(folder)
    beside = None if qrels else _fetch(f"{hub_id}-qrels", may_be_absent=True)
    if beside is not None:
        qrels = _qrel_files(beside)
    return HubSource(
        corpus,
        FORMATS[_format(corpus)],
        limits,
        name="hub",
        queries=_labelled_part(folder, "queries"),
        qrels=qrels,
    )


def _labelled_part(folder: Location, name: str) -> Location | None:
    """The file or the folder of the corpus or of the queries."""
    part = folder / name
    return beir_file(folder, f"{name}.jsonl") or (part if part.is_folder() else None)


def _format(location: Location) -> str:
    names = (
        [location.name] if location.is_file() else [name for name, *_ in data_files(location, (".jsonl", ".parquet"))]
    )
    return "jsonl" if any(plain_name(name).endswith(".jsonl") for name in names) else "parquet"


def _qrel_files(folder: Location) -> dict[str, Location]:
    """The files of judgements by relative name: under `qrels` or `data`, or beside nothing else at the top."""
    for part in (folder / "qrels", folder / "data", folder):
        found = data_files(part, _QREL_SUFFIXES) if part.is_folder() else []
        files = {file.label: file.location for file in found}
        if part is folder:
            files = {name: file for name, file in files.items() if not name.startswith(("corpus", "queries"))}
        if files:
            return files
    return {}


def _split(name: str) -> str:
    """`test` of `test.tsv` and of `test-00000-of-00001.parquet`."""
    stem = name.rsplit("/", 1)[-1].split(".", 1)[0].split("-", 1)[0]
    return _SPLITS.get(stem, stem)


def _rows_of(hub_id: str, folder: Location, limits: Limits) -> Source:
    found = [name for name, kind in FORMATS.items() if data_files(folder, kind.suffixes)]
    if len(found) != 1:
        raise CorpusError(
            f"{PREFIX}{hub_id} has no corpus.jsonl, no folder `corpus`, and "
            f"{'files of several formats (' + ', '.join(found) + ')' if found else 'no JSON Lines, TSV or Parquet file'}; "
            f"download it, and give the folder or file of its passages"
        )
    return TableSource(folder, FORMATS[found[0]], limits)


def _fetch(hub_id: str, *, may_be_absent: bool = False) -> Location | None:
    """The folder of a data set in the hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Location(snapshot_download(hub_id, repo_type="dataset", allow_patterns=list(_FETCHED)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        if may_be_absent and isinstance(error, RepositoryNotFoundError):
            return None
        raise CorpusError(
            f"cannot fetch the data set {hub_id!r} from the hub: {first_line(error)}; check the name and the network, set HF_TOKEN for "
            f"a gated one, or give a local folder"
        ) from error
