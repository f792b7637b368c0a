import json
import random

import pyarrow as pa
import pyarrow.parquet as pq

from readapt_ray.records import PASSAGE_SCHEMA, Passage
from readapt_ray.sources.parts import DIGEST, FIRST_ID, METADATA_KEY, EarlierPart, PartWriter
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


def _passages(numbers):
    return [Passage(f"d{number}", "", f"text {number}") for number in numbers]


def _written_after(folder, passages, earlier_folder, **options):
    """Write parts after those of an earlier folder; return the names of the files that both share, and of all."""
    earlier = {}
    for file in sorted(earlier_folder.iterdir()) if earlier_folder else ():
        said = json.loads(pq.read_schema(file).metadata[METADATA_KEY])
        earlier[said[FIRST_ID]] = EarlierPart(Location(str(file)), said[DIGEST])
    writer = PartWriter(Location(str(folder)), rows_per_file=10, earlier=earlier, **options)
    for passage in passages:
        writer.add(passage, 1)
    writer.close()
    there = {file.stat().st_ino for file in earlier_folder.iterdir()} if earlier_folder else set()
    files = sorted(folder.iterdir())
    assert pq.read_table(folder)["doc_id"].to_pylist() == [each.doc_id for each in passages]
    return [file.name[5:10] for file in files if file.stat().st_ino in there], [file.name[5:10] for file in files]


def test_parts_of_unchanged_passages_are_shared_with_an_earlier_corpus(tmp_path):
    before = _passages(range(50))
    assert _written_after(tmp_path / "a", before, None) == ([], [f"{number:05d}" for number in range(5)])
    assert _written_after(tmp_path / "same", before, tmp_path / "a")[0] == [f"{number:05d}" for number in range(5)]
    inserted = [*before[:13], *_passages([100, 101]), *before[13:34], before[34]._replace(text="new"), *before[35:]]
    assert _written_after(tmp_path / "b", inserted, tmp_path / "a")[0] == ["00000", "00002", "00004"]
    assert [pq.read_metadata(file).num_rows for file in sorted((tmp_path / "b").iterdir())] == [10, 12, 10, 10, 10]
    deleted = [*inserted[:3], *inserted[5:]]
    assert _written_after(tmp_path / "c", deleted, tmp_path / "b")[0] == ["00001", "00002", "00003", "00004"]
    retitled = [*deleted[:20], deleted[20]._replace(title="new"), *deleted[21:]]
    assert _written_after(tmp_path / "d", retitled, tmp_path / "c")[0] == ["00000", "00001", "00003", "00004"]


def test_parts_stay_between_half_and_one_and_a_half(tmp_path):
    now = _passages(range(50))
    _written_after(tmp_path / "0", now, None)
    draw = random.Random(0)
    for day in range(1, 12):
        for each in draw.sample(now, 6):
            now.remove(each)
        for number in range(draw.randrange(12)):
            now.insert(draw.randrange(len(now)), Passage(f"d{day}-{number}", "", f"text {day} {number}"))
        _written_after(tmp_path / str(day), now, tmp_path / str(day - 1))
        sizes = [pq.read_metadata(file).num_rows for file in sorted((tmp_path / str(day)).iterdir())]
        assert min(sizes[:-1]) >= 5 and max(sizes) <= 15, sizes


def test_a_part_with_other_kept_columns_is_written(tmp_path):
    kept = pa.schema([("url", pa.string())])
    passages = [each._replace(columns={"url": each.doc_id}) for each in _passages(range(20))]
    _written_after(tmp_path / "a", passages, None, kept=kept)
    other = [*passages[:12], passages[12]._replace(columns={"url": "other"}), *passages[13:]]
    assert _written_after(tmp_path / "b", other, tmp_path / "a", kept=kept)[0] == ["00000"]
    assert _written_after(tmp_path / "c", passages, tmp_path / "a")[0] == [], "another schema"
