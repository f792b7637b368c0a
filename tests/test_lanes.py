"""Tests that use Ray run in one worker; a worker that dies takes one test with it, and the run ends."""

import os
import re
import subprocess
import sys
from pathlib import Path

PLUGIN = """
import pytest
from tests import lanes

@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return lanes.Lanes(config, log)

@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    lanes.invite(node)

@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish(session):
    lanes.tell(session.config, session.items)

@pytest.fixture(scope="session")
def ray_session(): yield
"""
MIXED = """
import os, time
from pathlib import Path
HERE = Path(__file__).parent
def test_plain(): Path(__file__).with_suffix(".ran").touch()
def test_first(ray_session):
    while {waits} and len(list(HERE.glob("*.ran"))) < 3: time.sleep(0.01)
def test_second(ray_session):
    if {dies}: os._exit(1)
def test_third(ray_session): pass
def test_also_plain(): pass
"""
WITHOUT_RAY = "\n".join(f"def test_{n}(): pass" for n in range(4))


def run(folder, *, dies, waits):
    """Run three modules with both kinds of tests and three without Ray in two workers.

    With `waits` the tests with Ray wait until those beside them ran: another worker has to run these.
    """
    tests = folder / "tests"
    tests.mkdir()
    for name, text in {
        "__init__.py": "",
        "conftest.py": PLUGIN,
        "lanes.py": Path(__file__).with_name("lanes.py").read_text(),
        **{f"test_mixed_{n}.py": MIXED.format(dies=dies and n == 1, waits=waits) for n in range(3)},
        **{f"test_plain_{n}.py": WITHOUT_RAY for n in range(3)},
    }.items():
        (tests / name).write_text(text)
    (folder / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-p", "xdist", "-n", "2", "-v", "-p", "no:cacheprovider"]
    alone = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(command, cwd=folder, env=alone, capture_output=True, text=True, timeout=300, check=False)


def test_one_worker_runs_the_tests_that_use_ray(tmp_path):
    ended = run(tmp_path, dies=False, waits=True)
    assert "27 passed" in ended.stdout
    worker_of = {test: worker for worker, test in re.findall(r"\[(gw\d)\] .*PASSED (\S+)", ended.stdout)}
    with_ray = worker_of["tests/test_mixed_0.py::test_first"]
    assert all(worker_of[f"tests/test_mixed_{n}.py::test_plain"] != with_ray for n in range(3))


def test_a_run_ends_though_a_worker_died(tmp_path):
    ended = run(tmp_path, dies=True, waits=False)
    assert ended.returncode == 1, ended.stdout
    assert "1 failed, 26 passed" in ended.stdout
    assert "FAILED tests/test_mixed_1.py::test_second" in ended.stdout
