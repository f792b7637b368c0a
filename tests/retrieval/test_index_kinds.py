import faiss
import numpy as np
import pytest

from readapt_ray.errors import InputError
from readapt_ray.retrieval.index_kinds import KINDS, IndexOptions, choose, index_spec, vector_bytes
from readapt_ray.retrieval.index_shard import new_index


@pytest.mark.parametrize("storage", ["float32", "float16", "int8"])
@pytest.mark.parametrize("kind", [each.name for each in KINDS])
def test_every_kind_is_one_that_faiss_makes_and_takes_the_bytes_that_are_said(kind, storage):
    options = IndexOptions(kind=kind, storage=storage)
    made = index_spec(options, 2000, 32)
    vectors = np.random.default_rng(0).normal(size=(2000, 32)).astype(np.float32)
    index = new_index(made.factory, 32)
    index.train(vectors)
    sizes = []
    for part in (vectors[:1000], vectors[1000:]):
        index.add(part)
        sizes.append(faiss.serialize_index(index).size)
    assert index.ntotal == 2000 and index.metric_type == faiss.METRIC_INNER_PRODUCT
    assert vector_bytes(options, 32) == pytest.approx((sizes[1] - sizes[0]) / 1000, rel=0.1)
    assert made.is_exact == (kind == "flat" and storage == "float32")


def test_factories_follow_the_size():
    def factory(num_vectors, **options):
        return index_spec(IndexOptions(**options), num_vectors, 384).factory

    assert factory(1_000_000, kind="flat", storage="float16") == "SQfp16"
    assert factory(1_000_000, kind="ivf-flat") == "IVF4000,Flat"
    assert factory(2_000, kind="ivf-flat", storage="int8") == "IVF51,SQ8"
    assert factory(1_000_000, kind="ivf-pq") == "IVF4000,PQ96x8,Refine(Flat)"
    assert factory(1_000_000, kind="ivf-pq", refine=False, code_bytes=48) == "IVF4000,PQ48x8"
    assert factory(1_000_000, kind="hnsw", storage="float16") == "HNSW32,SQfp16"
    assert factory(1_000_000, kind="rabitq", storage="int8") == "IVF4000,RaBitQ,Refine(SQ8)"
    assert factory(999, kind="hnsw") == "Flat"
    assert factory(5, factory="IVF1,Flat") == "IVF1,Flat"
    with pytest.raises(InputError, match="code_bytes = 7 does not divide the 384 numbers"):
        factory(10_000, kind="ivf-pq", code_bytes=7)
    with pytest.raises(InputError, match=r"kind = 'lsh'; it must be one of auto, flat, ivf-flat"):
        factory(10_000, kind="lsh")


@pytest.mark.parametrize(
    ("num_vectors", "memory_gb", "min_recall", "expected"),
    [
        (100_000, None, 0.95, ("flat", "float32")),
        (100_000, 0.1, 0.95, ("hnsw", "int8")),
        (1_000_000, None, 0.95, ("hnsw", "float32")),
        (1_000_000, 1.2, 0.95, ("hnsw", "float16")),
        (1_000_000, 0.4, 0.95, ("ivf-flat", "int8")),
        (1_000_000, 0.2, 0.8, ("ivf-pq", "float32")),
        (1_000_000, 0.07, 0.8, ("rabitq", "float32")),
        (10_000_000, None, 0.95, ("ivf-flat", "float32")),
        (10_000_000, None, 1.0, ("flat", "float32")),
    ],
)
def test_auto_is_the_quickest_that_fits(num_vectors, memory_gb, min_recall, expected):
    memory_bytes = None if memory_gb is None else memory_gb * 1e9
    options = choose(num_vectors, 384, memory_bytes=memory_bytes, min_recall=min_recall)
    assert (options.kind, options.storage) == expected and options.min_recall == min_recall


def test_what_does_not_fit_says_what_would():
    with pytest.raises(
        InputError, match=r"memory_gb = 0.01 is too little for 1,000,000 .* smallest index takes 0.064 GB"
    ):
        choose(1_000_000, 384, memory_bytes=1e7, min_recall=0.9)
    with pytest.raises(InputError, match=r"at recall 1: the smallest index takes 1.54 GB"):
        choose(1_000_000, 384, memory_bytes=1e9, min_recall=1)
