"""Merge ranked passages to ranked documents, if ingest split the documents into passages.

A document ranks as its best passage. The manifest of a split corpus says so (`split`), as do those of its vectors and
indexes.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from readapt_ray.sources.splitting import PIECE, parent_of


def first_of_each(doc_ids: Iterable[str], top_k: int) -> list[int]:
    """Return the index of the best passage of each of the first k documents, in a list of passages, best first.

    `["a#2", "a#1", "b#1"]` with k = 2 gives [0, 2]. Fewer than k are returned if the passages are of fewer documents.

    Args:
        doc_ids: ids of passages, best first.
        top_k: k.
    """
    places: dict[str, int] = {}
    for place, doc_id in enumerate(doc_ids):
        places.setdefault(parent_of(doc_id), place)
        if len(places) == top_k:
            break
    return list(places.values())


def merged_to_documents(table: pa.Table, top_k: int) -> pa.Table:
    """Merge passages to documents by their best passage, and keep k documents per query.

    Args:
        table: query_id, doc_id and score; the rows of a query are consecutive, best first.
        top_k: documents per query.

    Returns:
        The row of each document's best passage, in the same order; its doc_id is the document's id.
    """
    doc_ids = pc.replace_substring_regex(table["doc_id"], pattern=PIECE, replacement="")
    table = table.set_column(table.schema.get_field_index("doc_id"), "doc_id", doc_ids)
    pairs = pc.binary_join_element_wise(table["query_id"], doc_ids, "\t")
    codes = pc.dictionary_encode(pairs).combine_chunks().indices.to_numpy() if len(table) else np.zeros(0, np.int64)
    _, first = np.unique(codes, return_index=True)
    table = table.take(pa.array(np.sort(first)))
    return table.filter(pa.array(ranks(table) < top_k))


def ranks(table: pa.Table) -> NDArray[np.int64]:
    """Return the position of each row among the rows of its query, from 0.

    Args:
        table: has the column query_id. The rows of a query must be consecutive, and best first for positions to be
            ranks.
    """
    owners = np.asarray(table["query_id"].to_numpy(), object)
    if not len(owners):
        return np.zeros(0, np.int64)
    begins = np.flatnonzero(np.concatenate([[True], owners[1:] != owners[:-1]]))
    return np.arange(len(owners)) - np.repeat(begins, np.diff([*begins, len(owners)]))


def counts_of(table: pa.Table, query_ids: Sequence[str]) -> NDArray[np.int64]:
    """Return how many rows each query has, in the order of `query_ids`; 0 for a query without rows."""
    found = dict(zip(*(each.to_pylist() for each in table["query_id"].value_counts().flatten()), strict=True))
    return np.array([found.get(query_id, 0) for query_id in query_ids])
