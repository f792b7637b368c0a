"""BM25: shards score as one index, and as the formula says."""

import dataclasses
import math
import sys

import bm25s
import numpy as np
import pytest

from readapt_ray.errors import InputError
from readapt_ray.retrieval.bm25 import K1, B, WordCounts, WordIndex, import_bm25s, query_blocks, search_words, words
from readapt_ray.retrieval.fusion import reciprocal_rank_fusion
from tests.factories import small_corpus

TEXTS = [f"{each.title} {each.text}" for each in small_corpus(60)]
TEXTS[7] = ""
TEXTS[8] = TEXTS[9]
IDS = np.array([f"d{number:02}" for number in range(60)], dtype=object)
QUERIES = ["array shape of the thread", "lock lock", "nothingofthekind", "", TEXTS[20][:200]]


def built(texts, cuts):
    passages = [words(each) for each in texts]
    whole = WordCounts()
    parts = [passages[first:last] for first, last in zip([0, *cuts], [*cuts, len(passages)], strict=True)]
    for part in parts:
        counts = WordCounts()
        counts.add(part)
        whole.merge(counts)
    return [
        WordIndex.from_bytes(WordIndex.build(part, whole.only({w for p in part for w in p})).to_bytes())
        for part in parts
    ]


@pytest.mark.parametrize("cuts", [[30], [7, 8, 50], [1, 59]])
def test_shards_score_as_one_index_does(cuts):
    (one,), several = built(TEXTS, []), built(TEXTS, cuts)
    for query in QUERIES:
        np.testing.assert_allclose(
            np.concatenate([each.scores(query) for each in several]), one.scores(query), rtol=1e-6
        )
    mine, its = search_words(several, IDS, QUERIES, 10), search_words([one], IDS, QUERIES, 10)
    assert mine.doc_ids.tolist() == its.doc_ids.tolist()


def test_scores_are_those_of_the_formula_and_of_plain_bm25s():
    passages = [words(each) for each in TEXTS]
    (one,) = built(TEXTS, [])
    plain = bm25s.BM25(k1=K1, b=B, method="lucene")
    plain.index(passages, show_progress=False)
    mean = np.mean([len(each) for each in passages])
    for query in QUERIES[:2]:
        by_hand = []
        for each in passages:
            score = 0.0
            for word in words(query):
                num_with = sum(word in other for other in passages)
                frequency = each.count(word)
                rarity = math.log(1 + (60 - num_with + 0.5) / (num_with + 0.5))
                score += rarity * frequency / (frequency + K1 * (1 - B + B * len(each) / mean))
            by_hand.append(score)
        np.testing.assert_allclose(one.scores(query), by_hand, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(one.scores(query), plain.get_scores(words(query)), rtol=1e-5, atol=1e-6)


def test_what_has_no_word_of_the_query_or_does_not_pass_is_not_found():
    parts = built(TEXTS, [20])
    passing = np.arange(60) % 2 == 0
    hits = search_words(parts, IDS, QUERIES, 60, passing)
    for query, text in enumerate(QUERIES):
        due = {IDS[row] for row in range(0, 60, 2) if set(words(TEXTS[row])) & set(words(text))}
        assert {doc.doc_id for doc in hits.of_query(query, "")} == due
    assert not list(hits.of_query(2, "")) and not list(hits.of_query(3, ""))
    tied = search_words(parts, IDS, [TEXTS[8]], 2).doc_ids.tolist()
    assert tied == [["d08", "d09"]]


class Asked(list):
    """Where columns begin, and how often somebody asked."""

    times = 0

    def __getitem__(self, place):
        self.times += 1
        return super().__getitem__(place)


def test_no_query_is_told():
    with pytest.raises(InputError, match="no query is given"):
        search_words(built(TEXTS, []), IDS, [], 10)


def test_a_word_costs_the_same_however_often_a_query_repeats_it():
    (one,) = built(TEXTS, [])
    asked = Asked(one.indptr.tolist())
    found = dataclasses.replace(one, indptr=asked).scores("array lock " * 4000)
    assert asked.times == 4
    np.testing.assert_allclose(found, 4000 * one.scores("array lock"), rtol=1e-5)


def test_words_beyond_the_first_512_are_not_searched_for():
    (one,) = built(TEXTS, [])
    before = " ".join(f"w{number}" for number in range(511))
    assert one.scores(f"{before} array").tolist() == one.scores("array").tolist()
    assert not one.scores(f"{before} one array").any() and one.scores("array").any()


@pytest.mark.parametrize(
    ("lengths", "sizes"),
    [([5] * 40, [16, 16, 8]), ([5000, 5, 5], [1, 2]), ([5, 4090, 5, 5000], [2, 1, 1]), ([1], [1])],
)
def test_long_queries_are_searched_in_smaller_blocks(lengths, sizes):
    queries = ["x" * length for length in lengths]
    blocks = list(query_blocks(queries))
    assert [len(each) for each in blocks] == sizes
    assert [query for block in blocks for query in block] == queries


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The moon's pull, 3.5 m", ["the", "moon", "s", "pull", "3", "5", "m"]),
        ("Straße ÉCOLE naïve", ["straße", "école", "naïve"]),
        ("月亮 moon2 ひと", ["月", "亮", "moon2", "ひ", "と"]),
        ("_ -- …", []),
    ],
)
def test_words_of_any_language(text, found):
    assert words(text) == found


def test_rankings_are_fused_by_reciprocal_rank():
    fused = reciprocal_rank_fusion([["a", "b", "c"], ["c", "d"]], 3)
    assert fused == [("c", 1 / 63 + 1 / 61), ("a", 1 / 61), ("b", 1 / 62)]
    assert [doc_id for doc_id, _ in reciprocal_rank_fusion([["b", "a"], ["a", "b"]], 2)] == ["a", "b"]
    assert reciprocal_rank_fusion([[], []], 5) == []


def test_without_bm25s_one_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(InputError, match=r"pip install 'readapt-ray\[bm25\]'"):
        import_bm25s()
