"""Share test modules out between the workers of pytest-xdist, so that one of them starts Ray and the others need not.

The first worker takes the modules that use `ray_session`, the others the rest. A worker with none of its own left helps
with the others' from the end.
"""

import functools
import sys
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

ROOT = Path(__file__).parent.parent


@functools.cache
def uses_ray(module: str) -> bool:
    """Whether a test module names the fixture `ray_session`."""
    return "ray_session" in (ROOT / module).read_text(encoding="utf-8")


def module_of(nodeid: str) -> str:
    """Path of a test's module from the root of the repository."""
    return nodeid.partition("::")[0]


def check(item: pytest.Item) -> None:
    """Fail a test that starts a Ray beside `ray_session`, or uses it in a module of the wrong lane."""
    ray = sys.modules.get("ray")
    if ray and ray.is_initialized() and not item.config.stash.get(RAY_RUNS, False):
        ray.shutdown()
        pytest.fail(f"{item.nodeid} started a Ray of its own: take the fixture ray_session")
    module = module_of(item.nodeid)
    if "ray_session" in getattr(item, "fixturenames", ()) and not uses_ray(module):
        pytest.fail(f"{module} uses Ray: name the fixture ray_session in it, so that it runs where Ray is")


RAY_RUNS = pytest.StashKey[bool]()
"""Set in the configuration once `ray_session` has started Ray."""


class Lanes(LoadScopeScheduling):
    """Give each worker whole modules, those of its lane first."""

    def _split_scope(self, nodeid: str) -> str:
        return module_of(nodeid)

    def remove_node(self, node: WorkerController) -> str | None:
        """Give the tests that a dead worker had left to the others, and return the test that killed it.

        The base class hands out whole modules again: one that had ended is a list without tests, which no worker
        answers, so the run waits for ever; and the test that killed one worker kills the next.
        """
        left = [nodeid for tests in self.assigned_work.pop(node).values() for nodeid, ran in tests.items() if not ran]
        for nodeid in left[1:]:
            self.workqueue.setdefault(module_of(nodeid), {})[nodeid] = False
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
        own = [module for module in queue if uses_ray(module) == wants_ray]
        self.workqueue.move_to_end(own[0] if own else queue[-1], last=False)
        super()._assign_work_unit(node)
