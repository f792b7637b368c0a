"""train: token blocks and a pretrained model to a knowledge adapter (RE-AdaptIR, section 3).

Runs on Ray Train workers under DeepSpeed. Leaves a plain PEFT adapter folder, or a Hugging Face model
folder where all weights are trained. Killed at any moment, it goes on from the newest checkpoint:
every block bears loss once an epoch.

ZeRO stage 0 is the default: adapters are small, a frozen 7B base fits one 80 GB GPU, and with stage 3
DoRA's norms gather half as many elements again as LoRA.
"""

from typing import Any, ClassVar, Literal

from pydantic import Field

from readapt_ray import artifacts
from readapt_ray.artifacts import Artifact, Workspace
from readapt_ray.catalog import models, retrievers
from readapt_ray.errors import CorpusError, ModelError
from readapt_ray.stages import workers
from readapt_ray.stages.optimization import OptimizationConfig, adapter_shape, compute_dtype, optimization
from readapt_ray.storage import Location


class TrainConfig(OptimizationConfig):
    """Options of train. The defaults are the paper's."""

    pretrained: str
    """MODEL before retrieval training: catalog name, folder, URI or hub id."""
    corpus: str
    """Passages (the output of `readapt ingest`) or token blocks (of pack)."""
    mode: Literal["passage", "packed"] = "passage"
    """passage: a block is one passage, as in the paper; packed: passages end to end, none seeing another."""
    block_tokens: int = Field(default=1024, ge=8)
    """Longest passage, and in packed mode the length of a block, in tokens."""
    batch_size: int = Field(default=4, ge=1)
    """Blocks a step, over all workers."""
    target_modules: tuple[str, ...] = retrievers.LLAMA_TARGETS
    """Linear layers that get an adapter: query, key, value, up and down projections."""
    micro_batch_tokens: int = Field(default=4096, ge=8)
    """Padded tokens of one forward and backward pass; bounds the memory, not the result."""

    inputs: ClassVar[frozenset[str]] = frozenset({"pretrained", "corpus"})
    # What mode and block_tokens did is in the fingerprint of the blocks.
    operational: ClassVar[frozenset[str]] = OptimizationConfig.operational | {
        "micro_batch_tokens",
        "mode",
        "block_tokens",
    }


def train(config: TrainConfig) -> Artifact:
    """Train a knowledge adapter on token blocks.

    Args:
        config: its `corpus` names the output of pack.

    Raises:
        ArtifactMissingError: the blocks are not complete.
        ModelError: the pretrained model is none, or has no layer of the names in `target_modules`.
        PlacementError: the cluster does not have the workers asked for.
        TrainingDivergedError: the loss became NaN or infinite; checkpoints are kept.
    """
    blocks = artifacts.open_artifact(config.corpus, "pack")
    if not blocks.manifest.counts["num_blocks"]:
        raise CorpusError(f"{config.corpus!r} holds no blocks; pack a corpus that has text")
    model = models.find_model(config.pretrained)
    if model.is_adapter:
        raise ModelError(
            f"{config.pretrained!r} is an adapter; give the model that it was trained on: {model.base().name!r}"
        )
    inputs = {"corpus": blocks.fingerprint, "pretrained": model.fingerprint()}
    return artifacts.produce("train", config, inputs=inputs, work=lambda workspace: _train(config, blocks, workspace))


def _train(config: TrainConfig, blocks: Artifact, workspace: Workspace) -> None:
    num_workers, resources, use_gpu = workers.placement(config.num_workers, config.num_cpus_per_worker)
    job = {
        "config": config.settings(),
        "blocks": (blocks.location / "blocks").uri,
        "output": workspace.location.uri,
    }
    workers.run_workers(
        _work,
        job,
        workspace,
        num_workers=num_workers,
        resources=resources,
        use_gpu=use_gpu,
        max_failures=config.max_failures,
    )
    rows = workers.read_metrics(workspace.location)
    packed = blocks.manifest.counts
    workspace.counts = {
        "num_steps": -(-packed["num_blocks"] // config.batch_size) * config.num_epochs,
        "num_passages": packed["num_passages"] * config.num_epochs,
        "num_tokens": packed["num_tokens"] * config.num_epochs,
    }
    tail = rows[-max(1, len(rows) // 20) :]
    workspace.details = {
        "num_workers": num_workers,
        "first_loss": rows[0]["loss"] if rows else None,
        "last_loss": sum(row["loss"] for row in tail) / len(tail) if tail else None,
    }


def _work(job: dict[str, Any]) -> None:
    """One worker's part; the first worker writes the result."""
    import torch

    from readapt_ray.training import dora, language_model
    from readapt_ray.training.blocks import BlockReader

    config = TrainConfig.model_validate(job["config"])
    output = Location(job["output"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = compute_dtype(config, device)
    source = models.find_model(config.pretrained)
    stored = torch.float32 if config.method == "full" else dtype
    model = language_model.load_causal_lm(str(source.folder), dtype=stored, device=device)
    torch.manual_seed(config.seed)
    shape = adapter_shape(config)
    language_model.make_trainable(model, shape)
    reader = BlockReader(
        Location(job["blocks"]), batch_size=config.batch_size, num_epochs=config.num_epochs, seed=config.seed
    )
    tokenizer = models.load_tokenizer(source)
    stepper = language_model.train_language_model(
        model,
        reader,
        optimization=optimization(config),
        pad_id=tokenizer.eos_token_id,
        micro_batch_tokens=config.micro_batch_tokens,
        dtype=dtype,
        checkpoints=output / "checkpoints",
        on_step=workers.StepPoster(job["board"], torch.distributed.get_rank()),
    )
    if stepper.worker_rank != 0:
        return
    if shape is None:
        language_model.save_model(model, Location(str(source.folder)), output)
        return
    state = dora.adapter_state(model)
    dora.save_adapter(output, state, shape, base=retrievers.base_name(config.pretrained), task_type="CAUSAL_LM")
