"""Make pseudo-queries from the passages themselves, for corpora without labels.

In: passages. Out: queries, each with the one passage that answers it, and the passages without the text that became a
query. A query is the title of a passage if it is long enough, else its first sentence. To find a text by its title is
easier than to find an answer, so results on pseudo-queries can compare models, but do not say how good a model is.
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
    """Make queries from some passages, and remove their text from the passages of the same document.

    Passages that are too short for a query (see `split_query`) are skipped, so there may be fewer than `max_queries`.

    Args:
        passages: a sample of the corpus; passages of a split document have the id of the document.
        order: indices of passages, in the order in which to try them.
        max_queries: most queries to make.

    Returns:
        The passages, in their order, without the text that became a query and without those that became empty; and the
        queries, at most one per document. The id of a query is `pseudo:` and the id of its document.
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
        # Other passages of the document have the same title, and may overlap with this one.
        for at in places.pop(doc_id):
            title, rest = left[at].title.replace(text, ""), left[at].text.replace(text, "")
            left[at] = Passage(doc_id, title, rest)
    return [each for each in left.values() if each.title or each.text.strip()], queries


def split_query(passage: Passage) -> tuple[str, Passage] | None:
    """Split a passage into a query and the remaining passage, which answers it; None if it is too short for both.

    The title becomes the query if it has at least 4 words, is not repeated in the text, and the text has at least 80
    characters. Else the first sentence does, if it has at least 4 words and at least 80 characters follow.
    """
    title, text = passage.title.strip(), passage.text.strip()
    if num_words(title) >= MIN_QUERY_WORDS and len(text) >= MIN_REST_CHARS and title not in text:
        return title, passage._replace(title="", text=text)
    sentence, *rest = _SENTENCE_END.split(text, maxsplit=1)
    if num_words(sentence) >= MIN_QUERY_WORDS and rest and len(rest[0]) >= MIN_REST_CHARS:
        return sentence, passage._replace(text=rest[0])
    return None
