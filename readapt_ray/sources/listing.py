"""List the files of a source, and count the files in its folder that are not read."""

import collections
import logging
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import NamedTuple

import pyarrow.fs as pafs

from readapt_ray.damage import READ_ERRORS
from readapt_ray.errors import CorpusError
from readapt_ray.sources.lines import plain_name, refuse_damaged
from readapt_ray.storage import Location, state_of

logger = logging.getLogger("readapt_ray")

HIDDEN = (".", "_")
"""First characters of hidden names, which are not data: `.git`, and `_SUCCESS` and `_temporary` of Spark."""
_NAMED_KINDS = 8


class DataFile(NamedTuple):
    """A file of a source: its label (relative name), its location, and its entry in the listing of its folder."""

    label: str
    location: Location
    info: pafs.FileInfo | None = None

    def size_bytes(self) -> int:
        """Return the length in bytes, from the listing if it is known there."""
        known = None if self.info is None else self.info.size
        return self.location.size_bytes() if known is None else int(known)

    def content(self) -> list[str]:
        """Return digests of the content: SHA-256 on a local disk; size and time (from the listing) on an object store."""
        info = self.info
        if info is None or info.size is None or info.mtime_ns is None or self.location.is_local:
            return list(self.location.content_fingerprint().values())
        return [self.state()]

    def state(self) -> str:
        """Return the file's size and modification time at the time of the listing, as text."""
        return state_of(self.info or self.location.info())


class Listing(NamedTuple):
    """The files to read, and for the others the number of files and the first one, by suffix."""

    files: list[DataFile]
    not_read: dict[str, tuple[int, str]]

    def log_not_read(self, where: Location) -> None:
        """Log how many files of the folder `where` are not read, and of which kinds; nothing if all are read."""
        if self.not_read:
            kinds = sorted(self.not_read.items(), key=lambda each: -each[1][0])
            named = [f"{count:,} {suffix} ({first} first)" for suffix, (count, first) in kinds[:_NAMED_KINDS]]
            more = len(kinds) - _NAMED_KINDS
            logger.info(
                "%s: %d file%s read; not read: %s%s",
                *(
                    where,
                    len(self.files),
                    "s" * (len(self.files) != 1),
                    ", ".join(named),
                    f", and {more} other kinds" if more > 0 else "",
                ),
            )

    def counts(self) -> dict[str, int]:
        """Return the number of files that are not read, by suffix."""
        return {suffix: count for suffix, (count, _) in sorted(self.not_read.items())}


def listed(location: Location, suffixes: tuple[str, ...], *, hidden: tuple[str, ...] = HIDDEN) -> Listing:
    """List a single file, whatever its name, or all files with these suffixes under a folder.

    Files with a hidden part in their path are not read. For a folder that does not exist, the listing is empty.

    Args:
        location: the file or folder.
        suffixes: suffixes in lower case. Suffixes of compression (.gz) behind them are accepted.
        hidden: first characters of hidden names.
    """
    info = location.info()
    if info.type == pafs.FileType.File:
        return Listing([DataFile(location.name, location, info)], {})
    found = [DataFile(name, location / name, info) for name, info in location.listing(recursive=True)]
    files = [file for file in found if is_data(file.label, suffixes, hidden)]
    return Listing(files, count_not_read(found, files, hidden))


def check_unchanged(
    location: Location, suffixes: tuple[str, ...], files: Iterable[DataFile], *, hidden: tuple[str, ...] = HIDDEN
) -> None:
    """Check that files still have the size and time of their listing. This takes one listing of the folder.

    Args:
        location: the file or folder that was listed.
        suffixes: as in `listed`.
        files: files that `listed` returned.
        hidden: as in `listed`.

    Raises:
        CorpusError: a file was changed or removed since it was listed.
    """
    now = {file.label: file.state() for file in listed(location, suffixes, hidden=hidden).files}
    for each in files:
        if now.get(each.label) != each.state():
            raise changed(each.label)


def changed(label: str) -> CorpusError:
    """Return (do not raise) the error for a file that changed while it was read."""
    return CorpusError(f"{label} changed while it was read; wait until nobody writes it and run `readapt ingest` again")


def count_not_read(
    found: Iterable[DataFile], files: Iterable[DataFile], hidden: tuple[str, ...] = HIDDEN
) -> dict[str, tuple[int, str]]:
    """Count, by suffix, the files in `found` that are not in `files`: (number, label of the first one).

    A suffix of compression does not count: a.json.gz is `.json`. Hidden files are counted together, under a key that
    says so.

    Args:
        found: all files of a folder.
        files: those that are read.
        hidden: first characters of the names of hidden files and folders.
    """
    read = {file.label for file in files}
    kinds: dict[str, list[str]] = collections.defaultdict(list)
    for file in found:
        if file.label not in read:
            kinds[_kind(file.label, hidden)].append(file.label)
    return {kind: (len(names), names[0]) for kind, names in kinds.items()}


def _kind(name: str, hidden: tuple[str, ...]) -> str:
    if is_hidden(name, hidden):
        return f"with a part in their path that begins with {' or '.join(hidden)}"
    return PurePosixPath(plain_name(name)).suffix or "without suffix"


def data_files(folder: Location, suffixes: tuple[str, ...]) -> list[DataFile]:
    """List the files with these suffixes under a folder, without those that have a hidden part in their path."""
    return [
        DataFile(name, folder / name, info) for name, info in folder.listing(recursive=True) if is_data(name, suffixes)
    ]


def is_data(name: str, suffixes: tuple[str, ...], hidden: tuple[str, ...] = HIDDEN) -> bool:
    """Return whether a relative path ends with one of the suffixes and has no hidden part."""
    return plain_name(name).endswith(suffixes) and not is_hidden(name, hidden)


def is_hidden(name: str, hidden: tuple[str, ...] = HIDDEN) -> bool:
    """Return whether any part of a relative path begins with one of the characters in `hidden`."""
    return any(part.startswith(hidden) for part in name.split("/"))


def contents_of(files: Iterable[DataFile]) -> dict[str, list[str]]:
    """Return digests of the content of each file, by its label.

    Raises:
        CorpusError: a file is damaged or missing.
    """
    contents = {}
    for file in files:
        try:
            contents[file.label] = file.content()
        except READ_ERRORS as error:
            refuse_damaged(file.label, "to its end", error)
            raise
    return contents
