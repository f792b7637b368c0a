"""How a gateway takes over another state; without Ray."""

import asyncio
import dataclasses
import time
import types

import pytest

from readapt_ray.errors import CorruptFileError
from readapt_ray.serving import gateway
from readapt_ray.serving.versions import Routing
from tests.factories import ingest_artifact, small_corpus
from tests.serving.conftest import local_server


@pytest.fixture
def replica(monkeypatch):
    """A gateway whose versions say of themselves that they are all the same version."""

    async def description(app):
        return f"encoder of {app}", types.SimpleNamespace(fingerprint="f", slices={"index-0": 40})

    async def set_state(versions, routing, missing, *, must_be_whole):
        made.served.append((sorted(versions), sorted(missing)))
        made.had_to_be_whole.append(must_be_whole)

    monkeypatch.setattr(gateway, "_description", description)
    handles = types.SimpleNamespace(get_deployment_handle=lambda name, app: f"{name} of {app}")
    monkeypatch.setattr(gateway, "serve", handles)
    made = object.__new__(gateway.Gateway.func_or_class.__bases__[0])  # without Ray Serve around it
    made._versions, made._completing, made._service = {}, None, types.SimpleNamespace(set_state=set_state)
    made.served, made.had_to_be_whole, made._state = [], [], None
    return made


def take_over(replica, versions, **changes):
    state = {"versions": versions, "routing": {"default": next(iter(versions))}} | changes
    asyncio.run(replica.reconfigure(state))
    return replica._versions


def test_a_version_keeps_its_handles_and_another_application_has_its_own(replica):
    before = take_over(replica, {"a": "readapt-a"})["readapt-a"]
    both = take_over(replica, {"a": "readapt-a", "b": "readapt-b"})
    assert both["readapt-a"] is before
    # The same version under another name: the first may go, and its processes with it.
    alone = take_over(replica, {"b": "readapt-b"})["readapt-b"]
    assert alone is both["readapt-b"]
    assert (alone._encoder, alone._slices) == ("encoder of readapt-b", {"index-0": "index-0 of readapt-b"})
    assert take_over(replica, {"c": "readapt-b"})["readapt-b"] is alone
    assert take_over(replica, {"b": "readapt-b"}, policy={"lost_shards": "partial"})["readapt-b"] is not alone


def test_a_version_that_is_down_holds_up_no_other_and_is_added_once_it_is_up(replica, monkeypatch):
    monkeypatch.setattr(gateway, "_OTHERS_S", 0.05)
    is_up = {"readapt-a": asyncio.Event(), "readapt-b": asyncio.Event()}

    async def description(app):
        await is_up[app].wait()
        return f"encoder of {app}", types.SimpleNamespace(fingerprint=app, slices={})

    monkeypatch.setattr(gateway, "_description", description)
    state = {"versions": {"a": "readapt-a", "b": "readapt-b"}, "routing": {"default": "b"}}

    async def run():
        start = asyncio.create_task(replica.reconfigure(state))
        await asyncio.sleep(0.2)
        assert not start.done()  # nothing is up
        is_up["readapt-a"].set()
        await asyncio.wait_for(start, 300)
        assert replica.served == [(["a"], ["b"])]
        is_up["readapt-b"].set()
        await asyncio.wait_for(replica._completing, 300)
        assert replica.served[-1] == (["a", "b"], [])
        # Another state ends the wait for this one.
        is_up["readapt-b"].clear()
        await replica.reconfigure(state)
        waiting = replica._completing
        await replica.reconfigure({"versions": {"a": "readapt-a"}, "routing": {"default": "a"}})
        assert waiting.cancelled() and replica._completing is None
        assert replica.served[-1] == (["a"], [])

    asyncio.run(run())


def test_an_application_that_is_not_there_is_waited_for(monkeypatch):
    seen = []

    def handle(deployment, app):
        seen.append(app)
        if len(seen) < 3:
            raise KeyError(f"{deployment} of {app} does not exist.")

        async def describe():
            return "info"

        return types.SimpleNamespace(describe=types.SimpleNamespace(remote=describe))

    monkeypatch.setattr(gateway, "_POLL_S", 0.0)
    monkeypatch.setattr(gateway, "serve", types.SimpleNamespace(get_deployment_handle=handle))
    assert asyncio.run(gateway._description("readapt-a"))[1] == "info"
    assert seen == ["readapt-a"] * 3


def test_a_version_whose_passages_are_damaged_holds_up_no_other(world, version, tmp_path):
    """Requests that name it are told why; of the split only what is up takes part."""
    made = ingest_artifact(tmp_path / "corpus", small_corpus(5))
    [file] = (tmp_path / "corpus/passages").iterdir()
    file.write_bytes(file.read_bytes()[:-20])
    info = dataclasses.replace(version.info, corpus=made.uri, corpus_fingerprint=made.fingerprint)
    damaged = dataclasses.replace(version, info=info)
    routing = Routing(default="damaged", split={"damaged": 9.0, "tiny": 1.0}, shadow="damaged")

    async def run():
        async with (
            local_server({"damaged": damaged, "tiny": version}, routing=routing) as server,
            server.client() as client,
        ):
            searches = [await client.post("/v1/search", json={"query": "array"}) for _ in range(5)]
            return searches, await client.post("/v1/embeddings", json={"input": "array"}), await client.get("/readyz")

    searches, embedded, ready = asyncio.run(run())
    assert {(each.status_code, each.json()["model"]) for each in searches} == {(200, "tiny")}
    assert (embedded.status_code, embedded.json()["error"]["code"]) == (503, "version_down")
    assert "'damaged' is not up: part-00000.parquet was cut short or altered" in embedded.json()["error"]["message"]
    assert ready.status_code == 503 and ready.json()["versions"]["tiny"]["ready"]
    with pytest.raises(CorruptFileError):
        asyncio.run(_served_alone(damaged))


async def _served_alone(version):
    async with local_server({"damaged": version}):
        pass


@pytest.mark.parametrize(("seconds", "expected"), [(60, [True, False]), (-60, [False, False])])
def test_only_a_gateway_that_starts_in_an_update_must_serve_every_version(replica, seconds, expected):
    for _ in range(2):  # the second one finds a state to keep
        take_over(replica, {"a": "readapt-a"}, whole_until_s=time.time() + seconds)
    assert replica.had_to_be_whole == expected


def test_a_new_default_that_cannot_be_served_leaves_the_former_one(version, tmp_path):
    """In a gateway that serves; one that starts in an update does not start."""
    made = ingest_artifact(tmp_path / "corpus", small_corpus(5))
    [file] = (tmp_path / "corpus/passages").iterdir()
    file.write_bytes(file.read_bytes()[:-20])
    info = dataclasses.replace(version.info, corpus=made.uri, corpus_fingerprint=made.fingerprint)
    both = {"base": version, "new": dataclasses.replace(version, info=info)}

    async def run():
        async with local_server({"base": version}) as server, server.client() as client:
            await server.service.set_state(both, Routing(default="new"))
            answers = [
                await client.post("/v1/embeddings", json={"input": "array"} | name) for name in ({}, {"model": "new"})
            ]
            with pytest.raises(CorruptFileError):
                await server.service.set_state(both, Routing(default="base"), must_be_whole=True)
            return answers, await client.get("/readyz")

    (unnamed, named), ready = asyncio.run(run())
    assert (unnamed.status_code, unnamed.json()["model"]) == (200, "base")
    assert named.status_code == 503
    assert not ready.json()["versions"]["new"]["ready"]
