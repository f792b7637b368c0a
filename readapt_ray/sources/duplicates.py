"""Which passages say the same: exactly, by a digest of each, or nearly, by MinHash.

Exact: 32 to 48 bytes a passage. Near: about 4 KB a passage and some 5,000 passages a second.
"""

import hashlib
import re
import struct
from array import array
from collections.abc import Callable
from typing import Any, Literal

from readapt_ray.records import Passage

Deduplication = Literal["none", "exact", "near"]
NUM_PERMUTATIONS = 128
_LSH_WEIGHTS = (0.05, 0.95)  # of false candidates, which are compared and cost only time, and of missed ones
_SHINGLE_WORDS = 3
_EAST_ASIAN = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_EAST_ASIAN}]|[^\W{_EAST_ASIAN}]+")
_TWO_WORDS = struct.Struct("<QQ")


def digest(text: str) -> bytes:
    """Hash a text to 16 bytes: any two of ten billion texts share a hash with a chance of 1.5 in 10^19."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


class RowTable:
    """From a digest to a whole number, without a Python object per entry: open addressing, 32 to 48 bytes an entry.

    A dict of the same takes about 200. While it grows, the old and the new table are both there.
    """

    def __init__(self) -> None:
        self._capacity, self._count = 1024, 0
        self._slots = array("Q", bytes(24 * self._capacity))

    def __len__(self) -> int:
        return self._count

    def get(self, key: bytes) -> int | None:
        """Return the number of a digest; None where it was not put."""
        value = self._slots[self._find(*_TWO_WORDS.unpack(key)) + 2]
        return value - 1 if value else None

    def put(self, key: bytes, number: int) -> None:
        """Remember a number, 0 or more, for a digest."""
        first, second = _TWO_WORDS.unpack(key)
        at = self._find(first, second)
        if not self._slots[at + 2]:
            self._count += 1
        self._slots[at], self._slots[at + 1], self._slots[at + 2] = first, second, number + 1
        if 4 * self._count > 3 * self._capacity:
            self._grow()

    def _find(self, first: int, second: int) -> int:
        slots, end = self._slots, 3 * self._capacity
        at = 3 * (first % self._capacity)
        while slots[at + 2] and (slots[at] != first or slots[at + 1] != second):
            at += 3
            if at == end:
                at = 0
        return at

    def _grow(self) -> None:
        old = self._slots
        self._capacity = self._capacity * 3 // 2
        self._slots = array("Q", [0]) * (3 * self._capacity)
        for start in range(0, len(old), 3):
            if old[start + 2]:
                at = self._find(old[start], old[start + 1])
                self._slots[at], self._slots[at + 1], self._slots[at + 2] = old[start : start + 3]


class ExactDuplicates:
    """Finds passages that are equal to an earlier one."""

    def __init__(self, *, title_tells_apart: bool) -> None:
        self._title_tells_apart = title_tells_apart
        self._rows = RowTable()

    def earlier(self, passage: Passage, row: int) -> int | None:
        """Return the row of the earlier passage that this one repeats; None for a new one, which is remembered as
        `row`.
        """
        found = self._rows.get(self._key(passage))
        if found is None:
            self.remember(passage, row)
        return found

    def remember(self, passage: Passage, row: int) -> None:
        """Take a row for all passages that say the same."""
        self._rows.put(self._key(passage), row)

    def _key(self, passage: Passage) -> bytes:
        title = passage.title if self._title_tells_apart else ""
        return digest(f"{title}\0{passage.text}")


class Sketches:
    """Makes the MinHash of passages: 128 numbers, of which two passages share about the Jaccard share of their word sequences."""

    def __init__(self) -> None:
        from datasketch import MinHash

        self._empty = MinHash(num_perm=NUM_PERMUTATIONS, seed=1)

    def of(self, passage: Passage) -> Any:
        """Return a MinHash."""
        sketch = self._empty.copy()
        sketch.update_batch(_shingles(f"{passage.title} {passage.text}"))
        return sketch


def bands(threshold: float) -> Any:
    """Return the index of MinHashes by bands of their numbers: only those with an equal band are compared."""
    from datasketch import MinHashLSH

    return MinHashLSH(threshold=threshold, num_perm=NUM_PERMUTATIONS, weights=_LSH_WEIGHTS)


class NearDuplicates:
    """Finds passages whose sets of three-word sequences overlap an earlier one's by a Jaccard share or more."""

    def __init__(self, *, threshold: float, title_tells_apart: bool) -> None:
        self._threshold = threshold
        self._exact = ExactDuplicates(title_tells_apart=title_tells_apart)
        self._make, self._buckets = Sketches(), bands(threshold)
        self._sketches: dict[int, Any] = {}

    def earlier(self, passage: Passage, row: int) -> int | None:
        """Find as `ExactDuplicates.earlier`; of several the first that was kept."""
        found = self._exact.earlier(passage, row)
        if found is not None:
            return found
        sketch = self._make.of(passage)
        for candidate in sorted(self._buckets.query(sketch)):
            if self._sketches[candidate].jaccard(sketch) >= self._threshold:
                self._exact.remember(passage, candidate)
                return int(candidate)
        self._sketches[row] = sketch
        self._buckets.insert(row, sketch)
        return None


def _shingles(text: str) -> list[bytes]:
    words = _WORD.findall(text.lower()) or [text]
    last = max(len(words) - _SHINGLE_WORDS, 0)
    return sorted({" ".join(words[start : start + _SHINGLE_WORDS]).encode() for start in range(last + 1)})


def duplicate_finder(
    mode: Deduplication, *, near_threshold: float, title_tells_apart: bool
) -> Callable[[Passage, int], int | None]:
    """Return what `earlier` of the wanted kind is; with "none" nothing is ever a duplicate."""
    if mode == "exact":
        return ExactDuplicates(title_tells_apart=title_tells_apart).earlier
    if mode == "near":
        return NearDuplicates(threshold=near_threshold, title_tells_apart=title_tells_apart).earlier
    return lambda _passage, _row: None
