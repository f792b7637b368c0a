"""Encode queries on Ray, 512 per piece.

In: texts and the model that made the vectors. Out: Ray references to vectors, in the order of the texts.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from readapt_ray.catalog.encoding import Encoding
from readapt_ray.catalog.models import OpenModel
from readapt_ray.cluster import on_worker
from readapt_ray.cluster.placement import Placement, place_actors
from readapt_ray.errors import ModelError

QUERIES_A_PIECE = 512


def encode_queries(
    texts: Sequence[str],
    model: OpenModel,
    encoding: Encoding,
    encoder: dict[str, Any],
    *,
    batch_tokens: int | None = None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> list[Any]:
    """Return references to float32 [512, D] each: vectors do not depend on the number of tasks, one per GPU or core.

    Args:
        texts: the queries.
        model: what encodes them.
        encoding: its templates and pooling.
        encoder: what the manifest of the vectors says of it.
        batch_tokens: tokens per batch at most; None for the device's own.
        progress: is told how many are done, of how many.

    Raises:
        ModelError: the model gives NaN or infinity for a query.
    """
    import ray

    pieces = [texts[first : first + QUERIES_A_PIECE] for first in range(0, len(texts), QUERIES_A_PIECE)]
    num_tasks, num_cpus, num_gpus = place_actors(Placement(None, None), len(pieces))
    task = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, num_returns="streaming")(_encoded)
    streams = [
        task.remote(
            pieces[number::num_tasks],
            retriever=on_worker.model_name(model),
            encoding=encoding,
            encoder=encoder,
            driver_node=on_worker.this_node(),
            batch_tokens=batch_tokens,
            num_threads=num_cpus,
        )
        for number in range(num_tasks)
    ]
    found: list[Any] = []
    done = 0
    progress(done, len(texts))
    try:
        for number in range(len(pieces)):
            found.append(next(streams[number % num_tasks]))
            done += len(ray.get(found[-1]))
            progress(done, len(texts))
    finally:
        for stream in streams:
            ray.cancel(stream)
    return found


def _encoded(
    pieces: Sequence[Sequence[str]],
    *,
    retriever: str,
    encoding: Encoding,
    encoder: dict[str, Any],
    driver_node: str,
    batch_tokens: int | None,
    num_threads: int,
) -> Iterator[np.ndarray]:
    """Encode the queries of each piece, in a Ray actor."""
    loaded = on_worker.load_encoder(
        retriever,
        encoding,
        encoder["dtype"],
        due=encoder["fingerprint"],
        driver_node=driver_node,
        num_threads=num_threads,
        batch_tokens=batch_tokens,
    )
    for piece in pieces:
        vectors = loaded.encode(piece, "query")
        broken = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(broken):
            raise ModelError(
                f"the model gives NaN or infinity for the query {piece[broken[0]]!r} in {encoder['dtype']}; make vectors and "
                f"run in bfloat16 or float32 (`readapt embed --dtype`), or leave the query out"
            )
        yield vectors
