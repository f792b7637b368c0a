"""Open the source that the text of `--source` names, and detect its format."""

import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Final, Literal, get_args

from readapt_ray.catalog import corpora
from readapt_ray.errors import CorpusError, InputError
from readapt_ray.sources import configurations, hub, named, python_docs
from readapt_ray.sources.columns import ColumnChoice
from readapt_ray.sources.documents import MARKDOWN_SUFFIXES, PLAIN_SUFFIXES
from readapt_ray.sources.formats import FORMATS
from readapt_ray.sources.labelled import has_corpus, parts_source
from readapt_ray.sources.lines import plain_name
from readapt_ray.sources.listing import is_data
from readapt_ray.sources.read_options import ReadOptions
from readapt_ray.sources.source import Source
from readapt_ray.sources.table_sources import LabelledTableSource, TableSource
from readapt_ray.sources.text_files import TEXT_HIDDEN, TEXT_SUFFIXES, TextSource
from readapt_ray.storage import Location

Format = Literal[
    "auto", "beir", "jsonl", "json", "csv", "tsv", "parquet", "arrow", "text", "ir_datasets", "hub", "python-docs"
]
_SUFFIXES: Final[dict[str, tuple[str, ...]]] = {
    **{name: each.suffixes for name, each in FORMATS.items()},
    "text": TEXT_SUFFIXES,
}
_BESIDE_DATA: Final = re.compile(
    r"(?i)(readme|license|licence|notice|changelog|citation|contributing|dataset_card)\b[^/]*$"
)
_DETECTED: Final = "corpus.jsonl, passages/*.parquet, or files that end with " + " or ".join(
    suffix for suffixes in _SUFFIXES.values() for suffix in suffixes
)


def open_source(name: str, format: Format, options: ReadOptions) -> Source:
    """Open a source of passages by its name. A data set of the hub is downloaded for this.

    Args:
        name: a path or URI, `ir_datasets:NAME`, `hub:OWNER/NAME`, `python-docs:PACKAGE,...`, or a corpus of the catalog (its
            name is read from ir_datasets, its hub id from the hub).
        format: the format; "auto" detects it.
        options: how to read it.

    Raises:
        InputError: the source does not exist, its format is unknown or does not match, or a package is not installed.
    """
    if format not in get_args(Format):
        raise InputError(f"no format {format!r}; the formats are {', '.join(get_args(Format))}")
    name = _full_name(name)
    for prefix, kind in ((named.PREFIX, "ir_datasets"), (hub.PREFIX, "hub"), (python_docs.PREFIX, "python-docs")):
        if name.startswith(prefix):
            if format not in ("auto", kind):
                raise InputError(f"{name!r} is of the format {kind!r}, not {format!r}; leave --format out")
            rest = name.removeprefix(prefix)
            if kind == "hub":
                return hub.open_hub(rest, options)
            if kind == "ir_datasets":
                return named.NamedSource(rest, options)
            if options.columns != ColumnChoice():
                raise InputError(f"{name!r} has no columns to choose or keep; leave --columns and --keep out")
            return python_docs.PythonDocsSource(rest)
    if format in ("ir_datasets", "hub", "python-docs"):
        raise InputError(f"{name!r} is not of the format {format!r}; write {format}:NAME")
    return _open_location(Location(name), format, options)


def check_source(name: str, format: Format, options: ReadOptions) -> None:
    """Check that a source exists and can be read. Of a source that must be downloaded, only the name is checked.

    See `open_source` for the arguments.

    Raises:
        InputError: for the same reasons as `open_source` and `Source.check`.
    """
    name = _full_name(name)
    if name.startswith(hub.PREFIX):
        hub.check_name(name.removeprefix(hub.PREFIX))
        return
    source = open_source(name, format, options)
    if not name.startswith(named.PREFIX):
        source.check()


def _full_name(name: str) -> str:
    """Replace a name of the catalog by the source it stands for. Other names are returned unchanged."""
    row = None if Location(name).exists() else corpora.find_corpus(name)
    if row is None:
        return name
    by_hub_id = name.lower() == row.hub_id.lower()
    return f"{hub.PREFIX}{row.hub_id}" if by_hub_id else f"{named.PREFIX}{row.ir_datasets_id}"


def _open_location(location: Location, format: Format, options: ReadOptions) -> Source:
    if not location.exists():
        raise CorpusError(
            f"no corpus at {location.uri!r}: there is no such file or folder; give one, or {named.PREFIX}NAME, or "
            f"{hub.PREFIX}OWNER/NAME, or {python_docs.PREFIX}PACKAGE, or a name of the catalog ({', '.join(row.name for row in corpora.CORPORA)})"
        )
    kind = detected_format(location) if format == "auto" else format
    if kind == "beir":
        return _labelled(location, options)
    if kind == "text":
        return TextSource(location, options)
    if kind == "parquet" and (location / "passages").is_folder():
        return _ingested(location, options)
    return TableSource(location, FORMATS[kind], options)


def _labelled(folder: Location, options: ReadOptions) -> Source:
    source = parts_source(folder, options, name="beir")
    if source is None:
        raise CorpusError(f"{folder} is not a BEIR folder: it has no corpus.jsonl; give another --format")
    return source


def _ingested(folder: Location, options: ReadOptions) -> Source:
    """Open the output of `ingest`, or a folder with the same layout."""
    queries = folder / "queries"
    return LabelledTableSource(
        folder / "passages",
        FORMATS["parquet"],
        options,
        name="parquet",
        queries=queries if queries.is_folder() else None,
        qrels={file.name.removesuffix(".parquet"): file for file in (folder / "qrels").files(".parquet")},
    )


def detected_format(location: Location) -> str:
    """Detect the format of a file by its suffix, or of a folder by its files.

    Returns:
        "beir" for a folder with a part `corpus`, "text", or a key of `FORMATS`. A folder with a subfolder `passages`
        (the output of ingest) is "parquet".

    Raises:
        CorpusError: no format fits, or several do, or the folder holds several data sets.
    """
    if location.is_file():
        found = [kind for kind, suffixes in _SUFFIXES.items() if plain_name(location.name).endswith(suffixes)]
        names = [location.name]
    elif has_corpus(location):
        return "beir"
    elif (location / "passages").is_folder():
        return "parquet"
    else:
        names = [name for name, _ in location.listing(recursive=True)]
        if not names:
            raise CorpusError(f"{location.uri!r} is an empty folder; give one that holds {_DETECTED}")
        found = _formats_of(names)
        if len(found) == 1 and found[0] in FORMATS:
            _check_one_data_set(location, names, found[0])
    if len(found) == 1:
        return found[0]
    if found:
        raise CorpusError(
            f"{location.uri!r} holds files of several formats ({', '.join(found)}); choose one by --format"
        )
    there = ", ".join(sorted({PurePosixPath(plain_name(name)).suffix or "no suffix" for name in names})[:10])
    raise CorpusError(
        f"the format of {location.uri!r} cannot be told: it has no {_DETECTED}, but files with {there}; choose one by --format, or "
        f"convert them"
    )


def _formats_of(names: Sequence[str]) -> list[str]:
    """Return the formats of the files in a folder.

    Beside tables, a README, a page or JSON is not data. If all names are hidden for tables (`_posts`), they may be text.
    """
    found = [kind for kind, suffixes in _SUFFIXES.items() if any(is_data(name, suffixes) for name in names)]
    tables = [kind for kind in found if kind not in ("text", "json")]
    notes = (*PLAIN_SUFFIXES, *MARKDOWN_SUFFIXES)
    if tables and not any(is_data(name, notes) and not _BESIDE_DATA.match(name) for name in names):
        return tables
    if tables or ("text" in found and "json" in found):
        return [kind for kind in found if kind != "json"]
    if not found and any(is_data(name, TEXT_SUFFIXES, TEXT_HIDDEN) for name in names):
        return ["text"]
    return found


def _check_one_data_set(folder: Location, names: Sequence[str], kind: str) -> None:
    """Refuse a folder that holds several data sets, such as one per language."""
    card = folder / "README.md"
    in_card = configurations.in_card(card.read_text()) if card.is_file() else {}
    configs = configurations.in_names([name for name in names if is_data(name, _SUFFIXES[kind])])
    if len(configs) > 1 or len(in_card) > 1:
        parts = sorted({name.split("/", 1)[0] for name in names if is_data(name, _SUFFIXES[kind])})
        listed = ", ".join(parts[:40]) + (f" and {len(parts) - 40} more" if len(parts) > 40 else "")
        raise CorpusError(
            f"{folder.uri!r} holds several data sets: {listed}; choose one, such as --source {folder / parts[0]}, or read all "
            f"files as one corpus with --format {kind}"
        )
