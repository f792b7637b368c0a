"""Ray workers forked from a process that has imported torch, transformers, DeepSpeed and Ray once for all of them."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

_HERE = Path(__file__).parent
_JOB_ID = "01000000"
"""That of the first driver of a cluster."""


@contextlib.contextmanager
def ray_workers() -> Iterator[None]:
    """Let a raylet that is started from this process in here get its workers from a fork server."""
    from ray._private import node, services

    original = str(Path(node.__file__).parent / "workers" / "setup_worker.py")
    start = services.start_raylet

    def start_raylet(*arguments: Any, **options: Any) -> Any:
        changed = [str(_HERE / "setup_worker.py") if each == original else each for each in arguments]
        assert changed != list(arguments), "Ray gives its setup_worker.py in another way; see Node.start_raylet"
        started = start(*changed, **options)
        ray_environment = {"RAY_JOB_ID": _JOB_ID, "RAY_RAYLET_PID": str(started.process.pid)}
        server.stdin.write(json.dumps({**os.environ, **ray_environment}) + "\n")
        server.stdin.flush()
        return started

    with tempfile.TemporaryDirectory(prefix="readapt-", dir="/tmp") as folder:
        command = [sys.executable, str(_HERE / "server.py"), f"{folder}/socket"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout.readline() == "ready\n", "the fork server did not start"
            names = {
                "READAPT_TEST_FORK_SERVER": f"{folder}/socket",
                "READAPT_TEST_JOB_ID": _JOB_ID,
                "READAPT_TEST_SETUP_WORKER": original,
            }
            with mock.patch.dict(os.environ, names), mock.patch.object(services, "start_raylet", start_raylet):
                yield
            assert server.poll() is None, "the fork server died"
            server.stdin.close()
