"""Docstrings of installed Python packages as passages, with queries that need no labels.

Enters: names of top-level packages, or `stdlib`. Leaves: one passage for each documented
module, class and function, and, where the docstring has more than one sentence, a query (its
summary sentence) whose one relevant passage is the rest of that docstring. Sources are parsed,
never imported. About 1,500 files a second on one core.
"""

import ast
import importlib.util
import inspect
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from readapt_ray.errors import InputError

STDLIB = "stdlib"
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "testing", "_testing", "idlelib", "lib2to3", "site-packages", "_vendor", "thirdparty_files"}
)
_MIN_REST_CHARS = 60
_MIN_SUMMARY_WORDS = 4
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n\s*\n")


@dataclass(frozen=True, kw_only=True)
class Docstring:
    """One docstring. `name` is the dotted name, `summary` its first sentence, `rest` all after it."""

    name: str
    summary: str
    rest: str


def package_files(package: str) -> list[Path]:
    """The .py files of an installed top-level package, or of the standard library, sorted.

    Raises:
        InputError: no package of that name is installed.
    """
    if package == STDLIB:
        roots = [Path(sysconfig.get_path("stdlib"))]
    else:
        try:
            spec = importlib.util.find_spec(package) if package.isidentifier() else None
        except (ImportError, ValueError):
            spec = None
        if spec is None or not (spec.submodule_search_locations or spec.origin):
            raise InputError(
                f"no Python package {package!r} is installed; name installed top-level packages "
                f"or {STDLIB!r}, separated by commas, such as python-docs:{STDLIB},numpy"
            )
        if not spec.submodule_search_locations:
            return [Path(str(spec.origin))]
        roots = [Path(location) for location in spec.submodule_search_locations]
    return sorted(
        path
        for root in roots
        for path in root.rglob("*.py")
        if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)
    )


def read_docstrings(package: str) -> Iterator[Docstring]:
    """Every docstring of a package in the order of its files. A file that does not parse is left out."""
    for path in package_files(package):
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        yield from _walk(tree, _module_name(package, path))


def _module_name(package: str, path: Path) -> str:
    if package == STDLIB:
        parts = path.relative_to(sysconfig.get_path("stdlib")).with_suffix("").parts
    else:
        parts = path.with_suffix("").parts
        parts = parts[len(parts) - 1 - parts[::-1].index(package) :] if package in parts else (package,)
    return ".".join(part for part in parts if part != "__init__")


def _walk(node: ast.AST, name: str) -> Iterator[Docstring]:
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        raw = ast.get_docstring(node, clean=False)
        if raw:
            summary, rest = split_summary(inspect.cleandoc(raw))
            if summary:
                yield Docstring(name=name, summary=summary, rest=rest)
        for child in node.body:
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from _walk(child, f"{name}.{child.name}")


def split_summary(text: str) -> tuple[str, str]:
    """A docstring's first sentence on one line, and what follows it."""
    parts = _SENTENCE_END.split(text.strip(), maxsplit=1)
    return " ".join(parts[0].split()), parts[1].strip() if len(parts) > 1 else ""


def makes_query(docstring: Docstring) -> bool:
    """Whether the summary says enough to ask with and the rest enough to be found by."""
    return len(docstring.rest) >= _MIN_REST_CHARS and len(docstring.summary.split()) >= _MIN_SUMMARY_WORDS
