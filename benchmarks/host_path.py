"""Measure what `readapt embed` does beside the model: reading, tokenising, batching and writing, against the bare tokenizer.

    python -m benchmarks.host_path --passages corpus.jsonl --work DIR

One process, one thread: the stage's own tasks one after the other, with a forward pass that returns at once. The bare tokenizer
is the Rust one of all-MiniLM-L6-v2 on the same texts, without reading its ids. Both are given in tokens per second of a core;
a GPU whose model takes more than the cores of its share give waits for them. Sizes of vectors: those of MiniLM and of bge-base.
"""

import argparse
import datetime
import json
import os
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pyarrow.parquet as pq
import pytest
import torch

from benchmarks.serving import model_folder
from readapt_ray import hardware
from readapt_ray.catalog.models import open_model
from readapt_ray.cluster import shard_runner
from readapt_ray.cluster.shard_encoder import ShardEncoder
from readapt_ray.cluster.shard_source import ShardSource
from readapt_ray.retrieval.encoder import Encoder
from readapt_ray.retrieval.tokenization import TextTokenizer, _backend_copy
from readapt_ray.stages.embed import EmbedConfig, embed
from readapt_ray.stages.ingest import IngestConfig, ingest
from tests.recipes.refreshing.in_process import without_ray

DIMENSIONS = {"all-MiniLM-L6-v2": 384, "bge-base": 768}
GOAL = 0.7
NUM_ROUNDS = 3


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=Path, required=True, help="JSON lines with `_id` and `text`")
    parser.add_argument("--work", type=Path, required=True, help="new folder for corpus and vectors")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/host_path.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        corpus = ingest(IngestConfig(source=str(options.passages), output=str(options.work / "corpus")))
    texts = pq.read_table(options.work / "corpus/passages")["text"].to_pylist()
    model = open_model(str(model_folder()))
    num_tokens = sum(map(len, TextTokenizer(model.tokenizer, model.encoding).ids(texts, "passage")))
    rates: dict[str, list[float]] = {"bare tokenizer": []} | {name: [] for name in DIMENSIONS}
    for number in range(NUM_ROUNDS):
        rates["bare tokenizer"].append(num_tokens / bare_s(model.tokenizer, texts))
        for name, dimension in DIMENSIONS.items():
            output = options.work / f"{name}-{number}"
            rates[name].append(num_tokens / path_s(corpus.uri, output, dimension))
    best = {name: max(found) for name, found in rates.items()}
    results = {
        "command": "python -m benchmarks.host_path --passages FILE --work DIR",
        "date": datetime.date.today().isoformat(),
        "hardware": hardware.machine_info()["driver"],
        "versions": {name: version(name) for name in ("tokenizers", "pyarrow", "torch")},
        "num_passages": len(texts),
        "num_tokens": num_tokens,
        "tokens per second of a core": {name: [round(each) for each in found] for name, found in rates.items()},
        "share of the bare tokenizer": {name: round(best[name] / best["bare tokenizer"], 3) for name in DIMENSIONS},
        "goal": GOAL,
    }
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


def bare_s(tokenizer: Any, texts: list[str]) -> float:
    """Return the CPU seconds in which the Rust tokenizer takes the texts."""
    backend = _backend_copy(tokenizer)
    before_s = time.process_time()
    backend.encode_batch_fast(texts, add_special_tokens=False)
    return time.process_time() - before_s


def path_s(corpus: str, output: Path, dimension: int) -> float:
    """Return the CPU seconds of everything that is done for each passage beside the forward pass."""
    taken_s: list[float] = []

    def results(pending: Any, job: Any, _: Any) -> Iterator[dict[str, Any]]:
        encoder = ShardEncoder(job)
        encoder._loaded()
        before_s = time.process_time()
        for task in ShardSource(pending, job, tokenizes=True).get_read_tasks():
            for row in task():
                yield encoder(row).to_pylist()[0]
        taken_s.append(time.process_time() - before_s)

    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        patch.setattr(shard_runner, "_results", results)
        patch.setattr(Encoder, "_forward", lambda _, rows, __: torch.ones(len(rows), dimension))
        patch.setattr(Encoder, "dimension", dimension)
        patch.setattr(Encoder, "_check_sizes", lambda *_: None)
        embed(EmbedConfig(retriever=str(model_folder()), corpus=corpus, output=str(output), dtype="float32"))
    return taken_s[0]


if __name__ == "__main__":
    main()
