"""What an update refuses before it changes anything; without Ray."""

import types

import pytest

from readapt_ray.errors import InputError
from readapt_ray.serving import updates
from readapt_ray.serving.options import ServeConfig

KEYS = "someone: a-secret-of-enough-characters"


class Gateway:
    """A handle of a gateway with API keys; None does not answer."""

    def __init__(self, options):
        self.served_options = types.SimpleNamespace(remote=lambda: self)
        self._options = options

    def result(self, timeout_s):
        if self._options is None:
            raise TimeoutError
        return True, self._options


@pytest.fixture
def serves(monkeypatch):
    monkeypatch.delenv("READAPT_API_KEYS", raising=False)

    def set_options(options):
        monkeypatch.setattr("ray.serve.get_deployment_handle", lambda *_: Gateway(options))

    return set_options


def config(**changes):
    return ServeConfig.parse({"retriever": "r", "update": True} | changes)


def test_an_update_does_not_drop_the_api_keys(serves, monkeypatch, tmp_path):
    serves({})
    with pytest.raises(InputError, match=r"the server has API keys, and this update has none.*give --api-keys FILE"):
        updates.check_options(config())
    (tmp_path / "keys.yaml").write_text(KEYS)
    updates.check_options(config(api_keys=str(tmp_path / "keys.yaml")))
    updates.check_options(config(allow_anonymous=True))
    monkeypatch.setenv("READAPT_API_KEYS", KEYS)
    updates.check_options(config())


def test_options_that_an_update_does_not_repeat_are_named(serves, monkeypatch, caplog):
    monkeypatch.setenv("READAPT_API_KEYS", KEYS)
    serves({"timeout_s": 300.0, "max_requests": 8, "truncate": False, "cors_origins": ("https://a",)})
    updates.check_options(config(max_requests=16))
    assert "fall back: timeout_s from 300.0 to 60.0, cors_origins from ('https://a',) to ();" in caplog.text


def test_an_update_does_not_wait_for_ever(serves):
    serves(None)
    with pytest.raises(InputError, match=r"does not answer .*nothing was changed"):
        updates.check_options(config())


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
