"""Options of stages that change nothing in a small result reach the part that obeys them. No Ray is started."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from readapt_ray import artifacts
from readapt_ray.catalog.models import open_model
from readapt_ray.cluster import batches, on_worker, query_vectors, train_workers
from readapt_ray.config import StageConfig
from readapt_ray.records import Qrel, Query
from readapt_ray.retrieval.encoder import Encoder
from readapt_ray.stages import bridge as bridge_stage
from readapt_ray.stages import embed as embed_stage
from readapt_ray.stages import evaluate as evaluate_stage
from readapt_ray.stages import search as search_stage
from readapt_ray.stages.bridge import BridgeConfig, bridge
from readapt_ray.stages.embed import EmbedConfig, embed
from readapt_ray.stages.evaluate import EvaluateConfig
from readapt_ray.stages.finetune import FinetuneConfig, finetune
from readapt_ray.stages.search import SearchConfig
from readapt_ray.training import contrastive, labelled_pairs, pairs
from tests import factories

COLUMNS = "query_id=topic,query=wording,doc_id=paper,relevance=grade"
PASSAGES = factories.small_corpus(40)
QUERIES, QRELS = factories.small_queries(PASSAGES, 8)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, a retriever, an encoding with other prompts, and queries and qrels whose columns have odd names."""
    folder = tmp_path_factory.mktemp("options")
    factories.ingest_artifact(folder / "corpus", PASSAGES, QUERIES, QRELS, split="train")
    factories.write_contract(factories.tiny_decoder(folder / "model", headless=True))
    other = open_model(str(folder / "model")).encoding.model_copy(update={"query_template": "ask: {text}"})
    (folder / "encoding.json").write_text(other.model_dump_json())
    asked = ["topic\twording", *(f"{each.query_id}\t{each.text}" for each in QUERIES)]
    (folder / "asked.tsv").write_text("\n".join(asked) + "\n")
    judged = ["paper\ttopic\tgrade", *(f"{each.doc_id}\t{each.query_id}\t{each.relevance}" for each in QRELS[:3])]
    (folder / "judged.tsv").write_text("\n".join(judged) + "\n")
    return folder


def search_config(world: Path, **options: Any) -> SearchConfig:
    files = {"queries": str(world / "asked.tsv"), "qrels": str(world / "judged.tsv"), "columns": COLUMNS}
    return SearchConfig(retriever="m", vectors="v", output="o.trec", **files, **options)


def test_search_reads_queries_and_qrels_from_the_columns_that_are_given(world: Path) -> None:
    assert search_stage._read_queries(search_config(world)) == [Query(each.query_id, each.text) for each in QUERIES[:3]]


def test_the_batches_of_queries_are_as_large_as_search_says(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def load(*_: Any, **options: Any) -> Any:
        seen["in the task"] = options["batch_tokens"]
        raise EOFError

    monkeypatch.setattr(search_stage, "encode_queries", lambda *_, **options: seen.update(options))
    source: Any = SimpleNamespace(model=None, encoding=None, description={}, bridge=None)
    search_stage._encoded(search_config(world, batch_tokens=77), source, QUERIES, lambda *_: None)
    assert seen["batch_tokens"] == 77
    monkeypatch.setattr(on_worker, "load_encoder", load)
    task = {"retriever": "m", "base": "", "encoding": None, "driver_node": "", "num_threads": 1, "batch_tokens": 78}
    with pytest.raises(EOFError):
        next(query_vectors._encoded([], None, encoder={"dtype": "float32", "fingerprint": "x"}, **task))  # type: ignore[arg-type]
    assert seen["in the task"] == 78
    assert Encoder.load(open_model(str(world / "model")), batch_tokens=79).batch_tokens == 79


def test_evaluate_reads_queries_and_qrels_from_the_columns_that_are_given(world: Path) -> None:
    (world / "run.trec").write_text(f"{QRELS[0].query_id} Q0 {QRELS[0].doc_id} 1 2.5 r\n")
    files = {"qrels": str(world / "judged.tsv"), "queries": str(world / "asked.tsv"), "runs": str(world / "run.trec")}
    config = EvaluateConfig(**files, columns=COLUMNS, output="o")
    loaded = evaluate_stage._load(
        config, {"r": str(world / "run.trec")}, evaluate_stage.measuring.parse_measures(["AP"])
    )
    assert loaded.query_texts == {each.query_id: each.text for each in QUERIES}
    assert loaded.judgements == {each.query_id: {each.doc_id: each.relevance} for each in QRELS[:3]}


def test_the_actors_of_embed_are_placed_as_its_options_say(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {}

    def encode(job: Any, passages: Any, config: Any, placement: Any, workspace: Any) -> None:
        del passages, config, workspace
        found.update(job=job, placement=placement)

    monkeypatch.setattr(embed_stage, "_encode", encode)
    monkeypatch.setattr(embed_stage, "produce", lambda *_, work, **__: work(None))
    options = {"num_workers": 3, "num_cpus_per_worker": 2, "num_gpus_per_worker": 0.25, "rows_per_shard": 9}
    options |= {"batch_tokens": 55, "max_left_out": 4, "vector_dtype": "int8", "dtype": "bfloat16", "dimensions": 8}
    files = {"retriever": str(world / "model"), "corpus": str(world / "corpus"), "output": str(world / "vectors")}
    embed(EmbedConfig(**files, **options))
    placement, job = found["placement"], found["job"]
    placed = (placement.num_workers, placement.num_cpus_per_worker, placement.num_gpus_per_worker)
    assert placed == (3, 2, 0.25)
    assert (job.rows_per_shard, job.batch_tokens, job.max_left_out, job.vector_dtype) == (9, 55, 4, "int8")
    assert (job.dtype, job.encoding.dimensions) == ("bfloat16", 8)


def test_a_bridge_encodes_as_its_options_say(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = artifacts.open_artifact(str(world / "corpus"), "ingest")

    def write(workspace: artifacts.Workspace) -> None:
        workspace.counts["num_vectors"] = 5000
        workspace.details["encoder"] = {"dimension": 24, "fingerprint": "of the old model"}

    old = StageConfig(output=str(world / "old-vectors"))
    artifacts.produce("embed", old, inputs={"corpus": corpus.fingerprint}, work=write)
    built: list[Any] = []
    monkeypatch.setattr(bridge_stage, "_build", lambda config, old, corpus, new, _: built.append((config, new)))
    monkeypatch.setattr(bridge_stage, "produce", lambda *_, work, **__: work(None))
    files = {"old_vectors": old.output, "retriever": str(world / "model"), "corpus": corpus.uri, "output": "o"}
    for encoding in (None, str(world / "encoding.json")):
        bridge(BridgeConfig(**files, encoding=encoding, dtype="float16", seed=7))
    (config, as_it_is), (_, other) = built
    assert (config.dtype, config.seed) == ("float16", 7)
    assert other.encoding.query_template == "ask: {text}" != as_it_is.encoding.query_template
    assert other.description["fingerprint"] != as_it_is.description["fingerprint"]


@pytest.fixture
def finetuning(world: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Run finetune with other options than usual; yield what its pairs, its reader and its loss were given."""
    given: dict[str, Any] = {}
    write = labelled_pairs.write_pairs

    def write_pairs(source: Any, model: Any, encoding: Any, pairs: Any, **options: Any) -> None:
        given["pairs"] = {"encoding": encoding, **options}
        write(source, model, encoding, pairs, **options)

    def contrast(**options: Any) -> None:
        given["loss"] = options

    class Worker:
        def __init__(self, job: Any, config: Any, name: str, **options: Any) -> None:
            self.model, self.dtype = None, None
            given["worker"] = {"micro_batch_tokens": options["micro_batch_tokens"], "model": name}

        def run(self, *_: Any, **__: Any) -> None:
            raise EOFError

    class Reader(pairs.PairReader):
        def __init__(self, *_: Any, **options: Any) -> None:
            given["reader"] = options
            super().__init__(*_, **options)

    monkeypatch.setattr(labelled_pairs, "write_pairs", write_pairs)
    monkeypatch.setattr(train_workers, "run_workers", lambda _, work, job, *__: work(job))
    monkeypatch.setattr(train_workers, "TrainWorker", Worker)
    monkeypatch.setattr(pairs, "PairReader", Reader)
    monkeypatch.setattr(contrastive, "install_packed_attention", lambda *_: None)
    monkeypatch.setattr(contrastive, "Contrast", contrast)
    monkeypatch.setattr(batches, "check_batch_feeds", lambda *_: None)  # it asks Ray for the nodes
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    run = [
        f"{each.query_id} Q0 {doc_id} {rank} {-rank} r" for each in QRELS for rank, doc_id in enumerate(others(each))
    ]
    (tmp_path / "run.trec").write_text("\n".join(run) + "\n")
    options = {"num_epochs": 3, "batch_size": 4, "seed": 9, "temperature": 0.25, "both_directions": True}
    options |= {"num_negatives": 2, "negatives": str(tmp_path / "run.trec"), "encoding": str(world / "encoding.json")}
    files = {"model": str(world / "model"), "corpus": str(world / "corpus"), "output": str(tmp_path / "adapter")}
    config = FinetuneConfig(**files, **options, micro_batch_tokens=50, num_workers=1, dtype="float32")
    with pytest.raises(EOFError):
        finetune(config)
    yield given


def others(judged: Qrel) -> list[str]:
    return [each.doc_id for each in PASSAGES if each.doc_id != judged.doc_id][:5]


def test_finetune_makes_pairs_batches_and_losses_as_its_options_say(finetuning: dict[str, Any]) -> None:
    assert finetuning["pairs"]["num_negatives"] == 2
    assert finetuning["pairs"]["encoding"].query_template == "ask: {text}"
    assert finetuning["reader"] == {"batch_size": 4, "num_epochs": 3, "seed": 9}
    loss = finetuning["loss"]
    assert (loss["temperature"], loss["both_directions"], loss["seed"], loss["queries_only"]) == (0.25, True, 9, False)
    assert loss["micro_batch_tokens"] == finetuning["worker"]["micro_batch_tokens"] == 50
    assert loss["encoding"].query_template == "ask: {text}"
