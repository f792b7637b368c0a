"""A run that is planned."""

from pathlib import Path

import pytest

from tests import factories
from tests.planner.plans import CLUSTER, write


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a tiny model over an ingested corpus of 300 passages, whose root holds nothing else yet."""
    folder = tmp_path_factory.mktemp("plan")
    base = factories.tiny_decoder(folder / "base")
    factories.write_contract(factories.full_retriever(folder / "retriever", base))
    passages = factories.small_corpus(300)
    factories.ingest_artifact(folder / "root" / "corpus", passages, *factories.small_queries(passages, 20), num_files=3)
    values = {
        "source": str(folder / "absent"),
        "root": str(folder / "root"),
        "pretrained": str(base),
        "retriever": str(folder / "retriever"),
        "train": {"block_tokens": 64, "batch_size": 16},
        "evaluate": {"measures": "nDCG@10"},
    }
    write(folder, values, "run.yaml")
    write(folder, CLUSTER)
    return folder
