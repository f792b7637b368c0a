"""Encode texts on Ray, 512 per piece: queries to search with, or some passages.

In: texts and the model that encodes them. Out: Ray references to vectors, in the order of the texts.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from readapt_ray.catalog.encoding import Encoding
from readapt_ray.catalog.models import OpenModel
from readapt_ray.cluster import autoscaling, bounded_tasks, on_worker
from readapt_ray.cluster.placement import Placement, place_actors
from readapt_ray.errors import ModelError
from readapt_ray.retrieval.bridge import Bridge
from readapt_ray.retrieval.tokenization import Kind

QUERIES_A_PIECE = 512


class TextPiece(NamedTuple):
    """Texts that are encoded by one task in one go: passages if they have titles, else queries."""

    texts: Sequence[str]
    titles: Sequence[str] | None = None


def encode_queries(
    texts: Sequence[str],
    model: OpenModel,
    encoding: Encoding,
    encoder: dict[str, Any],
    *,
    bridge: Bridge | None = None,
    batch_tokens: int | None = None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> list[Any]:
    """Return references to float32 [512, D] each: vectors do not depend on the number of tasks, one per GPU or core.

    Args:
        texts: the queries.
        model: what encodes them.
        encoding: its templates and pooling.
        encoder: what the manifest of the vectors, or of the bridge, says of it.
        bridge: maps the vectors to another model's.
        batch_tokens: tokens per batch at most; None for what suits the device and the model.
        progress: is told how many are done, of how many.

    Raises:
        ModelError: the model gives NaN or infinity for a query.
    """
    import ray

    pieces = [TextPiece(texts[first : first + QUERIES_A_PIECE]) for first in range(0, len(texts), QUERIES_A_PIECE)]
    found: list[Any] = []
    done = 0
    progress(done, len(texts))
    for reference in encode_pieces(pieces, model, encoding, encoder, bridge=bridge, batch_tokens=batch_tokens):
        found.append(reference)
        done += len(ray.get(reference))
        progress(done, len(texts))
    return found


def encode_pieces(
    pieces: Sequence[TextPiece],
    model: OpenModel,
    encoding: Encoding,
    encoder: dict[str, Any],
    *,
    bridge: Bridge | None = None,
    batch_tokens: int | None = None,
) -> Iterator[Any]:
    """Yield a reference to the vectors of each piece, in their order; see `encode_queries`."""
    import ray

    num_tasks, num_cpus, num_gpus = place_actors(Placement(None, None), len(pieces))
    task = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, num_returns="streaming")(_encoded)
    query_map = None if bridge is None else ray.put(bridge.query_map)
    options = {
        "retriever": on_worker.model_name(model),
        "base": on_worker.base_name(model),
        "encoding": encoding,
        "encoder": encoder,
        "driver_node": on_worker.this_node(),
        "batch_tokens": batch_tokens,
        "num_threads": num_cpus,
    }
    with autoscaling.requested(num_tasks, {"CPU": num_cpus, "GPU": num_gpus}, least=1):
        streams = [task.remote(pieces[number::num_tasks], query_map, **options) for number in range(num_tasks)]
        try:
            for number in range(len(pieces)):
                yield next(streams[number % num_tasks])
        except BaseException:  # also where the caller stops
            bounded_tasks.cancel(streams)
            raise


def _encoded(
    pieces: Sequence[TextPiece],
    query_map: Callable[[np.ndarray], np.ndarray] | None,
    *,
    retriever: str,
    base: str,
    encoding: Encoding,
    encoder: dict[str, Any],
    driver_node: str,
    batch_tokens: int | None,
    num_threads: int,
) -> Iterator[np.ndarray]:
    """Encode the texts of each piece, in a Ray task."""
    loaded = on_worker.load_encoder(
        retriever,
        encoding,
        encoder["dtype"],
        base=base,
        due=encoder["fingerprint"],
        driver_node=driver_node,
        num_threads=num_threads,
        batch_tokens=batch_tokens,
    )
    for piece in pieces:
        kind: Kind = "query" if piece.titles is None else "passage"
        vectors = loaded.encode(piece.texts, kind, piece.titles)
        broken = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(broken):
            raise ModelError(
                f"the model gives NaN or infinity for the {kind} {piece.texts[broken[0]]!r} in {encoder['dtype']}; make "
                f"vectors and run in bfloat16 or float32 (`readapt embed --dtype`), or leave the {kind} out"
            )
        yield vectors if query_map is None else query_map(vectors)
