"""What `tune` over 25 pairs of scales costs beside what it cannot do without: 25 times writing the weights and encoding.

    python benchmarks/tuning.py --root /tmp/tuning --source DIR/nfcorpus --adapter ADAPTER

The quickstart's pair and any adapter of it, over every passage and judged query of a BEIR folder, in bfloat16 on one core.
What it cannot do without is timed first, in a process of its own: the median over three pairs of writing the scales into a
live model and encoding the corpus. The command's time is that from call to return, Ray running already; the models' loading,
the matrix of scores, the measure and the report are in it. Goal: at most 10% more. Six minutes on two idle cores.
"""

import argparse
import datetime
import json
import logging
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq

import readapt_ray as ra
from readapt_ray import hardware
from readapt_ray.cluster import connection

PRETRAINED, RETRIEVER = "quickstart-pretrained", "quickstart-retriever"
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5), (0.0, 0.25, 0.5, 0.75, 1.0)
NUM_PAIRS = 25
TIMED = ((1.0, 0.1), (0.9, 0.6), (1.1, 0.3))


def main() -> None:
    """Time the parts, then the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="folder of the artifacts")
    parser.add_argument("--source", required=True, help="a BEIR folder with judgements of its split test")
    parser.add_argument("--adapter", required=True, help="a knowledge adapter of the quickstart's pretrained model")
    parser.add_argument("--parts", action="store_true", help="only time the parts, and print them")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/tuning.json"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    corpus = ra.ingest(ra.IngestConfig(source=options.source, output=f"{options.root}/corpus"))
    if options.parts:
        print(json.dumps(parts(corpus.uri, options.adapter)))
        return
    timed = subprocess.run([sys.executable, *sys.argv, "--parts"], check=True, stdout=subprocess.PIPE, text=True)
    floor = json.loads(timed.stdout.splitlines()[-1])
    connection.connect()
    started_s = time.monotonic()
    tuned = ra.tune(
        ra.TuneConfig(
            pretrained=PRETRAINED,
            retriever=RETRIEVER,
            adapter=options.adapter,
            corpus=corpus.uri,
            queries=f"{corpus.uri}/queries",
            qrels=f"{corpus.uri}/qrels/test.parquet",
            readapter_scales=SCALES[0],
            knowledge_scales=SCALES[1],
            num_refinements=0,
            dtype="bfloat16",
            num_workers=1,
            overwrite=True,
            output=f"{options.root}/tuned",
        )
    )
    spent_s = time.monotonic() - started_s
    assert tuned.manifest.counts["num_pairs"] == NUM_PAIRS
    floor_s = NUM_PAIRS * (floor["weights_s"] + floor["encoding_s"])
    result = {
        "command": "python benchmarks/tuning.py",
        "date": datetime.date.today().isoformat(),
        "hardware": hardware.machine_info()["driver"],
        "versions": corpus.manifest.versions,
        "counts": tuned.manifest.counts,
        "a_pair": floor,
        "25_pairs_s": floor_s,
        "command_s": spent_s,
        "ratio": spent_s / floor_s,
        "parts_of_the_command_s": tuned.manifest.details["seconds"],
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def parts(corpus: str, adapter: str) -> dict[str, float]:
    """Median seconds of writing a pair of scales, and of encoding the passages and judged queries."""
    import torch

    from readapt_ray.catalog import models
    from readapt_ray.retrieval.encoder import Encoder
    from readapt_ray.sources.judgements import keep_judged, read_qrels, read_queries
    from readapt_ray.weights.adapter import Adapter
    from readapt_ray.weights.live_scales import LiveReadapter
    from readapt_ray.weights.merging import Readapter, open_retriever
    from readapt_ray.weights.weight_files import Checkpoint

    torch.set_num_threads(1)
    pretrained, retriever, knowledge = (models.open_model(name) for name in (PRETRAINED, RETRIEVER, adapter))
    encoder = Encoder.load(retriever, dtype="bfloat16")
    before = Checkpoint(pretrained.folder)
    after = open_retriever(retriever.folder, before, name=retriever.name)
    live = LiveReadapter(encoder.network, Readapter(before, after, [Adapter(knowledge.folder, before)]))
    table = pq.read_table(f"{corpus}/passages", columns=["title", "text"]).to_pydict()
    queries = keep_judged(read_queries(f"{corpus}/queries"), read_qrels(f"{corpus}/qrels/test.parquet"))
    rows = encoder.tokenize(table["text"], "passage", table["title"])
    rows += encoder.tokenize([query.text for query in queries], "query")
    marks = []
    for pair in TIMED:
        started_s = time.monotonic()
        live.set_scales(*pair)
        written_s = time.monotonic()
        encoder.encode_ids(rows)
        marks.append((written_s - started_s, time.monotonic() - written_s))
    weights, encoding = (statistics.median(each) for each in zip(*marks, strict=True))
    return {"weights_s": weights, "encoding_s": encoding}


if __name__ == "__main__":
    main()
