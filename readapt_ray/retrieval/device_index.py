"""Hold the vectors of flat indexes in GPU memory, and search them exactly there.

In: the vectors of one or more shards, float32 or float16. Out: the best passages of each query, the same as on a CPU. A
search of a batch reads each vector once. On an H100 (3.35 TB/s, NVIDIA's data sheet) that is .46 ms for 1,000,000
float16 vectors of 768 numbers: computed, not measured.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from readapt_ray.errors import InputError
from readapt_ray.retrieval.exact import QUERY_BLOCK, Hits, search_exact
from readapt_ray.retrieval.half_products import has_half_products

FACTORIES: Final = ("Flat", "SQfp16")
"""FAISS factory strings of the indexes whose vectors can be held on a GPU."""
_SCORE_BYTES = 256 << 20
"""Bytes of scores that are computed at once."""
_COPIED_BYTES = 1 << 30
"""Bytes of vectors that are gathered, or widened to float32, at once."""
_WORK_BYTES = 4 * _SCORE_BYTES + _COPIED_BYTES
"""GPU memory of a search: scores for both halves of float16 queries, the selection of the best, gathered vectors."""
_READ_ROWS = 16_384


class DeviceIndex:
    """Flat vectors [N, D] on a device, in the order of their shards.

    Args:
        parts: vectors of each shard, all of one dimension. They stay float16 if all shards are float16, else float32.
        doc_ids: [N].
        is_live: [N]; False for deleted vectors, which are not copied.
        device: torch device.

    Raises:
        InputError: the vectors do not fit the free memory of the device.
    """

    def __init__(
        self, parts: Sequence[NDArray[Any]], doc_ids: NDArray[np.object_], is_live: NDArray[np.bool_], device: str
    ) -> None:
        self.d, self.ntotal = int(parts[0].shape[1]), len(doc_ids)
        self._rows = None if is_live.all() else np.flatnonzero(is_live)
        self._doc_ids = doc_ids if self._rows is None else doc_ids[self._rows]
        is_half = all(each.dtype == np.float16 for each in parts)
        dtype = torch.float16 if is_half else torch.float32
        shape = (len(self._doc_ids), self.d)
        _check_fits(shape[0] * self.d * dtype.itemsize, torch.device(device))
        self._vectors_ND = torch.empty(shape, dtype=dtype, device=device)
        start = first = 0
        for part in parts:
            for block in (part[row : row + _READ_ROWS] for row in range(0, len(part), _READ_ROWS)):
                live = block[is_live[start : start + len(block)]]
                self._vectors_ND[first : first + len(live)].copy_(torch.from_numpy(live))
                start, first = start + len(block), first + len(live)

    def search(self, queries: NDArray[np.float32], top_k: int, rows: NDArray[np.int64] | None = None) -> Hits:
        """Return the k best passages of each query, ties by doc_id. Deleted vectors are never found.

        Args:
            queries: [Q, D].
            top_k: k.
            rows: search only these rows, rising, numbered among all N, none of them deleted; None searches all.

        Raises:
            InputError: the dimensions differ, top_k is under 1, or a query holds NaN or infinity.
        """
        device = self._vectors_ND.device
        return search_exact(queries, self._chunks(min(len(queries), QUERY_BLOCK), rows), top_k, device=str(device))

    def _chunks(
        self, num_queries: int, rows: NDArray[np.int64] | None
    ) -> Iterator[tuple[NDArray[np.object_], torch.Tensor]]:
        """Yield doc_ids and vectors in chunks whose scores and copies fit their memory."""
        size = _SCORE_BYTES // (4 * max(1, num_queries))
        vectors_ND = self._vectors_ND
        is_copied = rows is not None or not has_half_products(vectors_ND.device, vectors_ND.dtype)
        size = max(1, min(size, _COPIED_BYTES // (4 * self.d)) if is_copied else size)
        if rows is None:
            for block in (slice(row, row + size) for row in range(0, len(self._doc_ids), size)):
                yield self._doc_ids[block], vectors_ND[block]
            return
        places = rows if self._rows is None else np.searchsorted(self._rows, rows)
        for some in (places[first : first + size] for first in range(0, len(places), size)):
            yield self._doc_ids[some], vectors_ND[torch.from_numpy(some).to(vectors_ND.device)]


def _check_fits(num_bytes: int, device: torch.device) -> None:
    free = _free_bytes(device)
    if free is not None and num_bytes + _WORK_BYTES > free:
        raise InputError(
            f"the vectors of this part of the index take {num_bytes / 2**30:.1f} GiB and searches {_WORK_BYTES / 2**30:.1f}, but "
            f"{free / 2**30:.1f} GiB of the GPU are free; raise index_actors, which makes parts smaller, store the vectors in "
            f"float16 (`readapt index --storage float16`), or set num_gpus_per_index_actor to 0"
        )


def _free_bytes(device: torch.device) -> int | None:
    """Return the free memory of a GPU in bytes; None for other devices."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
