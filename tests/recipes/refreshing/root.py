"""A corpus that changes and the root that is refreshed from it, for tests; and stand-ins for the stages that need Ray."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from readapt_ray import artifacts, dead_rows, generations
from readapt_ray.artifacts import Artifact, Workspace
from readapt_ray.catalog.models import open_model
from readapt_ray.generations import Generation
from readapt_ray.recipes import chain
from readapt_ray.recipes.refreshing.options import RefreshConfig
from readapt_ray.recipes.refreshing.refresh import refresh
from readapt_ray.records import Passage, vector_schema
from readapt_ray.storage import Location
from tests import factories

_DIMENSION = 16


class Root:
    """A source file, a model, and the root of refreshes."""

    def __init__(self, folder: Path, model: Path, uri: str | None = None) -> None:
        self.folder, self.model = folder, model
        self.uri = uri or str(folder / "root")
        self.source = folder / "corpus.jsonl"
        self.location = Location(self.uri)

    def holds(self, passages: Iterable[Passage]) -> None:
        """Write the source."""
        rows = [{"_id": each.doc_id, "title": each.title, "text": each.text} for each in passages]
        self.source.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def refresh(self, **options: Any) -> Generation:
        """Refresh; the source and the model are given until there is a generation."""
        known = {} if self.there() else {"source": str(self.source), "retriever": str(self.model)}
        return refresh(RefreshConfig(root=self.uri, **{**known, **options}))

    def there(self) -> list[Generation]:
        """All generations."""
        return generations.read(self.location)

    def table(self, generation: Generation, name: str, folder: str) -> pa.Table:
        """The rows of the Parquet files of an artifact of a generation."""
        files = (Location(generation.folder(self.location, name)) / folder).files(".parquet")
        return pa.concat_tables(map(dead_rows.read_table, files))

    def passages(self, generation: Generation) -> dict[str, tuple[str, str]]:
        """Title and text by doc_id."""
        rows = self.table(generation, "corpus", "passages").to_pylist()
        return {row["doc_id"]: (row["title"], row["text"]) for row in rows}

    def vectors(self, generation: Generation) -> dict[str, bytes]:
        """The bytes of the vectors by doc_id."""
        rows = self.table(generation, "vectors", "vectors").to_pylist()
        return {row["doc_id"]: np.array(row["vector"], np.float32).tobytes() for row in rows}

    def files_with(self, needles: dict[str, bytes]) -> list[str]:
        """Search every byte of every file under the root; Parquet columns are decompressed, too."""
        found = []
        for file in (self.location / name for name in self.location.entries()[0]):
            content = file.read_bytes() + file.uri.encode()
            if file.name.endswith(".parquet"):
                content += b"".join(map(_plain_bytes, read_table(file).itercolumns()))
            found += [f"{name} in {file}" for name, needle in needles.items() if needle in content]
        return found


def read_table(file: Location) -> pa.Table:
    """The rows of a Parquet file."""
    with file.open_input() as stream:
        return pq.read_table(stream)


def _plain_bytes(column: pa.ChunkedArray) -> bytes:
    buffers = (buffer for chunk in column.chunks for buffer in chunk.buffers() if buffer is not None)
    return b"".join(buffer.to_pybytes() for buffer in buffers)


def vector_of(content_hash: bytes) -> np.ndarray:
    """The stand-in's vector of a content."""
    return np.random.default_rng(list(content_hash)).normal(size=_DIMENSION).astype(np.float32)


class StandIns:
    """Stages that need no Ray in the place of embed and index; `calls` lists what ran, with its `previous`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, bool]] = []
        self.fails_at = ""
        self.before: dict[str, Callable[[], None]] = {}
        """What happens before a stage."""
        self._run_stage = chain.run_stage
        monkeypatch.setattr(chain, "run_stage", self._run)

    def _run(self, stage: str, config: Any) -> Artifact:
        self.calls.append((stage, bool(getattr(config, "previous", None))))
        if stage == self.fails_at:
            raise KeyboardInterrupt
        self.before.get(stage, lambda: None)()
        return {"embed": _embed, "index": _index}.get(stage, lambda _: self._run_stage(stage, config))(config)


def _embed(config: Any) -> Artifact:
    corpus = artifacts.open_artifact(config.corpus, "ingest")
    model = open_model(config.retriever)
    encoder = {"fingerprint": model.fingerprint, "model": model.name, "dimension": _DIMENSION, "dtype": "float32"}

    def work(workspace: Workspace) -> None:
        files = (corpus.location / "passages").files(".parquet")
        rows = sorted((row["doc_id"], row["content_hash"]) for each in files for row in read_table(each).to_pylist())
        schema = vector_schema(_DIMENSION, "float32").with_metadata({b"readapt": json.dumps({"encoder": encoder})})
        columns = {
            "doc_id": [doc_id for doc_id, _ in rows],
            "vector": [vector_of(content).tolist() for _, content in rows],
            "content_hash": [content for _, content in rows],
        }
        with (workspace.location / "vectors/part-00000.parquet").open_output() as stream:
            pq.write_table(pa.table(columns, schema=schema), stream)
        workspace.counts["num_vectors"] = len(rows)
        workspace.details |= {"encoder": encoder, "vector_dtype": "float32"}

    inputs = {"retriever": model.fingerprint, "corpus": corpus.fingerprint}
    return artifacts.produce("embed", config, inputs=inputs, work=work)


def _index(config: Any) -> Artifact:
    vectors = artifacts.open_artifact(config.vectors, "embed")
    previous = artifacts.open_artifact(config.previous, "index") if config.previous else None

    def work(workspace: Workspace) -> None:
        ids = read_table(vectors.location / "vectors/part-00000.parquet")["doc_id"].to_pylist()
        before = previous.manifest.details["ids"] if previous else ids
        shard = {"num_deleted": len(set(before) - set(ids))}
        workspace.details |= {"shards": [shard], "ids": sorted({*before, *ids})}

    inputs = {"vectors": vectors.fingerprint} | ({"previous": previous.fingerprint} if previous else {})
    return artifacts.produce("index", config, inputs=inputs, work=work)


def models(folder: Path) -> Path:
    """A folder with the tiny retrievers `model` and `other`."""
    base = factories.tiny_decoder(folder / "base")
    for number, name in enumerate(("model", "other")):
        factories.write_contract(factories.full_retriever(folder / name, base, seed=number))
    return folder
