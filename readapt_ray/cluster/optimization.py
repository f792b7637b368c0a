"""Define the options that train and finetune share."""

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from readapt_ray.catalog.shapes import BaseDtype
from readapt_ray.config import OptionError, StageConfig, UsedWith

if TYPE_CHECKING:
    import torch

    from readapt_ray.training.dora import AdapterShape
    from readapt_ray.training.engine import Optimization
    from readapt_ray.training.memory import WorkerSetup

Tracker = Literal["tensorboard", "wandb", "mlflow"]


class OptimizationConfig(StageConfig):
    """Options of training: method, adapter, optimizer, memory and workers."""

    method: Literal["dora", "lora", "full"] = "dora"
    """Train DoRA adapters (dora), LoRA adapters (lora) or all weights (full)."""
    lora_rank: int = Field(default=32, ge=1)
    """Rank of the adapters. A higher rank learns more and makes a larger adapter."""
    lora_alpha: float = Field(default=64.0, gt=0)
    """Scale of the adapters: their update is multiplied by alpha / rank."""
    lora_dropout: float = Field(default=0.05, ge=0, lt=1)
    """Dropout probability on the input of each adapter."""
    target_modules: tuple[str, ...] = ()
    """Names of the linear layers that get an adapter (last part of the name), separated by commas. If omitted,
    query, key, value, up and down projections of the model's family; required for other families."""
    num_epochs: int = Field(default=1, ge=1)
    """Number of passes over the training data."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak learning rate of AdamW; it decays linearly to 0. Lower it if the loss jumps."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of AdamW."""
    warmup_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of the steps in which the learning rate rises from 0 to its peak."""
    max_gradient_norm: float = Field(default=1.0, ge=0)
    """Clip the gradient to this norm; 0 turns clipping off."""
    seed: int = Field(default=0, ge=0)
    """Random seed for the data order, the initial adapter weights and dropout."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of matrix products and frozen weights; trained weights are always float32. auto is bfloat16 on GPUs
    and on CPUs with AMX or AVX512_BF16, else float32; a resumed run keeps the type that it began with."""
    base_dtype: BaseDtype = "auto"
    """Data type in which the frozen weights of the model's layers are stored. auto is the same as dtype; int8, fp8 and
    nf4 take 8, 8 and 4.5 bits per weight and are decoded for each product. With fp8, GPUs such as H100 and L4 compute
    the forward pass in 8 bits. The adapter still fits the model in full precision. Use it with gradient_checkpointing
    if a model does not fit on a GPU. nf4 needs the extra nf4 (bitsandbytes)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third more computation, but memory for one layer instead
    of all. Turn it on when training does not fit in memory."""
    torch_compile: bool | None = None
    """Compile each layer with torch.compile: minutes at the start, then faster steps. If omitted, layers are compiled on GPUs,
    except with zero_stage 3, which does not support it. A compiled layer whose output differs is not used."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """What DeepSpeed ZeRO partitions over the workers: 0 nothing, 1 optimizer states, 2 also gradients, 3 also the
    model's weights. Use 3 only for a model that does not fit on one worker, because it sends every weight to every
    worker in each pass."""
    num_workers: int | None = Field(default=None, ge=1)
    """Number of Ray Train workers. If omitted, one per GPU, or one per node on a cluster without GPUs."""
    min_workers: int | None = Field(default=None, ge=1)
    """Fewest workers to train with. Training starts with this many if no more GPU nodes come within five minutes,
    continues with this many when nodes are lost, and adds workers two checkpoint intervals after nodes come back. If
    omitted, wait until all workers can run."""
    num_cpus_per_worker: int | None = Field(default=None, ge=1)
    """CPUs per worker. If omitted, one for a worker with a GPU, else the node's CPUs divided by its workers."""
    checkpoint_every_s: float = Field(default=300.0, ge=0)
    """Seconds between checkpoints; 0 makes one after each step. A killed run resumes from the last one."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Number of checkpoints to keep; older ones are deleted."""
    max_failures: int = Field(default=3, ge=-1)
    """How many times dead workers are restarted without a new checkpoint in between; -1 means without limit."""
    check_memory: bool = True
    """Refuse to start when the estimated memory exceeds the memory of a worker. Turn it off if the estimate is
    wrong for your model."""
    trackers: tuple[Tracker, ...] = ()
    """Where to report each step besides the terminal, metrics.jsonl and Ray's metrics, separated by commas:
    tensorboard, wandb, mlflow. wandb and mlflow must be installed."""

    @model_validator(mode="after")
    def _can_compile(self) -> Self:
        if self.torch_compile and self.zero_stage == 3:
            raise OptionError(
                "{torch_compile} does not go with {zero_stage} = 3; choose a lower stage, or leave it off"
            )
        return self

    @model_validator(mode="after")
    def _can_quantize(self) -> Self:
        if self.base_dtype != "auto" and self.method == "full":
            raise OptionError(
                "{base_dtype} = {wanted} freezes the weights that {method} = full trains; choose dora or lora, or leave it off",
                wanted=self.base_dtype,
            )
        if self.base_dtype != "auto" and self.zero_stage == 3:
            raise OptionError(
                "{base_dtype} = {wanted} does not go with {zero_stage} = 3, which cannot partition quantized weights; choose a "
                "lower stage, or leave it off",
                wanted=self.base_dtype,
            )
        return self

    @model_validator(mode="after")
    def _has_enough_workers(self) -> Self:
        if self.min_workers is not None and self.num_workers is not None and self.min_workers > self.num_workers:
            raise OptionError(
                "{min_workers} = {least} is more than {num_workers} = {most}; lower it",
                least=self.min_workers,
                most=self.num_workers,
            )
        return self

    used_with: ClassVar[UsedWith] = dict.fromkeys(
        ("lora_rank", "lora_alpha", "lora_dropout"), ("method", ("dora", "lora"))
    )
    safety: ClassVar[frozenset[str]] = StageConfig.safety | {
        "min_workers",
        "checkpoint_every_s",
        "keep_checkpoints",
        "max_failures",
        "check_memory",
    }
    operational: ClassVar[frozenset[str]] = frozenset(
        {
            "gradient_checkpointing",
            "torch_compile",
            "zero_stage",
            "num_workers",
            "min_workers",
            "num_cpus_per_worker",
            "checkpoint_every_s",
            "keep_checkpoints",
            "max_failures",
            "check_memory",
            "trackers",
        }
    )


def adapter_shape(config: OptimizationConfig, targets: tuple[str, ...]) -> "AdapterShape | None":
    """Return the adapter that the options ask for; None if all weights are trained (`method` full).

    Args:
        config: options of training; its `target_modules` is not used.
        targets: last parts of the names of the layers that get an adapter, such as "q_proj".
    """
    from readapt_ray.training.dora import AdapterShape

    if config.method == "full":
        return None
    return AdapterShape(
        method=config.method,
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        targets=targets,
    )


def optimization(config: OptimizationConfig) -> "Optimization":
    """Return the settings of the optimizer, of ZeRO, and of checkpoints that the options ask for."""
    from readapt_ray.training.engine import Optimization

    return Optimization(
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        warmup_fraction=config.warmup_fraction,
        max_gradient_norm=config.max_gradient_norm,
        zero_stage=config.zero_stage,
        seed=config.seed,
        checkpoint_every_s=config.checkpoint_every_s,
        keep_checkpoints=config.keep_checkpoints,
    )


def compiles(config: OptimizationConfig, device_type: str) -> bool:
    """Return whether workers compile layers: the option `torch_compile`, else True on GPUs unless zero_stage is 3.

    Args:
        config: options of training.
        device_type: type of the workers' device, "cuda" or "cpu".
    """
    if config.torch_compile is not None:
        return config.torch_compile
    return device_type == "cuda" and config.zero_stage != 3


def worker_setup(
    config: OptimizationConfig,
    adapter: "AdapterShape | None",
    *,
    num_workers: int,
    micro_batch_tokens: int,
    dtype: "torch.dtype",
    device_type: str,
) -> "WorkerSetup":
    """Return the settings that decide a worker's memory, for the check before training and for `readapt plan`.

    Args:
        config: options of training.
        adapter: the adapter that is trained, from `adapter_shape`; None for all weights.
        num_workers: number of workers over all nodes; ZeRO divides by it.
        micro_batch_tokens: tokens of one forward pass.
        dtype: data type of matrix products and frozen weights.
        device_type: "cuda" or "cpu".
    """
    from readapt_ray.training.memory import WorkerSetup

    return WorkerSetup(
        adapter=adapter,
        num_workers=num_workers,
        zero_stage=config.zero_stage,
        micro_batch_tokens=micro_batch_tokens,
        dtype=dtype,
        gradient_checkpointing=config.gradient_checkpointing,
        device_type=device_type,
        base_dtype=config.base_dtype,
    )
