"""Starting HAProxy again where it cannot start."""

import logging
import shutil
import time

import pytest

from readapt_ray.serving.haproxy_standby import Standby
from readapt_ray.serving.haproxy_start import STANDBY_CONFIG
from tests.chaos.nodes import free_port


@pytest.mark.skipif(not shutil.which("setpriv"), reason="HAProxy is started again on Linux alone")
def test_what_cannot_start_is_not_tried_five_times_a_second(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "readapt_ray")
    (tmp_path / STANDBY_CONFIG).write_text("")
    standby = Standby(str(shutil.which("false")), tmp_path, "127.0.0.1", free_port())
    time.sleep(2)
    standby.end()
    assert 1 <= caplog.text.count("starting it again") <= 3
