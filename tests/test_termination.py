"""Interrupts that come at awkward moments, in processes of their own."""

import signal
import subprocess
import sys
import time

import pytest

DELETED = """
import os, signal, sys, threading, time
from readapt_ray import termination

class Slow:
    def __del__(self):
        {act}
        time.sleep(0.2)

def start_late(thread):
    start(thread)
    time.sleep(0.3)

termination.handle_sigterm()
start = threading.Thread.start
if {is_busy}:
    threading.Thread.start = start_late
try:
    slow = Slow()
    del slow
    time.sleep(600)
except KeyboardInterrupt as stop:
    print(type(stop).__name__, termination.is_from_sigterm(stop))
"""


@pytest.mark.parametrize("is_busy", [False, True], ids=["idle machine", "busy machine"])
@pytest.mark.parametrize(
    ("act", "expected"),
    [
        ("os.kill(os.getpid(), signal.SIGINT)", "KeyboardInterrupt False"),
        ("os.kill(os.getpid(), signal.SIGTERM)", "Terminated True"),
        ("sys.exit(signal.SIGTERM)", "Terminated True"),  # Ray's handler of the signal
    ],
)
def test_an_interrupt_while_an_object_is_deleted_is_not_lost(act: str, expected: str, is_busy: bool) -> None:
    command = [sys.executable, "-c", DELETED.format(act=act, is_busy=is_busy)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert (done.stdout.strip(), done.stderr) == (expected, "")


IN_GROUP = """
import os, sys, threading, time
from readapt_ray import cli, termination

termination._CLEANUP_S, termination._WITHOUT_RAY_S = {cleanup_s}, 0.5
cli._is_ray_gone = lambda: {gone}

def work(_):
    try:
        print("ready", flush=True)
        time.sleep(600)
    finally:
        os.write(2, b"rpc_client.h:204: Failed to connect to GCS within 60 seconds\\n")
        print("cleaning up", flush=True)
        threading.Event().wait(600)  # as a join of a thread that asks a dead Ray

cli._RUNNERS["run"] = work
sys.exit(cli.main(["run"]))
"""
SAID = "\nreadapt: {}; run the same command again and it resumes where it stopped\n"


@pytest.mark.parametrize(("cleanup_s", "gone"), [(1.0, False), (600.0, True)])
@pytest.mark.parametrize(("sent", "what", "code"), [("SIGTERM", "terminated", 143), ("SIGINT", "interrupted", 130)])
def test_cleanup_has_a_limit_and_what_cpp_code_prints_meanwhile_is_dropped(
    cleanup_s: float, gone: bool, sent: str, what: str, code: int
) -> None:
    process = start(IN_GROUP.format(cleanup_s=cleanup_s, gone=gone))
    process.send_signal(getattr(signal, sent))
    time.sleep(0.1)
    process.send_signal(getattr(signal, sent))  # as `timeout` does
    assert ended(process) == (SAID.format(what), code)


def test_a_second_ctrl_c_ends_the_cleanup() -> None:
    process = start(IN_GROUP.format(cleanup_s=600.0, gone=False))
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "cleaning up\n"
    time.sleep(1.5)  # the second is not the first again
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert ended(process) == (SAID.format("interrupted"), 130)


def test_cpp_code_prints_as_ever_before_a_signal() -> None:
    code = "import os, sys; from readapt_ray import cli; cli._RUNNERS['run'] = lambda _: os.write(2, b'from C++\\n'); sys.exit(cli.main(['run']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr == "from C++\n"


IN_CPP = """
import hashlib, sys
from readapt_ray import cli, termination

termination._CLEANUP_S = 1.0

def work(_):
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha1", b"", b"", 2**31 - 1)  # half an hour, without a look at signals

cli._RUNNERS["run"] = work
sys.exit(cli.main(["run"]))
"""


def test_a_signal_ends_what_does_not_return_to_python() -> None:
    process = start(IN_CPP)
    process.terminate()
    assert ended(process) == (SAID.format("terminated"), 143)


def test_a_signal_to_a_forked_child_is_none_to_its_parent() -> None:
    code = IN_GROUP.format(cleanup_s=0.1, gone=False).replace("time.sleep(600)", FORKED)
    process = start(code)
    assert ended(process) == ("rpc_client.h:204: Failed to connect to GCS within 60 seconds\n", 0)


FORKED = """
        hearing, telling = os.pipe()
        child = os.fork()
        if child == 0:
            import signal
            signal.signal(15, lambda *_: os.write(telling, b"."))
            os.write(telling, b".")
            while True:
                time.sleep(1)
        os.read(hearing, 1); os.kill(child, 15); os.read(hearing, 1)
        time.sleep(1.0); os.kill(child, 9); threading.Event.wait = print
"""


def start(code: str) -> "subprocess.Popen[str]":
    """A process with a command that is at work."""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def ended(process: "subprocess.Popen[str]") -> tuple[str, int]:
    """What a process says on stderr until it ends, and its exit code."""
    try:
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    return said, process.returncode
