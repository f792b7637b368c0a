import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from readapt_ray import artifacts
from readapt_ray.catalog.models import open_model
from readapt_ray.cluster import bridge_sample
from readapt_ray.errors import (
    ArtifactConflictError,
    ArtifactMissingError,
    CorruptFileError,
    FingerprintMismatchError,
    InputError,
)
from readapt_ray.evaluation.bridge_recall import BridgeQueries, measure_bridge, objection
from readapt_ray.evaluation.runs import read_run
from readapt_ray.python.retriever import Retriever
from readapt_ray.retrieval.bridge import Bridge
from readapt_ray.retrieval.calibration import Calibration
from readapt_ray.retrieval.encoder import Encoder
from readapt_ray.retrieval.query_encoder import describe_encoder
from readapt_ray.retrieval.vector_files import write_vectors
from readapt_ray.stages import bridge as stage
from readapt_ray.stages.bridge import BridgeConfig, bridge, check_sample
from readapt_ray.stages.embed import EmbedConfig
from readapt_ray.stages.index import IndexConfig, index
from readapt_ray.stages.search import SearchConfig, search
from tests import factories

NUM_PASSAGES = 640


@pytest.fixture(scope="module")
def world(tmp_path_factory, ray_session):
    """A corpus with queries, an old model, a new one that is near it and one that is not, old vectors, index and a bridge."""
    root = tmp_path_factory.mktemp("bridge")
    passages = factories.small_corpus(NUM_PASSAGES)
    queries, qrels = factories.small_queries(passages, 60)
    factories.ingest_artifact(root / "corpus", passages, queries, qrels)
    lines = [json.dumps({"_id": each.query_id, "text": each.text}) for each in queries]
    (root / "queries.jsonl").write_text("\n".join(lines))
    factories.write_contract(factories.tiny_decoder(root / "old", headless=True))
    factories.write_contract(factories.full_retriever(root / "new", root / "old", scale=0.01))
    factories.write_contract(factories.tiny_decoder(root / "far", headless=True, seed=9, hidden_size=48))
    embedded(root, "old")
    index(IndexConfig(vectors=str(root / "old-vectors"), output=str(root / "index")))
    bridge(_config(root))
    return root, passages, queries


def embedded(root, model, corpus="corpus", output=None, *, dtype="float32", num_files=3):
    """What `readapt embed` would write, without Ray."""
    opened, source = open_model(str(root / model)), artifacts.open_artifact(str(root / corpus), "ingest")
    table = pq.read_table(root / corpus / "passages")
    doc_ids, titles, texts = (table[name].to_pylist() for name in ("doc_id", "title", "text"))
    vectors = Encoder.load(opened).encode(texts, "passage", titles)
    encoder = {**describe_encoder(opened, opened.encoding, "float32"), "dimension": vectors.shape[1]}

    def write(workspace):
        for number, rows in enumerate(np.array_split(np.arange(len(texts)), num_files)):
            file = workspace.location / f"vectors/part-{number:05d}.parquet"
            write_vectors(
                file, [doc_ids[row] for row in rows], vectors[rows], dtype=dtype, metadata={"encoder": encoder}
            )
        workspace.counts["num_vectors"] = len(texts)
        workspace.details |= {"encoder": encoder, "vector_dtype": dtype}

    config = EmbedConfig(
        retriever=opened.name,
        corpus=str(root / corpus),
        output=str(root / (output or f"{model}-vectors")),
        vector_dtype=dtype,
    )
    return artifacts.produce("embed", config, inputs={"corpus": source.fingerprint}, work=write)


def _config(root, output="bridge", **options):
    values = {"old_vectors": str(root / "old-vectors"), "retriever": str(root / "new"), "output": str(root / output)}
    return BridgeConfig.parse(values | {"dtype": "float32"} | options)


def _search(root, output, source="index", **options):
    values = {"retriever": str(root / "new"), "queries": str(root / "queries.jsonl"), "output": str(root / output)}
    values |= {source: str(root / {"index": "index", "vectors": "old-vectors"}[source]), "bridge": str(root / "bridge")}
    return SearchConfig.parse(values | {"top_k": 5} | options)


def _details(artifact):
    return artifact.manifest.details


def test_a_bridge_between_models_that_are_near_is_better_than_old_queries(world):
    root, _, queries = world
    made = bridge(_config(root))
    measured = _details(made)["recall_at_10"]
    assert {name: each["num_queries"] for name, each in measured.items()} == {
        "passages": NUM_PASSAGES // 10,
        "queries": len(queries),
    }
    for each in measured.values():
        low, high = each["bridged"]["interval"]
        assert 0.25 < low <= each["bridged"]["mean"] <= high
    assert max(_details(made)["recall_of_maps"].values()) == _details(made)["recall_of_maps"][_details(made)["map"]]
    assert _details(made)["old_encoder"]["model"] == str(root / "old")
    assert _details(made)["new_encoder"]["model"] == str(root / "new")
    assert made.manifest.counts["num_passages"] == NUM_PASSAGES


def test_withheld_passages_are_kept_with_the_vectors_of_both_models(world):
    root, passages, _ = world
    opened = Bridge.open(str(root / "bridge"))
    texts, titles = [each.text for each in passages], [each.title for each in passages]
    old, new = (Encoder.load(open_model(str(root / name))).encode(texts, "passage", titles) for name in ("old", "new"))
    kept = opened.calibration
    assert len(kept.old) == len(kept.new) == NUM_PASSAGES // 5
    rows = (kept.new @ new.T).argmax(axis=1)
    np.testing.assert_allclose(kept.new, new[rows], atol=1e-5)
    np.testing.assert_allclose(kept.old, old[rows], atol=1e-5)
    parts = stage._parts(NUM_PASSAGES, NUM_PASSAGES, 0)
    doc_ids, _ = bridge_sample.old_sample(artifacts.open_artifact(str(root / "old-vectors"), "embed"), NUM_PASSAGES, 0)
    fitted = {doc_ids[row] for row in parts.fit}
    assert not fitted & {passages[row].doc_id for row in rows}


def test_bridged_scores_of_the_kept_passages_get_the_mean_and_spread_of_real_ones(world):
    root, _, queries = world
    opened = Bridge.open(str(root / "bridge"))
    asked = Encoder.load(open_model(str(root / "new"))).encode([each.text for each in queries], "query")
    mapped = opened.query_map(asked)
    factor, offset = opened.calibration.scale(asked, mapped)
    scaled, real = mapped @ opened.calibration.old.T * factor + offset, asked @ opened.calibration.new.T
    np.testing.assert_allclose(scaled.mean(axis=1), real.mean(axis=1), atol=1e-4)
    np.testing.assert_allclose(scaled.std(axis=1), real.std(axis=1), rtol=1e-3)


def test_scores_that_do_not_differ_are_still_ranked():
    calibration = Calibration(np.ones((4, 3), np.float32), np.eye(4, 2, dtype=np.float32))
    factor, offset = calibration.scale(np.ones((1, 2), np.float32), np.ones((1, 3), np.float32))
    assert 0 < factor[0, 0] < np.inf and np.isfinite(offset[0, 0])


def test_recall_is_what_numpy_finds_with_the_models_themselves(world):
    root, passages, queries = world
    old, new = (Encoder.load(open_model(str(root / name))) for name in ("old", "new"))
    texts, titles = [each.text for each in passages], [each.title for each in passages]
    asked = new.encode([each.text for each in queries], "query")
    query_map = Bridge.open(str(root / "bridge")).query_map
    old_passages = old.encode(texts, "passage", titles)
    truth = np.argsort(-(asked @ new.encode(texts, "passage", titles).T))[:, :10]
    kept = np.argsort(-(old.encode([each.text for each in queries], "query") @ old_passages.T))[:, :10]
    bridged = np.argsort(-(query_map(asked) @ old_passages.T))[:, :10]
    measured = _details(bridge(_config(root)))["recall_at_10"]["queries"]
    for name, found in (("bridged", bridged), ("old_queries", kept)):
        shares = [len({*a} & {*b}) / 10 for a, b in zip(found.tolist(), truth.tolist(), strict=True)]
        assert measured[name]["mean"] == pytest.approx(np.mean(shares), abs=0.004)


@pytest.mark.parametrize("source", ["index", "vectors"])
def test_bridged_queries_search_old_vectors(world, source):
    root, passages, queries = world
    made = search(_search(root, f"{source}.trec", source))
    encoders = {name: Encoder.load(open_model(str(root / name))) for name in ("old", "new")}
    documents = encoders["old"].encode([each.text for each in passages], "passage", [each.title for each in passages])
    opened = Bridge.open(str(root / "bridge"))
    scores = opened.query_map(encoders["new"].encode([each.text for each in queries], "query")) @ documents.T
    for row, hits in zip(scores, read_run(made.uri).values(), strict=True):
        np.testing.assert_allclose([hit.score for hit in hits], np.sort(row)[::-1][:5], atol=1e-5)
    details = _details(made)
    assert details["encoder"]["model"] == str(root / "old")
    assert details["query_encoder"]["model"] == str(root / "new")
    assert details["query_encoder"]["query_fingerprint"] == opened.query_fingerprint
    assert made.manifest.inputs["bridge"] == opened.artifact.fingerprint


def test_the_python_retriever_takes_a_bridge(world):
    root, _, queries = world
    retriever = Retriever(retriever=root / "new", index=root / "index", bridge=root / "bridge")
    found = [hit.doc_id for hit in retriever.search(queries[0].text, 5)]
    expected = read_run(search(_search(root, "one.trec")).uri)[queries[0].query_id]
    assert found == [hit.doc_id for hit in expected]


def test_a_finished_bridge_is_kept_and_another_is_refused(world):
    root, *_ = world
    before = (root / "bridge/map.safetensors").stat().st_mtime_ns
    assert bridge(_config(root)).fingerprint == artifacts.open_artifact(str(root / "bridge"), "bridge").fingerprint
    assert (root / "bridge/map.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ArtifactConflictError, match="seed: 0 there, 1 now"):
        bridge(_config(root, seed=1))


def test_a_killed_bridge_goes_on_with_the_vectors_it_has(world, monkeypatch):
    root, *_ = world
    monkeypatch.setattr(bridge_sample, "_PIECE_ROWS", 200)
    write = bridge_sample.write_vectors

    def killed(location, *given, **named):
        if location.name == "part-00002.parquet":
            raise KeyboardInterrupt
        write(location, *given, **named)

    monkeypatch.setattr(bridge_sample, "write_vectors", killed)
    with pytest.raises(KeyboardInterrupt):
        bridge(_config(root, "killed"))
    there = {file: file.stat().st_mtime_ns for file in (root / "killed/vectors").glob("part-*")}
    assert len(there) == 2
    monkeypatch.setattr(bridge_sample, "write_vectors", write)
    again = bridge(_config(root, "killed"))
    assert {file: file.stat().st_mtime_ns for file in there} == there
    assert _details(again)["recall_at_10"] == _details(bridge(_config(root)))["recall_at_10"]


def test_models_of_unlike_dimensions_are_bridged_and_one_that_is_far_is_not_worth_it(world, caplog):
    root, *_ = world
    made = bridge(_config(root, "far-bridge", retriever=str(root / "far")))
    assert Bridge(made).query_map.matrix.shape == (48, 32)
    assert "bridge: not worth it: it finds" in caplog.text
    assert _details(made)["not_worth_it"]
    search(_search(root, "far.trec", retriever=str(root / "far"), bridge=made.uri))
    assert "is not worth it" in caplog.text


def _unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("relation", [0.0, 0.5])
def test_recall_is_that_of_a_corpus_of_which_the_sample_is_a_small_part(relation):
    size, dimension, num_vectors, random = 500, 400, 10_500, np.random.default_rng(0)
    meaning = random.normal(size=(num_vectors, 64))
    new = _unit(meaning @ random.normal(size=(64, dimension)) + 3 * random.normal(size=(num_vectors, dimension)))
    noise = 3 * random.normal(size=(num_vectors, dimension))
    old = _unit(relation * (meaning @ random.normal(size=(64, dimension))) + noise)
    parts = stage._parts(size, num_vectors, seed=0)
    assert not set(parts.pool[parts.last]) & set(parts.fit) and not set(parts.pool[parts.choice]) & set(parts.fit)
    query_map, _ = stage._chosen_map(new[:size], old[:size], parts, seed=0)
    asked, pool = np.arange(300), np.arange(size, size + len(parts.pool))
    rest = [BridgeQueries(new[pool + shift][:50], old[pool + shift][:50], asked[:50]) for shift in range(0, 9000, 1000)]
    due = np.mean(
        [
            measure_bridge(query_map, each, new[pool + 1000 * number], old[pool + 1000 * number])["bridged"]["mean"]
            for number, each in enumerate(rest)
        ]
    )
    measured = measure_bridge(
        query_map,
        BridgeQueries(new[parts.pool[parts.last]], old[parts.pool[parts.last]], parts.last),
        new[parts.pool],
        old[parts.pool],
    )
    low, high = measured["bridged"]["interval"]
    assert low - 0.03 < due < high + 0.03
    assert bool(objection(measured)) == (relation == 0.0)


def test_a_sample_that_is_the_whole_corpus_is_searched_as_a_whole():
    parts = stage._parts(1000, 1000, seed=0)
    assert sorted(parts.pool) == list(range(1000)) and len(parts.fit) == 800
    parts = stage._parts(1000, 2000, seed=0)
    assert len(set(parts.pool) & set(parts.fit)) / len(parts.pool) == pytest.approx(0.4, abs=0.01)


def test_a_sample_is_drawn_by_its_seed_and_without_queries_passages_alone_are_measured(world):
    root, passages, _ = world
    factories.ingest_artifact(root / "more", [each._replace(text=f"{each.text} more") for each in passages])
    embedded(root, "old", "more", "more-vectors", num_files=7)
    options = {"old_vectors": str(root / "more-vectors"), "sample": 520}
    one = bridge(_config(root, "sampled", **options))
    assert one.manifest.counts["num_passages"] == 520
    assert list(_details(one)["recall_at_10"]) == ["passages"]
    old = artifacts.open_artifact(str(root / "more-vectors"), "embed")
    drawn = [bridge_sample.old_sample(old, 520, seed)[0] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 520


def test_a_bridge_fits_only_the_vectors_and_the_model_that_it_was_made_for(world):
    root, *_ = world
    embedded(root, "old", output="half", dtype="float16")
    with pytest.raises(FingerprintMismatchError, match=r"leads to the vectors .*run `readapt bridge` for these"):
        search(_search(root, "x.trec", "vectors", vectors=str(root / "half")))
    with pytest.raises(FingerprintMismatchError, match=r"is not for queries of .*far"):
        search(_search(root, "x.trec", retriever=str(root / "far")))
    with pytest.raises(FingerprintMismatchError, match=r"was not made by .*new"):
        search(_search(root, "x.trec", bridge=None))
    with pytest.raises(ArtifactMissingError, match="output folder of `readapt bridge`"):
        search(_search(root, "x.trec", bridge=str(root / "index")))


def test_bad_inputs_are_refused_before_anything_is_encoded(world):
    root, passages, _ = world
    with pytest.raises(FingerprintMismatchError, match="its queries need no bridge"):
        bridge(_config(root, "x", retriever=str(root / "old")))
    factories.ingest_artifact(root / "other", passages[:600])
    with pytest.raises(FingerprintMismatchError, match="vectors of the same passages by both models"):
        bridge(_config(root, "x", corpus=str(root / "other")))
    with pytest.raises(InputError, match=r"sample = 499: .* takes 500 passages at least; give --sample 500 or more"):
        bridge(_config(root, "x", sample=499))
    factories.ingest_artifact(root / "few", passages[:50])
    embedded(root, "old", "few", "few-vectors")
    with pytest.raises(InputError, match=r"has 50 vectors, and a bridge .* takes a sample of 500; embed the corpus"):
        bridge(_config(root, "x", old_vectors=str(root / "few-vectors")))
    with pytest.raises(InputError, match="4,096 dimensions takes 5,120 passages at least"):
        check_sample(5119, 10**6, 4096)
    assert not (root / "x").exists()


def test_a_map_that_was_altered_is_refused(world):
    root, *_ = world
    shutil.copytree(root / "bridge", root / "altered")
    file = root / "altered/map.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CorruptFileError, match="run `readapt bridge` again"):
        search(_search(root, "altered.trec", bridge=str(root / "altered")))


def test_a_calibration_that_was_altered_or_that_an_older_release_did_not_write_is_refused(world):
    root, *_ = world
    shutil.copytree(root / "bridge", root / "uncalibrated")
    file = root / "uncalibrated/calibration.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CorruptFileError, match=r"calibration\.safetensors was cut short or altered"):
        _ = Bridge.open(str(root / "uncalibrated")).calibration
    manifest = json.loads((root / "uncalibrated/manifest.json").read_text())
    del manifest["details"]["calibration_sha256"]
    (root / "uncalibrated/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"older release .* run `readapt bridge` again into another output"):
        _ = Bridge.open(str(root / "uncalibrated")).calibration
