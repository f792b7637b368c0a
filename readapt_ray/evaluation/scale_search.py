"""Search for the best pair of readapter_scale and knowledge_scale, and describe the result.

In: the measure of every query with every pair. One half of the queries chooses the pair. The reported figures come from
the other half, so that they are not optimistic.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from readapt_ray.evaluation.significance import bootstrap_interval, compare, paired

ScalePair = tuple[float, float]
"""readapter_scale and knowledge_scale."""

RETRIEVER: ScalePair = (1.0, 0.0)
"""The pair of scales that gives the unchanged retriever."""

Values = Mapping[ScalePair, Mapping[str, float]]
"""The value of the measure by pair and query_id; all pairs have the same queries."""


def coarse_pairs(readapter_scales: Sequence[float], knowledge_scales: Sequence[float]) -> list[ScalePair]:
    """Return every pair of the two lists once; the unchanged retriever comes first if the lists lack it."""
    pairs = dict.fromkeys(product(readapter_scales, knowledge_scales))
    return list(pairs if RETRIEVER in pairs else {RETRIEVER: None, **pairs})


def finer_pairs(tried: Collection[ScalePair], best: ScalePair) -> list[ScalePair]:
    """Return new pairs halfway between the best pair and its neighbours on each axis, and their combinations.

    With (1, 0), (1, 0.5) and (1, 1) tried and (1, 0.5) best: (1, 0.25) and (1, 0.75). Pairs that were tried are left
    out.
    """
    readapter, knowledge = (_halved([pair[axis] for pair in tried], best[axis]) for axis in (0, 1))
    return [pair for pair in product(readapter, knowledge) if pair not in tried]


def _halved(values: Sequence[float], best: float) -> list[float]:
    below, above = [each for each in values if each < best], [each for each in values if each > best]
    near = [max(below)] if below else []
    near += [min(above)] if above else []
    return [best, *((best + each) / 2 for each in near)]


def halves(query_ids: Sequence[str], seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split queries at random into a tuning half, which chooses the scales, and a reporting half.

    Returns:
        The indices of both, int64, in random order. An odd query is in the reporting half.
    """
    order = np.random.default_rng(seed).permutation(len(query_ids))
    return order[: len(order) // 2], order[len(order) // 2 :]


def best_pair(values: Values, seed: int) -> ScalePair:
    """Return the pair with the best mean on the tuning half; among equals, the nearest to the unchanged retriever.

    Args:
        values: value of the measure, higher is better, by pair and query; must have the pair `RETRIEVER`.
        seed: seed of the halves.
    """
    query_ids = sorted(values[RETRIEVER])
    tuning, _ = halves(query_ids, seed)
    table = _table(values, query_ids)

    def merit(pair: ScalePair) -> tuple[float, float]:
        away = abs(pair[0] - RETRIEVER[0]) + abs(pair[1] - RETRIEVER[1])
        return round(float(table[pair][tuning].mean()), 12), -away

    return max(table, key=merit)


def describe_search(values: Values, *, measure: str, seed: int, queries: str) -> dict[str, Any]:
    """Return the content of the report of a search, as JSON values.

    Args:
        values: value of the measure, by pair and query; must have the pair `RETRIEVER`.
        measure: name of the measure.
        seed: seed of the halves, of the intervals and of the tests.
        queries: kind of the queries, for the report.

    Returns:
        `best` pair; `grid`, a row per pair: means of both halves, and difference from the retriever (pair - retriever)
        with its interval on the tuning half; `reported`, the comparison of the best pair with the retriever on the
        other half.
    """
    query_ids = sorted(values[RETRIEVER])
    tuning, reporting = halves(query_ids, seed)
    table = _table(values, query_ids)
    pairs = sorted(table)
    differences = np.stack([paired(table[pair][tuning], table[RETRIEVER][tuning]) for pair in pairs], axis=1)
    intervals = bootstrap_interval(differences, seed=seed).T.tolist() if len(tuning) > 1 else [None] * len(pairs)
    best = best_pair(values, seed)
    reported = compare(
        {
            name: {measure: table[pair][reporting]}
            for name, pair in (("the retriever as it is", RETRIEVER), ("this pair", best))
        },
        seed=seed,
    )
    return {
        "queries": queries,
        "measure": measure,
        "num_tuning": len(tuning),
        "num_reporting": len(reporting),
        "grid": [
            {
                "readapter_scale": pair[0],
                "knowledge_scale": pair[1],
                "tuning": float(table[pair][tuning].mean()),
                "reporting": float(table[pair][reporting].mean()),
                "difference": float(difference.mean()),
                "interval": interval,
            }
            for pair, difference, interval in zip(pairs, differences.T, intervals, strict=True)
        ],
        "best": {"readapter_scale": best[0], "knowledge_scale": best[1]},
        "reported": asdict(reported[0]),
    }


def _table(values: Values, query_ids: Sequence[str]) -> dict[ScalePair, NDArray[np.float64]]:
    return {pair: np.array([each[query_id] for query_id in query_ids]) for pair, each in values.items()}
