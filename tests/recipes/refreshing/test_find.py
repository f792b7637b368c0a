"""`readapt find` and `readapt clean` with split documents, reports, caches and files of killed exports."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from readapt_ray import artifacts
from readapt_ray.artifacts import Workspace
from readapt_ray.catalog import cache_entries
from readapt_ray.generations import Generation, write
from readapt_ray.recipes.refreshing.clean import clean
from readapt_ray.recipes.refreshing.find import find
from readapt_ray.recipes.refreshing.options import CleanConfig, FindConfig
from readapt_ray.storage import Location
from readapt_ray.targets.files import FilesTarget
from readapt_ray.targets.target import Layout


def _made(folder: Path, stage: str, inputs: dict[str, str], work: Callable[[Workspace], None]) -> str:
    class Options(artifacts.StageConfig):
        """None."""

    return artifacts.produce(stage, Options(output=str(folder)), inputs=inputs, work=work).fingerprint


def _corpus(folder: Path, ids: list[str], source: str) -> str:
    def work(workspace: Workspace) -> None:
        with (workspace.location / "passages/part-00000.parquet").open_output() as stream:
            pq.write_table(pa.table({"doc_id": ids, "text": ids}), stream, row_group_size=2)

    return _made(folder, "ingest", {"source": source}, work)


def _where(root: Path, doc_id: str) -> dict[str, str]:
    return {row["artifact"]: row["where"] for row in find(FindConfig(root=str(root), doc_id=doc_id))}


@pytest.mark.parametrize(
    ("doc_id", "where"),
    [
        ("page", "row 1 of passages/part-00000.parquet (page#1)"),
        ("page#2", "row 2 of passages/part-00000.parquet"),
        ("pages", "row 5 of passages/part-00000.parquet"),
        ("a.b", "row 0 of passages/part-00000.parquet (a.b#1)"),
        ("pag", ""),
        ("axb", ""),
        ("page#", ""),
        ("page#22", ""),
    ],
)
def test_the_id_of_a_split_document_finds_its_passages(tmp_path: Path, doc_id: str, where: str) -> None:
    _corpus(tmp_path / "corpus", ["a.b#1", "page#1", "page#2", "page#x", "page-1", "pages"], "s")
    assert _where(tmp_path, doc_id) == ({"corpus": where} if where else {})


def _report(runs: dict[str, Any], results: list[str]) -> Callable[[Workspace], None]:
    docs = [{"rank": 1, "doc_id": each} for each in results]
    content = json.dumps({"provenance": runs, "changes": [{"gained": docs}]}, indent=2, ensure_ascii=False)
    return lambda workspace: (workspace.location / "report.json").write_text(content)


def test_reports_and_subsets_that_hold_an_id_are_found(tmp_path: Path) -> None:
    _made(tmp_path / "report", "evaluate", {}, _report({}, ['d"1', "é"]))
    line = json.dumps({"_id": "é", "text": "d1"}) + "\n"
    _made(tmp_path / "rows", "subset", {}, lambda made: (made.location / "passages.jsonl").write_text(line))
    assert _where(tmp_path, 'd"1') == {"report": "report.json"}
    assert _where(tmp_path, "é") == {"report": "report.json", "rows": "passages.jsonl"}
    assert _where(tmp_path, "d1") == _where(tmp_path, "1") == {}


def _generations(root: Path) -> None:
    entries = []
    for number in (1, 2):
        folder = root / f"generations/{number:05d}"
        corpus = _corpus(folder / "corpus", [f"d{number}"], f"s{number}")

        def work(workspace: Workspace) -> None:
            workspace.details["num_dead"] = 0
            workspace.details["shards"] = []

        vectors = _made(folder / "vectors", "embed", {"corpus": corpus}, work)
        _made(folder / "index", "index", {"vectors": vectors}, work)
        run = _made(root / f"{number}.trec", "search", {"vectors": vectors}, lambda made: made.location.write_text(""))
        _made(root / f"report{number}", "evaluate", {"runs": f"hash{number}"}, _report({"a": {"fingerprint": run}}, []))
        artifacts_of = {name: f"generations/{number:05d}/{name}" for name in ("corpus", "vectors", "index")}
        entries.append(
            Generation(
                number=number,
                what="refresh",
                created="",
                seconds=0,
                settings={},
                source_fingerprint="",
                artifacts=artifacts_of,
            )
        )
    write(Location(str(root)), entries)


def test_clean_removes_a_report_on_runs_of_an_earlier_generation(tmp_path: Path) -> None:
    _generations(tmp_path / "root")
    freed = {row["artifact"] for row in clean(CleanConfig(root=str(tmp_path / "root"), yes=True)).rows}
    assert {"1.trec", "report1"} <= freed
    assert not {"2.trec", "report2"} & freed
    assert not (tmp_path / "root/report1").exists() and (tmp_path / "root/report2").exists()


def test_clean_removes_the_copies_of_indexes_that_no_server_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("READAPT_CACHE", str(tmp_path / "cache"))
    _generations(tmp_path / "root")
    used, left = (cache_entries.folder_of("shards") / (digit * 32) for digit in "12")
    for entry in (used, left):
        entry.mkdir(parents=True)
        (entry / "content").write_text("d1")
        cache_entries.note_files(entry, {"content": {"size_bytes": 1}})
    with cache_entries.open_use_lock(used):
        clean(CleanConfig(root=str(tmp_path / "root"), yes=True))
        assert (used.exists(), left.exists()) == (True, False)


def test_what_a_killed_export_left_in_a_folder_of_files_neither_blocks_the_next_nor_stays(tmp_path: Path) -> None:
    folder = tmp_path / "collection"
    folder.mkdir()
    target = FilesTarget(str(folder))
    (folder / ".tmp-0123456789ab-readapt_export.json").write_text("{")
    assert target.record() is None
    target.create(Layout(dimension=2, vector_dtype="float32", payload=pa.schema([])), {"export": "e"})
    for name in ("part-00000-0123abcd.parquet", "part-00000-0123abcd.npy"):
        (folder / f".tmp-0123456789ab-{name}").write_text("a deleted passage")
    others = {folder / ".tmp-mine", folder / ".tmp-0123456789ab-other.parquet"}
    for each in others:
        each.write_text("mine")
    target.finish()
    assert set(folder.iterdir()) == {folder / "readapt_export.json", *others}
    (folder / "readapt_export.json").unlink()
    (folder / "notes.txt").write_text("mine")
    assert target.record() == {}
