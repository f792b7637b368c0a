"""Leases: which process works on an artifact, and how far it is.

While a stage works, its `building.json` holds the process, a heartbeat (unix seconds) and the progress,
so that `readapt status` can tell running from dead, and two drivers do not write into one folder.
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from readapt_ray.errors import ArtifactConflictError, StorageError
from readapt_ray.progress import ProgressReporter
from readapt_ray.storage import Location

logger = logging.getLogger("readapt_ray")

_HEARTBEAT_S = 5.0
_STALE_S = 30.0


def owner() -> dict[str, Any]:
    """What stands for this process in a lease."""
    return {
        "owner": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "boot": _boot_id(),
        "pid": os.getpid(),
        "process_started": _process_started(os.getpid()),
        "started": time.time(),
    }


def read_lease(file: Location) -> dict[str, Any] | None:
    """What a `building.json` says; None where there is none."""
    try:
        return dict(json.loads(file.read_text()))
    except (FileNotFoundError, ValueError):
        return None


def is_alive(lease: Mapping[str, Any]) -> bool:
    """Whether the process that a lease names still works."""
    if lease["host"] == socket.gethostname() and lease["boot"] == _boot_id():
        return _process_exists(int(lease["pid"]), float(lease["process_started"]))
    return bool(time.time() - float(lease["heartbeat"]) < _STALE_S)


def wait_until_dead(lease: Mapping[str, Any], file: Location, location: Location) -> None:
    """Return once the owner of the artifact at `location` has stopped.

    Raises:
        ArtifactConflictError: it goes on.
    """
    seen = lease
    while is_alive(seen):
        same_host = seen["host"] == socket.gethostname()
        if not same_host:
            logger.info(
                "%s was in use by %s %.0f s ago; waiting to see whether it still is",
                location,
                seen["host"],
                time.time() - seen["heartbeat"],
            )
            time.sleep(_HEARTBEAT_S * 2)
        latest = read_lease(file) or {**seen, "heartbeat": 0.0}
        if same_host or latest["heartbeat"] > lease["heartbeat"]:
            raise ArtifactConflictError(
                f"process {seen['pid']} on {seen['host']} is writing {location}; wait for it to end, or give another output"
            )
        seen = latest


class Heartbeat:
    """Writes `building.json` every few seconds until the block ends; leaves it there, as a mark to go on from."""

    def __init__(self, file: Location, lease: dict[str, Any], reporter: ProgressReporter) -> None:
        self._file = file
        self._lease = lease
        self._reporter = reporter
        self._stop = threading.Event()
        self._started_s = time.monotonic()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> None:
        self._write()
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        try:
            self._write()
        except (OSError, StorageError) as refused:
            if error is None:
                raise
            logger.debug("cannot write %s: %s", self._file, refused)  # `error` says what went wrong

    def _beat(self) -> None:
        while not self._stop.wait(_HEARTBEAT_S):
            try:
                self._write()
            except (OSError, StorageError) as error:
                logger.warning("cannot write %s: %s", self._file, error)

    def _write(self) -> None:
        seconds = self._lease["seconds_before"] + time.monotonic() - self._started_s
        progress = {
            "done": self._reporter.done,
            "total": self._reporter.total,
            "unit": self._reporter.unit,
            "rate": self._reporter.rate(),
        }
        state = {**self._lease, "heartbeat": time.time(), "seconds": round(seconds, 3), "progress": progress}
        self._file.write_text(json.dumps(state, default=str))


def _boot_id() -> str:
    try:
        with Path("/proc/sys/kernel/random/boot_id").open() as file:
            return file.read().strip()
    except OSError:
        return ""


def _process_started(pid: int) -> float:
    import psutil

    try:
        return float(psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:
        return 0.0


def _process_exists(pid: int, started: float) -> bool:
    now = _process_started(pid)
    return now != 0.0 and abs(now - started) < 2.0 and pid != os.getpid()
