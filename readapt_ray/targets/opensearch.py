"""Send rows to an OpenSearch index: `opensearch://host:9200/INDEX`, with `?tls=true` for https.

The vectors are in a field of the type knn_vector (HNSW of FAISS, inner product), and the payload is in other fields.
The record is in `_meta` of the mapping. User and password are read from OPENSEARCH_USERNAME and OPENSEARCH_PASSWORD.
"""

import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from readapt_ray.progress import amount
from readapt_ray.targets import addresses
from readapt_ray.targets.target import (
    SERVER_WRITERS,
    Layout,
    Record,
    check_bytes,
    check_columns,
    check_dimension,
    matrix,
    payloads,
)

VARIABLES = "OPENSEARCH_USERNAME and OPENSEARCH_PASSWORD"
_MAX_DIMENSION = 16_000
_MAX_ID_BYTES = 512
_OWN_FIELDS = frozenset(("_id", "_index", "_source", "_field_names", "_ignored", "_routing", "_size", "_type"))
"""Reserved names, which fields of a document cannot have."""
_TIMEOUT_S = 60
_KEY = "readapt"


class OpenSearchTarget:
    """An index of OpenSearch."""

    max_writers = SERVER_WRITERS

    def __init__(self, address: addresses.Address) -> None:
        addresses.check_options(address, ("tls",))
        with addresses.client_of("opensearch"):
            from opensearchpy import OpenSearch, helpers
        self._name, self._helpers = address.name, helpers
        user, password = os.environ.get("OPENSEARCH_USERNAME"), os.environ.get("OPENSEARCH_PASSWORD")
        self._client: Any = OpenSearch(
            hosts=[{"host": address.host, "port": address.port or 9200}],
            use_ssl=address.has_tls,
            http_auth=(user, password) if user and password else None,
            timeout=_TIMEOUT_S,
        )

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def check(self, layout: Layout) -> None:
        """Refuse vectors with more than 16,000 dimensions, and columns with reserved names such as `_id`."""
        check_dimension(layout, _MAX_DIMENSION, "OpenSearch")
        check_columns(layout, _OWN_FIELDS.__contains__, "OpenSearch")

    def record(self) -> Record | None:
        """Return the record in `_meta` of the mapping; None without an index, {} if readapt did not create it."""
        if not self._client.indices.exists(index=self._name):
            return None
        (found,) = self._client.indices.get_mapping(index=self._name).values()
        return dict(found["mappings"].get("_meta", {}).get(_KEY, {}))

    def create(self, layout: Layout, record: Record) -> None:
        """Create the index with its mapping, which holds the record."""
        method = {"name": "hnsw", "engine": "faiss", "space_type": "innerproduct"}
        fields = {
            "doc_id": {"type": "keyword"},
            "vector": {"type": "knn_vector", "dimension": layout.dimension, "method": method},
            **{name: {"type": "text"} for name in ("title", "text") if name in layout.payload.names},
            **{each.name: {"type": "date"} for each in layout.payload if _is_date(each.type)},
        }
        # A text that looks like a date would make its field a date, which then refuses all other texts.
        mapping = {"_meta": {_KEY: dict(record)}, "date_detection": False, "properties": fields}
        self._client.indices.create(index=self._name, body={"settings": {"index.knn": True}, "mappings": mapping})

    def set_record(self, record: Record) -> None:
        """Replace the record in `_meta`."""
        self._client.indices.put_mapping(index=self._name, body={"_meta": {_KEY: dict(record)}})

    def drop(self) -> None:
        """Delete the index."""
        self._client.indices.delete(index=self._name)

    def write(self, part: str, batches: Iterable[pa.Table]) -> None:
        """Index documents in bulk, with one request per batch.

        Raises:
            InputError: a doc_id has more than 512 bytes. Earlier batches are already written.
        """
        del part
        for rows in batches:
            documents = payloads(rows)
            check_bytes(documents, "doc_id", _MAX_ID_BYTES, "OpenSearch")
            actions = (
                {"_op_type": "index", "_index": self._name, "_id": each["doc_id"], "_source": each | {"vector": vector}}
                for each, vector in zip(documents, matrix(rows).tolist(), strict=True)
            )
            self._helpers.bulk(self._client, actions, chunk_size=len(documents), max_retries=3)

    def delete(self, doc_ids: Sequence[str]) -> None:
        """Delete the documents with these doc_ids in bulk; missing ones are ignored."""
        actions = ({"_op_type": "delete", "_index": self._name, "_id": each} for each in doc_ids)
        _, errors = self._helpers.bulk(self._client, actions, raise_on_error=False)
        refused = [each for each in errors if each["delete"]["status"] != 404]
        if refused:
            raise self._helpers.BulkIndexError(f"{amount(len(refused), 'deletions')} failed", refused)

    def finish(self) -> None:
        """Make all written documents visible to searches."""
        self._client.indices.refresh(index=self._name)

    def count(self) -> int:
        """Return the number of documents that are visible to searches. Call `finish` first."""
        return int(self._client.count(index=self._name)["count"])

    def search(self, vectors: NDArray[np.float32], top_k: int) -> list[list[str]]:
        """Return the doc_ids of the k nearest documents of each vector [Q, D], best first, with one request per vector.

        The search is approximate (HNSW). Call `finish` first.
        """
        found = (
            self._client.search(
                index=self._name,
                body={
                    "size": top_k,
                    "_source": False,
                    "query": {"knn": {"vector": {"vector": each.tolist(), "k": top_k}}},
                },
            )
            for each in vectors
        )
        return [[hit["_id"] for hit in answer["hits"]["hits"]] for answer in found]


def _is_date(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_list(kind) else kind
    return bool(pa.types.is_date(kind) or pa.types.is_timestamp(kind))
