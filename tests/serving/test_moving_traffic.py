"""Versions whose passages move to new vectors: of documents that were split, as a shadow, and beside others in a split."""

import asyncio
import collections
import hashlib
import itertools
import json
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Iterator

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from readapt_ray.catalog.models import open_model
from readapt_ray.retrieval.encoder import Encoder
from readapt_ray.retrieval.index_shard import IndexShard, build_shard
from readapt_ray.retrieval.shard_plan import packed_hashes
from readapt_ray.retrieval.vector_files import to_stored_columns, write_stored
from readapt_ray.retrieval.vector_index import VectorIndex
from readapt_ray.serving.app import version_spec
from readapt_ray.serving.doc_filter import DocFilter
from readapt_ray.serving.index_slice import IndexSlice
from readapt_ray.serving.keys import ApiKey
from readapt_ray.serving.moving_slice import MovingSlice
from readapt_ray.serving.options import ServeConfig, VersionConfig
from readapt_ray.serving.server import serve, stop
from readapt_ray.serving.versions import Routing
from readapt_ray.serving.workers import EncoderReplica, IndexReplica
from readapt_ray.sources.splitting import parent_of, piece_ids
from readapt_ray.stages.ingest import IngestConfig, ingest
from readapt_ray.storage import Location
from tests.chaos.nodes import free_port
from tests.factories import ingest_artifact, small_corpus
from tests.serving.conftest import LocalVersion, World, index_artifact, local_server, passage_vectors
from tests.serving.test_kills import processes
from tests.serving.test_moving_version import Embedding, _follower, _wait_until_moved
from tests.serving.test_routes import EMBEDDINGS, SEARCH, TEXTS, ask

SIZES = (1, 2, 5, 12, 1, 9, 10)
"""Passages of each document; the index has the first 25 in one shard, so that a document lies in both."""
IDS = [each for number, size in enumerate(SIZES) for each in piece_ids(f"doc{number}", size)]
PASSAGES = [each._replace(doc_id=doc_id) for each, doc_id in zip(small_corpus(len(IDS)), IDS, strict=True)]
DOCUMENTS = [f"doc{number}" for number in range(len(SIZES))]


@pytest.fixture(scope="module")
def split_world(world, tmp_path_factory) -> World:
    """The world with its passages as parts of documents."""
    folder = tmp_path_factory.mktemp("split")
    ingest_artifact(folder / "corpus", PASSAGES, num_files=2)
    for name, index in (("retriever", "index"), ("other", "index-other")):
        (folder / name).symlink_to(world.folder / name)
        encoder = Encoder.load(open_model(str(world.folder / name)))
        index_artifact(folder / index, encoder, name, PASSAGES, is_split=True)
    return World(folder, world.encoder)


@pytest.fixture
def embedding(split_world, tmp_path):
    return Embedding(split_world, tmp_path / "new", PASSAGES)


def _moving(world, bridge) -> LocalVersion:
    """A version of split documents whose passages can move."""
    version = LocalVersion.load(world, "other", is_split=True, is_moving=True)
    index = VectorIndex.open(str(world.folder / "index"))
    files = (Location(str(world.folder / "corpus")) / "passages").files(".parquet")
    for number, each in enumerate(index.records):
        base = IndexSlice(index.folder, [each], files, index.words, is_split=True)
        version.slices[f"index-{number}"] = MovingSlice(base, bridge)
    return version


@pytest.fixture
def moving(split_world, bridged) -> LocalVersion:
    return _moving(split_world, bridged)


def _take(version, embedding):
    for name, each in version.slices.items():
        _follower(each, embedding, name).poll()


def _states(embedding, *versions) -> Iterator[np.ndarray]:
    """Which rows have moved, in five states; documents move in parts."""
    moved = np.zeros(0, np.int64)
    yield moved
    for number, rows in enumerate(np.array_split(np.random.default_rng(0).permutation(len(IDS)), 4)):
        embedding.write(number, rows.tolist())
        for version in versions:
            _take(version, embedding)
        moved = np.append(moved, rows)
        yield moved


def _scores(bridge, embedding, old, moved):
    """The scores of TEXTS and all passages, in numpy: real where passages have moved, scaled bridged ones elsewhere."""
    queries = embedding.encoder.encode(TEXTS, "query")
    mapped = bridge.query_map(queries)
    real, bridged = queries @ bridge.calibration.new.T, mapped @ bridge.calibration.old.T
    scores = (mapped @ old.T - bridged.mean(1, keepdims=True)) * (real.std(1) / bridged.std(1))[:, None]
    scores += real.mean(1, keepdims=True)
    scores[:, moved] = queries @ embedding.vectors[moved].T
    return scores


def _best_of_documents(scores, top_k, documents=DOCUMENTS):
    """Pairs of document and best passage per query, best first."""
    found = []
    for own in scores:
        ranked = [IDS[row] for row in np.argsort(-own) if parent_of(IDS[row]) in documents]
        firsts = {}
        for passage_id in ranked:
            firsts.setdefault(parent_of(passage_id), passage_id)
        found.append(list(firsts.items())[:top_k])
    return found


def _pairs(answer):
    return [[(hit["doc_id"], hit["passage_id"]) for hit in each["hits"]] for each in answer["data"]]


def test_documents_are_found_by_their_best_passage_old_or_new(moving, embedding, bridged, split_world):
    old = passage_vectors(open_model(str(split_world.folder / "retriever")), PASSAGES)
    secret, headers = "s" * 20, {"authorization": "Bearer " + "s" * 20}
    keys = (ApiKey("acme", hashlib.sha256(secret.encode()).hexdigest(), within=DocFilter(doc_ids=("doc3", "doc4"))),)
    some = ("doc3", "doc6", "doc0")
    for moved in _states(embedding, moving):
        scores = _scores(bridged, embedding, old, moved)
        plain, named, piece, both = (
            each.json()
            for each in ask(
                moving,
                ("POST", SEARCH, {"query": TEXTS, "top_k": 4, "with_text": True}),
                ("POST", SEARCH, {"query": TEXTS, "top_k": 7, "doc_ids": list(some)}),
                ("POST", SEARCH, {"query": TEXTS, "top_k": 7, "doc_ids": ["doc3#11"]}),
                ("POST", SEARCH, {"query": TEXTS, "top_k": 7, "mode": "hybrid"}),
            )
        )
        assert _pairs(plain) == _best_of_documents(scores, 4)
        texts = {each.doc_id: each.text for each in PASSAGES}
        assert all(hit["text"] == texts[hit["passage_id"]] for each in plain["data"] for hit in each["hits"])
        assert _pairs(named) == _best_of_documents(scores, 7, some)
        assert _pairs(piece) == [[("doc3", "doc3#11")]] * len(TEXTS)
        for each in _pairs(both):
            assert sorted(doc_id for doc_id, _ in each) == DOCUMENTS
        [mine] = ask(moving, ("POST", SEARCH, {"query": TEXTS, "top_k": 7}), keys=keys, headers=headers)
        assert _pairs(mine.json()) == _best_of_documents(scores, 7, ("doc3", "doc4"))
    assert len(moved) == len(IDS)


def test_the_processes_of_a_moving_version_know_that_documents_were_split(split_world, bridged, embedding, ray_session):
    """One of its slices is found by a document's id, whichever vectors its passages have."""
    rows = [row for row, doc_id in enumerate(IDS) if doc_id in ("doc3#2", "doc3#12", "doc5#9")]
    embedding.write(0, rows)
    values = split_world.version() | {"retriever": str(split_world.folder / "other"), "num_threads": 1}
    values |= {"bridge": str(bridged.artifact.location), "new_vectors": str(embedding.folder)}
    spec = version_spec("new", VersionConfig.parse(values))
    info = asyncio.run(EncoderReplica.func_or_class(spec).describe())
    assert (info.is_split, info.is_moving) == (True, True)
    queries = embedding.encoder.encode(TEXTS, "query")
    found = []
    for name in ("00000", "00001"):
        replica = IndexReplica.func_or_class(spec, [name], 2)
        hits = asyncio.run(replica.search(info.fingerprint, queries, 40, DocFilter(doc_ids=("doc3", "doc5"))))
        found.append([{hit.doc_id for hit in each} for each in hits])
        replica._follower.stop()
    expected = {each for each in IDS if parent_of(each) in ("doc3", "doc5")}
    assert [one | other for one, other in zip(*found, strict=True)] == [expected] * len(TEXTS)
    assert all(one and other for one, other in zip(*found, strict=True))


def test_recall_of_split_documents_is_probed_while_they_move(moving, embedding):
    probed = []

    async def run():
        routing = Routing(default="new", recall_probe=1.0)
        async with local_server({"new": moving}, routing=routing) as server, server.client() as client:
            server.service._telemetry.probed = lambda *values: probed.append(values)
            for _ in _states(embedding, moving):
                assert (await client.post(SEARCH, json={"query": "array", "top_k": 9})).status_code == 200
                await asyncio.wait_for(asyncio.gather(*server.service.side_searches.tasks), 300)

    asyncio.run(run())
    assert len(probed) == 5 and all(name == "new" and found == due > 0 for name, found, due in probed)


@pytest.mark.parametrize("is_shadow", [True, False])
def test_a_moving_version_is_compared_with_the_real_one_by_documents(moving, embedding, split_world, is_shadow):
    """As the shadow of the real version, or with it as its shadow. They agree once all passages have moved."""
    versions = {"real": LocalVersion.load(split_world, "other", is_split=True), "moving": moving}
    default, shadow = ("real", "moving") if is_shadow else ("moving", "real")
    compared = []

    async def run():
        routing = Routing(default=default, shadow=shadow, shadow_share=1.0)
        async with local_server(versions, routing=routing) as server, server.client() as client:
            server.service._telemetry.compared = lambda *values: compared.append(values)
            for _ in _states(embedding, moving):
                before = len(compared)
                answers = [
                    (await client.post(SEARCH, json={"query": TEXTS, "top_k": 4} | asked)).json()
                    for asked in ({}, {"model": shadow})
                ]
                await asyncio.wait_for(asyncio.gather(*server.service.side_searches.tasks), 300)
                assert [each["model"] for each in answers] == [default, shadow]
                mine, its = ([{hit["doc_id"] for hit in each["hits"]} for each in one["data"]] for one in answers)
                due = [(default, shadow, len(one & other), 4) for one, other in zip(mine, its, strict=True)]
                # What the named version answers is itself not compared when it is the shadow.
                assert [each[:4] for each in compared[before:]] == due

    asyncio.run(run())
    assert {each[2:4] for each in compared[-len(TEXTS) :]} == {(4, 4)}
    assert all(abs(each[4]) < 1e-5 for each in compared[-len(TEXTS) :])
    assert {each[2] for each in compared[: len(TEXTS)]} != {4}


def test_a_shadow_that_finds_another_passage_of_the_same_document_agrees(split_world):
    versions = {
        name: LocalVersion.load(split_world, model, is_split=True)
        for name, model in (("base", "retriever"), ("new", "other"))
    }
    compared = []

    async def run():
        routing = Routing(default="base", shadow="new", shadow_share=1.0)
        async with local_server(versions, routing=routing) as server, server.client() as client:
            server.service._telemetry.compared = lambda *values: compared.append(values)
            body = {"query": TEXTS, "top_k": 7}
            answers = [(await client.post(SEARCH, json=body | each)).json() for each in ({}, {"model": "new"})]
            await asyncio.wait_for(asyncio.gather(*server.service.side_searches.tasks), 300)
            return answers

    base, new = asyncio.run(run())
    assert all(set(one) != set(other) for one, other in zip(_pairs(base), _pairs(new), strict=True)), "other passages"
    assert [each[2:4] for each in compared] == [(7, 7)] * len(TEXTS), "all seven documents are found by both"


def test_a_split_shares_searches_with_a_moving_version_in_every_state(moving, embedding, split_world):
    """A user stays with a version though its passages move, and what each version answers is its own."""
    base = LocalVersion.load(split_world, is_split=True)
    versions = {"base": base, "adapted": moving}
    by_user = {}

    async def run():
        routing = Routing(default="base", split={"base": 0.1, "adapted": 0.9})
        async with local_server(versions, routing=routing) as server, server.client() as client:
            for _ in _states(embedding, moving):
                alone = {}
                for name in versions:
                    answer = await client.post(SEARCH, json={"query": TEXTS, "top_k": 4, "model": name})
                    alone[name] = _pairs(answer.json())
                counts = collections.Counter()
                for number in range(60):
                    body = {"query": TEXTS, "top_k": 4, "user": f"user {number}"}
                    answer = (await client.post(SEARCH, json=body)).json()
                    assert _pairs(answer) == alone[answer["model"]]
                    assert answer["fingerprint"] == versions[answer["model"]].info.fingerprint
                    assert by_user.setdefault(number, answer["model"]) == answer["model"]
                    counts[answer["model"]] += 1
                assert 0 < counts["base"] < 20 < counts["adapted"]
                assert (await client.post(EMBEDDINGS, json={"input": TEXTS})).json()["model"] == "base"
            assert alone["adapted"] != alone["base"]

    asyncio.run(run())


def test_vectors_of_the_new_model_go_to_the_moving_and_the_real_version_alone(moving, embedding, split_world):
    versions = {
        "base": LocalVersion.load(split_world, is_split=True),
        "moving": moving,
        "real": LocalVersion.load(split_world, "other", is_split=True),
    }
    vectors = embedding.encoder.encode(TEXTS, "query").tolist()

    async def run():
        shares = {"base": 0.4, "moving": 0.3, "real": 0.3}
        routing = Routing(default="base", split=shares)
        async with local_server(versions, routing=routing) as server, server.client() as client:
            for _ in _states(embedding, moving):
                counts, found = collections.Counter(), {}
                for number in range(30):
                    body = {"vector": vectors, "fingerprint": embedding.description["fingerprint"], "top_k": 4}
                    answer = (await client.post(SEARCH, json=body | {"user": f"user {number}"})).json()
                    counts[answer["model"]] += 1
                    assert found.setdefault(answer["model"], _pairs(answer)) == _pairs(answer)
                assert set(counts) == {"moving", "real"}
            assert found["moving"] == found["real"], "all passages have moved"

    asyncio.run(run())


def test_passages_of_a_corpus_that_was_split_anew_keep_their_old_vectors(world, bridged, tmp_path, caplog):
    """Their ids name other pieces of the same document; a document that fits in one passage moves."""
    texts = {doc_id: " ".join(PASSAGES[row].text for row in rows) for doc_id, rows in (("a", [0]), ("b", range(1, 9)))}
    (tmp_path / "corpus.jsonl").write_text("\n".join(json.dumps({"_id": each, "text": texts[each]}) for each in texts))
    tables = []
    for split_tokens in (60, 40):
        values = {"source": str(tmp_path / "corpus.jsonl"), "output": str(tmp_path / f"split-{split_tokens}")}
        values |= {"split_tokens": split_tokens, "overlap": 0, "tokenizer": str(world.folder / "retriever")}
        files = (ingest(IngestConfig.parse(values)).location / "passages").files(".parquet")
        tables.append(pa.concat_tables(pq.read_table(each.local_path) for each in files))
    old, new = tables
    assert {"a", "b#1", "b#2"} <= {*old["doc_id"].to_pylist()} & {*new["doc_id"].to_pylist()}
    vectors = world.encoder.encode(old["text"].to_pylist(), "passage", [""] * len(old))
    shard = build_shard("Flat", 32, [(old["doc_id"].to_pylist(), vectors)])
    hashes = packed_hashes(old["content_hash"].to_pylist())
    moving = MovingSlice(
        IndexSlice.of([IndexShard(shard.index, shard.doc_ids, hashes, shard.trained)], is_split=True), bridged
    )
    embedding = Embedding(world, tmp_path / "new")
    ids = new["doc_id"].to_pylist()
    its = to_stored_columns(
        ids, embedding.encoder.encode(new["text"].to_pylist(), "passage", [""] * len(new)), "float32"
    )
    file = Location(str(tmp_path / "new/vectors/part-00000.parquet"))
    write_stored(file, ids, its, new["content_hash"].combine_chunks(), metadata={"encoder": embedding.description})
    with caplog.at_level(logging.WARNING, "ray.serve"):
        _follower(moving, embedding).poll()
    same = {*zip(*(old[each].to_pylist() for each in ("doc_id", "content_hash")), strict=True)} & {
        *zip(*(new[each].to_pylist() for each in ("doc_id", "content_hash")), strict=True)
    }
    num_shared = len({*ids} & {*old["doc_id"].to_pylist()})
    assert moving.num_reembedded == len(same) < num_shared / 2 and "a" in {doc_id for doc_id, _ in same}
    assert f"has {num_shared - len(same)} passages whose content in the index is another" in caplog.text
    found = moving.search(embedding.encoder.encode(TEXTS, "query"), 20, DocFilter(doc_ids=("b",)))
    assert {*found.doc_ids[0].tolist()} == {*old["doc_id"].to_pylist()} - {"a"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_split_documents_move_under_load_beside_a_version_that_shadows_them(
    split_world, bridged, embedding, ray_session
):
    """Ray Serve with `--split base=0.1,adapted=0.9 --shadow base`: files appear, a slice dies, and no request fails."""
    embedding.folder.mkdir()
    (embedding.folder / "building.json").write_text("{}")
    new = split_world.version() | {"retriever": str(split_world.folder / "other"), "num_threads": 1}
    new |= {"bridge": str(bridged.artifact.location), "new_vectors": str(embedding.folder), "index_actors": 2}
    base = split_world.version() | {"num_threads": 1}
    config = ServeConfig.parse(
        {"versions": {"base": base, "new": new}, "split": "base=0.1,new=0.9", "shadow": "base", "port": free_port()}
    )
    url = serve(config, blocking=False)
    try:
        load = _Users(url)
        for number, rows in enumerate(np.array_split(np.random.default_rng(0).permutation(len(IDS)), 4)):
            embedding.write(number, rows.tolist())
            if number == 2:
                (victim,) = processes("ray::ServeReplica:readapt-new:index-1")
                os.kill(victim.pid, signal.SIGKILL)
            _wait_until_moved(url, 10 * (number + 1))
            load.wait_for(40)
        statuses, models, wrong = load.end()
        with httpx.Client(base_url=url, timeout=60) as client:
            found = client.post(SEARCH, json={"query": TEXTS, "top_k": 7, "model": "new"}).json()
            metrics = client.get("/metrics").text
    finally:
        stop()
    assert set(statuses) == {200} and not wrong
    assert set(models.values()) == {"base", "new"}
    real = embedding.encoder.encode(TEXTS, "query") @ embedding.vectors.T
    assert _pairs(found) == _best_of_documents(real, 7)
    assert re.search(r'readapt_shadow_shared\w*\{[^}]*shadow="base"', metrics)


class _Users:
    """Users who search one after the other: each stays with its version, and finds every document once."""

    def __init__(self, url):
        self.statuses, self.models, self.wrong = collections.Counter(), {}, []
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(url, part), daemon=True) for part in range(3)]
        for each in self._threads:
            each.start()

    def _ask(self, url, part):
        with httpx.Client(base_url=url, timeout=120) as client:
            for number in itertools.count():
                if self._ended.is_set():
                    return
                user = f"user {3 * (number % 10) + part}"
                answer = client.post(SEARCH, json={"query": TEXTS[0], "top_k": 7, "user": user})
                self.statuses[answer.status_code] += 1
                if answer.status_code != 200:
                    continue
                found = answer.json()
                ids = [hit["doc_id"] for hit in found["data"][0]["hits"]]
                if sorted(ids) != DOCUMENTS or self.models.setdefault(user, found["model"]) != found["model"]:
                    self.wrong.append((user, found["model"], ids))

    def wait_for(self, num_answers):
        wanted, deadline_s = self.statuses.total() + num_answers, time.monotonic() + 180
        while self.statuses.total() < wanted:
            assert time.monotonic() < deadline_s, self.statuses
            time.sleep(0.05)

    def end(self):
        self._ended.set()
        for each in self._threads:
            each.join(120)
        return self.statuses, self.models, self.wrong
