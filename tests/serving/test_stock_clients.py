"""Clients that people have already index a whole collection, with their defaults but for one documented line.

Those that are not in the environment of the tests may be in another: $READAPT_CLIENTS_PYTHON is its Python.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.data import collection
from tests.serving.conftest import LocalVersion, serving_at

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

CLIENTS = {
    "langchain_openai": """
from langchain_openai import OpenAIEmbeddings
server = {"base_url": url, "api_key": "none", "check_embedding_ctx_length": False}
vectors = OpenAIEmbeddings(model="default-passage", chunk_size=100, **server).embed_documents(passages)
queries = [OpenAIEmbeddings(model="default", **server).embed_query(query) for query in queries]
""",
    "llama_index.embeddings.openai_like": """
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
server = {"api_base": url, "api_key": "none"}
vectors = OpenAILikeEmbedding(model_name="default-passage", **server).get_text_embedding_batch(passages)
queries = [OpenAILikeEmbedding(model_name="default", **server).get_query_embedding(query) for query in queries]
""",
    "litellm": """
import litellm
server = {"api_base": url, "api_key": "none", "encoding_format": "float"}
def embed(model, texts):
    answer = litellm.embedding(model=f"openai/{model}", input=texts, **server)
    return [each["embedding"] for each in answer.data]
vectors = [vector for first in range(0, len(passages), 100) for vector in embed("default-passage", passages[first : first + 100])]
queries = embed("default", queries)
""",
}
SCRIPT = """
import json, sys
url, passages, queries = json.load(sys.stdin)
{client}
json.dump([vectors, queries], open(sys.argv[1], "w"))
"""


@pytest.fixture(scope="module")
def texts():
    folder = collection("cranfield")
    read = {}
    for name in ("corpus", "queries"):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        read[name] = [row["text"] or row.get("title") or "-" for row in rows]
    return read["corpus"], read["queries"][:20]


@pytest.fixture(scope="module")
def url(world):
    """The address of a server that cuts long texts."""
    with serving_at({"tiny": LocalVersion.load(world)}, truncate=True, timeout_s=300.0) as address:
        yield f"{address}/v1"


@pytest.mark.parametrize("client", list(CLIENTS))
def test_a_client_indexes_a_collection_and_searches_it(client, url, texts, world, tmp_path):
    python = (
        sys.executable if client == "langchain_openai" else os.environ.get("READAPT_CLIENTS_PYTHON", sys.executable)
    )
    if subprocess.run([python, "-c", f"import {client}"], capture_output=True, check=False).returncode:
        pytest.skip(f"{client} is not installed for {python}; READAPT_CLIENTS_PYTHON names another Python")
    passages, queries = texts
    script = SCRIPT.format(client=CLIENTS[client])
    given = json.dumps([url, passages, queries]).encode()
    subprocess.run([python, "-c", script, str(tmp_path / "out.json")], input=given, check=True)
    vectors, asked = (np.array(each) for each in json.loads((tmp_path / "out.json").read_text()))
    assert vectors.shape == (len(passages), world.encoder.dimension)
    sample = list(range(0, len(passages), 50))
    own = world.encoder.encode([passages[row] for row in sample], "passage")
    np.testing.assert_allclose(vectors[sample], own, atol=1e-4)
    best = np.argsort(-(asked @ vectors.T), axis=1)[:, :10]
    due = np.argsort(-(world.encoder.encode(queries, "query") @ vectors.T), axis=1)[:, :10]
    assert np.mean([len(set(mine) & set(its)) for mine, its in zip(best, due, strict=True)]) > 9.9
