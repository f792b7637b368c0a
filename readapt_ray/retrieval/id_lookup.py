"""Look up doc_ids of millions of rows in two arrays of 8 bytes per row, which Ray's workers share.

A doc_id is known by 8 bytes of its hash. Two of a hundred million have the same with a probability of 0.03%, so a
caller that reads the row compares its doc_id.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_KEY_BYTES = 8


@dataclass(frozen=True)
class IdLookup:
    """Values by doc_id."""

    keys: NDArray[np.uint64]
    """[N], rising."""
    values: NDArray[np.uint64]
    """[N]."""

    @classmethod
    def build(cls, doc_ids: Iterable[str], values: NDArray[np.uint64]) -> "IdLookup":
        """Sort the values by the keys of their doc_ids."""
        found = cls.sort(id_keys(doc_ids))
        return cls(found.keys, values[found.values])

    @classmethod
    def sort(cls, keys: NDArray[np.uint64]) -> "IdLookup":
        """Sort keys; their values are their places."""
        order = np.argsort(keys, kind="stable")
        return cls(keys[order], order.astype(np.uint64))

    def find(self, doc_ids: Iterable[str]) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
        """Return the value of each doc_id (0 where there is none), and whether there is one."""
        wanted = id_keys(doc_ids)
        if not len(self.keys):
            return np.zeros(len(wanted), np.uint64), np.zeros(len(wanted), bool)
        places = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        found = self.keys[places] == wanted
        return np.where(found, self.values[places], np.uint64(0)), found


def id_keys(doc_ids: Iterable[str]) -> NDArray[np.uint64]:
    """Return 8 bytes of the hash of each doc_id."""
    digests = (
        hashlib.blake2b(doc_id.encode("utf-8", "surrogatepass"), digest_size=_KEY_BYTES).digest() for doc_id in doc_ids
    )
    return np.frombuffer(b"".join(digests), np.uint64)
