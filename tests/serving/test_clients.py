"""Clients that people have already: OpenAI's own, and LangChain's on top of it."""

import base64
import hashlib
import re
import subprocess
from pathlib import Path

import httpx
import numpy as np
import pytest

from readapt_ray.serving import schema
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

    assert [model.id for model in client.models.list()] == ["tiny", "tiny-passage", "tiny-raw"]
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


README = Path(schema.__file__).parent / "README.md"
PASSAGE, QUESTION = "The moon pulls the water of the sea.", "what makes the tide"


@pytest.fixture(scope="module")
def open_url(world):
    """The address of a server without keys."""
    with serving_at({"tiny": LocalVersion.load(world)}) as address:
        yield address


def snippets(language: str, beginning: str, url: str) -> str:
    """The README's snippet that begins so, for the server at `url`."""
    found = re.findall(rf"```{language}\n({re.escape(beginning)}.*?)```", README.read_text(), re.DOTALL)
    assert len(found) == 1
    return found[0].replace("http://127.0.0.1:8000", url)


@pytest.mark.parametrize("client", ["openai", "langchain_openai", "llama_index.embeddings.openai_like"])
def test_the_snippets_of_the_readme_give_the_right_vectors(client, open_url, world):
    pytest.importorskip(client)
    names = {}
    exec(snippets("python", f"from {client} import", open_url), names)
    passage = world.encoder.encode([PASSAGE], "passage")[0]
    if "answer" in names:
        np.testing.assert_allclose(names["answer"].data[0].embedding, passage, atol=1e-5)
    else:
        np.testing.assert_allclose(names["vectors"][0], passage, atol=1e-5)
        np.testing.assert_allclose(names["vector"], world.encoder.encode([QUESTION], "query")[0], atol=1e-5)


def test_the_curl_commands_of_the_readme_are_answered(open_url):
    commands = snippets("bash", "curl http://127.0.0.1:8000/v1/embeddings", open_url)
    for command in re.split(r"\n(?=curl)", commands.strip()):
        subprocess.run(["bash", "-c", f"{command} --fail --silent --output /dev/null"], check=True)


def test_what_llama_index_and_litellm_send_is_answered(open_url, world):
    """The bodies of llama-index-embeddings-openai-like 0.4 and litellm 1.110 with their defaults."""
    expected = world.encoder.encode(TEXTS, "passage")
    for extra in ({"encoding_format": "base64"}, {"encoding_format": "float", "extra_body": {}, "user": None}, {}):
        body = {"input": TEXTS, "model": "tiny-passage"} | extra
        answer = httpx.post(f"{open_url}/v1/embeddings", json=body, timeout=60).json()
        vectors = [each["embedding"] for each in answer["data"]]
        if extra.get("encoding_format") == "base64":
            vectors = [np.frombuffer(base64.b64decode(each), "<f4") for each in vectors]
        np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_langchain_with_openais_token_ids_is_refused_and_told_what_to_do(open_url):
    openai = pytest.importorskip("openai")
    with (
        openai.OpenAI(base_url=f"{open_url}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"),
    ):
        client.embeddings.create(model="tiny", input=[[9906, 1917]])
