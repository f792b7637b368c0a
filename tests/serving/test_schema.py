import base64
import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pydantic
import pytest

from readapt_ray.records import Passage
from readapt_ray.serving import answers, cohere, readiness, schema, server


def test_base64_is_little_endian_float32():
    vector = np.array([1.5, -2.0, 3e-5], np.float32)
    assert np.frombuffer(base64.b64decode(answers.to_base64(vector)), "<f4").tolist() == vector.tolist()
    assert answers.to_base64(vector.astype(">f4")) == answers.to_base64(vector)


MANY = 100_000


@pytest.mark.parametrize(
    "given",
    [
        *({"input": each} for each in ([-1] * MANY, ["a"] * MANY, [[]] * MANY, [[-1] * MANY] * 3, [None] * MANY)),
        {"input": [5] * (schema.MAX_TOKEN_IDS + 1)},
        {"input": [5] * MANY + ["a"] * MANY},
        *({"vector": each, "fingerprint": "f"} for each in (["a"] * MANY, [["a"] * MANY] * 3, [1.0] * MANY)),
        {"query": [1] * MANY},
        {"query": "a", "doc_ids": [1] * MANY},
        {"query": "a", "filter": {str(number): {} for number in range(MANY)}},
        {"query": "a", "filter": {"year": {str(number): 1 for number in range(MANY)}}},
        {"query": "a"} | {str(number): 1 for number in range(MANY)},
        {"texts": ["a"], "embedding_types": [1] * MANY},
        {"texts": [1] * MANY},
    ],
    ids=lambda given: str(given)[:20],
)
def test_a_body_of_wrong_elements_is_refused_at_the_first(given):
    by_field = {"input": schema.EmbeddingsRequest, "texts": cohere.EmbedRequest}
    body = next((body for name, body in by_field.items() if name in given), schema.SearchRequest)
    with pytest.raises(pydantic.ValidationError) as caught:
        body.model_validate(given)
    assert caught.value.error_count() < 10


@pytest.mark.parametrize(
    ("changes", "num_queries"),
    [
        ({"query": ["a"] * 51, "top_k": 1000}, 51),
        ({"vector": [[1.0]] * 51, "fingerprint": "f", "top_k": 1000}, 51),
        ({"query": ["a"] * 2048, "top_k": 25}, 2048),
    ],
)
def test_no_search_asks_for_more_than_an_answer_holds(changes, num_queries):
    with pytest.raises(pydantic.ValidationError, match=f"{num_queries:,} queries with 'top_k' .* may ask for 50,000"):
        schema.SearchRequest.model_validate(changes)
    schema.SearchRequest.model_validate(changes | {"top_k": 50_000 // num_queries})
    schema.SearchRequest.model_validate({"vector": [1.0] * 4096, "fingerprint": "f", "top_k": 1000})


def test_a_search_is_written_as_its_model_says():
    ranked = [[("a", 0.5), ("b", -1.25)], []]
    written = answers.search_json(
        ranked,
        {"a": Passage("a", "", "text", {"year": 2020, "tags": ["x"]})},
        model="m",
        fingerprint="f",
        num_tokens=3,
        missing=["index-1"],
    )
    hits = [
        schema.Hit(rank=1, doc_id="a", score=0.5, title="", text="text", columns={"year": 2020, "tags": ["x"]}),
        schema.Hit(rank=2, doc_id="b", score=-1.25),
    ]
    response = schema.SearchResponse(
        data=[schema.SearchResult(index=0, hits=hits), schema.SearchResult(index=1, hits=[])],
        model="m",
        usage=schema.Usage(prompt_tokens=3, total_tokens=3),
        fingerprint="f",
        partial=True,
        missing=["index-1"],
    )
    assert written.decode() == response.model_dump_json()


def test_the_kind_of_an_error_follows_its_status():
    assert schema.error_body("m", status=429)["error"]["type"] == "rate_limit_error"
    assert schema.error_body("m", status=404)["error"]["type"] == "invalid_request_error"
    assert schema.error_body("m", status=503)["error"]["type"] == "server_error"
    error = schema.RequestError("no such model", status=404, param="model", code="model_not_found")
    assert error.body == {
        "error": {
            "message": "no such model",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
    }


def test_a_signal_ends_the_wait_and_leaves_the_handlers_as_they_were():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def send(number):
        while signal.getsignal(number) in before:
            time.sleep(0.01)  # the handlers of before would end this process
        time.sleep(0.2)
        os.kill(os.getpid(), number)

    for each in (signal.SIGINT, signal.SIGTERM):
        sender = threading.Thread(target=send, args=(each,), daemon=True)
        sender.start()
        server._wait_for_signal()
        sender.join()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_the_page_of_the_api_describes_types_that_exist():
    page = (Path(schema.__file__).parent / "docs.html").read_text()
    listed = re.search(r"for \(const name of (\[[^\]]+\])\) if \(schemas", page)
    assert listed
    for name in json.loads(listed[1]):
        assert hasattr(schema, name) or hasattr(readiness, name), name


@pytest.mark.parametrize("given", [1.0, 10])
def test_a_whole_number_may_be_written_with_a_point(given):
    body = schema.SearchRequest(query="a", top_k=given)
    assert (body.top_k, type(body.top_k)) == (given, int)
    assert schema.EmbeddingsRequest(input="a", dimensions=given).dimensions == given
    assert cohere.EmbedRequest(texts=["a"], output_dimension=given).output_dimension == given


@pytest.mark.parametrize("given", [1.5, True, "5", 0.0, float("inf")])
def test_what_is_no_whole_number_of_1_or_more_is_refused(given):
    for each in (
        lambda: schema.SearchRequest(query="a", top_k=given),
        lambda: schema.EmbeddingsRequest(input="a", dimensions=given),
    ):
        with pytest.raises(pydantic.ValidationError):
            each()
