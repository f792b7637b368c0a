"""What every target must do: hold all rows, go on after a kill, take changes, refuse what does not belong there."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from readapt_ray.artifacts import Artifact
from readapt_ray.errors import ArtifactConflictError, FingerprintMismatchError, InputError
from readapt_ray.stages.export import ExportConfig, export
from readapt_ray.targets import opening
from tests.targets import worlds
from tests.targets.conftest import Place

ROWS = worlds.passages(60)


def exported(folder: Path, place: Place, output: str = "export", **options: Any) -> Artifact:
    inputs = {name: str(folder / name) for name in ("vectors", "corpus")}
    return export(
        ExportConfig(**{**inputs, "to": place.uri, "output": str(folder / output), "batch_rows": 7, **options})
    )


def expected(rows: worlds.Passages) -> dict[str, Any]:
    vectors = worlds.matrix_of(rows).tolist()
    return {
        name: {column: value for column, value in row.items() if value is not None} | {"vector": vector}
        for (name, row), vector in zip(rows.items(), vectors, strict=True)
    }


def ledgers(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in sorted((folder / "export/rows").glob("*.parquet"))}


def test_all_rows_are_there_and_the_ten_best_are_those_of_exact_search(place: Place, tmp_path: Path) -> None:
    worlds.write(tmp_path, ROWS)
    artifact = exported(tmp_path, place)
    assert place.read() == expected(ROWS)
    assert artifact.manifest.counts == {"num_vectors": 60, "num_sent": 60, "num_deleted": 0}
    assert artifact.manifest.details["check"] == {"num_queries": 20, "overlap_at_10": 1.0, "lowest": 1.0}
    assert artifact.manifest.details["record"]["encoder"] == "e" * 32
    with opening.open_target(opening.parse(place.uri)) as target:
        found = target.search(worlds.matrix_of(ROWS), 10)
        assert target.count() == 60
    assert [set(each) for each in found] == [set(each) for each in worlds.exact(ROWS)]
    before = ledgers(tmp_path)
    assert exported(tmp_path, place).fingerprint == artifact.fingerprint
    assert ledgers(tmp_path) == before


def test_a_killed_export_goes_on_where_it_stopped(place: Place, tmp_path: Path) -> None:
    worlds.write(tmp_path, ROWS)
    script = Path(__file__).with_name("killed_export.py")
    command = [sys.executable, str(script), str(tmp_path), place.uri, "3"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    before = ledgers(tmp_path)
    assert list(before) == ["part-00000.parquet", "part-00001.parquet"]
    assert exported(tmp_path, place).manifest.counts["num_sent"] == 60
    assert place.read() == expected(ROWS)
    after = ledgers(tmp_path)
    assert len(after) == 4 and {name: after[name] for name in before} == before


def test_previous_sends_what_changed_and_deletes_what_the_corpus_lost(place: Place, tmp_path: Path) -> None:
    worlds.write(tmp_path / "old", ROWS)
    previous = exported(tmp_path / "old", place)
    rows = {name: dict(row) for name, row in ROWS.items() if name not in map(worlds.doc_id, (0, 4, 17))}
    rows[worlds.doc_id(1)]["text"] = "another text"
    rows[worlds.doc_id(2)]["url"] = "https://example.org/moved"
    rows["new"] = {"title": "", "text": "a new text", "url": None}
    worlds.write(tmp_path / "new", rows, num_files=3)
    artifact = exported(tmp_path / "new", place, previous=previous.uri, check=58, batch_rows=1)
    assert place.read() == expected(rows)
    changes = {"num_unchanged": 55, "num_changed": 2, "num_new": 1, "num_deleted": 3}
    assert artifact.manifest.details["changes"] == changes
    assert artifact.manifest.details["check"]["lowest"] == 1.0
    worlds.write(tmp_path / "third", worlds.passages(10))
    with pytest.raises(InputError, match="was written by another export since"):
        exported(tmp_path / "third", place, previous=previous.uri)


def test_a_kept_column_may_hold_any_text(place: Place, tmp_path: Path) -> None:
    rows = worlds.passages(6, note="a\x00b\u2028'\"\\u0000 \U0001f30a")
    worlds.write(tmp_path, rows)
    exported(tmp_path, place)
    found = {row["note"] for row in place.read().values()}
    assert found in ({"a\x00b\u2028'\"\\u0000 \U0001f30a"}, {"ab\u2028'\"\\u0000 \U0001f30a"})


def test_what_does_not_belong_there_is_refused_unless_told_to_replace_it(place: Place, tmp_path: Path) -> None:
    worlds.write(tmp_path / "first", ROWS)
    exported(tmp_path / "first", place)
    other = worlds.passages(30)
    worlds.write(tmp_path / "second", other)
    with pytest.raises(ArtifactConflictError, match=r"another export of the same encoder.*--previous"):
        exported(tmp_path / "second", place)
    worlds.write(tmp_path / "third", other, encoder={**worlds.ENCODER, "fingerprint": "f" * 32})
    with pytest.raises(FingerprintMismatchError, match="vectors of another encoder"):
        exported(tmp_path / "third", place)
    with pytest.raises(FingerprintMismatchError, match="sent vectors of another encoder"):
        exported(tmp_path / "third", place, previous=str(tmp_path / "first/export"))
    assert place.read() == expected(ROWS)
    exported(tmp_path / "third", place, overwrite=True)
    assert place.read() == expected(other)
    assert np.isclose(exported(tmp_path / "third", place).manifest.details["check"]["lowest"], 1.0)
