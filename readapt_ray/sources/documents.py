"""Extract the text of a file: plain text, Markdown with front matter, HTML, or PDF.

HTML is parsed by lxml: scripts, styles and hidden parts are dropped, and blocks become paragraphs. PDF is read by pypdf,
which the extra `pdf` installs.
"""

import importlib.util
import io
import re
import tomllib
from typing import Any, Final, NamedTuple

import lxml.etree
import lxml.html
import yaml

from readapt_ray.errors import first_line
from readapt_ray.sources.lines import plain_name

MARKDOWN_SUFFIXES: Final = (".md", ".markdown", ".mdx")
HTML_SUFFIXES: Final = (".html", ".htm", ".xhtml")
PDF_SUFFIXES: Final = (".pdf",)
PLAIN_SUFFIXES: Final = (".txt", ".text", ".rst")
_HEADING = re.compile(r" {0,3}#{1,6}\s+(.*?)\s*#*\s*")
_FENCE = re.compile(r" {0,3}(```|~~~)")
_FRONT = re.compile(r"\A(---|\+\+\+)[ \t]*\n(?:(.*?)\n)?(?:\1|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL)
_SPACE = re.compile(r"\s+")
_FIELD = re.compile(r"([\w-]+):\s*(.*)")
_DROPPED: Final = ("script", "style", "noscript", "template", "svg", "iframe", "head")
_BLOCKS: Final = frozenset(
    [
        "address",
        "article",
        "aside",
        "blockquote",
        "body",
        "br",
        "caption",
        "dd",
        "details",
        "div",
        "dl",
        "dt",
        "fieldset",
        "figcaption",
        "figure",
        "footer",
        "form",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "header",
        "hr",
        "li",
        "main",
        "nav",
        "ol",
        "option",
        "p",
        "pre",
        "section",
        "summary",
        "table",
        "td",
        "th",
        "tr",
        "ul",
    ]
)


class Document(NamedTuple):
    """The text of a file. `title` is empty if none was found.

    `fields` has the front matter of Markdown and HTML, or the metadata of a PDF; it is empty for plain text.
    """

    title: str
    text: str
    fields: dict[str, Any]


class UnreadableDocumentError(ValueError):
    """A file's content is not what its suffix says. `reason` is a key of `REASONS`; `said` is the parser's message."""

    def __init__(self, reason: str, said: str = "") -> None:
        super().__init__(reason, said)
        self.reason, self.said = reason, said


def has_pdf_reader() -> bool:
    """Return whether the extra `pdf` is installed."""
    return importlib.util.find_spec("pypdf") is not None


def read_document(name: str, data: bytes) -> Document:
    """Extract title, text and fields from the content of a file.

    Args:
        name: the file's name. Its suffix decides the kind: PDF, HTML or Markdown, and plain text for any other. A
            suffix of compression (.gz) is ignored.
        data: the content, decompressed.

    Raises:
        UnreadableDocumentError: plain text or Markdown is not UTF-8, or the PDF cannot be read.
    """
    name = plain_name(name)
    if name.endswith(PDF_SUFFIXES):
        return _pdf(data)
    if name.endswith(HTML_SUFFIXES):
        return _html(data)
    try:
        text = data.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        raise UnreadableDocumentError("not_utf8") from None
    if not name.endswith(MARKDOWN_SUFFIXES):
        return Document("", text, {})
    fields, text = split_front_matter(text)
    given = _title_of(fields)
    heading, rest = split_heading(text)
    return Document(given or heading, rest if not given or given == heading else text, fields)


def split_front_matter(text: str) -> tuple[dict[str, Any], str]:
    """Split a text into its front matter, between lines of `---` (YAML) or `+++` (TOML), and the text after it.

    Of front matter that cannot be parsed, its lines `name: value` are taken. Without front matter, or if it is not a
    mapping, the result is ({}, text).
    """
    found = _FRONT.match(text)
    if found is None:
        return {}, text
    head = found[2] or ""
    try:
        fields: object = yaml.safe_load(head) if found[1] == "---" else tomllib.loads(head)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError):
        fields = _loose_fields(head)  # such as `title: Tides: a guide`, `!!bool maybe` or a thousand open brackets
    if isinstance(fields, dict) or fields is None:
        return {str(name): value for name, value in (fields or {}).items()}, text[found.end() :]
    return {}, text


def _loose_fields(text: str) -> dict[str, str] | None:
    """Return the lines `name: value` of front matter that is not valid YAML; None if there are none."""
    fields = {
        found[1]: found[2].strip("'\" ") for line in text.split("\n") if (found := _FIELD.fullmatch(line.strip()))
    }
    return fields or None


def _title_of(fields: dict[str, Any]) -> str:
    title = fields.get("title")
    return "" if title is None or isinstance(title, (dict, list)) else " ".join(str(title).split())


def split_heading(text: str) -> tuple[str, str]:
    """Return the first Markdown heading outside fenced code, and the text without that line.

    Only headings with `#` count. Without one, the result is ("", text).
    """
    lines = text.split("\n")
    fenced = False
    for at, line in enumerate(lines):
        if _FENCE.match(line):
            fenced = not fenced
        heading = None if fenced else _HEADING.fullmatch(line)
        if heading and heading[1]:
            return heading[1], "\n".join(lines[:at] + lines[at + 1 :])
    return "", text


def _html(data: bytes) -> Document:
    try:
        front, text = split_front_matter(data.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n"))
        data, encoding = text.encode(), "utf-8"
    except UnicodeDecodeError:
        front, encoding = {}, ""  # use the encoding that the page declares
    if not data.strip():
        return Document(_title_of(front), "", front)
    parser = lxml.html.HTMLParser(encoding=encoding or None, remove_comments=True, remove_pis=True, huge_tree=True)
    try:
        page = lxml.html.document_fromstring(data, parser=parser)
    except (ValueError, lxml.etree.ParserError):
        return Document(_title_of(front), "", front)
    titles = [*page.iterfind(".//title"), *page.iterfind(".//h1")]
    title = next((words for each in titles if (words := " ".join(each.text_content().split()))), "")
    for element in page.xpath("|".join(f"//{name}" for name in _DROPPED) + "|//*[@hidden]"):
        if element.getparent() is not None:
            element.drop_tree()
    return Document(_title_of(front) or title, _block_text(page), front)


def _block_text(page: Any) -> str:
    """Return the text of a page, with an empty line between blocks. White space becomes one space, except in `pre`."""
    pieces: list[str] = []
    num_open = 0  # number of `pre` elements that are open here
    for event, element in lxml.etree.iterwalk(page, events=("start", "end")):
        if element.tag == "pre":
            num_open += 1 if event == "start" else -1
        pieces.append("\n\n" if element.tag in _BLOCKS else "")
        text = element.text if event == "start" else element.tail
        pieces.append((text if num_open else _SPACE.sub(" ", text)) if text else "")
    return re.sub(r"[ \t]*\n[ \t]*(\n[ \t]*)+", "\n\n", "".join(pieces)).strip()


def _pdf(data: bytes) -> Document:
    from pypdf import PdfReader

    try:
        reader = PdfReader(io.BytesIO(data))
        fields = {str(name).lstrip("/").lower(): str(value) for name, value in (reader.metadata or {}).items()}
        text = "\n\n".join(page.extract_text() for page in reader.pages)
    except Exception as error:
        raise UnreadableDocumentError("not_pdf", first_line(error)) from None
    return Document(_title_of(fields), text, fields)
