"""Hold a lease on an artifact while a process writes it, so that two processes never write into one folder.

While a stage works, its `building.json` says which process works, its last heartbeat (unix seconds) and the progress.
`readapt status` reads it to show whether the process still runs.

Whether a process on this machine runs is found by its pid. A process on another machine counts as running if its
heartbeat changes while we watch, whatever the clocks say. Before each heartbeat a process reads the lease again, and
stops if another process owns it. So if two start at once, or each believes that the other is dead, only one continues.
"""

import json
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from readapt_ray.errors import ArtifactConflictError, StorageError, first_line
from readapt_ray.progress import ProgressReporter
from readapt_ray.storage import Location

logger = logging.getLogger("readapt_ray")

_HEARTBEAT_S = 5.0
STALE_S = 30.0
"""A process whose heartbeat is older than this, by this machine's clock, is considered dead."""
_FIELDS = {"stage", "owner", "pid", "heartbeat"}
_FIRST_CHARACTERS = '{"stage": "'
NO_FILE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
_SETTLE_S = 0.5
"""How long another driver may need from reading a lease to writing its own. A slower one is noticed at the next beat."""


def owner() -> dict[str, Any]:
    """Return the fields by which a lease names its holder: a new random id, this machine and this process.

    The id is new in each call, so that two leases of one process differ. By the other fields, another process on the
    same machine checks whether the holder still runs.
    """
    return {
        "owner": uuid.uuid4().hex,
        **_machine(),
        "pid": os.getpid(),
        "process_started": _process_started(os.getpid()),
        "started": time.time(),
    }


def read_lease(file: Location) -> dict[str, Any] | None:
    """Return the content of a `building.json`; None if it does not exist or another program wrote it."""
    try:
        values = file.read_json()
    except (*NO_FILE, ValueError):
        return None
    return values if isinstance(values, dict) and values.keys() >= _FIELDS else None


def is_cut_short(file: Location) -> bool:
    """Return whether a file is an incomplete lease: a process was killed while it wrote it.

    On a local disk the first lease of an output is not written atomically. A kill can leave a part of it, or an empty
    file.
    """
    try:
        text = file.read_text()
        json.loads(text)
    except (*NO_FILE, UnicodeDecodeError):
        return False
    except ValueError:
        return text.startswith(_FIRST_CHARACTERS) or _FIRST_CHARACTERS.startswith(text)
    return False


def is_foreign(file: Location) -> bool:
    """Return whether a file exists at the lease's path that is neither a lease nor an incomplete one."""
    if not file.exists() or is_cut_short(file):
        return False
    return read_lease(file) is None and file.exists()  # another driver may have ended meanwhile


def is_alive(lease: Mapping[str, Any]) -> bool:
    """Return whether the process of a lease seems to run, without waiting.

    A process on another machine counts as running if its heartbeat is less than 30 s old. Its clock is trusted.
    """
    known = _is_alive_here(lease)
    return abs(time.time() - float(lease["heartbeat"])) < STALE_S if known is None else known


def wait_until_dead(file: Location, location: Location) -> dict[str, Any] | None:
    """Check that no process writes the artifact at `location`, and return the lease that a dead one left, or None.

    A process on another machine is watched for up to 30 s.

    Raises:
        ArtifactConflictError: the process of the lease is still running.
    """
    lease = read_lease(file)
    if lease is None:
        return None
    known = _is_alive_here(lease)
    if known is None:
        logger.info("%s was in use by %s; watching %.0f s whether it still is", location, _process(lease), STALE_S)
        known = _beats(file, lease)
    if known:
        raise _in_use(lease, location)
    return read_lease(file)


def _beats(file: Location, lease: Mapping[str, Any]) -> bool:
    """Return whether the heartbeat or owner of a lease changes within 30 s."""
    end_s = time.monotonic() + STALE_S
    while time.monotonic() < end_s:
        time.sleep(_HEARTBEAT_S)
        latest = read_lease(file)
        if latest is None:
            return False
        if (latest["owner"], latest["heartbeat"]) != (lease["owner"], lease["heartbeat"]):
            return True
    return False


class Lease:
    """A context manager that holds the artifact at `location` for this process until the block ends.

    After an error `building.json` stays, so that the work can resume. After success the caller deletes it. If another
    process takes the artifact over, the main thread is interrupted as by Ctrl-C (if the lease was made in it).

    Args:
        file: the artifact's `building.json`.
        location: the artifact.
        reporter: source of the progress that the lease shows.
        before: the lease of a process that stopped, as `wait_until_dead` returned it.
        fields: other fields to write into the lease, beside the owner and the progress.
    """

    def __init__(
        self,
        file: Location,
        location: Location,
        reporter: ProgressReporter,
        *,
        before: Mapping[str, Any] | None,
        fields: Mapping[str, Any],
    ) -> None:
        self.is_held = False
        self._file = file
        self._location = location
        self._reporter = reporter
        self._before = before
        self._fields = {**fields, **owner()}
        self._writing = threading.Lock()
        self._stop = threading.Event()
        self._started_s = time.monotonic()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._is_on_main_thread = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Self:
        self._take()
        self.is_held = True
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if error is None:
            return
        try:
            self.update(is_over=True, error=first_line(error) if isinstance(error, Exception) else "")
        except (OSError, StorageError) as refused:
            logger.debug("cannot write %s: %s", self._file, refused)  # `error` says what went wrong

    def seconds(self) -> float:
        """Return how long the work has taken in seconds, including earlier processes that were stopped."""
        return float(round(self._fields["seconds_before"] + time.monotonic() - self._started_s, 3))

    def update(self, **changes: Any) -> None:
        """Change fields of the lease and write it, with a new heartbeat.

        Raises:
            ArtifactConflictError: another process took the artifact over. Its lease is not changed.
        """
        self._fields = {**self._fields, **changes}
        self._renew()

    def confirm(self) -> None:
        """Check that this process still holds the artifact.

        Raises:
            ArtifactConflictError: another process took the artifact over, or removed it.
        """
        latest = read_lease(self._file)
        if latest is not None and latest["owner"] == self._fields["owner"]:
            return
        self.is_held = False
        if latest is not None:
            raise _in_use(latest, self._location)
        raise ArtifactConflictError(
            f"another process finished or removed {self._location} while this one was writing it ({self._file} is gone); "
            f"run the same command again"
        )

    def _take(self) -> None:
        """Become the owner, unless another process was first."""
        if self._before is None and self._file.is_local:
            if self._file.create_text(self._text()):
                return
            time.sleep(_SETTLE_S)  # this write is not atomic: let the other process finish it
        latest = read_lease(self._file)
        if latest is not None and latest["owner"] != (self._before or {}).get("owner"):
            raise _in_use(latest, self._location)
        self._file.write_text(self._text())
        time.sleep(_SETTLE_S)
        self.confirm()

    def _beat(self) -> None:
        while not self._stop.wait(_HEARTBEAT_S):
            try:
                self._renew()
            except ArtifactConflictError as lost:
                logger.error("%s", lost)
                self._interrupt()
                return
            except (OSError, StorageError) as error:
                logger.warning("cannot write %s: %s", self._file, error)

    def _interrupt(self) -> None:
        main = threading.main_thread().ident
        is_handled = callable(signal.getsignal(signal.SIGINT))
        if self._is_on_main_thread and is_handled and main is not None and not self._stop.is_set():
            signal.pthread_kill(main, signal.SIGINT)

    def _renew(self) -> None:
        """Confirm that the lease is ours and write it, under a lock.

        Without the lock, one thread could see that another process took over while a second thread writes our lease
        again. Then both processes would stop.
        """
        with self._writing:
            self.confirm()
            self._file.write_text(self._text())

    def _text(self) -> str:
        progress = {
            "done": self._reporter.done,
            "total": self._reporter.total,
            "unit": self._reporter.unit,
            "rate": self._reporter.rate(),
        }
        state = {**self._fields, "heartbeat": time.time(), "seconds": self.seconds(), "progress": progress}
        return json.dumps(state, default=str)


def _process(lease: Mapping[str, Any]) -> str:
    return f"process {lease['pid']} on {lease['host']}"


def _in_use(lease: Mapping[str, Any], location: Location) -> ArtifactConflictError:
    return ArtifactConflictError(f"{_process(lease)} is writing {location}; wait for it to end, or give another output")


def _machine() -> dict[str, str]:
    """Identify the scope of a pid. Containers may share a host name and a boot id, but not their pids."""
    return {"host": socket.gethostname(), "boot": _boot_id(), "pid_namespace": _pid_namespace()}


def _is_alive_here(lease: Mapping[str, Any]) -> bool | None:
    """Return whether the process of a lease runs; None if it is on another machine, where its pid cannot be checked."""
    if lease.get("is_over"):
        return False
    if any(lease.get(name) != value for name, value in _machine().items()):
        return None
    now = _process_started(int(lease["pid"]))
    return now != 0.0 and abs(now - float(lease["process_started"])) < 2.0 and int(lease["pid"]) != os.getpid()


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _process_started(pid: int) -> float:
    import psutil

    try:
        return float(psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:
        return 0.0
