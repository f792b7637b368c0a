"""What a gateway says of a version whose processes are down; without Ray."""

import asyncio
import logging
from types import SimpleNamespace

import numpy as np
import pytest
from ray import serve
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError

from readapt_ray.serving import ray_backend
from readapt_ray.serving.ray_backend import RayBackend
from readapt_ray.serving.readiness import check_versions
from readapt_ray.serving.schema import RequestError
from readapt_ray.serving.versions import LossPolicy, Ranked


class Handle:
    """A part of a version; `check` gives a value, raises it, or never ends for None."""

    app_name = "readapt-tiny"

    def __init__(self, answer) -> None:
        self.answer = answer
        self.check = SimpleNamespace(remote=self._check)

    async def _check(self, _):
        if self.answer is None:
            await asyncio.Event().wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def readiness(encoder, slices):
    info = SimpleNamespace(fingerprint="f", slices={"index-0": 25, "index-1": 15}, num_vectors=40, is_moving=False)
    backend = RayBackend(info, Handle(encoder), {name: Handle(each) for name, each in slices.items()}, LossPolicy())
    versions = {"tiny": SimpleNamespace(backend=backend, info=info)}
    return asyncio.run(check_versions(versions, {})).versions["tiny"]


@pytest.fixture(autouse=True)
def status(monkeypatch):
    """Ray Serve's view: the second slice cannot start."""
    monkeypatch.setattr(ray_backend, "_CHECK_S", 0.1)
    message = "The deployment failed to start 3 times.\nTraceback ...\nArtifactMissingError: '/srv/run/cisi-sh' does not exist\n"
    deployments = {"encoder": SimpleNamespace(message=""), "index-1": SimpleNamespace(message=message)}
    application = SimpleNamespace(deployments=deployments)
    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(applications={"readapt-tiny": application}))


def test_a_part_that_cannot_start_is_named_and_the_log_has_the_cause(caplog):
    with caplog.at_level(logging.WARNING, "ray.serve"):
        found = readiness(0.01, {"index-0": 25, "index-1": None})
    assert (found.ready, found.reason) == (
        False,
        "not working: index-1 (ArtifactMissingError: 'cisi-sh' does not exist)",
    )
    assert [each.getMessage() for each in caplog.records] == [
        "index-1 of readapt-tiny is down: ArtifactMissingError: '/srv/run/cisi-sh' does not exist"
    ]


def test_without_ray_serves_word_the_log_has_what_was_seen(caplog, monkeypatch):
    monkeypatch.setattr(serve, "status", lambda: 1 / 0)
    with caplog.at_level(logging.WARNING, "ray.serve"):
        found = readiness(RuntimeError("CUDA error"), {"index-0": 25, "index-1": None})
    assert found.reason == "not working: encoder (CUDA error); index-1 (no answer within 0.1 s)"
    assert [each.getMessage() for each in caplog.records] == [
        "encoder of readapt-tiny is down: CUDA error",
        "index-1 of readapt-tiny is down: no answer within 0.1 s",
    ]


def test_a_version_that_works_is_ready_and_one_that_lost_vectors_is_not():
    assert readiness(0.01, {"index-0": 25, "index-1": 15}).ready
    assert not readiness(0.01, {"index-0": 25, "index-1": 14}).ready


class Removed:
    """A handle of a deployment that Ray Serve has removed, or given up."""

    def __init__(self) -> None:
        self.encode = self.search = SimpleNamespace(remote=self._fail)

    async def _fail(self, *_):
        raise DeploymentUnavailableError(DeploymentID("index-1", "readapt-tiny"))


class Slice:
    """A part of an index that finds one passage."""

    def __init__(self) -> None:
        self.search = SimpleNamespace(remote=self._search)

    async def _search(self, *_):
        return [[Ranked("a", 1.0)]]


def test_what_ray_serve_gave_up_is_503_or_a_missing_part():
    info = SimpleNamespace(fingerprint="f")
    vectors = np.ones((1, 4), np.float32)
    for policy in ("wait", "error"):
        backend = RayBackend(info, Removed(), {"index-1": Removed()}, LossPolicy(lost_shards=policy))
        for asked in (backend.encode([[1]]), backend.search(vectors, 3, None)):
            with pytest.raises(RequestError) as caught:
                asyncio.run(asked)
            assert (caught.value.status, caught.value.headers["retry-after"]) == (503, "1")
    slices = {"index-0": Slice(), "index-1": Removed()}
    backend = RayBackend(info, Removed(), slices, LossPolicy(lost_shards="partial"))
    found = asyncio.run(backend.search(vectors, 3, None))
    assert (found.ranked, found.missing) == ([[Ranked("a", 1.0)]], ["index-1"])
