"""The stages: one module each, with its config, its function and nothing that the other stages need."""

STAGES: dict[str, str] = {
    "ingest": "read a corpus from a source: clean it, drop duplicates, keep the ids",
    "pack": "turn passages into token blocks (train does it where it is needed)",
    "train": "train a knowledge adapter on unlabelled passages",
    "finetune": "train a retriever on labelled pairs",
    "merge": "lay the retriever and the knowledge adapter on the pretrained model",
    "embed": "turn passages into vectors",
    "index": "build a FAISS index from vectors",
    "search": "retrieve the best passages of queries into a TREC run",
    "evaluate": "measure runs against judgements, test the difference, write a report",
    "tune": "find the best pair of scales on withheld queries",
}
"""Every stage and what it does; its module, config and function go by its name."""
