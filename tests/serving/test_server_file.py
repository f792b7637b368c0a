"""How an update finds the server of a port."""

import logging
import os
import stat
import types

import pytest

from readapt_ray.errors import InputError
from readapt_ray.serving import server, server_file
from readapt_ray.serving.options import ServeConfig


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return tmp_path


def test_an_update_joins_the_ray_of_the_server_at_its_port(own_folder, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    named = server_file.write(8000, "127.0.0.1:6379")
    server_file.write(8001, "127.0.0.1:7777")
    assert named == {"RAY_ADDRESS": "127.0.0.1:6379", "RAY_AUTH_MODE": "token"}
    assert {stat.S_IMODE(file.stat().st_mode) for file in own_folder.iterdir()} == {0o600}
    monkeypatch.delenv("RAY_AUTH_MODE")
    server_file.join(8000)
    assert (os.environ["RAY_ADDRESS"], os.environ["RAY_AUTH_MODE"]) == ("127.0.0.1:6379", "token")


def test_a_start_says_how_to_update_the_server(own_folder, monkeypatch, caplog):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setattr("ray.get_runtime_context", lambda: types.SimpleNamespace(gcs_address="127.0.0.1:6379"))
    with caplog.at_level(logging.INFO, "readapt_ray"):
        server._say_how_to_update(8000)
    assert (
        "to change it: RAY_ADDRESS=127.0.0.1:6379 RAY_AUTH_MODE=token readapt serve --update --port 8000" in caplog.text
    )


def test_an_address_that_somebody_set_is_joined(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    server_file.join(8000)
    assert os.environ["RAY_ADDRESS"] == "10.0.0.1:6379"


def test_without_a_server_at_the_port_no_other_ray_is_joined(own_folder):
    server_file.write(8000, "127.0.0.1:6379")
    server_file.remove(8000)
    server_file.remove(8000)
    assert list(own_folder.iterdir()) == []
    for port in (8000, 9000):
        with pytest.raises(
            InputError, match=f"started none on this machine at port {port}; give its --port, or the RAY_"
        ):
            server_file.join(port)
    server_file._file(8000).write_text("[")
    with pytest.raises(InputError, match="at port 8000"):
        server_file.join(8000)


def test_a_server_starts_although_its_file_cannot_be_written(own_folder, caplog):
    # A folder in its place is what root cannot remove either.
    (own_folder / f"readapt-serve-{os.getuid()}-8000.json").mkdir()
    assert server_file.write(8000, "127.0.0.1:6379") == {"RAY_ADDRESS": "127.0.0.1:6379"}
    assert "updates must set RAY_ADDRESS" in caplog.text
    server_file.remove(8000)


@pytest.mark.parametrize("step", ["_say_how_to_update", "_wait_for_signal", "_drain"])
def test_ctrl_c_at_any_moment_stops_what_was_deployed(own_folder, monkeypatch, step):
    """Gateways that refuse all requests must not stay on a cluster when a second Ctrl-C ends the wait for requests."""

    def interrupt(*_):
        raise KeyboardInterrupt

    done = []
    for name in ("_deploy", "_wait_for_signal", "_end_where_ray_ends", "_drain"):
        monkeypatch.setattr(server, name, lambda *_: None)
    monkeypatch.setattr(server, "_checked", lambda *_: {})
    monkeypatch.setattr(server, "_say_how_to_update", lambda port: server_file.write(port, "127.0.0.1:6379"))
    monkeypatch.setattr(server.haproxy, "watch", lambda *_: None)
    monkeypatch.setattr(server, "stop", lambda: done.append([each.name for each in own_folder.iterdir()]))
    monkeypatch.setattr(server, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        server.serve(ServeConfig(retriever="r", port=8000))
    assert done == [[]]
