"""One build of FAISS, found or asked for; k-means on a GPU where it can be."""

import importlib.metadata
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import pytest

from readapt_ray.retrieval import faiss_build
from readapt_ray.retrieval.index_shard import new_index


def test_exactly_one_distribution_brings_faiss() -> None:
    assert len(set(importlib.metadata.packages_distributions()["faiss"])) == 1


@pytest.mark.parametrize(
    "module", ["retrieval.vector_index", "retrieval.index_recall", "serving.index_slice", "cluster.on_worker"]
)
def test_without_faiss_the_message_says_what_to_install(module: str) -> None:
    code = f"import sys; sys.modules['faiss'] = None\nimport readapt_ray.{module} as loaded\nloaded.faiss_on_threads(1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("readapt_ray.errors.InputError: vector indexes need FAISS, which is not installed"), (
        done.stderr
    )
    assert "readapt-ray[cpu]" in last and "readapt-ray[gpu]" in last


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Two GPUs, of which each is a stand-in that computes on the CPU; the device of each index that was copied there."""
    moved: list[int] = []

    def to_gpu(resources: Any, device: int, flat: Any) -> Any:
        moved.append(device)
        return faiss.clone_index(flat)

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 2)
    monkeypatch.setattr(
        faiss, "StandardGpuResources", lambda: SimpleNamespace(setTempMemory=lambda _: None), raising=False
    )
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", to_gpu, raising=False)
    monkeypatch.setattr("os.getpid", lambda: 41)
    return moved


@pytest.mark.parametrize(
    ("factory", "num_moved"),
    [
        ("IVF8,Flat", 1),
        ("OPQ4,IVF8,PQ4x4", 1),
        ("IVF8,SQfp16", 1),
        ("IVF8,PQ4x4,RFlat", 1),
        ("IVF8_HNSW8,Flat", 0),
        ("HNSW8", 0),
        ("Flat", 0),
    ],
)
def test_vectors_are_added_to_the_same_lists_by_a_gpu(factory: str, num_moved: int, moved: list[int]) -> None:
    vectors = np.random.default_rng(0).standard_normal((1000, 16)).astype(np.float32)
    plain, index = new_index(factory, 16), new_index(factory, 16)
    for each in (plain, index):
        each.train(vectors)
    add = faiss_build.adder(index)
    assert moved == [1] * num_moved
    for first in range(0, 1000, 300):
        plain.add(vectors[first : first + 300])
        add(vectors[first : first + 300])
    np.testing.assert_array_equal(faiss.serialize_index(index), faiss.serialize_index(plain))
    found, wanted = (each.search(vectors[:20], 5)[1] for each in (index, plain))
    np.testing.assert_array_equal(found, wanted)


def test_without_a_gpu_faiss_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = np.random.default_rng(0).standard_normal((200, 16)).astype(np.float32)
    index = new_index("IVF4,Flat", 16)
    index.train(vectors)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", lambda *given: pytest.fail("there is no GPU"), raising=False)
    faiss_build.adder(index)(vectors)
    assert index.ntotal == 200


@pytest.mark.parametrize(("factory", "expected"), [("IVF8,Flat", [1]), ("OPQ4,IVF8,PQ4x4", [1]), ("HNSW8", [])])
def test_k_means_runs_on_a_gpu_and_finds_the_same_lists(factory: str, expected: list[int], moved: list[int]) -> None:
    """The index must not change, nor keep anything of the GPU."""
    vectors = np.random.default_rng(0).standard_normal((1000, 16)).astype(np.float32)
    plain, index = new_index(factory, 16), new_index(factory, 16)
    plain.train(vectors)
    faiss_build.train(index, vectors)
    assert moved == expected
    plain.add(vectors)
    index.add(vectors)
    np.testing.assert_array_equal(faiss.serialize_index(index), faiss.serialize_index(plain))


@pytest.mark.gpu
@pytest.mark.parametrize("factory", ["IVF64,Flat", "OPQ4_32,IVF64,PQ4x4"])
def test_an_index_that_a_gpu_filled_finds_what_one_of_a_cpu_finds(factory: str) -> None:
    if not faiss.get_num_gpus():
        pytest.skip("this FAISS has no GPU: pip install 'readapt-ray[gpu]'")
    vectors = np.random.default_rng(0).standard_normal((20_000, 32)).astype(np.float32)
    plain = new_index(factory, 32)
    plain.train(vectors)
    filled = faiss.clone_index(plain)
    plain.add(vectors)
    faiss_build.adder(filled)(vectors)
    opened = faiss.deserialize_index(faiss.serialize_index(filled))
    truth, found, wanted = (each.search(vectors[:1000], 10)[1] for each in (_flat(vectors), opened, plain))
    recalls = [
        np.mean([len({*mine} & {*its}) / 10 for mine, its in zip(each, truth, strict=True)]) for each in (found, wanted)
    ]
    assert opened.ntotal == 20_000 and abs(recalls[0] - recalls[1]) < 0.005


def _flat(vectors: np.ndarray) -> Any:
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    return index
