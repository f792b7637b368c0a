import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from readapt_ray.errors import CorpusError, CorruptFileError
from readapt_ray.retrieval.vector_files import RowRange, cut, iterate_vectors, read_footer, read_rows, write_vectors
from readapt_ray.storage import Location


def _written(folder, num_rows=2500, dimension=6, dtype="float32"):
    rng = np.random.default_rng(0)
    doc_ids = [f"d{number}" for number in range(num_rows)]
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


@pytest.mark.parametrize(("start", "num_rows"), [(0, 1), (1023, 2), (1024, 1024), (700, 1800), (2499, 1), (0, 2500)])
def test_a_range_of_rows(tmp_path, start, num_rows):
    location, doc_ids, vectors = _written(tmp_path)
    table = read_rows(location, start, num_rows, ("doc_id",))
    assert table["doc_id"].to_pylist() == doc_ids[start : start + num_rows]
    chunks = list(iterate_vectors(Location(str(tmp_path)), [RowRange(location.name, start, num_rows)], chunk_rows=500))
    assert [len(names) for names, _ in chunks][:-1] == [500] * (len(chunks) - 1)
    np.testing.assert_array_equal(np.concatenate([part for _, part in chunks]), vectors[start : start + num_rows])


def test_shards_are_cut_over_files():
    assert cut([("a", 5), ("empty", 0), ("b", 3)], 4) == [
        [RowRange("a", 0, 4)],
        [RowRange("a", 4, 1), RowRange("b", 0, 3)],
    ]
    assert cut([("a", 2), ("b", 2)], 10) == [[RowRange("a", 0, 2), RowRange("b", 0, 2)]]
    assert cut([], 10) == []


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
    with pytest.raises(CorruptFileError, match="without doc_id or vector"):
        values = pa.array([[1.0, 2.0], None], pa.list_(pa.float32(), 2))
        pq.write_table(pa.table({"doc_id": ["a", "b"], "vector": values}), location.path)
        list(iterate_vectors(Location(str(tmp_path)), [RowRange(location.name, 0, 2)]))
