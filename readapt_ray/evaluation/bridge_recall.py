"""Measure the recall of queries through a bridge, and decide whether the bridge is worth using.

In: vectors of a sample of passages by both models, queries by the new model, and by the old model if it is still
available. Out: means over queries with 95% bootstrap intervals. The ground truth is the ten passages that the new model
finds among its own vectors. Give passages that were not used to fit the map, since a map does better on passages that
it was fitted on. The cost is three products of queries and passages per set of queries.
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
"""A bridge of lower recall is not worth using: it loses over three of four passages that the new model would find."""
_BLOCK = 1024


@dataclass(frozen=True)
class BridgeQueries:
    """The queries of a measurement, encoded by the new and the old model."""

    new: Matrix
    """[Q, D_new]."""
    old: Matrix | None
    """[Q, D_old]; None if the old model is not available."""
    own: NDArray[np.int64] | None = None
    """[Q], row of the passage that serves as this query, which must not count as a result; None for real queries."""


def nearest(queries: Matrix, passages: Matrix, own: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """Return the row numbers of the ten best passages of each query by inner product, unordered: int64 [Q, 10].

    Args:
        queries: [Q, D].
        passages: [N, D], N at least 10.
        own: [Q], the row of the passage that serves as each query, which cannot be a result; None for real queries.
    """
    stored, found = torch.from_numpy(passages), np.empty((len(queries), DEPTH), np.int64)
    for first in range(0, len(queries), _BLOCK):
        scores = torch.from_numpy(queries[first : first + _BLOCK]) @ stored.T
        if own is not None:
            scores[torch.arange(len(scores)), torch.from_numpy(own[first : first + _BLOCK])] = -torch.inf
        found[first : first + _BLOCK] = scores.topk(DEPTH, dim=1, sorted=False).indices.numpy()
    return found


def measure_bridge(query_map: QueryMap, asked: BridgeQueries, new: Matrix, old: Matrix) -> dict[str, Any]:
    """Measure the recall of queries through a bridge, and of the old model's own queries for comparison.

    Recall is the share of the ten best passages of the new model that are among the ten best found in the old vectors.

    Args:
        query_map: the map of the bridge.
        asked: the queries; at least one.
        new: [N, D_new], vectors of the passages by the new model.
        old: [N, D_old], vectors of the same passages by the old model.

    Returns:
        `num_queries`, `bridged` and, if the old model is available, `old_queries` and `difference` (bridged -
        old_queries). Each of the last three has `mean` and `interval` (95%), from shares of 0 to 1.
    """
    truth = nearest(asked.new, new, asked.own)
    bridged = overlaps(nearest(query_map(asked.new), old, asked.own), truth)
    result = {"num_queries": len(bridged), "bridged": _mean(bridged)}
    if asked.old is not None:
        kept = overlaps(nearest(asked.old, old, asked.own), truth)
        result |= {"old_queries": _mean(kept), "difference": _mean(paired(bridged, kept))}
    return result


def objection(measured: dict[str, Any]) -> str:
    """Say why a bridge is not worth using; empty text if it is worth using.

    It is not if its mean recall is under 0.25, or if it is not significantly better than the old model's own queries
    (the lower end of the interval of `difference` is 0 or less).

    Args:
        measured: the result of `measure_bridge`.
    """
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
