import pyarrow.parquet as pq

from readapt_ray.records import PASSAGE_SCHEMA, Passage
from readapt_ray.sources.parts import PartWriter
from readapt_ray.storage import Location


def _write(folder, num_rows, *, rows_per_file=10, num_bytes=1):
    writer = PartWriter(Location(str(folder)), rows_per_file=rows_per_file)
    for number in range(num_rows):
        writer.add(Passage(f"d{number}", "", f"text {number}"), num_bytes)
    writer.close()
    return writer


def _stamps(folder):
    return {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}


def test_parts_hold_every_passage_in_order(tmp_path):
    writer = _write(tmp_path, 25)
    assert [pq.read_metadata(file).num_rows for file in sorted(tmp_path.iterdir())] == [10, 10, 5]
    table = pq.read_table(tmp_path)
    assert table.schema.equals(PASSAGE_SCHEMA)
    assert table["doc_id"].to_pylist() == [f"d{number}" for number in range(25)]
    assert writer.doc_ids([0, 9, 10, 24, 24]) == {0: "d0", 9: "d9", 10: "d10", 24: "d24"}


def test_an_exact_multiple_leaves_no_empty_part(tmp_path):
    _write(tmp_path, 20)
    assert len(list(tmp_path.iterdir())) == 2


def test_row_groups_are_bounded_by_rows_and_bytes(tmp_path):
    _write(tmp_path / "rows", 9000, rows_per_file=100_000)
    metadata = pq.read_metadata(tmp_path / "rows" / "part-00000.parquet")
    assert [metadata.row_group(at).num_rows for at in range(metadata.num_row_groups)] == [4096, 4096, 808]
    _write(tmp_path / "bytes", 60, rows_per_file=1000, num_bytes=10 << 20)
    sizes = [pq.read_metadata(file) for file in sorted((tmp_path / "bytes").iterdir())]
    assert [each.num_rows for each in sizes] == [28, 28, 4]
    assert sizes[0].row_group(0).num_rows == 4


def test_whole_parts_are_kept_and_others_written_again(tmp_path):
    _write(tmp_path, 25)
    before, content = _stamps(tmp_path), {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    (tmp_path / "part-00001.parquet").write_bytes(content["part-00001.parquet"][:50])
    (tmp_path / "part-00007.parquet").write_bytes(b"left by another")
    _write(tmp_path, 25)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == content
    changed = {name for name, stamp in _stamps(tmp_path).items() if stamp != before[name]}
    assert changed == {"part-00001.parquet"}


def test_only_parts_behind_the_last_are_removed(tmp_path):
    _write(tmp_path, 25)
    for name in ("aaa.parquet", "part-mine.parquet", "zzz.parquet"):
        (tmp_path / name).write_text("precious")
    _write(tmp_path, 10)
    assert sorted(_stamps(tmp_path)) == ["aaa.parquet", "part-00000.parquet", "part-mine.parquet", "zzz.parquet"]


def test_a_part_of_other_passages_is_replaced(tmp_path):
    other = PartWriter(Location(str(tmp_path)), rows_per_file=10)
    other.add(Passage("x", "", "y"), 1)
    other.close()
    _write(tmp_path, 1)
    assert pq.read_table(tmp_path)["doc_id"].to_pylist() == ["d0"]
