"""Measure what queries find through a bridge: recall of the new model's ten best, and whether that is worth it.

In: vectors of a sample of passages by both models, and queries by the new model, and by the old one where it is still
there. Out: means over queries with 95% bootstrap intervals. The truth is what the new model finds among its own vectors
of these passages, which the caller chooses: a map does better among those that it was fitted on. It costs three products of
queries and passages per set of queries.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from readapt_ray.evaluation.significance import bootstrap_interval, paired
from readapt_ray.retrieval.neighbours import overlaps
from readapt_ray.retrieval.query_maps import Matrix, QueryMap

DEPTH = 10
MIN_RECALL = 0.25
"""Recall below which a bridge is not worth it: three of four passages that the new model would find are lost."""
_BLOCK = 1024


@dataclass(frozen=True)
class Asked:
    """Queries of a measurement, as both models encode them."""

    new: Matrix
    """[Q, D_new]."""
    old: Matrix | None
    """[Q, D_old]; None if the old model is no longer there."""
    own: NDArray[np.int64] | None = None
    """[Q], the passage that each query is itself, which it may not find; None for real queries."""


def nearest(queries: Matrix, passages: Matrix, own: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """Return the rows of the ten best passages of each query but itself, in no order: int64 [Q, 10]."""
    stored, found = torch.from_numpy(passages), np.empty((len(queries), DEPTH), np.int64)
    for first in range(0, len(queries), _BLOCK):
        scores = torch.from_numpy(queries[first : first + _BLOCK]) @ stored.T
        if own is not None:
            scores[torch.arange(len(scores)), torch.from_numpy(own[first : first + _BLOCK])] = -torch.inf
        found[first : first + _BLOCK] = scores.topk(DEPTH, dim=1, sorted=False).indices.numpy()
    return found


def measure_bridge(query_map: QueryMap, asked: Asked, new: Matrix, old: Matrix) -> dict[str, Any]:
    """Measure queries through a bridge, and the old model's own queries beside it.

    Args:
        query_map: the bridge's.
        asked: the queries.
        new: [N, D_new], the passages by the new model.
        old: [N, D_old], by the old one.

    Returns:
        `bridged` and, if the old model is there, `old_queries` and `difference`: each with mean and interval.
    """
    truth = nearest(asked.new, new, asked.own)
    bridged = overlaps(nearest(query_map(asked.new), old, asked.own), truth)
    result = {"num_queries": len(bridged), "bridged": _mean(bridged)}
    if asked.old is not None:
        kept = overlaps(nearest(asked.old, old, asked.own), truth)
        result |= {"old_queries": _mean(kept), "difference": _mean(paired(bridged, kept))}
    return result


def objection(measured: dict[str, Any]) -> str:
    """Say why a bridge is not worth it, by what `measure_bridge` found; empty where it is."""
    found = measured["bridged"]["mean"]
    if found < MIN_RECALL:
        return f"it finds {found:.0%} of the new model's {DEPTH} best, and a bridge that finds under {MIN_RECALL:.0%} is no substitute"
    if "difference" in measured and measured["difference"]["interval"][0] <= 0:
        kept = measured["old_queries"]["mean"]
        return f"it finds {found:.1%} of the new model's {DEPTH} best, and the old model's own queries find {kept:.1%}"
    return ""


def _mean(values: NDArray[np.float64]) -> dict[str, Any]:
    ends = bootstrap_interval(values[:, None])[:, 0]
    return {"mean": round(float(values.mean()), 4), "interval": [round(float(each), 4) for each in ends]}
