"""Read titles and texts of the passages that a search found, as many as an answer may have."""

from collections import Counter
from collections.abc import Iterable, Sequence

from readapt_ray.records import Passage
from readapt_ray.retrieval.passage_store import PassageStore
from readapt_ray.serving.schema import RequestError
from readapt_ray.serving.versions import Ranked

_MAX_CHARACTERS = 128 << 20
"""Bound of all titles and texts in one answer. Documents that were not split can have megabytes each."""
_READ_AT_ONCE = 64
"""Passages that are read before their lengths are added up."""


def texts_of(store: PassageStore, found: Iterable[Sequence[Ranked]]) -> dict[str, Passage]:
    """Return the passages of all queries by their ids, without those that the corpus does not have.

    Raises:
        RequestError: their texts would not fit an answer, in which a passage stands once per query that found it.
    """
    times = Counter(hit.doc_id for ranked in found for hit in ranked)
    passages: dict[str, Passage] = {}
    doc_ids, num_characters = list(times), 0
    for first in range(0, len(doc_ids), _READ_AT_ONCE):
        part = store.find(doc_ids[first : first + _READ_AT_ONCE])
        num_characters += sum(times[doc_id] * (len(each.title) + len(each.text)) for doc_id, each in part.items())
        if num_characters > _MAX_CHARACTERS:
            raise RequestError(
                f"the passages found have more than {_MAX_CHARACTERS:,} characters; send fewer queries at a time, a lower "
                f"'top_k', or \"with_text\": false",
                param="top_k",
                code="answer_too_large",
            )
        passages |= part
    return passages
