"""Find duplicate passages: exact ones by a digest of each passage, near ones by MinHash.

Exact: 32 to 48 bytes of memory per passage. Near: about 4 KB per passage, and some 5,000 passages per second.
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
_LSH_WEIGHTS = (0.05, 0.95)  # of false candidates (they only cost a comparison), and of missed ones
_SHINGLE_WORDS = 3
_EAST_ASIAN = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_EAST_ASIAN}]|[^\W{_EAST_ASIAN}]+")
_TWO_WORDS = struct.Struct("<QQ")


def digest(text: str) -> bytes:
    """Hash a text to 16 bytes. Among ten billion texts, the chance that any two collide is 1.5 in 10^19."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


class RowTable:
    """A hash table from 16-byte digests to whole numbers, with open addressing: 32 to 48 bytes per entry.

    A Python dict takes about 200 bytes per entry. While the table grows, the old and the new one are both in memory.
    """

    def __init__(self) -> None:
        self._capacity, self._count = 1024, 0
        self._slots = array("Q", bytes(24 * self._capacity))

    def __len__(self) -> int:
        return self._count

    def get(self, key: bytes) -> int | None:
        """Return the number that is stored for a digest; None if there is none."""
        value = self._slots[self._find(*_TWO_WORDS.unpack(key)) + 2]
        return value - 1 if value else None

    def put(self, key: bytes, number: int) -> None:
        """Store a number (0 or more) for a digest. It replaces an earlier one."""
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
    """Finds passages with the same text (and title, if `title_tells_apart`) as an earlier one."""

    def __init__(self, *, title_tells_apart: bool) -> None:
        self._title_tells_apart = title_tells_apart
        self._rows = RowTable()

    def earlier(self, passage: Passage, row: int) -> int | None:
        """Return the row of the earlier passage that this one repeats; None if it is new. Then it is stored as `row`.

        Call it for all passages in their order, with the number of each one's row.
        """
        found = self._rows.get(self._key(passage))
        if found is None:
            self.remember(passage, row)
        return found

    def remember(self, passage: Passage, row: int) -> None:
        """Set the row that `earlier` returns for copies of this passage. It replaces the row stored before.

        NearDuplicates stores the row of the similar passage here, so that an exact copy of a near duplicate is found at
        once.
        """
        self._rows.put(self._key(passage), row)

    def _key(self, passage: Passage) -> bytes:
        title = passage.title if self._title_tells_apart else ""
        return digest(f"{title}\0{passage.text}")


class Sketches:
    """Makes MinHashes of passages: 128 numbers each.

    The fraction of equal numbers of two passages estimates the Jaccard similarity of their sets of three-word sequences.
    """

    def __init__(self) -> None:
        from datasketch import MinHash

        self._empty = MinHash(num_perm=NUM_PERMUTATIONS, seed=1)

    def of(self, passage: Passage) -> Any:
        """Return the MinHash (of the package datasketch) of a passage's title and text."""
        sketch = self._empty.copy()
        sketch.update_batch(_shingles(f"{passage.title} {passage.text}"))
        return sketch


def bands(threshold: float) -> Any:
    """Return an empty index of MinHashes by bands (datasketch's LSH). Only passages that share a band are compared.

    Args:
        threshold: the Jaccard similarity, from 0 to 1, for which number and size of the bands are chosen.
    """
    from datasketch import MinHashLSH

    return MinHashLSH(threshold=threshold, num_perm=NUM_PERMUTATIONS, weights=_LSH_WEIGHTS)


class NearDuplicates:
    """Finds passages that are equal or similar to an earlier one.

    Two passages are similar if their sets of three-word sequences have a Jaccard similarity of `threshold` or more. It
    is estimated from MinHashes, so passages near the threshold may be missed or found wrongly.
    """

    def __init__(self, *, threshold: float, title_tells_apart: bool) -> None:
        self._threshold = threshold
        self._exact = ExactDuplicates(title_tells_apart=title_tells_apart)
        self._make, self._buckets = Sketches(), bands(threshold)
        self._sketches: dict[int, Any] = {}

    def earlier(self, passage: Passage, row: int) -> int | None:
        """Return the row of the kept passage that this one equals, else of the first one that it is similar to.

        None if it is new. Then it is stored as `row`, to compare later passages with.
        """
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
    """Return a function that finds the earlier duplicate of a passage, as `ExactDuplicates.earlier` does.

    Args:
        mode: "exact", "near" (which finds exact ones too), or "none": the function never finds one.
        near_threshold: the Jaccard similarity from which on passages are near duplicates.
        title_tells_apart: whether the same text under another title is no exact duplicate.
    """
    if mode == "exact":
        return ExactDuplicates(title_tells_apart=title_tells_apart).earlier
    if mode == "near":
        return NearDuplicates(threshold=near_threshold, title_tells_apart=title_tells_apart).earlier
    return lambda _passage, _row: None
