"""Searches by words, and by both."""

import asyncio
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from readapt_ray.retrieval.bm25 import words
from readapt_ray.retrieval.fusion import reciprocal_rank_fusion
from readapt_ray.serving.schema import MAX_HITS
from readapt_ray.serving.search_modes import search_documents
from readapt_ray.serving.versions import Found, Ranked
from tests.factories import small_corpus
from tests.serving.conftest import local_server

SEARCH = "/v1/search"
TEXTS = {each.doc_id: set(words(f"{each.title} {each.text}")) for each in small_corpus(40)}
QUERIES = ["array shape", "lock a thread"]


def asked(version, *bodies):
    async def run():
        async with local_server({"tiny": version}, max_inputs=50) as server, server.client() as client:
            answers = [await client.post(SEARCH, json={"query": QUERIES, "top_k": 5} | body) for body in bodies]
            return [*answers, await client.get("/v1/models/tiny")]

    return asyncio.run(run())


def ranked(answer):
    assert answer.status_code == 200, answer.text
    return [[hit["doc_id"] for hit in each["hits"]] for each in answer.json()["data"]]


def test_both_are_fused_by_reciprocal_rank_and_words_need_no_encoder(fresh):
    bodies = [{"mode": mode, "top_k": 100} for mode in ("dense", "bm25", "hybrid")]
    dense, by_words, both, model = asked(fresh, *bodies)
    assert len(fresh.encoded) == 2
    for query, (mine, its, fused) in enumerate(zip(*map(ranked, (dense, by_words, both)), strict=True)):
        assert fused == [doc_id for doc_id, _ in reciprocal_rank_fusion([mine, its], 100)]
        assert set(its) == {doc_id for doc_id, there in TEXTS.items() if there & set(words(QUERIES[query]))}
    assert model.json()["modes"] == ["dense", "bm25", "hybrid"]
    hit = both.json()["data"][0]["hits"][0]
    assert hit["score"] <= 2 / 61 and hit["text"]


def test_a_filter_holds_in_every_mode(version):
    for answer in asked(version, *({"mode": mode, "doc_id_prefix": "d0000"} for mode in ("bm25", "hybrid")))[:-1]:
        assert all(doc_id.startswith("d0000") for each in ranked(answer) for doc_id in each)


def test_a_long_query_is_cut(version):
    short, long, _ = asked(version, *({"mode": "bm25", "query": "array " * count} for count in (5000, 6000)))
    assert ranked(long) == ranked(short) != [[]]


@pytest.mark.parametrize(
    ("has_words", "body", "message"),
    [
        (False, {"mode": "bm25"}, "the index was built without BM25"),
        (False, {"mode": "hybrid"}, "readapt index --bm25"),
        (True, {"mode": "bm25", "query": ["a", " "]}, "'query[1]' is empty"),
        (True, {"mode": "hybrid", "query": ""}, "'query' is empty"),
        (
            True,
            {"mode": "bm25", "query": "a " * 20_000, "truncate": False},
            "40,000 characters; words are searched for in",
        ),
        (True, {"mode": "bm25", "query": ["a"] * 51, "top_k": 1}, "'query' has 51 texts; this server takes 50"),
        (True, {"mode": "sparse"}, "'mode' must be 'dense', 'bm25' or 'hybrid'"),
        (True, {"mode": "hybrid", "query": None, "vector": [1.0], "fingerprint": "f"}, "it needs 'query'"),
    ],
)
def test_what_cannot_be_done_is_refused(version, has_words, body, message):
    info = dataclasses.replace(version.info, has_words=has_words)
    answer, model = asked(dataclasses.replace(version, info=info), body)
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]
    assert ("bm25" in model.json()["modes"]) == has_words


class Ranking:
    """An index of passages of split documents, ten of each document; it notes how many hits each search gave."""

    def __init__(self, *, is_split: bool) -> None:
        self.info = SimpleNamespace(is_split=is_split, num_vectors=1_000_000)
        self.hits = []

    async def search(self, queries, top_k, _):
        self.hits.append(len(queries) * top_k)
        ranked = [Ranked(f"d{number // 10}#{number % 10}", -float(number)) for number in range(top_k)]
        return Found([ranked for _ in queries], [])

    search_words = search


@pytest.mark.parametrize(
    ("mode", "is_split", "num_queries", "top_k"),
    [("hybrid", False, 2048, 10), ("dense", True, 50, 1000), ("hybrid", True, 2048, 10), ("dense", False, 50, 1000)],
)
def test_no_search_is_deeper_than_what_a_request_may_ask_for(mode, is_split, num_queries, top_k):
    backend = Ranking(is_split=is_split)
    vectors, texts = np.zeros((num_queries, 4), np.float32), ["a"] * num_queries
    found = asyncio.run(search_documents(mode, backend, vectors, texts, top_k=top_k, wanted=None))
    assert max(backend.hits) <= MAX_HITS
    assert [len(each) for each in found.ranked] == [top_k] * num_queries
    if is_split:
        assert [hit.doc_id.partition("#")[0] for hit in found.ranked[-1]] == [f"d{number}" for number in range(top_k)]


def test_only_queries_that_lack_documents_are_searched_deeper():
    backend = Ranking(is_split=True)

    async def search(queries, top_k, _):
        backend.hits.append((queries[:, 0].tolist(), top_k))
        # Query 1 finds passages of one document first.
        return Found(
            [
                [Ranked(f"d{0 if query and each < 20 else each}#1", -each) for each in range(top_k)]
                for query in queries[:, 0]
            ],
            [],
        )

    backend.search = search
    vectors = np.arange(2, dtype=np.float32)[:, None]
    found = asyncio.run(search_documents("dense", backend, vectors, [], top_k=3, wanted=None))
    assert backend.hits == [([0.0, 1.0], 9), ([1.0], 27)]
    assert [[hit.doc_id for hit in each] for each in found.ranked] == [
        ["d0#1", "d1#1", "d2#1"],
        ["d0#1", "d20#1", "d21#1"],
    ]


def test_documents_that_were_split_are_fused_by_the_ranks_of_documents_as_search_does():
    backend = Ranking(is_split=True)
    dense, words = (
        [Ranked(doc_id, float(-place)) for place, doc_id in enumerate(listed.split())]
        for listed in ("a#1 a#2 a#3 b#1 c#1", "d#1 d#2 b#2 b#1")
    )

    async def search(queries, *_):
        return Found([dense] * len(queries), [])

    async def search_words(queries, *_):
        return Found([words] * len(queries), [])

    backend.search, backend.search_words = search, search_words
    vectors = np.zeros((2, 4), np.float32)
    found = asyncio.run(search_documents("hybrid", backend, vectors, ["a"] * 2, top_k=3, wanted=None))
    due = reciprocal_rank_fusion([["a", "b", "c"], ["d", "b"]], 3)
    passages = {"a": "a#1", "b": "b#1", "d": "d#1"}
    assert found.ranked == [[Ranked(passages[document], score) for document, score in due]] * 2
