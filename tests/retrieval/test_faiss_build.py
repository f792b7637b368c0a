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


@pytest.mark.parametrize(("factory", "expected"), [("IVF8,Flat", [1]), ("OPQ4,IVF8,PQ4x4", [1]), ("HNSW8", [])])
def test_k_means_runs_on_a_gpu_and_finds_the_same_lists(
    factory: str, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU is a stand-in that computes on the CPU: the index must not change, nor keep anything of the GPU."""
    vectors = np.random.default_rng(0).standard_normal((1000, 16)).astype(np.float32)
    plain, index = new_index(factory, 16), new_index(factory, 16)
    plain.train(vectors)
    moved: list[int] = []

    def to_gpu(resources: Any, device: int, flat: Any) -> Any:
        moved.append(device)
        return flat

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 2)
    monkeypatch.setattr(
        faiss, "StandardGpuResources", lambda: SimpleNamespace(setTempMemory=lambda _: None), raising=False
    )
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", to_gpu, raising=False)
    monkeypatch.setattr("os.getpid", lambda: 41)
    faiss_build.train(index, vectors)
    assert moved == expected
    plain.add(vectors)
    index.add(vectors)
    np.testing.assert_array_equal(faiss.serialize_index(index), faiss.serialize_index(plain))
