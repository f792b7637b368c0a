"""Keep one file per port that says how to reach the server's Ray, so that `readapt serve --update` finds it.

The file is in the temporary folder, and only this user can read it.
"""

import contextlib
import json
import logging
import os
import tempfile
from pathlib import Path

from readapt_ray.errors import InputError

logger = logging.getLogger("readapt_ray")

_VARIABLES = ("RAY_ADDRESS", "RAY_AUTH_MODE")


def write(port: int, ray_address: str) -> dict[str, str]:
    """Write the file of the server at a port, replacing an older one. If it cannot be written, this is only logged.

    Args:
        port: port that the server listens on.
        ray_address: address of its Ray, as RAY_ADDRESS takes it.

    Returns:
        The environment variables with which another process connects to its Ray.
    """
    values = {"RAY_ADDRESS": ray_address, "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "")}
    variables = {name: value for name, value in values.items() if value}
    remove(port)
    try:
        with os.fdopen(os.open(_file(port), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as stream:
            json.dump(variables, stream)
    except OSError as error:  # a file of another user may be there, or the disk is full; the server works without it
        logger.warning("%s cannot be written (%s): updates must set RAY_ADDRESS", _file(port), error.strerror)
    return variables


def remove(port: int) -> None:
    """Remove the file of the server at a port, if there is one."""
    with contextlib.suppress(OSError):
        _file(port).unlink()


def join(port: int) -> None:
    """Set this process's environment variables to connect to the Ray of the server at a port.

    If RAY_ADDRESS is set, do nothing.

    Raises:
        InputError: no server of this user wrote a file for this port.
    """
    if os.environ.get("RAY_ADDRESS"):
        return
    try:
        is_mine = _file(port).lstat().st_uid == os.getuid()
        found = json.loads(_file(port).read_text()) if is_mine else {}
    except (OSError, ValueError):
        found = {}
    if "RAY_ADDRESS" not in found:
        raise InputError(
            f"--update changes a server that runs, and this user started none on this machine at port {port}; give its --port, "
            f"or the RAY_ADDRESS that it named when it started"
        )
    for name in _VARIABLES:
        if name in found:
            os.environ.setdefault(name, found[name])


def _file(port: int) -> Path:
    return Path(tempfile.gettempdir()) / f"readapt-serve-{os.getuid()}-{port}.json"
