"""The knowledge adapter: one worker's part in training a language model on a packed corpus."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from readapt_ray.errors import ModelError
from readapt_ray.storage import Location
from readapt_ray.training import dora, engine, objectives, packing
from readapt_ray.training.blocks import BlockReader
from readapt_ray.training.packing import Block

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one step tells."""

    step: int
    """Steps done, this one included."""
    num_steps: int
    loss: float
    """Mean over the loss-bearing tokens of all workers, in nats."""
    learning_rate: float
    gradient_norm: float
    num_tokens: int
    """Tokens of text in the step over all workers; padding does not count."""
    num_passages: int
    seconds: float
    data_wait_s: float


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """How to descend; the same for every objective."""

    learning_rate: float
    weight_decay: float
    warmup_fraction: float
    max_gradient_norm: float
    zero_stage: int
    seed: int
    checkpoint_every_steps: int


def load_causal_lm(folder: str, *, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A pretrained language model with its head, in train mode.

    Raises:
        ModelError: the folder holds none, or its weights lack the head.
    """
    from transformers import AutoModelForCausalLM

    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=False, output_loading_info=True, attn_implementation="sdpa"
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder} is not a causal language model: {error}") from error
    if loading["missing_keys"]:
        raise ModelError(
            f"{folder} lacks the weights {sorted(loading['missing_keys'])[:5]}; give the pretrained model, with its head"
        )
    return model.to(device).train()  # type: ignore[no-any-return]


def train_language_model(
    model: nn.Module,
    reader: BlockReader,
    *,
    optimization: Optimization,
    pad_id: int,
    micro_batch_tokens: int,
    dtype: torch.dtype,
    checkpoints: Location,
    on_step: Callable[[StepReport], None],
) -> engine.Engine:
    """Train what is trainable in `model` on all blocks of `reader`, from the newest checkpoint on.

    Args:
        model: a causal language model on the worker's device; adapters are in it already.
        reader: the blocks in training order.
        optimization: learning rate, ZeRO stage and the like.
        pad_id: the token that fills short rows; it bears no loss.
        micro_batch_tokens: padded tokens of one forward and backward pass, at most; a longer block goes alone.
        dtype: of matrix products; below float32 they run under autocast.
        checkpoints: folder of the checkpoints.
        on_step: called on every worker after each step.

    Raises:
        TrainingDivergedError: the loss became NaN or infinite; the message names the passages.
    """
    stepper = engine.Engine(
        model,
        learning_rate=optimization.learning_rate,
        weight_decay=optimization.weight_decay,
        zero_stage=optimization.zero_stage,
        max_gradient_norm=optimization.max_gradient_norm,
    )
    first_step = resume(stepper, checkpoints)
    steps = _timed(reader.steps(first_step))
    for step, (blocks, waited_s) in enumerate(steps, start=first_step):
        started_s = time.monotonic()
        shares = _shares(blocks, stepper.num_workers, micro_batch_tokens)
        num_labels = max(1, sum(block.num_labels for block in blocks))

        def loss_of(part: list[Block], num_labels: int = num_labels) -> Tensor:
            batch = packing.collate(part, pad_id=pad_id).to(stepper.device)
            with torch.autocast(stepper.device_type, dtype, enabled=dtype != torch.float32):
                return objectives.causal_lm_loss_sum(model, batch) / num_labels

        rate = engine.linear_schedule(
            step, num_steps=reader.num_steps, warmup_steps=int(optimization.warmup_fraction * reader.num_steps)
        )
        outcome = stepper.step(
            shares[stepper.worker_rank],
            num_parts=max(len(share) for share in shares),
            loss_of=loss_of,
            rate=rate,
            seed=optimization.seed + step,
        )
        done = step + 1
        if done % optimization.checkpoint_every_steps == 0 or done == reader.num_steps:
            checkpoint(stepper, checkpoints, done)
        on_step(
            StepReport(
                step=done,
                num_steps=reader.num_steps,
                loss=outcome.loss,
                learning_rate=rate * optimization.learning_rate,
                gradient_norm=outcome.gradient_norm,
                num_tokens=sum(len(block.input_ids) for block in blocks),
                num_passages=sum(len(block.passage_lengths) for block in blocks),
                seconds=time.monotonic() - started_s + waited_s,
                data_wait_s=waited_s,
            )
        )
    return stepper


def resume(stepper: engine.Engine, checkpoints: Location) -> int:
    """Load the newest checkpoint, the same on all workers; the number of steps done."""
    found = engine.newest_checkpoint(checkpoints)
    steps = torch.tensor([found[0] if found else 0])
    torch.distributed.broadcast(steps, src=0)
    if found is None or int(steps) == 0:
        return 0
    if found[0] != int(steps):
        raise RuntimeError(
            f"worker {stepper.worker_rank} sees step {found[0]} in {checkpoints}, worker 0 step {int(steps)}"
        )
    stepper.load_state(found[1], step=found[0])
    return found[0]


def checkpoint(stepper: engine.Engine, checkpoints: Location, step: int) -> None:
    """Save the state after `step` steps; all workers call it, the first one writes."""
    state = stepper.state()
    if stepper.worker_rank == 0:
        engine.save_checkpoint(checkpoints, step, state)
    torch.distributed.barrier()


def _shares(blocks: list[Block], num_workers: int, micro_batch_tokens: int) -> list[list[list[Block]]]:
    """The micro-batches of every worker: each computes all of them, and so knows how many the others run."""
    return [
        packing.micro_batches(blocks[rank::num_workers], max_tokens=micro_batch_tokens) for rank in range(num_workers)
    ]


def _timed(batches: Iterator[list[Block]]) -> Iterator[tuple[list[Block], float]]:
    while True:
        started_s = time.monotonic()
        batch = next(batches, None)
        if batch is None:
            return
        yield batch, time.monotonic() - started_s


def make_trainable(model: nn.Module, shape: dora.AdapterShape | None) -> None:
    """Train adapters of this shape on frozen weights; all weights where there is none."""
    if shape is None:
        model.requires_grad_(True)
    else:
        dora.add_adapters(model, shape)


def save_model(model: Any, source: Location, output: Location) -> None:
    """Write all weights as a Hugging Face folder, with the tokenizer files of the folder that they came from."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            (source / name).copy_to(output / name)
    (output / "config.json").write_text(json.dumps(model.config.to_diff_dict(), indent=2) + "\n")
    (output / "model.safetensors").write_bytes(to_safetensors(state, metadata={"format": "pt"}))
