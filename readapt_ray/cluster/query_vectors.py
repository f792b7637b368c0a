"""Encode queries, or a few passages, in Ray tasks.

In: texts in pieces, and the model that encodes them. Out: Ray references to the vectors of each piece, in order.
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
    """Texts that one task encodes together: passages if they have titles, else queries."""

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
    """Encode queries in Ray tasks, 512 per piece, with one task per GPU or core; wait until all are encoded.

    The vectors do not depend on the number of tasks.

    Args:
        texts: the queries.
        model: the model that encodes them.
        encoding: its templates and pooling.
        encoder: the entry `encoder` in the manifest of the vectors or of the bridge: fingerprint, dtype and so on.
        bridge: maps the vectors to the space of another model (the output of `readapt bridge`); None for no map.
        batch_tokens: most tokens per batch; None chooses by device and model.
        progress: called with the number of queries done, and of all queries.

    Returns:
        One Ray reference per piece, to float32 [512, D], in the order of the texts; the last piece may be shorter.
        Empty without texts.

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
    """Encode pieces in Ray tasks; yield a Ray reference to the vectors of each, in order. See `encode_queries`.

    Tasks start with the first reference that is asked for. A reference may come before its vectors are good: `ray.get`
    raises what its task raised. If the caller stops early, the tasks are cancelled.
    """
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
        except BaseException:  # also if the caller stops early
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
        expected=encoder["fingerprint"],
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
