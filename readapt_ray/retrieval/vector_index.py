"""Search the index of an artifact: load its shards one at a time, and search them as if they were one index."""

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
    """The index of an artifact, with its shards on disk."""

    artifact: Artifact

    @classmethod
    def open(cls, uri: str) -> "VectorIndex":
        """Open the index in a folder.

        Raises:
            ArtifactMissingError: there is no complete index.
        """
        return cls(open_artifact(uri, "index"))

    @property
    def records(self) -> list[ShardRecord]:
        """Return the entry of each shard in the manifest."""
        return [ShardRecord(**each) for each in self.artifact.manifest.details["shards"]]

    @property
    def encoder(self) -> dict[str, Any]:
        """Return the description of the encoder of the vectors: fingerprint, model, dimension, dtype, encoding."""
        return dict(self.artifact.manifest.details["encoder"])

    @property
    def words(self) -> dict[str, str]:
        """Return the SHA-256 of the BM25 file of each shard, by name; empty for an index without BM25."""
        return dict(self.artifact.manifest.details.get("bm25", {}))

    @property
    def num_vectors(self) -> int:
        """Return the number of vectors in all shards, without deleted ones."""
        return sum(record.num_vectors - record.num_deleted for record in self.records)

    @property
    def folder(self) -> Location:
        """Return the folder of the shards."""
        return self.artifact.location / "shards"

    def shards(self) -> Iterator[IndexShard]:
        """Load and verify the shards, one at a time, without their BM25 scores.

        Raises:
            CorruptFileError: a file is gone, or its checksum is wrong.
        """
        for record in self.records:
            yield read_shard(self.folder, record)

    def search(self, queries: NDArray[np.float32], top_k: int) -> Hits:
        """Return the k best passages of each query, with one shard in memory at a time.

        Each call loads all shards again.

        Args:
            queries: float32 [Q, D], by the encoder of queries for these vectors.
            top_k: k.

        Raises:
            CorruptFileError: a file of a shard is gone, or its checksum is wrong.
            InputError: the dimensions differ, top_k is under 1, or a query holds NaN or infinity.
        """
        return search_shards(self.shards(), queries, top_k)
