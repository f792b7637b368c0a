import json
import shutil

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from readapt_ray import artifacts
from readapt_ray.catalog.models import open_model
from readapt_ray.cluster.index_shards import cut_shards
from readapt_ray.cluster.recall_queries import recall_texts
from readapt_ray.config import StageConfig
from readapt_ray.errors import (
    ArtifactConflictError,
    ArtifactMissingError,
    CorruptFileError,
    FingerprintMismatchError,
    InputError,
)
from readapt_ray.records import content_hash
from readapt_ray.retrieval import index_kinds
from readapt_ray.retrieval.encoder import Encoder
from readapt_ray.retrieval.index_recall import set_depth
from readapt_ray.retrieval.index_shard import merged
from readapt_ray.retrieval.parquet_rows import ParquetRows
from readapt_ray.retrieval.vector_files import to_stored_columns, write_stored
from readapt_ray.retrieval.vector_index import VectorIndex
from readapt_ray.stages.embed import EmbedConfig, embed
from readapt_ray.stages.index import IndexConfig, index
from readapt_ray.storage import Location
from tests import factories

ENCODER = {"fingerprint": "f" * 32, "model": "m", "dimension": 8, "dtype": "float32", "encoding": {}}


def vectors_artifact(folder, vectors, *, num_files=3, encoder=None, ids=None, dtype="float32"):
    """What `readapt embed` would write of these vectors [N, D]; the content of a passage is its vector."""
    names = ids or [f"d{row:05d}" for row in range(len(vectors))]
    encoder = encoder or {**ENCODER, "dimension": vectors.shape[1]}

    def write(workspace):
        for number, rows in enumerate(np.array_split(np.arange(len(vectors)), num_files)):
            location = workspace.location / "vectors" / f"part-{number:05d}.parquet"
            doc_ids = [names[row] for row in rows]
            hashes = pa.array([content_hash("", str(vectors[row].tolist())) for row in rows], pa.binary(16))
            stored = to_stored_columns(doc_ids, vectors[rows], dtype)
            write_stored(location, doc_ids, stored, hashes, metadata={"encoder": encoder, "num_tokens": 0})
        workspace.counts["num_vectors"] = len(vectors)
        workspace.details |= {"encoder": encoder, "vector_dtype": dtype}

    content = artifacts.fingerprint([vectors.tolist(), encoder, names])
    return artifacts.produce("embed", StageConfig(output=str(folder)), inputs={"corpus": content}, work=write)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("index")
    vectors = np.random.default_rng(0).normal(size=(100, 8)).astype(np.float32)
    vectors_artifact(root / "vectors", vectors)
    return root, vectors


@pytest.fixture(scope="module")
def built(world, ray_session):
    root, _ = world
    return index(_config(root, "index"))


def _config(root, output, **options):
    values = {"vectors": str(root / "vectors"), "output": str(root / output), "rows_per_shard": 30}
    return IndexConfig.parse(values | options)


def _files(folder):
    return {path.name: path.stat().st_mtime_ns for path in sorted((folder / "shards").iterdir())}


def test_the_shards_hold_every_vector_once_under_its_id(world, built):
    root, vectors = world
    found = {}
    for number in range(4):
        plain = faiss.read_index(str(root / f"index/shards/{number:05d}.faiss"))
        ids = pq.read_table(root / f"index/shards/{number:05d}.ids.parquet")["doc_id"].to_pylist()
        assert plain.metric_type == faiss.METRIC_INNER_PRODUCT and plain.ntotal == len(ids) == (
            10 if number == 3 else 30
        )
        found |= dict(zip(ids, plain.reconstruct_n(0, len(ids)), strict=True))
    assert sorted(found) == [f"d{row:05d}" for row in range(100)]
    np.testing.assert_array_equal([found[f"d{row:05d}"] for row in range(100)], vectors)
    manifest = built.manifest
    assert manifest.counts["num_vectors"] == 100 and manifest.counts["num_shards"] == 4
    assert manifest.counts["num_bytes"] == sum(
        path.stat().st_size for path in (root / "index/shards").iterdir() if path.suffix != ".json"
    )
    assert manifest.details["encoder"] == ENCODER and manifest.details["kind"] == "flat"


def test_an_opened_index_finds_what_numpy_finds(world, built):
    _, vectors = world
    opened = VectorIndex.open(built.uri)
    assert opened.num_vectors == 100 and opened.encoder == ENCODER
    hits = opened.search(vectors[:5], 7)
    expected = np.argsort(-(vectors[:5] @ vectors.T), axis=1)[:, :7]
    assert hits.doc_ids.tolist() == [[f"d{row:05d}" for row in rows] for rows in expected]


def test_indexing_again_does_nothing_and_other_vectors_are_refused(world, built, tmp_path):
    root, vectors = world
    before = _files(root / "index")
    assert index(_config(root, "index")).fingerprint == built.fingerprint
    vectors_artifact(tmp_path / "other", vectors + 1)
    with pytest.raises(ArtifactConflictError, match="vectors"):
        index(_config(root, "index", vectors=str(tmp_path / "other")))
    with pytest.raises(ArtifactConflictError, match="rows_per_shard: 30 there, 50 now"):
        index(_config(root, "index", rows_per_shard=50))
    assert _files(root / "index") == before


def test_only_missing_shards_are_built_again(world, built):
    root, _ = world
    shutil.copytree(root / "index", root / "resumed")
    folder = root / "resumed"
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").unlink()
    state = {name: manifest[name] for name in ("stage", "fingerprint", "config", "inputs", "seconds")}
    state |= {
        "host": "",
        "boot": "",
        "pid": 0,
        "process_started": 0,
        "started": 0,
        "heartbeat": 0,
        "owner": "",
        "is_over": True,
    }
    (folder / "building.json").write_text(json.dumps(state | {"seconds_before": 0}))
    (folder / "shards/00000.faiss").unlink()
    (folder / "shards/00002.ids.parquet").unlink()
    before = _files(folder)
    again = index(_config(root, "resumed"))
    after = _files(folder)
    assert {name[:5] for name in after if after[name] != before.get(name)} == {"00000", "00002"}
    assert again.manifest.details == built.manifest.details


def test_bad_input_is_found_before_any_worker_starts(world, built, tmp_path, monkeypatch):
    from readapt_ray.cluster import connection

    monkeypatch.setattr(connection, "connect", lambda: pytest.fail("Ray was started"))
    root, vectors = world
    output = tmp_path / "out"
    with pytest.raises(InputError, match='kind = "lsh": must be one of auto, flat, ivf-flat'):
        index(_config(root, output, kind="lsh"))
    with pytest.raises(InputError, match="memory_gb = 1e-07 is too little for 100 vectors"):
        index(_config(root, output, kind="auto", memory_gb=1e-7))
    vectors_artifact(tmp_path / "of-another", vectors, encoder=ENCODER | {"fingerprint": "g" * 32})
    with pytest.raises(FingerprintMismatchError, match="is an index of vectors of another encoder"):
        index(_config(root, output, vectors=str(tmp_path / "of-another"), previous=built.uri))
    for options, there, now in (
        ({"kind": "hnsw"}, "flat in float32", "hnsw in float32"),
        ({"storage": "int8"}, "flat in float32", "flat in int8"),
        ({"factory": "SQ8"}, "flat in float32", "'SQ8'"),
    ):
        with pytest.raises(FingerprintMismatchError, match=f"is {there}, and this index would be {now}; ask for"):
            index(_config(root, output, previous=built.uri, **options))
    with pytest.raises(ArtifactMissingError, match="does not exist"):
        index(_config(root, output, vectors=str(tmp_path / "absent")))
    for change, named in ((_cut, "cut short"), (_of_another, "another encoder"), (_gone, "66 vectors.*says 100")):
        shutil.rmtree(tmp_path / "damaged", ignore_errors=True)
        vectors_artifact(tmp_path / "damaged", vectors)
        change(tmp_path / "damaged/vectors/part-00000.parquet")
        with pytest.raises(CorruptFileError, match=named):
            index(_config(root, output, vectors=str(tmp_path / "damaged")))
    assert not output.exists()


def _cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def _of_another(path):
    other = {b"readapt": json.dumps({"encoder": {"fingerprint": "g"}})}
    pq.write_table(pq.read_table(path).replace_schema_metadata(other), path)


def _gone(path):
    path.unlink()


def test_a_vector_that_became_nan_is_named(world, ray_session, tmp_path):
    _, vectors = world
    vectors_artifact(tmp_path / "vectors", vectors, num_files=1)
    path = tmp_path / "vectors/vectors/part-00000.parquet"
    metadata, altered = pq.read_schema(path).metadata, vectors.copy()
    altered[42, 3] = np.nan
    column = pa.FixedSizeListArray.from_arrays(pa.array(altered.reshape(-1)), 8)
    table = pa.table({"doc_id": [f"d{row:05d}" for row in range(100)], "vector": column})
    pq.write_table(table.replace_schema_metadata(metadata), path)
    with pytest.raises(CorruptFileError, match="the vector of 'd00042' holds NaN"):
        index(_config(tmp_path, tmp_path / "out"))


def test_an_earlier_index_is_gone_on_from_without_a_rebuild(world, built, tmp_path, caplog):
    """A week later: 10 passages left, 5 changed, 20 came. The first shard lost 8 of 30, too many for it to stay."""
    caplog.set_level("INFO", "readapt_ray")
    root, vectors = world
    rng = np.random.default_rng(1)
    left = np.setdiff1d(np.arange(100), [*range(3), *range(25, 28), *range(50, 54)])
    now = np.concatenate([vectors[left], rng.normal(size=(20, 8)).astype(np.float32)])
    now[left.searchsorted([3, 28, 54, 55, 99])] += 1
    ids = [f"d{row:05d}" for row in (*left, *range(100, 120))]
    vectors_artifact(tmp_path / "now", now, ids=ids)
    options = {"vectors": str(tmp_path / "now"), "previous": built.uri}
    made = index(_config(root, tmp_path / "delta", **options))
    assert made.manifest.counts["num_vectors"] == 110 and made.manifest.counts["num_shards"] == 5
    assert made.manifest.details["changes"] == {"num_deleted": 7, "num_added": 47}
    assert "47 vectors added, 7 deleted" in caplog.text and "without --previous to compact" in caplog.text
    assert [each["name"] for each in made.manifest.details["shards"]] == ["00001", "00002", "00003", "00004", "00005"]
    for number in (1, 2, 3):
        name = f"shards/{number:05d}.faiss"
        assert (tmp_path / "delta" / name).read_bytes() == (root / "index" / name).read_bytes()
    fresh = index(_config(root, tmp_path / "fresh", vectors=options["vectors"]))
    queries = rng.normal(size=(30, 8)).astype(np.float32)
    opened = VectorIndex.open(made.uri)
    assert opened.num_vectors == 110
    for top_k in (1, 10, 110):
        hits, expected = opened.search(queries, top_k), VectorIndex.open(fresh.uri).search(queries, top_k)
        assert hits.doc_ids[:, :110].tolist() == expected.doc_ids.tolist()
    vectors_artifact(tmp_path / "same", vectors)
    back = index(_config(root, tmp_path / "back", vectors=str(tmp_path / "same"), previous=made.uri))
    assert back.manifest.counts["num_vectors"] == 100
    expected = VectorIndex.open(built.uri).search(queries, 10)
    assert VectorIndex.open(back.uri).search(queries, 10).doc_ids.tolist() == expected.doc_ids.tolist()


def test_an_approximate_index_is_measured_and_refused_where_it_finds_too_little(ray_session, tmp_path, caplog):
    vectors = np.random.default_rng(2).normal(size=(4000, 16)).astype(np.float32)
    vectors_artifact(tmp_path / "vectors", vectors)
    options = {"kind": "ivf-flat", "rows_per_shard": 2000, "min_recall": 0.9}
    made = index(_config(tmp_path, "ivf", **options))
    measured = made.manifest.details["measured"]
    assert 0.9 <= measured["recall_at_10"] <= 1 and 0.8 < measured["recall_at_100"] <= 1
    assert 64 <= measured["bytes_per_vector"] < 130 and measured["query_ms"] > 0
    assert measured["with_queries"] is False and "there is no query to measure with" in caplog.text
    records = made.manifest.details["shards"]
    assert [record["factory"] for record in records] == ["IVF102,Flat"] * 2
    plain = faiss.read_index(str(tmp_path / "ivf/shards/00000.faiss"))
    assert plain.nprobe >= records[0]["depth"] == records[1]["depth"] > 1
    hits = VectorIndex.open(made.uri).search(vectors[:200], 10)
    scores = vectors[:200] @ vectors.T
    exact = [{f"d{row:05d}" for row in rows} for rows in np.argsort(-scores, axis=1)[:, :10]]
    found = np.mean([len(set(each) & due) / 10 for each, due in zip(hits.doc_ids.tolist(), exact, strict=True)])
    assert found >= measured["recall_at_10"] - 0.04
    with pytest.raises(InputError, match=r"'IVF102,Flat' finds 0.* raise --depth \(nprobe, 1 now\)"):
        index(_config(tmp_path, "refused", depth=1, **options))
    assert artifacts.read_manifest(str(tmp_path / "refused")) is None


def test_recall_is_measured_with_queries(ray_session, tmp_path, monkeypatch):
    """The corpus' own, and else pieces of passages: an index finds its own vectors more easily."""
    monkeypatch.setattr(index_kinds, "_FLAT_BELOW", 100)
    monkeypatch.chdir(tmp_path)
    passages = factories.small_corpus(200)
    queries, _ = factories.small_queries(passages, 40)
    corpus = factories.ingest_artifact(tmp_path / "corpus", passages, queries, num_files=3)
    model = factories.write_contract(factories.tiny_decoder(tmp_path / "model", headless=True))
    embed(EmbedConfig(retriever="model", corpus="corpus", output="vectors", dtype="float32"))
    made = VectorIndex.open(
        index(IndexConfig(vectors="vectors", output="index", kind="ivf-flat", min_recall=0.2, depth=1)).uri
    )
    texts = recall_texts(corpus)
    assert len(texts) == 100 and set(texts[:40]) == {query.text for query in queries}
    words = " ".join(f"{each.title} {each.text}" for each in passages)
    assert all(each in words and 1 <= len(each.split()) <= 8 for each in texts[40:])

    vectors = Encoder.load(open_model(str(model))).encode(texts, "query")
    stored = np.concatenate([shard.index.reconstruct_n(0, len(shard.doc_ids)) for shard in _with_map(made.shards())])
    exact = -np.sort(-(vectors @ stored.T), axis=1)[:, 9:10]
    found = next(made.shards()).index.search(vectors, 10)[0]
    measured = made.artifact.manifest.details["measured"]
    assert len(stored) == 200 and measured["with_queries"] is True
    assert (
        measured["recall_at_10"] == pytest.approx((found >= exact - 1e-5).mean(), abs=1e-3)
        and found.min() < exact.max()
    )


def _with_map(shards):
    for shard in shards:
        shard.index.make_direct_map()
        yield shard


@pytest.mark.parametrize("kind", ["ivf-flat", "ivf-pq", "flat"])
def test_shards_are_trained_together_and_searched_as_one_index(ray_session, tmp_path, kind):
    vectors = np.random.default_rng(3).normal(size=(3000, 16)).astype(np.float32)
    vectors_artifact(tmp_path / "vectors", vectors)
    cut = index(_config(tmp_path, "cut", kind=kind, rows_per_shard=700))
    whole = index(_config(tmp_path, "whole", kind=kind, rows_per_shard=3000))
    (together,) = merged(VectorIndex.open(cut.uri).shards())
    (one,) = VectorIndex.open(whole.uri).shards()
    set_depth(together.index, whole.manifest.details["shards"][0]["depth"])
    found, due = together.search(vectors[:50], 20), one.search(vectors[:50], 20)
    assert found.doc_ids.tolist() == due.doc_ids.tolist()
    assert cut.manifest.details.get("measured", {}).keys() == whole.manifest.details.get("measured", {}).keys()


def test_what_came_later_is_trained_as_the_earlier_index_was(ray_session, tmp_path):
    vectors = np.random.default_rng(4).normal(size=(3000, 16)).astype(np.float32)
    vectors_artifact(tmp_path / "vectors", vectors[:2500])
    vectors_artifact(tmp_path / "now", vectors)
    options = {"kind": "ivf-flat", "rows_per_shard": 2500}
    before = index(_config(tmp_path, "before", **options))
    after = index(_config(tmp_path, "after", vectors=str(tmp_path / "now"), previous=before.uri, **options))
    assert len({record["trained"] for record in after.manifest.details["shards"]}) == 1
    (together,) = merged(VectorIndex.open(after.uri).shards())
    assert together.index.ntotal == 3000


def test_a_flat_index_of_float16_vectors_is_float16_and_exact(ray_session, tmp_path):
    vectors = np.random.default_rng(5).normal(size=(100, 8)).astype(np.float16)
    vectors_artifact(tmp_path / "vectors", vectors, dtype="float16")
    made = index(_config(tmp_path, "flat"))
    assert made.manifest.details["storage"] == "float16" and "measured" not in made.manifest.details
    exact = vectors[:9].astype(np.float64) @ vectors.T.astype(np.float64)
    hits = VectorIndex.open(made.uri).search(vectors[:9].astype(np.float32), 5)
    assert hits.doc_ids.tolist() == [[f"d{row:05d}" for row in rows] for rows in np.argsort(-exact, axis=1)[:, :5]]


def test_a_task_is_told_of_its_own_files_only():
    vectors = ParquetRows(Location("/nowhere"), tuple((f"{number}", 10) for number in range(1000)))
    shards = list(cut_shards(None, vectors, range(vectors.num_rows), 25, first=7))
    assert len(shards) == 400 and max(len(each.vectors.counts) for each in shards) == 3
    assert [shards[0].name, shards[-1].name] == ["00007", "00406"]
    assert sum(len(each.rows) for each in shards) == 10_000
    scattered = list(cut_shards(None, vectors, np.array([3, 9, 25, 26, 9999]), 4, first=0))
    assert [each.rows.tolist() for each in scattered] == [[3, 9, 25, 26], [9]]
    assert [each.vectors.counts[-1][0] for each in scattered] == ["2", "999"]


def test_a_finished_index_asks_for_no_file_of_vectors(world, built, monkeypatch):
    root, _ = world
    monkeypatch.setattr("readapt_ray.stages.index.open_vectors", lambda artifact: pytest.fail("footers were read"))
    assert index(_config(root, "index")).fingerprint == built.fingerprint


def test_a_kind_for_many_vectors_is_flat_for_few_and_says_so(ray_session, tmp_path, caplog):
    caplog.set_level("INFO", logger="readapt_ray")
    vectors = np.random.default_rng(0).normal(size=(300, 16)).astype(np.float32)
    vectors_artifact(tmp_path / "vectors", vectors)
    made = index(_config(tmp_path, "index", kind="hnsw", rows_per_shard=None))
    assert made.manifest.details["kind"] == "flat (too few vectors for hnsw)"
    assert "index: 300 vectors are too few for hnsw, so the index is flat" in caplog.messages
    again = index(_config(tmp_path, "again", kind="hnsw", previous=str(tmp_path / "index"), rows_per_shard=None))
    assert again.manifest.details["kind"] == "flat (too few vectors for hnsw)"
