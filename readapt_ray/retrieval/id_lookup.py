"""Look up values by doc_id for millions of rows, in two arrays of 8 bytes per row that Ray's workers can share.

A doc_id is identified by 8 bytes of its hash. Among 100 million doc_ids, two have the same hash with a probability of
0.03%, so a caller that reads the row should compare its doc_id.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_KEY_BYTES = 8


@dataclass(frozen=True)
class IdLookup:
    """A map from doc_ids, by their hash, to values."""

    keys: NDArray[np.uint64]
    """[N], hashes of the doc_ids, rising."""
    values: NDArray[np.uint64]
    """[N], the value of each key."""

    @classmethod
    def build(cls, doc_ids: Iterable[str], values: NDArray[np.uint64]) -> "IdLookup":
        """Build a lookup from doc_ids and their values [N]. Of a doc_id that occurs twice, the first value is found."""
        found = cls.sort(id_keys(doc_ids))
        return cls(found.keys, values[found.values])

    @classmethod
    def sort(cls, keys: NDArray[np.uint64]) -> "IdLookup":
        """Build a lookup that maps each key to its index in `keys`. Of a repeated key, the first index is found.

        Args:
            keys: uint64 [N], hashes of doc_ids from `id_keys`, in any order.
        """
        order = np.argsort(keys, kind="stable")
        return cls(keys[order], order.astype(np.uint64))

    def find(self, doc_ids: Iterable[str]) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
        """Return the value of each doc_id (0 if it is unknown), uint64 [N], and whether it is known, bool [N]."""
        wanted = id_keys(doc_ids)
        if not len(self.keys):
            return np.zeros(len(wanted), np.uint64), np.zeros(len(wanted), bool)
        places = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        found = self.keys[places] == wanted
        return np.where(found, self.values[places], np.uint64(0)), found


def id_keys(doc_ids: Iterable[str]) -> NDArray[np.uint64]:
    """Hash each doc_id to 8 bytes: uint64 [N]."""
    digests = (
        hashlib.blake2b(doc_id.encode("utf-8", "surrogatepass"), digest_size=_KEY_BYTES).digest() for doc_id in doc_ids
    )
    return np.frombuffer(b"".join(digests), np.uint64)
