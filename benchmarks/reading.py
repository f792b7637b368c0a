"""How long training waits for its data: blocks through Ray Data to Ray Train workers whose step is a pause.

    python benchmarks/reading.py

Each step takes 16,384 tokens per worker and pauses 50 ms, which is faster than a GPU trains any model of 100 million
parameters or more. Workers reserve all logical CPUs, as on a machine without a GPU, so Ray Data has the rest of what
the operating system gives. The wait before the first step (Ray Data starts its processes, while a real worker loads
its model) is given apart. Writes JSON to --output.
"""

import argparse
import datetime
import json
import logging
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from readapt_ray import hardware
from readapt_ray.storage import Location
from readapt_ray.training import packing
from readapt_ray.training.blocks import list_row_groups
from readapt_ray.training.checkpoints import DataOrder
from readapt_ray.training.shares import BatchSettings

STEP_TOKENS, BLOCK_TOKENS, STEP_S = 16_384, 1024, 0.05


def main() -> None:
    """Measure one and two workers."""
    import ray

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="per number of workers")
    parser.add_argument("--workers", default="1,2", help="numbers of workers, separated by commas")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/reading.json"))
    options = parser.parse_args()
    ray.init("local", include_dashboard=False, logging_level=logging.WARNING, log_to_driver=False)
    counts = [int(each) for each in options.workers.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        write_blocks(Path(folder) / "blocks", options.steps * max(counts) * STEP_TOKENS)
        found = {f"{count} workers": measured(Path(folder), count, options.steps) for count in counts}
    result = {
        "command": "python benchmarks/reading.py",
        "date": datetime.date.today().isoformat(),
        "hardware": hardware.machine_info()["driver"],
        "versions": {name: version(name) for name in ("ray", "pyarrow")},
        "tokens per worker and step": STEP_TOKENS,
        "pause per step, s": STEP_S,
        **found,
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def write_blocks(folder: Path, num_tokens: int) -> None:
    """Packed passages of 80 tokens, in files of 65,536 passages."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for index, first in enumerate(range(0, num_tokens // 80, 65_536)):
        rows = [(first + n, random.integers(0, 30_000, 80).tolist()) for n in range(65_536)]
        made = list(packing.pack(rows, mode="packed", block_tokens=BLOCK_TOKENS))
        file = folder / f"part-{index:05d}.parquet"
        pq.write_table(packing.blocks_to_table(made, index << 32), file, row_group_size=256, compression="zstd")


def measured(folder: Path, num_workers: int, num_steps: int) -> list[dict[str, Any]]:
    """What each worker waited."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from readapt_ray.cluster.block_stream import BlockStream

    row_groups = list_row_groups(Location(str(folder / "blocks")))
    batch_size = STEP_TOKENS // BLOCK_TOKENS * num_workers
    data_order = DataOrder(num_units=row_groups.num_blocks, batch_size=batch_size, num_epochs=9, seed=0)
    batch_settings = BatchSettings(pad_id=0, micro_batch_tokens=STEP_TOKENS)
    stream = BlockStream(row_groups, data_order, batch_settings, Location(str(folder / "checkpoints")))
    TorchTrainer(
        consume,
        train_loop_config={"num_steps": num_steps, "folder": str(folder)},
        datasets={stream.name: stream.no_dataset},
        dataset_config=stream,
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            resources_per_worker={"CPU": int(ray.cluster_resources()["CPU"]) // num_workers},
        ),
        run_config=RunConfig(storage_path=str(folder / "runs"), name=str(num_workers)),
    ).fit()
    return [json.loads((folder / f"waited-{rank}.json").read_text()) for rank in range(num_workers)]


def consume(config: dict[str, Any]) -> None:
    """Pause in place of each step, and write down how long the data let this worker wait."""
    import ray.train

    from readapt_ray.cluster import block_stream

    begun_s = time.monotonic()
    shares = block_stream.receive(config["num_steps"])(0)
    first = next(shares)
    first_s = time.monotonic()
    waited_s, num_tokens = 0.0, first.num_tokens
    for _ in range(config["num_steps"] - 1):
        time.sleep(STEP_S)
        asked_s = time.monotonic()
        num_tokens += next(shares).num_tokens
        waited_s += time.monotonic() - asked_s
    took_s = time.monotonic() - first_s
    rank = ray.train.get_context().get_world_rank()
    found = {
        "before the first step, s": round(first_s - begun_s, 2),
        "share of the time waited": round(waited_s / took_s, 5),
        "tokens per s, all workers": round(num_tokens / took_s),
    }
    (Path(config["folder"]) / f"waited-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
