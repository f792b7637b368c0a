"""What an update refuses before it changes anything."""

import contextlib
import types

import pytest
from ray.exceptions import RayError

from readapt_ray.errors import InputError, ReadaptError
from readapt_ray.serving import app, rollout, server, updates
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


def test_a_proxy_that_does_not_come_up_in_time_is_named(monkeypatch):
    def start(**_):
        raise RayError("The actor never ran - it was cancelled before it started running.")

    monkeypatch.setattr(rollout, "ray_serve", lambda: types.SimpleNamespace(start=start))
    with pytest.raises(
        ReadaptError, match=r"Ray Serve's HTTP proxy did not come up .*where the machine is busy.*try again"
    ):
        server._start_proxies(config(update=False))


def test_one_update_at_a_time(ray_session):
    with updates.alone(), pytest.raises(ReadaptError, match="another update of this server runs"), updates.alone():
        pytest.fail("two at once")
    for _ in range(2):
        with contextlib.suppress(KeyError), updates.alone():
            raise KeyError
