"""Models for queries alone: made by merge and finetune, and understood by embed and search."""

import json

import numpy as np
import pytest

from readapt_ray import artifacts
from readapt_ray.catalog.models import open_model
from readapt_ray.catalog.query_models import passages_model
from readapt_ray.errors import FingerprintMismatchError, InputError, ModelError
from readapt_ray.evaluation.runs import read_run
from readapt_ray.retrieval.encoder import Encoder
from readapt_ray.retrieval.encoder_fingerprint import encoder_fingerprint
from readapt_ray.retrieval.query_encoder import query_encoder
from readapt_ray.stages.embed import EmbedConfig, embed
from readapt_ray.stages.finetune import FinetuneConfig, finetune
from readapt_ray.stages.merge import MergeConfig, merge
from readapt_ray.stages.search import SearchConfig, search
from tests import factories
from tests.stages.test_bridge import embedded


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A corpus, a pretrained model, its retriever with vectors, an adapter, a plain merge and one for queries alone."""
    root = tmp_path_factory.mktemp("query-models")
    passages = factories.small_corpus(60)
    queries, qrels = factories.small_queries(passages, 10)
    factories.ingest_artifact(root / "corpus", passages, queries, qrels, split="train")
    lines = [json.dumps({"_id": each.query_id, "text": each.text}) for each in queries]
    (root / "queries.jsonl").write_text("\n".join(lines))
    pretrained = factories.tiny_decoder(root / "pretrained")
    factories.write_contract(factories.full_retriever(root / "retriever", pretrained))
    factories.write_contract(factories.full_retriever(root / "other", pretrained, seed=8))
    factories.dora_adapter(root / "adapter", pretrained)
    for name in ("retriever", "other"):
        embedded(root, name)
    merge(_merge(root, "merged"))
    merge(_merge(root, "for-queries", queries_only=True))
    return root, passages, queries


def _merge(root, output, **options):
    given = {name: str(root / name) for name in ("pretrained", "retriever", "adapter")}
    return MergeConfig.parse(given | {"output": str(root / output)} | options)


def _vectors(root, name):
    return artifacts.open_artifact(str(root / f"{name}-vectors"), "embed")


def test_a_merge_for_queries_has_the_same_weights_and_names_the_retriever(world):
    root, *_ = world
    weights = [(root / name / "model.safetensors").read_bytes() for name in ("merged", "for-queries")]
    assert weights[0] == weights[1]
    passages = passages_model(open_model(str(root / "for-queries")))
    assert (passages.name, passages.weights) == (
        str(root / "retriever"),
        open_model(str(root / "retriever")).fingerprint,
    )
    assert passages_model(open_model(str(root / "merged"))) is None
    assert "For queries alone: passages are encoded by" in (root / "for-queries/README.md").read_text()


def test_it_is_accepted_with_vectors_of_its_passages_model_and_with_no_others(world):
    root, *_ = world
    model, vectors = open_model(str(root / "for-queries")), _vectors(root, "retriever")
    encoder = query_encoder(model, vectors)
    assert encoder.fingerprint == encoder_fingerprint(model, model.encoding, "float32")
    with pytest.raises(FingerprintMismatchError, match=r"for queries over vectors of .*retriever.*was made by .*other"):
        query_encoder(model, _vectors(root, "other"))
    with pytest.raises(FingerprintMismatchError, match=r"was not made by .*merged"):
        query_encoder(open_model(str(root / "merged")), vectors)


def test_it_searches_the_vectors_of_the_retriever(world, ray_session):
    root, passages, queries = world
    values = {"retriever": str(root / "for-queries"), "vectors": str(root / "retriever-vectors"), "top_k": 5}
    made = search(
        SearchConfig.parse(values | {"queries": str(root / "queries.jsonl"), "output": str(root / "run.trec")})
    )
    asked = Encoder.load(open_model(str(root / "merged"))).encode([each.text for each in queries], "query")
    retriever = Encoder.load(open_model(str(root / "retriever")))
    stored = retriever.encode([each.text for each in passages], "passage", [each.title for each in passages])
    for row, hits in zip(asked @ stored.T, read_run(made.uri).values(), strict=True):
        np.testing.assert_allclose([hit.score for hit in hits], np.sort(row)[::-1][:5], atol=1e-5)
    details = made.manifest.details
    assert details["encoder"]["model"] == str(root / "retriever")
    assert details["query_encoder"]["model"] == str(root / "for-queries")


def test_embed_with_it_makes_the_vectors_of_its_passages_model(world, ray_session):
    root, *_ = world
    values = {"corpus": str(root / "corpus"), "dtype": "float32", "output": str(root / "embedded")}
    made = embed(EmbedConfig.parse(values | {"retriever": str(root / "for-queries")}))
    before = _vectors(root, "retriever").manifest.details["encoder"]
    assert made.manifest.details["encoder"] == before
    factories.write_contract(factories.full_retriever(root / "moved", root / "pretrained", seed=77))
    merge(_merge(root, "of-moved", retriever=str(root / "moved"), queries_only=True))
    factories.full_retriever(root / "moved", root / "pretrained", seed=78)
    with pytest.raises(FingerprintMismatchError, match="is another model than the one whose passages are searched"):
        embed(EmbedConfig.parse(values | {"retriever": str(root / "of-moved"), "output": str(root / "x")}))


def test_finetune_for_queries_alone_keeps_the_passages(world, ray_session):
    root, *_ = world
    values = {"model": str(root / "retriever"), "corpus": str(root / "corpus"), "output": str(root / "tuned")}
    options = {"queries_only": True, "batch_size": 4, "num_epochs": 5, "num_workers": 1, "learning_rate": 1e-2}
    made = finetune(FinetuneConfig.parse(values | options | {"num_cpus_per_worker": 1}))
    assert made.manifest.details["last_loss"] < made.manifest.details["first_loss"]
    model = open_model(str(root / "tuned"))
    assert query_encoder(model, _vectors(root, "retriever")).model is model
    assert passages_model(model).weights == open_model(str(root / "retriever")).fingerprint


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda root: _merge(root, "x", queries_only=True, factors=True), InputError, "without factors"),
        (
            lambda root: FinetuneConfig(model="m", corpus="c", output="x", queries_only=True, method="full"),
            InputError,
            "choose lora or dora",
        ),
        (
            lambda root: merge(_merge(root, "x", retriever=str(root / "for-queries"))),
            ModelError,
            "is only for queries, and its passages are encoded by .*retriever",
        ),
        (
            lambda root: finetune(
                FinetuneConfig(model=str(root / "for-queries"), corpus=str(root / "corpus"), output=str(root / "x"))
            ),
            ModelError,
            "finetune starts from one model for both: give .*retriever",
        ),
    ],
)
def test_bad_input(world, make, error, message):
    root, *_ = world
    with pytest.raises(error, match=message):
        make(root)
