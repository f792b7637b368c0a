"""The table of stages. Each stage is a module with its config and its function; stages do not import each other."""

from typing import NamedTuple


class Stage(NamedTuple):
    """A row of the table of stages. The module and its function have the name of the stage."""

    config: str
    """Name of the config class in that module."""
    summary: str
    """What the stage does, for `readapt --help`."""


STAGES: dict[str, Stage] = {
    "ingest": Stage("IngestConfig", "read a corpus from a source: clean it, drop duplicates, keep the ids"),
    "pack": Stage("PackConfig", "tokenise passages and pack them into blocks (train does it when needed)"),
    "train": Stage("TrainConfig", "train a knowledge adapter on unlabelled passages"),
    "synthesize": Stage("SynthesizeConfig", "let a language model write queries for passages, to train on or tune by"),
    "finetune": Stage("FinetuneConfig", "train a retriever on labelled pairs"),
    "merge": Stage("MergeConfig", "add the retriever's and the adapter's weight changes to the pretrained model"),
    "embed": Stage("EmbedConfig", "turn passages into vectors"),
    "bridge": Stage("BridgeConfig", "let a new model's queries search an old model's vectors while re-embedding runs"),
    "index": Stage("IndexConfig", "build a FAISS index from vectors"),
    "export": Stage(
        "ExportConfig", "send vectors to a vector database: Qdrant, LanceDB, pgvector, OpenSearch, Milvus, files"
    ),
    "search": Stage("SearchConfig", "search for queries and write the best passages as a TREC run"),
    "evaluate": Stage("EvaluateConfig", "measure runs against judgements, test the difference, write a report"),
    "drift": Stage("DriftConfig", "measure without queries what an adaptation changed: loss, vectors, neighbours"),
    "tune": Stage("TuneConfig", "find the best scales for merge on withheld queries"),
}
