"""A worker of pytest-xdist that dies takes one test with it, and the run ends."""

import os
import subprocess
import sys
from pathlib import Path

PLUGIN = """
import pytest
from tests import lanes

@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return lanes.Lanes(config, log)

@pytest.fixture(scope="session")
def ray_session(): yield
"""
WITH_RAY = """
import os
def test_first(ray_session): pass
def test_second(ray_session):
    if {dies}: os._exit(1)
def test_third(ray_session): pass
"""
WITHOUT_RAY = "\n".join(f"def test_{n}(): pass" for n in range(4))


def test_a_run_ends_though_a_worker_died(tmp_path):
    folder = tmp_path / "tests"
    folder.mkdir()
    for name, text in {
        "__init__.py": "",
        "conftest.py": PLUGIN,
        "lanes.py": Path(__file__).with_name("lanes.py").read_text(),
        **{f"test_ray_{n}.py": WITH_RAY.format(dies=n == 1) for n in range(3)},
        **{f"test_plain_{n}.py": WITHOUT_RAY for n in range(3)},
    }.items():
        (folder / name).write_text(text)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-p", "xdist", "-n", "2", "-q", "-p", "no:cacheprovider"]
    alone = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    ended = subprocess.run(command, cwd=tmp_path, env=alone, capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 1, ended.stdout
    assert "1 failed, 20 passed" in ended.stdout
    assert "test_ray_1.py::test_second" in ended.stdout
