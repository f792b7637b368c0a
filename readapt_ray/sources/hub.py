"""Read corpora from the Hugging Face hub (`hub:BeIR/scifact`): downloaded once into the hub's cache, then read as files.

A data set may have parts: corpus, queries, qrels (`sources/labelled.py`). The qrels may be in another data set with
`-qrels` appended to its name, as BEIR's are. A data set without a part `corpus` is read like a folder of tables. If it has
several configurations, it is refused with a list of them; `hub:OWNER/NAME:CONFIG` downloads and reads only one. Requests
to a busy hub are retried.
"""

import re
from collections.abc import Sequence

from readapt_ray.catalog.fetching import with_retries
from readapt_ray.errors import CorpusError
from readapt_ray.sources import configurations
from readapt_ray.sources.formats import FORMATS
from readapt_ray.sources.labelled import parts_source, qrel_files
from readapt_ray.sources.lines import COMPRESSED_SUFFIXES
from readapt_ray.sources.listing import data_files
from readapt_ray.sources.read_options import ReadOptions
from readapt_ray.sources.source import Source
from readapt_ray.sources.table_sources import TableSource
from readapt_ray.storage import Location

PREFIX = "hub:"
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?::(.+))?")
_CARD = "README.md"
_FETCHED = tuple(
    f"*{suffix}{compressed}"
    for table_format in FORMATS.values()
    for suffix in table_format.suffixes
    for compressed in ("", *COMPRESSED_SUFFIXES)
)


def open_hub(name: str, options: ReadOptions) -> Source:
    """Download a data set of the hub, or one configuration of it, and return it as a source.

    Args:
        name: OWNER/NAME, or OWNER/NAME:CONFIG.
        options: how to read it.

    Raises:
        CorpusError: it cannot be downloaded, has no rows, or has several configurations and none was chosen.
        ReadaptError: the hub could not be reached, or still failed after retries.
    """
    hub_id, config = check_name(name)
    in_card = configurations.in_card(_card(hub_id))
    _check_choice(hub_id, config, list(in_card), only=True)
    patterns = _patterns_of(config, in_card) if config else _FETCHED
    folder = _fetch(hub_id, patterns)
    assert folder is not None
    names = [file.label for file in data_files(folder, _suffixes())]
    if not config:
        _check_choice(hub_id, config, configurations.in_names(names))
    beside = None if config or qrel_files(folder) else _fetch(f"{hub_id}-qrels", _FETCHED, may_be_absent=True)
    parts = parts_source(folder, options, name="hub", config=config, qrels_beside=beside)
    return parts or _rows_of(f"{PREFIX}{name}", folder, options, patterns if config else ())


def check_name(name: str) -> tuple[str, str]:
    """Split `OWNER/NAME:CONFIG` into hub id and configuration. The configuration is empty if none is named.

    Raises:
        CorpusError: the text does not have this form.
    """
    found = _HUB_ID.fullmatch(name)
    if not found:
        raise CorpusError(
            f"{PREFIX}{name} is not a hub id; write {PREFIX}OWNER/NAME, such as {PREFIX}BeIR/scifact, or {PREFIX}OWNER/NAME:CONFIG"
        )
    return found[1], found[2] or ""


def _check_choice(hub_id: str, config: str, there: Sequence[str], *, only: bool = False) -> None:
    """Refuse a data set with several configurations if none was chosen. With `only`, refuse one that is not listed."""
    listed = f"{', '.join(there[:40])}{f' and {len(there) - 40} more' if len(there) > 40 else ''}"
    example = f"{PREFIX}{hub_id}:{there[0]}" if there else ""
    if not config and len(there) > 1:
        raise CorpusError(f"{PREFIX}{hub_id} has {len(there)} configurations: {listed}; choose one: {example}")
    if config and only and there and config not in there:
        raise CorpusError(f"{PREFIX}{hub_id} has no configuration {config!r}; it has {listed}: {example}")


def _patterns_of(config: str, in_card: dict[str, list[str]]) -> tuple[str, ...]:
    given = tuple(in_card.get(config, ()))
    return given or (f"{config}/*", f"data/{config}/*", *(f"{above}{config}[-_.]*" for above in ("", "data/")))


def _suffixes() -> tuple[str, ...]:
    return tuple(suffix for table_format in FORMATS.values() for suffix in table_format.suffixes)


def _rows_of(name: str, folder: Location, options: ReadOptions, patterns: Sequence[str]) -> Source:
    sources = {kind: TableSource(folder, FORMATS[kind], options, only=patterns) for kind in FORMATS}
    found = [kind for kind, source in sources.items() if source.files()]
    found = [kind for kind in found if kind != "json"] or found
    if len(found) != 1:
        raise CorpusError(
            f"{name} has no corpus.jsonl, no folder `corpus`, and "
            f"{'files of several formats (' + ', '.join(found) + ')' if found else 'no JSON Lines, CSV, TSV, Parquet or Arrow file'}; "
            f"download it, and give the folder or file of its passages"
        )
    return sources[found[0]]


def _card(hub_id: str) -> str:
    """Return the README.md of a data set; empty text if it has none."""
    folder = _fetch(hub_id, (_CARD,))
    card = folder / _CARD if folder else None
    return card.read_text() if card and card.is_file() else ""


def _fetch(hub_id: str, patterns: Sequence[str], *, may_be_absent: bool = False) -> Location | None:
    """Download files of a data set, and return its folder in the hub's cache; None if it may be, and is, absent."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    def fetch() -> Location | None:
        try:
            return Location(snapshot_download(hub_id, repo_type="dataset", allow_patterns=list(patterns)))
        except RepositoryNotFoundError:
            if may_be_absent:
                return None
            raise

    return with_retries(f"the data set {hub_id!r} from the hub", fetch, refusal=CorpusError)
