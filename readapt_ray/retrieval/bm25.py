"""Compute BM25 scores over the words of passages, with statistics of the whole corpus.

In: the passages of an index shard, and the word counts of all shards. Out: a sparse matrix of scores that `bm25s` made,
8 bytes per distinct word of a passage. The scores of shards equal the scores of one index over all passages.

Words are lower-cased runs of letters and digits. There is no stemming and no stop words, so that any language works.
Each Chinese or Japanese character is a word. BM25 is Lucene's, with k1 = 1.5 and b = 0.75.
"""

import io
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from readapt_ray.errors import InputError

if TYPE_CHECKING:
    from readapt_ray.retrieval.exact import Hits

K1 = 1.5
B = 0.75
MAX_QUERY_WORDS = 512
"""Most distinct words of a query that are searched for; later words are ignored, since each costs time."""
_QUERIES_AT_ONCE = 16
_CHARACTERS_AT_ONCE = 4096
_CHARACTERS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_CHARACTERS}]|[^\W_{_CHARACTERS}]+")


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, in order and with repeats: `gpt`, `4` and `s` of "GPT-4's"."""
    return _WORD.findall(text.lower())


@dataclass
class WordCounts:
    """How many passages hold each word, with the totals of passages and words."""

    num_passages: int = 0
    num_words: int = 0
    passages_with: dict[str, int] = field(default_factory=dict)
    """Number of passages that hold each word."""

    def add(self, passages: Iterable[Sequence[str]]) -> None:
        """Count the words of more passages, in place.

        Args:
            passages: the words of each passage, from `words`.
        """
        for each in passages:
            self.num_passages += 1
            self.num_words += len(each)
            for word in set(each):
                self.passages_with[word] = self.passages_with.get(word, 0) + 1

    def merge(self, other: "WordCounts") -> None:
        """Add the counts of another shard to these, in place."""
        self.num_passages += other.num_passages
        self.num_words += other.num_words
        for word, number in other.passages_with.items():
            self.passages_with[word] = self.passages_with.get(word, 0) + number

    def only(self, words_of_shard: Iterable[str]) -> "WordCounts":
        """Return a copy with the counts of some words only; the totals stay those of all shards.

        Args:
            words_of_shard: distinct words, all of which were counted.
        """
        return WordCounts(
            self.num_passages, self.num_words, {word: self.passages_with[word] for word in words_of_shard}
        )


@dataclass(frozen=True)
class WordIndex:
    """The BM25 scores of a shard as a sparse matrix [passages, words], stored by columns (CSC)."""

    vocabulary: Mapping[str, int]
    """Column of each word."""
    data: NDArray[np.float32]
    """Scores, column by column."""
    indices: NDArray[np.int32]
    """Row of each score."""
    indptr: NDArray[np.int64]
    """Where each column begins in `data` and `indices`; one more entry than columns."""
    num_rows: int

    @classmethod
    def build(cls, passages: Sequence[Sequence[str]], whole: WordCounts) -> "WordIndex":
        """Compute the scores of the words of passages.

        Args:
            passages: the words of each passage; one without words is never found.
            whole: the counts over all shards, these passages included.

        Raises:
            InputError: bm25s is not installed.
        """
        vocabulary: dict[str, int] = {}
        ids = [[vocabulary.setdefault(word, len(vocabulary)) for word in each] for each in passages]
        if not vocabulary:
            empty = np.zeros(0)
            return cls({}, empty.astype(np.float32), empty.astype(np.int32), np.zeros(1, np.int64), len(passages))
        # bm25s uses the mean length and document frequencies of this shard, but those of the corpus are needed.
        # The mean enters only as k1 (1 - b + b length / mean), so an adapted k1 and b correct it. The document
        # frequency is a factor of a whole column, so the column is multiplied by the right one.
        weight = K1 * B * np.mean([len(each) for each in ids]) / (whole.num_words / whole.num_passages)
        k1 = K1 * (1 - B) + weight
        index = import_bm25s().BM25(k1=k1, b=weight / k1, method="lucene", dtype="float64")
        index.index((ids, vocabulary), create_empty_token=False, show_progress=False)
        scores = index.scores
        own = np.diff(scores["indptr"])
        due = np.array([whole.passages_with[word] for word in vocabulary])
        factor = _rarity(due, whole.num_passages) / _rarity(own, len(passages))
        data = (scores["data"] * np.repeat(factor, own)).astype(np.float32)
        indices, indptr = scores["indices"].astype(np.int32), scores["indptr"].astype(np.int64)
        return cls(vocabulary, data, indices, indptr, len(passages))

    def to_bytes(self) -> bytes:
        """Return the index as the content of an npz file."""
        sink = io.BytesIO()
        names = np.frombuffer("\n".join(self.vocabulary).encode(), np.uint8)
        np.savez(sink, words=names, data=self.data, indices=self.indices, indptr=self.indptr, num_rows=self.num_rows)
        return sink.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> "WordIndex":
        """Read what `to_bytes` wrote."""
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            names = arrays["words"].tobytes().decode().split("\n")
            vocabulary = {word: column for column, word in enumerate(names) if word}
            values = {name: arrays[name] for name in ("data", "indices", "indptr")}
            return cls(vocabulary, num_rows=int(arrays["num_rows"]), **values)

    def scores(self, query: str) -> NDArray[np.float32]:
        """Return the score of each passage for a query text, float32 [N]; 0 if it has no word of the query."""
        counts = itertools.islice(Counter(words(query)).items(), MAX_QUERY_WORDS)
        found = np.zeros(self.num_rows, np.float64)
        for word, count in counts:
            column = self.vocabulary.get(word)
            if column is not None:
                part = slice(self.indptr[column], self.indptr[column + 1])
                found[self.indices[part]] += count * self.data[part]
        return found.astype(np.float32)


def query_blocks(queries: Sequence[str]) -> Iterator[Sequence[str]]:
    """Cut queries into blocks that are searched together: up to 16 queries and 4,096 characters.

    A longer query is a block alone. Without queries there is one empty block.
    """
    first, num_characters = 0, 0
    for place, query in enumerate(queries):
        num_characters += len(query)
        if place > first and (place - first == _QUERIES_AT_ONCE or num_characters > _CHARACTERS_AT_ONCE):
            yield queries[first:place]
            first, num_characters = place, len(query)
    yield queries[first:]


def search_words(
    parts: Sequence[WordIndex],
    doc_ids: NDArray[np.object_],
    queries: Sequence[str],
    top_k: int,
    passing: NDArray[np.bool_] | None = None,
) -> "Hits":
    """Return the k best passages of each query by BM25, ties by doc_id.

    Passages without any word of the query are never found.

    Args:
        parts: indexes whose rows follow each other.
        doc_ids: [N], of the rows of all parts.
        queries: texts, at least one.
        top_k: k.
        passing: bool [N], rows that may be found; None for all.

    Raises:
        InputError: there is no query, or top_k is under 1.
    """
    if not queries:
        raise InputError("no query is given; give one text or more")
    from readapt_ray.retrieval.exact import TopK, joined  # imports torch, which building an index does not need

    found = []
    for block in query_blocks(queries):
        scores = np.stack([np.concatenate([part.scores(query) for part in parts]) for query in block])
        scores[scores <= 0] = -np.inf
        if passing is not None:
            scores[:, ~passing] = -np.inf
        best = TopK(len(block), top_k)
        best.add(scores, doc_ids)
        found.append(best.hits())
    return joined(found)


def _rarity(num_with: NDArray[np.int64], num_passages: int) -> NDArray[np.float64]:
    """Return the inverse document frequency of words, as Lucene computes it."""
    rarity: NDArray[np.float64] = np.log(1 + (num_passages - num_with + 0.5) / (num_with + 0.5))
    return rarity


def import_bm25s() -> Any:
    """Import bm25s, which makes the scores. Searching does not need it.

    Raises:
        InputError: it is not installed.
    """
    try:
        import bm25s
    except ModuleNotFoundError as missing:
        raise InputError("BM25 needs bm25s, which is not installed; pip install 'readapt-ray[bm25]'") from missing
    return bm25s
