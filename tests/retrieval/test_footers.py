"""Footers are waited for together, and come in the order asked for."""

import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from readapt_ray.retrieval.footers import map_in_threads, named_footers, row_counts
from readapt_ray.storage import Location


def test_what_waits_for_storage_waits_together() -> None:
    together = threading.Barrier(8)

    def wait(number: int) -> int:
        together.wait(timeout=120)
        return number

    assert map_in_threads(wait, range(8)) == list(range(8))
    assert map_in_threads(wait, []) == []


def test_the_rows_of_files_stand_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name, num_rows in (("b", 3), ("a", 5), ("c", 0)):
        pq.write_table(pa.table({"doc_id": ["x"] * num_rows}), tmp_path / f"{name}.parquet")
    (tmp_path / "note.txt").touch()
    counts = row_counts(named_footers(Location(str(tmp_path))))
    assert counts == (("a.parquet", 5), ("b.parquet", 3), ("c.parquet", 0))
    assert row_counts(named_footers(Location(str(tmp_path / "absent")))) == ()
