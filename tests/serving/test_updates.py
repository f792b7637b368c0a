"""What an update refuses before it changes anything; without Ray."""

import types

import pytest

from readapt_ray.errors import InputError
from readapt_ray.serving import app, updates
from readapt_ray.serving.keys import ApiKey
from readapt_ray.serving.options import ServeConfig


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


@pytest.mark.parametrize(("num_bytes", "fits"), [(2 << 30, True), (12 * 2**30 // 5, False)])
def test_an_index_that_memory_has_no_room_for_is_refused(monkeypatch, num_bytes, fits):
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True}])
    for name in ("available_resources", "cluster_resources"):
        monkeypatch.setattr(f"ray.{name}", lambda: {"CPU": 8.0, "memory": 12.0 * 2**30})
    shards = [{"name": name, "num_bytes": num_bytes} for name in "abc"]
    index = types.SimpleNamespace(manifest=types.SimpleNamespace(details={"shards": shards}))
    monkeypatch.setattr(
        updates.app, "open_artifact", lambda *_: index
    )  # two slices: a and c, b; each reads one shard more
    added = [config(index="i", index_actors=2).each_version()["r"]]
    if fits:
        updates.check_room(added)
        return
    with pytest.raises(InputError, match=r"ask for 12\.0 GiB memory, and 11\.0 GiB of 12\.0 GiB are free"):
        monkeypatch.setattr("ray.available_resources", lambda: {"CPU": 8.0, "memory": 11.0 * 2**30})
        updates.check_room(added)
