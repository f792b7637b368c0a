"""One Ray for the whole run: starting it is most of the time that a test takes."""

import functools
import gc
import logging
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from readapt_ray import leases, termination
from tests import lanes

HAS_GPU = any(Path("/dev").glob("nvidia[0-9]*"))

gc.disable()  # until all tests are imported: it looks through their objects again and again, a sixth of the time

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("READAPT_CACHE", f"{tempfile.gettempdir()}/readapt-tests-{os.getuid()}")
os.environ.setdefault("DS_ACCELERATOR", "cuda" if HAS_GPU else "cpu")


def pytest_sessionstart() -> None:
    """Take Ctrl-C, which a shell's background jobs and pytest-xdist's workers ignore: tests interrupt what they start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give one worker the tests that use Ray, and the others the rest."""
    return lanes.Lanes(config, log)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Ask each worker which tests use Ray."""
    lanes.invite(node)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Tell it, in a worker, before the scheduler is told that this one is ready; collect garbage from here on."""
    lanes.tell(session.config, session.items)
    gc.freeze()
    gc.enable()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests of CUDA where there is none."""
    if item.get_closest_marker("gpu") and not HAS_GPU:
        pytest.skip("no CUDA device")


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """See that a test left no Ray of its own, once its fixtures are gone."""
    lanes.check(item)


@pytest.fixture(scope="session")
def ray_session(pytestconfig: pytest.Config) -> Iterator[None]:
    """Ray on this machine with two logical CPUs, as `serve` starts it."""
    import ray

    from readapt_ray.cluster import connection
    from readapt_ray.errors import WorkerError
    from readapt_ray.serving import haproxy

    os.environ["READAPT_NUM_CPUS"] = "2"
    with haproxy.preferred("127.0.0.1", timeout_s=60):
        for tries_left in reversed(range(4)):  # each gives up after twice 30 s, which is Ray's own limit
            try:
                connection.connect()
                break
            except WorkerError:
                if not tries_left:
                    raise
    pytestconfig.stash[lanes.RAY_RUNS] = True
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def package_logger() -> Iterator[None]:
    """The command line sets the package's logger up for a terminal; afterwards it is as Python made it."""
    logger = logging.getLogger("readapt_ray")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers, logger.level, logger.propagate = before


@pytest.fixture(autouse=True)
def leases_settle_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for no other driver: within this process there is none. Two that race are processes, which wait as always."""
    monkeypatch.setattr(leases, "_SETTLE_S", 0.01)


@pytest.fixture(autouse=True)
def cleanup_without_limit() -> Iterator[None]:
    """A command ends its process when cleanup after a Ctrl-C takes long; pytest itself may take its time."""
    yield
    termination._stop.give_up = None


@pytest.fixture(autouse=True)
def every_written_file_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """See that a finished stage left no file that its manifest does not list, since `--overwrite` would leave it, too."""
    from readapt_ray import artifact_files, artifacts

    fill = artifacts._fill

    @functools.wraps(fill)
    def checked(location: Any, *args: Any, **options: Any) -> Any:
        before = location.entries()[0] if location.is_local else []
        manifest = fill(location, *args, **options)
        if manifest.stage in artifact_files.STAGE_FILES and location.is_local:
            unlisted = set(location.entries()[0]) - {*artifact_files.unpacked(manifest.files), "manifest.json"}
            assert unlisted <= set(before), f"not listed in STAGE_FILES of {manifest.stage}: {unlisted}"
        return manifest

    monkeypatch.setattr(artifacts, "_fill", checked)


@pytest.fixture(params=["stand-in", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernel_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where attention goes by the flash kernel: a GPU, or the CPU with a stand-in behind torch's operator."""
    from tests import flash_kernel

    if request.param == "cuda":
        yield "cuda"
        return
    with flash_kernel.installed(monkeypatch):
        yield "cpu"
