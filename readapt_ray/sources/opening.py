"""From the text of `--source` to a source."""

from typing import Final, Literal, get_args

from readapt_ray.catalog import corpora
from readapt_ray.errors import CorpusError, InputError
from readapt_ray.sources import hub, named, python_docs
from readapt_ray.sources.lines import plain_name
from readapt_ray.sources.source import Limits, Source
from readapt_ray.sources.table_sources import BeirSource, LabelledTableSource, TableSource, beir_file, is_data
from readapt_ray.sources.tables import FORMATS, Parquet
from readapt_ray.sources.text_files import TEXT_HIDDEN, TEXT_SUFFIXES, TextSource
from readapt_ray.storage import Location

Format = Literal["auto", "beir", "jsonl", "tsv", "parquet", "text", "ir_datasets", "hub", "python-docs"]
_SUFFIXES: Final[dict[str, tuple[str, ...]]] = {
    **{name: each.suffixes for name, each in FORMATS.items()},
    "text": TEXT_SUFFIXES,
}
_DETECTED: Final = "corpus.jsonl, passages/*.parquet, or files that end with " + " or ".join(
    suffix for suffixes in _SUFFIXES.values() for suffix in suffixes
)


def open_source(name: str, format: Format, limits: Limits) -> Source:
    """The source of a name: a URI or path, `ir_datasets:NAME`, `hub:OWNER/NAME`, `python-docs:PACKAGE,...`, or a corpus of
    the catalog: by its name from ir_datasets, by its hub id from the hub.

    Raises:
        InputError: nothing is there, its format cannot be told or is another, or a package is not installed.
    """
    if format not in get_args(Format):
        raise InputError(f"no format {format!r}; the formats are {', '.join(get_args(Format))}")
    row = None if Location(name).exists() else corpora.find_corpus(name)
    if row is not None:
        by_hub_id = name.lower() == row.hub_id.lower()
        name = f"{hub.PREFIX}{row.hub_id}" if by_hub_id else f"{named.PREFIX}{row.ir_datasets_id}"
    for prefix, kind in ((named.PREFIX, "ir_datasets"), (hub.PREFIX, "hub"), (python_docs.PREFIX, "python-docs")):
        if name.startswith(prefix):
            if format not in ("auto", kind):
                raise InputError(f"{name!r} is of the format {kind!r}, not {format!r}; leave --format out")
            rest = name.removeprefix(prefix)
            if kind == "hub":
                return hub.open_hub(rest, limits)
            return named.NamedSource(rest) if kind == "ir_datasets" else python_docs.PythonDocsSource(rest)
    if format in ("ir_datasets", "hub", "python-docs"):
        raise InputError(f"{name!r} is not of the format {format!r}; write {format}:NAME")
    return _open_location(Location(name), format, limits)


def _open_location(location: Location, format: Format, limits: Limits) -> Source:
    if not location.exists():
        raise CorpusError(
            f"no corpus at {location.uri!r}: there is no such file or folder; give one, or {named.PREFIX}NAME, or "
            f"{hub.PREFIX}OWNER/NAME, or {python_docs.PREFIX}PACKAGE, or a name of the catalog ({', '.join(row.name for row in corpora.CORPORA)})"
        )
    kind = detected_format(location) if format == "auto" else format
    if kind == "beir":
        return BeirSource(location, limits)
    if kind == "text":
        return TextSource(location, limits)
    if kind == "parquet" and (location / "passages").is_folder():
        return _ingested(location, limits)
    return TableSource(location, FORMATS[kind], limits)


def _ingested(folder: Location, limits: Limits) -> Source:
    """What `ingest` wrote, or a folder like it."""
    queries = folder / "queries"
    return LabelledTableSource(
        folder / "passages",
        Parquet(),
        limits,
        name="parquet",
        queries=queries if queries.is_folder() else None,
        qrels={file.name.removesuffix(".parquet"): file for file in (folder / "qrels").files(".parquet")},
    )


def detected_format(location: Location) -> str:
    """The format of a file by its suffix, of a folder by the files in it.

    Raises:
        CorpusError: none fits, or several do.
    """
    if location.is_file():
        found = [kind for kind, suffixes in _SUFFIXES.items() if plain_name(location.name).endswith(suffixes)]
    elif beir_file(location, "corpus.jsonl") is not None:
        return "beir"
    elif (location / "passages").is_folder():
        return "parquet"
    else:
        names = [name for name, _ in location.listing(recursive=True)]
        found = [kind for kind, suffixes in _SUFFIXES.items() if any(is_data(name, suffixes) for name in names)]
        if not found and any(is_data(name, TEXT_SUFFIXES, TEXT_HIDDEN) for name in names):
            found = ["text"]
        if not names:
            raise CorpusError(f"{location.uri!r} is an empty folder; give one that holds {_DETECTED}")
    if len(found) == 1:
        return found[0]
    if found:
        raise CorpusError(
            f"{location.uri!r} holds files of several formats ({', '.join(found)}); choose one by --format"
        )
    raise CorpusError(f"the format of {location.uri!r} cannot be told: it has no {_DETECTED}; choose one by --format")
