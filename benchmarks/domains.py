"""Measure what one encoder for many domains costs, against one merged model.

    python benchmarks/domains.py --work DIR
    python benchmarks/domains.py --work DIR --smollm WORK

The model is BERT in the shape of all-MiniLM-L6-v2 (6 layers, 384 wide) with random weights; each domain is a DoRA adapter
of rank 32 on query, key, value, up and down projections. Texts have 64 tokens, batches 1,024. Reported are: texts per
second with one domain and with texts spread over 20, relative to a merged model (the three take turns, and the fastest
of the rounds counts), for a LoRA retriever and one of full weights, in float32 and bfloat16, on `--threads` threads; the
memory of each domain relative to its adapter's file; the seconds that a first request to a cold domain waits; and the
seconds in which 20 and 1,000 domains are read and checked when a server starts.

`--smollm` measures the same on a real pair besides: SmolLM2-135M, its LoRA retriever and Cranfield's adapter, on passages of
Cranfield, with the least cosine of a domain's vectors and the merged model's. WORK is what `bash benchmarks/smollm/run.sh DATA WORK
model domain:cranfield` leaves, of which it reads `pretrained`, `retriever`, `cranfield/adapter-seed0`, `cranfield/adapted-seed0` and
`cranfield/corpus`. Without `--smollm` the results keep what was measured of it before.
"""

import argparse
import datetime
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from readapt_ray import hardware
from readapt_ray.catalog.models import open_model
from readapt_ray.retrieval.domain_encoder import DomainEncoder
from readapt_ray.retrieval.encoder import DTYPES, Encoder
from readapt_ray.stages.merge import MergeConfig, merge
from readapt_ray.weights.domain_layers import DomainUse
from readapt_ray.weights.domain_sources import DomainSource, check_domains, fetched_adapters, read_domains

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests import factories

NUM_DOMAINS, RANK, TEXT_TOKENS = 20, 32, 64
NUM_REGISTERED = (20, 1000)
NUM_TEXTS, NUM_ROUNDS = 80, 9
NUM_PASSAGES, NUM_PAIR_ROUNDS = 40, 3
DTYPE_NAMES = ("float32", "bfloat16")
GOALS = {"lora": 0.7, "full": 0.45}


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--smollm", type=Path, help="WORK of benchmarks/smollm/run.sh, after its step domain:cranfield")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/domains.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    before = json.loads(options.output.read_text()) if options.output.is_file() else {}
    real = real_pair(options.smollm, options.work) if options.smollm else before.get("real_pair")
    models = make_models(options.work)
    results: dict[str, Any] = {
        "command": "python benchmarks/domains.py --work DIR",
        "date": datetime.date.today().isoformat(),
        "machine": hardware.machine_info(),
        "threads": options.threads,
        "torch": version("torch"),
        "goals": GOALS | {"memory": 1.1},
        "throughput": [of_shape(models, kind, dtype) for kind in GOALS for dtype in DTYPE_NAMES],
        "start_s": {str(number): start_s(models, number) for number in NUM_REGISTERED},
    }
    results |= {"real_pair": real} if real else {}
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))
    shutil.rmtree(options.work)


def make_models(work: Path) -> Path:
    """Make a base, two retrievers, one merged model and one bundle of each, and the adapters of 20 domains."""
    import transformers

    base = work / "base"
    config = transformers.BertConfig(
        vocab_size=384, hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12
    )
    torch.manual_seed(0)
    transformers.BertForMaskedLM(config).save_pretrained(base)
    factories.encoder_tokenizer().save_pretrained(base)
    retrievers = {
        "full": factories.full_retriever(work / "full", base),
        "lora": factories.lora_adapter(work / "lora", base, rank=16, size=0.02),
    }
    adapter = factories.dora_adapter(work / "adapter", base, rank=RANK, size=0.02)
    for kind, retriever in retrievers.items():
        factories.write_contract(retriever, pooling="mean", max_passage_tokens=TEXT_TOKENS)
        given = {"pretrained": str(base), "retriever": str(retriever), "adapter": str(adapter)}
        merge(MergeConfig(**given, output=str(work / f"{kind}-merged"), dtype="float32"))
        merge(MergeConfig(**given, output=str(work / f"{kind}-factors"), factors=True))
    return work


def of_shape(work: Path, kind: str, dtype: str) -> dict[str, Any]:
    """Measure the models that were made here, on random tokens."""
    merged = Encoder.load(open_model(str(work / f"{kind}-merged")), dtype=dtype, packed=True)
    rows = torch.randint(5, 384, (NUM_TEXTS, TEXT_TOKENS), generator=torch.Generator().manual_seed(0)).tolist()
    return throughput(merged, work / "base", work / f"{kind}-factors", rows, kind=kind, dtype=dtype, rounds=NUM_ROUNDS)


def real_pair(study: Path, work: Path) -> dict[str, Any]:
    """Measure SmolLM2, and how near a domain's vectors are to the merged model's."""
    domain = study / "cranfield"
    factors = work / "smollm-factors"
    given = {"pretrained": str(study / "pretrained"), "retriever": str(study / "retriever")}
    merge(MergeConfig(**given, adapter=str(domain / "adapter-seed0"), output=str(factors), factors=True))
    (file, *_) = sorted((domain / "corpus/passages").glob("*.parquet"))
    texts = pq.read_table(file, columns=["title", "text"]).slice(0, NUM_PASSAGES).to_pydict()
    found = []
    for dtype in DTYPE_NAMES:
        merged = Encoder.load(open_model(str(domain / "adapted-seed0")), dtype=dtype, packed=True)
        rows = merged.tokenize(texts["text"], "passage", [each or "" for each in texts["title"]])
        base = study / "pretrained"
        found.append(throughput(merged, base, factors, rows, kind="lora", dtype=dtype, rounds=NUM_PAIR_ROUNDS))
    return {
        "command": "python benchmarks/domains.py --work DIR --smollm WORK",
        "date": datetime.date.today().isoformat(),
        "what": f"SmolLM2-135M, its LoRA retriever and Cranfield's adapter, on {NUM_PASSAGES} passages of Cranfield",
        "throughput": found,
    }


def throughput(
    merged: Encoder, base: Path, factors: Path, rows: list[list[int]], *, kind: str, dtype: str, rounds: int
) -> dict[str, Any]:
    """Encode the same texts with a merged model, with one domain and with 20.

    Args:
        merged: the merged model.
        base: folder of the pretrained model.
        factors: folder of the domain.
        rows: token ids of the texts, a multiple of 20.
        kind: of the retriever.
        dtype: that all compute in.
        rounds: of which the fastest counts.
    """
    (record,) = read_domains({"domain": str(factors)})
    encoder = DomainEncoder(
        open_model(str(factors)),
        open_model(str(base)),
        retriever_fingerprint=record.retriever_fingerprint,
        dtype=dtype,
        max_bytes=1 << 34,
    )
    cold_s = [load_s(encoder, record.source, number) for number in range(NUM_DOMAINS)]
    domains = [encoder.find(_numbered(record.source, number)) for number in range(NUM_DOMAINS)]
    uses = [DomainUse(each, record.source.scales) for each in domains if each is not None]
    spread = uses * (len(rows) // NUM_DOMAINS)
    work_of: dict[str, Callable[[], object]] = {
        "merged": lambda: merged.encode_ids(rows),
        "one_domain": lambda: encoder.encoder.encode_ids(rows, uses[:1] * len(rows)),
        "twenty_domains": lambda: encoder.encoder.encode_ids(rows, spread),
    }
    best = {name: len(rows) / seconds for name, seconds in fastest(work_of, rounds).items()}
    whole, parts = merged.encode_ids(rows), encoder.encoder.encode_ids(rows, spread)
    lengths = np.linalg.norm(whole, axis=1) * np.linalg.norm(parts, axis=1)
    file = factors / "knowledge-1/adapter_model.safetensors"
    width = DTYPES[dtype].itemsize / torch.float32.itemsize
    return {
        "retriever": kind,
        "dtype": dtype,
        "texts_per_s": {name: round(value, 2) for name, value in best.items()},
        "relative_to_merged": {name: round(value / best["merged"], 3) for name, value in best.items()},
        "goal": GOALS[kind],
        "least_cosine": round(float(((whole * parts).sum(axis=1) / lengths).min()), 8),
        "bytes_per_domain": uses[1].domain.num_bytes,
        "relative_to_factors": round(uses[1].domain.num_bytes / (file.stat().st_size * width), 3),
        "cold_domain_s": {"first": round(cold_s[0], 3), "further": round(sorted(cold_s[1:])[NUM_DOMAINS // 2], 3)},
    }


def load_s(encoder: DomainEncoder, source: DomainSource, number: int) -> float:
    """Bring a domain into memory; return the seconds that it took."""
    before_s = time.perf_counter()
    with fetched_adapters(source, encoder.base) as adapters:
        for _ in encoder.load(_numbered(source, number), adapters):
            pass
    return time.perf_counter() - before_s


def _numbered(source: DomainSource, number: int) -> DomainSource:
    """Return one of many domains of the same factors, which are in memory as often as there are domains."""
    return replace(source, name=f"domain-{number}", fingerprint=f"{source.fingerprint}-{number}")


def fastest(work_of: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the seconds of the fastest round of each; all take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in work_of}
    for _ in range(rounds):
        for name, run in work_of.items():
            before_s = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - before_s)
    return {name: min(found) for name, found in seconds.items()}


def start_s(work: Path, number: int) -> float:
    """Return the seconds in which a server reads and checks so many domains before it starts."""
    folder = work / "lora-factors"
    folders = {}
    for each in range(number):
        copy = work / "registered" / str(each)
        copy.mkdir(parents=True, exist_ok=True)
        for name in ("manifest.json", "bundle.json"):
            shutil.copy(folder / name, copy / name)
        folders[f"domain-{each}"] = str(copy)
    base = open_model(str(work / "base"))
    before_s = time.perf_counter()
    check_domains(read_domains(folders), base)
    return round(time.perf_counter() - before_s, 3)


if __name__ == "__main__":
    main()
