"""What a corpus asks itself."""

import pytest

from readapt_ray.evaluation.pseudo_queries import split_query, with_pseudo_queries
from readapt_ray.records import Passage

REST = "Arrays hold numbers of one type in a block of memory, and their shape says how the block is read."


@pytest.mark.parametrize(
    ("title", "text", "query", "left"),
    [
        ("How arrays lie in memory", REST, "How arrays lie in memory", ("", REST)),
        ("numpy.array", f"Make an array of numbers. {REST}", "Make an array of numbers.", ("numpy.array", REST)),
        ("", f"Does this work at all? {REST}", "Does this work at all?", ("", REST)),
        (
            "Make an array of numbers",
            f"Make an array of numbers. {REST}",
            "Make an array of numbers.",
            ("Make an array of numbers", REST),
        ),
        ("", f"新冠病毒疫苗接种率是多少？{REST}", "新冠病毒疫苗接种率是多少？", ("", REST)),
        ("Short", f"Too short. {REST}", None, None),
        ("How arrays lie in memory", "Too short a text.", None, None),
        ("", "One sentence of many words that never comes to any end at all and so has no rest", None, None),
    ],
)
def test_a_passage_is_a_query_and_the_rest_or_neither(title, text, query, left):
    found = split_query(Passage("d", title, text))
    if query is None:
        assert found is None
    else:
        assert found == (query, Passage("d", *left))


def test_what_became_a_query_is_gone_from_its_passage_and_from_no_other():
    passages = [Passage(f"d{number}", "", f"Question number {number} asks this? {REST}") for number in range(6)]
    left, queries = with_pseudo_queries(passages, [4, 1, 0], 2)
    assert [query.query_id for query in queries] == ["pseudo:d4", "pseudo:d1"]
    for number, (before, after) in enumerate(zip(passages, left, strict=True)):
        if number in (4, 1):
            assert after.text == REST
        else:
            assert after == before
    assert all(query.text not in passage.text for query, passage in ((queries[0], left[4]), (queries[1], left[1])))


def test_a_document_that_was_split_asks_one_question_that_none_of_its_passages_repeats():
    parts = [f"{REST} What says the end?", f"What says the end of this? {REST}", "How arrays lie in memory"]
    passages = [Passage("d", "How arrays lie in memory", text) for text in parts] + [Passage("e", "", parts[1])]
    left, queries = with_pseudo_queries(passages, [0, 1, 2, 3], 9)
    assert [query.query_id for query in queries] == ["pseudo:d", "pseudo:e"]
    assert [(each.doc_id, each.title, each.text) for each in left] == [
        ("d", "", parts[0]),
        ("d", "", parts[1]),
        ("e", "", REST),
    ]
