"""Clients that people have already say what they want in several ways: by the model's name, by `input_type`, by Cohere's API."""

import base64
import json

import numpy as np
import pytest

from readapt_ray.catalog.models import open_model
from readapt_ray.retrieval.encoder import Encoder
from tests.serving.conftest import LocalVersion
from tests.serving.test_routes import EMBEDDINGS, SEARCH, TEXTS, ask, post, vectors_of

COHERE = "/v2/embed"


@pytest.fixture(scope="module")
def raw(world) -> np.ndarray:
    """Vectors of the texts without a template."""
    model = open_model(str(world.folder / "retriever"))
    encoding = model.encoding.model_copy(update={"query_template": "{text}"})
    return Encoder.load(model, encoding=encoding).encode(TEXTS, "query")


def expected_of(kind, world, raw) -> np.ndarray:
    return raw if kind == "raw" else world.encoder.encode(TEXTS, kind)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"model": "tiny"}, "query"),
        ({"model": "tiny-passage"}, "passage"),
        ({"model": "tiny-raw"}, "raw"),
        ({"model": "default-passage"}, "passage"),
        ({"model": "tiny-passage", "input_type": "query"}, "query"),
        ({"input_type": None}, "query"),
        ({"input_type": "search_query"}, "query"),
        ({"input_type": "search_document"}, "passage"),
        ({"input_type": "document"}, "passage"),
        ({"input_type": "raw"}, "raw"),
    ],
)
def test_the_kind_of_text_by_name_or_by_input_type(version, world, raw, changes, kind):
    found = vectors_of(post(version, EMBEDDINGS, {"input": TEXTS} | changes))
    np.testing.assert_allclose(found, expected_of(kind, world, raw), atol=1e-5)


def test_the_kinds_differ(world, raw):
    """Otherwise the test above would show nothing."""
    vectors = [expected_of(kind, world, raw) for kind in ("query", "passage", "raw")]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(vectors[one] - vectors[other]).max() > 1e-3


def test_models_lists_each_kind_and_a_version_of_such_a_name_wins(version, world):
    versions = {"org/tiny": version, "org/tiny-raw": LocalVersion.load(world, "other", matryoshka=True)}
    names = ["org/tiny", "org/tiny-passage", "org/tiny-raw", "org/tiny-raw-passage", "org/tiny-raw-raw"]
    listed, *each = ask(None, *(("GET", path, None) for path in ["/v1/models", *(f"/v1/models/{name}" for name in names)]),
                        versions=versions)  # fmt: skip
    assert [model["id"] for model in listed.json()["data"]] == names
    assert [answer.json() for answer in each] == listed.json()["data"]
    assert [model["input_type"] for model in listed.json()["data"]] == ["query", "passage", "query", "passage", "raw"]
    assert [model["matryoshka"] for model in listed.json()["data"]] == [False, False, True, True, True]
    assert [model["default"] for model in listed.json()["data"]] == [True] + [False] * 4
    [encoded] = ask(None, ("GET", "/v1/models/org%2Ftiny", None), versions=versions)
    assert encoded.json()["id"] == "org/tiny"
    assert (
        post(None, SEARCH, {"query": "a", "model": "org/tiny-passage"}, versions=versions).json()["model"] == "org/tiny"
    )


def test_cohere_embeds_queries_and_passages(version, world):
    body = {"model": "tiny", "texts": TEXTS, "embedding_types": ["float", "base64"]}
    for words, kind in (("search_query", "query"), ("search_document", "passage")):
        answer = post(version, COHERE, body | {"input_type": words}).json()
        np.testing.assert_allclose(answer["embeddings"]["float"], world.encoder.encode(TEXTS, kind), atol=1e-5)
        decoded = [np.frombuffer(base64.b64decode(each), "<f4") for each in answer["embeddings"]["base64"]]
        np.testing.assert_allclose(decoded, answer["embeddings"]["float"], atol=1e-7)
        assert answer["texts"] == TEXTS
        assert answer["meta"]["billed_units"] == {"input_tokens": sum(map(len, world.encoder.tokenize(TEXTS, kind)))}
    cut = post(version, COHERE, body | {"embedding_types": None, "output_dimension": 5}).json()
    assert list(cut["embeddings"]) == ["float"]
    assert np.shape(cut["embeddings"]["float"]) == (4, 5)


def test_cohere_cuts_what_is_too_long_unless_told_not_to(version, world):
    long = "array " * 500
    answer = post(version, COHERE, {"texts": [long]}).json()
    np.testing.assert_allclose(answer["embeddings"]["float"], world.encoder.encode([long], "query"), atol=1e-5)
    for changes, param in (({"truncate": "NONE"}, "texts"), ({"truncate": "START"}, "truncate"), ({"texts": []}, "texts"),
                           ({"embedding_types": ["int8"]}, "embedding_types"), ({"input_type": "image"}, "input_type")):  # fmt: skip
        refused = post(version, COHERE, {"texts": [long]} | changes)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param), refused.text


@pytest.mark.parametrize(("path", "field"), [(COHERE, "texts"), (EMBEDDINGS, "input"), (SEARCH, "query")])
def test_the_part_that_is_cut_off_is_text_too(version, path, field):
    """Cohere's answer repeats the whole text, and half a surrogate pair cannot be written."""
    long = "array " * 20_000
    body = json.dumps({field: [long + "\ud800"], "truncate": "END" if path == COHERE else True})
    bad = post(version, path, body)
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, field), bad.text
    assert "not valid Unicode" in bad.json()["error"]["message"]


def test_the_server_cuts_by_default_where_it_is_told_to(version, world):
    long = "array " * 500
    assert post(version, EMBEDDINGS, {"input": long}).status_code == 400
    found = vectors_of(post(version, EMBEDDINGS, {"input": long}, truncate=True))
    np.testing.assert_allclose(found, world.encoder.encode([long], "query"), atol=1e-5)
    assert post(version, EMBEDDINGS, {"input": long, "truncate": False}, truncate=True).status_code == 400


def test_token_ids_are_refused_unless_they_are_known_to_be_the_models_own(version, world):
    """Ids of OpenAI's tokenizer, which LangChain sends by default, would give vectors of other texts."""
    ids = version.info.tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]
    expected = world.encoder.encode(TEXTS[:1], "query")
    for given in (ids, [ids]):
        refused = post(version, EMBEDDINGS, {"input": given}).json()["error"]
        assert (refused["code"], refused["param"]) == ("token_ids_refused", "input")
        assert "check_embedding_ctx_length=False" in refused["message"]
        wrong = post(version, EMBEDDINGS, {"input": given, "fingerprint": "0" * 32})
        assert wrong.json()["error"]["code"] == "token_ids_refused"
        own = post(version, EMBEDDINGS, {"input": given, "fingerprint": world.encoder.fingerprint})
        np.testing.assert_allclose(vectors_of(own), expected, atol=1e-5)
        allowed = post(version, EMBEDDINGS, {"input": given}, accept_token_ids=True)
        np.testing.assert_allclose(vectors_of(allowed), expected, atol=1e-5)


def test_tokenize_counts_as_embeddings_do(version, world):
    for model, kind, limit in (("tiny", "query", 32), ("tiny-passage", "passage", 64)):
        body = {"prompt": TEXTS[3], "model": model}
        answer = post(version, "/tokenize", body).json()
        assert answer["tokens"] == world.encoder.tokenize([TEXTS[3]], kind)[0]
        assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), limit)
    assert post(version, "/tokenize", {"prompt": "array " * 500}).json()["count"] > 500
    for prompt, code in ((" ", "empty"), ("a" * 100_000, "context_length_exceeded")):
        assert post(version, "/tokenize", {"prompt": prompt}).json()["error"]["code"] == code
    surrogate = post(version, "/tokenize", rb'{"prompt": "\ud800"}')
    assert (surrogate.status_code, surrogate.json()["error"]["param"]) == (400, "prompt")


def test_paths_of_other_servers(version):
    health, info, embeddings = ask(
        version, ("GET", "/health", None), ("GET", "/info", None), ("POST", "/embeddings", {"input": "array"})
    )
    assert health.json() == {"status": "ok"}
    assert info.json()["model_id"] == "tiny"
    assert (info.json()["max_input_length"], info.json()["max_client_batch_size"]) == (64, 2048)
    assert embeddings.status_code == 200
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        assert post(version, path, {"query": "a"}).json()["error"]["code"] == "not_supported"


def test_head_is_answered_as_get_is_without_a_body(version):
    for path in ("/", "/docs", "/healthz", "/readyz", "/v1/models", "/info", "/metrics"):
        got, head = ask(version, ("GET", path, None), ("HEAD", path, None))
        assert (head.status_code, head.content) == (200, b""), path
        assert head.headers["content-type"] == got.headers["content-type"]


@pytest.mark.parametrize("field", ["topk", "filters", "input_type"])
def test_an_unknown_field_of_a_search_is_refused_by_name(version, field):
    answer = post(version, SEARCH, {"query": "array", field: 3})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, field, "unknown_field")
    assert f"{field!r} is no field of a search; it takes " in error["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (EMBEDDINGS, {"input": "a", "truncate": "yes"}),
        (EMBEDDINGS, {"input": "a", "timeout_s": "5"}),
        (SEARCH, {"query": "a", "with_text": 1}),
        (SEARCH, {"vector": ["1.0"], "fingerprint": "f"}),
        (SEARCH, {"vector": [True], "fingerprint": "f"}),
    ],
)
def test_values_of_another_type_are_refused(version, path, body):
    answer = post(version, path, body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_value")


def test_the_default_is_not_split(version, world):
    from readapt_ray.serving.versions import Routing

    versions = {"tiny": version, "other": LocalVersion.load(world, "other")}
    routing = Routing(default="tiny", split={"other": 1.0})
    for model, answers in (("default", "tiny"), (None, "other")):
        body = {"query": "array", "model": model}
        assert post(None, SEARCH, body, versions=versions, routing=routing).json()["model"] == answers


def test_what_cohere_calls_truncate_is_no_switch(version):
    error = post(version, "/v2/embed", {"texts": ["a"], "truncate": "START"}).json()["error"]
    assert error["message"] == "'truncate' must be 'END' or 'NONE'"
