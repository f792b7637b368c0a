import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from readapt_ray.artifacts import Workspace, produce
from readapt_ray.catalog.models import find_model
from readapt_ray.config import StageConfig
from readapt_ray.retrieval.encoder import Encoder
from readapt_ray.retrieval.vector_index import build_shard, described, index_kind, write_shard
from readapt_ray.serving.app import ServeConfig, serve, stop
from tests.factories import full_retriever, ingest_artifact, small_corpus, tiny_decoder, write_contract


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class World:
    """A tiny retriever, its index of a small corpus in two shards, and the same encoder without HTTP."""

    folder: Path
    encoder: Encoder

    def config(self, **changes) -> ServeConfig:
        values = {
            "retriever": str(self.folder / "retriever"),
            "index": str(self.folder / "index"),
            "corpus": str(self.folder / "corpus"),
            "port": free_port(),
        }
        return ServeConfig.parse(values | changes)


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("serving")
    retriever = full_retriever(folder / "retriever", tiny_decoder(folder / "pretrained"))
    write_contract(retriever)
    passages = small_corpus(40)
    ingest_artifact(folder / "corpus", passages, num_files=2)
    model = find_model(str(retriever))
    encoder = Encoder.load(model)
    made_by = {
        "fingerprint": encoder.fingerprint,
        "model": model.name,
        "dimension": encoder.dimension,
        "dtype": "float32",
        "encoding": encoder.encoding.model_dump(mode="json"),
    }

    def work(workspace: Workspace) -> None:
        records = []
        for number, part in enumerate((passages[:25], passages[25:])):
            vectors = encoder.encode([each.text for each in part], "passage", [each.title for each in part])
            shard = build_shard(index_kind("flat"), encoder.dimension, [([each.doc_id for each in part], vectors)])
            records.append(
                described(
                    write_shard(workspace.location / "shards", f"{number:05d}", shard, encoder=encoder.fingerprint)
                )
            )
        workspace.counts |= {"num_vectors": len(passages)}
        workspace.details |= {"encoder": made_by, "kind": "flat", "shards": records}

    produce("index", StageConfig(output=str(folder / "index")), inputs={"vectors": "made here"}, work=work)
    return World(folder, encoder)


@pytest.fixture(scope="module")
def served(ray_session, world) -> Iterator[httpx.Client]:
    """An HTTP client of a served app, which is gone after the module: it holds CPUs that other tests want."""
    url = serve(world.config(name="tiny", max_body_bytes=200_000), blocking=False)
    with httpx.Client(base_url=url, timeout=30) as client:
        yield client
    stop()
