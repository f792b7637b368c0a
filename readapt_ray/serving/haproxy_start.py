"""Start HAProxy for Ray with a safer configuration. Ray runs this file as a script, so it imports no package.

In: the configuration that Ray wrote. Out: the same file, changed, and `standby.cfg`, with which `haproxy_standby`
starts HAProxy again if it dies. HAProxy then replaces this process, so it has the process id that Ray knows.
"""

import os
import re
import sys
from pathlib import Path

STANDBY_CONFIG = "standby.cfg"
STANDBY_PID = "standby.pid"
ERRORS = (502, 503, 504)
"""Error statuses that HAProxy answers itself, with the content of a file that we write."""
_PRIVATE = ("frontend prometheus", "listen stats")


def rewritten(config: str, folder: Path, header_s: str) -> str:
    """Return the configuration that Ray wrote, with safer settings.

    Only this machine can read the statistics. A client that does not send all headers of a request in time is
    disconnected. Errors have OpenAI's form. While there are no routes, it does not listen on the clients' port, where
    Ray's configuration would answer 404.

    Args:
        config: configuration that Ray wrote.
        folder: folder with the files of error answers.
        header_s: maximum seconds until all headers of a request have arrived.
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
    """Return whether the configuration forwards requests to any backend."""
    return any(line.strip().startswith("use_backend ") for line in config.splitlines())


def error_file(folder: Path, status: int) -> Path:
    """Return the path of the file with the answer for an error status, such as FOLDER/503.http."""
    return folder / f"{status}.http"


def for_clients_alone(config: str) -> str:
    """Return a configuration that serves only clients: without control socket and statistics.

    Ray's next HAProxy needs these for itself. Without the socket, Ray notices that the HAProxy that it started is gone,
    and starts another.
    """
    section, lines = "", []
    for line in config.splitlines():
        section = line.strip() if line[:1].strip() else section
        if section not in _PRIVATE and not line.strip().startswith("stats socket"):
            lines.append(line)
    return "\n".join(lines) + "\n"


def _standby_to_replace(folder: Path) -> list[str]:
    """Return the arguments with which a new HAProxy ends the standby one; [] if no standby runs."""
    try:
        pid = (folder / STANDBY_PID).read_text()
        is_ours = os.fsencode(folder / STANDBY_CONFIG) in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return []
    return ["-sf", pid] if is_ours else []


def main(binary: str, header_s: str, folder: Path, *arguments: str) -> None:
    """Replace this process by HAProxy, which is killed when the Ray process that started it ends. Never returns.

    First it changes Ray's configuration file in place (`rewritten`). If that has routes, it also writes `standby.cfg`,
    and HAProxy takes over from a standby one that runs.

    Args:
        binary: path of HAProxy.
        header_s: maximum seconds until all headers of a request have arrived.
        folder: folder with this server's files. Ray's configuration is in a subfolder per node.
        arguments: command-line arguments that Ray gives; `-f` is followed by its configuration.
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
