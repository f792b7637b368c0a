"""Read text files as passages: plain text, Markdown, reStructuredText, HTML and PDF.

In: a file, or a folder of such files at any depth. Out: a passage per file, or several if the file is long. The doc_id is
the path relative to the folder, with #1, #2 ... if the file was split. White space in it becomes %20, because TREC formats
do not allow it in ids. The title comes from the front matter or the HTML page, or is the first Markdown heading, else the
file's name without suffix. Up to 17 files are read ahead and held in memory, because object stores answer slowly.
"""

import collections
import functools
import itertools
import logging
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from readapt_ray.artifacts import fingerprint
from readapt_ray.errors import CorpusError, InputError
from readapt_ray.progress import amount
from readapt_ray.sources import documents
from readapt_ray.sources.cleaning import encoded_white_space
from readapt_ray.sources.columns import FIELDS, first_of, is_absent, kept_schema, type_of_values
from readapt_ray.sources.documents import Document, UnreadableDocumentError
from readapt_ray.sources.lines import plain_name, read_lines, read_whole
from readapt_ray.sources.listing import DataFile, Listing, check_unchanged, contents_of, listed
from readapt_ray.sources.read_options import ReadOptions
from readapt_ray.sources.source import MISSING, BadRow, Row, Source
from readapt_ray.storage import Location

logger = logging.getLogger("readapt_ray")

TEXT_SUFFIXES = (
    *documents.PLAIN_SUFFIXES,
    *documents.MARKDOWN_SUFFIXES,
    *documents.HTML_SUFFIXES,
    *documents.PDF_SUFFIXES,
)
TEXT_HIDDEN = (".",)
"""First characters of hidden names among text files. `_posts` and `_index.md` are data here, so `_` is not one."""
_PDF_ADVICE: Final = "which needs the package pypdf: pip install 'readapt-ray[pdf]'"
_READERS = 16
_PEEKED_FILES = 100
_PARAGRAPH = re.compile(r"\n[^\S\n]*(?:\n[^\S\n]*)+")


class TextSource(Source):
    """A text file, or a folder of text files, as a source.

    Raises:
        InputError: `--columns` names another field than the title.
    """

    format = "text"

    def __init__(self, location: Location, options: ReadOptions) -> None:
        self._location, self._options = location, options
        given = options.columns.of(FIELDS)
        if set(given) - {"title"}:
            raise InputError(
                f"columns = {sorted(given)}: a text file has one text, and its path is its doc_id; only title=FIELD of the front "
                f"matter can be given"
            )
        self._title_fields = given.get("title", ())

    @functools.cached_property
    def _listing(self) -> Listing:
        suffixes: tuple[str, ...] = TEXT_SUFFIXES
        if not documents.has_pdf_reader():
            suffixes = tuple(each for each in suffixes if each not in documents.PDF_SUFFIXES)
        found = listed(self._location, suffixes, hidden=TEXT_HIDDEN)
        found.log_not_read(self._location)
        is_pdf = any(plain_name(file.label).endswith(documents.PDF_SUFFIXES) for file in found.files)
        if (".pdf" in found.not_read or is_pdf) and not documents.has_pdf_reader():
            if not found.files or is_pdf:
                raise InputError(f"{self._location} holds only PDF files, {_PDF_ADVICE}")
            count = found.not_read[".pdf"][0]
            are = "file is" if count == 1 else "files are"
            logger.warning("%s: %d PDF %s not read, %s", self._location, count, are, _PDF_ADVICE)
        return found

    @property
    def _files(self) -> list[DataFile]:
        return self._listing.files

    def check(self) -> None:
        """Check that at least one file has text, and that the front matter has the fields that the user named.

        Fields are looked for in the first 100 files. A kept field with a given type may be missing there.

        Raises:
            CorpusError: there is no file, all are empty, or a field is missing.
            InputError: the only files are PDF, and the package pypdf is not installed.
        """
        files = self._files
        if not files:
            raise CorpusError(f"{self._location} holds no text: no file there ends with {' or '.join(TEXT_SUFFIXES)}")
        if not any(next(read_lines(file, label), None) for label, file, _ in files):
            raise CorpusError(f"{self._location} holds no text: {amount(len(files), 'files')}, all empty")
        choice = self._options.columns
        if choice.keep or self._title_fields:
            peeked = [
                each for _, each in itertools.islice(self._documents(), _PEEKED_FILES) if isinstance(each, Document)
            ]
            for name in [*self._title_fields, *(name for name, kind in choice.keep if not kind)]:
                if not any(first_of((name,), each.fields) for each in peeked):
                    found = ", ".join(dict.fromkeys(field for each in peeked for field in each.fields)) or "none"
                    raise CorpusError(
                        f"no file of {self._location} has {name!r} in its front matter; the fields there are {found}; name one of "
                        f"these with --keep or --columns title=FIELD"
                    )
            types = [type_of_values(_field(each, name) for each in peeked) for name, _ in choice.keep]
            self.kept = kept_schema(choice, types)

    def description(self) -> dict[str, Any]:
        """Return the files that are read, and those that are not."""
        return {"files": len(self._files), "files_not_read": self._listing.counts()}

    def rows(self) -> Iterator[Row | BadRow]:
        """Yield the passages of all files, in order. A long file gives several; an unreadable one gives a bad row.

        Raises:
            CorpusError: a file changed since it was listed.
        """
        for number, (label, document) in enumerate(self._documents()):
            if isinstance(document, BadRow):
                yield document
            else:
                yield from self._passages(label, document)
            self.fraction_read = (number + 1) / len(self._files)
        check_unchanged(self._location, TEXT_SUFFIXES, self._files, hidden=TEXT_HIDDEN)

    def _documents(self) -> Iterator[tuple[str, Document | BadRow]]:
        """Yield each file in order, while threads read the next ones."""
        with ThreadPoolExecutor(_READERS) as pool:
            reads = ((file.label, pool.submit(self._read, file)) for file in self._files)
            ahead = collections.deque(itertools.islice(reads, _READERS))
            while ahead:
                label, document = ahead.popleft()
                ahead.extend(itertools.islice(reads, 1))
                yield label, document.result()

    def _read(self, file: DataFile) -> Document | BadRow:
        data = read_whole(file.location, file.label, max_bytes=self._options.max_text_bytes)
        if len(data) == self._options.max_text_bytes:
            return BadRow(file.label, "long_text")
        try:
            return documents.read_document(file.label, data)
        except UnreadableDocumentError as error:
            return BadRow(file.label, error.reason, error.said)

    def _passages(self, label: str, document: Document) -> Iterator[Row]:
        name = plain_name(label)
        stem = label[: name.rindex(".")].rsplit("/", 1)[-1]
        given = next((value for name in self._title_fields if not is_absent(value := _field(document, name))), None)
        title = given or document.title or stem
        kept = tuple(_field(document, name) for name, _ in self._options.columns.keep)
        pieces = split_text(document.text, self._options.max_passage_chars)
        doc_id = encoded_white_space(label)
        if not pieces:
            yield Row(label, doc_id, document.title, "", kept)
        elif len(pieces) == 1:
            yield Row(label, doc_id, title, pieces[0], kept)
        else:
            for number, piece in enumerate(pieces, start=1):
                yield Row(f"{label}#{number}", f"{doc_id}#{number}", title, piece, kept)

    def fingerprint(self) -> str:
        """Hash the names and contents of the files."""
        return fingerprint(contents_of(self._files))


def _field(document: Document, name: str) -> object:
    found = first_of((name,), document.fields)
    return MISSING if found is None else document.fields[found]


def split_text(text: str, max_chars: int) -> list[str]:
    """Split a text into pieces of at most `max_chars` characters, between paragraphs if possible.

    Paragraphs are joined as long as they fit, with an empty line between them. A paragraph that is too long is cut at
    white space, or anywhere if it has none. A blank text has no pieces.
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
