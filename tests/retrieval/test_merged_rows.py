import numpy as np
import pyarrow as pa
import pytest

from readapt_ray.retrieval.merged_rows import merge_rows, ordered_ties


@pytest.mark.parametrize("num_values", [3, 20, 10**6])
@pytest.mark.parametrize("top_k", [1, 7, 500])
def test_parts_merge_into_what_one_would_give_whatever_their_order(num_values, top_k):
    rng = np.random.default_rng(0)
    scores = rng.integers(0, num_values, (20, 300)).astype(np.float32)
    names = rng.permutation([f"d{row:03d}" for row in range(300)])
    parts = []
    for first in range(0, 300, 60):
        own, ids = scores[:, first : first + 60], names[first : first + 60]
        order = np.array([sorted(range(60), key=lambda row: (-line[row], ids[row]))[:top_k] for line in own])
        missing = ((0, 0), (0, max(0, top_k - 60)))
        best = np.pad(np.take_along_axis(own, order, axis=1), missing, constant_values=-np.inf)
        parts.append((best.astype(np.float32), np.pad(order + first, missing, constant_values=-1)))
    found = merge_rows([parts[place] for place in rng.permutation(5)], 20, top_k)
    final, codes = ordered_ties(found.scores, found.rows, pa.array(names), top_k)
    for query in range(20):
        due = sorted(zip(-scores[query], names, strict=True))[:top_k]
        there = final[query] > -np.inf
        pairs = list(zip(-final[query][there], names[codes[query][there]], strict=True))
        assert pairs == due


def test_no_queries_and_no_parts():
    assert merge_rows([], 3, 5).rows.shape == (3, 0)
    assert merge_rows([(np.empty((0, 5), np.float32), np.empty((0, 5), np.int64))], 0, 5).scores.shape == (0, 5)
