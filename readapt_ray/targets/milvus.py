"""Send rows to Milvus: `milvus://host:19530/COLLECTION`, or `milvus:FOLDER/COLLECTION` for Milvus Lite.

Title and text are fields of up to 65,535 bytes; other columns of a passage are dynamic fields. The record is a property
of the collection. The token (or USER:PASSWORD) is read from MILVUS_TOKEN.
"""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from readapt_ray.targets import addresses
from readapt_ray.targets.target import SERVER_WRITERS, Layout, Record, check_bytes, check_dimension, matrix, payloads

VARIABLES = "MILVUS_TOKEN"
_MAX_DIMENSION = 32_768
_MAX_BYTES = 65_535
_TIMEOUT_S = 60
_TEXTS = ("title", "text")
_KEY = "readapt"


class MilvusTarget:
    """A collection of Milvus."""

    def __init__(self, address: addresses.Address) -> None:
        addresses.check_options(address, ("tls",))
        with addresses.client_of("milvus"):
            from pymilvus import DataType, MilvusClient
        self._name, self._types = address.name, DataType
        self.max_writers = SERVER_WRITERS if address.host else 1
        if address.host:
            uri, token = address.http_url(19530), os.environ.get("MILVUS_TOKEN", "")
            self._client: Any = MilvusClient(uri, token=token, timeout=_TIMEOUT_S)
        else:
            Path(address.folder).mkdir(parents=True, exist_ok=True)
            self._client = MilvusClient(f"{address.folder}/milvus.db")

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def check(self, layout: Layout) -> None:
        """Refuse vectors with more than 32,768 dimensions."""
        check_dimension(layout, _MAX_DIMENSION, "Milvus")

    def record(self) -> Record | None:
        """Return the record in the collection's properties; None without a collection, {} if it is not from readapt."""
        if not self._client.has_collection(self._name):
            return None
        return dict(json.loads(self._client.describe_collection(self._name)["properties"].get(_KEY, "{}")))

    def create(self, layout: Layout, record: Record) -> None:
        """Create the collection with its record, but no index yet; title and text get fields if they are sent."""
        schema = self._client.create_schema(auto_id=False, enable_dynamic_field=True)
        schema.add_field("doc_id", self._types.VARCHAR, is_primary=True, max_length=_MAX_BYTES)
        schema.add_field("vector", self._types.FLOAT_VECTOR, dim=layout.dimension)
        for name in _TEXTS:
            if name in layout.payload.names:
                schema.add_field(name, self._types.VARCHAR, max_length=_MAX_BYTES, nullable=True)
        self._client.create_collection(self._name, schema=schema, properties={_KEY: json.dumps(dict(record))})

    def set_record(self, record: Record) -> None:
        """Replace the record in the collection's properties."""
        self._client.alter_collection_properties(self._name, properties={_KEY: json.dumps(dict(record))})

    def drop(self) -> None:
        """Drop the collection with its record."""
        self._client.drop_collection(self._name)

    def write(self, part: str, batches: Iterable[pa.Table]) -> None:
        """Upsert entities, with one request per batch.

        Raises:
            InputError: a doc_id, title or text has more than 65,535 bytes. Earlier batches are already written.
        """
        del part
        for rows in batches:
            entities = payloads(rows)
            for column in ("doc_id", *_TEXTS):
                check_bytes(entities, column, _MAX_BYTES, "Milvus")
            numbers = matrix(rows).tolist()
            self._client.upsert(
                self._name, [each | {"vector": vector} for each, vector in zip(entities, numbers, strict=True)]
            )

    def delete(self, doc_ids: Sequence[str]) -> None:
        """Delete the entities with these doc_ids, by a filter (the client would not quote ids); ignore missing ones."""
        self._client.delete(self._name, filter=f"doc_id in {json.dumps(list(doc_ids), ensure_ascii=False)}")

    def finish(self) -> None:
        """Build the index for the inner product, unless it exists, and load the collection."""
        if not self._client.list_indexes(self._name):
            index = self._client.prepare_index_params()
            index.add_index("vector", index_type="AUTOINDEX", metric_type="IP")
            self._client.create_index(self._name, index)
        self._client.load_collection(self._name)

    def count(self) -> int:
        """Return the number of entities. Call `finish` first, which loads the collection."""
        found = self._client.query(self._name, filter="", output_fields=["count(*)"], consistency_level="Strong")
        return int(found[0]["count(*)"])

    def search(self, vectors: NDArray[np.float32], top_k: int) -> list[list[str]]:
        """Return the doc_ids of the k nearest rows of each vector [Q, D], best first, with one request for all vectors.

        Call `finish` first, which loads the collection.
        """
        found = self._client.search(
            self._name,
            data=vectors.tolist(),
            limit=top_k,
            search_params={"metric_type": "IP"},
            consistency_level="Strong",
        )
        return [[hit["doc_id"] for hit in hits] for hits in found]
