"""Interrupts that come at awkward moments, in processes of their own."""

import subprocess
import sys

import pytest

DELETED = """
import os, signal, time
from readapt_ray import termination

class Slow:
    def __del__(self):
        os.kill(os.getpid(), signal.{number})
        time.sleep(0.2)

termination.end_as_ctrl_c_does()
try:
    slow = Slow()
    del slow
    time.sleep(20)
except KeyboardInterrupt as stop:
    print(type(stop).__name__, termination.is_told(stop))
"""


@pytest.mark.parametrize(
    ("number", "expected"), [("SIGINT", "KeyboardInterrupt False"), ("SIGTERM", "Terminated True")]
)
def test_an_interrupt_while_an_object_is_deleted_is_not_lost(number: str, expected: str) -> None:
    command = [sys.executable, "-c", DELETED.format(number=number)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=15, check=True)
    assert (done.stdout.strip(), done.stderr) == (expected, "")
