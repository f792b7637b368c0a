"""Starting HAProxy again where it cannot start."""

import logging
import shutil
import time
from types import SimpleNamespace

import pytest

from readapt_ray.serving import haproxy_standby
from readapt_ray.serving.haproxy_standby import Standby
from readapt_ray.serving.haproxy_start import STANDBY_CONFIG
from tests.chaos.nodes import free_port


@pytest.mark.skipif(not shutil.which("setpriv"), reason="HAProxy is started again on Linux alone")
def test_what_cannot_start_is_not_tried_five_times_a_second(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.WARNING, "readapt_ray")
    (tmp_path / STANDBY_CONFIG).write_text("")
    clock, looks = SimpleNamespace(now_s=100.0), []

    def nobody_answers(_):
        looks.append(clock.now_s)
        return False

    monkeypatch.setattr(haproxy_standby, "time", SimpleNamespace(monotonic=lambda: clock.now_s))
    monkeypatch.setattr(haproxy_standby, "_POLL_S", 0.01)
    monkeypatch.setattr(Standby, "_is_answered", nobody_answers)
    standby = Standby(str(shutil.which("false")), tmp_path, "127.0.0.1", free_port())
    for num_starts in (1, 2, 3):
        while caplog.text.count("starting it again") < num_starts or looks.count(clock.now_s) < 20:
            time.sleep(0.01)
        assert caplog.text.count("starting it again") == num_starts
        clock.now_s += 0.9
        while looks.count(clock.now_s) < 20:
            time.sleep(0.01)
        assert caplog.text.count("starting it again") == num_starts
        clock.now_s += 0.2
    standby.end()
