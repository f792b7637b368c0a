"""Refresh a root with the stand-ins of `root.py`, in a process that a test kills: FOLDER MODEL. It waits for a line first."""

import sys
from pathlib import Path

import pytest

from tests.recipes.refreshing.root import Root, StandIns

if __name__ == "__main__":
    StandIns(pytest.MonkeyPatch())
    root = Root(Path(sys.argv[1]), Path(sys.argv[2]))
    print("ready", flush=True)
    sys.stdin.readline()
    root.refresh()
