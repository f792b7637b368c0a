"""Tell whether new passages call for adapting the retriever again, from what a refresh has anyway.

In: the passages and vectors of a generation, and a sample of the rows that are new and of those that were kept. Out:
figures, and one line of advice. Nothing is encoded: it costs one pass over the doc_ids of the vectors, and some 4,000
texts and vectors are read. If the retriever's adapter is there, its loss on a hundred texts is measured, too.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from readapt_ray.recipes.refreshing.adapting import AdapterLoss
from readapt_ray.retrieval.corpus_changes import Changes
from readapt_ray.retrieval.parquet_rows import ParquetRows, read_rows
from readapt_ray.retrieval.vector_files import VECTOR_COLUMNS, matrix_of

MIN_PASSAGES = 50
"""New and kept passages that are needed for drift and vocabulary; below it neither is computed."""
MAX_DRIFT = 0.25
MAX_NEW_WORDS = 0.05
MAX_TURNOVER = 0.3
MAX_LOSS_GAP = 0.05
"""Above these, adapting again is advised. recipes/README.md says what was measured."""
ADAPT_AGAIN = "adapt again"
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Signals:
    """How new passages differ from kept ones. None where there are too few to say."""

    drift: float | None
    """Distance between the mean vectors of new and kept passages, in standard deviations of the kept ones."""
    new_words: float | None
    """Share of the words of new passages that the kept ones do not have, above the same share between two halves of the
    kept ones."""
    deletions: float
    """Share of the passages of the generation before that were deleted."""
    turnover: float
    """Passages added, changed and deleted since the retriever was first used here, as a share of all."""
    loss: AdapterLoss | None = None
    """Language-model loss of the retriever's adapter on new and on kept passages."""

    def advice(self) -> str:
        """Return one line: `adapt again` with the reasons, or that nothing calls for it."""
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
        """Return the figures that are known, by name."""
        values = {**vars(self), "loss": None}
        if self.loss is not None:
            values |= {"loss_new": self.loss.new, "loss_kept": self.loss.kept, "loss_gap": self.loss.gap}
        return {name: round(value, 4) for name, value in values.items() if value is not None}


def signals(
    passages: ParquetRows,
    vectors: ParquetRows,
    changes: Changes,
    *,
    turnover: float,
    loss_of: Callable[[list[str], list[str]], AdapterLoss | None],
    loss_sample: int,
) -> Signals:
    """Compute the signals of one refresh.

    Args:
        passages: of the new generation.
        vectors: of the same.
        changes: since the generation before.
        turnover: since the retriever was first used here, this refresh included.
        loss_of: compares the adapter's loss on new and on kept texts.
        loss_sample: texts of each kind that it is given; 0 leaves it out.
    """
    there_before = changes.kept + changes.changed + changes.deleted
    deletions = changes.deleted / max(1, there_before)
    if min(len(changes.sample_new), len(changes.sample_kept)) < MIN_PASSAGES:
        return Signals(None, None, deletions, turnover)
    new, kept = (passages.take(rows, ("doc_id", "title", "text")) for rows in (changes.sample_new, changes.sample_kept))
    texts = _texts(new), _texts(kept)
    return Signals(
        drift(_vectors_of(vectors, new["doc_id"]), _vectors_of(vectors, kept["doc_id"])),
        new_words(*texts),
        deletions,
        turnover,
        loss_of(*(each[:loss_sample] for each in texts)) if loss_sample else None,
    )


def drift(new: NDArray[np.float32], kept: NDArray[np.float32]) -> float | None:
    """Return how far the means of two samples of vectors [N, D] are apart, in standard deviations of the kept ones.

    The variance of a sample is summed over the dimensions. What two samples of this size from one distribution differ by
    in expectation is subtracted, so the figure is 0 without drift.
    """
    if min(len(new), len(kept)) < MIN_PASSAGES:
        return None  # some have no vector
    apart = float(np.square(new.mean(0, dtype=np.float64) - kept.mean(0, dtype=np.float64)).sum())
    spread = [float(each.var(0, ddof=1, dtype=np.float64).sum()) for each in (new, kept)]
    by_chance = spread[0] / len(new) + spread[1] / len(kept)
    return float(np.sqrt(max(0.0, apart - by_chance) / max(spread[1], 1e-12)))


def new_words(new: list[str], kept: list[str]) -> float:
    """Return the share of words of new texts that are in no kept one, above that between two halves of the kept ones."""
    known = {word for text in kept[::2] for word in _WORD.findall(text.lower())}
    return max(0.0, _unknown_share(new, known) - _unknown_share(kept[1::2], known))


def _unknown_share(texts: Iterable[str], known: set[str]) -> float:
    words = [word for text in texts for word in _WORD.findall(text.lower())]
    return sum(word not in known for word in words) / max(1, len(words))


def _texts(passages: pa.Table) -> list[str]:
    pairs = zip(passages["title"].to_pylist(), passages["text"].to_pylist(), strict=True)
    return [f"{title or ''} {text}".strip() for title, text in pairs]


def _vectors_of(vectors: ParquetRows, doc_ids: pa.ChunkedArray) -> NDArray[np.float32]:
    """Return the vectors of some passages, in no particular order; those that have none are left out."""
    wanted, first, rows = doc_ids.combine_chunks(), 0, []
    for name, count in vectors.counts:
        column = read_rows(vectors.folder / name, 0, count, ("doc_id",))["doc_id"]
        rows.append(first + np.flatnonzero(pc.is_in(column, wanted).to_numpy()))
        first += count
    places = np.concatenate([np.zeros(0, np.int64), *rows])
    return (
        matrix_of(vectors.take(places, VECTOR_COLUMNS), vectors.folder)[1]
        if len(places)
        else np.zeros((0, 0), np.float32)
    )
