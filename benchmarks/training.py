"""Training a knowledge adapter: ours against plain PEFT DoRA in a Hugging Face Trainer, in one run on one machine.

    python benchmarks/training.py                        # the small shape, on the CPU
    python benchmarks/training.py --shape 7b --dtype bfloat16 --rounds 3 --steps 20    # on a GPU

Rates are tokens of *text* a second; padding does not count. The arms take turns, some steps each, so that whatever
else the machine does meets all of them; a rate is the median over the rounds, and the CPU seconds of a token
stand beside it, which no neighbour changes. The baseline is the paper's setting: batches of 4 padded passages.

Tokens come from a seeded random source in which each token has a few likely successors, so there is something to
learn; passages are as long as MS MARCO's (log-normal, mean 80 tokens). Weights are random. All arms start from the
same weights and see the same passages in the same order. An adapter of random weights learns little, so the losses after
the same number of tokens are compared on the quickstart's pretrained model and torch's docstrings.

The peak memory is that of one step of 8,192 tokens with a vocabulary of 32,000, in a process of its own for each arm.
"""

import argparse
import datetime
import functools
import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cuda" if any(Path("/dev").glob("nvidia[0-9]*")) else "cpu")

import numpy as np
import peft
import torch
import transformers
from torch.optim.optimizer import register_optimizer_step_post_hook

from readapt_ray.catalog.models import open_model
from readapt_ray.catalog.shapes import measure_shape
from readapt_ray.sources.python_docs import read_docstrings
from readapt_ray.training import dora, objectives, packing
from readapt_ray.training.checkpoints import DataOrder
from readapt_ray.training.engine import DeepSpeedEngine, Optimization
from readapt_ray.training.language_model import LanguageModelling
from readapt_ray.training.packing import Block
from readapt_ray.training.shares import BatchSettings, Share
from readapt_ray.training.speed import flops_per_token, peak_flops
from readapt_ray.training.trainable import reduce_memory

SHAPES = {
    "small": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4},
    "7b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8},
}  # fmt: skip
VOCABULARY = {"small": 8_000, "7b": 32_000}
TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
RANK, ALPHA, DROPOUT = 32, 64.0, 0.05
LEARNING_RATE = 1e-3
"""High, so that the loss falls visibly within the few tokens of a benchmark."""
QUICKSTART = "quickstart-pretrained"
BASELINE = "PEFT DoRA, HF Trainer, batch 4 padded"
STEP_TOKENS = 8192


Steps = Iterator[tuple[int, float]]
"""Tokens of text and the loss of each step."""


@dataclass
class Arm:
    """A way to train, in a process of its own."""

    name: str
    pipe: Connection
    rates: list[float] = field(default_factory=list)
    cpu_seconds: float = 0.0
    tokens: int = 0
    curve: list[tuple[int, float]] = field(default_factory=list)

    def take(self, num_steps: int, *, counts: bool) -> None:
        """Take steps; of the first of them only the end counts, since a Trainer sets itself up in it."""
        self.pipe.send(num_steps)
        steps, marks = self.pipe.recv()
        self.curve += steps
        if counts:
            tokens = sum(num_tokens for num_tokens, _ in steps[1:])
            (first_s, first_cpu_s), (last_s, last_cpu_s) = marks[0], marks[-1]
            self.rates.append(tokens / (last_s - first_s))
            self.cpu_seconds += last_cpu_s - first_cpu_s
            self.tokens += tokens


def passages(num: int, vocab_size: int) -> list[list[int]]:
    """Token ids of passages: each token has 4 likely successors, and lengths are log-normal with a mean of 80."""
    random = np.random.default_rng(0)
    successors = random.integers(2, vocab_size, (vocab_size, 4))
    lengths = np.clip(random.lognormal(np.log(75), 0.36, num), 16, 250).astype(int)
    steps = random.integers(0, 4, (num, lengths.max()))
    ids = np.empty((num, lengths.max()), np.int64)
    ids[:, 0] = random.integers(2, min(vocab_size, 500), num)
    for place in range(1, ids.shape[1]):
        ids[:, place] = successors[ids[:, place - 1], steps[:, place]]
    return [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]


def new_model(shape: str, vocab_size: int, dtype: torch.dtype, device: torch.device) -> Any:
    """The same random weights each time."""
    config = transformers.LlamaConfig(
        vocab_size=vocab_size, max_position_embeddings=2048, attn_implementation="sdpa", **SHAPES[shape]
    )
    torch.manual_seed(0)
    with device:
        return transformers.LlamaForCausalLM(config).to(dtype).train()


def docstrings(num_steps: int) -> list[list[int]]:
    """Token ids of as many docstrings of torch as so many steps of 4 take, at most 128 each, for the quickstart's model."""
    texts = [f"{doc.summary} {doc.rest}" for doc in read_docstrings("torch")]
    np.random.default_rng(0).shuffle(texts)
    tokenizer = open_model(QUICKSTART).tokenizer
    rows = tokenizer(texts[: 8 * num_steps], truncation=True, max_length=128)["input_ids"]
    return [row for row in rows if len(row) >= 16][: 4 * num_steps]


class Baseline:
    """Plain PEFT on plain transformers, driven by a Hugging Face Trainer."""

    def __init__(self, model: Any, rows: list[list[int]], dtype: torch.dtype, folder: Path) -> None:
        config = peft.LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            lora_dropout=DROPOUT,
            target_modules=list(TARGETS),
            use_dora=True,
            task_type="CAUSAL_LM",
        )
        self.model = peft.get_peft_model(model, config, autocast_adapter_dtype=True)
        self._rows = rows
        self._taken = 0
        self._folder = folder
        self._dtype = dtype
        trained = [each for each in self.model.parameters() if each.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)

    def take(self, num_steps: int) -> Steps:
        """Steps of 4 passages."""
        rows = self._rows[4 * self._taken : 4 * (self._taken + num_steps)]
        self._taken += num_steps
        found: list[tuple[int, float]] = []
        arguments = transformers.TrainingArguments(
            output_dir=str(self._folder), per_device_train_batch_size=4, max_steps=num_steps, learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
            dataloader_num_workers=0, bf16=self._dtype == torch.bfloat16, use_cpu=not torch.cuda.is_available(),
            train_sampling_strategy="sequential", remove_unused_columns=False, log_level="error", logging_strategy="steps",
        )  # fmt: skip
        trainer = transformers.Trainer(
            self.model,
            arguments,
            train_dataset=rows,
            data_collator=_padded,
            optimizers=(self._optimizer, torch.optim.lr_scheduler.ConstantLR(self._optimizer, factor=1.0)),
            callbacks=[_Collected(rows, found)],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        yield from found


class _Collected(transformers.TrainerCallback):
    """Keeps the tokens and the loss of each step."""

    def __init__(self, rows: list[list[int]], found: list[tuple[int, float]]) -> None:
        self._rows = rows
        self._found = found

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ARG002
        """Transformers calls it after every step."""
        if "loss" in logs:
            first = 4 * len(self._found)
            self._found.append((sum(map(len, self._rows[first : first + 4])), float(logs["loss"])))


def _padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def shares_of(
    blocks: list[Block], data_order: DataOrder, batch_settings: BatchSettings, first_step: int
) -> Iterator[Share]:
    """Blocks in the order in which they were made, from memory, for one worker."""
    size = data_order.batch_size
    for step in range(first_step, data_order.num_steps):
        yield batch_settings.shares(blocks[step * size : (step + 1) * size], 1, step)[0]


class Ours:
    """This project's step, under the same DeepSpeed engine as in a run."""

    def __init__(
        self,
        model: Any,
        blocks: list[Block],
        *,
        batch_size: int,
        method: Any,
        dtype: torch.dtype,
        micro_batch_tokens: int,
        gradient_checkpointing: bool = False,
        compile_layers: bool = False,
    ) -> None:
        objectives.prepare(model, "benchmark")
        torch.manual_seed(0)
        dora.add_adapters(
            model, dora.AdapterShape(method=method, rank=RANK, alpha=ALPHA, dropout=DROPOUT, targets=TARGETS)
        )
        reduce_memory(model, gradient_checkpointing=gradient_checkpointing, compile_layers=compile_layers, zero_stage=0)
        self.model = model
        whole = len(blocks) - len(blocks) % batch_size
        data_order = DataOrder(num_units=whole, batch_size=batch_size, num_epochs=1, seed=0)
        batch_settings = BatchSettings(pad_id=0, micro_batch_tokens=micro_batch_tokens)
        self._objective = LanguageModelling(
            model=model, data_order=data_order, batches=functools.partial(shares_of, blocks, data_order, batch_settings),
            dtype=dtype,
        )  # fmt: skip
        self._engine = DeepSpeedEngine(
            model,
            Optimization(
                learning_rate=LEARNING_RATE, weight_decay=0.0, warmup_fraction=0.0, max_gradient_norm=1.0,
                zero_stage=0, seed=0, checkpoint_every_s=1e9,
            ),
        )  # fmt: skip
        self._batches = self._objective.batches(0)
        self._step = 0

    def take(self, num_steps: int) -> Steps:
        """Steps of a batch."""
        for _ in range(num_steps):
            work = self._objective.work(self._engine, next(self._batches), self._step)
            outcome = self._engine.step(work.parts, loss_of=work.loss_of, rate=1.0, step=self._step)
            self._step += 1
            yield work.num_tokens, outcome.loss


def blocks_of(rows: list[list[int]], block_tokens: int | None) -> list[Block]:
    """One passage a block, or packed."""
    mode: Any = "passage" if block_tokens is None else "packed"
    return list(packing.pack(enumerate(rows), mode=mode, block_tokens=block_tokens or 1024))


def stepper(name: str, options: argparse.Namespace, vocab_size: int, num_passages: int, folder: Path) -> Any:
    """What takes the steps of an arm, from fresh weights."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, options.dtype)
    if options.shape == QUICKSTART:
        model = transformers.AutoModelForCausalLM.from_pretrained(open_model(QUICKSTART).folder, dtype=dtype).train()
        rows = docstrings(num_passages // 4)
    else:
        model = new_model(options.shape, vocab_size, dtype, device)
        rows = passages(num_passages, vocab_size)
    if name == BASELINE:
        return Baseline(model, rows, dtype, folder)
    mean = round(sum(map(len, rows)) / len(rows))
    block_tokens, batch_size, method = {
        "ours, passage, batch 4": (None, 4, "dora"),
        "ours, packed, the baseline's tokens a step": (4 * mean, 1, "dora"),
        "ours, packed, 8,192 tokens a step": (1024, STEP_TOKENS // 1024, "dora"),
        "ours, packed, 8,192 tokens a step, LoRA": (1024, STEP_TOKENS // 1024, "lora"),
    }[name]
    return Ours(
        model,
        blocks_of(rows, block_tokens),
        batch_size=batch_size,
        method=method,
        dtype=dtype,
        micro_batch_tokens=options.micro_batch_tokens,
    )


def serve(name: str, options: argparse.Namespace, num_passages: int, pipe: Connection) -> None:
    """The process of an arm: takes as many steps as it is told; answers with them and the clock after each."""
    transformers.logging.set_verbosity_error()
    if name == BASELINE:
        torch.set_num_threads(num_threads())
    else:
        join()
    with tempfile.TemporaryDirectory() as folder:
        taker = stepper(name, options, VOCABULARY.get(options.shape, 0), num_passages, Path(folder))
        while num_steps := pipe.recv():
            marks: list[tuple[float, float]] = []
            hook = register_optimizer_step_post_hook(functools.partial(note, marks))
            steps = list(taker.take(num_steps))
            hook.remove()
            pipe.send((steps, marks))


def note(marks: list[tuple[float, float]], *_: Any) -> None:
    """Wall and CPU seconds after an optimizer step, whoever takes it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    marks.append((time.monotonic(), time.process_time()))


ARMS = (
    (BASELINE, 1),
    ("ours, passage, batch 4", 1),
    ("ours, packed, the baseline's tokens a step", 1),
    ("ours, packed, 8,192 tokens a step", 16),
    ("ours, packed, 8,192 tokens a step, LoRA", 16),
)
"""The arms, and by how much fewer steps they take in a round, so that rounds take alike long."""


def rates(options: argparse.Namespace) -> dict[str, Any]:
    """All arms in turns."""
    per_round = max(4 * options.steps, max(3, options.steps // 16) * STEP_TOKENS // 70)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    arms = []
    for name, share in ARMS:
        ours, theirs = context.Pipe()
        target = (name, options, per_round * (options.rounds + 1), theirs)
        context.Process(target=serve, args=target, daemon=True).start()
        arms.append((Arm(name, ours), share))
    for number in range(options.rounds + 1):
        for arm, share in arms:
            arm.take(max(3, options.steps // share), counts=number > 0)  # in round 0 every shape is met
        print(f"round {number} of {options.rounds}", file=sys.stderr)
    for arm, _ in arms:
        arm.pipe.send(0)
    base = arms[0][0]
    found: dict[str, Any] = {}
    for arm, _ in arms:
        found[arm.name] = {
            "text tokens a second": round(statistics.median(arm.rates), 1),
            "of every round": [round(rate, 1) for rate in arm.rates],
            "times the baseline": round(statistics.median(map(_ratio, arm.rates, base.rates)), 2),
            "CPU seconds a million tokens": round(1e6 * arm.cpu_seconds / arm.tokens, 1),
            "times the baseline, by CPU seconds": round(
                (base.cpu_seconds / base.tokens) / (arm.cpu_seconds / arm.tokens), 2
            ),
        }
    packed_dora, packed_lora = arms[3][0], arms[4][0]
    found["DoRA step / LoRA step"] = {
        "wall": round(statistics.median(map(_ratio, packed_lora.rates, packed_dora.rates)), 3),
        "CPU seconds": round(
            (packed_dora.cpu_seconds / packed_dora.tokens) / (packed_lora.cpu_seconds / packed_lora.tokens), 3
        ),
    }
    found["MFU"] = _mfu(options, packed_dora)
    return found


def curves(options: argparse.Namespace) -> dict[str, list[tuple[int, float]]]:
    """The loss after so many tokens of arms that take alike many tokens a step, one after the other."""
    given = argparse.Namespace(**{**vars(options), "shape": QUICKSTART, "dtype": "float32"})
    context = multiprocessing.get_context("forkserver")
    found = {}
    for name, _ in ARMS[:3]:
        ours, theirs = context.Pipe()
        context.Process(target=serve, args=(name, given, 4 * options.curve_steps, theirs), daemon=True).start()
        ours.send(options.curve_steps - options.curve_steps // 10)  # packed rows are fewer
        steps, _ = ours.recv()
        ours.send(0)
        found[name] = _thinned(steps)
        print(f"curve of {name}", file=sys.stderr)
    return found


def _ratio(one: float, other: float) -> float:
    return one / other


def _mfu(options: argparse.Namespace, arm: Arm) -> float | None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = peak_flops(device)
    if peak is None:
        return None
    return round(statistics.median(arm.rates) * flops_of(options.shape) / peak, 3)


def flops_of(shape: str) -> float:
    """Model FLOPs of a token of text, forward and backward, with an adapter in every target."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=VOCABULARY[shape], **SHAPES[shape]))
    adapter = dora.AdapterShape(method="lora", rank=RANK, alpha=ALPHA, dropout=DROPOUT, targets=TARGETS)
    return flops_per_token(measure_shape(model, shape), adapter, mean_tokens=80)


def _thinned(curve: list[tuple[int, float]], points: int = 12) -> list[tuple[int, float]]:
    """Running token count and the mean loss since the point before."""
    total, kept = 0, []
    size = max(1, len(curve) // points)
    for start in range(0, len(curve) - size + 1, size):
        part = curve[start : start + size]
        total += sum(tokens for tokens, _ in part)
        kept.append((total, round(sum(loss for _, loss in part) / len(part), 3)))
    return kept


def peak_memory(options: argparse.Namespace) -> dict[str, Any]:
    """Of a process that takes two steps with a vocabulary of 32,000, and of one that only built the model."""
    found = {}
    for name in ("built and no step", "ours, packed, 8,192 tokens a step", "plain transformers, the same 8,192 tokens"):
        command = [sys.executable, __file__, "--memory-of", name, "--shape", options.shape, "--dtype", options.dtype]
        command += ["--micro-batch-tokens", str(STEP_TOKENS)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[name] = {"bytes": int(done.stdout.splitlines()[-1])}
    return found


def print_memory(name: str, options: argparse.Namespace) -> None:
    """The child of `peak_memory`."""
    join()
    vocab_size = 32_000
    if name.startswith("ours"):
        with tempfile.TemporaryDirectory() as folder:
            list(stepper(name, options, vocab_size, 400, Path(folder)).take(2))
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = new_model(options.shape, vocab_size, getattr(torch, options.dtype), device)
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), use_dora=True)
        model = peft.get_peft_model(model, config)
        rows = [row[:64] for row in passages(400, vocab_size) if len(row) >= 64][: STEP_TOKENS // 64]
        if name.startswith("plain"):
            ids = torch.tensor(rows, device=device)
            for _ in range(2):
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    if torch.cuda.is_available():
        print(torch.cuda.max_memory_allocated())
    else:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def num_threads() -> int:
    """As told by the environment, or all cores."""
    return int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0))))


def join() -> None:
    """A process group of one worker, as DeepSpeed wants it."""
    torch.set_num_threads(num_threads())
    os.environ["LOCAL_RANK"] = "0"
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    meeting = f"file://{tempfile.mkdtemp()}/meet"
    torch.distributed.init_process_group(backend, init_method=meeting, rank=0, world_size=1)


PARTS: dict[str, tuple[str, Callable[[argparse.Namespace], dict[str, Any]]]] = {
    "rates": ("rates", rates),
    "curves": (
        "mean loss since the point before, after so many tokens of torch's docstrings, quickstart-pretrained",
        curves,
    ),
    "memory": ("peak memory, vocabulary of 32,000", peak_memory),
}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of all arms")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=24, help="of the baseline a round")
    parser.add_argument("--curve-steps", type=int, default=200, help="of the baseline, for the curve of the loss")
    parser.add_argument("--micro-batch-tokens", type=int, default=4096, help="of our arms")
    parser.add_argument("--parts", default=",".join(PARTS), help="those left out stay as they are in --output")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/training.json"))
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if options.memory_of:
        print_memory(options.memory_of, options)
        return
    measured = {title: measure(options) for part, (title, measure) in PARTS.items() if part in options.parts.split(",")}
    packages = ("torch", "transformers", "peft", "deepspeed", "accelerate")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    before = json.loads(options.output.read_text()) if len(measured) < len(PARTS) else {}
    result = {
        **before,
        "command": " ".join(["python", "benchmarks/training.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "hardware": f"{device}, {len(os.sched_getaffinity(0))} cores, {num_threads()} threads",
        "versions": {name: version(name) for name in packages},
        "shape": {**SHAPES[options.shape], "vocab_size": VOCABULARY[options.shape]},
        "dtype": options.dtype,
        **measured,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
