"""Requests that nobody would think of, made from the API's own document."""

import collections

import hypothesis
import pytest

from tests.serving.conftest import LocalVersion, serving_at

pytestmark = pytest.mark.slow

schemathesis = pytest.importorskip("schemathesis")


@pytest.fixture(scope="module")
def url(world):
    with serving_at({"tiny": LocalVersion.load(world)}) as address:
        yield address


def _of_state(error: dict) -> bool:
    """Whether the API's document cannot say that a request is refused: it depends on the model, the corpus or the options."""
    told = {"token_ids_refused", "context_length_exceeded", "fingerprint_mismatch"}
    fields = {"dimensions", "output_dimension", "knowledge_scale"}
    is_whole_number = error["param"] == "input"  # 1.0 is one to JSON Schema, and no token id
    return error["code"] in told or error["param"] in fields or "no column" in error["message"] or is_whole_number


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=str)
def test_no_request_is_a_failure_of_the_server(url, mode):
    asked = collections.Counter()
    for found in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations():
        operation = found.ok()
        if mode is schemathesis.GenerationMode.NEGATIVE and operation.method == "get":
            continue  # nothing can be wrong with it

        @hypothesis.settings(max_examples=200, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
        @hypothesis.given(operation.as_strategy(generation_mode=mode))
        def ask(case):
            answer = case.call()
            asked[case.path, answer.status_code] += 1
            if answer.status_code == 504:  # it had asked for an answer within so much time
                assert case.body["timeout_s"] < 1
            else:
                assert answer.status_code < 500, answer.text
            if answer.status_code >= 400:
                error = answer.json()["error"]
                assert set(error) == {"message", "type", "param", "code"}
                assert mode is schemathesis.GenerationMode.NEGATIVE or answer.status_code != 400 or _of_state(error), (
                    error
                )

        ask()
    assert {path for path, _ in asked} >= {"/v1/embeddings", "/v1/search"}
    assert 400 in {status for _, status in asked}
