"""How a gateway takes over another state; without Ray."""

import asyncio
import types

import pytest

from readapt_ray.serving import gateway


@pytest.fixture
def replica(monkeypatch):
    """A gateway whose versions say of themselves that they are all the same version."""

    async def description(app):
        return f"encoder of {app}", types.SimpleNamespace(fingerprint="f", slices={"index-0": 40})

    async def set_state(versions, routing):
        return None

    monkeypatch.setattr(gateway, "_description", description)
    handles = types.SimpleNamespace(get_deployment_handle=lambda name, app: f"{name} of {app}")
    monkeypatch.setattr(gateway, "serve", handles)
    made = object.__new__(gateway.Gateway.func_or_class.__bases__[0])  # without Ray Serve around it
    made._versions, made._options, made._service = {}, {}, types.SimpleNamespace(set_state=set_state)
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
