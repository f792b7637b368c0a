"""Compare two sets of vectors of the same passages: how far each vector moved, and how many nearest neighbours it kept.

In: two matrices; row i of both is the same passage. The cost is one product of each set with itself: milliseconds for
2,000 vectors.
"""

import numpy as np
from numpy.typing import NDArray

NUM_NEIGHBOURS = 10
_ROWS_AT_A_TIME = 512


def cosines(before_ND: NDArray[np.float32], after_ND: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the cosine of each vector before with the same passage's vector after: float64 [N].

    Both sets have the same dimension. A vector of zeros gives NaN.
    """
    one, other = before_ND.astype(np.float64), after_ND.astype(np.float64)
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    found: NDArray[np.float64] = (one * other).sum(axis=1) / norms
    return found


def shares_kept(before_ND: NDArray[np.float32], after_ND: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return which share of each vector's 10 nearest neighbours is the same in both sets: float64 [N], 0 to 1.

    Each set must have more than 10 vectors. Sets may differ in dimension.
    """
    return overlaps(nearest(before_ND), nearest(after_ND))


def overlaps(one_NK: NDArray[np.int64], other_NK: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return, for each row, the share of its entries that the same row of the other matrix has too: float64 [N].

    [[1, 2]] and [[2, 3]] give 0.5. The order within a row has no influence.
    """
    shared: NDArray[np.bool_] = (one_NK[:, :, None] == other_NK[:, None, :]).any(axis=2)
    means: NDArray[np.float64] = shared.mean(axis=1)
    return means


def nearest(vectors_ND: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the rows of the 10 nearest neighbours of each vector, by inner product, unordered: int64 [N, 10].

    A vector is not its own neighbour. N must be over 10.
    """
    found = np.empty((len(vectors_ND), NUM_NEIGHBOURS), np.int64)
    for first in range(0, len(vectors_ND), _ROWS_AT_A_TIME):
        scores = vectors_ND[first : first + _ROWS_AT_A_TIME] @ vectors_ND.T
        scores[np.arange(len(scores)), np.arange(first, first + len(scores))] = -np.inf
        found[first : first + _ROWS_AT_A_TIME] = np.argpartition(-scores, NUM_NEIGHBOURS - 1, axis=1)[
            :, :NUM_NEIGHBOURS
        ]
    return found
