import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from readapt_ray.errors import CorpusError, CorruptFileError
from readapt_ray.retrieval.parquet_rows import ParquetRows, read_rows
from readapt_ray.retrieval.vector_files import (
    RowRange,
    cut_into_shards,
    iterate_vectors,
    read_footer,
    to_stored_columns,
    write_stored,
    write_vectors,
)
from readapt_ray.storage import Location


def _written(folder, num_rows=2500, dimension=6, dtype="float32"):
    rng = np.random.default_rng(0)
    doc_ids = [f"d{number:05d}" for number in range(num_rows)]
    vectors = rng.normal(size=(num_rows, dimension)).astype(np.float32)
    location = Location(str(folder)) / "part-00000.parquet"
    write_vectors(location, doc_ids, vectors, dtype=dtype, metadata={"encoder": {"fingerprint": "f"}, "num_tokens": 7})
    return location, doc_ids, vectors


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_file_is_plain_arrow_and_says_what_made_it(tmp_path, dtype):
    location, doc_ids, vectors = _written(tmp_path, dtype=dtype)
    table = pq.read_table(location.path)
    element = pa.float32() if dtype == "float32" else pa.float16()
    assert table.schema.field("vector").type == pa.list_(element, 6)
    assert table["doc_id"].to_pylist() == doc_ids
    np.testing.assert_array_equal(np.array(table["vector"].to_pylist(), dtype), vectors.astype(dtype))
    footer = read_footer(location)
    assert (footer.num_rows, footer.dimension, footer.metadata["num_tokens"]) == (2500, 6, 7)


def test_int8_is_symmetric_with_a_scale_a_vector(tmp_path):
    location, doc_ids, vectors = _written(tmp_path, dtype="int8")
    table = pq.read_table(location.path)
    assert table.schema.field("vector").type == pa.list_(pa.int8(), 6)
    numbers, scales = np.array(table["vector"].to_pylist()), table["scale"].to_numpy()
    assert (np.abs(numbers).max(axis=1) == 127).all() and numbers.min() == -127
    np.testing.assert_allclose(numbers * scales[:, None], vectors, atol=np.abs(vectors).max() / 250)
    ((names, read),) = iterate_vectors(Location(str(tmp_path)), [RowRange(location.name, 0, 2500)])
    assert names == doc_ids
    np.testing.assert_array_equal(read, numbers.astype(np.float32) * scales[:, None])
    with pytest.raises(CorpusError, match="'b' is zero"):
        write_vectors(location, ["a", "b"], np.eye(2, 3) * [[1], [0]], dtype="int8", metadata={})


def test_a_doc_id_is_found_by_the_statistics(tmp_path):
    vectors = np.ones((2500, 3), np.float32)
    location = Location(str(tmp_path)) / "x.parquet"
    doc_ids = [f"d{number:05d}" for number in np.random.default_rng(0).permutation(2500)]
    vectors[:, 0] = [int(doc_id[1:]) for doc_id in doc_ids]
    write_vectors(location, doc_ids, vectors, dtype="float32", metadata={})
    footer = pq.ParquetFile(location.path).metadata
    bounds = [footer.row_group(group).column(0).statistics for group in range(footer.num_row_groups)]
    assert [each.min for each in bounds] == ["d00000", "d01024", "d02048"]
    assert [each.max for each in bounds] == ["d01023", "d02047", "d02499"]
    found = pq.read_table(location.path, filters=[("doc_id", "=", "d01500")])
    assert found["vector"].to_pylist() == [[1500.0, 1.0, 1.0]]


def test_rows_of_many_files_by_number(tmp_path):
    folder = Location(str(tmp_path))
    for name, start in (("a", 0), ("b", 1500), ("c", 1500)):
        count = {"a": 1500, "b": 0, "c": 1100}[name]
        ids = pa.array([f"d{number}" for number in range(start, start + count)])
        pq.write_table(pa.table({"doc_id": ids}), tmp_path / name, row_group_size=100)
    reader = ParquetRows(folder, (("a", 1500), ("b", 0), ("c", 1100)))
    assert reader.num_rows == 2600
    for rows in ([2599, 0, 1499, 1500, 7, 7], list(range(1490, 1510)), [1500], [3, 1], []):
        table = reader.take(np.array(rows, np.int64), ("doc_id", "scale"))
        assert (table["doc_id"].to_pylist() if rows else []) == [f"d{row}" for row in rows]
    with pytest.raises(CorruptFileError, match="has 1100 rows, but 1200 were expected"):
        ParquetRows(folder, (("c", 1200),)).take(np.array([3, 1199]), ("doc_id",))


def test_a_column_that_one_file_lacks_is_null_there(tmp_path):
    pq.write_table(pa.table({"doc_id": ["a", "b"]}), tmp_path / "older")
    pq.write_table(pa.table({"doc_id": ["c"], "content_hash": [b"hash"]}), tmp_path / "newer")
    reader = ParquetRows(Location(str(tmp_path)), (("older", 2), ("newer", 1)))
    table = reader.take(np.array([2, 0]), ("doc_id", "content_hash", "scale"))
    assert table.to_pydict() == {"doc_id": ["c", "a"], "content_hash": [b"hash", None]}


@pytest.mark.parametrize(("start", "num_rows"), [(0, 1), (1023, 2), (1024, 1024), (700, 1800), (2499, 1), (0, 2500)])
def test_a_range_of_rows(tmp_path, start, num_rows):
    location, doc_ids, vectors = _written(tmp_path)
    table = read_rows(location, start, num_rows, ("doc_id",))
    assert table["doc_id"].to_pylist() == doc_ids[start : start + num_rows]
    chunks = list(iterate_vectors(Location(str(tmp_path)), [RowRange(location.name, start, num_rows)], chunk_rows=500))
    assert [len(names) for names, _ in chunks][:-1] == [500] * (len(chunks) - 1)
    np.testing.assert_array_equal(np.concatenate([part for _, part in chunks]), vectors[start : start + num_rows])


def test_shards_are_cut_over_files():
    assert cut_into_shards([("a", 5), ("empty", 0), ("b", 3)], 4) == [
        [RowRange("a", 0, 4)],
        [RowRange("a", 4, 1), RowRange("b", 0, 3)],
    ]
    assert cut_into_shards([("a", 2), ("b", 2)], 10) == [[RowRange("a", 0, 2), RowRange("b", 0, 2)]]
    assert cut_into_shards([], 10) == []


@pytest.mark.parametrize(("value", "state"), [(np.nan, "NaN"), (np.inf, "NaN or infinity"), (0.0, "is zero")])
def test_vectors_that_cannot_be_searched_are_refused_by_name(tmp_path, value, state):
    vectors = np.ones((3, 4), np.float32)
    vectors[1] = value
    location = Location(str(tmp_path)) / "x.parquet"
    with pytest.raises(CorpusError, match=f"'b' .*{state}"):
        write_vectors(location, ["a", "b", "c"], vectors, dtype="float32", metadata={})
    assert not location.exists()
    table = pa.table({"doc_id": ["a", "b", "c"], "vector": pa.array(vectors.tolist(), pa.list_(pa.float32(), 4))})
    pq.write_table(table, location.path)
    with pytest.raises(CorruptFileError, match=f"'b' .*{state}"):
        list(iterate_vectors(Location(str(tmp_path)), [RowRange("x.parquet", 0, 3)]))


def test_a_number_too_large_for_float16_is_refused(tmp_path):
    with pytest.raises(CorpusError, match="'a' holds NaN or infinity"):
        write_vectors(Location(str(tmp_path)) / "x", ["a"], np.full((1, 2), 1e6), dtype="float16", metadata={})


def test_a_store_that_is_busy_is_not_called_a_damaged_file(tmp_path, monkeypatch):
    location, _, _ = _written(tmp_path)

    def failing(*_, **__):
        raise pa.ArrowException("google::cloud::Status(UNAVAILABLE: try again)")

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", failing)
    with pytest.raises(pa.ArrowException, match="UNAVAILABLE"):
        read_rows(location, 0, 1, ("doc_id",))


def test_damaged_files_are_named(tmp_path):
    location, _, _ = _written(tmp_path)
    content = location.read_bytes()
    location.write_bytes(content[: len(content) // 2])
    with pytest.raises(CorruptFileError, match="cut short or altered"):
        read_footer(location)
    location.write_bytes(b"")
    with pytest.raises(CorruptFileError, match="cut short or altered"):
        read_rows(location, 0, 1, ("doc_id",))
    location.write_bytes(content)
    with pytest.raises(CorruptFileError, match="has 2500 rows, but 2600 were expected"):
        read_rows(location, 2400, 200, ("doc_id",))
    location.delete()
    with pytest.raises(CorruptFileError, match="is gone"):
        read_footer(location)
    with pytest.raises(CorruptFileError, match=r"without doc_id or vector|size=2 but index 2 had size=0"):
        values = pa.array([[1.0, 2.0], None], pa.list_(pa.float32(), 2))
        pq.write_table(pa.table({"doc_id": ["a", "b"], "vector": values}), location.path)
        list(iterate_vectors(Location(str(tmp_path)), [RowRange(location.name, 0, 2)]))


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_vectors_that_cannot_be_searched_are_left_out_up_to_a_bound(tmp_path, dtype):
    vectors = np.arange(1, 13, dtype=np.float32).reshape(4, 3)
    vectors[1, 2], vectors[3] = np.nan, 0
    location = Location(str(tmp_path)) / "x.parquet"
    with pytest.raises(CorpusError, match=r"'b' holds NaN .*2 of 4 passages are like it, and max_left_out = 1"):
        to_stored_columns(list("abcd"), vectors, dtype, max_left_out=1)
    stored = to_stored_columns(list("abcd"), vectors, dtype, max_left_out=2)
    write_stored(location, list("abcd"), stored, pa.nulls(4, pa.binary(16)), metadata={"num_tokens": 7})
    footer = read_footer(location)
    assert (footer.num_rows, footer.left_out) == (2, ["b", "d"])
    ((doc_ids, read),) = iterate_vectors(Location(str(tmp_path)), [RowRange("x.parquet", 0, 2)])
    assert doc_ids == ["a", "c"]
    np.testing.assert_allclose(read, vectors[[0, 2]], atol=0.05)
