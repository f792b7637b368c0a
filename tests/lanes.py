"""Share tests out between the workers of pytest-xdist, so that one of them starts Ray and the others need not.

The first worker takes the tests that use `ray_session`, module by module, the others the rest. A worker with none of its
own left helps with the others' from the end. Only a worker knows the fixtures of a test: each writes the ids of the
tests that use Ray to a file, which the scheduler reads.
"""

import sys
import tempfile
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

USES_RAY = " with Ray"
FOLDER = pytest.StashKey[tempfile.TemporaryDirectory[str]]()
"""Where the workers write which tests use Ray."""

RAY_RUNS = pytest.StashKey[bool]()
"""Set in the configuration once `ray_session` has started Ray."""


def invite(node: WorkerController) -> None:
    """Tell a worker that starts where to write which tests use Ray."""
    if FOLDER not in node.config.stash:
        node.config.stash[FOLDER] = tempfile.TemporaryDirectory(prefix="readapt-lanes-")
    node.workerinput["ray_tests"] = f"{node.config.stash[FOLDER].name}/{node.gateway.id}"


def tell(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Write which tests use Ray, where this is a worker of pytest-xdist."""
    if file := getattr(config, "workerinput", {}).get("ray_tests"):
        ids = (item.nodeid for item in items if "ray_session" in getattr(item, "fixturenames", ()))
        Path(file).write_text("\0".join(ids), encoding="utf-8")


def check(item: pytest.Item) -> None:
    """Fail a test that starts a Ray beside `ray_session`."""
    ray = sys.modules.get("ray")
    if ray and ray.is_initialized() and not item.config.stash.get(RAY_RUNS, False):
        ray.shutdown()
        pytest.fail(f"{item.nodeid} started a Ray of its own: take the fixture ray_session")


class Lanes(LoadScopeScheduling):
    """Give each worker the tests of one module that are of one lane, those of its own lane first."""

    def schedule(self) -> None:
        """Read which tests use Ray before the first are given out."""
        if self.collection is None:
            files = Path(self.config.stash[FOLDER].name).iterdir()
            self._ray_tests = {nodeid for file in files for nodeid in file.read_text(encoding="utf-8").split("\0")}
        super().schedule()

    def _split_scope(self, nodeid: str) -> str:
        return nodeid.partition("::")[0] + (USES_RAY if nodeid in self._ray_tests else "")

    def remove_node(self, node: WorkerController) -> str | None:
        """Give the tests that a dead worker had left to the others, and return the test that killed it.

        The base class hands out whole modules again: one that had ended is a list without tests, which no worker
        answers, so the run waits for ever; and the test that killed one worker kills the next.
        """
        left = [nodeid for tests in self.assigned_work.pop(node).values() for nodeid, ran in tests.items() if not ran]
        for nodeid in left[1:]:
            self.workqueue.setdefault(self._split_scope(nodeid), {})[nodeid] = False
        for other in self.nodes:
            self._reschedule(other)
        return left[0] if left else None

    def _reschedule(self, node: WorkerController) -> None:
        """Hand out modules until a worker has three tests: it runs a test only once it knows the next one, or the end."""
        while not node.shutting_down and self._pending_of(self.assigned_work[node]) <= 2:
            super()._reschedule(node)

    def _assign_work_unit(self, node: WorkerController) -> None:
        wants_ray = node is self.nodes[0]
        queue = list(self.workqueue)
        own = [scope for scope in queue if scope.endswith(USES_RAY) == wants_ray]
        self.workqueue.move_to_end(own[0] if own else queue[-1], last=False)
        super()._assign_work_unit(node)
