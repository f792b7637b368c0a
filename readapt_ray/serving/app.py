"""`readapt serve`: a retriever, and its index where there is one, behind HTTP.

Enter a retriever, an index of vectors that it made, and a corpus for titles and texts; leaves a Ray
Serve app that speaks OpenAI's embeddings and a search. What does not fit together is refused before
anything starts.
"""

import contextlib
import logging
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from types import FrameType
from typing import Any, Literal

from pydantic import Field

from readapt_ray.catalog.models import Model, encoding_of, find_model, load_tokenizer
from readapt_ray.catalog.retrievers import Encoding
from readapt_ray.config import Config
from readapt_ray.errors import FingerprintMismatchError, InputError, ReadaptError
from readapt_ray.retrieval.templates import EncodingOption
from readapt_ray.stages import cluster

logger = logging.getLogger("readapt_ray")

APP_NAME = "readapt"
_ANSWER_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 30.0
_POLL_S = 0.1


class ServeConfig(Config):
    """Options of `readapt serve`."""

    retriever: str
    """The model to serve: catalog name, folder, URI or hub id."""
    index: str | None = None
    """Output folder of `readapt index`, made by this retriever. Without one there is no search."""
    corpus: str | None = None
    """Output folder of `readapt ingest`, for titles and texts in search results. Optional."""
    name: str = ""
    """What clients call the model; default: the last part of `retriever`."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all. There are no API keys: whoever reaches it may use it."""
    port: int = Field(default=8000, ge=1, le=65535)
    """Port to listen on."""
    num_replicas: int = Field(default=1, ge=1)
    """Processes that each hold the model and the index."""
    num_cpus_per_replica: float = Field(default=0.5, ge=0)
    """CPUs that Ray sets aside for a replica; how many it really uses is `num_threads`."""
    num_gpus_per_replica: float | None = Field(default=None, ge=0)
    """GPUs that Ray sets aside for a replica; default: 1 where the cluster has any, else 0."""
    num_threads: int | None = Field(default=None, ge=1)
    """Threads that a replica computes with; default: its share of this machine's CPUs."""
    max_batch: int = Field(default=32, ge=1, le=1024)
    """Requests that are encoded together at most."""
    batch_wait_s: float = Field(default=0.002, ge=0, le=10)
    """Seconds that a request waits for others at most."""
    max_queued: int = Field(default=256, ge=1)
    """Requests that wait at most; above that the answer is 429."""
    max_body_bytes: int = Field(default=16 << 20, ge=1024)
    """Bytes of a request at most."""
    encoding: EncodingOption = None
    """How the retriever wants its text, as a JSON file; default: as the index was made, or what its folder says."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Type that the model computes in; default: as the index was made, or float32."""
    batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens that go through the model at once at most, padding included; default: what suits the device."""


def build_app(config: ServeConfig) -> Any:
    """The Ray Serve application of a config, for `serve.run` or a Serve config file.

    Raises:
        ModelError: the retriever is not a model, or nothing says how it wants its text.
        ArtifactMissingError: the index or the corpus is not complete.
        FingerprintMismatchError: the index was made by another model, or encoded otherwise.
    """
    model = find_model(config.retriever)
    recorded = _open_index(config.index)
    encoding = config.encoding or (
        Encoding.parse(recorded["encoding"], where=str(config.index)) if recorded else encoding_of(model)
    )
    dtype = config.dtype or (recorded["dtype"] if recorded else "float32")
    fingerprint = _check_encoder(model, encoding, dtype, config, recorded)
    if config.corpus:
        from readapt_ray.artifacts import open_artifact

        open_artifact(config.corpus, "ingest")
    resources = cluster.connect()
    from ray.serve.config import BackpressureConfig

    from readapt_ray.serving.deployment import Replica, ReplicaOptions

    has_gpus = resources.num_gpus > 0
    num_gpus = config.num_gpus_per_replica if config.num_gpus_per_replica is not None else float(has_gpus)
    options = ReplicaOptions(
        retriever=config.retriever,
        name=config.name or config.retriever.rstrip("/").rsplit("/", 1)[-1],
        encoding=encoding,
        dtype=dtype,
        fingerprint=fingerprint,
        index=config.index,
        corpus=config.corpus,
        batch_tokens=config.batch_tokens,
        max_batch=config.max_batch,
        batch_wait_s=config.batch_wait_s,
        max_body_bytes=config.max_body_bytes,
        num_threads=config.num_threads or max(1, (os.cpu_count() or 1) // config.num_replicas),
    )
    return Replica.options(  # type: ignore[attr-defined]
        num_replicas=config.num_replicas,
        # Ray's default of 5 would cap every batch at 5; a replica must also hold what waits for the next batch.
        max_ongoing_requests=4 * config.max_batch,
        max_queued_requests=config.max_queued,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        ray_actor_options={"num_cpus": config.num_cpus_per_replica, "num_gpus": num_gpus},
    ).bind(options)


def serve(config: ServeConfig, *, blocking: bool = True) -> str:
    """Serve until Ctrl-C, or, without `blocking`, return once the app answers.

    Returns:
        The base URL, such as `http://127.0.0.1:8000`.

    Raises:
        InputError: the port is taken, this Ray serves already, or the retriever, the index and the
            corpus cannot be used or do not fit together; nothing was started.
        ReadaptError: a replica could not start.
    """
    _check_port(config.host, config.port)
    app = build_app(config)
    from ray.serve.config import HTTPOptions

    ray_serve = _ray_serve()
    if ray_serve.status().applications:
        raise InputError("this Ray cluster serves an app already; stop it first, or use another cluster")
    url = f"http://{'127.0.0.1' if config.host in ('0.0.0.0', '::') else config.host}:{config.port}"
    try:
        ray_serve.start(http_options=HTTPOptions(host=config.host, port=config.port))
        ray_serve.run(app, name=APP_NAME, route_prefix="/", logging_config={"enable_access_log": False})
        _wait_for_answer(url)
    except ReadaptError:
        stop()
        raise
    except Exception as error:
        reason = _deployment_message(ray_serve) or str(cluster.cause_of(error))
        stop()
        raise ReadaptError(f"the server could not start: {reason}") from None
    except BaseException:
        stop()
        raise
    logger.info("serving %s at %s", config.retriever, url)
    if blocking:
        _wait_for_signal()
        stop()
    return url


def stop() -> None:
    """Stop serving and free the port; nothing happens where nothing is served. Ray itself goes on."""
    import ray

    if not ray.is_initialized():
        return
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    serve_quietly = _ray_serve()
    # serve.shutdown() alone waits inside a task of the controller, which dies with that task still running: Ray then
    # prints an error that nobody can act on. So the controller is told first, and gone before serve.shutdown() asks.
    deadline_s = time.monotonic() + _STOP_TIMEOUT_S
    with contextlib.suppress(ValueError, ray.exceptions.RayActorError):
        ray.get(ray.get_actor(SERVE_CONTROLLER_NAME, SERVE_NAMESPACE).graceful_shutdown.remote(wait=False))
        while time.monotonic() < deadline_s:
            ray.get_actor(SERVE_CONTROLLER_NAME, SERVE_NAMESPACE)
            time.sleep(_POLL_S)
    serve_quietly.shutdown()


def _ray_serve() -> Any:
    """Ray Serve, which sets its logger to talk on the user's terminal when it is imported."""
    from ray import serve as ray_serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    return ray_serve


def _open_index(uri: str | None) -> dict[str, Any]:
    """What made the vectors of an index; empty where there is no index."""
    if uri is None:
        return {}
    from readapt_ray.retrieval.vector_index import VectorIndex

    return VectorIndex.open(uri).encoder


def _check_encoder(model: Model, encoding: Encoding, dtype: str, config: ServeConfig, recorded: dict[str, Any]) -> str:
    """The fingerprint of the encoder, seen to be that of the index."""
    from readapt_ray.retrieval.encoder import encoder_fingerprint
    from readapt_ray.retrieval.templates import TextTokenizer

    TextTokenizer(load_tokenizer(model), encoding)
    found = encoder_fingerprint(model, encoding, dtype)
    if recorded and found != recorded["fingerprint"]:
        wanted = {**encoding.model_dump(mode="json"), "dtype": dtype}
        there = {**recorded["encoding"], "dtype": recorded["dtype"]}
        differing = [
            f"{key} is {there.get(key)!r} there and {value!r} here"
            for key, value in wanted.items()
            if there.get(key) != value
        ]
        what = "; ".join(differing) or f"its vectors are of other weights (those of {recorded['model']!r})"
        raise FingerprintMismatchError(
            f"index {config.index!r} does not fit {config.retriever!r}: {what}; serve the model that made the index, or "
            f"run `readapt embed` and `readapt index` with this one"
        )
    return found


def _check_port(host: str, port: int) -> None:
    """Find out whether the port can be listened on; on a cluster that is elsewhere nobody here can know."""
    if os.environ.get("RAY_ADDRESS"):
        return
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(
                f"port {port} on {host} cannot be used: {error.strerror or error}; stop what listens there, or give another --port"
            ) from None


def _wait_for_answer(url: str) -> None:
    deadline_s = time.monotonic() + _ANSWER_TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(f"{url}/healthz", timeout=_ANSWER_TIMEOUT_S) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError) as error:
            if time.monotonic() > deadline_s:
                raise ReadaptError(f"the server runs, but {url}/healthz does not answer: {error}") from error
        time.sleep(_POLL_S)


def _wait_for_signal() -> None:
    """Return on Ctrl-C or SIGTERM."""
    told = threading.Event()

    def tell(_: int, __: FrameType | None) -> None:
        told.set()

    before = {each: signal.signal(each, tell) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        while not told.wait(1.0):
            continue
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _deployment_message(ray_serve: Any) -> str:
    """The last line of what Ray Serve says of a replica that did not start."""
    for application in ray_serve.status().applications.values():
        for deployment in application.deployments.values():
            lines = [line.strip() for line in deployment.message.splitlines() if line.strip()]
            if lines:
                return str(lines[-1])
    return ""
