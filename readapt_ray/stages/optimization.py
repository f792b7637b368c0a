"""Options that training a language model and training a retriever share, and what they stand for."""

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from readapt_ray.config import OptionError, StageConfig

if TYPE_CHECKING:
    from readapt_ray.training.dora import AdapterShape
    from readapt_ray.training.engine import Optimization

Tracker = Literal["tensorboard", "wandb", "mlflow"]


class OptimizationConfig(StageConfig):
    """What is trained, how it descends, and on which workers."""

    method: Literal["dora", "lora", "full"] = "dora"
    """What is trained: DoRA or LoRA adapters, or all weights."""
    lora_rank: int = Field(default=32, ge=1)
    """Rank of the adapters."""
    lora_alpha: float = Field(default=64.0, gt=0)
    """Scale of the adapters; their update is multiplied by alpha / rank."""
    lora_dropout: float = Field(default=0.05, ge=0, lt=1)
    """Probability that an adapter's input is dropped."""
    target_modules: tuple[str, ...] = ()
    """Linear layers that get an adapter, by the last part of their names; default those of the model's family."""
    num_epochs: int = Field(default=1, ge=1)
    """Times that each block or pair is trained on."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak learning rate of AdamW; falls linearly to 0."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's."""
    warmup_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of the steps over which the learning rate rises."""
    max_gradient_norm: float = Field(default=1.0, ge=0)
    """Gradients are clipped to this norm; 0 leaves them."""
    seed: int = Field(default=0, ge=0)
    """Of the order of blocks or pairs, the first weights and dropout."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products and frozen weights; auto is bfloat16 on GPUs and where all CPUs have matrix units for it (AMX), float32
    elsewhere, and stays what the output was begun with. What is trained is always float32."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: a third more arithmetic, and memory for one layer's in place of all."""
    torch_compile: bool = False
    """Compile each layer with torch.compile: minutes at the start, faster steps on a GPU. Not with zero_stage 3."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """What DeepSpeed partitions over workers: 0 nothing, 1 optimizer state, 2 also gradients, 3 also the model's weights, for a
    base that no single worker holds. 0 is the default: an adapter's state is small, and at 3 every weight travels
    to every worker in each pass, DoRA's norms once more a step."""
    num_workers: int | None = Field(default=None, ge=1)
    """Ray Train workers; default one a GPU, or one a node without GPUs."""
    min_workers: int | None = Field(default=None, ge=1)
    """Go on with as few workers as this when nodes are lost, and with more when they come back; default wait for all."""
    num_cpus_per_worker: int | None = Field(default=None, ge=1)
    """CPUs of a worker; default one beside a GPU, else the node's share."""
    checkpoint_every_steps: int = Field(default=100, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Checkpoints that are kept, the newest."""
    max_failures: int = Field(default=3, ge=-1)
    """Times that dead workers are started again; -1 without end."""
    check_memory: bool = True
    """Refuse a start that by estimate does not fit the workers' memory."""
    trackers: tuple[Tracker, ...] = ()
    """Where steps are reported beside the terminal, metrics.jsonl and Ray's metrics: tensorboard, and wandb and mlflow where
    they are installed."""

    @model_validator(mode="after")
    def _can_compile(self) -> Self:
        if self.torch_compile and self.zero_stage == 3:
            raise OptionError(
                "{torch_compile} does not go with {zero_stage} = 3; choose a lower stage, or leave it off"
            )
        return self

    operational: ClassVar[frozenset[str]] = frozenset(
        {
            "gradient_checkpointing",
            "torch_compile",
            "zero_stage",
            "num_workers",
            "min_workers",
            "num_cpus_per_worker",
            "checkpoint_every_steps",
            "keep_checkpoints",
            "max_failures",
            "check_memory",
            "trackers",
        }
    )


def adapter_shape(config: OptimizationConfig, targets: tuple[str, ...]) -> "AdapterShape | None":
    """The adapter that the options ask for; None where all weights are trained."""
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
    """How to descend."""
    from readapt_ray.training.engine import Optimization

    return Optimization(
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        warmup_fraction=config.warmup_fraction,
        max_gradient_norm=config.max_gradient_norm,
        zero_stage=config.zero_stage,
        seed=config.seed,
        checkpoint_every_steps=config.checkpoint_every_steps,
        keep_checkpoints=config.keep_checkpoints,
    )
