"""Make queries from the passages themselves, for corpora without labels.

In: passages. Out: queries, each with the one passage that answers it, and the passages without what was
made a query: the title where it says enough, else the first sentence. A retriever that finds a text by its
own title is not one that finds answers: figures of such queries compare models, and say nothing of how good
one is.
"""

import re
from collections.abc import Iterable, Sequence

from readapt_ray.records import Passage, Query
from readapt_ray.synthesis.query_filter import num_words

PREFIX = "pseudo:"
MIN_QUERY_WORDS = 4
MIN_REST_CHARS = 80
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])")


def with_pseudo_queries(
    passages: Sequence[Passage], order: Iterable[int], max_queries: int
) -> tuple[list[Passage], list[Query]]:
    """Make queries of some passages.

    Args:
        passages: the sample of the corpus; passages of a document that was split have its id.
        order: places of passages, in the order in which they are tried.
        max_queries: how many queries are made at most.

    Returns:
        The passages, without what became a query, and the queries, one per document; a query has the id of its
        passage behind `pseudo:`.
    """
    left: dict[int, Passage] = dict(enumerate(passages))
    places: dict[str, list[int]] = {}
    for index, passage in left.items():
        places.setdefault(passage.doc_id, []).append(index)
    queries: list[Query] = []
    for index in order:
        if len(queries) == max_queries:
            break
        doc_id = passages[index].doc_id
        split = split_query(passages[index]) if doc_id in places else None
        if split is None:
            continue
        text, left[index] = split
        queries.append(Query(f"{PREFIX}{doc_id}", text))
        # The other passages of the document have its title, and may overlap with this one.
        for at in places.pop(doc_id):
            title, rest = left[at].title.replace(text, ""), left[at].text.replace(text, "")
            left[at] = Passage(doc_id, title, rest)
    return [each for each in left.values() if each.title or each.text.strip()], queries


def split_query(passage: Passage) -> tuple[str, Passage] | None:
    """Split a passage into a query and the rest that answers it; None if it is too short for both."""
    title, text = passage.title.strip(), passage.text.strip()
    if num_words(title) >= MIN_QUERY_WORDS and len(text) >= MIN_REST_CHARS and title not in text:
        return title, passage._replace(title="", text=text)
    sentence, *rest = _SENTENCE_END.split(text, maxsplit=1)
    if num_words(sentence) >= MIN_QUERY_WORDS and rest and len(rest[0]) >= MIN_REST_CHARS:
        return sentence, passage._replace(text=rest[0])
    return None
