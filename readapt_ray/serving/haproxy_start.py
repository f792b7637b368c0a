"""Start HAProxy as Ray asks, with a safer configuration. Ray runs this file as a script, so it imports no package.

Enters: the configuration that Ray wrote. Leaves: the same file changed, and `standby.cfg`, by which `haproxy_standby` starts
HAProxy again if it dies. The process becomes HAProxy, so that Ray finds it under its process id.
"""

import os
import re
import sys
from pathlib import Path

STANDBY_CONFIG = "standby.cfg"
STANDBY_PID = "standby.pid"
ERRORS = (502, 503, 504)
"""Statuses that HAProxy answers itself, from a file of ours."""
_PRIVATE = ("frontend prometheus", "listen stats")


def rewritten(config: str, folder: Path, header_s: str) -> str:
    """Change the configuration that Ray wrote.

    Statistics are for this machine alone. Who does not send the headers of a request soon is sent away. Errors have OpenAI's
    shape. Without routes the port of the clients is not listened on, where Ray would answer 404.

    Args:
        config: as Ray wrote it.
        folder: of the answers to errors.
        header_s: seconds in which the headers of a request must come.
    """
    section, lines = "", []
    for line in config.splitlines():
        section = line.strip() if line[:1].strip() else section
        if section in _PRIVATE:
            lines.append(re.sub(r"bind \*?:", "bind 127.0.0.1:", line))
        elif section == "frontend http_frontend" and not has_routes(config):
            lines.append(re.sub(r"bind \S+", f"bind unix@{folder}/no-routes.sock", line))
        elif not line.strip().startswith("errorfile"):
            lines.append(line)
        if section == "defaults" and line.strip().startswith("timeout client "):
            lines.append(f"    timeout http-request {header_s}s")
            lines += [f"    errorfile {status} {error_file(folder, status)}" for status in ERRORS]
    return "\n".join(lines) + "\n"


def has_routes(config: str) -> bool:
    """Return whether the configuration sends requests anywhere."""
    return any(line.strip().startswith("use_backend ") for line in config.splitlines())


def error_file(folder: Path, status: int) -> Path:
    """Return the file of the answer to an error."""
    return folder / f"{status}.http"


def for_clients_alone(config: str) -> str:
    """Leave out the control socket and the statistics, which Ray's next HAProxy needs for itself.

    Without the socket Ray sees that the HAProxy which it started is gone, and starts another.
    """
    section, lines = "", []
    for line in config.splitlines():
        section = line.strip() if line[:1].strip() else section
        if section not in _PRIVATE and not line.strip().startswith("stats socket"):
            lines.append(line)
    return "\n".join(lines) + "\n"


def _standby_to_replace(folder: Path) -> list[str]:
    """Return the arguments by which a new HAProxy ends the one that replaced the last, if there is one."""
    try:
        pid = (folder / STANDBY_PID).read_text()
        is_ours = os.fsencode(folder / STANDBY_CONFIG) in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return []
    return ["-sf", pid] if is_ours else []


def main(binary: str, header_s: str, folder: Path, *arguments: str) -> None:
    """Become HAProxy, which ends when Ray's process does.

    Args:
        binary: of HAProxy.
        header_s: seconds in which the headers of a request must come.
        folder: of this server's files. Ray's configuration is in a subfolder per node.
        arguments: those that Ray gives.
    """
    file = Path(arguments[arguments.index("-f") + 1])
    config = rewritten(file.read_text(), folder, header_s)
    file.write_text(config)
    replaced = []
    if has_routes(config):
        fresh = folder / f"{STANDBY_CONFIG}.new"
        fresh.write_text(for_clients_alone(config))
        fresh.rename(folder / STANDBY_CONFIG)
        replaced = _standby_to_replace(folder)
    os.execvp("setpriv", ["setpriv", "--pdeathsig", "KILL", binary, *arguments, *replaced])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), *sys.argv[4:])
