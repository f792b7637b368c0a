"""Build and search of an index against plain FAISS on the same vectors, one thread each, in one run.

    python benchmarks/index.py --work /tmp/index-benchmark

Vectors are made: clusters with noise, of length 1. FAISS gets them in memory; `readapt` reads them from the files
that `readapt embed` leaves, verifies checksums, and looks ids up, all of which counts. What Ray takes to start is
told apart. Writes JSON to --output.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before FAISS is loaded: its own BLAS takes all cores otherwise

import faiss
import numpy as np
import pyarrow as pa

from readapt_ray import artifacts
from readapt_ray.config import StageConfig
from readapt_ray.retrieval.index_kinds import IndexOptions, index_spec
from readapt_ray.retrieval.index_shard import search_shards
from readapt_ray.retrieval.vector_files import to_stored_columns, write_stored
from readapt_ray.retrieval.vector_index import VectorIndex
from readapt_ray.stages.index import IndexConfig, index

ENCODER = {"fingerprint": "f" * 32, "model": "made", "dtype": "float32", "encoding": {}}
TOP_K = 100


def main() -> None:
    """Measure every kind that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="new folder for vectors and indexes")
    parser.add_argument("--num-vectors", type=int, default=100_000)
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--num-queries", type=int, default=500)
    parser.add_argument("--kinds", default="flat,ivf-flat")
    parser.add_argument("--repeats", type=int, default=3, help="of each search; the quickest counts")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/index.json"))
    options = parser.parse_args()
    os.environ.setdefault("READAPT_NUM_CPUS", "1")
    faiss.omp_set_num_threads(1)
    vectors = made_vectors(options.num_vectors, options.dimension)
    queries = made_vectors(options.num_queries, options.dimension, seed=1)
    write_artifact(options.work / "vectors", vectors)
    started_s = time.perf_counter()
    from readapt_ray.cluster import connection

    connection.connect()
    ray_s = time.perf_counter() - started_s
    result = {
        "command": f"python benchmarks/index.py --num-vectors {options.num_vectors} --dimension {options.dimension} "
        f"--num-queries {options.num_queries} --kinds {options.kinds}",
        "date": datetime.date.today().isoformat(),
        "hardware": f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores, one used",
        "versions": {name: importlib.metadata.version(name) for name in ("faiss-cpu", "ray", "pyarrow", "numpy")},
        "vectors": f"{options.num_vectors} x {options.dimension}, made",
        "ray_start_s": round(ray_s, 2),
        "kinds": {
            kind: measured(kind, vectors, queries, options.work, options.repeats) for kind in options.kinds.split(",")
        },
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def made_vectors(num_vectors: int, dimension: int, *, seed: int = 0) -> np.ndarray:
    """Clusters with noise, [N, D], of length 1; the clusters are the same for every seed."""
    centres = np.random.default_rng(7).normal(size=(1000, dimension)).astype(np.float32)
    random = np.random.default_rng(seed)
    vectors = centres[random.integers(0, len(centres), num_vectors)]
    vectors += random.normal(size=vectors.shape).astype(np.float32)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def write_artifact(folder: Path, vectors: np.ndarray, rows_per_file: int = 4096) -> None:
    """What `readapt embed` would leave of these vectors."""
    encoder = {**ENCODER, "dimension": vectors.shape[1]}

    def write(workspace: artifacts.Workspace) -> None:
        for number, first in enumerate(range(0, len(vectors), rows_per_file)):
            rows = range(first, min(first + rows_per_file, len(vectors)))
            ids = [f"d{row:08d}" for row in rows]
            hashes = pa.array([row.to_bytes(16) for row in rows], pa.binary(16))
            location = workspace.location / "vectors" / f"part-{number:05d}.parquet"
            stored = to_stored_columns(ids, vectors[rows.start : rows.stop], "float32")
            write_stored(location, ids, stored, hashes, metadata={"encoder": encoder})
        workspace.counts["num_vectors"] = len(vectors)
        workspace.details |= {"encoder": encoder, "vector_dtype": "float32"}

    artifacts.produce("embed", StageConfig(output=str(folder)), inputs={"corpus": "made"}, work=write)


def measured(kind: str, vectors: np.ndarray, queries: np.ndarray, work: Path, repeats: int) -> dict[str, Any]:
    """Times of one kind, ours and FAISS's, and whether sharded results are those of one index."""
    made = index_spec(IndexOptions(kind=kind), len(vectors), vectors.shape[1])
    plain = faiss.index_factory(vectors.shape[1], made.factory, faiss.METRIC_INNER_PRODUCT)

    def build_plain() -> None:
        plain.train(vectors)
        plain.add(vectors)

    faiss_build_s = timed(build_plain)
    one = {"vectors": str(work / "vectors"), "kind": kind, "rows_per_shard": len(vectors)}
    started_s = time.perf_counter()
    artifact = index(IndexConfig(output=str(work / kind), **one))
    build_s = time.perf_counter() - started_s
    shards = list(VectorIndex.open(artifact.uri).shards())
    depth = (artifact.manifest.details["shards"][0]["measured"] or {}).get("depth")
    if depth:
        faiss.ParameterSpace().set_index_parameter(plain, made.depth_parameter, depth)
    faiss_search_s = min(timed(lambda: plain.search(queries, TOP_K)) for _ in range(repeats))
    search_s = min(timed(lambda: search_shards(shards, queries, TOP_K)) for _ in range(repeats))
    result: dict[str, Any] = {
        "factory": made.factory,
        "depth": depth,
        "faiss_build_s": round(faiss_build_s, 3),
        "build_s": round(build_s, 3),
        "faiss_search_ms_per_query": round(1000 * faiss_search_s / len(queries), 3),
        "search_ms_per_query": round(1000 * search_s / len(queries), 3),
        "search_ratio": round(search_s / faiss_search_s, 3),
        "measured": artifact.manifest.details.get("measured"),
    }
    if kind == "flat":
        sharded = index(IndexConfig(**one | {"output": str(work / "sharded"), "rows_per_shard": len(vectors) // 5}))
        ours = VectorIndex.open(sharded.uri).search(queries, TOP_K)
        scores, rows = plain.search(queries, TOP_K)
        # Of equal scores we give the lower doc_id first, FAISS whichever its heap had.
        theirs = np.array([[f"d{row:08d}" for row in each] for each in rows], dtype=object)
        tied = np.array([np.isin(each, each[1:][each[1:] == each[:-1]]) for each in scores])
        result["sharded_is_identical"] = bool(
            ((ours.doc_ids == theirs) | tied).all() and np.abs(ours.scores - scores).max() < 1e-5
        )
    return result


def timed(work: Callable[[], Any]) -> float:
    """Seconds that it takes."""
    started_s = time.perf_counter()
    work()
    return time.perf_counter() - started_s


if __name__ == "__main__":
    main()
