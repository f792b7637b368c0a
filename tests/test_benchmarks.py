"""Benchmarks are run by hand, so what they take from the package is checked here."""

import ast
import importlib
import importlib.util
import types
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))


def taken(tree: ast.AST) -> dict[str, Any]:
    """What a file imports from the package, by the name that it has there; None for what the package lacks."""
    found: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "readapt_ray":
            module = importlib.import_module(str(node.module))
            for each in node.names:
                name = f"{node.module}.{each.name}"
                is_module = not hasattr(module, each.name) and importlib.util.find_spec(name)
                found[each.asname or each.name] = (
                    importlib.import_module(name) if is_module else getattr(module, each.name, None)
                )
        if isinstance(node, ast.Import):
            ours = [each for each in node.names if each.name.split(".")[0] == "readapt_ray"]
            found |= {each.asname or each.name: importlib.import_module(each.name) for each in ours}
    return found


PAGES = [file.read_text() for part in ("benchmarks", "readapt_ray") for file in (ROOT / part).rglob("README.md")]
RESULTS = sorted((ROOT / "benchmarks/results").iterdir())


@pytest.mark.parametrize("result", RESULTS, ids=lambda file: file.name)
def test_each_result_is_shown_on_a_page_and_can_be_measured_again(result: Path) -> None:
    shown = [text for text in PAGES if f"results/{result.name})" in text]
    assert shown, f"no page links to {result.name}"
    name = "gpu_{options.part}.json" if result.name.startswith("gpu_") else result.name
    scripts = [file for file in BENCHMARKS if f"results/{name}" in file.read_text()]
    commands = [text for text in shown if f"--output benchmarks/results/{result.name}" in text.replace("\n", " ")]
    assert scripts or commands or result.suffix == ".md", f"no script writes {result.name}"


@pytest.mark.parametrize("file", BENCHMARKS, ids=lambda file: file.name)
def test_a_benchmark_takes_only_what_the_package_has(file: Path) -> None:
    tree = ast.parse(file.read_text())
    names = taken(tree)
    missing = {name for name, value in names.items() if value is None}
    missing |= {
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and isinstance(names.get(node.value.id), types.ModuleType)
        and not hasattr(names[node.value.id], node.attr)
    }
    assert missing == set()
