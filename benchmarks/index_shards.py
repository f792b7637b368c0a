"""CPU time of a query in an index cut into shards against one FAISS index of the same kind, one thread, in one run.

    python benchmarks/index_shards.py --work /tmp/index-shards --num-vectors 1000000 --dimension 128 --num-shards 4

Vectors are made: clusters with noise, of length 1. Shards are made by the functions of the tasks of `readapt index`, without
Ray, and searched as a serving process holds them. FAISS trains, adds and is calibrated on all vectors by itself. Recall at 10
and 100 is measured on queries that neither has seen. Writes JSON to --output.
"""

import argparse
import datetime
import gc
import importlib.metadata
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before FAISS is loaded: its own BLAS takes all cores otherwise

from dataclasses import replace

import faiss
import numpy as np

from benchmarks.index import made_vectors, write_artifact
from readapt_ray.cluster.index_shards import RECALL_SUFFIX, NewShard, ShardPlan, _build_shard, _train, cut_shards
from readapt_ray.retrieval.footers import named_footers, row_counts
from readapt_ray.retrieval.index_files import read_shard
from readapt_ray.retrieval.index_kinds import IndexOptions, index_spec, shard_rows
from readapt_ray.retrieval.index_recall import ShardRecall, calibrate, choose_depth
from readapt_ray.retrieval.index_shard import IndexShard, merged, new_index, search_shards, training_sample
from readapt_ray.retrieval.parquet_rows import ParquetRows
from readapt_ray.storage import Location


def main() -> None:
    """Measure every kind that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="new folder for vectors and shards")
    parser.add_argument("--num-vectors", type=int, default=1_000_000)
    parser.add_argument("--dimension", type=int, default=128)
    parser.add_argument("--num-shards", type=int, help="if omitted, as `readapt index` cuts")
    parser.add_argument("--num-queries", type=int, default=200)
    parser.add_argument("--kinds", default="flat,ivf-flat")
    parser.add_argument("--storage", default="float32")
    parser.add_argument("--repeats", type=int, default=3, help="of each search, by turns; the quickest counts")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/index_shards.json"))
    options = parser.parse_args()
    faiss.omp_set_num_threads(1)
    vectors = made_vectors(options.num_vectors, options.dimension)
    write_artifact(options.work / "vectors", vectors, rows_per_file=65_536)
    result = {
        "command": f"python benchmarks/index_shards.py --num-vectors {options.num_vectors} --dimension {options.dimension} "
        f"--num-shards {options.num_shards} --kinds {options.kinds} --storage {options.storage}",
        "date": datetime.date.today().isoformat(),
        "faiss": importlib.metadata.version("faiss-cpu"),
        "kinds": {kind: measured(kind, vectors, options) for kind in options.kinds.split(",")},
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def measured(kind: str, vectors: np.ndarray, options: argparse.Namespace) -> dict[str, Any]:
    """Ratios of one kind."""
    num_vectors, dimension = vectors.shape
    wanted = IndexOptions(kind=kind, storage=options.storage, is_lossless=options.storage == "float32")
    rows_per_shard = -(-num_vectors // options.num_shards) if options.num_shards else shard_rows(wanted, *vectors.shape)
    spec = index_spec(wanted, num_vectors, dimension)
    started_s = time.process_time()
    shards, depth = built(
        ShardPlan(spec, wanted, dimension, "f", Location(str(options.work / kind)), 1), rows_per_shard, options
    )
    build_s = time.process_time() - started_s
    one, one_depth, one_build_s = plain(spec, wanted, vectors)
    queries = made_vectors(options.num_queries, dimension, seed=1)
    truth = np.argsort(-(queries @ vectors.T), axis=1)[:, :100]
    arms = {
        "sharded": lambda: search_shards(shards, queries, 100),
        "one": lambda: search_shards([one], queries, 100),
        "faiss": lambda: one.index.search(queries, 100),
    }
    cpu_s: dict[str, list[float]] = {name: [] for name in arms}
    found: dict[str, Any] = {}
    for _ in range(options.repeats):
        for name, search in arms.items():
            started_s = time.process_time()
            found[name] = search()
            cpu_s[name].append(time.process_time() - started_s)
    best = {name: min(each) for name, each in cpu_s.items()}
    rows = {"sharded": found["sharded"].doc_ids, "one": found["one"].doc_ids}
    return {
        "factory": spec.factory,
        "num_shards": -(-num_vectors // rows_per_shard),
        "num_searched": len(shards),
        "depth": depth,
        "depth_of_one": one_depth,
        "build_cpu_s": round(build_s, 1),
        "build_of_one_cpu_s": round(one_build_s, 1),
        "cpu_ms_per_query": {name: round(1000 * each / len(queries), 3) for name, each in best.items()},
        "ratio_to_faiss": round(best["sharded"] / best["faiss"], 3),
        "ratio_to_one": round(best["sharded"] / best["one"], 3),
        "recall": {name: [recall(each, truth, rank) for rank in (10, 100)] for name, each in rows.items()},
        "identical": bool((rows["sharded"] == rows["one"]).all()),
    }


def built(plan: ShardPlan, rows_per_shard: int, options: argparse.Namespace) -> tuple[list[IndexShard], int | None]:
    """The shards as a serving process holds them, and their depth."""
    folder = Location(str(options.work / "vectors" / "vectors"))
    vectors = ParquetRows(folder, row_counts(named_footers(folder)))
    everything = NewShard(0, 0, vectors, range(vectors.num_rows), plan)
    if not plan.spec.is_exact:
        _train(everything)
    records = [_build_shard(each) for each in cut_shards(plan, vectors, everything.rows, rows_per_shard, first=0)]
    depth = None
    if not plan.spec.is_exact:
        files = [plan.shards / f"{record.name}{RECALL_SUFFIX}" for record in records]
        depth = choose_depth(
            (ShardRecall.from_bytes(file.read_bytes()) for file in files), plan.spec, plan.options
        ).depth
    return merged(read_shard(plan.shards, replace(record, depth=depth)) for record in records), depth


def plain(spec: Any, wanted: IndexOptions, vectors: np.ndarray) -> tuple[IndexShard, int | None, float]:
    """One FAISS index of all vectors, its depth, and the CPU seconds that it took."""
    started_s = time.process_time()
    index = new_index(spec.factory, vectors.shape[1])
    if not index.is_trained:
        index.train(training_sample(vectors, index))
    index.add(vectors)
    depth = None if spec.is_exact else calibrate(index, vectors, spec, wanted).depth
    seconds = time.process_time() - started_s
    gc.collect()
    return IndexShard(index, np.array([f"d{row:08d}" for row in range(len(vectors))], object)), depth, seconds


def recall(doc_ids: np.ndarray, truth: np.ndarray, rank: int) -> float:
    """Share of the exact best that was found."""
    pairs = zip(doc_ids[:, :rank], truth[:, :rank], strict=True)
    return round(float(np.mean([len(set(found) & {f"d{row:08d}" for row in due}) / rank for found, due in pairs])), 4)


if __name__ == "__main__":
    main()
