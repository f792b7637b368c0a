"""The stages: one module each, with its config, its function and nothing that the other stages need."""

STAGES: dict[str, str] = {
    "ingest": "read a corpus from a source: clean it, drop duplicates, keep the ids",
    "pack": "tokenise passages and pack them into blocks (train does it when needed)",
    "train": "train a knowledge adapter on unlabelled passages",
    "finetune": "train a retriever on labelled pairs",
    "merge": "add the retriever's and the adapter's weight changes to the pretrained model",
    "embed": "turn passages into vectors",
    "index": "build a FAISS index from vectors",
    "search": "search for queries and write the best passages as a TREC run",
    "evaluate": "measure runs against judgements, test the difference, write a report",
    "tune": "find the best scales for merge on withheld queries",
}
"""Every stage and what it does; its module, config and function go by its name."""
