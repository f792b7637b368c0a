"""Send rows to Qdrant: `qdrant://host:6333/COLLECTION`, or `qdrant:FOLDER/COLLECTION` for the client's local mode.

The id of a point is the UUID (version 5) of its doc_id, since Qdrant takes only numbers and UUIDs. The record is in
the metadata of the collection (Qdrant 1.16 or newer). The API key is read from QDRANT_API_KEY.
"""

import os
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from readapt_ray.errors import InputError
from readapt_ray.targets import addresses
from readapt_ray.targets.target import SERVER_WRITERS, Layout, Record, check_dimension, matrix, payloads

VARIABLES = "QDRANT_API_KEY"
_MAX_DIMENSION = 65_536
_TIMEOUT_S = 60
_KEY = "readapt"
_NAMESPACE = uuid.UUID("b6f3f2c0-6f0e-5d0a-9a53-6a5a1f1c7d11")


class QdrantTarget:
    """A collection of Qdrant."""

    def __init__(self, address: addresses.Address) -> None:
        addresses.check_options(address, ("tls",))
        with addresses.client_of("qdrant"):
            from qdrant_client import QdrantClient, models
        self._name, self._models = address.name, models
        self.max_writers = SERVER_WRITERS if address.host else 1
        if address.host:
            self._client: Any = QdrantClient(
                url=address.http_url(6333), api_key=os.environ.get("QDRANT_API_KEY"), timeout=_TIMEOUT_S
            )
        else:
            self._client = QdrantClient(path=address.folder)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def check(self, layout: Layout) -> None:
        """Refuse vectors with more than 65,536 dimensions."""
        check_dimension(layout, _MAX_DIMENSION, "Qdrant")

    def record(self) -> Record | None:
        """Return the record in the collection's metadata; None without a collection, {} if it is not from readapt."""
        if not self._client.collection_exists(self._name):
            return None
        return dict((self._client.get_collection(self._name).config.metadata or {}).get(_KEY, {}))

    def create(self, layout: Layout, record: Record) -> None:
        """Create a collection that ranks by inner product, like our exact search.

        Raises:
            InputError: the server is too old to store the record; the collection is removed again.
        """
        vectors = self._models.VectorParams(size=layout.dimension, distance=self._models.Distance.DOT)
        self._client.create_collection(self._name, vectors_config=vectors, metadata={_KEY: dict(record)})
        if not self.record():
            self.drop()
            raise InputError("this Qdrant keeps no metadata of a collection; use version 1.16 or newer")

    def set_record(self, record: Record) -> None:
        """Replace the record in the metadata."""
        self._client.update_collection(self._name, metadata={_KEY: dict(record)})

    def drop(self) -> None:
        """Delete the collection."""
        self._client.delete_collection(self._name)

    def write(self, part: str, batches: Iterable[pa.Table]) -> None:
        """Upsert points, with one request per batch, and wait until they are stored."""
        del part
        for rows in batches:
            points = self._models.Batch(
                ids=[_point_id(each) for each in rows["doc_id"].to_pylist()],
                vectors=matrix(rows).tolist(),
                payloads=payloads(rows),
            )
            self._client.upsert(self._name, points=points, wait=True)

    def delete(self, doc_ids: Sequence[str]) -> None:
        """Delete the points of these doc_ids; missing ones are ignored."""
        ids = self._models.PointIdsList(points=[_point_id(each) for each in doc_ids])
        self._client.delete(self._name, points_selector=ids, wait=True)

    def finish(self) -> None:
        """Do nothing: Qdrant indexes by itself."""

    def count(self) -> int:
        """Return the number of points."""
        return int(self._client.count(self._name, exact=True).count)

    def search(self, vectors: NDArray[np.float32], top_k: int) -> list[list[str]]:
        """Return the doc_ids of the k nearest points of each vector [Q, D], best first, with one request per vector."""
        found = (
            self._client.query_points(self._name, query=each.tolist(), limit=top_k, with_payload=["doc_id"])
            for each in vectors
        )
        return [[point.payload["doc_id"] for point in answer.points] for answer in found]


def _point_id(doc_id: str) -> str:
    return str(uuid.uuid5(_NAMESPACE, doc_id))
