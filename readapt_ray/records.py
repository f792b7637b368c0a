"""Define the records passage, query, qrel and scored document, and their Parquet schemas."""

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import pyarrow as pa


class Passage(NamedTuple):
    """A passage of the corpus. Title or text may be empty, but not both."""

    doc_id: str
    title: str
    text: str
    columns: Mapping[str, Any] | None = None
    """Values of the source's columns that ingest keeps (its option `keep`), by name. None if it keeps none."""


class Query(NamedTuple):
    """A query: a text with which to search the corpus."""

    query_id: str
    text: str


class Qrel(NamedTuple):
    """A judgement of how relevant a passage is to a query. 0 means not relevant."""

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
    """Hash title and text to 16 bytes, to find equal passages. A missing title counts as an empty one.

    Among ten billion texts, the chance that any two collide is 1.5 in 10^19.
    """
    content = f"{title or ''}\0{text}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(content, digest_size=_HASH_BYTES).digest()


PASSAGE_SCHEMA = pa.schema(
    [("doc_id", pa.string()), ("title", pa.string()), ("text", pa.string()), ("content_hash", pa.binary(_HASH_BYTES))]
)
"""Columns kept from the source follow these. Passages written by an older release have no `content_hash`."""
QUERY_SCHEMA = pa.schema([("query_id", pa.string()), ("text", pa.string())])
QREL_SCHEMA = pa.schema([("query_id", pa.string()), ("doc_id", pa.string()), ("relevance", pa.int64())])


def vector_schema(dimension: int, dtype: str) -> pa.Schema:
    """Return the Arrow schema of a vector file.

    Each row has a vector of `dimension` numbers. With int8 each row also has a `scale`: multiply the vector by it to get
    the encoded vector. `content_hash` is the hash of title and text.

    Args:
        dimension: numbers per vector.
        dtype: float32, float16 or int8.
    """
    element = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8()}[dtype]
    scale = [("scale", pa.float32())] if dtype == "int8" else []
    return pa.schema(
        [("doc_id", pa.string()), ("vector", pa.list_(element, dimension)), *scale, ("content_hash", pa.binary(16))]
    )
