"""The work of each stage in one unit, whatever does it: FLOPs where a model runs, bytes or queries elsewhere."""

from typing import Any, Final

from readapt_ray.artifacts import Manifest
from readapt_ray.planner.shapes import ModelShape, model_shape

ROWS_PER_FILE: Final = 65_536
WORK_UNITS: Final = {
    "ingest": "bytes of text",
    "pack": "tokens",
    "train": "FLOP",
    "merge": "bytes of weights",
    "embed": "FLOP",
    "index": "bytes of vectors",
    "search": "FLOP",
    "evaluate": "judged queries",
}


def train_flops(
    shape: ModelShape,
    tokens: float,
    *,
    method: str,
    rank: int,
    targets: tuple[str, ...],
    steps_per_token: float,
    recomputes: bool = False,
) -> float:
    """FLOPs a trained token, forward and backward.

    Frozen weights cost one product forward and one backward (for the inputs' gradients); trained ones two backward.
    DoRA's norm costs 2 * rank FLOPs a weight of an adapted layer, once a step.

    Args:
        tokens: mean length of a passage; attention never leaves it.
        steps_per_token: optimizer steps a token.
        recomputes: whether the forward pass is run again for the backward one (gradient checkpointing).
    """
    forward = shape.forward_flops(tokens)
    backward = forward * (2 if method == "full" else 1)
    head = 2 * shape.head_flops()
    adapters = 0.0 if method == "full" else 6.0 * shape.adapter_parameters(targets, rank)
    norms = 0.0
    if method == "dora":
        norms = steps_per_token * 2 * rank * sum(inputs * outputs for inputs, outputs in shape.adapted(targets))
    return forward * (2 if recomputes else 1) + backward + head + adapters + norms


def trained(config: Any, shape: ModelShape, *, num_tokens: float, num_passages: float, num_steps: float) -> float:
    """FLOPs of a whole training run with these options (a TrainConfig, or what a manifest says of one)."""
    each = train_flops(
        shape,
        num_tokens / max(1.0, num_passages),
        method=config.method,
        rank=config.lora_rank,
        targets=tuple(config.target_modules),
        steps_per_token=num_steps / max(1.0, num_tokens),
        recomputes=bool(getattr(config, "gradient_checkpointing", False)),
    )
    return num_tokens * each


class _Options:
    """Options of a manifest as attributes."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.__dict__ |= values


def done(manifest: Manifest) -> float:
    """The work that a complete artifact stands for, in the units of its stage.

    Raises:
        ModelError: its model cannot be found.
    """
    counts, config, details = manifest.counts, manifest.config, manifest.details
    work = float(counts.get("num_bytes", 0))
    if manifest.stage == "train":
        work = trained(
            _Options(config),
            model_shape(config["pretrained"]),
            num_tokens=counts["num_tokens"],
            num_passages=counts["num_passages"],
            num_steps=counts["num_steps"],
        )
    elif manifest.stage == "embed":
        shape = model_shape(config["retriever"])
        work = counts["num_tokens"] * shape.forward_flops(counts["num_tokens"] / counts["num_vectors"])
    elif manifest.stage == "index":
        work = 4.0 * counts["num_vectors"] * details["encoder"]["dimension"]
    elif manifest.stage == "search":
        work = 2.0 * counts["num_queries"] * details["num_vectors"] * details["encoder"]["dimension"]
    elif manifest.stage == "merge":
        work *= 3
    elif manifest.stage == "evaluate":
        work = float(counts["num_queries"] * counts["num_runs"])
    elif manifest.stage == "pack":
        work = float(counts["num_tokens"])
    return work
