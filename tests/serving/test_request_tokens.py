"""How much of a text is tokenised, where, and for how long."""

import asyncio
import threading
import time

import pytest

from readapt_ray.catalog.encoding import Encoding
from readapt_ray.retrieval.tokenization import TextTokenizer
from readapt_ray.serving import request_tokens, search_service
from readapt_ray.serving.request_tokens import InputTokenizer
from readapt_ray.serving.schema import RequestError
from tests.factories import encoder_tokenizer
from tests.serving.conftest import local_server

LIMIT = 32
MOST = request_tokens._CHARACTERS_PER_TOKEN * LIMIT + request_tokens._SPARE_CHARACTERS


@pytest.fixture(scope="module")
def bytewise(version) -> InputTokenizer:
    """Every byte is a token, or more than one is."""
    return InputTokenizer(version.info.tokenizer, version.info.encoding)


@pytest.fixture(scope="module")
def wordwise(version) -> InputTokenizer:
    """White space is none, and a word of more than 100 characters is one."""
    return InputTokenizer(encoder_tokenizer(), version.info.encoding)


def tokenize(tokenizer, given, kind="query", *, truncate=True) -> list[list[list[int]]]:
    return list(tokenizer.blocks(given, kind, param="input", truncate=truncate, max_inputs=2048))


def test_a_text_without_a_token_is_refused():
    encoding = Encoding(pooling="mean", add_bos=False, add_eos=False)
    for kind in ("query", "raw"):
        with pytest.raises(RequestError, match=r"'input\[1\]' has no token of this model") as caught:
            tokenize(InputTokenizer(encoder_tokenizer(), encoding), ["array", "\x07"], kind)
        assert caught.value.status == 400


BOTH = {
    "words": "array " * 5000,
    "no spaces": "文書の本文" * 5000,
    "white space": "a  b\n\n\tc" * 3000,
    "a gap": "array " * 100 + " " * 50_000 + "end",
    "words too long": ("x" * 150 + " array" * 20 + " ") * 500,
}


@pytest.mark.parametrize("kind", ["query", "passage"])
@pytest.mark.parametrize(
    ("which", "text"),
    [*(("bytewise", text) for text in (*BOTH.values(), "x" * 50_000)), *(("wordwise", text) for text in BOTH.values())],
    ids=[*(f"bytewise {name}" for name in (*BOTH, "one word")), *(f"wordwise {name}" for name in BOTH)],
)
def test_a_text_that_is_cut_first_gives_the_tokens_of_the_whole(which, kind, text, request):
    tokenizer = request.getfixturevalue(which)
    assert len(text) > MOST
    whole = tokenizer._truncating.ids([text, "array"], kind)
    assert len(whole[0]) == tokenizer._limits[kind]
    assert tokenize(tokenizer, [text, "array"], kind) == [whole]


def test_no_more_of_a_text_is_tokenised_than_can_matter(bytewise, monkeypatch):
    seen = []
    given_to = TextTokenizer.ids

    def ids(self, texts, *rest):
        seen.extend(map(len, texts))
        return given_to(self, texts, *rest)

    monkeypatch.setattr(TextTokenizer, "ids", ids)
    tokenize(bytewise, "array " * 100_000)
    tokenize(bytewise, [7] * 100_000)
    assert max(seen) <= MOST


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("array " * 100_000, "'input' has 600,000 characters; a query may have 32 tokens; shorten it, or send"),
        ([7] * 100_000, "'input' has 100,000 token ids; a query may have 32 tokens"),
        (["array", "x" * 100_000], r"'input\[1\]' has 100,000 characters"),
    ],
)
def test_what_can_be_no_text_within_the_limit_is_refused_as_it_is(bytewise, monkeypatch, given, message):
    monkeypatch.setattr(TextTokenizer, "ids", None)
    with pytest.raises(RequestError, match=message) as caught:
        tokenize(bytewise, given, truncate=False)
    assert caught.value.body["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("text", [" " * 100_000 + "array", "x" * 100_005])
def test_a_cut_that_might_change_a_token_is_refused_and_not_passed_over(wordwise, text):
    with pytest.raises(
        RequestError, match=r"'input' has 100,005 characters, and the first 5,120 make only [01] tokens"
    ):
        tokenize(wordwise, text)


def test_many_texts_go_in_blocks_and_keep_their_order_and_names(bytewise):
    texts = [f"array {number} " * 200 for number in range(300)]
    blocks = tokenize(bytewise, texts)
    assert len(blocks) > 2
    whole = bytewise._truncating.ids(texts, "query")
    assert [row for block in blocks for row in block] == whole
    with pytest.raises(RequestError, match=r"'input\[300\]' is empty"):
        tokenize(bytewise, [*texts, " "])


def test_short_texts_stay_on_the_event_loop_and_long_ones_have_threads_of_their_own(version, monkeypatch):
    threads = []
    rows = InputTokenizer._rows

    def noting(self, *given, **named):
        threads.append(threading.current_thread().name.rstrip("0123456789"))
        return rows(self, *given, **named)

    async def run():
        async with local_server({"tiny": version}, accept_token_ids=True) as server, server.client() as client:
            for given in ("array", [7, 8, 9], "array " * 5000, [7] * 30_000, [[7] * 15_000, [8] * 15_000]):
                body = {"input": given, "truncate": True}
                assert (await client.post("/v1/embeddings", json=body)).status_code == 200

    monkeypatch.setattr(InputTokenizer, "_rows", noting)
    asyncio.run(run())
    assert threads == ["MainThread"] * 2 + ["tokenize_"] * 3


def test_tokenising_ends_with_its_request(version, monkeypatch):
    begun = []
    rows = InputTokenizer._rows

    def slow(self, *given, **named):
        begun.append(time.monotonic())
        time.sleep(0.1)
        return rows(self, *given, **named)

    async def run():
        async with local_server({"tiny": version}) as server, server.client() as client:
            monkeypatch.setattr(InputTokenizer, "_rows", slow)
            body = {"input": ["array " * 50] * 200, "truncate": True, "timeout_s": 0.15}
            answer = await client.post("/v1/embeddings", json=body)
            assert answer.status_code == 504
            num_begun = len(begun)
            await asyncio.sleep(0.3)
            assert len(begun) <= num_begun + 1 < 20

    monkeypatch.setattr(request_tokens, "_BLOCK_CHARACTERS", 3000)
    monkeypatch.setattr(search_service, "_INLINE_CHARACTERS", 3000)
    asyncio.run(run())
