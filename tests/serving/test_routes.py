"""The server without Ray: guard, API, search service and batching over versions in this process."""

import asyncio
import base64
import functools
import gzip
import hashlib
import json
import threading

import httpx
import jsonschema
import numpy as np
import pytest
import torch

from readapt_ray.catalog.models import open_model
from readapt_ray.errors import FingerprintMismatchError
from readapt_ray.retrieval.encoder import Encoder
from readapt_ray.retrieval.exact import search_exact
from readapt_ray.serving.keys import ApiKey, KeyRing
from readapt_ray.serving.telemetry import Telemetry
from readapt_ray.serving.versions import PartsDownError, Routing
from tests.factories import small_corpus
from tests.serving import conftest
from tests.serving.conftest import LocalVersion, local_server, until

TEXTS = ["array shape", "lock a thread", "write the file", "ünï ☃ 文書"]
EMBEDDINGS, SEARCH = "/v1/embeddings", "/v1/search"


def ask(version, *calls, versions=None, **options):
    """The answers to calls (method, path, body), one after the other, of a server of its own."""

    async def run():
        to_client = {name: options.pop(name) for name in ("peer", "url", "headers") if name in options}
        async with (
            local_server(versions or {"tiny": version}, **options) as server,
            server.client(**to_client) as client,
        ):
            answers = []
            for method, path, body in calls:
                content = {"json": body} if isinstance(body, dict | list) else {"content": body}
                headers = {"content-type": "application/json"} if body is not None else {}
                answers.append(await client.request(method, path, headers=headers, **content))
            return answers

    return asyncio.run(run())


def post(version, path, body, **options) -> httpx.Response:
    return ask(version, ("POST", path, body), **options)[0]


def vectors_of(answer) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.array([each["embedding"] for each in answer.json()["data"]], np.float32)


@pytest.mark.parametrize("kind", ["query", "passage"])
def test_vectors_equal_the_encoders(version, world, kind):
    answer = post(version, EMBEDDINGS, {"input": TEXTS, "model": "tiny", "input_type": kind, "user": "someone"})
    expected = world.encoder.encode(TEXTS, kind)
    assert ((vectors_of(answer) * expected).sum(axis=1) > 0.9999).all()
    body = answer.json()
    assert (body["object"], body["model"], body["fingerprint"]) == ("list", "tiny", world.encoder.fingerprint)
    assert [each["index"] for each in body["data"]] == [0, 1, 2, 3]
    num_tokens = sum(map(len, world.encoder.tokenize(TEXTS, kind)))
    assert body["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}


def test_the_default_is_a_query_and_one_string_is_a_list_of_one(version, world):
    found = vectors_of(post(version, EMBEDDINGS, {"input": TEXTS[0]}))
    np.testing.assert_allclose(found, world.encoder.encode(TEXTS[:1], "query"), atol=1e-5)


def test_token_ids_take_the_same_road_as_their_text(version, world):
    ids = [version.info.tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    expected = world.encoder.encode(TEXTS, "query")
    for given, wanted in ((ids, expected), (ids[1], expected[1:2])):
        answer = post(version, EMBEDDINGS, {"input": given}, accept_token_ids=True)
        np.testing.assert_allclose(vectors_of(answer), wanted, atol=1e-5)


def test_base64_holds_the_same_numbers(version):
    as_floats = vectors_of(post(version, EMBEDDINGS, {"input": TEXTS}))
    answer = post(version, EMBEDDINGS, {"input": TEXTS, "encoding_format": "base64"}).json()
    decoded = [np.frombuffer(base64.b64decode(each["embedding"]), "<f4") for each in answer["data"]]
    np.testing.assert_array_equal(np.stack(decoded), as_floats)


def test_a_format_of_null_is_none_given(version):
    as_floats = vectors_of(post(version, EMBEDDINGS, {"input": TEXTS}))
    answer = post(version, EMBEDDINGS, {"input": TEXTS, "encoding_format": None})
    np.testing.assert_array_equal(vectors_of(answer), as_floats)


def test_fewer_dimensions_are_cut_and_brought_to_length_one(version, world):
    found = vectors_of(post(version, EMBEDDINGS, {"input": TEXTS, "dimensions": 5}))
    cut = world.encoder.encode(TEXTS, "query")[:, :5]
    np.testing.assert_allclose(found, cut / np.linalg.norm(cut, axis=1, keepdims=True), atol=1e-5)


def test_a_long_text_is_cut_when_asked_to(version, world):
    long = "array " * 500
    found = vectors_of(post(version, EMBEDDINGS, {"input": long, "truncate": True}))
    np.testing.assert_allclose(found, world.encoder.encode([long], "query"), atol=1e-5)


def exact(world, queries, top_k, keep=lambda _: True):
    passages = [each for each in small_corpus(40) if keep(each.doc_id)]
    vectors = world.encoder.encode([each.text for each in passages], "passage", [each.title for each in passages])
    return search_exact(queries, [([each.doc_id for each in passages], vectors)], top_k)


def test_search_equals_exact_search(version, world):
    expected = exact(world, world.encoder.encode(TEXTS, "query"), 7)
    answer = post(version, SEARCH, {"query": TEXTS, "top_k": 7})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert (body["fingerprint"], body["partial"], body["missing"]) == (version.info.fingerprint, False, [])
    texts = {each.doc_id: each for each in small_corpus(40)}
    for index, result in enumerate(body["data"]):
        hits = result["hits"]
        assert [hit["doc_id"] for hit in hits] == expected.doc_ids[index].tolist()
        np.testing.assert_allclose([hit["score"] for hit in hits], expected.scores[index], atol=1e-5)
        assert [hit["rank"] for hit in hits] == list(range(1, 8))
        assert all((hit["title"], hit["text"]) == texts[hit["doc_id"]][1:3] for hit in hits)
    for part in ("queue;dur=", "encode;dur=", "search;dur="):
        assert part in answer.headers["server-timing"]


def test_vectors_are_searched_where_they_belong_and_nowhere_else(version, world):
    vector = world.encoder.encode(TEXTS[:1], "query")
    body = {"vector": vector[0].tolist(), "fingerprint": world.encoder.fingerprint, "top_k": 5}
    [result] = post(version, SEARCH, body).json()["data"]
    assert [hit["doc_id"] for hit in result["hits"]] == exact(world, vector, 5).doc_ids[0].tolist()
    other = LocalVersion.load(world, "other")
    both = {"tiny": version, "other": other}
    answer = post(None, SEARCH, body | {"model": "other"}, versions=both)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "fingerprint_mismatch")
    assert post(None, SEARCH, body | {"fingerprint": "0" * 32}, versions=both).status_code == 400
    theirs = body | {"fingerprint": other.info.encoder_fingerprint}
    assert post(None, SEARCH, theirs, versions=both).json()["model"] == "other"


def test_filters_by_doc_id(version, world):
    query = world.encoder.encode(TEXTS[:1], "query")
    for wanted, keep in (
        ({"doc_id_prefix": "d0001"}, lambda doc_id: doc_id.startswith("d0001")),
        ({"doc_ids": ["d00003", "d00031", "absent"]}, {"d00003", "d00031"}.__contains__),
    ):
        [result] = post(version, SEARCH, {"query": TEXTS[0], "top_k": 6} | wanted).json()["data"]
        expected = exact(world, query, 6, keep).of_query(0, "")
        assert [hit["doc_id"] for hit in result["hits"]] == [doc.doc_id for doc in expected]


def test_texts_only_where_they_are_wanted(version):
    [result] = post(version, SEARCH, {"query": "array", "top_k": 1000, "with_text": False}).json()["data"]
    assert len({hit["doc_id"] for hit in result["hits"]}) == 40
    assert {hit["text"] for hit in result["hits"]} == {None}


def test_many_clients_at_once_get_their_own_answers_in_shared_batches(fresh, world):
    texts = [f"array number {number}" for number in range(60)]
    expected = world.encoder.encode(texts, "query")
    fresh.delay_s = 0.05

    async def run():
        async with local_server({"tiny": fresh}) as server, server.client() as client:
            bodies = [{"input": texts[number : number + 1 + number % 3]} for number in range(60)]
            return await asyncio.gather(*(client.post(EMBEDDINGS, json=body) for body in bodies))

    found = np.stack([vectors_of(answer)[0] for answer in asyncio.run(run())])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert len(fresh.encoded) < 20


def test_models_and_health(version, world):
    versions = {"other": LocalVersion.load(world, "other"), "tiny": version}
    models, one, none, alive, ready = ask(
        None,
        *(("GET", path, None) for path in ("/v1/models", "/v1/models/tiny", "/v1/models/x", "/healthz", "/readyz")),
        versions=versions,
        routing=Routing(default="tiny"),
    )
    assert [(each["id"], each["default"], each["object"]) for each in models.json()["data"]] == [
        ("tiny", True, "model"),
        *((f"tiny{suffix}", False, "model") for suffix in ("-passage", "-raw")),
        *((f"other{suffix}", False, "model") for suffix in ("", "-passage", "-raw")),
    ]
    assert models.json()["data"][0] == one.json()
    assert one.json()["encoder_fingerprint"] == world.encoder.fingerprint
    assert one.json()["num_vectors"] == 40
    assert (none.status_code, none.json()["error"]["code"]) == (404, "model_not_found")
    assert (alive.status_code, alive.json()) == (200, {"status": "ok"})
    assert ready.status_code == 200
    assert ready.json()["versions"]["tiny"]["num_vectors"] == 40


def test_readiness_tells_the_truth_and_liveness_is_another_thing(fresh):
    fresh.broken = "CUDA error at /secret/path"
    ready, alive = ask(fresh, ("GET", "/readyz", None), ("GET", "/healthz", None))
    assert (ready.status_code, ready.json()["ready"]) == (503, False)
    assert "secret" not in ready.text
    assert alive.status_code == 200


def test_a_failure_says_nothing_of_the_server(fresh):
    fresh.broken = "OSError: /secret/path is gone"
    answer = post(fresh, EMBEDDINGS, {"input": "a"})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (500, "server_error")
    assert error["message"].startswith("internal error; the server's log has it under ")
    assert "secret" not in answer.text


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_vectors_that_are_no_numbers_are_a_failure_and_counted(fresh, monkeypatch, number):
    counted = []
    encode = fresh.encode

    async def overflowing(rows):
        vectors = await encode(rows)
        vectors[[len(row) > 20 for row in rows], 3] = number
        return vectors

    fresh.encode = overflowing
    monkeypatch.setattr(Telemetry, "not_finite", lambda self, *values: counted.append(values))
    texts = ["array", "array " * 50, "lock"]
    for path, body in ((EMBEDDINGS, {"input": texts, "truncate": True}), (SEARCH, {"query": texts})):
        answer = post(fresh, path, body)
        error = answer.json()["error"]
        assert (answer.status_code, error["type"], error["code"]) == (500, "server_error", "not_finite")
        assert "NaN or infinity for 1 of 3 texts, the first at place 1;" in error["message"]
    assert counted == [("tiny", 1)] * 2
    assert post(fresh, EMBEDDINGS, {"input": "array"}).status_code == 200


@pytest.mark.parametrize("position", range(3))
def test_a_text_that_overflows_fails_its_own_request_only(fresh, world, position):
    """Requests that wait together are one batch, in the packed layout that is served."""

    async def run():
        fresh.encoder = Encoder.load(open_model(str(world.folder / "retriever")), packed=True)
        words = ["array", "lock", "file"]
        rows = [fresh.encoder.tokenize([each], "query")[0] for each in words]
        own = next(token for token in rows[position] if all(token not in row for row in rows if row != rows[position]))
        clean = fresh.encoder.encode(words, "query")
        with torch.no_grad():
            fresh.encoder.network.get_input_embeddings().weight[own] = torch.inf
        async with local_server({"tiny": fresh}, batch_wait_s=0.5) as server, server.client() as client:
            answers = await asyncio.gather(*(client.post(EMBEDDINGS, json={"input": each}) for each in words))
        return clean, answers

    clean, answers = asyncio.run(run())
    assert max(map(len, fresh.encoded)) == 3
    expected = [500 if number == position else 200 for number in range(3)]
    assert [answer.status_code for answer in answers] == expected
    error = answers[position].json()["error"]
    assert error["code"] == "not_finite" and "the first at place 0" in error["message"]
    assert "bfloat16 or float32" in error["message"]
    for number in {0, 1, 2} - {position}:
        np.testing.assert_allclose(vectors_of(answers[number])[0], clean[number], atol=1e-6)


def test_texts_of_another_corpus_at_the_same_place_are_not_served(version, world):
    other = LocalVersion.load(world, "other", corpus_fingerprint="0" * 32)

    async def run():
        async with local_server({"tiny": version}) as server, server.client() as client:
            with pytest.raises(FingerprintMismatchError, match="0 is meant: it was made again"):
                await server.service.set_state({"other": other}, Routing(default="other"))
            assert (await client.post(SEARCH, json={"query": "array"})).status_code == 200
            await server.service.set_state({"tiny": version, "other": other}, Routing(default="tiny"))
            assert (await client.post(SEARCH, json={"query": "array"})).status_code == 200
            refused = await client.post(SEARCH, json={"query": "array", "model": "other"})
            assert refused.status_code == 503 and "0 is meant: it was made again" in refused.text

    asyncio.run(run())


@pytest.mark.parametrize(
    ("path", "body", "expected", "message"),
    [
        (EMBEDDINGS, {"input": ""}, (400, "input", "empty"), "'input' is empty"),
        (EMBEDDINGS, {"input": ["a", " \n"]}, (400, "input", "empty"), "'input[1]' is empty"),
        (EMBEDDINGS, {"input": []}, (400, "input", "invalid_value"), "1 to 2,048 strings"),
        (EMBEDDINGS, {"input": ["a"] * 2049}, (400, "input", "invalid_value"), "1 to 2,048 strings"),
        (EMBEDDINGS, {"input": 7}, (400, "input", "invalid_value"), "must be a string, or a list"),
        (EMBEDDINGS, {"input": [1, "a"]}, (400, "input", "invalid_value"), "must be a string, or a list"),
        (EMBEDDINGS, {"input": [[]]}, (400, "input", "invalid_value"), "must be a string, or a list"),
        (EMBEDDINGS, {"input": [-1]}, (400, "input", "invalid_value"), "must be a string, or a list"),
        (EMBEDDINGS, {"input": [7, 99999]}, (400, "input", "invalid_value"), "has the token id 99999"),
        (EMBEDDINGS, {"input": [1]}, (400, "input", "empty"), "'input' is empty"),
        (EMBEDDINGS, {"input": None}, (400, "input", "invalid_value"), "must be a string, or a list"),
        (EMBEDDINGS, {"input": ["a", None]}, (400, "input", "invalid_value"), "must be a string, or a list"),
        (EMBEDDINGS, {"input": "array " * 500}, (400, "input", "context_length_exceeded"), "a query may have 32"),
        (EMBEDDINGS, {"input": "\ud800"}, (400, "input", "invalid_value"), "not valid Unicode"),
        (EMBEDDINGS, {"input": "a " * 200_000}, (413, None, "body_too_large"), "over 200,000 bytes"),
        (
            EMBEDDINGS,
            {"input": "a", "encoding_format": "int8"},
            (400, "encoding_format", "invalid_value"),
            "'float' or",
        ),
        (EMBEDDINGS, {"input": "a", "input_type": "doc"}, (400, "input_type", "invalid_value"), "or 'raw'"),
        (EMBEDDINGS, {"input": "a", "dimensions": 33}, (400, "dimensions", "invalid_value"), "'dimensions' is 33"),
        (EMBEDDINGS, {"input": "a", "dimensions": 0}, (400, "dimensions", "invalid_value"), "whole number from 1"),
        (EMBEDDINGS, {"input": "a", "model": "other"}, (404, "model", "model_not_found"), "this server has 'tiny'"),
        (EMBEDDINGS, {"input": "a", "timeout_s": 0}, (400, "timeout_s", "invalid_value"), "over 0"),
        (EMBEDDINGS, {}, (400, "input", "missing_required_parameter"), "'input' is required"),
        (EMBEDDINGS, [1], (400, None, None), "must be a JSON object"),
        (SEARCH, {"query": ""}, (400, "query", "empty"), "'query' is empty"),
        (SEARCH, {"query": "a", "top_k": 0}, (400, "top_k", "invalid_value"), "from 1 to 1,000"),
        (SEARCH, {"query": "a", "top_k": "many"}, (400, "top_k", "invalid_value"), "from 1 to 1,000"),
        (SEARCH, {"query": "a", "top_k": 1001}, (400, "top_k", "invalid_value"), "from 1 to 1,000"),
        (SEARCH, {"query": ["a"] * 51, "top_k": 1000}, (400, None, "invalid_value"), "ask for 51,000 passages"),
        (SEARCH, {"query": "a" * 500, "truncate": False}, (400, "query", "context_length_exceeded"), "may have 32"),
        (SEARCH, {"top_k": 3}, (400, None, "invalid_value"), "give either 'query' or 'vector'"),
        (SEARCH, {"query": "a", "vector": [1.0], "fingerprint": "f"}, (400, None, "invalid_value"), "give either"),
        (SEARCH, {"vector": [1.0]}, (400, None, "invalid_value"), "needs the 'fingerprint'"),
        (SEARCH, {"vector": [1.0], "fingerprint": "f"}, (400, "fingerprint", "fingerprint_mismatch"), "not made by"),
        (SEARCH, {"query": "a", "doc_ids": ["a"], "doc_id_prefix": "b"}, (400, None, "invalid_value"), "not both"),
        (SEARCH, {"query": "a", "doc_ids": []}, (400, "doc_ids", "invalid_value"), "1 to 10,000"),
        ("/v1/rerank", {"query": "a"}, (404, None, "not_supported"), "does not rerank"),
    ],
)
def test_a_bad_request_is_an_openai_error(version, path, body, expected, message):
    answer = post(version, path, json.dumps(body), accept_token_ids=True)
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (answer.status_code, error["param"], error["code"]) == expected, error
    assert error["type"] == "invalid_request_error"
    assert message in error["message"]
    assert len(error["message"]) < 300
    assert not any(part in answer.text for part in ("Traceback", "site-packages", "/tmp"))


def test_a_vector_of_the_wrong_size_or_beyond_float32_is_refused(version, world):
    for vector, message in (([1.0], "has 1 numbers"), ([1e300] * 32, "beyond float32")):
        answer = post(version, SEARCH, {"vector": vector, "fingerprint": world.encoder.fingerprint})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "vector")
        assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'"text"', b"null", b"[" * 5000])
def test_what_is_not_a_json_object_is_refused(version, content):
    answer = post(version, EMBEDDINGS, content)
    assert answer.status_code == 400
    assert "JSON object" in answer.json()["error"]["message"]


def test_an_unknown_path_and_a_wrong_method_are_openai_errors(version):
    answers = ask(version, ("GET", "/v1/nothing", None), ("GET", EMBEDDINGS, None))
    assert [answer.status_code for answer in answers] == [404, 405]
    assert {answer.json()["error"]["type"] for answer in answers} == {"invalid_request_error"}


def test_a_body_without_a_length_is_stopped_at_the_limit(version):
    async def body(num_chunks):
        for _ in range(num_chunks):
            yield b"x" * 10_000

    async def run():
        async with local_server({"tiny": version}, max_body_bytes=50_000) as server, server.client() as client:
            return [await client.post(EMBEDDINGS, content=body(num_chunks)) for num_chunks in (5, 6)]

    # Five chunks are within the limit, though no JSON.
    assert [answer.status_code for answer in asyncio.run(run())] == [400, 413]


def test_too_many_requests_and_tokens_get_429_and_say_when_to_come_back(fresh):
    fresh.delay_s = 0.2

    async def run(**limits):
        async with local_server({"tiny": fresh}, **limits) as server, server.client() as client:
            answers = await asyncio.gather(*(client.post(EMBEDDINGS, json={"input": ["a"] * 200}) for _ in range(8)))
            after = await client.post(EMBEDDINGS, json={"input": "a"})
            return answers, after

    for limits, code in (({"max_requests": 3}, "too_many_requests"), ({"max_queued_tokens": 3000}, "queue_full")):
        answers, after = asyncio.run(run(**limits))
        assert {answer.status_code for answer in answers} == {200, 429}
        for answer in answers:
            if answer.status_code == 429:
                error = answer.json()["error"]
                assert (error["type"], error["code"]) == ("rate_limit_error", code)
                assert int(answer.headers["retry-after"]) >= 1
        assert after.status_code == 200


def test_a_deadline_ends_a_request_and_its_work(fresh):
    async def run():
        async with local_server({"tiny": fresh}) as server, server.client() as client:
            fresh.gate = asyncio.Event()
            running = asyncio.create_task(client.post(EMBEDDINGS, json={"input": "first"}))
            await until(lambda: fresh.encoded)
            late = await client.post(EMBEDDINGS, json={"input": "late", "timeout_s": 0.05})
            fresh.gate.set()
            return await running, late

    first, late = asyncio.run(run())
    assert first.status_code == 200
    assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert len(fresh.encoded) == 1


SECRET = "a-secret-of-some-length"
KEYS = (
    ApiKey("alice", hashlib.sha256(SECRET.encode()).hexdigest(), requests_per_minute=12),
    ApiKey("bob", hashlib.sha256(SECRET.upper().encode()).hexdigest()),
)


def test_with_keys_nobody_else_is_answered_and_health_is_open(version):
    elsewhere = {"keys": KEYS, "peer": ("203.0.113.9", 1), "url": "http://search.example"}
    calls = [("GET", "/v1/models", None), ("GET", "/metrics", None), ("POST", SEARCH, {"query": "array"})]
    for header in ({}, {"authorization": "Bearer wrong"}):
        for answer in ask(version, *calls, headers=header, **elsewhere):
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
    good = {"authorization": f"Bearer {SECRET.upper()}"}
    assert {answer.status_code for answer in ask(version, *calls, headers=good, **elsewhere)} == {200}
    opened = ask(version, *(("GET", path, None) for path in ("/", "/healthz", "/readyz", "/openapi.json")), **elsewhere)
    assert {answer.status_code for answer in opened} == {200}


def test_a_key_over_its_rate_gets_429(version, monkeypatch):
    monkeypatch.setattr(conftest, "KeyRing", functools.partial(KeyRing, clock=lambda: 0.0))
    header = {"authorization": f"Bearer {SECRET}"}
    answers = ask(version, *[("GET", "/v1/models", None)] * 4, keys=KEYS, headers=header)
    assert [answer.status_code for answer in answers] == [200, 200, 429, 429]
    assert answers[-1].headers["retry-after"] == "5"


@pytest.mark.parametrize(
    ("peer", "url", "status"),
    [
        ("127.0.0.1", "http://localhost", 200),
        ("127.0.0.1", "http://127.0.0.1:8000", 200),
        ("::1", "http://[::1]:8000", 200),
        ("203.0.113.9", "http://127.0.0.1", 403),
        ("127.0.0.1", "http://rebound.example", 403),
    ],
)
def test_without_keys_only_this_machine_is_answered(version, peer, url, status):
    [answer] = ask(version, ("GET", "/v1/models", None), peer=(peer, 1), url=url)
    assert answer.status_code == status
    [anyhow] = ask(version, ("GET", "/v1/models", None), peer=(peer, 1), url=url, allow_anonymous=True)
    assert anyhow.status_code == 200


@pytest.mark.parametrize(
    ("forwarded", "status"),
    [
        ("for=127.0.0.1;proto=http", 200),
        ('for="[::1]:4711", for=127.0.0.1:80', 200),
        ("for=203.0.113.9", 403),
        ('For="[2001:db8::7]:4711"', 403),
        ("for=127.0.0.1, for=203.0.113.9;by=127.0.0.1", 403),
        ("for=_hidden", 403),
    ],
)
def test_a_proxy_on_this_machine_says_for_whom_it_asks(version, forwarded, status):
    [answer] = ask(version, ("GET", "/v1/models", None), headers={"forwarded": forwarded})
    assert answer.status_code == status


def test_without_keys_nobody_is_answered_who_may_come_from_anywhere(version):
    [answer] = ask(version, ("GET", "/v1/models", None), sees_clients=False)
    assert answer.status_code == 403
    [anyhow] = ask(version, ("GET", "/v1/models", None), sees_clients=False, allow_anonymous=True)
    assert anyhow.status_code == 200


def test_the_document_of_the_api_says_what_is_answered(version):
    [answer] = ask(version, ("GET", "/openapi.json", None))
    document = answer.json()
    answers = {status for path in document["paths"].values() for each in path.values() for status in each["responses"]}
    assert "400" in answers and "422" not in answers and "ValidationError" not in answer.text


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("EmbeddingsRequest", {"input": ""}),
        ("EmbeddingsRequest", {"input": ["a", " \x1d"]}),
        ("EmbedRequest", {"texts": ["a", "\x85"]}),
        ("TokenizeRequest", {"prompt": " "}),
        ("SearchRequest", {}),
        ("SearchRequest", {"query": None}),
        ("SearchRequest", {"query": "a", "vector": [1.0], "fingerprint": "f"}),
        ("SearchRequest", {"vector": [1.0]}),
        ("SearchRequest", {"vector": [1.0], "fingerprint": None}),
        ("SearchRequest", {"vector": [1.0], "fingerprint": "f", "mode": "bm25"}),
        ("SearchRequest", {"vector": [1.0], "fingerprint": "f", "knowledge_scale": 0.5}),
        ("SearchRequest", {"query": "a", "doc_ids": ["a"], "doc_id_prefix": "a"}),
        ("SearchRequest", {"query": "a", "filter": {"year": {}}}),
        ("SearchRequest", {"query": "a", "filter": {"year": {"gt": None}}}),
    ],
)
def test_what_the_document_refuses_the_server_refuses(version, name, body):
    document = ask(version, ("GET", "/openapi.json", None))[0].json()
    check = jsonschema.Draft202012Validator(document | {"$ref": f"#/components/schemas/{name}"})
    assert not check.is_valid(body)
    paths = {"EmbeddingsRequest": "/v1/embeddings", "EmbedRequest": "/v2/embed", "TokenizeRequest": "/tokenize"}
    [answer] = ask(version, ("POST", paths.get(name, SEARCH), body))
    assert answer.status_code == 400
    good = {"vector": [1.0], "fingerprint": "f", "doc_ids": ["a"], "doc_id_prefix": None, "query": None}
    nulls = dict.fromkeys(("mode", "top_k", "with_text", "truncate", "knowledge_scale"))
    assert name != "SearchRequest" or (check.is_valid(good) and check.is_valid(good | nulls))
    assert name != "EmbeddingsRequest" or check.is_valid({"input": ["a"], "dimensions": None})


def test_a_null_is_as_if_it_were_left_out(version):
    nulls = dict.fromkeys(("mode", "top_k", "with_text", "truncate", "filter", "user", "timeout_s", "model"))
    null, omitted = ask(version, ("POST", SEARCH, {"query": "array"} | nulls), ("POST", SEARCH, {"query": "array"}))
    assert null.json() == omitted.json() and len(null.json()["data"][0]["hits"]) == 10
    nulls = dict.fromkeys(("model", "input_type", "truncate", "embedding_types", "output_dimension"))
    null, omitted = ask(version, *(("POST", "/v2/embed", {"texts": ["a"]} | each) for each in (nulls, {})))
    assert null.json()["embeddings"] == omitted.json()["embeddings"]


def test_a_search_that_is_late_says_what_does_not_work(fresh):
    """The index does not answer; only what the search asked of it is looked at, and nobody polled /readyz."""

    async def never(*_):
        await asyncio.Event().wait()

    async def check():
        raise PartsDownError({"index-1": "ArtifactMissingError: 'cisi-sh' does not exist"})

    fresh.search, working = never, fresh.check
    fresh.check = check
    body = {"query": "array", "timeout_s": 0.2}
    [down] = ask(fresh, ("POST", SEARCH, body))
    fresh.check = working
    [slow] = ask(fresh, ("POST", SEARCH, body))
    assert (down.status_code, slow.status_code) == (504, 504)
    assert down.json()["error"]["message"] == (
        "no answer within 0.2 s; version 'tiny' is not working: index-1 (ArtifactMissingError: 'cisi-sh' does not exist)"
    )
    assert "; send fewer texts at a time, or start the server" in slow.json()["error"]["message"]


def test_tokenize_waits_for_no_passages_and_has_a_deadline(fresh):
    """Its threads are its own: those that read passages are all busy."""
    busy = threading.Event()

    async def run():
        async with local_server({"tiny": fresh}) as server, server.client() as client:
            blocked = [asyncio.create_task(asyncio.to_thread(busy.wait, 300)) for _ in range(64)]
            await asyncio.sleep(0.1)
            body = {"prompt": "array"}
            made = await asyncio.wait_for(client.post("/tokenize", json=body), 200)
            for _ in range(2):
                server.service._tokenizing.submit(busy.wait, 300)
            late = await client.post("/tokenize", json=body | {"timeout_s": 0.1})
            busy.set()
            await asyncio.gather(*blocked)
            return made, late

    made, late = asyncio.run(run())
    assert made.status_code == 200
    assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")


def test_a_web_page_cannot_post_without_saying_json(version):
    async def run():
        async with local_server({"tiny": version}) as server, server.client() as client:
            return await client.post(EMBEDDINGS, content=b'{"input": "a"}', headers={"content-type": "text/plain"})

    assert asyncio.run(run()).status_code == 400


def test_a_compressed_body_is_refused_with_the_reason(version):
    async def run():
        async with local_server({"tiny": version}) as server, server.client() as client:
            headers = {"content-encoding": "gzip", "content-type": "application/json"}
            return await client.post(SEARCH, content=gzip.compress(b'{"query": "array"}'), headers=headers)

    answer = asyncio.run(run())
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_encoding")
