"""Requests that nobody would think of, made from the API's own document."""

import pytest

from tests.serving.conftest import LocalVersion, serving_at

pytestmark = pytest.mark.slow

schemathesis = pytest.importorskip("schemathesis")


@pytest.fixture(scope="module")
def url(world):
    with serving_at({"tiny": LocalVersion.load(world)}) as address:
        yield address


@pytest.fixture(scope="module")
def api(url):
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


schema = schemathesis.pytest.from_fixture("api")


@schema.parametrize()
def test_no_request_is_a_failure_of_the_server(case):
    answer = case.call()
    assert answer.status_code < 500, answer.text
    case.validate_response(answer, checks=[schemathesis.checks.not_a_server_error])
    if answer.status_code >= 400:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
