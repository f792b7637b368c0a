"""Fork Python processes from one that has already imported torch, transformers, DeepSpeed and Ray.

A new Python process needs five seconds of a core for these imports; one forked from here has them at once. A client
connects to the socket and sends what `python` would get: arguments, environment, folder and the three standard streams.
It is told the exit code at the end. A client that disconnects has its process killed.

Run it as `python server.py SOCKET`. It says when the first modules are imported, waits for a line with the environment
in which to import Ray, as JSON, and ends when its standard input closes.
"""

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np

PRELOADED = (
    "deepspeed",
    "faiss",
    "fastapi",
    "ir_measures",
    "jinja2",
    "jsonschema",
    "numpy",
    "opentelemetry.sdk.metrics",
    "orjson",
    "pandas",
    "peft",
    "pyarrow.dataset",
    "pyarrow.fs",
    "pyarrow.parquet",
    "pydantic",
    "requests",
    "rich.console",
    "scipy.stats",
    "torch._dynamo",
    "torch.utils.flop_counter",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
    "uvicorn",
    "watchfiles",
    "yaml",
)
RAY = ("ray.data", "ray.serve", "ray.train.torch")
"""Ray reads its configuration from the environment when it is imported: the raylet's process, the job."""


class Server:
    """One connection per forked process."""

    def __init__(self, path: str) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(64)
        self._woken, self._waker = os.pipe()
        os.set_blocking(self._waker, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)
        self._clients: dict[int, socket.socket] = {}

    def next_request(self) -> dict[str, Any]:
        """Fork for each client until standard input closes; return, in each forked process, its request."""
        while True:
            stdin = sys.stdin.fileno()
            readable, _, _ = select.select([stdin, self._woken, self._listener, *self._clients.values()], [], [])
            if stdin in readable:
                raise SystemExit
            if self._woken in readable:
                os.read(self._woken, 4096)
                self._tell_exit_codes()
            for child, client in list(self._clients.items()):
                if client in readable:  # It sends nothing after its request, so it is gone.
                    os.kill(child, signal.SIGKILL)
                    self._clients.pop(child).close()
            if self._listener in readable:
                request = self._fork()
                if request is not None:
                    return request

    def _fork(self) -> dict[str, Any] | None:
        client, _ = self._listener.accept()
        message, streams, _, _ = socket.recv_fds(client, 1 << 16, 3)
        while message and not message.endswith(b"\n"):
            message += client.recv(1 << 16)
        child = os.fork()
        if child:
            self._clients[child] = client
            for each in streams:
                os.close(each)
            return None
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for each in (client, self._listener, *self._clients.values()):
            each.close()
        os.close(self._woken)
        os.close(self._waker)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        request: dict[str, Any] = json.loads(message)
        return request

    def _tell_exit_codes(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                client = self._clients.pop(ended[0], None)
                if client is not None:
                    with client, contextlib.suppress(OSError):
                        client.sendall(str(os.waitstatus_to_exitcode(ended[1])).encode())


def run(request: dict[str, Any]) -> None:
    """Do what `python *arguments` does in this environment and folder."""
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    first, *others = request["arguments"]
    searched = [each for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each and each not in sys.path]
    sys.path[0] = os.path.dirname(first) if first not in ("-c", "-m") else os.getcwd()
    sys.path[1:1] = searched
    if first == "-c":
        sys.argv = ["-c", *others[1:]]
        exec(compile(others[0], "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        sys.argv = others
        runpy.run_module(others[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *others]
        runpy.run_path(first, run_name="__main__")


def main() -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    print("ready", flush=True)
    os.environ.update(json.loads(sys.stdin.readline()))
    for name in RAY:
        importlib.import_module(name)
    sys.path[0] = str(Path(__file__).parents[2])
    import readapt_ray

    for module in pkgutil.walk_packages(readapt_ray.__path__, "readapt_ray."):
        importlib.import_module(module.name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.collect()
    gc.freeze()
    request = Server(sys.argv[1]).next_request()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    np.random.seed()
    run(request)


if __name__ == "__main__":
    main()
