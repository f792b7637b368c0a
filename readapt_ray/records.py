"""The four records that the whole package speaks of, and how each lies in Parquet."""

import hashlib
from typing import NamedTuple

import pyarrow as pa


class Passage(NamedTuple):
    """A unit of the corpus. `title` may be empty."""

    doc_id: str
    title: str
    text: str


class Query(NamedTuple):
    """What is searched for."""

    query_id: str
    text: str


class Qrel(NamedTuple):
    """A judgement: how relevant a passage is to a query; 0 is not at all."""

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
    """Return 16 bytes that stand for title and text: two of ten billion passages share one with a chance of 1 in 10^19."""
    digest = hashlib.blake2b((title or "").encode("utf-8", "surrogatepass"), digest_size=_HASH_BYTES)
    digest.update(b"\0")
    digest.update(text.encode("utf-8", "surrogatepass"))
    return digest.digest()


PASSAGE_SCHEMA = pa.schema(
    [("doc_id", pa.string()), ("title", pa.string()), ("text", pa.string()), ("content_hash", pa.binary(_HASH_BYTES))]
)
"""Passages that an older ingest wrote have no `content_hash`."""
QUERY_SCHEMA = pa.schema([("query_id", pa.string()), ("text", pa.string())])
QREL_SCHEMA = pa.schema([("query_id", pa.string()), ("doc_id", pa.string()), ("relevance", pa.int64())])


def vector_schema(dimension: int, dtype: str) -> pa.Schema:
    """Vectors as plain Arrow: `dtype` is float32, float16 or int8, `dimension` numbers a row.

    int8 vectors have a `scale`: a number times it is what was encoded. `content_hash` is of title and text.
    """
    element = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8()}[dtype]
    scale = [("scale", pa.float32())] if dtype == "int8" else []
    return pa.schema(
        [("doc_id", pa.string()), ("vector", pa.list_(element, dimension)), *scale, ("content_hash", pa.binary(16))]
    )
