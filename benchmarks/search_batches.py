"""Measure what it gives that a slice of a served index searches what waits together: searches per second at 1 and 64 clients.

    python benchmarks/search_batches.py --num-vectors 1000000 --dimension 768

One process, as a slice of `readapt serve` searches: each client sends the next query when it has the answer to the last.
"one by one" is the same with a search per request. Vectors are generated; both cores.
"""

import argparse
import asyncio
import datetime
import functools
import json
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from readapt_ray import hardware
from readapt_ray.retrieval.exact import Hits
from readapt_ray.retrieval.faiss_build import faiss
from readapt_ray.retrieval.index_shard import IndexShard, new_index
from readapt_ray.serving.index_slice import IndexSlice
from readapt_ray.serving.search_batches import Search, SearchBatches

CLIENTS = (1, 64)
GOALS = {"Flat": 8.0, "IVF1024,Flat": 1.5}
TOP_K = 10


def main() -> None:
    """Measure each kind, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-vectors", type=int, default=1_000_000)
    parser.add_argument("--dimension", type=int, default=768)
    parser.add_argument("--seconds", type=float, default=10.0, help="of load for each figure (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/search_batches.json")
    options = parser.parse_args()
    random = np.random.default_rng(0)
    vectors = random.standard_normal((options.num_vectors, options.dimension), dtype=np.float32)
    queries = vectors[random.integers(0, len(vectors), 1000)] + random.standard_normal(
        (1000, options.dimension), dtype=np.float32
    )
    results: dict[str, Any] = {
        "command": f"python benchmarks/search_batches.py --num-vectors {len(vectors)} --dimension {options.dimension}",
        "date": datetime.date.today().isoformat(),
        "hardware": hardware.machine_info()["driver"],
        "versions": {"faiss-cpu": version("faiss-cpu"), "numpy": version("numpy")},
        "searches per second": {},
    }
    for factory, goal in GOALS.items():
        found = asyncio.run(measured(slice_of(factory, vectors), queries, options.seconds))
        ratio = found["together"]["64 clients"] / found["one by one"]["64 clients"]
        results["searches per second"][factory] = found | {"ratio at 64 clients": round(ratio, 1), "goal": goal}
        print(json.dumps({factory: results["searches per second"][factory]}), flush=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n")


def slice_of(factory: str, vectors: NDArray[np.float32]) -> IndexSlice:
    """Make an index of one kind."""
    index = new_index(factory, vectors.shape[1])
    if not index.is_trained:
        index.train(vectors[:65_536])
        faiss.extract_index_ivf(index).nprobe = 16
    index.add(vectors)
    return IndexSlice.of([IndexShard(index, np.array([f"d{row}" for row in range(len(vectors))], object))])


async def measured(held: IndexSlice, queries: NDArray[np.float32], seconds: float) -> dict[str, dict[str, float]]:
    """Return searches per second, together and one by one."""
    pool = ThreadPoolExecutor(1)

    async def alone(asked: NDArray[np.float32], top_k: int) -> Hits:
        return await asyncio.get_running_loop().run_in_executor(pool, functools.partial(held.search, asked, top_k))

    ways: dict[str, Search] = {"one by one": alone, "together": SearchBatches(alone)}
    return {
        name: {f"{clients} clients": await rate(search, queries, clients, seconds) for clients in CLIENTS}
        for name, search in ways.items()
    }


async def rate(search: Search, queries: NDArray[np.float32], clients: int, seconds: float) -> float:
    """Return the searches per second of so many clients."""
    num_done, before_s = 0, time.perf_counter()

    async def client(number: int) -> None:
        nonlocal num_done
        while time.perf_counter() - before_s < seconds:
            place = (number * 131 + num_done) % len(queries)
            await search(queries[place : place + 1], TOP_K)
            num_done += 1

    await asyncio.gather(*map(client, range(clients)))
    return round(num_done / (time.perf_counter() - before_s), 2)


if __name__ == "__main__":
    main()
