"""An OpenAI-compatible endpoint whose answers are odd, that limits the rate, or that refuses options."""

import email.utils
import json
import threading
import time

import pytest

from readapt_ray.errors import InputError, WorkerError
from readapt_ray.synthesis import endpoint
from readapt_ray.synthesis.answers import Ask
from readapt_ray.synthesis.endpoint import EndpointWriter
from readapt_ray.synthesis.token_budget import TokenBudget
from tests.chat_endpoint import chat_endpoint

ASKS = [Ask(number, f"passage {number} ".ljust(80, "p")) for number in range(6)]


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(endpoint, "_MAX_RETRIES", 0)
    monkeypatch.setattr(endpoint, "_RATE_WAITS_S", (0.01,) * 5)
    with chat_endpoint() as made:
        yield made


def asked(server, asks=ASKS[:1], budget=None, num_at_once=2):
    writer = EndpointWriter(server.url, "writer", timeout_s=30, num_at_once=num_at_once)
    given = {"temperature": 0.5, "max_tokens": 8, "seed": 3}
    return {ask.number: answer for ask, answer in writer.answers(asks, budget or TokenBudget(None), **given)}


def completion(content, usage):
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": content}}], "usage": usage}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "what is "}, {"type": "text", "text": "asked"}], "what is asked"),
        ([{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "why"}], "why"),
        (["what", " now"], "what now"),
        (None, ""),
        ("half a pair \ud800 here", "half a pair ? here"),
    ],
)
def test_the_text_of_an_answer_is_found_in_every_form(server, content, text):
    server.answer = lambda *_: (200, completion(content, {"total_tokens": 7}))
    assert asked(server)[0] == (text, 7)


@pytest.mark.parametrize("content", [5, {"text": "what"}, True])
def test_an_answer_that_is_no_text_is_told_and_not_a_traceback(server, content):
    server.answer = lambda *_: (200, completion(content, {"total_tokens": 7}))
    with pytest.raises(InputError, match=r"gave no chat completion \(the content of its message is"):
        asked(server)


@pytest.mark.parametrize("count", ['"many"', "-5", "NaN", "1e400", "1" + "0" * 400, "null", "true", "0"])
def test_a_count_of_tokens_that_is_none_is_estimated(server, count):
    body = json.dumps(completion("what is it", {"total_tokens": 1})).replace(": 1}", f": {count}}}")
    server.answer = lambda *_: (200, body.encode())
    assert asked(server)[0] == ("what is it", (80 + 10) // 4)


def test_an_error_with_status_200_is_told_in_its_own_words(server):
    server.answer = lambda *_: (200, {"error": {"message": "no credits left", "code": 402}})
    with pytest.raises(InputError, match="no credits left"):
        asked(server)
    server.answer = lambda number, _: (
        (200, {"error": {"message": "slow down", "code": 429}}) if number < 4 else (200, "what is it")
    )
    server.requests.clear()
    assert asked(server)[0].text == "what is it" and len(server.requests) == 4
    server.answer = lambda *_: (200, {"error": {"message": "upstream is down", "code": 502}})
    with pytest.raises(WorkerError, match="upstream is down"):
        asked(server)


def test_an_endpoint_that_limits_the_rate_is_waited_for(server, caplog):
    server.retry_after = ""
    server.answer = lambda number, _: (429, {"error": {"message": "slow down"}}) if number % 3 else (200, "what is it")
    assert len(asked(server, ASKS, num_at_once=1)) == 6 and len(server.requests) == 18
    assert "limits the rate" in caplog.text and "slow down" in caplog.text


def test_it_is_waited_for_as_long_as_it_says(server, monkeypatch):
    date = email.utils.formatdate(time.time() + 1000, usegmt=True)
    for server.retry_after, wait_s in (("900", 900), (date, 1000)):
        server.answer = lambda *_: (429, {"error": {"message": "slow down"}})
        with pytest.raises(WorkerError, match=r"slow down, and asks to wait for (\d+|1,000) s") as caught:
            asked(server)
        told = int(str(caught.value).split("wait for ")[1].split(" s")[0].replace(",", ""))
        assert wait_s - 100 < told <= wait_s
    monkeypatch.setattr(endpoint, "_RATE_WAITS_S", (500.0,))
    server.retry_after = "0.02"  # not the 500 s
    server.requests.clear()
    server.answer = lambda number, _: (429, {}) if number == 1 else (200, "what is it")
    assert asked(server)[0].text == "what is it"


def test_no_quota_is_not_waited_for(server):
    server.answer = lambda *_: (429, {"error": {"message": "quota exceeded", "code": "insufficient_quota"}})
    with pytest.raises(InputError, match="quota exceeded"):
        asked(server)
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [408, 409])
def test_an_endpoint_that_is_late_is_no_fault_of_the_user(server, status):
    server.answer = lambda *_: (status, {"error": {"message": "timed out"}})
    with pytest.raises(WorkerError, match="run the same command again"):
        asked(server)


def test_options_that_a_model_does_not_take_are_left_out_or_renamed(server, caplog):
    """OpenAI's models that think first take neither max_tokens nor a temperature; Mistral's API takes no seed."""

    def answer(_, request):
        if "max_tokens" in request:
            message = "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead."
            return 400, {"error": {"message": message, "param": "max_tokens", "code": "unsupported_parameter"}}
        if "temperature" in request:
            message = "Unsupported value: 'temperature' does not support 0.5"
            return 400, {"error": {"message": message, "param": "temperature", "code": "unsupported_value"}}
        if "seed" in request:
            return 422, {"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"]}]}
        return 200, "what is it"

    server.answer = answer
    assert len(asked(server, ASKS)) == 6
    assert server.requests[-1].keys() == {"model", "messages", "max_completion_tokens"}
    assert server.requests[-1]["max_completion_tokens"] == 8
    assert "does not take temperature" in caplog.text and "does not take seed" in caplog.text
    server.answer = lambda *_: (400, {"error": {"message": "'messages' is too long", "param": "messages"}})
    with pytest.raises(InputError, match="'messages' is too long"):
        asked(server)
    server.answer = lambda *_: (403, b"<html>\n<p>this region is not served</p>")
    with pytest.raises(InputError, match="403 <html> <p>this region is not served</p>;"):
        asked(server)


def test_a_key_that_an_endpoint_repeats_is_not_told(server, monkeypatch):
    monkeypatch.setenv(endpoint.KEY_VARIABLE, "sk-secret\n")
    server.answer = lambda *_: (401, {"error": {"message": "Authentication Error: received sk-secret"}})
    with pytest.raises(InputError, match=r"received \$READAPT_ENDPOINT_KEY") as caught:
        asked(server)
    assert "sk-secret" not in str(caught.value) and server.keys == ["Bearer sk-secret"]


@pytest.mark.parametrize("key", ["sk-ä", "sk-a\nsk-b"])
def test_a_key_that_cannot_be_sent_is_told(server, monkeypatch, key):
    monkeypatch.setenv(endpoint.KEY_VARIABLE, key)
    with pytest.raises(InputError, match="READAPT_ENDPOINT_KEY has line breaks or characters that are not ASCII"):
        asked(server)


def test_answers_under_way_are_kept_when_another_request_fails(server):
    failed = threading.Event()

    def answer(_, request):
        if request["messages"][0]["content"].startswith("passage 1 "):
            failed.set()
            return 500, {"error": {"message": "out of order"}}
        failed.wait(10)
        return 200, "what is it"

    server.answer = answer
    writer = EndpointWriter(server.url, "writer", timeout_s=30, num_at_once=2)
    found = []
    with pytest.raises(WorkerError, match="also after retries; what was answered is kept"):
        for ask, _ in writer.answers(ASKS, TokenBudget(None), temperature=0.5, max_tokens=8, seed=3):
            found.append(ask.number)
    assert 0 in found and len(server.requests) < 6


def test_a_budget_counts_the_requests_under_way(server):
    """A request of 80 characters and 8 tokens of answer reserves 28 tokens, and then uses 100."""
    budget = TokenBudget(330, spent=100)
    assert len(asked(server, ASKS, budget, num_at_once=1)) == 3
    assert budget.spent == 400 and budget.is_exhausted
    cheap = TokenBudget(60)
    server.answer = lambda *_: (200, completion("what is it", {"total_tokens": 10}))
    assert len(asked(server, ASKS, cheap, num_at_once=6)) == 4  # 10 each; the fifth might take 28
    assert cheap.spent == 40


def test_a_budget_without_a_limit_only_counts(server):
    budget = TokenBudget(None)
    assert len(asked(server, ASKS, budget)) == 6
    assert budget.spent == 600 and not budget.is_exhausted
