"""`embed` and `search` with the factors of a domain in place of a merged model."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from readapt_ray.catalog.models import open_model
from readapt_ray.catalog.retrievers import TARGETS_BY_FAMILY
from readapt_ray.cluster.recall_queries import query_encoder_of
from readapt_ray.cluster.round_trip import find_passages
from readapt_ray.errors import FingerprintMismatchError, InputError, ModelError, WeightMismatchError
from readapt_ray.evaluation.runs import read_run
from readapt_ray.planner import rates
from readapt_ray.retrieval.encoder import Encoder
from readapt_ray.retrieval.encoder_fingerprint import encoder_fingerprint
from readapt_ray.stages.embed import EmbedConfig, embed
from readapt_ray.stages.merge import MergeConfig, merge
from readapt_ray.stages.search import SearchConfig, search
from tests import factories, families
from tests.families import FAMILIES

NUM_PASSAGES = 60


def _merge(folder, output, **options):
    given = {name: str(folder / name) for name in ("pretrained", "retriever", "adapter")}
    return merge(MergeConfig.parse(given | {"output": str(folder / output)} | options))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus with queries; a domain as factors and as a merged model, whose weights are in bfloat16."""
    folder = tmp_path_factory.mktemp("embed-domain")
    passages = factories.small_corpus(NUM_PASSAGES)
    queries, qrels = factories.small_queries(passages, 10)
    factories.ingest_artifact(folder / "corpus", passages, queries, qrels, num_files=2)
    base = factories.tiny_decoder(folder / "pretrained")
    factories.write_contract(factories.full_retriever(folder / "retriever", base, dtype="bfloat16"))
    factories.dora_adapter(folder / "adapter", base)
    _merge(folder, "domain", factors=True)
    _merge(folder, "merged")
    return folder


def _embed(folder, output, **options):
    values = {"corpus": str(folder / "corpus"), "output": str(folder / output), "dtype": "float32", "num_workers": 1}
    return embed(EmbedConfig.parse(values | options))


def _vectors(folder, output):
    table = pq.read_table(folder / output / "vectors").sort_by("doc_id")
    return table["doc_id"].to_pylist(), np.array(table["vector"].to_pylist(), np.float32)


@pytest.fixture(scope="module")
def embedded(folder, ray_session):
    return {
        "domain": _embed(folder, "of-domain", domain=str(folder / "domain")),
        "merged": _embed(folder, "of-merged", retriever=str(folder / "merged")),
    }


def test_the_vectors_of_a_domain_are_those_of_the_merged_model(folder, embedded):
    ids, found = _vectors(folder, "of-domain")
    due_ids, due = _vectors(folder, "of-merged")
    assert ids == due_ids and len(ids) == NUM_PASSAGES
    np.testing.assert_array_equal(found, due)
    encoders = [embedded[name].manifest.details["encoder"] for name in ("domain", "merged")]
    assert encoders[0]["fingerprint"] == encoders[1]["fingerprint"]
    retriever = Encoder.load(open_model(str(folder / "retriever")))
    passages = factories.small_corpus(NUM_PASSAGES)
    before = retriever.encode([each.text for each in passages], "passage", [each.title for each in passages])
    assert (before * found).sum(1).min() < 0.999  # the domain does something


def test_either_searches_the_vectors_of_the_other(folder, embedded):
    del embedded
    runs = []
    for number, (asked_by, vectors) in enumerate(
        [
            ({"retriever": "merged"}, "of-domain"),
            ({"domain": "domain"}, "of-merged"),
            ({"retriever": "merged"}, "of-merged"),
        ]
    ):
        given = {name: str(folder / value) for name, value in asked_by.items()}
        given |= {"vectors": str(folder / vectors), "queries": str(folder / "corpus")}
        search(SearchConfig.parse(given | {"output": str(folder / f"{number}.trec"), "top_k": 5}))
        runs.append(read_run(str(folder / f"{number}.trec")))
    assert runs[0] == runs[1] == runs[2] and len(runs[0]) == 10
    with pytest.raises(FingerprintMismatchError, match="was not made by"):
        other = {"retriever": str(folder / "retriever"), "vectors": str(folder / "of-domain")}
        search(SearchConfig.parse(other | {"queries": str(folder / "corpus"), "output": str(folder / "other.trec")}))


def test_stages_that_ask_queries_find_the_model_of_vectors_of_a_domain(folder, embedded, tmp_path):
    moved = shutil.move(folder / "pretrained", tmp_path / "moved")
    try:
        of_moved = _embed(folder, "asked-of-moved", domain=str(folder / "domain"), base=str(moved))
        found = [query_encoder_of(each) for each in (of_moved, embedded["merged"])]
        assert found[0].model.is_factors and found[0].fingerprint == found[1].fingerprint
    finally:
        shutil.move(moved, folder / "pretrained")
    passage = factories.small_corpus(NUM_PASSAGES)[7]
    assert find_passages([passage.text], [passage.doc_id], embedded["domain"], NUM_PASSAGES).tolist() == [True]
    assert rates.work_of(embedded["domain"].manifest) == rates.work_of(embedded["merged"].manifest)


def test_a_model_made_of_the_factors_is_the_same_model(folder, tmp_path):
    domain, merged = (open_model(str(folder / name)) for name in ("domain", "merged"))
    again = merge(MergeConfig(bundle=str(folder / "domain"), output=str(tmp_path / "again")))
    assert again.fingerprint == merged.fingerprint == domain.fingerprint
    other = merge(MergeConfig(bundle=str(folder / "domain"), knowledge_scale=0.3, output=str(tmp_path / "other")))
    assert other.fingerprint == _merge(folder, "other", knowledge_scale=0.3).fingerprint != merged.fingerprint


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gives_the_vectors_of_its_merged_model(tmp_path, name, kind):
    family = FAMILIES[name]
    base = families.pretrained(tmp_path / "pretrained", family)
    targets = {"headless": True, "targets": TARGETS_BY_FAMILY[family.model_type]}
    if kind == "full":
        families.retriever(tmp_path / "retriever", base, family)
    else:
        factories.lora_adapter(tmp_path / "retriever", base, **targets)
        factories.write_contract(tmp_path / "retriever", pooling=family.pooling.replace("lasttoken", "last"))
    factories.dora_adapter(tmp_path / "adapter", base, **targets)
    _merge(tmp_path, "domain", factors=True)
    _merge(tmp_path, "merged")
    domain, merged = (open_model(str(tmp_path / name)) for name in ("domain", "merged"))
    texts = [each.text for each in factories.small_corpus(8)]
    found, due = (Encoder.load(each).encode(texts, "passage") for each in (domain, merged))
    assert ((found * due).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(due, axis=1)).min() > 0.99999
    fingerprints = [encoder_fingerprint(each, each.encoding, "float32") for each in (domain, merged)]
    assert fingerprints[0] == fingerprints[1]


def test_a_base_that_moved_is_given_and_another_is_refused(folder, tmp_path, ray_session):
    moved = tmp_path / "moved"
    shutil.copytree(folder / "pretrained", moved)
    content = json.loads((folder / "domain/bundle.json").read_text())
    content["sources"]["pretrained"]["name"] = str(tmp_path / "gone")
    shutil.copytree(folder / "domain", tmp_path / "domain")
    (tmp_path / "domain/bundle.json").write_text(json.dumps(content))
    given = {"domain": str(tmp_path / "domain")}
    with pytest.raises(ModelError, match="gone"):
        _embed(folder, "from-gone", **given)
    made = _embed(folder, "of-moved", base=str(moved), **given)
    assert made.manifest.counts["num_vectors"] == NUM_PASSAGES
    other = factories.tiny_decoder(tmp_path / "other", seed=5)
    with pytest.raises(WeightMismatchError, match=r"domain' was made of .*has another content .*--base"):
        _embed(folder, "of-other", base=str(other), **given)
    options = json.loads((moved / "tokenizer_config.json").read_text())
    (moved / "tokenizer_config.json").write_text(json.dumps(options | {"note": "other"}))
    with pytest.raises(WeightMismatchError, match=r"has another tokenizer .*--base"):
        _embed(folder, "of-reworded", base=str(moved), **given)


def test_factors_that_are_damaged_or_whole_models_are_refused(folder, tmp_path):
    with pytest.raises(ModelError, match="is not the output of `readapt merge --factors`"):
        _embed(folder, "of-model", domain=str(folder / "merged"))
    shutil.copytree(folder / "domain", tmp_path / "domain")
    (tmp_path / "domain/knowledge-1/adapter_model.safetensors").write_bytes(b"nothing of a tensor")
    with pytest.raises(ModelError, match="is not safetensors"):
        _embed(folder, "of-damaged", domain=str(tmp_path / "domain"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give a retriever or the factors of a domain"),
        ({"retriever": "a", "domain": "b"}, "give a retriever or the factors of a domain"),
        ({"retriever": "a", "base": "b"}, "base is for a domain"),
    ],
)
def test_options_that_do_not_fit_are_refused(given, message):
    for kind, needed in ((EmbedConfig, {"corpus": "c"}), (SearchConfig, {"queries": "q", "index": "i"})):
        with pytest.raises(InputError, match=message):
            kind.parse(given | needed | {"output": "o.trec"})
