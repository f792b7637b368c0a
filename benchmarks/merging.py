"""Merging, side by side: `readapt merge`, mergekit's `task_arithmetic`, and a plain copy of the same bytes.

    python benchmarks/merging.py --work FOLDER [--mergekit PATH/mergekit-yaml] [--shapes 1b,7b] [--repeats 3]

Makes models of random bfloat16 weights in FOLDER (1b: 12 GB with the outputs, 7b: 45 GB; removed
afterwards), runs every program in a process of its own, in turn, and writes wall time, processor
time and peak memory of each run to benchmarks/results/merging.json, with a table of errors against
float64 on a small shape. mergekit lives in an environment of its own: `pip install mergekit` there.

The copy reads what the merge reads and writes what it writes, and waits for the disk as the merge
does (`fsync`); the same without waiting is given besides. mergekit does not wait.
"""

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from readapt_ray.weights.weight_files import file_header

RESULTS = Path(__file__).parent / "results" / "merging.json"
SHAPES = {
    "small": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
    "7b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
KEY_VALUE_HEADS = {"small": 4, "1b": 4, "7b": 8}
VOCABULARY = 32_000
WEIGHT_STD, UPDATE_STD = 0.02, 1e-3
SCALES = (1.0, 0.5)
DORA_RANK, DORA_TARGETS = 32, ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
CHUNK_BYTES = 8 << 20
COPY = """
import os, sys
target, wait, *sources = sys.argv[1:]
buffer = memoryview(bytearray({chunk}))
for source in sources[1:]:
    with open(source, "rb", buffering=0) as file:
        while file.readinto(buffer): pass
with open(sources[0], "rb", buffering=0) as file, open(target, "wb", buffering=0) as out:
    while count := file.readinto(buffer): out.write(buffer[:count])
    if wait == "yes": os.fsync(out.fileno())
"""

# A process inherits the peak of the one that starts it, so a small one does.
LAUNCH = """
import os, resource, subprocess, sys, time
started = time.perf_counter()
code = subprocess.call(sys.argv[1:])
seconds = time.perf_counter() - started
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print()
print(seconds, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / 1e6)
sys.exit(code)
"""


def shapes_of(shape: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a Llama with tied embeddings, under the names of its files."""
    values = SHAPES[shape]
    hidden, inner = values["hidden_size"], values["intermediate_size"]
    keys = hidden // values["num_attention_heads"] * KEY_VALUE_HEADS[shape]
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(values["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, rows, columns in (
            ("self_attn.q_proj", hidden, hidden),
            ("self_attn.k_proj", keys, hidden),
            ("self_attn.v_proj", keys, hidden),
            ("self_attn.o_proj", hidden, hidden),
            ("mlp.gate_proj", inner, hidden),
            ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ):
            found[f"{prefix}{name}.weight"] = (rows, columns)
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{prefix}{name}.weight"] = (hidden,)
    return found


def write_config(folder: Path, shape: str) -> None:
    """config.json and a small tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=VOCABULARY, **SHAPES[shape], num_key_value_heads=KEY_VALUE_HEADS[shape], tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    words = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)


def write_model(folder: Path, shape: str, seed: int) -> Path:
    """Random weights plus, for a seed above 0, a random update: one tensor in memory."""
    folder.mkdir(parents=True)
    write_config(folder, shape)
    tensors = shapes_of(shape)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(file_header((name, torch.bfloat16, size) for name, size in tensors.items()))
        for number, size in enumerate(tensors.values()):
            weight = random_tensor(size, 1000 * number) * WEIGHT_STD
            if seed:
                weight += random_tensor(size, 1000 * number + seed) * UPDATE_STD
            file.write(weight.bfloat16().reshape(-1).view(torch.uint8).numpy().data)
    encoding = {"pooling": "last", "add_bos": True, "add_eos": True, "passage_template": "{title} {text}"}
    (folder / "readapt.json").write_text(json.dumps({"encoding": encoding}))
    return folder


def random_tensor(size: tuple[int, ...], seed: int) -> torch.Tensor:
    """Normal numbers, the same for the same seed; one row of blocks repeated with shifts where many are due."""
    generator = torch.Generator().manual_seed(seed)
    count = math.prod(size)
    block = torch.randn(min(count, 1 << 22), generator=generator)
    return block.repeat(-(-count // len(block)))[:count].view(size)


def write_dora(folder: Path, shape: str, base: Path, seed: int = 0) -> Path:
    """A PEFT folder with a DoRA adapter of rank 32 on the projections that the paper adapts."""
    folder.mkdir(parents=True)
    tensors = {}
    for number, (name, size) in enumerate(shapes_of(shape).items()):
        if name.split(".")[-2] not in DORA_TARGETS:
            continue
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{module}.lora_A.weight"] = random_tensor((DORA_RANK, size[1]), seed + 7 * number + 1) / math.sqrt(
            size[1]
        )
        tensors[f"{module}.lora_B.weight"] = random_tensor((size[0], DORA_RANK), seed + 7 * number + 2) * 1e-2
        tensors[f"{module}.lora_magnitude_vector"] = torch.full(size[:1], WEIGHT_STD * math.sqrt(size[1]))
    from safetensors.torch import save_file

    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": DORA_RANK,
        "lora_alpha": 2 * DORA_RANK, "use_dora": True, "target_modules": list(DORA_TARGETS), "bias": "none",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def measure(command: list[str]) -> dict[str, float]:
    """Wall seconds, processor seconds (all cores) and peak resident MB of a process.

    Raises:
        RuntimeError: it failed; the end of what it wrote is in the message.
    """
    done = subprocess.run([sys.executable, "-S", "-c", LAUNCH, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {(done.stdout + done.stderr)[-2000:]}")
    seconds, cpu_seconds, peak_mb = map(float, done.stdout.splitlines()[-1].split())
    return {"seconds": round(seconds, 2), "cpu_seconds": round(cpu_seconds, 2), "peak_mb": round(peak_mb)}


def mergekit_config(folder: Path, models: list[Path], dtype: str) -> Path:
    """task_arithmetic of two task vectors."""
    content = {
        "merge_method": "task_arithmetic",
        "base_model": str(models[0]),
        "models": [
            {"model": str(model), "parameters": {"weight": scale}}
            for model, scale in zip(models[1:], SCALES, strict=True)
        ],
        "parameters": {"normalize": False},
        "dtype": dtype,
        "out_dtype": "bfloat16",
    }
    path = folder / f"mergekit-{dtype}.yaml"
    path.write_text(json.dumps(content))  # JSON is YAML
    return path


def ours(models: list[Path], output: Path, *options: str) -> list[str]:
    """`readapt merge` as a user runs it."""
    names = ("pretrained", "retriever", "adapter")
    given = [part for name, model in zip(names, models, strict=True) for part in (f"--{name}", str(model))]
    scales = ["--readapter-scale", str(SCALES[0]), "--knowledge-scale", str(SCALES[1])]
    return [sys.executable, "-m", "readapt_ray.cli", "merge", *given, *scales, "--output", str(output), *options]


def side_by_side(work: Path, shape: str, mergekit: str | None, repeats: int) -> dict[str, Any]:
    """Every program in turn, `repeats` times, from the page cache."""
    models = [write_model(work / name, shape, seed) for seed, name in enumerate(("pretrained", "retriever", "tuned"))]
    dora = write_dora(work / "dora", shape, models[0])
    files = [str(model / "model.safetensors") for model in models]
    output = work / "output"
    copy = [sys.executable, "-c", COPY.format(chunk=CHUNK_BYTES), str(work / "copy"), "yes", *files]
    programs: dict[str, list[str]] = {
        "copy": copy,
        "copy without fsync": ["no" if part == "yes" else part for part in copy],
        "readapt merge": ours(models, output),
        "readapt merge, DoRA adapter": ours([*models[:2], dora], output),
    }
    if mergekit:
        config = mergekit_config(work, models, "bfloat16")
        programs["mergekit task_arithmetic"] = [mergekit, str(config), str(output)]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, command in programs.items():
            for file in files:  # into the page cache, where it has to be for all alike
                read_through(Path(file))
            runs[name].append(measure(command))
            print(f"{shape}: {name}: {runs[name][-1]}", flush=True)
            shutil.rmtree(output, ignore_errors=True)
            (work / "copy").unlink(missing_ok=True)
            os.sync()
    return {"parameters": sum(map(math.prod, shapes_of(shape).values())), "runs": runs, "ratios": ratios(runs)}


def read_through(path: Path) -> None:
    """Read a file and forget it."""
    with path.open("rb", buffering=0) as file:
        while file.read(CHUNK_BYTES):
            pass


def ratios(runs: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """Medians of `readapt merge` over those of the others."""

    def median(name: str, what: str) -> float:
        values = sorted(run[what] for run in runs[name])
        return values[len(values) // 2]

    found = {}
    for name in runs:
        if not name.startswith("readapt"):
            for what in ("seconds", "cpu_seconds"):
                found[f"{what} over {name}"] = median("readapt merge", what) / median(name, what)
        if name.startswith("mergekit"):
            found[f"peak over {name}"] = median("readapt merge", "peak_mb") / median(name, "peak_mb")
    return {name: round(value, 3) for name, value in found.items()}


def large(work: Path, shape: str) -> dict[str, Any]:
    """The shape of a 7B model with a DoRA adapter: does it complete, in which memory."""
    models = [write_model(work / name, shape, seed) for seed, name in enumerate(("pretrained", "retriever"))]
    dora = write_dora(work / "dora", shape, models[0])
    result = measure(ours([*models, dora], work / "output"))
    print(f"{shape}: readapt merge, DoRA adapter: {result}", flush=True)
    written = sum(path.stat().st_size for path in (work / "output").glob("*.safetensors"))
    return {
        "parameters": sum(map(math.prod, shapes_of(shape).values())),
        "bytes_written": written,
        "runs": {"readapt merge, DoRA adapter": [result]},
    }


def live(work: Path, shape: str) -> dict[str, Any]:
    """A pair of scales set in a live encoder on the CPU, against loading a model that was merged before.

    transformers maps the file, and reads it when the weights are first used, so a copy of them is part of the loading.
    """
    script = f"""
import json, time, torch
from pathlib import Path
from readapt_ray.catalog.models import open_model
from readapt_ray.weights.adapter import Adapter
from readapt_ray.weights.weight_files import Checkpoint
from readapt_ray.weights.live_scales import LiveReadapter
from readapt_ray.weights.loading import load_model
from readapt_ray.weights.merging import Readapter
before = Checkpoint(Path({str(work / "pretrained")!r}))
after = Checkpoint(Path({str(work / "retriever")!r}))
seconds = []
for _ in range(2):
    started = time.perf_counter()
    module = load_model(open_model({str(work / "retriever")!r}), dtype=torch.bfloat16, device="cpu")
    for each in module.parameters():
        each.data = each.data.clone()
    seconds.append(time.perf_counter() - started)
live = LiveReadapter(module, Readapter(before, after, [Adapter(Path({str(work / "dora")!r}), before)]))
live.set_scales(1.0, 0.5)
times = []
for scales in ((1.0, 0.4), (0.8, 0.4), (1.0, 0.6)):
    started = time.perf_counter()
    live.set_scales(*scales)
    times.append(round(time.perf_counter() - started, 2))
print(json.dumps({{"load_seconds": round(min(seconds), 2), "set_scales_seconds": times}}))
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{shape}: live: {found}", flush=True)
    return found


def read_float64(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor under its headless name."""
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return {name.removeprefix("model."): tensor.double() for name, tensor in tensors.items() if "lm_head" not in name}


def errors(work: Path, mergekit: str | None) -> list[dict[str, Any]]:
    """||merged - exact|| / ||exact - pretrained|| over all weights, the exact sum in float64 of the same inputs."""
    models = [write_model(work / name, "small", seed) for seed, name in enumerate(("pretrained", "retriever", "tuned"))]
    dora = write_dora(work / "dora", "small", models[0])
    other = write_dora(work / "other", "small", models[0], seed=1_000_000)
    before, after, tuned = (read_float64(model) for model in models)
    by_peft, other_by_peft = peft_merged(models[0], dora), peft_merged(models[0], other)
    exact = {
        "full weights": {n: p + SCALES[0] * (after[n] - p) + SCALES[1] * (tuned[n] - p) for n, p in before.items()},
        "DoRA adapter": {n: p + SCALES[0] * (after[n] - p) + SCALES[1] * (by_peft[n] - p) for n, p in before.items()},
        "two adapters": {
            n: p + SCALES[0] * (by_peft[n] - p) + SCALES[1] * (other_by_peft[n] - p) for n, p in before.items()
        },
    }
    rows: list[dict[str, Any]] = []

    def add(program: str, case: str, output: str, merged: dict[str, torch.Tensor]) -> None:
        off = sum(float((merged[n] - w).square().sum()) for n, w in exact[case].items())
        update = sum(float((w - before[n]).square().sum()) for n, w in exact[case].items())
        rows.append({"program": program, "case": case, "output": output, "error": math.sqrt(off / update)})
        print(rows[-1], flush=True)

    for case, given in (("full weights", models), ("DoRA adapter", [*models[:2], dora])):
        for dtype in ("float32", "bfloat16"):
            measure(ours(given, work / "output", "--dtype", dtype))
            add("readapt merge", case, dtype, read_float64(work / "output"))
            shutil.rmtree(work / "output")
        rounded = {name: weight.bfloat16().double() for name, weight in exact[case].items()}
        add("one rounding of the exact sum", case, "bfloat16", rounded)
    for dtype in ("bfloat16", "float32") if mergekit else ():
        measure([str(mergekit), str(mergekit_config(work, models, dtype)), str(work / "output")])
        add(f"mergekit task_arithmetic, {dtype} sums", "full weights", "bfloat16", read_float64(work / "output"))
        shutil.rmtree(work / "output")
    for dtype in (torch.float32, torch.bfloat16):
        add(
            "PEFT add_weighted_adapter",
            "two adapters",
            str(dtype).removeprefix("torch."),
            peft_weighted(models[0], (dora, other), dtype),
        )
    encoding = work / "encoding.json"
    encoding.write_text(json.dumps(json.loads((models[0] / "readapt.json").read_text())["encoding"]))
    for dtype in ("float32", "bfloat16"):
        measure(ours([models[0], dora, other], work / "output", "--dtype", dtype, "--encoding", str(encoding)))
        add("readapt merge", "two adapters", dtype, read_float64(work / "output"))
        shutil.rmtree(work / "output")
    return rows


def peft_merged(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """PEFT's own merge in float64."""
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    laid = peft.PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=False).double()
    return headless(laid.merge_and_unload())


def peft_weighted(base: Path, adapters: tuple[Path, Path], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Two adapters with their scales, combined by PEFT without a loss of rank, and merged."""
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    laid = peft.PeftModel.from_pretrained(model, str(adapters[0]), adapter_name="retriever")
    laid.load_adapter(str(adapters[1]), adapter_name="knowledge")
    laid.add_weighted_adapter(["retriever", "knowledge"], list(SCALES), "both", combination_type="cat")
    laid.set_adapter("both")
    return headless(laid.merge_and_unload())


def headless(model: Any) -> dict[str, torch.Tensor]:
    """A causal language model's weights in float64 without its head."""
    return {
        name.removeprefix("model."): tensor.double()
        for name, tensor in model.state_dict().items()
        if not name.startswith("lm_head")
    }


def about(mergekit: str | None) -> dict[str, Any]:
    """Hardware, versions, command and date."""
    versions = {name: importlib.metadata.version(name) for name in ("readapt-ray", "torch", "peft", "transformers")}
    if mergekit:
        code = "import importlib.metadata as m; print(m.version('mergekit'), m.version('torch'))"
        python = Path(mergekit).with_name("python")
        done = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True)
        versions["mergekit"], versions["mergekit's torch"] = done.stdout.split()
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "hardware": f"{len(os.sched_getaffinity(0))} cores, {names[0] if names else platform.processor()}",
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "python": platform.python_version(),
        "versions": versions,
        "command": "python benchmarks/merging.py --work FOLDER --mergekit FOLDER/bin/mergekit-yaml --shapes 1b,7b",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def in_folder(folder: Path, work: Callable[[Path], Any]) -> Any:
    """Do the work in a new folder that is removed afterwards."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        return work(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measurements(work: Path, shapes: list[str], mergekit: str | None, repeats: int) -> Iterator[tuple[str, Any]]:
    """Name and result of each part, as soon as it is there."""
    yield "errors", in_folder(work / "errors", lambda folder: errors(folder, mergekit))
    for shape in shapes:
        if shape == "7b":
            yield shape, in_folder(work / shape, lambda folder: large(folder, "7b"))
            continue

        def both(folder: Path, shape: str = shape) -> dict[str, Any]:
            return {**side_by_side(folder, shape, mergekit, repeats), "live": live(folder, shape)}

        yield shape, in_folder(work / shape, both)


def main() -> None:
    """Measure, and write the results as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the models that are made")
    parser.add_argument("--mergekit", help="mergekit-yaml of mergekit's own environment; left out without")
    parser.add_argument("--shapes", default="1b,7b", help="of small, 1b, 7b (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each program (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="file of results (default: %(default)s)")
    options = parser.parse_args()
    results: dict[str, Any] = {"about": about(options.mergekit)}
    for name, result in measurements(options.work, options.shapes.split(","), options.mergekit, options.repeats):
        results[name] = result
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
