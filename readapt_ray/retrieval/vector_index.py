"""The index of an artifact: its shards are loaded and searched one at a time, as if they were one index."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from readapt_ray.artifacts import Artifact, open_artifact
from readapt_ray.retrieval.exact import Hits
from readapt_ray.retrieval.index_files import ShardRecord, read_shard
from readapt_ray.retrieval.index_shard import IndexShard, search_shards
from readapt_ray.storage import Location


@dataclass(frozen=True)
class VectorIndex:
    """The index of an artifact, its shards still on disk."""

    artifact: Artifact

    @classmethod
    def open(cls, uri: str) -> "VectorIndex":
        """Return the complete index in a folder.

        Raises:
            ArtifactMissingError: there is none.
        """
        return cls(open_artifact(uri, "index"))

    @property
    def records(self) -> list[ShardRecord]:
        """What the manifest says of each shard."""
        return [ShardRecord(**each) for each in self.artifact.manifest.details["shards"]]

    @property
    def encoder(self) -> dict[str, Any]:
        """What made the vectors: fingerprint, model, dimension, dtype, encoding."""
        return dict(self.artifact.manifest.details["encoder"])

    @property
    def words(self) -> dict[str, str]:
        """SHA-256 of the BM25 scores of each shard, by its name; empty for an index without BM25."""
        return dict(self.artifact.manifest.details.get("bm25", {}))

    @property
    def num_vectors(self) -> int:
        """Vectors in all shards that are found."""
        return sum(record.num_vectors - record.num_deleted for record in self.records)

    @property
    def folder(self) -> Location:
        """Folder of the shards."""
        return self.artifact.location / "shards"

    def shards(self) -> Iterator[IndexShard]:
        """Yield the shards, loaded and verified one at a time."""
        for record in self.records:
            yield read_shard(self.folder, record)

    def search(self, queries: NDArray[np.float32], top_k: int) -> Hits:
        """Return the k best of each query [Q, D], a shard in memory at a time."""
        return search_shards(self.shards(), queries, top_k)
