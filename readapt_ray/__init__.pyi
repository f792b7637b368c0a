"""Public names, for editors and type checkers, which run no code. Made by `make stub` from the configs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, overload

from readapt_ray.artifacts import Manifest as Manifest
from readapt_ray.catalog.encoding import Encoding as Encoding
from readapt_ray.catalog.models import open_model as open_model
from readapt_ray.errors import InputError as InputError
from readapt_ray.errors import ReadaptError as ReadaptError
from readapt_ray.evaluation.measures import Measurement as Measurement
from readapt_ray.evaluation.measures import measure as measure
from readapt_ray.python.artifact import Artifact as Artifact
from readapt_ray.python.artifact import Results as Results
from readapt_ray.python.artifact import open_artifact as open_artifact
from readapt_ray.python.functions import quiet as quiet
from readapt_ray.python.functions import run as run
from readapt_ray.python.functions import status as status
from readapt_ray.python.retriever import Encoder as Encoder
from readapt_ray.python.retriever import Hit as Hit
from readapt_ray.python.retriever import Retriever as Retriever
from readapt_ray.recipes.chain import RunConfig as RunConfig
from readapt_ray.recipes.chain import plan_run as plan_run
from readapt_ray.recipes.compare_plan import CompareConfig as CompareConfig
from readapt_ray.recipes.paper.options import PaperConfig as PaperConfig
from readapt_ray.recipes.refreshing.options import CleanConfig as CleanConfig
from readapt_ray.recipes.refreshing.options import FindConfig as FindConfig
from readapt_ray.recipes.refreshing.options import RefreshConfig as RefreshConfig
from readapt_ray.serving.options import ServeConfig as ServeConfig
from readapt_ray.stages.bridge import BridgeConfig as BridgeConfig
from readapt_ray.stages.drift import DriftConfig as DriftConfig
from readapt_ray.stages.embed import EmbedConfig as EmbedConfig
from readapt_ray.stages.evaluate import EvaluateConfig as EvaluateConfig
from readapt_ray.stages.export import ExportConfig as ExportConfig
from readapt_ray.stages.finetune import FinetuneConfig as FinetuneConfig
from readapt_ray.stages.index import IndexConfig as IndexConfig
from readapt_ray.stages.ingest import IngestConfig as IngestConfig
from readapt_ray.stages.merge import MergeConfig as MergeConfig
from readapt_ray.stages.pack import PackConfig as PackConfig
from readapt_ray.stages.search import SearchConfig as SearchConfig
from readapt_ray.stages.synthesize import SynthesizeConfig as SynthesizeConfig
from readapt_ray.stages.train import TrainConfig as TrainConfig
from readapt_ray.stages.tune import TuneConfig as TuneConfig
from readapt_ray.weights.reference import readapted_weight as readapted_weight

__all__ = [
    "__version__",
    "Artifact",
    "BridgeConfig",
    "CleanConfig",
    "CompareConfig",
    "DriftConfig",
    "EmbedConfig",
    "Encoder",
    "Encoding",
    "EvaluateConfig",
    "ExportConfig",
    "FindConfig",
    "FinetuneConfig",
    "Hit",
    "IndexConfig",
    "IngestConfig",
    "InputError",
    "Manifest",
    "Measurement",
    "MergeConfig",
    "PackConfig",
    "PaperConfig",
    "ReadaptError",
    "RefreshConfig",
    "Results",
    "Retriever",
    "RunConfig",
    "SearchConfig",
    "ServeConfig",
    "SynthesizeConfig",
    "TrainConfig",
    "TuneConfig",
    "bridge",
    "clean",
    "compare",
    "drift",
    "embed",
    "evaluate",
    "export",
    "find",
    "finetune",
    "index",
    "ingest",
    "measure",
    "merge",
    "open_artifact",
    "open_model",
    "pack",
    "paper",
    "plan_run",
    "quiet",
    "readapted_weight",
    "refresh",
    "run",
    "search",
    "serve",
    "status",
    "synthesize",
    "train",
    "tune",
]
__version__: str

@overload
def bridge(
    *,
    output: str | Path,
    old_vectors: str | Path,
    retriever: str | Path,
    overwrite: bool = False,
    corpus: str | Path | None = None,
    sample: int = 20000,
    encoding: Encoding | str | Path | None = None,
    dtype: Literal['auto', 'float32', 'float16', 'bfloat16'] = 'auto',
    seed: int = 0,
) -> Artifact:
    """Let a new model's queries search an old model's vectors while re-embedding runs.

    Give the options by name, or all of them as one BridgeConfig.

    Options:
        output: Folder or URI to write the artifact to. (required)
        overwrite: Replace an artifact in the output that was made or begun with other options. Without this
            such an output is refused. (default: no)
        old_vectors: Vectors to search: the output of `readapt embed` with the old model. (required)
        retriever: New model, whose queries will search these vectors: a catalog name, a folder, a GGUF file, a
            URI or a hub id. (required)
        corpus: Passages of the vectors, if they are no longer where they were embedded from: the output of
            `readapt ingest`.
        sample: Passages to encode with the new model; all if there are fewer. At least 500, and at least 1.25
            times the larger of the two models' dimensions. (default: 20000)
        encoding: JSON file with pooling, prompts and special tokens. If omitted, what the retriever's folder or
            the catalog says.
        dtype: Data type that the new model computes in; auto is bfloat16 on GPUs and on CPUs with AMX or
            AVX512_BF16, else float32. (default: auto)
        seed: Seed of the sample, of its parts and of the training of the residual map. (default: 0)

    Returns:
        The artifact: `.path`, `.manifest`, `.to_pandas()`, `.to_arrow()`, `.to_ray()`.

    Raises:
        InputError: an option is unknown, missing or wrong, or an input cannot be used; it is named.
    """
@overload
def bridge(config: BridgeConfig, /) -> Artifact: ...

@overload
def clean(
    *,
    root: str | Path,
    keep: int = 0,
    yes: bool = False,
) -> Results:
    """Remove earlier generations of a root, and what is left of deleted passages.

    Give the options by name, or all of them as one CleanConfig.

    Options:
        root: Folder or URI that holds the generations. (required)
        keep: Number of generations before the present one to keep, to go back to. They hold passages that were
            deleted since. (default: 0)
        yes: Remove the listed artifacts. Without this they are only listed. (default: no)

    Returns:
        The rows: they print as a table; `.rows`, `.to_pandas()`.

    Raises:
        InputError: an option is unknown, missing or wrong, or an input cannot be used; it is named.
    """
@overload
def clean(config: CleanConfig, /) -> Results: ...

@overload
def compare(
    *,
    retrievers: Sequence[str | Path],
    corpus: str | Path,
    output: str | Path,
    queries: str | Path | None = None,
    qrels: str | Path | None = None,
    columns: Sequence[str] = (),
    measures: Sequence[str] = ('nDCG@10', 'R@10', 'R@100'),
    drop_self_hits: bool | None = None,
    finetune: bool = False,
    readapt: bool = False,
    synthesize: str | None = None,
    queries_only: bool = False,
    bridge: bool = False,
    bm25: bool = False,
    num_timed_queries: int = 50,
    embed_options: dict[str, Any] = {},
    train_options: dict[str, Any] = {},
    merge_options: dict[str, Any] = {},
    finetune_options: dict[str, Any] = {},
    synthesize_options: dict[str, Any] = {},
) -> Results:
    """Compare retrievers on one corpus.

    Give the options by name, or all of them as one CompareConfig.

    Options:
        retrievers: Models to compare, separated by commas: catalog names, folders, URIs or hub ids. The first
            is the baseline. (required)
        corpus: Passages: the output of `readapt ingest`. (required)
        queries: Queries: a file or folder. If omitted, the queries of the corpus.
        qrels: File of judgements. If omitted, the corpus's qrels of the split test.
        columns: Columns of queries and qrels, if they have other names than usual:
            query_id=key,query=question,doc_id=docno,relevance=grade.
        output: Folder or URI to write all artifacts and the comparison to. (required)
        measures: Measures such as nDCG@10 or R@100, separated by commas. The first one is tested for
            significance. (default: nDCG@10,R@10,R@100)
        drop_self_hits: Drop a result whose doc_id equals the query_id. If omitted, as the catalog says for the
            corpus's source.
        finetune: Also compare each retriever after `readapt finetune` on the corpus's qrels of the split train.
            (default: no)
        readapt: Also compare each retriever after RE-AdaptIR on the passages, if the catalog knows its
            pretrained model. With finetune, also after both. (default: no)
        synthesize: Also compare each retriever after `readapt finetune` on queries that this language model
            writes for the passages. Give a folder, a URI or a hub id; with an endpoint in synthesize_options,
            the model's name there. Queries whose passage the first retriever does not find are dropped. With
            readapt, also after both.
        queries_only: With readapt, finetune or synthesize: also compare models that encode only queries, and
            search the retriever's vectors. (default: no)
        bridge: With readapt, finetune or synthesize: also compare a bridge that maps their query vectors to the
            retriever's vectors. (default: no)
        bm25: Also compare BM25 (search by words), and each model fused with BM25 by reciprocal rank, as `search
            --mode hybrid` does. An index of each model's vectors is written for this. (default: no)
        num_timed_queries: Number of queries to time, one by one, on this machine. (default: 50)
        embed_options: Options of embed by name (in a YAML file).
        train_options: Options of train and pack by name (in a YAML file).
        merge_options: Options of merge by name (in a YAML file).
        finetune_options: Options of finetune by name (in a YAML file).
        synthesize_options: Options of synthesize by name (in a YAML file).

    Returns:
        The rows: they print as a table; `.rows`, `.to_pandas()`.

    Raises:
        InputError: an option is unknown, missing or wrong, or an input cannot be used; it is named.
    """
@overload
def compare(config: CompareConfig, /) -> Results: ...

@overload
def drift(
    *,
    output: str | Path,
    adapter: str | Path,
    vectors: Sequence[str | Path],
    overwrite: bool = False,
    num_passages: int = 2000,
    dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto',
) -> Artifact:
    """Measure without queries what an adaptation changed: loss, vectors, neighbours.

    Give the options by name, or all of them as one DriftConfig.

    Options:
        output: Folder or URI to write the artifact to. (required)
        overwrite: Replace an artifact in the output that was made or begun with other options. Without this
            such an output is refused. (default: no)
        adapter: Output of `readapt train`. It names the pretrained model and the blocks that it was trained on.
            (required)
        vectors: Vectors of the retriever before and after adaptation, separated by a comma: two outputs of
            `readapt embed` for the same corpus. (required)
        num_passages: Maximum number of passages whose vectors are compared. (default: 2000)
        dtype: Data type that the language model computes in; auto is bfloat16 on GPUs and on CPUs with AMX or
            AVX512_BF16, else float32. (default: auto)

    Returns:
        The artifact: `.path`, `.manifest`, `.to_pandas()`, `.to_arrow()`, `.to_ray()`.

    Raises:
        InputError: an option is unknown, missing or wrong, or an input cannot be used; it is named.
    """
@overload
def drift(config: DriftConfig, /) -> Artifact: ...

@overload
def embed(
    *,
    output: str | Path,
    corpus: str | Path,
    overwrite: bool = False,
    retriever: str | Path = '',
    domain: str | Path | None = None,
    base: str | Path | None = None,
    previous: str | Path | None = None,
    sample: str | None = None,
    encoding: Encoding | str | Path | None = None,
    dtype: Literal['auto', 'float32', 'float16', 'bfloat16'] = 'auto',
    vector_dtype: Literal['float32', 'float16', 'int8'] = 'float32',
    dimensions: int | None = None,
    rows_per_shard: int | None = None,
    num_workers: int | None = None,
    num_cpus_per_worker: int | None = None,
    num_gpus_per_worker: float | None = None,
    batch_tokens: int | None = None,
    max_left_out: int = 100,
) -> Artifact:
    """Turn passages into vectors.

    Give the options by name, or all of them as one EmbedConfig.

    Options:
        output: Folder or URI to write the artifact to. (required)
        overwrite: Replace an artifact in the output that was made or begun with other options. Without this
            such an output is refused. (default: no)
        retriever: Model that makes the vectors: a catalog name, a folder, a GGUF file, a URI or a hub id. Give
            this or domain.
        domain: Factors of a domain, the output of `readapt merge --factors`: vectors and queries equal the
            merged model's. Give this or retriever.
        base: Model before retrieval training that the domain was merged with. If omitted, the one that the
            factors name.
        corpus: Passages: the output of `readapt ingest`. (required)
        previous: Vectors of an earlier state of the corpus by the same model. Only new and changed passages are
            encoded.
        sample: Encode only this part, as a percentage (1%) or a number of passages, and estimate time and size
            of a full run. Written to OUTPUT-sample.
        encoding: JSON file with pooling, prompts and special tokens. If omitted, what the retriever's folder or
            the catalog says.
        dtype: Data type that the model computes in; auto is bfloat16 on GPUs and on CPUs with AMX or
            AVX512_BF16, else float32. (default: auto)
        vector_dtype: Data type of the stored vectors. float16 takes half the space; int8 takes a quarter and
            keeps one scale per vector. (default: float32)
        dimensions: Keep only the first dimensions of each vector and normalise it again (for Matryoshka
            models). If omitted, all of them, or what the encoding says.
        rows_per_shard: Passages per data shard, the unit of work. If omitted, some 45 seconds of a device's
            work, at least 256 and at most a 32nd of the corpus.
        num_workers: Number of encoding actors. If omitted, as many as the GPUs have room for; without GPUs one
            per num_cpus_per_worker CPUs.
        num_cpus_per_worker: CPUs, and so threads, per actor. If omitted, 1.
        num_gpus_per_worker: Part of a GPU per actor: with 0.5, two actors share one. If omitted, 1; or 0.5 for
            small models such as all-MiniLM-L6-v2, which leave a GPU waiting for its host, if there are four
            cores per actor. Not measured on a GPU yet.
        batch_tokens: Maximum tokens per batch, padding included. If omitted, 1,024 on a CPU, and on a GPU by
            the model's size and the free memory: 119,808 for all-MiniLM-L6-v2, 9,216 for a 7B. Lower it when
            memory is short. In float32 the vectors do not depend on it (to 1e-6). In bfloat16 they differ by
            .001, and 99.8% of the ten nearest passages stay the same (measured on all-MiniLM-L6-v2).
        max_left_out: Maximum number of passages that are left out because their vector is NaN, infinite or
            zero, even in float32. The manifest names them. The run stops if there are more. (default: 100)

    Returns:
        The artifact: `.path`, `.manifest`, `.to_pandas()`, `.to_arrow()`, `.to_ray()`.

    Raises:
        InputError: an option is unknown, missing or wrong, or an input cannot be used; it is named.
    """
@overload
def embed(config: EmbedConfig, /) -> Artifact: ...

@overload
def evaluate(
    *,
    output: str | Path,
    runs: Sequence[str | Path],
    qrels: str | Path,
    overwrite: bool = False,
    measures: Sequence[str] = ('nDCG@10', 'R@100', 'RR@10'),
    names: Sequence[str] = (),
    queries: str | Path = '',
    columns: Sequence[str] = (),
    corpus: str | Path = '',
    general: str | Path = '',
    require: Sequence[str] = (),
    num_permutations: int = 10000,
    seed: int = 0,
) -> Artifact:
    """Measure runs against judgements, test the difference, write a report.

    Give the options by name, or all of them as one EvaluateConfig.

    Options:
        output: Folder or URI to write the artifact to. (required)
        overwrite: Replace an artifact in the output that was made or begun with other options. Without this
            such an output is refused. (default: no)
        runs: TREC run files, separated by commas. The first is the baseline of the comparison. (required)
        qrels: Judgements: a file (TREC, .jsonl, .csv, .tsv, .parquet, .json, .arrow) or a folder of them.
            (required)
        measures: Measures, separated by commas: nDCG@10 (gain of the first 10 results, discounted by rank),
            R@100 (share of the relevant passages among the first 100), RR@10 (1 / rank of the first relevant
            passage) and others of ir-measures. The first one orders the list of changed queries. (default:
            nDCG@10,R@100,RR@10)
        names: Names of the runs in the report, separated by commas. If omitted, the names of their files.
        queries: Queries, to show their texts in the report: a file or folder.
        columns: Columns of queries and qrels, if they are not called as usual:
            query_id=key,query=question,doc_id=docno,relevance=grade.
        corpus: Output of `readapt ingest`, to show titles and texts in the report.
        general: Output of `readapt evaluate` for the same retrievers on a general collection. The report then
            also shows what adapting lost there.
        require: Conditions on each run after the first, separated by commas; if one fails, the exit code is 1.
            In "nDCG@10 >= base - 0.005" base is the first run: the whole 95% interval of the difference must be
            above -0.005. "nDCG@10 >= 0.3" is about the mean. "general nDCG@10 >= base - 0.005" uses the
            measures of `general`.
        num_permutations: Number of random permutations in the significance test, and of bootstrap samples in
            the intervals. (default: 10000)
        seed: Random seed for the significance test and the intervals. (default: 0)

    Returns:
        The artifact: `.path`, `.manifest`, `.to_pandas()`, `.to_arrow()`, `.to_ray()`.

    Raises:
        InputError: an option is unknown, missing or wrong, or an input cannot be used; it is named.
    """
@overload
def evaluate(config: EvaluateConfig, /) -> Artifact: ...

@overload
def export(
    *,
    output: str | Path,
    vectors: str | Path,
    to: str,
    overwrite: bool = False,
    corpus: str | Path | None = None,
    previous: str | Path | None = None,
    with_text: bool = True,
    check: int = 20,
    batch_rows: int = 256,
) -> Artifact:
    """Send vectors to a vector database: Qdrant, LanceDB, pgvector, OpenSearch, Milvus, files.

    Give the options by name, or all of them as one ExportConfig.

    Options:
        output: Folder or URI to write the artifact to. (required)
        overwrite: Replace a collection that holds another export, and an artifact in the output that was made
            or begun with other options. Without this both are refused. Data that readapt did not write is
            always refused. (default: no)
        vectors: Vectors: the output of `readapt embed`. (required)
        to: Where the vectors go: qdrant://HOST:6333/COLLECTION, lancedb:FOLDER/TABLE,
            postgresql://USER@HOST/DATABASE?table=TABLE, opensearch://HOST:9200/INDEX,
            milvus://HOST:19530/COLLECTION or files:FOLDER. Credentials are read from the environment.
            (required)
        corpus: Passages: the output of `readapt ingest` that the vectors were made of. Needed unless with_text
            is off.
        previous: Output of an earlier export to the same collection. Only rows that changed since are sent, and
            rows that left the corpus are deleted. If omitted, the collection must not exist.
        with_text: Also send title, text and the other columns of the passages. (default: yes)
        check: Number of vectors of the corpus with which the target is queried at the end, to compare its ten
            best with exact search; 0 for none. (default: 20)
        batch_rows: Rows per request. Lower it if the database refuses requests as too large. (default: 256)

    Returns:
        The artifact: `.path`, `.manifest`, `.to_pandas()`, `.to_arrow()`, `.to_ray()`.

    Raises:
        InputError: an option is unknown, missing or wrong, or an input cannot be used; it is named.
    """
@overload
def export(config: ExportConfig, /) -> Artifact: ...

@overload
def find(
    *,
    root: str | Path,
    doc_id: str,
) -> Results:
    """Find a passage in all artifacts of a root.

    Give the options by name, or all of them as one FindConfig.

    Options:
        root: Folder or URI that holds the generations. (required)
        doc_id: Id of the passage. (required)

    Returns:
        The rows: they print as a table; `.rows`, `.to_pandas()`.

    Raises:
        InputError: an option is unknown, missing or wrong, or an input cannot be used; it is named.
    """
@overload
def find(config: FindConfig, /) -> Results: ...

@overload
def finetune(
    *,
    output: str | Path,
    model: str | Path,
    corpus: str | Path,
    overwrite: bool = False,
    method: Literal['dora', 'lora', 'full'] = 'lora',
    lora_rank: int = 32,
    lora_alpha: float = 64.0,
    lora_dropout: float = 0.0,
    target_modules: Sequence[str] = (),
    num_epochs: int = 1,
    learning_rate: float = 0.0001,
    weight_decay: float = 0.01,
    warmup_fraction: float = 0.05,
    max_gradient_norm: float = 1.0,
    seed: int = 0,
    dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto',
    base_dtype: Literal['auto', 'int8', 'fp8', 'nf4'] = 'auto',
    gradient_checkpointing: bool = False,
    torch_compile: bool | None = None,
    zero_stage: Literal[0, 1, 2, 3] = 0,
    num_workers: int | None = None,
    min_workers: int | None = None,
    num_cpus_per_worker: int | None = None,
    checkpoint_every_s: float = 300.0,
    keep_checkpoints: int = 2,
    max_failures: int = 3,
    check_memory: bool = True,
    trackers: Sequence[Literal['tensorboard', 'wandb', 'mlflow']] = (),
    split: str = 'train',
    negatives: str | Path | None = None,
    num_negatives: int = 1,
    encoding: Encoding | str | Path | None = None,
    batch_size: int = 128,
    micro_batch_tokens: int = 16384,
    temperature: float = 0.05,
    queries_only: bool = False,
    both_directions: bool = False,
) -> Artifact:
    """Train a retriever on labelled pairs.

    Give the options by name, or all of them as one FinetuneConfig.

    Options:
        output: Folder or URI to write the artifact to. (required)
        overwrite: Replace an artifact in the output that was made or begun with other options. Without this
            such an output is refused. (default: no)
        method: Train LoRA adapters (lora), DoRA adapters (dora) or all weights (full). (default: lora)
        lora_rank: Rank of the adapters. A higher rank learns more and makes a larger adapter. (default: 32)
        lora_alpha: Scale of the adapters: their update is multiplied by alpha / rank. (default: 64.0)
        lora_dropout: Dropout probability on the input of each adapter. (default: 0.0)
        target_modules: Names of the linear layers that get an adapter (last part of the name), separated by
            commas. If omitted, query, key, value, up and down projections of the model's family; required for
            other families.
        num_epochs: Number of passes over the training data. (default: 1)
        learning_rate: Peak learning rate of AdamW; it decays linearly to 0. Lower it if the loss jumps.
            (default: 0.0001)
        weight_decay: Weight decay of AdamW. (default: 0.01)
        warmup_fraction: Fraction of the steps in which the learning rate rises from 0 to its peak. (default:
            0.05)
        max_gradient_norm: Clip the gradient to this norm; 0 turns clipping off. (default: 1.0)
        seed: Random seed for the data order, the initial adapter weights and dropout. (default: 0)
        dtype: Data type of matrix products and frozen weights; trained weights are always float32. auto is
            bfloat16 on GPUs and on CPUs with AMX or AVX512_BF16, else float32; a resumed run keeps the type
            that it began with. (default: auto)
        base_dtype: Data type in which the frozen weights of the model's layers are stored. auto is the same as
            dtype; int8, fp8 and nf4 take 8, 8 and 4.5 bits per weight and are decoded for each product. With
            fp8, GPUs such as H100 and L4 compute the forward pass in 8 bits. The adapter still fits the model
            in full precision. Use it with gradient_checkpointing if a model does not fit on a GPU. nf4 needs
            the extra nf4 (bitsandbytes). (default: auto)
        gradient_checkpointing: Recompute activations in the backward pass: about a third more computation, but
            memory for one layer instead of all. Turn it on when training does not fit in memory. (default: no)
        torch_compile: Compile each layer with torch.compile: minutes at the start, then faster steps. If
            omitted, layers are compiled on GPUs, except with zero_stage 3, which does not support it. A
            compiled layer whose output differs is not used.
        zero_stage: What DeepSpeed ZeRO partitions over the workers: 0 nothing, 1 optimizer states, 2 also
            gradients, 3 also the model's weights. Use 3 only for a model that does not fit on one worker,
            because it sends every weight to every worker in each pass. (default: 0)
        num_workers: Number of Ray Train workers. If omitted, one per GPU, or one per node on a cluster without
            GPUs.
        min_workers: Fewest workers to train with. Training starts with this many if no more GPU nodes come
            within five minutes, continues with this many when nodes are lost, and adds workers two checkpoint
            intervals after nodes come back. If omitted, wait until all workers can run.
        num_cpus_per_worker: CPUs per worker. If omitted, one for a worker with a GPU, else the node's CPUs
            divided by its workers.
        checkpoint_every_s: Seconds between checkpoints; 0 makes one after each step. A killed run resumes from
            the last one. (default: 300.0)
        keep_checkpoints: Number of checkpoints to keep; older ones are deleted. (default: 2)
        max_failures: How many times dead workers are restarted without a new checkpoint in between; -1 means
            without limit. (default: 3)
        check_memory: Refuse to start when the estimated memory exceeds the memory of a worker. Turn it off if
            the estimate is wrong for your model. (default: yes)
        trackers: Where to report each step besides the terminal, metrics.jsonl and Ray's metrics, separated by
            commas: tensorboard, wandb, mlflow. wandb and mlflow must be installed.
        model: Model to start from: a catalog name, a folder, a GGUF file, a URI or a hub id. (required)
        corpus: Passages with queries and qrels (the output of `readapt ingest`), queries that a language model
            wrote (the output of `readapt synthesize`), or a JSONL file of pairs with the texts `query`,
            `positive` and, optionally, `negatives`. If ingest split a document, the passage that has most words
            of the query is trained on. (required)
        split: Split of the corpus's qrels to train on: train, dev, test. (default: train)
        negatives: TREC run to take hard negatives from (the output of `readapt search`): its best passages that
            are not judged relevant.
        num_negatives: Hard negatives per query, when negatives is given. (default: 1)
        encoding: JSON file with pooling, prompts and special tokens for the trained model. If omitted, what the
            model's folder or the catalog says.
        batch_size: Query-passage pairs per step, over all workers. The other passages of the batch are the
            negatives, so a larger batch is a harder task. (default: 128)
        micro_batch_tokens: Tokens per forward and backward pass, padding included. Lower it when memory is
            short; batch and result stay the same (GradCache). (default: 16384)
        temperature: Temperature of the InfoNCE loss: cosines are divided by it. (default: 0.05)
        queries_only: Train only the encoding of queries. Passages are encoded by the original model, so its
            vectors stay valid: `search` and `serve` accept them with the output, and `embed` encodes passages
            with the original model. (default: no)
        both_directions: Also train each passage to find its query among the queries of the batch. (default: no)

    Returns:
        The artifact: `.path`, `.manifest`, `.to_pandas()`, `.to_arrow()`, `.to_ray()`.

    Raises:
        InputError: an option is unknown, missing or wrong, or an input cannot be used; it is named.
    """
@overload
def finetune(config: FinetuneConfig, /) -> Artifact: ...

@overload
def index(
    *,
    output: str | Path,
    vectors: str | Path,
    overwrite: bool = False,
    previous: str | Path | None = None,
    kind: Literal['auto', 'flat', 'ivf-flat', 'ivf-pq', 'hnsw', 'rabitq'] = 'flat',
    storage: Literal['float32', 'float16', 'int8'] | None = None,
    refine: bool = True,
    code_bytes: int | None = None,
    factory: str | None = None,
    depth: int | None = None,
    min_recall: float = 0.95,
    memory_gb: float | None = None,
    bm25: bool = False,
    rows_per_shard: int | None = None,
) -> Artifact:
    """Build a FAISS index from vectors.

    Give the options by name, or all of them as one IndexConfig.

    Options:
        output: Folder or URI to write the artifact to. (required)
        overwrite: Replace an artifact in the output that was made or begun with other options. Without this
            such an output is refused. (default: no)
        vectors: Vectors: the output of `readapt embed`. (required)
        previous: Index of an earlier state of the corpus to update. If omitted, the index is built from
            scratch.
        kind: Kind of index. flat searches exactly; the others trade recall for speed or memory; auto chooses by
            size, memory and recall. (default: flat)
        storage: How vectors are stored in flat, ivf-flat and hnsw, and in ivf-pq and rabitq for ranking
            candidates again. If omitted, float16 in a flat index of float16 vectors, which loses nothing, and
            float32 elsewhere.
        refine: Keep the vectors beside the codes of ivf-pq and rabitq, to rank the candidates again by exact
            scores. (default: yes)
        code_bytes: Bytes per code of ivf-pq. If omitted, a quarter of the dimension.
        factory: FAISS factory string, used unchanged instead of kind.
        depth: nprobe (ivf) or efSearch (hnsw). If omitted, the smallest value that reaches min_recall.
        min_recall: Fraction of the exact top 10, and of the top 100, that an approximate index must find, else
            it is refused. It is measured with the queries of the corpus, or with pieces of its passages if it
            has none. (default: 0.95)
        memory_gb: Maximum memory of the loaded index in GB, used when kind is auto. If omitted, no limit.
        bm25: Also index the words of the passages, for `search --mode bm25` and `hybrid`. The corpus of the
            vectors is read. (default: no)
        rows_per_shard: Vectors per index shard. If omitted, as many as take 512 MiB in a flat index, and 1 to 4
            million in others.

    Returns:
        The artifact: `.path`, `.manifest`, `.to_pandas()`, `.to_arrow()`, `.to_ray()`.

    Raises:
        InputError: an option is unknown, missing or wrong, or an input cannot be used; it is named.
    """
@overload
def index(config: IndexConfig, /) -> Artifact: ...

@overload
def ingest(
    *,
    output: str | Path,
    source: str | Path,
    overwrite: bool = False,
    previous: str | Path | None = None,
    format: Literal['auto', 'beir', 'jsonl', 'json', 'csv', 'tsv', 'parquet', 'arrow', 'text', 'ir_datasets', 'hub', 'python-docs'] = 'auto',
    columns: Sequence[str] = (),
    keep: Sequence[str] = (),
    bad_rows: Literal['skip', 'fail'] = 'skip',
    deduplicate: Literal['auto', 'none', 'exact', 'near'] = 'auto',
    near_threshold: float = 0.8,
    max_text_bytes: int = 10000000,
    max_passage_chars: int = 2000,
    split_tokens: int | None = None,
    overlap: int = 0,
    tokenizer: str | Path | None = None,
    rows_per_file: int = 65536,
) -> Artifact:
    """Read a corpus from a source: clean it, drop duplicates, keep the ids.

    Give the options by name, or all of them as one IngestConfig.

    Options:
        output: Folder or URI to write the artifact to. (required)
        overwrite: Replace an artifact in the output that was made or begun with other options. Without this
            such an output is refused. (default: no)
        source: Corpus to read: a path or URI, ir_datasets:NAME, hub:OWNER/NAME, python-docs:PACKAGE,... or a
            corpus name of the catalog. (required)
        previous: Output of `readapt ingest` for an earlier state of the corpus. Files whose passages did not
            change are shared with it instead of written.
        format: Format of the source. auto recognises it by the file names; set it when that fails. (default:
            auto)
        columns: Columns that hold doc_id, title and text, if they have other names:
            doc_id=docid,text=abstract+body joins two. Usual names are known: id, docid, pid, content, contents,
            passage, body, headline and more. query_id, query and relevance are fields of the queries and qrels.
        keep: Other columns to keep, such as url,date. Servers and `ra.Retriever` return them, filters can use
            them, and exports hold them; the TREC run of `readapt search` has only ids. NAME:TYPE sets a type
            (string, int64, float64, bool).
        bad_rows: What to do with a row that cannot become a passage: skip leaves it out and counts it, fail
            stops. (default: skip)
        deduplicate: Which duplicates to drop: none, exact (same title and text), or near (also nearly the
            same). auto is exact, but none for a source with judgements, so that scores stay comparable with
            published ones. (default: auto)
        near_threshold: Jaccard similarity of three-word sequences above which two passages are near duplicates
            (estimated with MinHash, error about 0.04). Used with deduplicate = near. (default: 0.8)
        max_text_bytes: Limit of title and text together, in bytes of UTF-8; a row of this size or more is a bad
            row. (default: 10000000)
        max_passage_chars: Maximum length of a passage from a text or Markdown file, in characters; longer files
            are split between paragraphs. (default: 2000)
        split_tokens: Split documents of any format into passages of at most this many tokens, between
            paragraphs or sentences. Passages get the ids doc#1, doc#2 ...; searches return documents, by their
            best passage. If omitted, rows are not split.
        overlap: Maximum number of tokens of the previous passage's end that a passage repeats. Used with
            split_tokens. (default: 0)
        tokenizer: Model whose tokenizer counts the tokens of split_tokens: the retriever.
        rows_per_file: Passages per Parquet file; with split_tokens, documents per file. (default: 65536)

    Returns:
        The artifact: `.path`, `.manifest`, `.to_pandas()`, `.to_arrow()`, `.to_ray()`.

    Raises:
        InputError: an option is unknown, missing or wrong, or an input cannot be used; it is named.
    """
@overload
def ingest(config: IngestConfig, /) -> Artifact: ...

@overload
def merge(
    *,
    output: str | Path,
    overwrite: bool = False,
    pretrained: str | Path | None = None,
    retriever: str | Path | None = None,
    adapter: str | Path | Sequence[str | Path] | None = None,
    bundle: str | Path | None = None,
    readapter_scale: float = 1.0,
    knowledge_scale: float | Sequence[float] = 0.5,
    layer_scales: Sequence[str] = (),
    low_rank: float | None = None,
    factors: bool = False,
    accept: Sequence[Literal['config', 'tokenizer', 'vocabulary', 'base']] = (),
    queries_only: bool = False,
    dtype: Literal['retriever', 'float32', 'float16', 'bfloat16'] = 'retriever',
    max_shard_bytes: int = 5000000000,
    encoding: Encoding | str | Path | None = None,
    num_workers: int = 0,
    num_cpus_per_worker: int = 1,
    measures: str | Path | None = None,
    push: str | None = None,
    public: bool = False,
) -> Artifact:
    """Add the retriever's and the adapter's weight changes to the pretrained model.

    Give the options by name, or all of them as one MergeConfig.

    Options:
        output: Folder or URI to write the artifact to. (required)
        overwrite: Replace an artifact in the output that was made or begun with other options. Without this
            such an output is refused. (default: no)
        pretrained: Model before retrieval training: a catalog name, a folder, a GGUF file, a URI or a hub id.
            With bundle, give it only if the base model is now in another place.
        retriever: The same model after retrieval training: full weights, or a LoRA or DoRA adapter.
        adapter: Knowledge adapter (the output of `readapt train`) or tuned model: a folder, a URI or a hub id;
            or several, separated by commas.
        bundle: Output of `readapt merge --factors`; use it instead of retriever and adapter.
        readapter_scale: Weight of the retriever's change to the pretrained model; 1.0 keeps it as it is. With
            bundle, the bundle's scale if omitted. (default: 1.0)
        knowledge_scale: Weight of the adapter's change to the pretrained model; choose it with `readapt tune`.
            One number, or one per adapter, separated by commas. With bundle, the bundle's scale if omitted.
            (default: 0.5)
        layer_scales: Factors of knowledge_scale in ranges of layers, such as 0-11=0.8,12-23=0.2; layers count
            from 0. Other layers, embeddings and the last norm have a factor of 1. With bundle, the bundle's if
            omitted.
        low_rank: Replace the retriever's change by its truncated SVD that explains this fraction of the
            variance per matrix (LoRE), such as 0.5.
        factors: Write low-rank factors (a bundle) instead of a whole model: much smaller, and any pair of
            scales can be made from it later. (default: no)
        accept: Mismatches to allow, separated by commas: config, tokenizer, vocabulary (the retriever's is
            used), base (an adapter's base model).
        queries_only: Make a model that encodes only queries. Passages keep the retriever's vectors: `search`
            and `serve` accept them with this model, and `embed` encodes passages with the retriever. (default:
            no)
        dtype: Data type of the written weights; retriever keeps the type of each of the retriever's tensors.
            (default: retriever)
        max_shard_bytes: Maximum size of a weight file in bytes; a larger tensor gets its own file. (default:
            5000000000)
        encoding: JSON file with pooling, prompts and special tokens, for a retriever whose folder and the
            catalog do not have them. If omitted, the retriever's own.
        num_workers: Ray tasks that write weight files at the same time, on any node of the cluster. 0 writes
            them on this machine with all its cores. (default: 0)
        num_cpus_per_worker: CPUs, and so threads, per Ray task. (default: 1)
        measures: Output of `readapt tune` or `readapt evaluate` whose result is shown in the model card.
        push: Also send the model with its card to the Hugging Face hub: hub:OWNER/NAME. The repository is
            private. HF_TOKEN must hold a token that may write.
        public: Let anybody read the repository of push. Its card names the input models as they were given
            here. (default: no)

    Returns:
        The artifact: `.path`, `.manifest`, `.to_pandas()`, `.to_arrow()`, `.to_ray()`.

    Raises:
        InputError: an option is unknown, missing or wrong, or an input cannot be used; it is named.
    """
@overload
def merge(config: MergeConfig, /) -> Artifact: ...

@overload
def pack(
    *,
    output: str | Path,
    pretrained: str | Path,
    corpus: str | Path,
    overwrite: bool = False,
    mode: Literal['passage', 'packed'] = 'passage',
    block_tokens: int = 1024,
    exclude: str | Path | None = None,
    withhold: int = 0,
    only: str | Path | None = None,
    new_since: str | Path | None = None,
) -> Artifact:
    """Tokenise passages and pack them into blocks (train does it when needed).

    Give the options by name, or all of them as one PackConfig.

    Options:
        output: Folder or URI to write the artifact to. (required)
        overwrite: Replace an artifact in the output that was made or begun with other options. Without this
            such an output is refused. (default: no)
        mode: passage puts one passage in each block, as in the paper. packed fills each block with several
            passages that do not attend to each other; it is faster for short passages. (default: passage)
        block_tokens: Maximum length of a passage in tokens, and the length of a block in packed mode; longer
            passages are truncated. If omitted, 1024 or the model's number of positions, whichever is smaller.
            (default: 1024)
        exclude: File of passages to leave out, for example of a test set: one doc_id per line, a Parquet or
            JSONL file with a column doc_id, or qrels. The id of a document that ingest split means all its
            passages.
        withhold: Number of passages, drawn at random, to leave out of training, so that `readapt drift` can
            measure the language-model loss on them. (default: 0)
        only: File of the only passages to use; same formats as exclude.
        new_since: An earlier state of the corpus, the output of `readapt ingest`. Only passages whose title and
            text are not in it are used.
        pretrained: Model whose tokenizer is used: a catalog name, a folder, a GGUF file, a URI or a hub id.
            (required)
        corpus: Passages: the output of `readapt ingest`. (required)

    Returns:
        The artifact: `.path`, `.manifest`, `.to_pandas()`, `.to_arrow()`, `.to_ray()`.

    Raises:
        InputError: an option is unknown, missing or wrong, or an input cannot be used; it is named.
    """
@overload
def pack(config: PackConfig, /) -> Artifact: ...

@overload
def paper(
    *,
    root: str | Path = 'readapt-paper',
    experiments: Sequence[str] = ('table1',),
    retriever: str | Path = 'e5-mistral',
    pretrained: str | Path | None = None,
    corpora: Sequence[str | Path] = ('msmarco', 'fever', 'hotpotqa', 'nq', 'quora', 'arguana', 'climate-fever', 'dbpedia-entity', 'fiqa', 'nfcorpus', 'scidocs', 'scifact', 'trec-covid', 'webis-touche2020'),
    general: str | Path = 'msmarco',
    data: str | Path | None = None,
    seeds: Sequence[int] = (0,),
    sizes: Sequence[int] = (1000, 10000, 100000, 1000000),
    readapter_scale: float = 1.0,
    knowledge_scale: float = 0.5,
    layer_scales: Sequence[str] = (),
    measure: str = 'nDCG@10',
    train: dict[str, Any] = {},
    embed: dict[str, Any] = {},
    search: dict[str, Any] = {},
) -> Results:
    """Reproduce the paper's experiments.

    Give the options by name, or all of them as one PaperConfig.

    Options:
        root: Folder or URI to write all artifacts and tables to. (default: readapt-paper)
        experiments: Experiments to run, separated by commas: table1, table2, table3, figure2, baselines; or
            all. (default: table1)
        retriever: Model to adapt: a catalog name, a folder, a GGUF file, a URI or a hub id. (default:
            e5-mistral)
        pretrained: Model before retrieval training: a catalog name, a folder, a GGUF file, a URI or a hub id.
            If omitted, the model that the catalog names for the retriever.
        corpora: Corpora, separated by commas: names of the catalog, or NAME=SOURCE with any source of `readapt
            ingest`. If omitted, the paper's fourteen. (default:
            msmarco,fever,hotpotqa,nq,quora,arguana,climate-fever,dbpedia-entity,fiqa,nfcorpus,scidocs,scifact,trec-covid,webis-touche2020)
        general: Corpus whose adapter table3 uses on all others: a name of the catalog, or NAME=SOURCE.
            (default: msmarco)
        data: Folder that holds a BEIR folder for each corpus, under its name. If omitted, the corpora are
            downloaded with ir_datasets.
        seeds: Seeds of the adapters, separated by commas. Results are averaged over them. (default: 0)
        sizes: Numbers of training passages for figure2, separated by commas. Numbers above the size of a corpus
            are left out. (default: 1000,10000,100000,1000000)
        readapter_scale: Weight of the retriever's change to the pretrained model; 1.0 is the paper's value.
            (default: 1.0)
        knowledge_scale: Weight of the adapter's change to the pretrained model; 0.5 is the paper's value.
            (default: 0.5)
        layer_scales: Factors of knowledge_scale in ranges of layers, such as 0-11=0.8,12-23=0.2; the paper has
            none.
        measure: Measure to compare by. (default: nDCG@10)
        train: Options of train and pack by name (in a YAML file).
        embed: Options of embed by name (in a YAML file).
        search: Options of search by name (in a YAML file).

    Returns:
        The rows: they print as a table; `.rows`, `.to_pandas()`.

    Raises:
        InputError: an option is unknown, missing or wrong, or an input cannot be used; it is named.
    """
@overload
def paper(config: PaperConfig, /) -> Results: ...

@overload
def refresh(
    *,
    root: str | Path,
    source: str | Path | None = None,
    retriever: str | Path | None = None,
    to: str | Path | None = None,
    serve: str | Path | None = None,
    back: int | None = None,
    allow_shrink: bool = False,
    overwrite: bool = False,
    loss_sample: int = 64,
    ingest: dict[str, Any] | None = None,
    embed: dict[str, Any] | None = None,
    index: dict[str, Any] | None = None,
    export: dict[str, Any] | None = None,
) -> Results:
    """Bring vectors, index and export to what a source holds now.

    Give the options by name, or all of them as one RefreshConfig.

    Options:
        root: Folder or URI that holds the generations; also the root of a `readapt run`. (required)
        source: The corpus as it is now: a folder, a file, a URI, `ir_datasets:NAME`, `hub:OWNER/NAME` or
            `python-docs:PACKAGE,...`. If omitted, the source of the previous refresh.
        retriever: Model that makes the vectors: a catalog name, a folder, a GGUF file, a URI or a hub id. If
            omitted, the model of the previous refresh.
        to: Vector database to keep up to date, as for `readapt export --to`. If omitted, that of the previous
            refresh, if any.
        serve: YAML file with the options of a running server, as for `readapt serve --config`. The server is
            updated to the new generation.
        back: Number of an earlier generation to make the present one again. The source is not read.
        allow_shrink: Accept a source with less than half of the passages that the present generation has.
            Without this it is refused. (default: no)
        overwrite: Make all artifacts again that other options or another model make stale. Without this, such
            options are refused. (default: no)
        loss_sample: Number of new passages, and of kept ones, on which to measure the language-model loss of
            the retriever's adapter. This loads the pretrained model. 0 turns it off. (default: 64)
        ingest: Options of ingest. If omitted, the options of the previous refresh; the same holds for the other
            sections.
        embed: Options of embed.
        index: Options of index.
        export: Options of export.

    Returns:
        The rows: they print as a table; `.rows`, `.to_pandas()`.

    Raises:
        InputError: an option is unknown, missing or wrong, or an input cannot be used; it is named.
    """
@overload
def refresh(config: RefreshConfig, /) -> Results: ...

@overload
def search(
    *,
    output: str | Path,
    queries: str | Path,
    overwrite: bool = False,
    retriever: str | Path = '',
    domain: str | Path | None = None,
    base: str | Path | None = None,
    index: str | Path | None = None,
    vectors: str | Path | None = None,
    root: str | Path | None = None,
    as_of: int | None = None,
    bridge: str | Path | None = None,
    qrels: str | Path | None = None,
    columns: Sequence[str] = (),
    mode: Literal['dense', 'bm25', 'hybrid'] = 'dense',
    top_k: int = 100,
    drop_self_hits: bool = False,
    encoding: Encoding | str | Path | None = None,
    batch_tokens: int | None = None,
) -> Artifact:
    """Search for queries and write the best passages as a TREC run.

    Give the options by name, or all of them as one SearchConfig.

    Options:
        output: Folder or URI to write the artifact to. (required)
        overwrite: Replace an artifact in the output that was made or begun with other options. Without this
            such an output is refused. (default: no)
        retriever: Model that made the vectors, or a model only for queries that was made from it, or the new
            model of `bridge`: a catalog name, a folder, a URI or a hub id. Give this or domain.
        domain: Factors of a domain, the output of `readapt merge --factors`: vectors and queries equal the
            merged model's. Give this or retriever.
        base: Model before retrieval training that the domain was merged with. If omitted, the one that the
            factors name.
        index: Index to search: the output of `readapt index`. Give this or vectors.
        vectors: Vectors to search exactly: the output of `readapt embed`. Give this or index.
        root: Root of `readapt refresh`: search the index of its present generation, with its retriever. Other
            options that you give override these.
        as_of: Number of the generation of `root` to search. If omitted, the present one.
        bridge: Output of `readapt bridge`, if the vectors were made by an older model: queries are mapped to
            them.
        queries: Queries: a file (BEIR .jsonl, .csv, .tsv, .parquet, .json, .arrow), or a folder of such files.
            (required)
        qrels: File of judgements: only queries that it judges are searched. If omitted, all queries are
            searched.
        columns: Columns of queries and qrels, if they are not called as usual:
            query_id=key,query=question,doc_id=docno,relevance=grade.
        mode: Search by vectors, by words, or by both, fused by reciprocal rank. Words need an index that was
            built with bm25. (default: dense)
        top_k: Results per query; all passages if there are fewer. (default: 100)
        drop_self_hits: Leave out a result whose doc_id equals the query_id, as ArguAna and Quora are scored.
            (default: no)
        encoding: JSON file with pooling, prompts and special tokens. If omitted, those that the vectors were
            made with.
        batch_tokens: Maximum tokens per batch of queries, padding included. If omitted, 1,024 on a CPU, and on
            a GPU by the model's size and the free memory.

    Returns:
        The artifact: `.path`, `.manifest`, `.to_pandas()`, `.to_arrow()`, `.to_ray()`.

    Raises:
        InputError: an option is unknown, missing or wrong, or an input cannot be used; it is named.
    """
@overload
def search(config: SearchConfig, /) -> Artifact: ...

@overload
def serve(
    *,
    retriever: str | Path = '',
    index: str | Path | None = None,
    bridge: str | Path | None = None,
    new_vectors: str | Path | None = None,
    corpus: str | Path | None = None,
    encoding: Encoding | str | Path | None = None,
    dtype: Literal['float32', 'float16', 'bfloat16'] | None = None,
    batch_tokens: int | None = None,
    num_replicas: int = 1,
    max_replicas: int | None = None,
    num_cpus_per_replica: float = 0.5,
    num_gpus_per_replica: float | None = None,
    num_threads: int | None = None,
    index_actors: int = 1,
    index_replicas: int = 1,
    max_index_replicas: int | None = None,
    num_cpus_per_index_actor: float = 0.25,
    num_gpus_per_index_actor: float = 0.0,
    batch_wait_s: float = 0.0,
    max_requests: int = 256,
    max_queued_tokens: int = 1048576,
    max_body_bytes: int = 16777216,
    max_inputs: int = 2048,
    truncate: bool = False,
    accept_token_ids: bool = False,
    knowledge_scale: str | None = None,
    timeout_s: float = 60.0,
    shadow: str = '',
    shadow_share: float = 1.0,
    recall_probe: float = 0.0,
    lost_shards: Literal['wait', 'partial', 'error'] = 'wait',
    shard_timeout_s: float = 2.0,
    name: str = '',
    versions: dict[str, dict[str, Any]] | None = None,
    base: str | Path | None = None,
    domains: dict[str, str | dict[str, str | float]] | None = None,
    max_domain_bytes: int = 1073741824,
    default: str = '',
    split: Sequence[str] = (),
    host: str = '127.0.0.1',
    port: int = 8000,
    api_keys: str | Path | None = None,
    allow_anonymous: bool = False,
    cors_origins: Sequence[str] = (),
    drain_s: float = 30.0,
    num_gateways: int = 1,
    traces: bool = False,
    update: bool = False,
    require_report: str | Path | None = None,
    root: str | Path | None = None,
    as_of: int | None = None,
    write_config: str | Path | None = None,
) -> None:
    """Serve a retriever and its index over HTTP until interrupted.

    Give the options by name, or all of them as one ServeConfig.

    Options:
        retriever: Model to serve: a catalog name, a folder, a GGUF file, a URI or a hub id. Required, unless
            `versions` lists several.
        index: Output folder of `readapt index`, with vectors of this retriever (with `bridge`, of an older
            model). If omitted, there is no search.
        bridge: Output folder of `readapt bridge`, if an older model made the vectors of the index. Such a
            version encodes only queries.
        new_vectors: Output folder of `readapt embed` for this retriever, finished or still running. As its
            files appear, their passages are searched by these vectors, and no longer by old vectors through the
            `bridge`.
        corpus: Output folder of `readapt ingest`. If omitted, search results have no titles and texts.
        encoding: JSON file with prompts, special tokens, pooling and maximum lengths of the retriever. If
            omitted, they are read from the index, or from the model's folder.
        dtype: Data type that the model computes in. It must be the type that the index was made with. If
            omitted, that type, or float32 without an index.
        batch_tokens: Maximum number of tokens per batch. If omitted, 1,024 on a CPU, and on a GPU by the
            model's size and the free memory. Lower it if a GPU runs out of memory.
        num_replicas: Number of encoder processes; with `max_replicas`, the minimum. Raise it for more requests
            per second. (default: 1)
        max_replicas: Maximum number of encoder processes. Ray Serve starts more while batches wait, and stops
            them again. If omitted, `num_replicas`.
        num_cpus_per_replica: CPUs that Ray reserves per encoder process. `num_threads` sets how many threads it
            uses. (default: 0.5)
        num_gpus_per_replica: GPUs that Ray reserves per encoder process; 0.25 puts four on one GPU. If omitted,
            1 if the cluster has GPUs, else 0.
        num_threads: CPU threads per encoder process. If omitted, its share of this machine's CPUs. Lower it if
            other work runs there.
        index_actors: Number of processes that share the shards of the index. Raise it if the index does not fit
            one machine's memory. (default: 1)
        index_replicas: Number of copies of each index process; with `max_index_replicas`, the minimum. With 2
            or more, searches continue when one dies. (default: 1)
        max_index_replicas: Maximum number of copies of each index process. Ray Serve starts more while searches
            wait, and stops them again. If omitted, `index_replicas`.
        num_cpus_per_index_actor: CPUs that Ray reserves per index process. (default: 0.25)
        num_gpus_per_index_actor: GPUs that Ray reserves per index process; 0.25 puts four on one GPU. Above 0
            the vectors of a flat index (float32 or float16) are held and searched in the GPU's memory. With 0
            the CPU searches. (default: 0.0)
        batch_wait_s: Seconds that an incomplete batch waits for more texts while the encoder is free. Raise it
            to get larger batches at the cost of latency. While the encoder is busy, texts gather anyway.
            (default: 0.0)
        max_requests: Maximum number of requests in progress per gateway. Above it the answer is 429. One domain
            may have at most as many as are free, which is half if no other domain is busy. (default: 256)
        max_queued_tokens: Maximum number of tokens that wait per version and gateway. Above it the answer is
            429. Lower it to refuse early instead of answering late. One domain may have at most as many as are
            free, which is half if no other is busy. (default: 1048576)
        max_body_bytes: Maximum size of a request in bytes. Above it the answer is 413. (default: 16777216)
        max_inputs: Maximum number of texts per request. (default: 2048)
        truncate: Cut texts that are too long, unless the request says `"truncate": false`. Without it they are
            refused. Set it for clients that cannot ask for it. (default: no)
        accept_token_ids: Accept token ids in place of texts. Only ids of the model's own tokenizer give the
            right vectors. OpenAI's ids, which LangChain sends by default, mean other texts here and give wrong
            vectors. (default: no)
        knowledge_scale: Range of scales that a request for a domain may ask for by `knowledge_scale`, such as
            0.0..1.0. If omitted, requests cannot choose, and each domain has the scale that it was merged with,
            or its own `knowledge_scale`.
        timeout_s: Seconds until a request is given up with 504. A request can ask for less. Raise it if clients
            send many texts per request to a slow encoder. (default: 60.0)
        shadow: Version that also searches, unseen by clients; metrics say how far it agrees. Set it to try a
            version on real traffic.
        shadow_share: Share of searches that the shadow also gets. Lower it if the shadow takes too much of the
            machine. (default: 1.0)
        recall_probe: Share of searches that are repeated by exact search after the answer, one at a time.
            Metrics say how many of the 10 best passages the index had found. The index must hold its float32
            vectors (--storage float32; ivf-pq and rabitq with --refine). (default: 0.0)
        lost_shards: What to do when a part of the index does not answer: wait for its replacement until the
            request's time is up, answer without it and say so, or return an error. (default: wait)
        shard_timeout_s: Seconds until a part of the index counts as lost. Unused if `lost_shards` is wait.
            (default: 2.0)
        name: Name of the version for clients. If omitted, the last part of `retriever`.
        versions: YAML file of several versions by name, each with its retriever, index, corpus and so on. The
            file of --config can also hold them as a section.
        base: Pretrained model (before retrieval training) that the `domains` were merged with. If omitted, the
            one that the factors name.
        domains: Domains that share one encoder: NAME=FACTORS, separated by commas, or a YAML file of `name:
            factors`. Factors are the output of `readapt merge --factors`, all with the same retriever. Give it
            instead of `retriever`. Options of a domain follow it, as in
            `legal=FACTORS,index=INDEX,corpus=CORPUS,knowledge_scale=0`; in the file they are `name: {factors:
            ..., index: ...}`. At scale 0 the index must have the retriever's own vectors.
        max_domain_bytes: Memory for the factors of all domains, in bytes, in each encoder process. When it is
            full, the factors that were not used for longest are dropped, and read again when they are needed.
            (default: 1073741824)
        default: Version that answers requests that name none. If omitted, the first.
        split: Weights that split the searches that name no version, such as base=0.1,adapted=0.9. If omitted,
            the default version answers all of them.
        host: Address to listen on. 0.0.0.0 means all addresses, and needs API keys. (default: 127.0.0.1)
        port: Port to listen on. (default: 8000)
        api_keys: YAML file of API keys: `name: key`, or `name: {key: ..., requests_per_minute: 600}`. If
            omitted, the same text in $READAPT_API_KEYS. Without keys only clients on this machine are answered.
        allow_anonymous: Answer other machines without API keys. Use it only behind a gateway that checks who
            asks. (default: no)
        cors_origins: Origins of web pages that may call this server from a browser, such as
            https://app.example; * for all. If omitted, none.
        drain_s: Seconds that requests in progress may still take when the server is told to stop. New ones get
            503 meanwhile. Set it below the time after which your supervisor kills the process. (default: 30.0)
        num_gateways: Number of processes that speak HTTP and form batches. Raise it if one keeps a CPU core
            busy. (default: 1)
        traces: Send OpenTelemetry traces of requests over OTLP to OTEL_EXPORTER_OTLP_ENDPOINT. Needs the extra
            `traces`. (default: no)
        update: Change the server that runs on this Ray to these options, without dropping a request, instead of
            starting one. (default: no)
        require_report: Output of `readapt evaluate --require`. The server starts only if all its requirements
            hold, and if it measured each version.
        root: Root of `readapt refresh`: serve the retriever, index and corpus of its present generation.
            `retriever`, `index` and `corpus` override it.
        as_of: Number of the generation of `root` to serve. If omitted, the present one.
        write_config: Write the file that `serve deploy` and KubeRay's RayService read, and start nothing.

    Returns:
        Nothing.

    Raises:
        InputError: an option is unknown, missing or wrong, or an input cannot be used; it is named.
    """
@overload
def serve(config: ServeConfig, /) -> None: ...

@overload
def synthesize(
    *,
    output: str | Path,
    corpus: str | Path,
    model: str | Path,
    overwrite: bool = False,
    endpoint: str | None = None,
    num_passages: int = 4000,
    queries_per_passage: int = 1,
    vectors: str | Path | None = None,
    round_trip_k: int = 20,
    prompt: str = 'Here is a passage:\n\n{passage}\n\nWrite one question that a person would type into a search engine and that this passage answers. Use other words than the passage where you can. Reply with the question alone.',
    max_passage_chars: int = 2000,
    max_query_tokens: int = 48,
    temperature: float = 0.7,
    budget_tokens: int | None = None,
    dtype: Literal['auto', 'float32', 'float16', 'bfloat16'] = 'auto',
    num_requests: int = 8,
    timeout_s: float = 120.0,
    seed: int = 0,
) -> Artifact:
    """Let a language model write queries for passages, to train on or tune by.

    Give the options by name, or all of them as one SynthesizeConfig.

    Options:
        output: Folder or URI to write the artifact to. (required)
        overwrite: Replace an artifact in the output that was made or begun with other options. Without this
            such an output is refused. (default: no)
        corpus: Passages: the output of `readapt ingest`. (required)
        model: Causal language model that writes the queries, such as an instruct model: a folder, a URI or a
            hub id. With endpoint, the name that the endpoint knows it by. (required)
        endpoint: URL of an OpenAI-compatible endpoint, such as http://HOST:8000/v1. Its key is read from
            $READAPT_ENDPOINT_KEY. If omitted, the model is loaded by Ray tasks, one per GPU.
        num_passages: Maximum number of passages to write queries for, drawn at random. (default: 4000)
        queries_per_passage: Queries to ask for per passage. (default: 1)
        vectors: Vectors of the corpus: the output of `readapt embed`. A query is kept only if a search among
            them finds its passage. If omitted, queries are not tested by searching.
        round_trip_k: With vectors: a query's passage must be among this number of best results. (default: 20)
        prompt: Prompt for the model; title and text replace {passage}. (default: Here is a passage: {passage}
            Write one question that a person would type into a search engine and that this passage answers. Use
            other words than the passage where you can. Reply with the question alone.)
        max_passage_chars: Characters of a passage that the model reads; the rest is cut. (default: 2000)
        max_query_tokens: Maximum tokens of an answer. (default: 48)
        temperature: Temperature of the sampling; 0 takes the likeliest token each time. (default: 0.7)
        budget_tokens: Maximum tokens of prompts and answers at an endpoint; a request that may exceed it is not
            sent. The queries so far are then kept, and the same command with a larger budget asks for the rest.
            If omitted, there is no limit.
        dtype: Data type that the model computes in; auto is bfloat16 on GPUs and on CPUs with AMX or
            AVX512_BF16, else float32. (default: auto)
        num_requests: Maximum number of requests to an endpoint at the same time. (default: 8)
        timeout_s: Seconds that one request to an endpoint may take. (default: 120.0)
        seed: Random seed of the choice of passages and of the sampling. (default: 0)

    Returns:
        The artifact: `.path`, `.manifest`, `.to_pandas()`, `.to_arrow()`, `.to_ray()`.

    Raises:
        InputError: an option is unknown, missing or wrong, or an input cannot be used; it is named.
    """
@overload
def synthesize(config: SynthesizeConfig, /) -> Artifact: ...

@overload
def train(
    *,
    output: str | Path,
    pretrained: str | Path,
    corpus: str | Path,
    overwrite: bool = False,
    method: Literal['dora', 'lora', 'full'] = 'dora',
    lora_rank: int = 32,
    lora_alpha: float = 64.0,
    lora_dropout: float = 0.05,
    target_modules: Sequence[str] = (),
    num_epochs: int = 1,
    learning_rate: float = 0.0002,
    weight_decay: float = 0.0,
    warmup_fraction: float = 0.0,
    max_gradient_norm: float = 1.0,
    seed: int = 0,
    dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto',
    base_dtype: Literal['auto', 'int8', 'fp8', 'nf4'] = 'auto',
    gradient_checkpointing: bool = False,
    torch_compile: bool | None = None,
    zero_stage: Literal[0, 1, 2, 3] = 0,
    num_workers: int | None = None,
    min_workers: int | None = None,
    num_cpus_per_worker: int | None = None,
    checkpoint_every_s: float = 300.0,
    keep_checkpoints: int = 2,
    max_failures: int = 3,
    check_memory: bool = True,
    trackers: Sequence[Literal['tensorboard', 'wandb', 'mlflow']] = (),
    mode: Literal['passage', 'packed'] = 'passage',
    block_tokens: int = 1024,
    exclude: str | Path | None = None,
    withhold: int = 0,
    only: str | Path | None = None,
    new_since: str | None = None,
    continue_from: str | Path | None = None,
    objective: Literal['causal_lm', 'masked_lm'] | None = None,
    batch_size: int | Literal['auto'] = 4,
    micro_batch_tokens: int = 4096,
) -> Artifact:
    """Train a knowledge adapter on unlabelled passages.

    Give the options by name, or all of them as one TrainConfig.

    Options:
        output: Folder or URI to write the artifact to. (required)
        overwrite: Replace an artifact in the output that was made or begun with other options. Without this
            such an output is refused. (default: no)
        method: Train DoRA adapters (dora), LoRA adapters (lora) or all weights (full). (default: dora)
        lora_rank: Rank of the adapters. A higher rank learns more and makes a larger adapter. (default: 32)
        lora_alpha: Scale of the adapters: their update is multiplied by alpha / rank. (default: 64.0)
        lora_dropout: Dropout probability on the input of each adapter. (default: 0.05)
        target_modules: Names of the linear layers that get an adapter (last part of the name), separated by
            commas. If omitted, query, key, value, up and down projections of the model's family; required for
            other families.
        num_epochs: Number of passes over the training data. (default: 1)
        learning_rate: Peak learning rate of AdamW; it decays linearly to 0. Lower it if the loss jumps.
            (default: 0.0002)
        weight_decay: Weight decay of AdamW. (default: 0.0)
        warmup_fraction: Fraction of the steps in which the learning rate rises from 0 to its peak. (default:
            0.0)
        max_gradient_norm: Clip the gradient to this norm; 0 turns clipping off. (default: 1.0)
        seed: Random seed for the data order, the initial adapter weights and dropout. (default: 0)
        dtype: Data type of matrix products and frozen weights; trained weights are always float32. auto is
            bfloat16 on GPUs and on CPUs with AMX or AVX512_BF16, else float32; a resumed run keeps the type
            that it began with. (default: auto)
        base_dtype: Data type in which the frozen weights of the model's layers are stored. auto is the same as
            dtype; int8, fp8 and nf4 take 8, 8 and 4.5 bits per weight and are decoded for each product. With
            fp8, GPUs such as H100 and L4 compute the forward pass in 8 bits. The adapter still fits the model
            in full precision. Use it with gradient_checkpointing if a model does not fit on a GPU. nf4 needs
            the extra nf4 (bitsandbytes). (default: auto)
        gradient_checkpointing: Recompute activations in the backward pass: about a third more computation, but
            memory for one layer instead of all. Turn it on when training does not fit in memory. (default: no)
        torch_compile: Compile each layer with torch.compile: minutes at the start, then faster steps. If
            omitted, layers are compiled on GPUs, except with zero_stage 3, which does not support it. A
            compiled layer whose output differs is not used.
        zero_stage: What DeepSpeed ZeRO partitions over the workers: 0 nothing, 1 optimizer states, 2 also
            gradients, 3 also the model's weights. Use 3 only for a model that does not fit on one worker,
            because it sends every weight to every worker in each pass. (default: 0)
        num_workers: Number of Ray Train workers. If omitted, one per GPU, or one per node on a cluster without
            GPUs.
        min_workers: Fewest workers to train with. Training starts with this many if no more GPU nodes come
            within five minutes, continues with this many when nodes are lost, and adds workers two checkpoint
            intervals after nodes come back. If omitted, wait until all workers can run.
        num_cpus_per_worker: CPUs per worker. If omitted, one for a worker with a GPU, else the node's CPUs
            divided by its workers.
        checkpoint_every_s: Seconds between checkpoints; 0 makes one after each step. A killed run resumes from
            the last one. (default: 300.0)
        keep_checkpoints: Number of checkpoints to keep; older ones are deleted. (default: 2)
        max_failures: How many times dead workers are restarted without a new checkpoint in between; -1 means
            without limit. (default: 3)
        check_memory: Refuse to start when the estimated memory exceeds the memory of a worker. Turn it off if
            the estimate is wrong for your model. (default: yes)
        trackers: Where to report each step besides the terminal, metrics.jsonl and Ray's metrics, separated by
            commas: tensorboard, wandb, mlflow. wandb and mlflow must be installed.
        mode: passage puts one passage in each block, as in the paper. packed fills each block with several
            passages that do not attend to each other; it is faster for short passages. (default: passage)
        block_tokens: Maximum length of a passage in tokens, and the length of a block in packed mode; longer
            passages are truncated. If omitted, 1024 or the model's number of positions, whichever is smaller.
            (default: 1024)
        exclude: File of passages to leave out, for example of a test set: one doc_id per line, a Parquet or
            JSONL file with a column doc_id, or qrels. The id of a document that ingest split means all its
            passages.
        withhold: Number of passages, drawn at random, to leave out of training, so that `readapt drift` can
            measure the language-model loss on them. (default: 0)
        only: File of the only passages to use; same formats as exclude.
        new_since: An earlier state of the corpus, the output of `readapt ingest`. Only passages whose title and
            text are not in it are used.
        pretrained: Model before retrieval training: a catalog name, a folder, a GGUF file, a URI or a hub id.
            (required)
        corpus: Passages (the output of `readapt ingest`) or blocks (the output of `readapt pack`). Passages are
            packed first, into OUTPUT-blocks. (required)
        continue_from: Adapter of an earlier training on the same pretrained model to start from; it keeps its
            method, rank, alpha and target modules. Give it passages that it has not seen: with new_since, or a
            corpus of new passages.
        objective: causal_lm predicts the next token (decoders); masked_lm predicts masked tokens (encoders). If
            omitted, the one that the model has a head for.
        batch_size: Blocks per step, over all workers. auto gives each worker at least 16,384 tokens per step,
            but takes at least 500 steps, on fewer workers if the corpus is small. learning_rate is then the
            rate for 4 passages per step: it grows with the square root of the passages per step, at most
            fivefold. (default: 4)
        micro_batch_tokens: Tokens per forward and backward pass. Lower it when memory is short; the result
            stays the same. (default: 4096)

    Returns:
        The artifact: `.path`, `.manifest`, `.to_pandas()`, `.to_arrow()`, `.to_ray()`.

    Raises:
        InputError: an option is unknown, missing or wrong, or an input cannot be used; it is named.
    """
@overload
def train(config: TrainConfig, /) -> Artifact: ...

@overload
def tune(
    *,
    output: str | Path,
    pretrained: str | Path,
    retriever: str | Path,
    adapter: str | Path,
    corpus: str | Path,
    overwrite: bool = False,
    queries: str | Path | None = None,
    qrels: str | Path | None = None,
    columns: Sequence[str] = (),
    readapter_scales: Sequence[float] = (1.0,),
    knowledge_scales: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    layer_scales: Sequence[str] = (),
    num_refinements: int = 1,
    measure: str = 'nDCG@10',
    drop_self_hits: bool | None = None,
    max_queries: int = 1000,
    max_passages: int = 20000,
    dtype: Literal['auto', 'float32', 'float16', 'bfloat16'] = 'auto',
    num_workers: int | None = None,
    seed: int = 0,
    encoding: Encoding | str | Path | None = None,
    accept: Sequence[Literal['config', 'tokenizer', 'vocabulary', 'base']] = (),
) -> Artifact:
    """Find the best scales for merge on withheld queries.

    Give the options by name, or all of them as one TuneConfig.

    Options:
        output: Folder or URI to write the artifact to. (required)
        overwrite: Replace an artifact in the output that was made or begun with other options. Without this
            such an output is refused. (default: no)
        pretrained: Model before retrieval training: a catalog name, a folder, a GGUF file, a URI or a hub id.
            (required)
        retriever: Model to adapt: a catalog name, a folder, a GGUF file, a URI or a hub id. (required)
        adapter: Knowledge adapter: the output of `readapt train`, or a PEFT folder. (required)
        corpus: Passages: the output of `readapt ingest`. (required)
        queries: Withheld queries: a file or folder. If omitted, the corpus's split dev, else train, but never
            the split that is reported on (test, or the split of the report beside the corpus); else
            pseudo-queries made from the passages.
        qrels: Judgements of the queries: a file or folder. A document that ingest split gets the score of its
            best passage.
        columns: Columns of queries and qrels, if they are not called as usual:
            query_id=key,query=question,doc_id=docno,relevance=grade.
        readapter_scales: Weights of the retriever's change to try, separated by commas. (default: 1.0)
        knowledge_scales: Weights of the adapter's change to try, separated by commas. (default:
            0.0,0.25,0.5,0.75,1.0)
        layer_scales: Factors of the knowledge scales in ranges of layers, such as 0-11=0.8,12-23=0.2; give
            `merge` the same.
        num_refinements: How many times to try the points half way between the best pair of scales and its
            neighbours. (default: 1)
        measure: Measure that decides which pair of scales is best. (default: nDCG@10)
        drop_self_hits: Leave out a result whose doc_id equals the query_id. If omitted, as the catalog says for
            the corpus's source.
        max_queries: Maximum number of queries, half for choosing the scales and half for reporting. (default:
            1000)
        max_passages: Maximum number of passages in the sample that is searched; judged ones are always in it.
            (default: 20000)
        dtype: Data type that the model computes in; auto is bfloat16 on GPUs and on CPUs with AMX or
            AVX512_BF16, else float32. (default: auto)
        num_workers: Number of actors, each with one model, that share the work. If omitted, one per GPU, or one
            without GPUs.
        seed: Random seed for the sample of passages and for the split of the queries. (default: 0)
        encoding: JSON file with pooling, prompts and special tokens. If omitted, what the retriever's folder or
            the catalog says.
        accept: Mismatches to allow, separated by commas: config, tokenizer, vocabulary (only one of retriever
            and pretrained has some tokens), base (an adapter's base model).

    Returns:
        The artifact: `.path`, `.manifest`, `.to_pandas()`, `.to_arrow()`, `.to_ray()`.

    Raises:
        InputError: an option is unknown, missing or wrong, or an input cannot be used; it is named.
    """
@overload
def tune(config: TuneConfig, /) -> Artifact: ...
