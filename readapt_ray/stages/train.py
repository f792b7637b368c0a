"""The train stage: train a knowledge adapter of a pretrained model on token blocks (RE-AdaptIR, section 3).

In: a pretrained model and blocks of passages. Out: a PEFT adapter folder, or a Hugging Face model folder if all weights
are trained. Decoders learn to predict the next token, encoders masked tokens. It runs on Ray Train workers under
DeepSpeed. A killed run resumes from the newest checkpoint, on any number of workers; each block is trained on once per
epoch.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from readapt_ray import artifacts
from readapt_ray.artifacts import Artifact, Workspace
from readapt_ray.catalog import models, shapes
from readapt_ray.catalog.models import OpenModel
from readapt_ray.catalog.retrievers import Objective
from readapt_ray.cluster import batches, continued_adapter, on_worker, train_workers
from readapt_ray.cluster.optimization import OptimizationConfig
from readapt_ray.cluster.pack_options import PACK_OPTIONS, PackOptions
from readapt_ray.errors import CorpusError, ModelError, ReadaptError
from readapt_ray.made_of import open_input
from readapt_ray.storage import Location

if TYPE_CHECKING:
    from readapt_ray.cluster.block_stream import BlockStream


class TrainConfig(PackOptions, OptimizationConfig):
    """The options of `readapt train`. The defaults are those of the paper."""

    pretrained: str
    """Model before retrieval training: a catalog name, a folder, a GGUF file, a URI or a hub id."""
    corpus: str
    """Passages (the output of `readapt ingest`) or blocks (the output of `readapt pack`). Passages are packed
    first, into OUTPUT-blocks."""
    continue_from: str | None = None
    """Adapter of an earlier training on the same pretrained model to start from; it keeps its method, rank, alpha and
    target modules. Give it passages that it has not seen: with new_since, or a corpus of new passages."""
    objective: Objective | None = None
    """causal_lm predicts the next token (decoders); masked_lm predicts masked tokens (encoders). If omitted, the one
    that the model has a head for."""
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = 4
    """Blocks per step, over all workers. auto gives each worker at least 16,384 tokens per step, but takes at least 500
    steps, on fewer workers if the corpus is small. learning_rate is then the rate for 4 passages per step: it grows
    with the square root of the passages per step, at most fivefold."""
    micro_batch_tokens: int = Field(default=4096, ge=8)
    """Tokens per forward and backward pass. Lower it when memory is short; the result stays the same."""

    inputs: ClassVar[frozenset[str]] = frozenset({"pretrained", "corpus", "continue_from"})
    # The options of pack are part of the fingerprint of the blocks.
    operational: ClassVar[frozenset[str]] = OptimizationConfig.operational | {
        "micro_batch_tokens",
        *PACK_OPTIONS,
    }


def train(config: TrainConfig) -> Artifact:
    """Train a knowledge adapter on token blocks, or all weights if `method` is full.

    A killed run resumes from its newest checkpoint. Does nothing if the output is complete and of the same
    options and inputs.

    Args:
        config: the options; here `corpus` must name an output of pack.

    Raises:
        ArtifactMissingError: `corpus` is not a complete output of pack.
        CorpusError: there are no blocks, or they were packed with other options than the ones given.
        InputError: `continue_from` has another rank, alpha, method or target modules than the options ask for.
        ModelError: the pretrained model cannot be used: it has no head for the objective, no layers with the names in
            `target_modules`, or another tokenizer than the one that made the blocks; or `continue_from` was trained on
            another model.
        PlacementError: the cluster does not have the requested workers, or not the memory.
        TrainingDivergedError: the loss became NaN or infinite; checkpoints are kept.
        ArtifactConflictError: the output holds something else, or a result of other options and `overwrite` is not set.
    """
    blocks = artifacts.open_artifact(config.corpus, "pack")
    if not blocks.manifest.counts["num_blocks"]:
        raise CorpusError(f"{config.corpus!r} holds no blocks; pack a corpus that has text")
    for name in (each for each in PACK_OPTIONS if each in config.model_fields_set):
        wanted, packed = getattr(config, name), blocks.manifest.config.get(name)
        if wanted is not None and wanted != packed:
            raise CorpusError(
                f"{name} = {wanted!r}, but {config.corpus!r} was packed with {name} = {packed!r}; pack again"
            )
    model, config = resolve(config, models.open_model(config.pretrained))
    if blocks.manifest.inputs["pretrained"] != model.tokenizer_fingerprint:
        raise ModelError(
            f"{config.corpus!r} was packed with the tokenizer of {blocks.manifest.config['pretrained']!r}, which is not that "
            f"of {config.pretrained!r}; pack the passages again with this model"
        )
    inputs = {"corpus": blocks.fingerprint, "pretrained": model.fingerprint}
    if config.continue_from is not None:
        earlier = models.open_model(config.continue_from)
        continued_adapter.check_base(earlier, model)
        inputs["continue_from"] = earlier.fingerprint
        config = config.model_copy(update={"continue_from": on_worker.model_name(earlier)})
    return artifacts.produce(
        "train", config, inputs=inputs, work=lambda workspace: _train(config, model, blocks, workspace)
    )


def check_pretrained(config: TrainConfig) -> None:
    """Check that the pretrained model can be trained with these options, before passages are packed.

    Of a model that is not on this machine, configuration and tokenizer are fetched, not the weights.

    Raises:
        InputError: as `resolve`.
        ModelError: as `resolve`.
    """
    resolve(config, models.open_model(config.pretrained, with_weights=False))


def resolve(config: TrainConfig, model: OpenModel) -> tuple[OpenModel, TrainConfig]:
    """Fill in the objective and the target modules that depend on the model, and check them; no weight is read.

    With `continue_from`, rank, alpha, method and target modules are those of that adapter.

    Args:
        config: the options; what the user gave is kept.
        model: the pretrained model.

    Returns:
        The same model, and the config with these options filled in.

    Raises:
        InputError: `continue_from` has another rank, alpha, method or target modules than the options ask for, or
            `base_dtype` needs a package that is not installed.
        ModelError: the model is an adapter or quantized, has no language-model head, or has no layers with the names in
            `target_modules`; or `continue_from` is not an adapter that can be trained further.
    """
    from readapt_ray.nn import quantized

    quantized.check_installed(config.base_dtype)
    if model.is_adapter:
        raise ModelError(
            f"{config.pretrained!r} is an adapter; give the model that it was trained on: {model.base.name!r}"
        )
    shapes.refuse_quantized(model.config, model.name)
    if config.continue_from is not None:
        earlier = models.open_model(config.continue_from, with_weights=False)
        config = continued_adapter.with_shape_of(config, earlier)
    objective = config.objective or objective_of(model)
    targets = train_workers.target_modules(config, model)
    if targets:
        shapes.shape_of(model.config, model.name, objective).adapted(targets)
    return model, config.model_copy(update={"objective": objective, "target_modules": targets})


def objective_of(model: OpenModel) -> Objective:
    """Return the training objective that a pretrained model has a head for: causal_lm or masked_lm.

    Raises:
        ModelError: its config names no architecture, or one without a language-model head.
    """
    config = model.config
    objective = shapes.objective_of(config)
    if objective is not None:
        return objective
    raise ModelError(
        f"{model.name!r} has no language-model head (architectures: {config.get('architectures') or []}); give the pretrained model, before "
        f"retrieval training, or say --objective causal_lm or masked_lm where its config.json is wrong"
    )


def _train(config: TrainConfig, model: OpenModel, blocks: Artifact, workspace: Workspace) -> None:
    packed = blocks.manifest.counts
    config, batch_size = _with_batch_size(config, packed, workspace.location)
    job = {
        "config": {**config.settings(), "pretrained": on_worker.model_name(model)},
        "blocks": on_worker.absolute(blocks.location / "blocks").uri,
        "passages": _passages(blocks),
        "block_tokens": blocks.manifest.config["block_tokens"],
        "mean_tokens": packed["num_tokens"] / max(1, packed["num_passages"]),
        "output": on_worker.absolute(workspace.location).uri,
    }
    stream = _stream(config, model, Location(job["blocks"]), on_worker.absolute(workspace.location))
    job["data_order"] = stream.data_order
    outcome = train_workers.run_workers("train", _work, job, workspace, config, stream=stream)
    workspace.counts = {
        "num_steps": -(-packed["num_blocks"] // batch_size) * config.num_epochs,
        "num_passages": packed["num_passages"] * config.num_epochs,
        "num_tokens": packed["num_tokens"] * config.num_epochs,
    }
    workspace.details = {**outcome.details(), "batch_size": batch_size, "learning_rate": config.learning_rate}
    if "truncation" in blocks.manifest.details:
        workspace.details["truncation"] = blocks.manifest.details["truncation"]


def _passages(blocks: Artifact) -> str | None:
    """Return the URI of the passages that blocks were packed from; None if they are missing or were replaced."""
    try:
        corpus = open_input(blocks, "corpus", "ingest")
    except ReadaptError:
        return None
    if corpus.fingerprint != blocks.manifest.inputs["corpus"]:
        return None
    return on_worker.absolute(corpus.location / "passages").uri


def _with_batch_size(config: TrainConfig, packed: dict[str, int], output: Location) -> tuple[TrainConfig, int]:
    """Choose the batch size if it is auto, and check that it has a block for each worker."""
    from readapt_ray.training.step_size import PackedSize

    if config.batch_size == "auto":
        names = ("num_blocks", "num_passages", "num_tokens")
        size = PackedSize(**{name: packed[name] * config.num_epochs for name in names})
        config = batches.with_batch_size(config, size, output)
    assert config.batch_size != "auto"
    batches.check_batch_feeds(config, config.batch_size, "blocks")
    return config, config.batch_size


def _stream(config: TrainConfig, model: OpenModel, blocks: Location, output: Location) -> "BlockStream":
    """Plan the stream of blocks to the workers: data order, masking and micro-batches."""
    from readapt_ray.cluster.block_stream import BlockStream
    from readapt_ray.training.blocks import list_row_groups
    from readapt_ray.training.checkpoints import DataOrder
    from readapt_ray.training.packing import Masking, end_id
    from readapt_ray.training.shares import BatchSettings

    assert config.batch_size != "auto"
    tokenizer = model.tokenizer
    masking = None
    if config.objective == "masked_lm":
        vocab_size = min(len(tokenizer), int(model.config.get("vocab_size") or len(tokenizer)))
        masking = Masking(mask_id=tokenizer.mask_token_id, vocab_size=vocab_size, seed=config.seed)
    # Pad with the end token: some tokenizers have a padding token for which the model has no embedding.
    pad_id = end_id(tokenizer)
    assert pad_id is not None  # pack refuses a tokenizer without an end token
    row_groups = list_row_groups(blocks)
    data_order = DataOrder(
        num_units=row_groups.num_blocks, batch_size=config.batch_size, num_epochs=config.num_epochs, seed=config.seed
    )
    batch_settings = BatchSettings(pad_id=pad_id, micro_batch_tokens=config.micro_batch_tokens, masking=masking)
    return BlockStream(row_groups, data_order, batch_settings, output / "checkpoints")


def _work(job: dict[str, Any]) -> None:
    """Train on one worker."""
    from readapt_ray.cluster import block_stream
    from readapt_ray.training.language_model import LanguageModelling

    config = TrainConfig.model_validate(job["config"])
    assert config.objective is not None
    shares = block_stream.receive(job["data_order"].num_steps)
    longest_pass = max(config.micro_batch_tokens, job["block_tokens"])
    worker = train_workers.TrainWorker(
        job, config, config.pretrained, objective=config.objective, micro_batch_tokens=longest_pass
    )
    if config.continue_from is not None:
        expected, node = job["inputs"].values(), job["driver_node"]
        continued_adapter.load(worker.model, config.continue_from, expected=expected, driver_node=node)
    objective = LanguageModelling(
        model=worker.model,
        data_order=job["data_order"],
        batches=shares,
        dtype=worker.dtype,
    )
    worker.run(objective, mean_tokens=job["mean_tokens"], doc_ids_of=_doc_ids(job["passages"]))
    task_type = "CAUSAL_LM" if config.objective == "causal_lm" else "FEATURE_EXTRACTION"
    worker.save(trained_on=job["config"]["pretrained"], task_type=task_type)


def _doc_ids(passages: str | None) -> Callable[[Sequence[int]], list[str]]:
    """Return a function that finds the doc_ids of passages by their numbers.

    A passage's number counts the rows of the files of passages, in order. If `passages` is None or lacks a number, the
    function returns the number as text.
    """

    def find(numbers: Sequence[int]) -> list[str]:
        import pyarrow.parquet as pq

        found: dict[int, str] = {}
        first = 0
        for file in Location(passages).files(".parquet") if passages else ():
            with file.open_input() as stream:
                opened = pq.ParquetFile(stream)
                end = first + opened.metadata.num_rows
                wanted = [number for number in numbers if first <= number < end]
                if wanted:
                    ids = opened.read(columns=["doc_id"])["doc_id"]
                    found |= {number: repr(ids[number - first].as_py()) for number in wanted}
            first = end
        return [found.get(number, f"number {number}") for number in numbers]

    return find
