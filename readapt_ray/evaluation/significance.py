"""Test whether the difference between two runs is statistically significant.

In: the values of a measure for the same queries in two or more runs. Out: for each run against the baseline (the
first), the mean difference with a bootstrap interval, the p-value of a paired randomisation test (Smucker et al., CIKM
2007), Holm's correction over the runs, and wins, ties and losses. 10,000 permutations of 10,000 queries take about a
second.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from readapt_ray.errors import InputError

_CHUNK_ELEMENTS = 4_000_000
_TIE = 1e-9
"""Values that differ by at most this are ties, since sums of the same gains in another order differ by 1e-16."""

ONE_QUERY = "one judged query only: no test is possible"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The comparison of one run with the baseline by one measure, over the same queries."""

    run: str
    baseline: str
    measure: str
    num_queries: int
    mean: float
    baseline_mean: float
    difference: float
    """mean - baseline_mean."""
    interval: tuple[float, float] | None
    """Bootstrap confidence interval of the difference; None if no test is possible."""
    p_value: float | None
    """Two-sided p-value of the paired randomisation test; None if no test is possible."""
    p_holm: float | None
    """p_value after Holm's correction over all runs that are compared by this measure; None if no test is possible."""
    wins: int
    """Queries for which the run is better than the baseline; `losses` are those for which it is worse."""
    ties: int
    losses: int
    note: str = ""
    """Why no test is possible; empty if there is one."""


def compare(
    values: Mapping[str, Mapping[str, NDArray[np.float64]]],
    *,
    num_permutations: int = 10_000,
    num_resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[Comparison]:
    """Compare every run with the first, by every measure.

    Each comparison has a paired randomisation test and a bootstrap interval of the mean difference. p-values are also
    corrected by Holm's procedure over the runs of a measure. With one query only, no test or interval is computed.

    Args:
        values: float64 [Q] by run and measure; all have the same queries in the same order.
        num_permutations: random sign flips of the test.
        num_resamples: resamples of the bootstrap.
        confidence: share of the resampled means inside the interval.
        seed: the same seed and values give the same result.

    Returns:
        A comparison for each run after the first, by the first measure, then by the next measure; none if there is one
        run only.

    Raises:
        InputError: the runs differ in their number of queries, or have none.
    """
    baseline, *others = values
    comparisons: list[Comparison] = []
    for measure in values[baseline]:
        if not others:
            break
        columns = np.stack([paired(values[name][measure], values[baseline][measure]) for name in others], axis=1)
        testable = len(columns) > 1
        p_values = randomisation_test(columns, num_permutations=num_permutations, seed=seed) if testable else None
        intervals = (
            bootstrap_interval(columns, num_resamples=num_resamples, confidence=confidence, seed=seed)
            if testable
            else None
        )
        for index, name in enumerate(others):
            difference = columns[:, index]
            comparisons.append(
                Comparison(
                    run=name,
                    baseline=baseline,
                    measure=measure,
                    num_queries=len(difference),
                    mean=float(values[name][measure].mean()),
                    baseline_mean=float(values[baseline][measure].mean()),
                    difference=float(difference.mean()),
                    interval=None if intervals is None else (float(intervals[0, index]), float(intervals[1, index])),
                    p_value=None if p_values is None else float(p_values[index]),
                    p_holm=None,
                    wins=int((difference > _TIE).sum()),
                    ties=int((abs(difference) <= _TIE).sum()),
                    losses=int((difference < -_TIE).sum()),
                    note="" if testable else ONE_QUERY,
                )
            )
    return _corrected(comparisons)


def paired(values: NDArray[np.float64], baseline: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return `values - baseline` per query, float64 [Q]; differences as small as rounding errors become exactly zero.

    Args:
        values: the measure of each query in a run, [Q].
        baseline: the measure of the same queries, in the same order, in the baseline run.

    Raises:
        InputError: the numbers of queries differ, or are zero.
    """
    if values.shape != baseline.shape or not len(values):
        raise InputError(
            f"{len(values)} and {len(baseline)} values cannot be paired; compare runs over the same judged queries, one or more"
        )
    difference = values - baseline
    return np.where(abs(difference) <= _TIE, 0.0, difference)


def randomisation_test(
    differences: NDArray[np.float64], *, num_permutations: int = 10_000, seed: int = 0
) -> NDArray[np.float64]:
    """Return two-sided p-values of mean differences by a paired randomisation test.

    Under the null hypothesis the sign of each difference is random. If there are at most `num_permutations` sign flips,
    all are computed, and the p-value is exact. Otherwise they are drawn at random, and the observed signs count as one
    of them: (b + 1) / (m + 1), which is never zero (Phipson and Smyth, 2010).

    Args:
        differences: float64 [Q, K]: K comparisons over the same Q queries, flipped together.
        num_permutations: m, the number of random sign flips if they are drawn.
        seed: seed of the draws.

    Returns:
        float64 [K], the p-values.
    """
    num_queries = len(differences)
    observed = abs(differences.sum(axis=0))
    slack = 1e-12 * abs(differences).sum(axis=0)
    is_exact = num_queries < 63 and 2**num_queries <= num_permutations
    flips = _all_flips(num_queries) if is_exact else _drawn_flips(num_queries, num_permutations, seed)
    extreme = np.zeros(differences.shape[1], np.int64)
    for chunk in flips:
        flipped = differences.sum(axis=0) - 2 * (chunk.astype(np.float64) @ differences)
        extreme += (abs(flipped) >= observed - slack).sum(axis=0)
    return extreme / 2**num_queries if is_exact else (extreme + 1) / (num_permutations + 1)


def bootstrap_interval(
    values: NDArray[np.float64], *, num_resamples: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> NDArray[np.float64]:
    """Return the percentile bootstrap interval of the mean over queries.

    Args:
        values: float64 [Q, K]: K columns over the same Q queries, resampled together.
        num_resamples: how often Q queries are drawn with replacement.
        confidence: share of the resampled means inside the interval.
        seed: seed of the draws.

    Returns:
        float64 [2, K]: the lower and the upper end.
    """
    tail = (1 - confidence) / 2
    return np.quantile(_resampled_means(values, num_resamples, seed), [tail, 1 - tail], axis=0)


@dataclass(frozen=True)
class Combined:
    """The comparison of a run with the baseline over several sets of queries, which have equal weight."""

    difference: float
    """Mean over the sets of the mean difference over queries."""
    interval: tuple[float, float]
    """95% bootstrap interval; queries are drawn within each set."""
    p_value: float
    """Two-sided p-value of one paired randomisation test over all queries, with their weights in `difference`."""
    detectable: float
    """Difference that this test would find with 80% power."""


def combine(differences: Sequence[NDArray[np.float64]], *, seed: int = 0) -> Combined:
    """Test a difference over several sets of queries together, to detect a small effect that all of them share.

    Args:
        differences: float64 [Q] for each set: the difference per query, with two or more queries per set.
        seed: seed of the draws.
    """
    num_sets = len(differences)
    weighted = np.concatenate([each / (len(each) * num_sets) for each in differences])
    drawn = np.mean(
        [_resampled_means(each[:, None], 10_000, seed + place) for place, each in enumerate(differences)], 0
    )
    lower, upper = np.quantile(drawn[:, 0], [0.025, 0.975])
    return Combined(
        difference=float(weighted.sum()),
        interval=(float(lower), float(upper)),
        p_value=float(randomisation_test(weighted[:, None], seed=seed)[0]),
        detectable=detectable_difference(differences),
    )


def detectable_difference(differences: Sequence[NDArray[np.float64]]) -> float:
    """Return the smallest mean difference that a two-sided test at 5% detects with 80% power (normal approximation).

    With several sets of queries, it is that of the mean over the sets of each set's mean difference: sets count
    equally, not queries.

    Args:
        differences: float64 [Q] of differences per query, one array per set of queries, Q at least 2. Only their
            variance matters, not their mean.
    """
    variances = [each.var(ddof=1) / len(each) for each in differences]
    return float((NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(0.8)) * np.sqrt(sum(variances)) / len(differences))


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values by Holm's step-down procedure (Holm, 1979), to at most 1; return them in the same order."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [0.0] * len(p_values)
    floor = 0.0
    for step, index in enumerate(order):
        floor = max(floor, min(1.0, (len(p_values) - step) * p_values[index]))
        adjusted[index] = floor
    return adjusted


def _corrected(comparisons: list[Comparison]) -> list[Comparison]:
    by_measure: dict[str, list[float]] = {}
    for each in comparisons:
        if each.p_value is not None:
            by_measure.setdefault(each.measure, []).append(each.p_value)
    adjusted = {measure: iter(holm(p_values)) for measure, p_values in by_measure.items()}
    return [
        each if each.p_value is None else replace(each, p_holm=next(adjusted[each.measure])) for each in comparisons
    ]


def _resampled_means(values: NDArray[np.float64], num_resamples: int, seed: int) -> NDArray[np.float64]:
    """Return float64 [num_resamples, K]: means over queries that are drawn with replacement."""
    num_queries = len(values)
    rng = np.random.default_rng(seed)
    means = []
    for size in _chunk_sizes(num_resamples, num_queries):
        drawn = rng.integers(0, num_queries, (size, num_queries))
        drawn += np.arange(size)[:, None] * num_queries
        times = np.bincount(drawn.ravel(), minlength=size * num_queries).reshape(size, num_queries)
        means.append(times.astype(np.float64) @ values / num_queries)
    return np.concatenate(means)


def _all_flips(num_queries: int) -> Iterator[NDArray[np.uint8]]:
    numbers = np.arange(2**num_queries, dtype=np.uint64)
    for part in np.array_split(numbers, max(1, len(numbers) * num_queries // _CHUNK_ELEMENTS)):
        yield ((part[:, None] >> np.arange(num_queries, dtype=np.uint64)) & np.uint64(1)).astype(np.uint8)


def _drawn_flips(num_queries: int, num_permutations: int, seed: int) -> Iterator[NDArray[np.uint8]]:
    rng = np.random.default_rng(seed)
    for size in _chunk_sizes(num_permutations, num_queries):
        bits = rng.integers(0, 256, (size, (num_queries + 7) // 8), dtype=np.uint8)
        yield np.unpackbits(bits, axis=1, count=num_queries)


def _chunk_sizes(num_rows: int, num_columns: int) -> Iterator[int]:
    """Yield chunk sizes that add up to `num_rows`; a chunk has at most some 4 million elements."""
    size = max(1, _CHUNK_ELEMENTS // max(1, num_columns))
    for start in range(0, num_rows, size):
        yield min(size, num_rows - start)
