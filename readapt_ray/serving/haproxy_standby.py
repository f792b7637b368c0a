"""Start HAProxy again at once when it dies; Ray itself replaces it only after half a minute.

A thread tries to connect to the port five times per second. If nobody listens, it starts HAProxy with the last
configuration that had routes. When Ray starts its next HAProxy, that one takes over (`haproxy_start`).
"""

import contextlib
import logging
import math
import socket
import subprocess
import threading
import time
from pathlib import Path

from readapt_ray.serving.haproxy_start import STANDBY_CONFIG, STANDBY_PID

logger = logging.getLogger("readapt_ray")

_POLL_S = 0.2
_CONNECT_S = 5.0
_END_S = 10.0
_RESTART_S = 1.0
"""Minimum seconds between two starts, in case HAProxy cannot start and ends at once."""


class Standby:
    """A thread that watches HAProxy's port, and starts HAProxy again when nobody listens, until `end`.

    Args:
        binary: path of HAProxy.
        folder: folder with its configuration.
        host: an address of this machine that it listens on.
        port: the port that it listens on.
    """

    def __init__(self, binary: str, folder: Path, host: str, port: int) -> None:
        self._command = [binary, "-db", "-f", str(folder / STANDBY_CONFIG)]
        self._folder = folder
        self._address = (host, port)
        self._ended = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._started_s = -math.inf
        # HAProxy is killed when the thread that started it ends, so this thread must live as long as the process.
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stop watching, and end the HAProxy that this thread has started."""
        self._ended.set()
        self._thread.join(_END_S)

    def _watch(self) -> None:
        while not self._ended.wait(_POLL_S):
            self._forget_if_ended()
            if not self._is_answered():
                self._start()
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _is_answered(self) -> bool:
        try:
            socket.create_connection(self._address, timeout=_CONNECT_S).close()
        except ConnectionRefusedError:
            return False
        except OSError:
            return True  # HAProxy is too busy, and another one would not help
        return True

    def _start(self) -> None:
        if self._process is not None or not (self._folder / STANDBY_CONFIG).exists():
            return
        if time.monotonic() < self._started_s + _RESTART_S:
            return
        self._started_s = time.monotonic()
        logger.warning("HAProxy is gone; starting it again")
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *self._command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        (self._folder / STANDBY_PID).write_text(str(self._process.pid))

    def _forget_if_ended(self) -> None:
        if self._process is not None and self._process.poll() is not None:
            self._process = None
            with contextlib.suppress(FileNotFoundError):
                (self._folder / STANDBY_PID).unlink()
