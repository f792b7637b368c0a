"""Clients that people have already: OpenAI's own, and LangChain's on top of it."""

import hashlib

import numpy as np
import pytest

from readapt_ray.serving.keys import ApiKey
from tests.serving.conftest import LocalVersion, serving_at

TEXTS = ["array shape", "lock a thread", "write the file", "ünï ☃ 文書"]
SECRET = "a-secret-of-some-length"


@pytest.fixture(scope="module")
def url(world):
    keys = [ApiKey("alice", hashlib.sha256(SECRET.encode()).hexdigest())]
    with serving_at({"tiny": LocalVersion.load(world)}, keys=keys) as address:
        yield f"{address}/v1"


@pytest.fixture
def client(url):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=url, api_key=SECRET, max_retries=0) as client:
        yield client


@pytest.mark.parametrize("encoding_format", [None, "float", "base64"])
def test_openai_embeddings(client, world, encoding_format):
    given = {"encoding_format": encoding_format} if encoding_format else {}
    answer = client.embeddings.create(model="tiny", input=TEXTS, **given)
    expected = world.encoder.encode(TEXTS, "query")
    vectors = [each.embedding for each in answer.data]
    if encoding_format == "base64" and isinstance(vectors[0], str):
        import base64

        vectors = [np.frombuffer(base64.b64decode(each), "<f4") for each in vectors]
    np.testing.assert_allclose(np.array(vectors), expected, atol=1e-5)
    assert answer.usage.total_tokens == sum(map(len, world.encoder.tokenize(TEXTS, "query")))


def test_openai_options_and_our_own(client, world):
    answer = client.embeddings.create(
        model="default", input=TEXTS[0], dimensions=8, extra_body={"input_type": "passage"}, user="someone"
    )
    cut = world.encoder.encode(TEXTS[:1], "passage")[0, :8]
    np.testing.assert_allclose(answer.data[0].embedding, cut / np.linalg.norm(cut), atol=1e-5)


def test_openai_models_and_errors(client, url):
    import openai

    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "readapt_ray"
    with pytest.raises(openai.NotFoundError) as missing:
        client.embeddings.create(model="text-embedding-3-small", input="a")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as empty:
        client.embeddings.create(model="tiny", input="")
    assert empty.value.code == "empty"
    with (
        openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError) as refused,
    ):
        stranger.models.list()
    assert refused.value.code == "invalid_api_key"


def test_langchain_embeddings(url, world):
    langchain_openai = pytest.importorskip("langchain_openai")
    embeddings = langchain_openai.OpenAIEmbeddings(
        model="tiny", base_url=url, api_key=SECRET, check_embedding_ctx_length=False
    )
    expected = world.encoder.encode(TEXTS, "query")
    np.testing.assert_allclose(np.array(embeddings.embed_documents(TEXTS)), expected, atol=1e-5)
    np.testing.assert_allclose(embeddings.embed_query(TEXTS[1]), expected[1], atol=1e-5)
