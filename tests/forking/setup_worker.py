"""Stand in for Ray's script of this name: let the fork server start the worker, and wait for its end.

Workers of another driver's job are started by Ray's own script.
"""

import json
import os
import socket
import sys
import time


def main() -> int:
    context, language, command = {}, "", []
    for each in sys.argv[1:]:
        name, _, value = each.partition("=")
        if name == "--serialized-runtime-env-context":
            context = json.loads(value)
        elif name == "--language":
            language = value
        else:
            command.append(each)
    is_plain = language == "PYTHON" and not context.get("command_prefix")
    if not is_plain or os.environ.get("RAY_JOB_ID") != os.environ["READAPT_TEST_JOB_ID"]:
        os.execv(sys.executable, [sys.executable, os.environ["READAPT_TEST_SETUP_WORKER"], *sys.argv[1:]])
    path = os.environ["READAPT_TEST_FORK_SERVER"]
    while not os.path.exists(path):
        time.sleep(0.02)
    environment = {**os.environ, **context.get("env_vars", {})}
    request = {"arguments": command, "environment": environment, "folder": os.getcwd()}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        socket.send_fds(connection, [json.dumps(request).encode() + b"\n"], [0, 1, 2])
        return int(connection.recv(100) or b"1")


if __name__ == "__main__":
    sys.exit(main())
