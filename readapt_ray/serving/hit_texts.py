"""Read titles and texts of the passages that a search found, up to the maximum size of an answer."""

from collections import Counter
from collections.abc import Iterable, Sequence

from readapt_ray.records import Passage
from readapt_ray.retrieval.passage_store import PassageStore
from readapt_ray.serving.schema import RequestError
from readapt_ray.serving.versions import Ranked

_MAX_CHARACTERS = 128 << 20
"""Maximum characters of all titles and texts in one answer. Documents that were not split can have megabytes each."""
_READ_AT_ONCE = 64
"""Number of passages that are read before their lengths are checked."""


def texts_of(store: PassageStore, found: Iterable[Sequence[Ranked]]) -> dict[str, Passage]:
    """Return title and text of the passages that were found, by id; ids that the corpus lacks are left out.

    Args:
        store: the corpus.
        found: the hits of each query; a passage that several queries found is read once.

    Raises:
        RequestError: the texts are too long for one answer, which repeats a passage for each query that found it.
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
