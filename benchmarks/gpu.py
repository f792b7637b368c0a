"""What one GPU does, in parts of under nine minutes: training, embedding, exact search, weights.

    python benchmarks/gpu.py training --work /dev/shm/gpu          # also embedding, search, weights
    bash benchmarks/gpu.sh                                         # all of them, and the tests of CUDA

Models have the shape of Mistral 7B and random weights; passages are as long as MS MARCO's (log-normal, mean 80 tokens).
Peers run in the same call on the same model and the same texts: plain PEFT DoRA in a Hugging Face Trainer at the paper's
batches of 4, and sentence-transformers at the best of several batch sizes. Floors are measured too: a copy on the device
gives its bandwidth. What does not fit the memory says so in place of its rate. `--shape small` runs anywhere, to try the
script.

--work holds models: 45 GB for `weights`, 15 for `embedding`.
"""

import argparse
import datetime
import functools
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import merging
import numpy as np
import torch
import training
from torch.optim.optimizer import register_optimizer_step_post_hook

from readapt_ray.training.speed import peak_flops

TRAINING: dict[str, dict[str, Any]] = {
    training.BASELINE: {},
    "passage, 4 a step": {"block_tokens": None, "batch_size": 4},
    "passage, 64 a step": {"block_tokens": None, "batch_size": 64},
    "packed, 16k a step, 4k a pass": {"pass_tokens": 4_096},
    "packed, 16k a step, 8k a pass": {"pass_tokens": 8_192},
    "packed, 16k a step, 8k a pass, compiled": {"pass_tokens": 8_192, "compile_layers": True},
    "packed, 16k, compiled": {"compile_layers": True},
    "packed, 16k, checkpointed": {"gradient_checkpointing": True},
    "packed, 32k a step, 8k a pass, compiled": {"tokens": 32_768, "pass_tokens": 8_192, "compile_layers": True},
    "packed, 32k, checkpointed": {"tokens": 32_768, "gradient_checkpointing": True},
    "packed, 32k, checkpointed, compiled": {"tokens": 32_768, "gradient_checkpointing": True, "compile_layers": True},
}
"""The baseline, and our arms: passages one by one, or blocks of 1,024 tokens; a step of `tokens`, in passes of `pass_tokens`.

Kept for the backward pass at this shape, counted: 252 KB a token and layer, 139 compiled. So without checkpointing 80 GB hold
8k tokens a pass, 141 GB 15k, and compiled about twice that. Checkpointing recomputes the forward pass: at most 2/3 of the peak.
"""
PEER_BATCH_SIZES = (16, 32, 64, 128, 256)
NUM_QUERIES = (1, 16, 64, 256, 4096)


def main() -> None:
    """Run one part, print and write what it found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--work", type=Path, required=True, help="folder for models, on the fastest disk")
    parser.add_argument("--shape", choices=training.SHAPES, default="7b")
    parser.add_argument("--num-passages", type=int, default=20_000, help="to embed")
    parser.add_argument("--num-vectors", type=int, default=1_000_000, help="to search")
    parser.add_argument("--steps", type=int, default=10, help="of an arm of training")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="default benchmarks/results/gpu_PART.json")
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(take(options.arm, options)))
        return
    output = options.output or Path(f"benchmarks/results/gpu_{options.part}.json")
    result = {
        "command": f"python benchmarks/gpu.py {options.part}",
        "date": datetime.date.today().isoformat(),
        "hardware": torch.cuda.get_device_name() if has_gpu() else "no GPU",
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "sentence-transformers")},
        "shape": training.SHAPES[options.shape],
        "copy_bytes_per_s": bandwidth(),
        "peak_flops": peak_flops(device()),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    for found in PARTS[options.part](options):  # what was found so far outlasts a time limit
        output.write_text(json.dumps({**result, **found}, indent=2) + "\n")
    print(output.read_text())


def device() -> torch.device:
    """The GPU, where there is one."""
    return torch.device("cuda" if has_gpu() else "cpu")


def has_gpu() -> bool:
    """Whether there is a CUDA device."""
    return torch.cuda.is_available()


def wait() -> None:
    """Until the device is done."""
    if has_gpu():
        torch.cuda.synchronize()


def timed(work: Callable[[], object], *, repeats: int) -> float:
    """Median seconds, the device's work included, after one call that does not count."""
    work()
    seconds = []
    for _ in range(repeats):
        wait()
        started_s = time.perf_counter()
        work()
        wait()
        seconds.append(time.perf_counter() - started_s)
    return statistics.median(seconds)


@functools.cache
def bandwidth() -> float:
    """Bytes a second of a copy on the device, read and written."""
    one = torch.empty((4 << 30) if has_gpu() else (1 << 26), dtype=torch.uint8, device=device()).random_()
    other = torch.empty_like(one)
    found = 2 * one.numel() / timed(functools.partial(other.copy_, one), repeats=10)
    del one, other
    if has_gpu():
        torch.cuda.empty_cache()
    return found


def share_of_peak(flops_per_s: float) -> float | None:
    """MFU; None where the peak is unknown."""
    peak = peak_flops(device())
    return None if peak is None else round(flops_per_s / peak, 3)


def emptied(folder: Path) -> Path:
    """An empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def train(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every arm in a process of its own, which nobody else's memory disturbs."""
    found = {}
    for name in TRAINING:
        command = [sys.executable, __file__, "training", "--arm", name, "--work", str(options.work)]
        command += ["--shape", options.shape, "--steps", str(options.steps)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        found[name] = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"failed": done.returncode}
        rate = found[training.BASELINE].get("tokens_per_s")
        if rate and "tokens_per_s" in found[name]:
            found[name]["times_the_baseline"] = round(found[name]["tokens_per_s"] / rate, 2)
        print(name, found[name], file=sys.stderr, flush=True)
        yield {"goals": {"mfu packed": 0.55, "times the baseline": 3}, "arms": found}


def take(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The child of `train`: text tokens a second, MFU and peak memory of one arm."""
    settings = TRAINING[name]
    vocab_size = training.VOCABULARY[options.shape]
    smaller = 1 if options.shape == "7b" else 8
    tokens = settings.get("tokens", 16_384) // smaller
    rows = training.passages((options.steps + 4) * max(64, tokens // 64), vocab_size)
    dtype = torch.bfloat16
    try:
        model = training.new_model(options.shape, vocab_size, dtype, device())
        if has_gpu():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        if name == training.BASELINE:
            taker: Any = training.Baseline(model, rows, dtype, emptied(options.work / "trainer"))
        else:
            training.join()
            blocks = training.blocks_of(rows, settings.get("block_tokens", 1024))
            size = settings.get("batch_size", max(1, tokens // 1024))
            taker = training.Ours(
                model,
                blocks,
                batch_size=size,
                method="dora",
                dtype=dtype,
                micro_batch_tokens=settings.get("pass_tokens", settings.get("tokens", 16_384)) // smaller,
                gradient_checkpointing=settings.get("gradient_checkpointing", False),
                compile_layers=settings.get("compile_layers", False),
            )
        marks: list[tuple[float, float]] = []
        list(taker.take(3))
        hook = register_optimizer_step_post_hook(functools.partial(training.note, marks))
        steps = list(taker.take(options.steps))
        hook.remove()
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    num_tokens = sum(count for count, _ in steps[1:])
    rate = num_tokens / (marks[-1][0] - marks[0][0])
    return {
        "tokens_per_s": round(rate, 1),
        "mfu": share_of_peak(rate * training.flops_of(options.shape)),
        "peak_bytes": torch.cuda.max_memory_allocated() if has_gpu() else None,
        "tokens_a_step": round(num_tokens / (len(steps) - 1)),
        "losses": [round(loss, 3) for _, loss in steps],
    }


def embed(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Our encoder and sentence-transformers on the same texts and weights."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Pooling, Transformer

    from readapt_ray.catalog.encoding import Encoding
    from readapt_ray.catalog.models import open_model
    from readapt_ray.retrieval.encoder import Encoder

    work = emptied(options.work / "models")
    folder = merging.write_model(work / "retriever", options.shape, 1)
    random = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    lengths = np.clip(random.lognormal(np.log(75), 0.36, options.num_passages), 16, 250).astype(int)
    texts = ["".join(random.choice(letters, length)) for length in lengths]
    num_tokens = int(lengths.sum())

    modules = [
        Transformer(str(folder), model_kwargs={"dtype": torch.bfloat16}, max_seq_length=256),
        Pooling(training.SHAPES[options.shape]["hidden_size"], "lasttoken"),
        Normalize(),
    ]
    peer = SentenceTransformer(modules=modules, device=str(device()))
    few = texts[: options.num_passages // 10]

    def theirs(these: list[str], size: int) -> np.ndarray:
        found = np.asarray(peer.encode(these, batch_size=size, show_progress_bar=False), np.float32)
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    tried = {size: len(few) / timed(functools.partial(theirs, few, size), repeats=1) for size in PEER_BATCH_SIZES}
    best = max(tried, key=lambda size: tried[size])
    started_s = time.perf_counter()
    expected = theirs(texts, best)
    theirs_s = time.perf_counter() - started_s
    peer = modules = None
    if has_gpu():
        torch.cuda.empty_cache()

    encoding = Encoding(pooling="last", add_bos=False, add_eos=False)
    encoder = Encoder.load(open_model(str(folder)), encoding=encoding, dtype="bfloat16", device=str(device()))
    encoder.encode(few, "passage")
    started_s = time.perf_counter()
    ours = encoder.encode(texts, "passage")
    ours_s = time.perf_counter() - started_s
    flops = sum(2 * each.numel() for name, each in encoder.network.named_parameters() if "embed_tokens" not in name)
    shutil.rmtree(work)

    def rates(seconds: float) -> dict[str, Any]:
        return {
            "passages_per_s": round(len(texts) / seconds, 1),
            "tokens_per_s": round(num_tokens / seconds, 1),
            "mfu": share_of_peak(flops * num_tokens / seconds),
        }

    yield {
        "goals": {"mfu": 0.6, "times sentence-transformers": 3},
        "passages": f"{len(texts)}, {num_tokens / len(texts):.0f} tokens each in the mean",
        "sentence-transformers": {**rates(theirs_s), "batch_size": best, "passages_per_s_tried": tried},
        "ours": {
            **rates(ours_s),
            "packed": encoder.is_packed,
            "batch_tokens": encoder.batch_tokens,
            "hours for 8.84M passages": round(8_841_823 / len(texts) * ours_s / 3600, 2),
        },
        "times sentence-transformers": round(theirs_s / ours_s, 2),
        "cosine": {"least": float((ours * expected).sum(1).min()), "mean": float((ours * expected).sum(1).mean())},
    }


def search(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The 100 best of float16 vectors in a served index on the device, and how far the scores are from float32's."""
    from readapt_ray.retrieval.device_index import DeviceIndex
    from readapt_ray.retrieval.half_products import HalfQueries, has_half_products

    dimension, top_k = training.SHAPES[options.shape]["hidden_size"], 100
    generator = torch.Generator(device()).manual_seed(0)

    def directions(count: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(count, dimension, generator=generator, device=device()))

    sizes = [min(50_000, options.num_vectors - first) for first in range(0, options.num_vectors, 50_000)]
    parts = [directions(size).half().cpu().numpy() for size in sizes]
    doc_ids = np.array([f"d{row:08d}" for row in range(options.num_vectors)], object)
    before_s = time.perf_counter()
    index = DeviceIndex(parts, doc_ids, np.ones(len(doc_ids), bool), str(device()))
    wait()
    copying_s = time.perf_counter() - before_s
    some = torch.from_numpy(parts[0][:10_000]).to(device())
    num_bytes = 2 * options.num_vectors * dimension
    floor_s = num_bytes / bandwidth()
    found = {}
    for count in NUM_QUERIES:
        queries = directions(count)
        asked = queries.cpu().numpy()
        seconds = timed(functools.partial(index.search, asked, top_k), repeats=5)
        found[f"{count} queries"] = {
            "ms": round(1e3 * seconds, 3),
            "times the floor": round(seconds / floor_s, 2),
            "largest error": float((HalfQueries(queries).scores(some) - queries @ some.float().T).abs().max()),
        }
    yield {
        "goals": {"one query, times the floor": 1.3},
        "vectors": [options.num_vectors, dimension],
        "top_k": top_k,
        "float16 products": has_half_products(some.device, some.dtype),
        "GB per second copied to the device": round(num_bytes / copying_s / 1e9, 2),
        "floor_ms": 1e3 * floor_s,
        "found": found,
    }


def weights(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """`readapt merge` as a command, and a change of scales in a live model."""
    from readapt_ray.catalog.models import open_model
    from readapt_ray.weights.adapter import Adapter
    from readapt_ray.weights.live_scales import LiveReadapter
    from readapt_ray.weights.loading import load_model
    from readapt_ray.weights.merging import Readapter
    from readapt_ray.weights.weight_files import Checkpoint

    work = emptied(options.work / "models")
    models = [merging.write_model(work / name, options.shape, seed) for seed, name in enumerate(("pre", "retriever"))]
    dora = merging.write_dora(work / "dora", options.shape, models[0])
    merged = merging.measure(merging.ours([*models, dora], work / "output"))
    num_bytes = sum(file.stat().st_size for file in work.glob("*/*.safetensors"))
    shutil.rmtree(work / "output")
    before, after = map(Checkpoint, models)
    network = load_model(open_model(str(models[1])), dtype=torch.bfloat16, device=str(device()))
    live = LiveReadapter(network, Readapter(before, after, [Adapter(dora, before)]))
    scales = iter([(1.0, 0.5), (0.9, 0.4), (1.1, 0.6), (0.8, 0.3), (1.2, 0.7), (1.0, 0.2)])
    in_place_s = timed(lambda: live.set_scales(*next(scales)), repeats=5)
    moved = 3 * sum(each.nbytes for each in network.parameters())
    shutil.rmtree(work)
    yield {
        "goals": {"in place, seconds": 0.5},
        "merge": {**merged, "bytes_read_and_written": num_bytes},
        "in_place": {"seconds": in_place_s, "bytes_read_and_written": moved, "floor_s": moved / bandwidth()},
        "peak_bytes": torch.cuda.max_memory_allocated() if has_gpu() else None,
    }


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[dict[str, Any]]]] = {
    "training": train,
    "embedding": embed,
    "search": search,
    "weights": weights,
}


if __name__ == "__main__":
    main()
