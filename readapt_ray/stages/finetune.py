"""The finetune stage: train a retriever on queries and the passages that answer them (supervised training).

In: a model, and labelled pairs. Out: a PEFT adapter folder with the encoding in `readapt.json`, or a Hugging Face model
folder if all weights are trained. The loss is InfoNCE, with the batches of all workers as negatives and optional hard
negatives. It runs on Ray Train workers under DeepSpeed.
"""

import json
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from readapt_ray import artifacts
from readapt_ray.artifacts import Artifact, Workspace
from readapt_ray.catalog import models, shapes
from readapt_ray.catalog.dense_layers import dense_layers
from readapt_ray.catalog.encoding import Encoding, EncodingOption
from readapt_ray.catalog.query_models import describe_passages, passages_model
from readapt_ray.cluster import batches, on_worker, train_workers
from readapt_ray.cluster.optimization import OptimizationConfig
from readapt_ray.config import OptionError, UsedWith
from readapt_ray.errors import ModelError
from readapt_ray.model_file_names import CONTRACT_NAME
from readapt_ray.storage import Location
from readapt_ray.training import labelled_pairs


class FinetuneConfig(OptimizationConfig):
    """The options of `readapt finetune`."""

    model: str
    """Model to start from: a catalog name, a folder, a GGUF file, a URI or a hub id."""
    corpus: str
    """Passages with queries and qrels (the output of `readapt ingest`), queries that a language model wrote (the output of
    `readapt synthesize`), or a JSONL file of pairs with the texts `query`, `positive` and, optionally, `negatives`. If
    ingest split a document, the passage that has most words of the query is trained on."""
    split: str = "train"
    """Split of the corpus's qrels to train on: train, dev, test."""
    negatives: str | None = None
    """TREC run to take hard negatives from (the output of `readapt search`): its best passages that are not judged
    relevant."""
    num_negatives: int = Field(default=1, ge=1)
    """Hard negatives per query, when negatives is given."""
    encoding: EncodingOption = None
    """JSON file with pooling, prompts and special tokens for the trained model. If omitted, what the model's folder
    or the catalog says."""
    method: Literal["dora", "lora", "full"] = "lora"
    """Train LoRA adapters (lora), DoRA adapters (dora) or all weights (full)."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability on the input of each adapter."""
    batch_size: int = Field(default=128, ge=2)
    """Query-passage pairs per step, over all workers. The other passages of the batch are the negatives, so a
    larger batch is a harder task."""
    micro_batch_tokens: int = Field(default=16384, ge=8)
    """Tokens per forward and backward pass, padding included. Lower it when memory is short; batch and result stay
    the same (GradCache)."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate of AdamW; it decays linearly to 0. Lower it if the loss jumps."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Weight decay of AdamW."""
    warmup_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Fraction of the steps in which the learning rate rises from 0 to its peak."""
    temperature: float = Field(default=0.05, gt=0)
    """Temperature of the InfoNCE loss: cosines are divided by it."""
    queries_only: bool = False
    """Train only the encoding of queries. Passages are encoded by the original model, so its vectors stay valid:
    `search` and `serve` accept them with the output, and `embed` encodes passages with the original model."""
    both_directions: bool = False
    """Also train each passage to find its query among the queries of the batch."""

    inputs: ClassVar[frozenset[str]] = frozenset({"model", "corpus", "negatives"})
    used_with: ClassVar[UsedWith] = {
        **OptimizationConfig.used_with,
        "num_negatives": ("negatives", ()),
    }
    operational: ClassVar[frozenset[str]] = OptimizationConfig.operational | {"micro_batch_tokens"}

    @model_validator(mode="after")
    def _keeps_the_model(self) -> Self:
        if self.queries_only and self.method == "full":
            raise OptionError(
                "{queries_only} keeps the weights of the model for passages, and {method} = full changes them; choose lora or dora"
            )
        return self


def finetune(config: FinetuneConfig) -> Artifact:
    """Train a retriever on (query, passage) pairs: an adapter, or all weights if `method` is full.

    A killed run resumes from its newest checkpoint. Does nothing if the output is complete and of the same
    options and inputs.

    Raises:
        InputError: `base_dtype` needs a package that is not installed.
        ArtifactMissingError: the corpus is neither a complete output of ingest or synthesize nor a file of pairs.
        CorpusError: it has no qrels of that split, or fewer than two that name a query and a passage of the corpus.
        ModelError: the model cannot be found, is an adapter, quantized or only for queries, has Dense layers after its
            pooling, or nothing says how it encodes text.
        PlacementError: the cluster does not have the requested workers, or not the memory.
        TrainingDivergedError: the loss became NaN or infinite; checkpoints are kept.
        ArtifactConflictError: the output holds something else, or a result of other options and `overwrite` is not set.
    """
    from readapt_ray.nn import quantized

    quantized.check_installed(config.base_dtype)
    source = labelled_pairs.open_pairs(config.corpus, config.split, config.negatives)
    model = models.open_model(config.model)
    if model.is_adapter:
        raise ModelError(
            f"{config.model!r} is an adapter; merge it first (readapt merge) or give the model that it was trained on"
        )
    shapes.refuse_quantized(model.config, model.name)
    if (passages := passages_model(model)) is not None:
        raise ModelError(
            f"{config.model!r} is only for queries, and its passages are encoded by {passages.name!r}; finetune starts from one "
            f"model for both: give {passages.name!r}"
        )
    if layers := dense_layers(model):
        raise ModelError(
            f"{config.model!r} has the layer {layers[0].path} behind its pooling, which finetune does not train; give a model "
            f"whose modules are Transformer, Pooling and Normalize alone"
        )
    encoding = config.encoding or model.encoding
    config = config.model_copy(update={"target_modules": train_workers.target_modules(config, model)})
    return artifacts.produce(
        "finetune",
        config,
        inputs={**source.fingerprints, "model": model.fingerprint},
        identity={"encoding": encoding.model_dump(mode="json"), "negatives": "none that is relevant"},
        work=lambda workspace: _finetune(config, model, source, encoding, workspace),
    )


def _finetune(
    config: FinetuneConfig,
    model: models.OpenModel,
    source: labelled_pairs.PairSource,
    encoding: Encoding,
    workspace: Workspace,
) -> None:
    import pyarrow.parquet as pq

    batches.check_batch_feeds(config, config.batch_size, "pairs")
    pairs = workspace.location / "pairs" / "part-00000.parquet"
    if not pairs.is_file():
        labelled_pairs.write_pairs(source, model, encoding, pairs, num_negatives=config.num_negatives)
    with pairs.open_input() as stream:
        num_pairs = pq.ParquetFile(stream).metadata.num_rows
    job = {
        "config": {**config.settings(), "model": on_worker.model_name(model)},
        "encoding": encoding.model_dump(mode="json"),
        "passages_model": describe_passages(model, encoding).to_json() if config.queries_only else {},
        "pairs": on_worker.absolute(workspace.location / "pairs").uri,
        "output": on_worker.absolute(workspace.location).uri,
    }
    outcome = train_workers.run_workers("finetune", _work, job, workspace, config)
    workspace.counts = {
        "num_pairs": num_pairs * config.num_epochs,
        "num_steps": -(-num_pairs // config.batch_size) * config.num_epochs,
    }
    workspace.details = outcome.details()


def _work(job: dict[str, Any]) -> None:
    """Train on one worker."""
    import torch

    from readapt_ray.training.contrastive import Contrast, install_packed_attention
    from readapt_ray.training.pairs import PairReader

    config = FinetuneConfig.model_validate(job["config"])
    encoding = Encoding.model_validate(job["encoding"])
    reader = PairReader(
        Location(job["pairs"]), batch_size=config.batch_size, num_epochs=config.num_epochs, seed=config.seed
    )
    # A small batch does not fill a micro-batch. It must not be refused for the memory that a full one would take.
    most_tokens = min(config.micro_batch_tokens, reader.most_tokens(torch.distributed.get_world_size()))
    worker = train_workers.TrainWorker(job, config, config.model, objective=None, micro_batch_tokens=most_tokens)
    install_packed_attention(worker.model, config.model)
    objective = Contrast(
        model=worker.model,
        reader=reader,
        encoding=encoding,
        temperature=config.temperature,
        both_directions=config.both_directions,
        micro_batch_tokens=config.micro_batch_tokens,
        dtype=worker.dtype,
        seed=config.seed,
        queries_only=config.queries_only,
    )
    worker.run(objective, mean_tokens=reader.mean_tokens(), doc_ids_of=reader.doc_ids)
    if torch.distributed.get_rank() == 0:
        contract = json.dumps({"encoding": job["encoding"], **job["passages_model"]}, indent=2)
        (worker.output / CONTRACT_NAME).write_text(contract + "\n")
    worker.save(trained_on=config.model, task_type="FEATURE_EXTRACTION")
