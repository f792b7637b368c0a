"""A version whose passages move to the vectors of a new model while it is served."""

import asyncio
import collections
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import signal
import threading
import time

import httpx
import numpy as np
import pytest

from readapt_ray.artifacts import produce
from readapt_ray.catalog.models import open_model
from readapt_ray.config import StageConfig
from readapt_ray.errors import ArtifactMissingError, FingerprintMismatchError, InputError
from readapt_ray.retrieval.encoder import Encoder
from readapt_ray.retrieval.exact import search_exact
from readapt_ray.retrieval.query_encoder import describe_encoder
from readapt_ray.retrieval.vector_files import write_vectors
from readapt_ray.retrieval.vector_index import VectorIndex
from readapt_ray.serving import moving_slice, new_vectors
from readapt_ray.serving.app import check_version, version_spec
from readapt_ray.serving.doc_filter import DocFilter
from readapt_ray.serving.index_slice import IndexSlice
from readapt_ray.serving.keys import ApiKey
from readapt_ray.serving.moving_slice import MovingSlice
from readapt_ray.serving.new_vectors import Follower
from readapt_ray.serving.options import ServeConfig, VersionConfig
from readapt_ray.serving.report_gate import check_report
from readapt_ray.serving.server import serve, stop
from readapt_ray.serving.slice_plan import planned_slices
from readapt_ray.serving.versions import Routing
from readapt_ray.serving.workers import EncoderReplica, IndexReplica
from readapt_ray.stages.embed import EmbedConfig
from readapt_ray.storage import Location
from tests.factories import small_corpus
from tests.serving.conftest import LocalVersion, local_server, passage_vectors
from tests.serving.test_kills import processes
from tests.serving.test_routes import EMBEDDINGS, SEARCH, TEXTS, ask

PASSAGES = small_corpus(40)


class Embedding:
    """What `readapt embed` with the new model writes, file by file."""

    def __init__(self, world, folder, passages=PASSAGES):
        self.folder, self.model, self.passages = folder, open_model(str(world.folder / "other")), passages
        self.encoder = Encoder.load(self.model)
        self.vectors = passage_vectors(self.model, passages)
        self.description = {**describe_encoder(self.model, self.model.encoding, "float32"), "dimension": 32}

    def write(self, number, rows, **changes):
        """Write a file of the passages at some places of the corpus."""
        file = Location(str(self.folder)) / f"vectors/part-{number:05d}.parquet"
        rows = sorted(rows, key=lambda row: self.passages[row].doc_id)
        values = {"doc_ids": [self.passages[row].doc_id for row in rows], "vectors": self.vectors[list(rows)]}
        encoder = self.description | changes.pop("encoder", {})
        write_vectors(file, **values | changes, dtype="float32", metadata={"encoder": encoder})
        return file

    def finish(self, **changes):
        def write(workspace):
            workspace.counts["num_vectors"] = len(self.passages)
            workspace.details |= {"encoder": self.description | changes, "vector_dtype": "float32"}

        config = EmbedConfig(retriever=self.model.name, corpus="corpus", output=str(self.folder))
        return produce("embed", config, inputs={"corpus": "corpus"}, work=write)

    def found(self, texts, top_k):
        """The doc_ids that a flat index of the new vectors finds."""
        asked = self.encoder.encode(texts, "query")
        ids = [each.doc_id for each in self.passages]
        return search_exact(asked, [(ids, self.vectors)], top_k).doc_ids.tolist()


@pytest.fixture
def embedding(world, tmp_path):
    return Embedding(world, tmp_path / "new")


def _values(world, embedding, **changes):
    values = world.version() | {"retriever": str(world.folder / "other"), "bridge": str(world.folder / "bridge")}
    return values | {"new_vectors": str(embedding.folder), "num_threads": 1} | changes


def _config(world, embedding, **changes):
    return VersionConfig.parse(_values(world, embedding, **changes))


def _slices(world, bridge, index="index"):
    opened = VectorIndex.open(str(world.folder / index))
    corpus = (Location(str(world.folder / "corpus")) / "passages").files(".parquet")
    return [MovingSlice(IndexSlice(opened.folder, [each], corpus, opened.words), bridge) for each in opened.records]


@pytest.fixture
def bridged_slices(world, bridged):
    return _slices(world, bridged)


def _follower(moving, embedding, part="index-0"):
    def compute(function, *given):
        return function(*given)

    return Follower(
        moving,
        Location(str(embedding.folder)) / "vectors",
        encoder=embedding.description,
        compute=compute,
        version="new",
        part=part,
    )


def _hits(replica, version, queries, top_k, wanted=None):
    found = asyncio.run(replica.search(version, queries, top_k, wanted))
    return [[hit.doc_id for hit in each] for each in found]


def test_each_slice_takes_its_passages_of_the_files_that_are_there(world, bridged, embedding, caplog):
    slices = _slices(world, bridged)
    followers = [_follower(each, embedding, f"index-{number}") for number, each in enumerate(slices)]

    def poll():
        caplog.clear()
        with caplog.at_level(logging.INFO, "ray.serve"):
            for each in followers:
                each.poll()
        return [each.num_reembedded for each in slices]

    assert poll() == [0, 0] and not caplog.messages
    embedding.write(0, range(20))
    assert poll() == [20, 0]
    assert caplog.messages == [
        "index-0 of new: 1 files of new vectors taken; 20 of 25 passages (80%) are searched by them"
    ]
    embedding.write(1, range(20, 30))
    assert poll() == [25, 5] and len(caplog.messages) == 2
    assert poll() == [25, 5] and not caplog.messages
    embedding.write(2, range(30, 40))
    assert poll() == [25, 15]
    queries = embedding.encoder.encode(TEXTS, "query")
    for each, rows in zip(slices, (range(25), range(25, 40)), strict=True):
        ids = [PASSAGES[row].doc_id for row in rows]
        oracle = search_exact(queries, [(ids, embedding.vectors[list(rows)])], 5)
        assert each.search(queries, 5).doc_ids.tolist() == oracle.doc_ids.tolist()


def test_a_file_is_read_in_parts_and_only_those_that_hold_passages_of_the_slice(world, bridged, embedding, monkeypatch):
    monkeypatch.setattr(new_vectors, "CHUNK_ROWS", 7)
    read = []
    real = new_vectors.read_rows
    monkeypatch.setattr(new_vectors, "read_rows", lambda *given: read.append(given[1:]) or real(*given))
    first, second = _slices(world, bridged)
    embedding.write(0, range(25))
    _follower(second, embedding).poll()
    assert read == [(0, 25, ("doc_id", "content_hash"))] and second.num_reembedded == 0
    read.clear()
    _follower(first, embedding).poll()
    assert [each[:2] for each in read] == [(0, 25), (0, 7), (7, 7), (14, 7), (21, 4)] and first.num_reembedded == 25


@pytest.mark.parametrize("spoilt", [lambda content: content[:-9], lambda _: b"", lambda _: b"PAR1 of nothing PAR1"])
def test_a_damaged_file_is_named_once_and_taken_when_it_is_whole(bridged_slices, embedding, caplog, spoilt):
    moving = bridged_slices[0]
    follower = _follower(moving, embedding)
    file = embedding.write(0, range(5))
    file.write_bytes(spoilt(file.read_bytes()))
    embedding.write(1, range(5, 10))
    with caplog.at_level(logging.WARNING, "ray.serve"):
        for _ in range(3):
            follower.poll()
            for each in follower._failures.values():
                each.until_s = 0.0
    assert moving.num_reembedded == 5
    (named,) = caplog.messages
    assert "part-00000.parquet is not taken" in named and "cut short or altered" in named
    embedding.write(0, range(5))
    follower.poll()
    assert moving.num_reembedded == 10


def test_a_file_that_fails_is_tried_again_in_ever_longer_pauses(world, bridged, embedding, monkeypatch):
    follower = _follower(_slices(world, bridged)[0], embedding)
    embedding.write(0, range(5)).write_bytes(b"")
    tried, real = [], follower._take
    follower._take = lambda name: tried.append(name) or real(name)
    clock = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    times = []
    for clock in np.arange(100.0, 200.0, 5.0):
        before = len(tried)
        follower.poll()
        times += [clock] * (len(tried) - before)
    assert times == [100, 110, 130, 170]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": {"fingerprint": "other"}}, "it was made by another encoder (other, 32 numbers)"),
        ({"vectors": np.ones((5, 8), np.float32)}, "8 numbers) than this version's"),
    ],
)
def test_vectors_of_another_encoder_are_not_taken(bridged_slices, embedding, caplog, changes, message):
    moving = bridged_slices[0]
    embedding.write(0, range(5), **changes)
    with caplog.at_level(logging.WARNING, "ray.serve"):
        _follower(moving, embedding).poll()
    assert moving.num_reembedded == 0 and message in caplog.text


def test_passages_that_the_index_lacks_are_left_out(world, bridged, embedding, caplog):
    moving = _slices(world, bridged)[0]
    embedding.write(0, range(5), doc_ids=[f"else/{row}" for row in range(5)])
    with caplog.at_level(logging.INFO, "ray.serve"):
        _follower(moving, embedding).poll()
    assert moving.num_reembedded == 0 and not caplog.messages


def test_a_file_that_vanishes_changes_nothing(world, bridged, embedding, caplog):
    moving = _slices(world, bridged)[0]
    follower = _follower(moving, embedding)
    embedding.write(0, range(5))
    follower.poll()
    shutil.rmtree(embedding.folder)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "ray.serve"):
        follower.poll()
    assert moving.num_reembedded == 5 and not caplog.messages
    real = follower._new_or_changed
    follower._new_or_changed = lambda: ["part-00009.parquet", *real()]  # listed, and gone before it is read
    with caplog.at_level(logging.WARNING, "ray.serve"):
        follower.poll()
    assert "part-00009.parquet is gone" in caplog.text and moving.num_reembedded == 5


def test_a_listing_that_fails_is_named_once_and_tried_at_the_next_poll(world, bridged, embedding, caplog, monkeypatch):
    moving = _slices(world, bridged)[0]
    follower = _follower(moving, embedding)
    embedding.write(0, range(5))
    real = Location.listing

    def busy(*_):
        raise OSError("AWS Error SLOW_DOWN")

    monkeypatch.setattr(Location, "listing", busy)
    with caplog.at_level(logging.WARNING, "ray.serve"):
        follower.poll()
        follower.poll()
    assert len(caplog.messages) == 1 and "AWS Error SLOW_DOWN" in caplog.text
    monkeypatch.setattr(Location, "listing", real)
    follower.poll()
    assert moving.num_reembedded == 5


def test_a_follower_ends_once_all_have_moved(world, bridged, embedding, monkeypatch):
    monkeypatch.setattr(new_vectors, "POLL_S", 0.01)
    moving = _slices(world, bridged)[0]
    follower = _follower(moving, embedding)
    before = set(threading.enumerate())
    follower.start()
    (thread,) = set(threading.enumerate()) - before
    embedding.write(0, range(40))
    thread.join(300)
    assert not thread.is_alive() and moving.num_reembedded == 25
    stopped = _follower(_slices(world, bridged)[1], Embedding(world, embedding.folder / "none"))
    before = set(threading.enumerate())
    stopped.start()
    (thread,) = set(threading.enumerate()) - before
    stopped.stop()
    thread.join(300)
    assert not thread.is_alive()


def test_a_slice_that_starts_again_has_the_same_state(world, bridged, embedding, ray_session):
    embedding.write(0, range(3, 33))
    embedding.write(1, range(36, 40), encoder={"fingerprint": "other"})
    spec = version_spec("new", _config(world, embedding))
    queries = embedding.encoder.encode(TEXTS, "query")
    answers = []
    for _ in range(2):
        replicas = [IndexReplica.func_or_class(spec, [name], 2) for name in ("00000", "00001")]
        version = replicas[0]._fingerprint
        answers.append([_hits(each, version, queries, 9) for each in replicas])
        assert [asyncio.run(each.check(version)) for each in replicas] == [25, 15]
        assert [asyncio.run(each.num_reembedded(version)) for each in replicas] == [22, 8]
        for each in replicas:
            each._follower.stop()
    assert answers[0] == answers[1]


def test_the_encoder_of_such_a_version_is_the_new_one_for_queries_and_passages(world, bridged, embedding, ray_session):
    embedding.write(0, range(5))
    spec = version_spec("new", _config(world, embedding))
    info = asyncio.run(EncoderReplica.func_or_class(spec).describe())
    assert (info.encoder_fingerprint, info.dimension) == (embedding.description["fingerprint"], 32)
    assert (info.is_moving, info.passages_by) == (True, "")
    bridged_only = version_spec("new", _config(world, embedding, new_vectors=None))
    fingerprint = str(spec.encoder_fingerprint)
    assert spec.fingerprint(fingerprint) != bridged_only.fingerprint(fingerprint)
    assert spec.fingerprint(fingerprint) == info.fingerprint == check_version("new", _config(world, embedding))


@pytest.mark.usefixtures("bridged")
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"bridge": None}, InputError, "has new_vectors and no bridge; give the index of the old vectors"),
        ({"index": None, "corpus": None}, InputError, "and no index"),
        (
            {"new_vectors": "{}/none"},
            ArtifactMissingError,
            "has no vectors, and nothing writes any there; start `readapt embed",
        ),
    ],
)
def test_what_cannot_move_is_refused(world, embedding, changes, error, message):
    embedding.write(0, range(5))
    filled = {name: value and value.format(world.folder) for name, value in changes.items()}
    with pytest.raises(error, match=message):
        check_version("new", _config(world, embedding, **filled))


def test_vectors_of_another_model_are_refused_at_the_start(world, bridged, embedding, caplog):
    embedding.write(0, range(5)).write_bytes(b"")
    check_version("new", _config(world, embedding))  # a damaged file stops no server
    embedding.write(0, range(5), encoder={"fingerprint": "other"})
    with pytest.raises(FingerprintMismatchError, match=r"vectors of another encoder \(other\) than the bridge"):
        check_version("new", _config(world, embedding))
    shutil.rmtree(embedding.folder)
    embedding.finish(fingerprint="another")
    with pytest.raises(FingerprintMismatchError, match=r"vectors of another encoder \(another\)"):
        check_version("new", _config(world, embedding))


def test_a_run_that_has_written_no_file_yet_is_waited_for(world, bridged, embedding):
    embedding.folder.mkdir()
    (embedding.folder / "building.json").write_text("{}")
    assert check_version("new", _config(world, embedding))


def test_a_bridge_of_an_older_release_is_refused(world, bridged, embedding, tmp_path):
    embedding.write(0, range(5))
    shutil.copytree(world.folder / "bridge", tmp_path / "older")
    manifest = json.loads((tmp_path / "older/manifest.json").read_text())
    del manifest["details"]["calibration_sha256"]
    (tmp_path / "older/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="was made by an older release"):
        check_version("new", _config(world, embedding, bridge=str(tmp_path / "older")))


def test_domains_and_required_reports_cannot_have_new_vectors(world, embedding, tmp_path):
    with pytest.raises(InputError, match="cannot have new_vectors"):
        ServeConfig.parse({"domains": "legal=factors", "new_vectors": "new"})
    required = [{"holds": True, "sentence": "nDCG@10 is over 0.1."}]

    def write(workspace):
        workspace.details["requirements"] = required
        (workspace.location / "report.json").write_text('{"runs": []}')

    produce("evaluate", StageConfig(output=str(tmp_path / "report")), inputs={}, work=write)
    with pytest.raises(InputError, match=r"version 'new' moves to the vectors of .* no report measures"):
        check_report(str(tmp_path / "report"), {"new": _config(world, embedding)})


def test_memory_is_set_aside_for_the_new_vectors(world, bridged, embedding):
    (moving,) = planned_slices(_config(world, embedding))
    (plain,) = planned_slices(_config(world, embedding, new_vectors=None))
    assert moving.num_bytes - plain.num_bytes >= 40 * 32 * 4 * 2
    assert (moving.num_vectors, moving.shards) == (plain.num_vectors, plain.shards)


@pytest.fixture
def moving_version(world, bridged):
    """A version of this process whose passages can move."""
    version = LocalVersion.load(world, "other")
    version.slices = {f"index-{number}": each for number, each in enumerate(_slices(world, bridged))}
    version.info = dataclasses.replace(version.info, is_moving=True)
    return version


def _take(version, embedding):
    for name, each in version.slices.items():
        _follower(each, embedding, name).poll()


def test_requests_of_every_kind_are_answered_while_passages_move(moving_version, embedding):
    """Filters, words, both rankings, passages to embed and vectors of the new model, and readiness."""
    news = [each.doc_id for each in PASSAGES[10:30]]
    vectors = embedding.encoder.encode(TEXTS, "query")
    calls = (
        ("POST", SEARCH, {"query": TEXTS, "top_k": 40}),
        ("POST", SEARCH, {"query": TEXTS, "top_k": 5, "doc_ids": news}),
        ("POST", SEARCH, {"query": TEXTS, "top_k": 5, "mode": "bm25"}),
        ("POST", SEARCH, {"query": TEXTS, "top_k": 5, "mode": "hybrid", "with_text": True}),
        (
            "POST",
            SEARCH,
            {"vector": vectors.tolist(), "fingerprint": embedding.description["fingerprint"], "top_k": 40},
        ),
        ("POST", EMBEDDINGS, {"input": TEXTS, "input_type": "passage"}),
        ("GET", "/readyz", None),
    )

    def asked():
        answers = ask(moving_version, *calls)
        assert [each.status_code for each in answers] == [200] * len(calls), [each.text for each in answers]
        return [each.json() for each in answers]

    states = [asked()]
    for number, rows in enumerate(np.array_split(np.random.default_rng(0).permutation(40), 3)):
        embedding.write(number, rows.tolist())
        _take(moving_version, embedding)
        states.append(asked())
    for plain, some, _, both, by_vector, _, _ in states:
        for each in plain["data"]:
            assert sorted(hit["doc_id"] for hit in each["hits"]) == sorted(each.doc_id for each in PASSAGES)
        assert {hit["doc_id"] for each in some["data"] for hit in each["hits"]} <= set(news)
        assert all(hit["text"] for each in both["data"] for hit in each["hits"])
        assert by_vector["data"] == plain["data"] or _ids(by_vector) == _ids(plain)
    assert [state[6]["versions"]["tiny"]["num_reembedded"] for state in states] == [0, 14, 27, 40]
    assert {state[6]["versions"]["tiny"]["num_vectors"] for state in states} == {40}
    assert len({json.dumps(state[2]["data"]) for state in states}) == 1, "words move nowhere"
    assert _ids(states[-1][0]) == embedding.found(TEXTS, 40)


def _ids(answer):
    return [[hit["doc_id"] for hit in each["hits"]] for each in answer["data"]]


def test_recall_is_probed_while_passages_move(moving_version, embedding, monkeypatch):
    """What is exact is found whole, in every state."""
    monkeypatch.setattr(moving_slice, "_FEW_ROWS", 0)
    probed = []

    async def run():
        routing = Routing(default="new", recall_probe=1.0, shadow="")
        async with local_server({"new": moving_version}, routing=routing) as server, server.client() as client:
            server.service._telemetry.probed = lambda *values: probed.append(values)
            for number, rows in enumerate((range(20), range(20, 40))):
                assert (await client.post(SEARCH, json={"query": "array", "top_k": 9})).status_code == 200
                await asyncio.wait_for(asyncio.gather(*server.service.side_searches.tasks), 300)
                embedding.write(number, rows)
                _take(moving_version, embedding)

    asyncio.run(run())
    assert probed == [("new", 9, 9)] * 2


def test_a_key_finds_only_its_passages_though_they_move(moving_version, embedding):
    embedding.write(0, range(0, 40, 2))
    _take(moving_version, embedding)
    ids = tuple(each.doc_id for each in PASSAGES[:7])
    key, secret = "acme", "s" * 20
    digest = hashlib.sha256(secret.encode()).hexdigest()
    keys = (ApiKey(key, digest, within=DocFilter(doc_ids=ids)),)
    headers = {"authorization": f"Bearer {secret}"}
    [answer] = ask(moving_version, ("POST", SEARCH, {"query": TEXTS, "top_k": 40}), keys=keys, headers=headers)
    assert [sorted(each) for each in _ids(answer.json())] == [sorted(ids)] * len(TEXTS)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_server_moves_to_the_new_vectors_under_load_without_a_failed_request(world, bridged, embedding, ray_session):
    """Files appear one by one, a damaged one among them; a replica dies half way; then the real version takes over."""
    embedding.folder.mkdir()
    (embedding.folder / "building.json").write_text("{}")
    values = {"name": "new", "index_actors": 2} | _values(world, embedding)
    config = world.config(**values)
    url = serve(config, blocking=False)
    try:
        load = _Load(url)
        parts = np.array_split(np.random.default_rng(0).permutation(40), 4)
        for number, rows in enumerate(parts):
            file = embedding.write(number, rows.tolist())
            if number == 1:
                whole = file.read_bytes()
                file.write_bytes(whole[:100])
                load.wait_for(50)
                _wait_until_moved(url, 10)
                file.write_bytes(whole)
            if number == 2:
                (victim,) = processes("ray::ServeReplica:readapt-new:index-1")
                os.kill(victim.pid, signal.SIGKILL)
            _wait_until_moved(url, 10 * (number + 1))
            load.wait_for(20)
        with httpx.Client(base_url=url, timeout=60) as client:
            assert _ids(client.post(SEARCH, json={"query": TEXTS, "top_k": 12}).json()) == embedding.found(TEXTS, 12)
        real = {"real": world.version("other") | {"num_threads": 1}}
        serve(ServeConfig.parse({"versions": real, "port": config.port, "update": True}), blocking=False)
        load.wait_for(20)
        statuses, repeated = load.end()
        with httpx.Client(base_url=url, timeout=60) as client:
            after = client.post(SEARCH, json={"query": TEXTS, "top_k": 12}).json()
    finally:
        stop()
    assert set(statuses) == {200} and not repeated
    assert after["model"] == "real" and _ids(after) == embedding.found(TEXTS, 12)


class _Load:
    """Clients that search one after the other, and look at what they find."""

    def __init__(self, url):
        self.statuses, self.repeated = collections.Counter(), []
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(url,), daemon=True) for _ in range(3)]
        for each in self._threads:
            each.start()

    def _ask(self, url):
        with httpx.Client(base_url=url, timeout=120) as client:
            while not self._ended.is_set():
                try:
                    answer = client.post(SEARCH, json={"query": TEXTS[0], "top_k": 40})
                except httpx.TransportError as error:
                    self.statuses[type(error).__name__] += 1
                    continue
                self.statuses[answer.status_code] += 1
                found = [hit["doc_id"] for hit in answer.json()["data"][0]["hits"]] if answer.status_code == 200 else []
                if len(set(found)) != len(PASSAGES):
                    self.repeated.append(found)

    def wait_for(self, num_answers):
        wanted, deadline_s = self.statuses.total() + num_answers, time.monotonic() + 180
        while self.statuses.total() < wanted:
            assert time.monotonic() < deadline_s
            time.sleep(0.05)

    def end(self):
        self._ended.set()
        for each in self._threads:
            each.join(120)
        return self.statuses, self.repeated


def _moved(url):
    """How many passages have moved; None while a part is down."""
    return httpx.get(f"{url}/readyz", timeout=30).json()["versions"]["new"].get("num_reembedded")


def _wait_until_moved(url, num_passages):
    deadline_s = time.monotonic() + 180
    while _moved(url) != num_passages:
        assert time.monotonic() < deadline_s, _moved(url)
        time.sleep(0.2)
