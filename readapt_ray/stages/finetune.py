"""finetune: passages, queries and judgements to a retriever (the supervised way, for those who have labels).

InfoNCE with in-batch negatives on Ray Train workers under DeepSpeed. Leaves a PEFT adapter folder with
its encoding contract in `readapt.json`, or a Hugging Face model folder where all weights are trained.
"""

import json
from typing import Any, ClassVar, Literal

from pydantic import Field

from readapt_ray import artifacts
from readapt_ray.artifacts import Artifact, Workspace
from readapt_ray.catalog import models, retrievers
from readapt_ray.catalog.retrievers import Encoding
from readapt_ray.errors import CorpusError, ModelError
from readapt_ray.retrieval.templates import EncodingOption
from readapt_ray.stages import workers
from readapt_ray.stages.optimization import OptimizationConfig, adapter_shape, compute_dtype, optimization
from readapt_ray.storage import Location

_TEXTS_PER_CALL = 1024


class FinetuneConfig(OptimizationConfig):
    """Options of finetune."""

    model: str
    """MODEL to start from: catalog name, folder, URI or hub id."""
    corpus: str
    """Passages with queries and qrels: the output of `readapt ingest`."""
    split: str = "train"
    """The qrels of the corpus that name the right passages: train, dev, test ..."""
    encoding: EncodingOption = None
    """How the retriever shall want its text: a JSON file; default what the model's folder or the catalog says."""
    method: Literal["dora", "lora", "full"] = "lora"
    """What is trained: DoRA or LoRA adapters, or all weights."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability that an adapter's input is dropped."""
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Linear layers that get an adapter, by the last part of their names."""
    batch_size: int = Field(default=128, ge=2)
    """Pairs a step, over all workers; the other passages of the batch are the negatives."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate of AdamW; falls linearly to 0."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's."""
    warmup_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps over which the learning rate rises."""
    temperature: float = Field(default=0.05, gt=0)
    """Divides the cosine in the loss."""
    both_directions: bool = False
    """Also tell each passage's query from the batch's other queries."""

    inputs: ClassVar[frozenset[str]] = frozenset({"model", "corpus"})


def finetune(config: FinetuneConfig) -> Artifact:
    """Train a retriever on (query, passage) pairs.

    Raises:
        ArtifactMissingError: the corpus is not a complete output of ingest.
        CorpusError: it has no qrels of that split, or none that names a query and a passage it holds.
        ModelError: the model cannot be found, is an adapter, or nothing says how it wants its text.
    """
    corpus = artifacts.open_artifact(config.corpus, "ingest")
    model = models.find_model(config.model)
    if model.is_adapter:
        raise ModelError(
            f"{config.model!r} is an adapter; merge it first (readapt merge) or give the model that it was trained on"
        )
    encoding = config.encoding or models.encoding_of(model)
    qrels = corpus.location / "qrels" / f"{config.split}.parquet"
    if not qrels.is_file():
        there = [file.name.removesuffix(".parquet") for file in (corpus.location / "qrels").files(".parquet")]
        raise CorpusError(
            f"{config.corpus!r} has no qrels of the split {config.split!r}; it has {there or 'no qrels at all'}"
        )
    inputs = {"corpus": corpus.fingerprint, "model": model.fingerprint()}
    return artifacts.produce(
        "finetune",
        config,
        inputs=inputs,
        identity={"encoding": encoding.model_dump(mode="json")},
        work=lambda workspace: _finetune(config, corpus, encoding, workspace),
    )


def _finetune(config: FinetuneConfig, corpus: Artifact, encoding: Encoding, workspace: Workspace) -> None:
    num_workers, resources, use_gpu = workers.placement(config.num_workers, config.num_cpus_per_worker)
    pairs = workspace.location / "pairs" / "part-00000.parquet"
    if not pairs.is_file():
        _write_pairs(config, corpus, encoding, pairs)
    job = {
        "config": config.settings(),
        "encoding": encoding.model_dump(mode="json"),
        "pairs": (workspace.location / "pairs").uri,
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
    import pyarrow.parquet as pq

    with pairs.open_input() as stream:
        num_pairs = pq.ParquetFile(stream).metadata.num_rows
    rows = workers.read_metrics(workspace.location)
    workspace.counts = {
        "num_pairs": num_pairs * config.num_epochs,
        "num_steps": -(-num_pairs // config.batch_size) * config.num_epochs,
    }
    workspace.details = {"num_workers": num_workers, "last_loss": rows[-1]["loss"] if rows else None}


def _write_pairs(config: FinetuneConfig, corpus: Artifact, encoding: Encoding, target: Location) -> None:
    """Tokenise every judged pair, in the order of the qrels."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from readapt_ray.retrieval.templates import TextTokenizer
    from readapt_ray.sources.judgements import read_qrels, read_queries
    from readapt_ray.training.contrastive import PAIR_SCHEMA

    queries = {query.query_id: query.text for query in read_queries((corpus.location / "queries").uri)}
    relevant = [
        qrel
        for qrel in read_qrels((corpus.location / "qrels" / f"{config.split}.parquet").uri)
        if qrel.relevance > 0 and qrel.query_id in queries
    ]
    wanted = {qrel.doc_id for qrel in relevant}
    passages: dict[str, tuple[int, str, str]] = {}
    for file in (corpus.location / "passages").files(".parquet"):
        with file.open_input() as stream:
            for batch in pq.ParquetFile(stream).iter_batches():
                for row in batch.to_pylist():
                    if row["doc_id"] in wanted:
                        passages[row["doc_id"]] = (len(passages), row["title"] or "", row["text"])
    relevant = [qrel for qrel in relevant if qrel.doc_id in passages]
    if len(relevant) < 2:
        raise CorpusError(
            f"{config.corpus!r} has {len(relevant)} pairs of the split {config.split!r} whose query and passage it holds; at least 2 are needed"
        )
    text_tokenizer = TextTokenizer(models.load_tokenizer(models.find_model(config.model)), encoding)
    tables = []
    for start in range(0, len(relevant), _TEXTS_PER_CALL):
        part = relevant[start : start + _TEXTS_PER_CALL]
        found = [passages[qrel.doc_id] for qrel in part]
        tables.append(
            pa.table(
                {
                    "query_ids": text_tokenizer.ids([queries[qrel.query_id] for qrel in part], "query"),
                    "passage_ids": text_tokenizer.ids(
                        [text for _, _, text in found], "passage", [title for _, title, _ in found]
                    ),
                    "doc_number": [number for number, _, _ in found],
                },
                schema=PAIR_SCHEMA,
            )
        )
    with target.open_output() as stream:
        pq.write_table(pa.concat_tables(tables), stream, compression="zstd")


def _work(job: dict[str, Any]) -> None:
    """One worker's part; the first worker writes the result."""
    import torch

    from readapt_ray.training import contrastive, dora, language_model
    from readapt_ray.weights.loading import load_model

    config = FinetuneConfig.model_validate(job["config"])
    encoding = Encoding.model_validate(job["encoding"])
    output = Location(job["output"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = models.find_model(config.model)
    model = load_model(source, dtype=torch.float32, device=str(device)).train()
    torch.manual_seed(config.seed)
    shape = adapter_shape(config)
    language_model.make_trainable(model, shape)
    reader = contrastive.PairReader(
        Location(job["pairs"]), batch_size=config.batch_size, num_epochs=config.num_epochs, seed=config.seed
    )
    stepper = contrastive.train_retriever(
        model,
        reader,
        encoding,
        optimization=optimization(config),
        temperature=config.temperature,
        both_directions=config.both_directions,
        dtype=compute_dtype(config, device),
        checkpoints=output / "checkpoints",
        on_step=workers.StepPoster(job["board"], torch.distributed.get_rank()),
    )
    if stepper.worker_rank != 0:
        return
    (output / models.CONTRACT_NAME).write_text(json.dumps({"encoding": job["encoding"]}, indent=2) + "\n")
    if shape is None:
        language_model.save_model(model, Location(str(source.folder)), output)
        return
    state = dora.adapter_state(model)
    dora.save_adapter(output, state, shape, base=retrievers.base_name(config.model), task_type="FEATURE_EXTRACTION")
