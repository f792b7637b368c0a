"""Text and Markdown files as passages.

Enters: a file, or a folder of .txt, .text, .md, .markdown and .rst files, at any depth. Leaves: a
passage a file, or several where it is long. The doc_id is the path relative to the folder, white
space in it as %20 (the TREC format has none in ids), with #1, #2 ... where the file was split. The
title is the first Markdown heading, else the name without its suffix. 17 files are in memory, read ahead
for stores that answer slowly.
"""

import collections
import functools
import itertools
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from readapt_ray.errors import CorpusError
from readapt_ray.sources.cleaning import encoded_white_space
from readapt_ray.sources.lines import plain_name, read_lines, read_whole
from readapt_ray.sources.source import BadRow, Limits, Row, Source
from readapt_ray.sources.table_sources import DataFile, files_fingerprint, source_files
from readapt_ray.storage import Location

MARKDOWN_SUFFIXES = (".md", ".markdown")
TEXT_SUFFIXES = (".txt", ".text", ".rst", *MARKDOWN_SUFFIXES)
TEXT_HIDDEN = (".",)
"""How a name begins that is not of data here: `_posts` and `_index.md` are."""
_READERS = 16
_HEADING = re.compile(r" {0,3}#{1,6}\s+(.*?)\s*#*\s*")
_FENCE = re.compile(r" {0,3}(```|~~~)")
_PARAGRAPH = re.compile(r"\n[^\S\n]*(?:\n[^\S\n]*)+")


class TextSource(Source):
    """A text file, or a folder of them."""

    format = "text"

    def __init__(self, location: Location, limits: Limits) -> None:
        self._location, self._limits = location, limits

    @functools.cached_property
    def _files(self) -> list[DataFile]:
        return source_files(self._location, TEXT_SUFFIXES, hidden=TEXT_HIDDEN)

    def check(self) -> None:
        """There is a file with something in it."""
        files = self._files
        if not files:
            raise CorpusError(f"{self._location} holds no text: no file there ends with {' or '.join(TEXT_SUFFIXES)}")
        if not any(next(read_lines(file, label), None) for label, file, _ in files):
            raise CorpusError(f"{self._location} holds no text: {len(files)} files, all empty")

    def rows(self) -> Iterator[Row | BadRow]:
        """File after file."""
        for number, (label, data) in enumerate(self._contents()):
            yield from self._file_rows(label, data)
            self.fraction_read = (number + 1) / len(self._files)

    def _contents(self) -> Iterator[tuple[str, bytes]]:
        """The content of each file, in order, while the next ones are read."""
        read = functools.partial(read_whole, max_bytes=self._limits.max_text_bytes)
        with ThreadPoolExecutor(_READERS) as pool:
            reads = ((file.label, pool.submit(read, file.location, file.label)) for file in self._files)
            ahead = collections.deque(itertools.islice(reads, _READERS))
            while ahead:
                label, content = ahead.popleft()
                ahead.extend(itertools.islice(reads, 1))
                yield label, content.result()

    def _file_rows(self, label: str, data: bytes) -> Iterator[Row | BadRow]:
        if len(data) == self._limits.max_text_bytes:
            yield BadRow(label, "long_text")
            return
        try:
            text = data.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
        except UnicodeDecodeError:
            yield BadRow(label, "not_utf8")
            return
        name = plain_name(label)
        stem = label[: name.rindex(".")].rsplit("/", 1)[-1]
        title, text = split_heading(text) if name.endswith(MARKDOWN_SUFFIXES) else ("", text)
        pieces = split_text(text, self._limits.max_passage_chars)
        doc_id = encoded_white_space(label)
        if len(pieces) < 2:
            yield Row(label, doc_id, title or stem, "".join(pieces))
            return
        for number, piece in enumerate(pieces, start=1):
            yield Row(f"{label}#{number}", f"{doc_id}#{number}", title or stem, piece)

    def fingerprint(self) -> str:
        """By the content of the files and their names."""
        return files_fingerprint(self._files)


def split_heading(text: str) -> tuple[str, str]:
    """The first Markdown heading outside of fenced code, and the text without that line; "" where there is none."""
    lines = text.split("\n")
    fenced = False
    for at, line in enumerate(lines):
        if _FENCE.match(line):
            fenced = not fenced
        heading = None if fenced else _HEADING.fullmatch(line)
        if heading and heading[1]:
            return heading[1], "\n".join(lines[:at] + lines[at + 1 :])
    return "", text


def split_text(text: str, max_chars: int) -> list[str]:
    """A text as pieces of at most `max_chars` characters, cut between paragraphs.

    Paragraphs are put together as long as they fit; one that is too long for itself is cut at
    white space, or anywhere where it has none.
    """
    pieces: list[str] = []
    for paragraph in filter(None, (part.strip() for part in _PARAGRAPH.split(text))):
        for part in filter(None, _cut(paragraph, max_chars)):
            if pieces and len(pieces[-1]) + len(part) + 2 <= max_chars:
                pieces[-1] += f"\n\n{part}"
            else:
                pieces.append(part)
    return pieces


def _cut(paragraph: str, max_chars: int) -> Iterator[str]:
    start = 0
    while len(paragraph) - start > max_chars:
        spaces = [paragraph.rfind(mark, start + 1, start + max_chars + 1) for mark in ("\n", " ")]
        end = max(spaces) if max(spaces) > start else start + max_chars
        yield paragraph[start:end].strip()
        start = end
    yield paragraph[start:].strip()
