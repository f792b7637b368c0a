"""Flat shards that are searched on a device: what FAISS finds on the CPU, also with deleted vectors, filters and small chunks."""

import numpy as np
import pytest
import torch

from readapt_ray.errors import InputError
from readapt_ray.retrieval import device_index, exact
from readapt_ray.retrieval.device_index import DeviceIndex
from readapt_ray.retrieval.half_products import has_half_products
from readapt_ray.retrieval.index_shard import DELETED, IndexShard, build_shard, on_device, search_shards

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
DIMENSION, ROWS = 16, 700


@pytest.fixture(params=["Flat", "SQfp16"])
def shards(request) -> list[IndexShard]:
    """Three shards; their vectors are whole numbers, so that many scores are equal bit for bit."""
    random = np.random.default_rng(0)
    vectors = random.integers(-2, 3, size=(ROWS, DIMENSION)).astype(np.float32)
    names = np.array([f"d{number:04d}" for number in random.permutation(ROWS)], object)
    parts = np.array_split(np.arange(ROWS), 3)
    return [build_shard(request.param, DIMENSION, [(names[part].tolist(), vectors[part])]) for part in parts]


@pytest.fixture
def queries() -> np.ndarray:
    return np.random.default_rng(1).integers(-3, 4, size=(40, DIMENSION)).astype(np.float32)


def assert_same(found, wanted) -> None:
    assert found.doc_ids.tolist() == wanted.doc_ids.tolist()
    np.testing.assert_array_equal(found.scores, wanted.scores)


@DEVICES
@pytest.mark.parametrize(("chunk_rows", "top_k"), [(1, 10), (33, 1), (33, 10), (33, 2 * ROWS), (10_000, 10)])
def test_hits_are_those_of_the_shards_on_a_cpu(monkeypatch, shards, queries, device, chunk_rows, top_k):  # noqa: PLR0917
    wanted = search_shards(shards, queries, top_k)
    monkeypatch.setattr(device_index, "_SCORE_BYTES", 4 * len(queries) * chunk_rows)
    placed = on_device(shards, device)
    assert (placed.index.ntotal, placed.index.d, len(placed.doc_ids)) == (ROWS, DIMENSION, ROWS)
    assert_same(placed.search(queries, top_k), wanted)
    assert_same(placed.search(queries[:1], top_k), search_shards(shards, queries[:1], top_k))


@DEVICES
def test_deleted_vectors_are_not_copied_and_not_found(monkeypatch, shards, queries, device):
    monkeypatch.setattr(device_index, "_READ_ROWS", 50)
    for number, shard in enumerate(shards):
        shard.doc_ids[number::5] = DELETED
    wanted = search_shards(shards, queries, 20)
    placed = on_device(shards, device)
    num_live = sum(np.count_nonzero(each.doc_ids != DELETED) for each in shards)
    assert len(placed.index._vectors_ND) == num_live < ROWS == len(placed.doc_ids)
    assert_same(placed.search(queries, 20), wanted)


@DEVICES
@pytest.mark.parametrize("is_deleted", [False, True])
@pytest.mark.parametrize(("num_rows", "copied_rows"), [(0, 7), (1, 7), (30, 7), (300, 7), (300, 10_000)])
def test_a_search_among_some_rows_is_exact(  # noqa: PLR0917
    monkeypatch, shards, queries, device, is_deleted, num_rows, copied_rows
):
    for shard in shards if is_deleted else ():
        shard.doc_ids[::3] = DELETED
    placed = on_device(shards, device)
    random = np.random.default_rng(2)
    live = np.flatnonzero(placed.doc_ids != DELETED)
    rows = np.sort(random.choice(live, num_rows, replace=False))
    vectors = np.concatenate([each.index.reconstruct_n(0, each.index.ntotal) for each in shards])[rows]
    monkeypatch.setattr(device_index, "_COPIED_BYTES", 4 * DIMENSION * copied_rows)

    found = placed.search_among(queries, 10, rows)

    assert_same(found, exact.search_exact(queries, [(placed.doc_ids[rows], vectors)] if num_rows else [], 10))


def test_shards_of_both_types_are_held_in_float32(queries):
    vectors = np.random.default_rng(3).normal(size=(30, DIMENSION)).astype(np.float32)
    names = [f"d{number:02d}" for number in range(30)]
    whole = build_shard("Flat", DIMENSION, [(names[:10], vectors[:10])])
    halves = build_shard("SQfp16", DIMENSION, [(names[10:], vectors[10:])])
    placed = on_device([whole, halves], "cpu")
    assert placed.index._vectors_ND.dtype == torch.float32
    assert on_device([halves], "cpu").index._vectors_ND.dtype == torch.float16
    assert placed.search(queries, 30).doc_ids.tolist() == search_shards([whole, halves], queries, 30).doc_ids.tolist()


def test_what_belongs_to_the_vectors_stays_with_them(shards):
    hashed = [IndexShard(each.index, each.doc_ids, bytes(16 * len(each.doc_ids)), "once") for each in shards]
    placed = on_device(hashed, "cpu")
    assert (len(placed.hashes), placed.trained) == (16 * ROWS, "once")
    assert on_device([shards[0], hashed[1]], "cpu").hashes == b""  # nothing is known of some
    assert placed.doc_ids.tolist() == [doc_id for each in shards for doc_id in each.doc_ids]


@pytest.mark.parametrize("factory", ["SQ8", "IVF4,Flat", "HNSW8"])
def test_other_kinds_are_refused(shards, factory):
    other = build_shard(
        factory, DIMENSION, [([f"x{row}" for row in range(200)], np.eye(200, DIMENSION, dtype=np.float32))]
    )
    with pytest.raises(InputError, match=r"an index of kind Index\w+ is not searched on a GPU; only flat ones"):
        on_device([*shards, other], "cpu")


def test_vectors_that_do_not_fit_are_refused_before_they_are_copied(monkeypatch, shards):
    doc_ids = np.concatenate([each.doc_ids for each in shards])
    parts = [np.zeros((ROWS, DIMENSION), np.float16)]
    needed = 2 * ROWS * DIMENSION + device_index._WORK_BYTES
    monkeypatch.setattr(device_index, "_free_bytes", lambda device: needed)
    DeviceIndex(parts, doc_ids, doc_ids != DELETED, "cpu")
    monkeypatch.setattr(device_index, "_free_bytes", lambda device: needed - 1)
    with pytest.raises(InputError, match=r"but 2\.0 GiB of the GPU are free; raise index_actors"):
        DeviceIndex(parts, doc_ids, doc_ids != DELETED, "cpu")


def test_vectors_that_are_widened_are_taken_in_smaller_chunks(monkeypatch, shards, queries):
    """A device without float16 products widens each chunk to float32, so the bytes of a chunk are bounded, too."""
    monkeypatch.setattr(device_index, "_COPIED_BYTES", 4 * DIMENSION * 100)
    placed = on_device(shards, "cpu")
    sizes = [len(vectors) for _, vectors in placed.index._chunks(len(queries), None)]
    assert sizes == [100] * 7
    monkeypatch.setattr(device_index, "has_half_products", lambda device, dtype: True)
    assert [len(vectors) for _, vectors in placed.index._chunks(len(queries), None)] == [ROWS]


@pytest.mark.gpu
def test_float16_vectors_are_multiplied_as_they_are_on_a_gpu(shards):
    placed = on_device(shards, "cuda")
    assert has_half_products(placed.index._vectors_ND.device, placed.index._vectors_ND.dtype) is (
        placed.index._vectors_ND.dtype == torch.float16
    )
