"""A version whose passages another model encoded: behind a bridge, or with a model for queries alone."""

import asyncio

import httpx
import numpy as np
import pytest

from readapt_ray.catalog.models import open_model
from readapt_ray.errors import FingerprintMismatchError, InputError
from readapt_ray.retrieval.encoder import Encoder
from readapt_ray.retrieval.exact import search_exact
from readapt_ray.retrieval.query_encoder import describe_encoder
from readapt_ray.serving.app import check_version, version_spec
from readapt_ray.serving.options import VersionConfig
from readapt_ray.serving.server import stop
from readapt_ray.serving.workers import EncoderReplica
from tests.factories import small_corpus
from tests.serving.conftest import LocalVersion, started
from tests.serving.test_routes import EMBEDDINGS, TEXTS, ask, post


def _config(world, **changes):
    values = {**world.version(), "retriever": str(world.folder / "other"), "bridge": str(world.folder / "bridge")}
    return VersionConfig.parse(values | {"num_threads": 1} | changes)


def test_a_bridged_version_has_a_fingerprint_of_its_own(world, bridged):
    plain = _config(world, retriever=world.version()["retriever"], bridge=None)
    assert check_version("new", _config(world)) != check_version("old", plain)
    spec = version_spec("new", _config(world))
    new = open_model(str(world.folder / "other"))
    assert spec.encoder_fingerprint == describe_encoder(new, new.encoding, "float32")["fingerprint"]
    assert spec.index_encoder == world.encoder.fingerprint
    assert check_version("new", _config(world)) == spec.fingerprint(spec.encoder_fingerprint)


def test_its_encoder_maps_queries(world, bridged, ray_session):
    spec = version_spec("new", _config(world))
    replica = EncoderReplica.func_or_class(spec)
    info = asyncio.run(replica.describe())
    assert (info.encoder_fingerprint, info.dimension) == (bridged.query_fingerprint, 32)
    assert info.passages_by == str(world.folder / "retriever")
    new = Encoder.load(open_model(str(world.folder / "other")))
    found = asyncio.run(replica.encode(info.fingerprint, new.tokenize(TEXTS, "query")))
    np.testing.assert_allclose(found, bridged.query_map(new.encode(TEXTS, "query")), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"index": None, "corpus": None}, InputError, "and no index; give the index of its old vectors"),
        (
            {"index": "{}/index-other"},
            FingerprintMismatchError,
            "leads to the vectors .*run `readapt bridge` for these",
        ),
        (
            {"retriever": "{}/retriever"},
            FingerprintMismatchError,
            "is not for .*retriever.*its vectors were made with other weights",
        ),
        ({"dtype": "bfloat16"}, FingerprintMismatchError, "dtype is 'float32' there and 'bfloat16' here"),
        ({"bridge": None}, FingerprintMismatchError, "index .* does not fit .*other"),
    ],
)
def test_what_does_not_fit_is_refused(world, bridged, changes, error, message):
    filled = {name: value and value.format(world.folder) for name, value in changes.items()}
    with pytest.raises(error, match=message):
        check_version("new", _config(world, **filled))


def test_passages_are_not_encoded_by_a_version_for_queries(world):
    version = LocalVersion.load(world, passages_by="the-old-model")
    answer = post(version, EMBEDDINGS, {"input": TEXTS, "input_type": "passage"})
    assert answer.status_code == 400
    assert "its passages are encoded by 'the-old-model'" in answer.json()["error"]["message"]
    assert post(version, EMBEDDINGS, {"input": TEXTS, "input_type": "query"}).status_code == 200
    [listed] = ask(None, ("GET", "/v1/models", None), versions={"tiny": version})
    assert [(model["input_type"], model["passages_by"]) for model in listed.json()["data"]] == [
        ("query", "the-old-model"),
        ("raw", "the-old-model"),
    ]


def test_a_server_answers_with_old_passages_for_bridged_queries(world, bridged, ray_session):
    values = {"name": "new", **_config(world).model_dump(exclude_defaults=True)}
    url = started(world.config(**values))
    try:
        with httpx.Client(base_url=url, timeout=300) as client:
            data = client.post("/v1/search", json={"query": TEXTS, "top_k": 5}).json()["data"]
    finally:
        stop()
    passages = small_corpus(40)
    stored = world.encoder.encode([each.text for each in passages], "passage", [each.title for each in passages])
    asked = bridged.query_map(Encoder.load(open_model(str(world.folder / "other"))).encode(TEXTS, "query"))
    expected = search_exact(asked, [([each.doc_id for each in passages], stored)], 5)
    assert [[hit["doc_id"] for hit in each["hits"]] for each in data] == expected.doc_ids.tolist()
