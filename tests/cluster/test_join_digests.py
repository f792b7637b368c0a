import itertools
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from readapt_ray.cluster import earlier_vectors
from readapt_ray.cluster.earlier_vectors import Changes, join_digests
from readapt_ray.records import content_hash
from readapt_ray.retrieval.parquet_rows import ParquetRows
from readapt_ray.retrieval.vector_files import write_stored
from readapt_ray.storage import Location


def _passages(folder, rows, *, with_digests):
    table = pa.table({"doc_id": list(rows), "title": [""] * len(rows), "text": list(rows.values())})
    if with_digests:
        table = table.append_column("content_hash", pa.array(_hashes(rows), pa.binary(16)))
    folder.mkdir()
    half = len(rows) // 2
    pq.write_table(table.slice(0, half), folder / "a.parquet")
    pq.write_table(table.slice(half), folder / "b.parquet")
    return ParquetRows(Location(str(folder)), (("a.parquet", half), ("b.parquet", len(rows) - half)))


def _vectors(folder, rows):
    folder.mkdir()
    vectors = pa.table({"vector": pa.array([[1.0, 0.0]] * len(rows), pa.list_(pa.float32(), 2))})
    hashes = pa.array(_hashes(rows), pa.binary(16))
    write_stored(Location(str(folder / "v.parquet")), list(rows), vectors, hashes, metadata={})
    return ParquetRows(Location(str(folder)), (("v.parquet", len(rows)),))


def _hashes(rows):
    return [content_hash("", text) for text in rows.values()]


@pytest.mark.parametrize(("with_digests", "chunk_rows"), [(True, 70), (False, 70), (True, 1000)])
def test_the_join_finds_what_dictionaries_find(ray_session, tmp_path, monkeypatch, with_digests, chunk_rows):
    rng = np.random.default_rng(0)
    before = {f"d{number:04d}": f"text {number}" for number in range(300)}
    now = {key: before[key] for key in rng.permutation(sorted(before))[:200].tolist()}
    now |= dict.fromkeys(list(now)[:20], "another text") | {f"n{number}": f"new {number}" for number in range(30)}
    now["moved"] = before["d0001"]
    monkeypatch.setattr(earlier_vectors, "_CHUNK_ROWS", chunk_rows)
    passages = _passages(tmp_path / "now", now, with_digests=with_digests)
    joined = join_digests(passages, _vectors(tmp_path / "before", before), Location(str(tmp_path / "join")))
    assert joined.changes == Changes(num_unchanged=180, num_changed=20, num_new=31, num_deleted=100)
    rows = {text: number for number, text in enumerate(before.values())}
    expected = [rows.get(text, -1) for text in now.values()]
    assert joined.matches.rows(0, len(now)).tolist() == expected
    assert joined.matches.rows(50, 40).tolist() == expected[50:90]
    assert joined.matches.rows(60, 171).tolist() == expected[60:231]
    same = [rows[text] for doc_id, text in now.items() if before.get(doc_id) == text]
    assert joined.matches.live_rows(0, len(now)).tolist() == same
    keeps_all = replace(joined.matches, ends=np.array([len(before)]), is_kept=np.array([True]))
    own = [before.get(doc_id) == text for doc_id, text in now.items()]
    assert keeps_all.without_kept_vector(30, 201).tolist() == [place for place, each in enumerate(own[30:]) if not each]
    bounds = earlier_vectors.bin_bounds(len(now))
    assert joined.num_to_encode.tolist() == [expected[a:b].count(-1) for a, b in itertools.pairwise(bounds.tolist())]
    assert joined.num_to_encode.sum() == 50
    if chunk_rows == 1000:
        assert [path.name for path in (tmp_path / "join").iterdir()] == ["digests-earlier-00000"], (
            "digests stay in memory"
        )
    joined.matches.remove()
    assert not list((tmp_path / "join").iterdir())
