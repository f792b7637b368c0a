"""Read the docstrings of installed Python packages as passages, with queries made from them without labels.

In: names of top-level packages, or `stdlib`. Out: one passage per documented module, class and function. If the docstring
is long enough, its summary sentence becomes a query, and the rest of the docstring is the query's only relevant passage.
Source files are parsed, never imported. One core reads about 500 files per second.
"""

import ast
import gc
import hashlib
import importlib.util
import inspect
import logging
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from readapt_ray.artifacts import fingerprint
from readapt_ray.errors import CorpusError, InputError
from readapt_ray.records import Qrel, Query
from readapt_ray.sources.cleaning import clean_text
from readapt_ray.sources.source import BadRow, Row, Source

logger = logging.getLogger("readapt_ray")

PREFIX = "python-docs:"
STDLIB = "stdlib"
SPLIT = "test"
QUERY_PREFIX = "q:"
_SKIPPED_FOLDERS = frozenset(
    {
        *("test", "tests", "testing", "_testing", "idlelib", "lib2to3"),
        *("site-packages", "dist-packages", "_vendor", "thirdparty_files"),
    }
)
_MIN_REST_CHARS = 60
_MIN_SUMMARY_WORDS = 4
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n\s*\n")


@dataclass(frozen=True, kw_only=True)
class Docstring:
    """A docstring. `name` is the dotted name, `summary` the first sentence, `rest` the text after it."""

    name: str
    summary: str
    rest: str
    place: str = ""
    """File and line of the documented module, class or function."""


def package_files(package: str) -> list[Path]:
    """Return the .py files of an installed top-level package (or of `stdlib`), sorted.

    Folders of tests and of packages inside it (`_vendor`, `site-packages`) are left out.

    Raises:
        InputError: the package is not installed, or has no Python files.
    """
    return [path for path, _ in _modules(package)]


def _modules(package: str) -> list[tuple[Path, str]]:
    """Return the files of a package with the dotted names of their modules, sorted."""
    found = []
    for root in _roots(package):
        if root.suffix == ".py" and root.is_file():
            found.append((root, package))
        for path in root.rglob("*.py"):
            inside = path.relative_to(root)
            if not _SKIPPED_FOLDERS.intersection(inside.parts):
                parts = (*(() if package == STDLIB else (package,)), *inside.with_suffix("").parts)
                found.append((path, ".".join(part for part in parts if part != "__init__")))
    if not found:
        raise InputError(f"the package {package!r} has no Python source files; name one that has, or {STDLIB!r}")
    return sorted(found)


def _roots(package: str) -> list[Path]:
    """Return the folders of a package, or the file of a package that is a single module."""
    if package == STDLIB:
        return [Path(sysconfig.get_path("stdlib"))]
    try:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    except (ImportError, ValueError):
        spec = None
    if spec is None or not (spec.submodule_search_locations or spec.origin):
        raise InputError(
            f"no Python package {package!r} is installed; name installed top-level packages "
            f"or {STDLIB!r}, separated by commas, such as {PREFIX}{STDLIB},numpy"
        )
    return [Path(location) for location in spec.submodule_search_locations or [str(spec.origin)]]


def read_docstrings(package: str) -> Iterator[Docstring]:
    """Yield the docstrings of an installed package, file by file. The files are parsed, not imported.

    Those of private and nested functions are included, but not of functions inside an `if`, `try` or `with`. Files that
    do not parse are counted in the log.

    Args:
        package: name of a top-level package, or "stdlib".

    Raises:
        InputError: the package is not installed, or has no Python source files.
    """
    num_bad = 0
    for path, module in _modules(package):
        for found in file_docstrings(path, module):
            if isinstance(found, Docstring):
                yield found
            else:
                num_bad += 1
    if num_bad:
        logger.warning("python-docs: %d files of %s do not parse as Python and are left out", num_bad, package)


def file_docstrings(path: Path, module: str) -> Iterator[Docstring | BadRow]:
    """Yield the docstrings of a module's file; a single bad row if it does not parse.

    Args:
        path: the file.
        module: dotted name of the module, with which the names of the docstrings begin.
    """
    try:
        tree = _parsed(path)
    except (SyntaxError, ValueError, RecursionError):
        yield BadRow(str(path), "not_python")
        return
    yield from _walk(tree, module, str(path))


def _parsed(path: Path) -> ast.Module:
    collects = gc.isenabled()
    gc.disable()  # a syntax tree has no cycles, and searching for them takes 40% of the time
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(path.read_bytes())
    finally:
        if collects:
            gc.enable()


def _walk(node: ast.AST, name: str, place: str) -> Iterator[Docstring]:
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        raw = ast.get_docstring(node, clean=False)
        if raw:
            summary, rest = split_summary(inspect.cleandoc(raw))
            if summary:
                line = getattr(node, "lineno", 1)
                yield Docstring(name=name, summary=summary, rest=rest, place=f"{place}:{line}")
        for child in node.body:
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from _walk(child, f"{name}.{child.name}", place)


def split_summary(text: str) -> tuple[str, str]:
    """Split a docstring into its first sentence (on one line) and the text after it ("" if there is none).

    A blank line ends the sentence, too.
    """
    parts = _SENTENCE_END.split(text.strip(), maxsplit=1)
    return " ".join(parts[0].split()), parts[1].strip() if len(parts) > 1 else ""


def makes_query(docstring: Docstring) -> bool:
    """Return whether a docstring makes a query: the summary has 4 words or more, the rest 60 characters or more."""
    return len(docstring.rest) >= _MIN_REST_CHARS and len(docstring.summary.split()) >= _MIN_SUMMARY_WORDS


class PythonDocsSource(Source):
    """The docstrings of some Python packages as a source.

    If a docstring makes a query, its passage is the text after the summary; otherwise it is the whole docstring. The dotted
    name is the title and the doc_id. If a name occurs again, the doc_id gets #2, #3 and so on. A query's id is `q:` plus
    the id of its passage, so that queries and passages never share an id.

    Raises:
        InputError: no package is named, one is not installed, or has no Python source files.
    """

    format = "python-docs"
    title_tells_apart = False
    labels_from_passages = True
    has_qrels = True

    def __init__(self, packages: str) -> None:
        self._packages = [name.strip() for name in packages.split(",") if name.strip()]
        if not self._packages:
            raise InputError(
                f"{PREFIX} names no package; write {PREFIX}{STDLIB}, or {PREFIX} and packages separated by commas"
            )
        self._files = [file for package in dict.fromkeys(self._packages) for file in _modules(package)]
        self._queries: list[Query] | None = None

    def check(self) -> None:
        """Check that the packages have at least one docstring. Raises CorpusError if they have none."""
        if next(self._rows([]), None) is None:
            raise CorpusError(f"the packages {', '.join(self._packages)} have no docstrings; name others")

    def rows(self) -> Iterator[Row | BadRow]:
        """Yield a row per docstring, in the order of the packages and their files."""
        queries: list[Query] = []
        yield from self._rows(queries)
        self._queries = queries

    def _rows(self, queries: list[Query]) -> Iterator[Row | BadRow]:
        """Yield the rows, and append the queries that they make to `queries`."""
        seen: Counter[str] = Counter()
        for number, (path, module) in enumerate(self._files):
            for found in file_docstrings(path, module):
                if isinstance(found, BadRow):
                    yield found
                    continue
                seen[found.name] += 1
                doc_id = found.name if seen[found.name] == 1 else f"{found.name}#{seen[found.name]}"
                is_asked = makes_query(found)
                if is_asked:
                    queries.append(Query(f"{QUERY_PREFIX}{doc_id}", clean_text(found.summary)))
                yield Row(found.place, doc_id, found.name, found.rest if is_asked else f"{found.summary}\n{found.rest}")
            self.fraction_read = (number + 1) / len(self._files)

    def queries(self) -> Iterator[Query | BadRow]:
        """Yield the summary sentences. If `rows` was not read to its end before, the files are read now."""
        if self._queries is None:
            for _ in self.rows():
                continue
        yield from self._queries or ()

    def qrels(self) -> dict[str, Iterator[Qrel | BadRow]]:
        """Return the judgements under the split "test": one relevant passage per query, the rest of its docstring."""
        return {
            SPLIT: (
                Qrel(q.query_id, q.query_id.removeprefix(QUERY_PREFIX), 1)
                for q in self.queries()
                if isinstance(q, Query)
            )
        }

    def fingerprint(self) -> str:
        """Hash the dotted names of the modules and the content of their files."""
        return fingerprint(
            {"python-docs": [[module, hashlib.sha256(path.read_bytes()).hexdigest()] for path, module in self._files]}
        )
