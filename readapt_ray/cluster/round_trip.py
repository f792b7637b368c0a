"""Check whether synthetic queries find the passages that they were written for, by exact search on Ray.

In: queries with the doc_ids of their passages, and vectors. Out: which queries have their passage among the best
results.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from readapt_ray.artifacts import Artifact
from readapt_ray.cluster import connection
from readapt_ray.cluster.query_vectors import encode_queries
from readapt_ray.cluster.recall_queries import query_encoder_of
from readapt_ray.cluster.search_pieces import Pieces, vector_pieces
from readapt_ray.retrieval.merged_rows import merge_rows


def find_passages(
    texts: Sequence[str],
    doc_ids: Sequence[str],
    vectors: Artifact,
    top_k: int,
    *,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> NDArray[np.bool_]:
    """Search with each query; return whether its passage is among the `top_k` best, bool [Q] in the order of `texts`.

    Args:
        texts: Q queries.
        doc_ids: doc_id of the passage of each query.
        vectors: the output of the embed stage; its manifest names the retriever.
        top_k: number of best passages to look at.
        progress: called with the number of queries encoded, and of all queries.

    Raises:
        ReadaptError: the retriever of the vectors is no longer there, or another one is there.
    """
    from ray.exceptions import RayError

    if not texts:
        return np.zeros(0, np.bool_)
    encoder = query_encoder_of(vectors)
    total = connection.connect()
    num_at_once, on_gpus = max(1, total.num_gpus or total.num_cpus), bool(total.num_gpus)
    contents = vector_pieces(vectors, num_at_once, on_gpus=on_gpus)
    pieces = Pieces(vectors, contents, on_gpus=on_gpus, num_at_once=num_at_once)
    try:
        encoded = encode_queries(texts, encoder.model, encoder.encoding, encoder.description, progress=progress)
        best = merge_rows(pieces.search(encoded, top_k), len(texts), top_k)
        distinct, codes = np.unique(best.rows, return_inverse=True)
        names = np.array(pieces.names(distinct).to_pylist(), object)
    except RayError as error:
        raise connection.cause_of(error) from None
    found = names[codes.reshape(best.rows.shape)] == np.array(doc_ids, object)[:, None]
    return np.asarray(found.any(axis=1), np.bool_)
