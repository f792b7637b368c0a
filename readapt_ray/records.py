"""Define the four records of the field, and how each is stored in Parquet."""

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import pyarrow as pa


class Passage(NamedTuple):
    """A unit of the corpus. Title or text may be empty, not both."""

    doc_id: str
    title: str
    text: str
    columns: Mapping[str, Any] | None = None
    """Values of the columns that were kept, by name."""


class Query(NamedTuple):
    """A text to search for."""

    query_id: str
    text: str


class Qrel(NamedTuple):
    """A judgement: how relevant a passage is to a query; 0 means not at all."""

    query_id: str
    doc_id: str
    relevance: int


class ScoredDoc(NamedTuple):
    """One line of a run: a passage retrieved for a query. A higher score is better."""

    query_id: str
    doc_id: str
    score: float


_HASH_BYTES = 16


def content_hash(title: str | None, text: str) -> bytes:
    """Hash title and text to 16 bytes: any two of ten billion share a hash with a chance of 1.5 in 10^19."""
    content = f"{title or ''}\0{text}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(content, digest_size=_HASH_BYTES).digest()


PASSAGE_SCHEMA = pa.schema(
    [("doc_id", pa.string()), ("title", pa.string()), ("text", pa.string()), ("content_hash", pa.binary(_HASH_BYTES))]
)
"""The kept columns follow these. Passages that an older ingest wrote have no `content_hash`."""
QUERY_SCHEMA = pa.schema([("query_id", pa.string()), ("text", pa.string())])
QREL_SCHEMA = pa.schema([("query_id", pa.string()), ("doc_id", pa.string()), ("relevance", pa.int64())])


def vector_schema(dimension: int, dtype: str) -> pa.Schema:
    """Return the Arrow schema of vectors: `dtype` is float32, float16 or int8, `dimension` numbers per row.

    int8 vectors have a `scale`: a number times it is what was encoded. `content_hash` is of title and text.
    """
    element = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8()}[dtype]
    scale = [("scale", pa.float32())] if dtype == "int8" else []
    return pa.schema(
        [("doc_id", pa.string()), ("vector", pa.list_(element, dimension)), *scale, ("content_hash", pa.binary(16))]
    )
