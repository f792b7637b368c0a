"""What an update refuses before it changes anything; without Ray."""

import types

import pytest

from readapt_ray.errors import InputError, ReadaptError
from readapt_ray.serving import app, rollout, server, updates
from readapt_ray.serving.keys import ApiKey
from readapt_ray.serving.options import ServeConfig
from readapt_ray.storage import Location


def config(**changes):
    return ServeConfig.parse({"retriever": "r", "update": True} | changes)


def served(**changes):
    """What a gateway with API keys was started with, and what it serves."""
    return app.gateway_of(config(**changes), (ApiKey("someone", "0" * 64),))


def test_an_update_does_not_drop_the_api_keys():
    with pytest.raises(InputError, match=r"the server has API keys, and this update has none.*give --api-keys FILE"):
        updates.check_options(config(), (), *served())
    updates.check_options(config(), (ApiKey("other", "1" * 64),), *served())
    updates.check_options(config(allow_anonymous=True), (), *served())


def test_options_that_an_update_does_not_repeat_are_named(caplog):
    former = served(timeout_s=300.0, max_requests=8, cors_origins=("https://a",), drain_s=5, lost_shards="partial")
    updates.check_options(config(max_requests=16, allow_anonymous=True), (), *former)
    assert (
        "fall back: timeout_s from 300.0 to 60.0, cors_origins from ('https://a',) to (), drain_s from 5.0 to 30.0, "
        "lost_shards from partial to wait;"
    ) in caplog.text


def test_an_update_does_not_wait_for_ever(monkeypatch):
    def result(timeout_s):
        assert timeout_s <= 60
        raise TimeoutError

    answer = types.SimpleNamespace(result=result)
    handle = types.SimpleNamespace(setup=types.SimpleNamespace(remote=lambda: answer))
    monkeypatch.setattr("ray.serve.get_deployment_handle", lambda *_: handle)
    with pytest.raises(InputError, match=r"does not answer .*nothing was changed"):
        updates.served_gateway()


@pytest.fixture
def room(monkeypatch):
    """Sets the free memory of a machine of 12 GiB, in GiB, and what each of three shards of an index takes."""
    free = []

    def set_sizes(num_bytes, *gib):
        sums = {"index_sha256": "", "ids_sha256": ""}
        shards = [{"name": name, "num_bytes": num_bytes, "num_vectors": 1} | sums for name in "abc"]
        manifest = types.SimpleNamespace(details={"shards": shards})
        index = types.SimpleNamespace(manifest=manifest, location=Location("/nowhere"))
        monkeypatch.setattr("readapt_ray.retrieval.vector_index.open_artifact", lambda *_: index)
        free[:] = gib
        # Two slices: a and c, b. Flat shards are mapped, so nothing is in memory twice.
        return [config(index="i", index_actors=2).each_version()["r"]]

    def resources(memory):
        return {"CPU": 8.0, "memory": memory * 2**30}

    monkeypatch.setattr(updates, "_SETTLED_S", 0.5)
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True}])
    monkeypatch.setattr("ray.cluster_resources", lambda: resources(12.0))
    monkeypatch.setattr("ray.available_resources", lambda: resources(free.pop(0) if len(free) > 1 else free[0]))
    return set_sizes


def test_an_index_that_memory_has_no_room_for_is_refused(room):
    updates.check_room(room(2 << 30, 12.0))
    updates.check_room(room(2 << 30, 1.0, 12.0))  # what ended gives its part back soon
    with pytest.raises(InputError, match=r"ask for 12\.0 GiB memory, and 11\.0 GiB of 12\.0 GiB are free"):
        updates.check_room(room(4 << 30, 11.0))


def test_an_index_of_a_terabyte_is_refused_at_once_also_at_the_first_start(room, monkeypatch):
    monkeypatch.setattr(updates, "_SETTLED_S", 3600.0)
    added = room(2**40, 12.0)
    with pytest.raises(InputError, match=r"ask for 3072\.0 GiB memory, and 12\.0 GiB of 12\.0 GiB are free"):
        updates.check_room(added)
    first = config(index="i", index_actors=2, update=False)
    monkeypatch.setattr(server.connection, "connect", lambda: None)
    monkeypatch.setattr(server, "stop", lambda: None)
    monkeypatch.setattr("ray.serve.status", lambda: types.SimpleNamespace(applications={}))
    with pytest.raises(InputError, match=r"ask for 3072\.0 GiB memory"):
        server._deploy(first, (), "http://127.0.0.1:1", {})


class Statuses:
    """What Ray Serve says of its applications, one answer after the other."""

    def __init__(self, monkeypatch, *answers):
        monkeypatch.setattr("ray.serve.status", lambda: types.SimpleNamespace(applications=answers[self.num_asked()]))
        monkeypatch.setattr("ray.serve.run_many", lambda targets, **_: None)
        monkeypatch.setattr(rollout, "_POLL_S", 0.0)
        self.num = -1

    def num_asked(self):
        self.num += 1
        return self.num


def application(status, deployment="index-0", message="", **replica_states):
    parts = {deployment: types.SimpleNamespace(message=message, replica_states=replica_states)}
    return types.SimpleNamespace(status=status, message="", deployments=parts)


def test_the_wait_for_processes_says_what_is_pending_and_ends_with_what_failed(monkeypatch, caplog):
    monkeypatch.setattr(rollout, "_SAID_S", 0.0)
    message = "Resources required for each replica: {'memory': 1e12}"
    late, failed = application("DEPLOYING", message=message), application("DEPLOY_FAILED", message="a\nValueError: b\n")
    with caplog.at_level("INFO", "readapt_ray"), pytest.raises(ReadaptError, match="could not start: ValueError: b"):
        seen = Statuses(monkeypatch, {}, {"readapt-a": late}, {"readapt-a": failed})
        rollout.deploy({"readapt-a": "bound"})
    assert [each.getMessage() for each in caplog.records] == [
        "waiting for readapt-a",
        f"waiting for readapt-a, index-0: {message}",
    ]
    assert seen.num == 2


def test_a_version_goes_only_after_the_gateways_that_used_it(monkeypatch):
    both = {"readapt": application("RUNNING", "gateway", RUNNING=1, STOPPING=1)}
    seen = Statuses(monkeypatch, both, both, {"readapt": application("RUNNING", "gateway", RUNNING=1)})
    rollout.wait_for_old_gateways(60.0)
    assert seen.num == 2
    Statuses(monkeypatch, *[both] * 1000)
    rollout.wait_for_old_gateways(0.0)
