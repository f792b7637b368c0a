"""Decide whether the retriever should be adapted again to new passages, from data that a refresh has anyway.

In: the passages and vectors of a generation, and a sample of new and of kept rows. Out: numbers, and one line of advice.
Nothing is encoded. Some 4,000 texts and vectors are read (kept ones from a few places of the corpus), and the doc_ids in
files of new vectors. If the retriever's adapter exists, its language-model loss on a hundred texts is measured too.
"""

import re
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from readapt_ray import dead_rows
from readapt_ray.recipes.refreshing.adapting import AdapterLoss
from readapt_ray.retrieval.corpus_changes import SAMPLE, Changes
from readapt_ray.retrieval.parquet_rows import ParquetRows, explain_damage, read_rows
from readapt_ray.retrieval.vector_files import VECTOR_COLUMNS, matrix_of
from readapt_ray.storage import Location

MIN_PASSAGES = 50
"""Drift and new words are computed only from at least this many new passages and as many kept ones."""
MAX_DRIFT = 0.25
MAX_NEW_WORDS = 0.05
MAX_TURNOVER = 0.3
MAX_LOSS_GAP = 0.05
"""If a signal is above its limit, the advice is to adapt again. recipes/README.md says what was measured."""
ADAPT_AGAIN = "adapt again"
_PLACES, _PLACE_ROWS = 16, 1024
"""The sample of kept passages comes from this many ranges, each of at most this many rows."""
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Signals:
    """How new passages differ from kept ones. A number is None if there are too few passages to compute it."""

    drift: float | None
    """Distance between the mean vectors of new and kept passages, in standard deviations of the kept ones."""
    new_words: float | None
    """Fraction of the words of new passages that do not occur in one half of the kept passages, minus the same fraction
    of the other half; at least 0."""
    deletions: float
    """Fraction of the previous generation's passages that were deleted."""
    turnover: float
    """Passages added, changed and deleted since the retriever was first used here, as a fraction of all passages."""
    loss: AdapterLoss | None = None
    """Language-model loss of the retriever's adapter on new and on kept passages; None if not measured."""

    def advice(self) -> str:
        """Return one line of advice: "adapt again" with the reasons, or that it is not necessary."""
        reasons = []
        if self.drift is not None and self.drift > MAX_DRIFT:
            reasons.append(f"the vectors of new passages are {self.drift:.2f} standard deviations from the others")
        if self.new_words is not None and self.new_words > MAX_NEW_WORDS:
            reasons.append(f"{100 * self.new_words:.0f}% of the words of new passages are new")
        if self.turnover > MAX_TURNOVER:
            reasons.append(f"{100 * self.turnover:.0f}% of the passages changed since this retriever was first used")
        if self.loss is not None and self.loss.gap > max(MAX_LOSS_GAP, self.loss.plus_minus):
            reasons.append(
                f"on new passages the adapter lowers the language-model loss {self.loss.gap:.2f} nats per token less than on "
                f"the others"
            )
        return f"{ADAPT_AGAIN}: {'; '.join(reasons)}" if reasons else "nothing calls for adapting again"

    def values(self) -> dict[str, float]:
        """Return the known numbers by name, rounded to four decimals, with `loss_new`, `loss_kept` and `loss_gap`."""
        values = {**vars(self), "loss": None}
        if self.loss is not None:
            values |= {"loss_new": self.loss.new, "loss_kept": self.loss.kept, "loss_gap": self.loss.gap}
        return {name: round(value, 4) for name, value in values.items() if value is not None}


def signals(
    passages: ParquetRows,
    vectors: ParquetRows,
    changes: Changes,
    *,
    shared: Set[str],
    turnover: float,
    loss_of: Callable[[list[str], list[str]], AdapterLoss | None],
    loss_sample: int,
) -> Signals:
    """Compute the signals of one refresh. With fewer than 50 new or kept passages, only deletions and turnover are.

    Args:
        passages: passages of the new generation.
        vectors: vectors of the new generation.
        changes: changes of the corpus since the previous generation.
        shared: names of the vector files that are shared with the previous generation.
        turnover: turnover since the retriever was first used here, this refresh included.
        loss_of: measures the adapter's loss on new and on kept texts.
        loss_sample: number of texts of each kind for `loss_of`; 0 means it is not called.
    """
    there_before = changes.kept + changes.changed + changes.deleted
    deletions = changes.deleted / max(1, there_before)
    if min(len(changes.sample_new), len(changes.sample_kept)) < MIN_PASSAGES:
        return Signals(None, None, deletions, turnover)
    new, kept = (passages.take(rows, ("doc_id", "title", "text")) for rows in (changes.sample_new, changes.sample_kept))
    texts = _texts(new), _texts(kept)
    return Signals(
        drift(*_samples(vectors, new["doc_id"], kept["doc_id"], shared)),
        new_words(*texts),
        deletions,
        turnover,
        loss_of(*(each[:loss_sample] for each in texts)) if loss_sample else None,
    )


def drift(new: NDArray[np.float32], kept_parts: Sequence[NDArray[np.float32]]) -> float | None:
    """Return the distance between the mean vectors of new and kept passages, in standard deviations of the kept ones.

    Variances are summed over the dimensions. The expected distance between two samples of one distribution is subtracted,
    so the result is about 0 without drift. If kept vectors come from several places of the corpus, the variance between
    the places counts as well.

    Args:
        new: float32 [N, D].
        kept_parts: float32 [M, D] for each place of the corpus.

    Returns:
        None if either sample has fewer than 50 vectors.
    """
    kept = np.concatenate(kept_parts)
    if min(len(new), len(kept)) < MIN_PASSAGES:
        return None  # some passages have no vector
    apart = float(np.square(new.mean(0, dtype=np.float64) - kept.mean(0, dtype=np.float64)).sum())
    spread = [float(each.var(0, ddof=1, dtype=np.float64).sum()) for each in (new, kept)]
    means = np.stack([each.mean(0, dtype=np.float64) for each in kept_parts])
    between = float(means.var(0, ddof=1).sum()) if len(means) > 1 else 0.0
    by_chance = spread[0] / len(new) + max(spread[1] / len(kept), between / len(means))
    return float(np.sqrt(max(0.0, apart - by_chance) / max(spread[1], 1e-12)))


def new_words(new: list[str], kept: list[str]) -> float:
    """Return the fraction of words in new texts that every second kept text lacks, minus that of the other kept texts.

    A word counts as often as it occurs, in lower case. The result is at least 0.
    """
    known = {word for text in kept[::2] for word in _WORD.findall(text.lower())}
    return max(0.0, _unknown_share(new, known) - _unknown_share(kept[1::2], known))


def _unknown_share(texts: Iterable[str], known: set[str]) -> float:
    words = [word for text in texts for word in _WORD.findall(text.lower())]
    return sum(word not in known for word in words) / max(1, len(words))


def _texts(passages: pa.Table) -> list[str]:
    pairs = zip(passages["title"].to_pylist(), passages["text"].to_pylist(), strict=True)
    return [f"{title or ''} {text}".strip() for title, text in pairs]


def _samples(
    vectors: ParquetRows, new: pa.ChunkedArray, kept: pa.ChunkedArray, shared: Set[str]
) -> tuple[NDArray[np.float32], list[NDArray[np.float32]]]:
    """Return vectors of new passages, and vectors of kept passages from one or several places.

    In files that are shared with the previous generation all passages are kept ones, so they are sampled without looking
    for doc_ids.
    """
    files = [vectors.folder / name for name, _ in vectors.counts if name not in shared]
    sources = [(vectors.folder / name, count) for name, count in vectors.counts if name in shared]
    if not sources:
        found_new, found_kept = _vectors_of(files, new, kept)
        return found_new, [found_kept]
    random = np.random.default_rng(0)
    places = [sources[number] for number in random.permutation(max(len(sources), _PLACES)) % len(sources)]
    return _vectors_of(files, new)[0], [_some_of(file, count, random) for file, count in places[:_PLACES]]


def _some_of(file: Location, num_rows: int, random: np.random.Generator) -> NDArray[np.float32]:
    """Return some vectors from a random range of rows of a file."""
    first = _PLACE_ROWS * int(random.integers(-(-num_rows // _PLACE_ROWS)))
    rows = read_rows(file, first, min(_PLACE_ROWS, num_rows - first), VECTOR_COLUMNS)
    drawn = random.permutation(rows.num_rows)[: SAMPLE // _PLACES]
    return matrix_of(rows.take(pa.array(drawn)), file)[1]


def _vectors_of(files: Iterable[Location], *wanted: pa.ChunkedArray) -> list[NDArray[np.float32]]:
    """Return the vectors of each list of doc_ids, in any order. Ids without a vector are left out. Opens each file once."""
    none = np.zeros((0, 0), np.float32)
    found: list[list[NDArray[np.float32]]] = [[] for _ in wanted]
    for file in files:
        with explain_damage(file), dead_rows.opened(file) as part:
            there = part.read(range(part.num_rows), ("doc_id",))["doc_id"]
            for matrices, doc_ids in zip(found, wanted, strict=True):
                rows = np.flatnonzero(pc.is_in(there, doc_ids.combine_chunks()).to_numpy())
                if len(rows):
                    matrices.append(matrix_of(part.read(rows, VECTOR_COLUMNS), file)[1])
    return [np.concatenate(matrices) if matrices else none for matrices in found]
