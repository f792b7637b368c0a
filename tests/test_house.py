"""Limits on the size of files and functions (CONTRIBUTING, "Checks")."""

import ast
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest

PACKAGE = Path(__file__).parents[1] / "readapt_ray"
FILES = sorted(file for file in PACKAGE.rglob("*.py") if file.stat().st_size)
MAX_FILE_LINES, MEDIAN_FILE_LINES, MAX_BODY_LINES = 400, 150, 40
LONG_FILES: set[str] = set()
"""Files that are longer for now; those that are no longer must leave this list."""
LONG_BODIES = {"planner/stages.py:_train": "one table of a stage's figures, in the order in which they follow"}
"""Functions that may be longer, each with its reason."""
RIDDLES = (
    *("so short that what", "head node, or parts", "nothing says how", "is not one of", "another number of words"),
    *("pools by", "understood is", "had no say", "guards the door", "told from chance"),
)
"""Phrases that users did not understand; errors and reports have plainer ones."""


NOT_VERBS = frozenset(
    [
        "A",
        "All",
        "An",
        "As",
        "By",
        "Counts",
        "Each",
        "Every",
        "For",
        "From",
        "How",
        "Its",
        "It",
        "On",
        "One",
        "Pooled",
        "Stands",
        "That",
        "The",
        "These",
        "Vectors",
        "What",
        "Where",
        "Whether",
        "Which",
    ]
)
"""First words of docstrings of functions that do not say what the function does."""


def _name(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count the lines of a function's body, from its first statement that is no docstring."""
    statements = function.body[ast.get_docstring(function) is not None :]
    return (function.end_lineno or 0) - statements[0].lineno + 1 if statements else 0


def _long_bodies() -> Iterator[str]:
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and body_lines(node) > MAX_BODY_LINES:
                yield f"{_name(file)}:{node.name}"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f(): ...", 1),
        ('def f():\n    """One\n    two."""\n    a = 1\n    return a', 2),
        ('def f():\n    """One."""', 0),
    ],
)
def test_a_docstring_does_not_count_as_body(source, expected):
    assert body_lines(ast.parse(source).body[0]) == expected


def test_no_file_is_over_400_lines():
    assert {_name(file) for file in FILES if len(file.read_text().splitlines()) > MAX_FILE_LINES} == LONG_FILES


def test_half_of_the_files_are_under_150_lines():
    assert median(len(file.read_text().splitlines()) for file in FILES) < MEDIAN_FILE_LINES


def test_no_function_body_is_over_40_lines():
    assert set(_long_bodies()) == set(LONG_BODIES)


def _texts(file: Path) -> Iterator[str]:
    """Yield the texts in a file's code; of an f-string what stands between its values; no docstrings."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def test_no_message_is_a_riddle():
    found = {f"{_name(file)}: {each}" for file in FILES for text in _texts(file) for each in RIDDLES if each in text}
    assert found == set()


def test_docstrings_of_functions_begin_with_a_verb():
    """Properties and routes are things, so theirs may be nouns."""
    things = {"property", "cached_property", "model_validator", "field_validator", "get", "head", "post"}
    found = set()
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("__"):
                names = {ast.unparse(each).partition("(")[0].rpartition(".")[2] for each in node.decorator_list}
                first = (ast.get_docstring(node) or "").partition(" ")[0]
                if first in NOT_VERBS and not names & things:
                    found.add(f"{_name(file)}:{node.name}")
    assert found == set()
