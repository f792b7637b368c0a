"""A notebook in a real Jupyter kernel: a run, its artifacts, a search; progress in the cells' output, and quiet."""

import os
from pathlib import Path
from typing import Any

import pytest

from tests import factories

nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
pytest.importorskip("ipykernel", reason="ipykernel is not installed")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

CELLS = [
    "import readapt_ray as ra",
    "made = ra.run('run.yaml', root='root', overrides={'train.lora_rank': 4})\nmade['corpus']",
    "made['report'].to_pandas().head(2)",
    "retriever = ra.Retriever(retriever=made['adapted'], index=made['index/adapted'], corpus=made['corpus'])\n"
    "[hit.doc_id for hit in retriever.search('array shape', top_k=3)]",
    "ra.status('root')",
    "try:\n    ra.run('run.yaml', root='root', overrides={'train.lora_rnk': 4})\nexcept ra.ReadaptError as error:\n    print(error)",
    "ra.quiet()\nra.embed(retriever=made['adapted'], corpus=made['corpus'], output='again', num_workers=1)",
]


def test_a_notebook_goes_from_a_run_file_to_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = {"block_tokens": 64, "batch_size": 8, "num_workers": 1, "num_cpus_per_worker": 1}
    factories.run_file(tmp_path, num_passages=60, num_queries=8, train=train)
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parents[2]}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("READAPT_NUM_CPUS", "2")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(each) for each in CELLS])
    client = Watched(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    _, run, table, found, status, refused, quiet = (_texts(each) for each in notebook.cells)
    assert not any("IProgress" in _texts(each) or "ipywidgets" in _texts(each) for each in notebook.cells), "tqdm, Ray"
    assert "ingest: 60 passages" in run
    assert "<div><b>ingest: 60 passages" in run, "an artifact shows as HTML"
    assert "[1/11] ingest" in run
    assert any("stages done" in each for each in client.drawn), "progress is drawn in the cell's output"
    assert "stages done" not in run, "and is gone in the end"
    assert "nDCG@10" in table
    assert found.count("'d0") == 3
    assert "11 of 11 done" in status
    assert "did you mean 'lora_rank'" in refused
    assert "embed: 60 vectors" in quiet
    assert "passages (" not in quiet and "done in" not in quiet


class Watched(nbclient.NotebookClient):  # type: ignore[misc]
    """Runs a notebook, and keeps all that was drawn meanwhile."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self.drawn: list[str] = []

    def process_message(self, msg: dict[str, Any], cell: Any, cell_index: int) -> Any:
        self.drawn.append(str(msg["content"].get("data", "")))
        return super().process_message(msg, cell, cell_index)


def _texts(cell: "nbformat.NotebookNode") -> str:
    """All that a cell shows, as text."""
    shown = []
    for output in cell.outputs:
        shown += [output["text"]] if "text" in output else list(output.get("data", {}).values())
    return "\n".join(map(str, shown))
