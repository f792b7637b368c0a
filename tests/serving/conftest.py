import asyncio
import contextlib
import hashlib
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import faiss
import httpx
import numpy as np
import pytest
import torch
import uvicorn

from readapt_ray.artifacts import Workspace, open_artifact, produce
from readapt_ray.catalog.models import OpenModel, open_model
from readapt_ray.config import StageConfig
from readapt_ray.records import Passage
from readapt_ray.retrieval.bm25 import WordCounts, WordIndex, words
from readapt_ray.retrieval.bridge import Bridge
from readapt_ray.retrieval.calibration import Calibration
from readapt_ray.retrieval.encoder import Encoder
from readapt_ray.retrieval.index_files import words_file, write_shard
from readapt_ray.retrieval.index_shard import build_shard
from readapt_ray.retrieval.query_encoder import describe_encoder
from readapt_ray.retrieval.query_maps import QueryMap
from readapt_ray.retrieval.vector_index import VectorIndex
from readapt_ray.serving import guard, readiness, room, server
from readapt_ray.serving.doc_filter import DocFilter
from readapt_ray.serving.guard import Guard
from readapt_ray.serving.index_slice import IndexSlice
from readapt_ray.serving.keys import ApiKey, KeyRing
from readapt_ray.serving.moving_slice import MovingSlice
from readapt_ray.serving.options import Limits, ServeConfig
from readapt_ray.serving.routes import build_api
from readapt_ray.serving.search_service import SearchService
from readapt_ray.serving.server import serve, stop
from readapt_ray.serving.spans import RequestSpans
from readapt_ray.serving.telemetry import Telemetry
from readapt_ray.serving.versions import Found, Ranked, Routing, VersionInfo, merge_ranked
from readapt_ray.stages.bridge import BridgeConfig
from tests.chaos.nodes import free_port
from tests.factories import full_retriever, ingest_artifact, small_corpus, tiny_decoder, write_contract


@dataclass(frozen=True)
class World:
    """Two tiny retrievers, `retriever` and `other`, each with its index of a small corpus in two shards."""

    folder: Path
    encoder: Encoder
    """That of `retriever`, without HTTP."""

    def version(self, name: str = "retriever") -> dict[str, str]:
        index = "index" if name == "retriever" else f"index-{name}"
        return {
            "retriever": str(self.folder / name),
            "index": str(self.folder / index),
            "corpus": str(self.folder / "corpus"),
        }

    def config(self, **changes) -> ServeConfig:
        chosen = {} if "versions" in changes else self.version()
        return ServeConfig.parse(chosen | {"port": free_port()} | changes)


def index_artifact(folder: Path, encoder: Encoder, name: str, passages, factory: str = "Flat", **details) -> None:
    made_by = {
        "fingerprint": encoder.fingerprint,
        "model": name,
        "dimension": encoder.dimension,
        "dtype": "float32",
        "encoding": encoder.encoding.model_dump(mode="json"),
    }

    def work(workspace: Workspace) -> None:
        records, word_sums = [], {}
        counts = WordCounts()
        counts.add(words(f"{each.title} {each.text}") for each in passages)
        for number, part in enumerate((passages[:25], passages[25:])):
            vectors = encoder.encode([each.text for each in part], "passage", [each.title for each in part])
            shard = build_shard(factory, encoder.dimension, [([each.doc_id for each in part], vectors)])
            shards = workspace.location / "shards"
            measured = None if factory == "Flat" else {"recall_at_10": 1.0, "recall_at_100": 1.0, "query_ms": 1.0}
            options = {"encoder": encoder.fingerprint, "factory": factory, "measured": measured}
            written = write_shard(shards, f"{number:05d}", shard, **options)
            records.append(asdict(written))
            content = WordIndex.build([words(f"{each.title} {each.text}") for each in part], counts).to_bytes()
            words_file(shards, written.name).write_bytes(content)
            word_sums[written.name] = hashlib.sha256(content).hexdigest()
        workspace.counts |= {"num_vectors": len(passages)}
        workspace.details |= {"encoder": made_by, "kind": "flat", "shards": records, "bm25": word_sums, **details}

    produce("index", StageConfig(output=str(folder)), inputs={"vectors": encoder.fingerprint}, work=work)


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("serving")
    pretrained = tiny_decoder(folder / "pretrained")
    passages = small_corpus(40)
    ingest_artifact(folder / "corpus", passages, num_files=2)
    encoders = []
    for seed, (name, index) in enumerate((("retriever", "index"), ("other", "index-other")), start=1):
        write_contract(full_retriever(folder / name, pretrained, seed=seed))
        encoders.append(Encoder.load(open_model(str(folder / name))))
        index_artifact(folder / index, encoders[-1], name, passages)
    return World(folder, encoders[0])


def passage_vectors(model: OpenModel, passages: Sequence[Passage] | None = None) -> np.ndarray:
    """What a model makes of the passages of the world."""
    passages = small_corpus(40) if passages is None else passages
    return Encoder.load(model).encode([each.text for each in passages], "passage", [each.title for each in passages])


@pytest.fixture(scope="session")
def bridged(world: World) -> Bridge:
    """A bridge from queries of `other` to the vectors of `retriever`: any rotation."""
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(32, 32)))[0].astype(np.float32)
    content = QueryMap("orthogonal", rotation).to_bytes()
    old, new = (open_model(str(world.folder / name)) for name in ("retriever", "other"))
    calibration = Calibration(*(passage_vectors(each) for each in (old, new))).to_bytes()

    def write(workspace):
        (workspace.location / "map.safetensors").write_bytes(content)
        (workspace.location / "calibration.safetensors").write_bytes(calibration)
        workspace.details |= {
            "old_encoder": {**describe_encoder(old, old.encoding, "float32"), "dimension": 32},
            "new_encoder": {**describe_encoder(new, new.encoding, "float32"), "dimension": 32},
            "map": "orthogonal",
            "map_sha256": hashlib.sha256(content).hexdigest(),
            "calibration_sha256": hashlib.sha256(calibration).hexdigest(),
            "not_worth_it": "",
        }

    vectors = open_artifact(world.version()["index"], "index").manifest.inputs["vectors"]
    config = BridgeConfig(old_vectors="old-vectors", retriever=new.name, output=str(world.folder / "bridge"))
    return Bridge(produce("bridge", config, inputs={"old_vectors": vectors, "corpus": "corpus"}, work=write))


@dataclass
class LocalVersion:
    """A version in this process, which a test can slow down, hold up, break, and ask what it was given."""

    info: VersionInfo
    encoder: Encoder
    slices: dict[str, IndexSlice | MovingSlice]
    delay_s: float = 0.0
    gate: asyncio.Event | None = None
    """It encodes nothing before this is set; None: it need not wait."""
    encoded: list[list[Sequence[int]]] = field(default_factory=list)
    broken: str = ""

    @classmethod
    def load(cls, world: World, name: str = "retriever", *, is_split: bool = False, **changes) -> "LocalVersion":
        paths = world.version(name)
        model = open_model(paths["retriever"])
        encoder = Encoder.load(model)
        index = VectorIndex.open(paths["index"])
        corpus = open_artifact(paths["corpus"], "ingest")
        files = (corpus.location / "passages").files(".parquet")
        slices = {
            f"index-{number}": IndexSlice(index.folder, [each], files, index.words, is_split=is_split)
            for number, each in enumerate(index.records)
        }
        values = {
            "fingerprint": f"{encoder.fingerprint}+index",
            "encoder_fingerprint": encoder.fingerprint,
            "encoding": encoder.encoding,
            "tokenizer": model.tokenizer,
            "dimension": encoder.dimension,
            "batch_tokens": encoder.batch_tokens,
            "num_slots": 1,
            "slices": {name: each.num_vectors for name, each in slices.items()},
            "has_words": bool(index.words),
            "is_split": is_split,
            "corpus": corpus.uri,
            "corpus_fingerprint": corpus.fingerprint,
        }
        return cls(VersionInfo(**(values | changes)), encoder, slices)

    async def encode(self, rows):
        self.encoded.append(rows)
        await asyncio.sleep(self.delay_s)
        if self.gate is not None:
            await self.gate.wait()
        if self.broken:
            raise RuntimeError(self.broken)
        return await asyncio.to_thread(self.encoder.encode_ids, rows)

    async def search(self, vectors: np.ndarray, top_k: int, wanted: DocFilter | None) -> Found:
        parts = []
        for each in self.slices.values():
            hits = each.search(vectors, top_k, wanted)
            parts.append([[Ranked(doc.doc_id, doc.score) for doc in hits.of_query(q, "")] for q in range(len(vectors))])
        return Found(merge_ranked(parts, len(vectors), top_k), [])

    async def search_words(self, texts: Sequence[str], top_k: int, wanted: DocFilter | None) -> Found:
        parts = []
        for each in self.slices.values():
            *_, hits = each.search_words(texts, top_k, wanted)
            parts.append([[Ranked(doc.doc_id, doc.score) for doc in hits.of_query(q, "")] for q in range(len(texts))])
        return Found(merge_ranked(parts, len(texts), top_k), [])

    async def check(self) -> float:
        await self.encode([[1, 2, 3]])
        return 0.001

    async def num_reembedded(self) -> int | None:
        each = [part.num_reembedded for part in self.slices.values() if isinstance(part, MovingSlice)]
        return sum(each) if each else None


@dataclass
class Local:
    """The whole server in this process, but for Ray: clients of `client` go through the guard, the API and the search service."""

    service: SearchService
    versions: dict[str, LocalVersion]
    app: Guard

    def client(self, **options) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(self.app, client=options.pop("peer", ("127.0.0.1", 40000)))
        return httpx.AsyncClient(transport=transport, base_url=options.pop("url", "http://localhost"), **options)


async def until(condition: Callable[[], object]) -> None:
    """Return once a condition is true."""
    async with asyncio.timeout(300):
        while not condition():
            await asyncio.sleep(0.01)


LIMITS = {
    "batch_wait_s": 0.0,
    "max_requests": 1000,
    "max_queued_tokens": 1 << 20,
    "max_body_bytes": 200_000,
    "max_inputs": 2048,
    "timeout_s": 300.0,
}


@pytest.fixture(scope="module")
def version(world) -> LocalVersion:
    return LocalVersion.load(world)


@pytest.fixture
def fresh(world) -> LocalVersion:
    """A version of its own, to slow down or break."""
    return LocalVersion.load(world)


@contextlib.asynccontextmanager
async def local_server(
    versions: dict[str, LocalVersion],
    *,
    routing: Routing | None = None,
    keys: Sequence[ApiKey] = (),
    allow_anonymous: bool = False,
    sees_clients: bool = True,
    spans: RequestSpans | None = None,
    **limits,
):
    """A `Local` server of these versions; the first is the default."""
    service = SearchService(Limits(**(LIMITS | limits)), Telemetry())
    await service.set_state(versions, routing or Routing(default=next(iter(versions))))

    async def no_metrics() -> str:
        return "# nothing\n"

    app = Guard(
        build_api(service, no_metrics),
        keys=KeyRing(keys),
        allow_anonymous=allow_anonymous,
        sees_clients=sees_clients,
        limits=service.limits,
        telemetry=Telemetry(),
        spans=spans,
    )
    yield Local(service, versions, app)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine a check may take long, and a client may be slow to send the rest of a body."""
    monkeypatch.setattr(readiness, "_CHECK_S", 300.0)
    monkeypatch.setattr(guard, "_IDLE_S", 300.0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from threads, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    yield
    torch.set_num_threads(before)


def started(config: ServeConfig) -> str:
    """The URL of a server on Ray Serve; a busy machine may take its time to start it, and to free what ended before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "_SETTLED_S", 300.0)
        patch.setattr(server, "_ANSWER_TIMEOUT_S", 600.0)
        return serve(config, blocking=False)


@pytest.fixture(scope="module")
def served(ray_session, world) -> Iterator[httpx.Client]:
    """An HTTP client of a server on Ray Serve, which is gone after the module: it holds CPUs that other tests want."""
    url = started(world.config(name="tiny", index_actors=2, max_body_bytes=200_000))
    with httpx.Client(base_url=url, timeout=300) as client:
        yield client
    stop()


@contextlib.contextmanager
def serving_at(versions: dict[str, LocalVersion], **options) -> Iterator[str]:
    """The URL of a `Local` server on a real port, in a thread of this process."""
    listening, stopped = socket.create_server(("127.0.0.1", 0)), []

    async def run() -> None:
        async with local_server(versions, **options) as local:
            web = uvicorn.Server(uvicorn.Config(local.app, log_level="error", lifespan="off"))
            stopped.append(web)
            await web.serve(sockets=[listening])

    thread = threading.Thread(target=asyncio.run, args=(run(),), daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    httpx.get(f"{url}/healthz", timeout=300)  # the socket listens already, so this waits for the server
    yield url
    stopped[0].should_exit = True
    thread.join(300)
