import base64
import concurrent.futures
import json
import socket

import httpx
import numpy as np
import pytest

from readapt_ray.errors import ArtifactMissingError, FingerprintMismatchError, InputError, ModelError
from readapt_ray.retrieval.exact import search_exact
from readapt_ray.serving.app import serve
from tests.factories import full_retriever, small_corpus, write_contract

TEXTS = ["array shape", "lock a thread", "write the file", "ünï ☃ 文書"]


def _vectors(answer):
    assert answer.status_code == 200, answer.text
    return np.array([each["embedding"] for each in answer.json()["data"]], np.float32)


@pytest.mark.parametrize("kind", ["query", "passage"])
def test_vectors_over_http_equal_the_encoders(served, world, kind):
    answer = served.post(
        "/v1/embeddings", json={"input": TEXTS, "model": "tiny", "input_type": kind, "user": "someone"}
    )
    found = _vectors(answer)
    expected = world.encoder.encode(TEXTS, kind)
    assert ((found * expected).sum(axis=1) > 0.9999).all()
    body = answer.json()
    assert (body["object"], body["model"]) == ("list", "tiny")
    assert [each["index"] for each in body["data"]] == [0, 1, 2, 3]
    num_tokens = sum(map(len, world.encoder.tokenize(TEXTS, kind)))
    assert body["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}


def test_the_default_is_a_query_and_one_string_is_a_list_of_one(served, world):
    found = _vectors(served.post("/v1/embeddings", json={"input": TEXTS[0]}))
    assert found.shape == (1, world.encoder.dimension)
    np.testing.assert_allclose(found, world.encoder.encode(TEXTS[:1], "query"), atol=1e-5)


def test_base64_holds_the_same_numbers(served):
    as_floats = _vectors(served.post("/v1/embeddings", json={"input": TEXTS}))
    answer = served.post("/v1/embeddings", json={"input": TEXTS, "encoding_format": "base64"}).json()
    decoded = [np.frombuffer(base64.b64decode(each["embedding"]), "<f4") for each in answer["data"]]
    np.testing.assert_array_equal(np.stack(decoded), as_floats)


def test_a_long_text_is_cut_when_asked_to(served, world):
    long = "array " * 500
    found = _vectors(served.post("/v1/embeddings", json={"input": long, "truncate": True}))
    np.testing.assert_allclose(found, world.encoder.encode([long], "query"), atol=1e-5)


def test_search_equals_exact_search(served, world):
    passages = small_corpus(40)
    vectors = world.encoder.encode([each.text for each in passages], "passage", [each.title for each in passages])
    expected = search_exact(world.encoder.encode(TEXTS, "query"), [([each.doc_id for each in passages], vectors)], 7)
    answer = served.post("/v1/search", json={"query": TEXTS, "top_k": 7})
    assert answer.status_code == 200, answer.text
    texts = {each.doc_id: each for each in passages}
    for index, result in enumerate(answer.json()["data"]):
        hits = result["hits"]
        assert [hit["doc_id"] for hit in hits] == expected.doc_ids[index].tolist()
        np.testing.assert_allclose([hit["score"] for hit in hits], expected.scores[index], atol=1e-5)
        assert [hit["rank"] for hit in hits] == list(range(1, 8))
        assert all((hit["title"], hit["text"]) == texts[hit["doc_id"]][1:] for hit in hits)


def test_a_long_query_is_cut_as_the_search_stage_does_unless_told_otherwise(served, world):
    long = "thread lock " * 200
    [result] = served.post("/v1/search", json={"query": long, "top_k": 3}).json()["data"]
    ids = world.encoder.tokenize([long], "query")
    assert len(ids[0]) == world.encoder.encoding.max_query_tokens
    [cut] = served.post("/v1/embeddings", json={"input": long, "truncate": True}).json()["data"]
    np.testing.assert_allclose(cut["embedding"], world.encoder.encode_ids(ids)[0], atol=1e-5)
    assert len(result["hits"]) == 3
    answer = served.post("/v1/search", json={"query": long, "truncate": False})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_one_query_and_more_results_than_passages(served):
    [result] = served.post("/v1/search", json={"query": "array", "top_k": 1000}).json()["data"]
    assert len({hit["doc_id"] for hit in result["hits"]}) == 40


def test_many_clients_at_once_get_their_own_answers(served, world):
    texts = [f"array number {number}" for number in range(60)]
    expected = world.encoder.encode(texts, "query")

    def ask(number):
        return _vectors(served.post("/v1/embeddings", json={"input": texts[number : number + 1 + number % 3]}))[0]

    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        found = np.stack(list(pool.map(ask, range(60))))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_models_and_health(served, world):
    [model] = served.get("/v1/models").json()["data"]
    assert model["id"] == "tiny"
    assert model["object"] == "model"
    assert model["dimension"] == world.encoder.dimension
    health = served.get("/healthz")
    assert health.status_code == 200
    assert health.json() == {
        "status": "ok",
        "model": "tiny",
        "fingerprint": world.encoder.fingerprint,
        "num_vectors": 40,
    }


EMBEDDINGS, SEARCH = "/v1/embeddings", "/v1/search"


@pytest.mark.parametrize(
    ("path", "body", "expected", "message"),
    [
        (EMBEDDINGS, {"input": ""}, (400, "input", "empty"), "'input' is empty"),
        (EMBEDDINGS, {"input": ["a", " \n"]}, (400, "input", "empty"), "'input[1]' is empty"),
        (EMBEDDINGS, {"input": []}, (400, "input", "invalid_value"), "1 to 2,048 strings"),
        (EMBEDDINGS, {"input": ["a"] * 2049}, (400, "input", "invalid_value"), "1 to 2,048 strings"),
        (EMBEDDINGS, {"input": 7}, (400, "input", "invalid_value"), "must be a string, or a list"),
        (EMBEDDINGS, {"input": [1, 2, 3]}, (400, "input", "invalid_value"), "must be a string, or a list"),
        (EMBEDDINGS, {"input": None}, (400, "input", "invalid_value"), "must be a string, or a list"),
        (EMBEDDINGS, {"input": ["a", None]}, (400, "input", "invalid_value"), "must be a string, or a list"),
        (EMBEDDINGS, {"input": "array " * 500}, (400, "input", "context_length_exceeded"), "a query may have 32"),
        (EMBEDDINGS, {"input": "\ud800"}, (400, "input", "invalid_value"), "not valid Unicode"),
        (EMBEDDINGS, {"input": "a " * 200_000}, (413, None, None), "over 200,000 bytes"),
        (
            EMBEDDINGS,
            {"input": "a", "encoding_format": "int8"},
            (400, "encoding_format", "invalid_value"),
            "'float' or 'base64'",
        ),
        (EMBEDDINGS, {"input": "a", "input_type": "doc"}, (400, "input_type", "invalid_value"), "'query' or 'passage'"),
        (EMBEDDINGS, {"input": "a", "dimensions": 3}, (400, "dimensions", "invalid_value"), "'dimensions' is 3"),
        (EMBEDDINGS, {"input": "a", "model": "other"}, (404, "model", "model_not_found"), "this server has 'tiny'"),
        (EMBEDDINGS, {}, (400, "input", "missing_required_parameter"), "'input' is required"),
        (EMBEDDINGS, [1], (400, None, None), "must be a JSON object"),
        (SEARCH, {"query": ""}, (400, "query", "empty"), "'query' is empty"),
        (SEARCH, {"query": "a", "top_k": 0}, (400, "top_k", "invalid_value"), "from 1 to 1,000"),
        (SEARCH, {"query": "a", "top_k": "many"}, (400, "top_k", "invalid_value"), "from 1 to 1,000"),
        (SEARCH, {"query": "a", "top_k": 1001}, (400, "top_k", "invalid_value"), "from 1 to 1,000"),
        (SEARCH, {"top_k": 3}, (400, "query", "missing_required_parameter"), "'query' is required"),
    ],
)
def test_a_bad_request_is_an_openai_error(served, path, body, expected, message):
    answer = served.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (answer.status_code, error["param"], error["code"]) == expected
    assert error["type"] == "invalid_request_error"
    assert message in error["message"]
    assert len(error["message"]) < 300
    assert not any(part in answer.text for part in ("Traceback", "site-packages", "/tmp"))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'"text"', b"null"])
def test_what_is_not_a_json_object_is_refused(served, content):
    answer = served.post(EMBEDDINGS, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert "JSON object" in answer.json()["error"]["message"]


def test_an_unknown_path_and_a_wrong_method_are_openai_errors(served):
    for answer, status in ((served.get("/v1/nothing"), 404), (served.get(EMBEDDINGS), 405)):
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_second_server_and_a_port_in_use_are_refused(served, world):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"port {port} on 127\.0\.0\.1 cannot be used: .*give another --port"):
            serve(world.config(port=port), blocking=False)
    with pytest.raises(InputError, match="serves an app already"):
        serve(world.config(), blocking=False)
    assert served.get("/healthz").status_code == 200


def test_what_does_not_fit_together_is_refused(served, world, tmp_path):
    other = full_retriever(tmp_path / "other", world.folder / "pretrained", seed=9)
    write_contract(other)
    with pytest.raises(FingerprintMismatchError, match="other weights"):
        serve(world.config(retriever=str(other)), blocking=False)
    with pytest.raises(FingerprintMismatchError, match="dtype is 'float32' there and 'float16' here"):
        serve(world.config(dtype="float16"), blocking=False)
    with pytest.raises(ArtifactMissingError, match="does not exist"):
        serve(world.config(index=str(tmp_path / "none")), blocking=False)
    with pytest.raises(ArtifactMissingError, match="output of 'ingest'"):
        serve(world.config(index=str(world.folder / "corpus")), blocking=False)
    with pytest.raises(ArtifactMissingError, match="does not exist"):
        serve(world.config(corpus=str(tmp_path / "none")), blocking=False)
    with pytest.raises(ModelError, match="no model"):
        serve(world.config(retriever=str(tmp_path / "none")), blocking=False)
    with pytest.raises(InputError, match="port = 99999"):
        world.config(port=99999)
    assert isinstance(served, httpx.Client)
