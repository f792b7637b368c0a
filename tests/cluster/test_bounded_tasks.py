"""A few tasks at a time; those that still run when the caller stops are cancelled, the last first."""

import time

import pytest
import ray

from readapt_ray.cluster import bounded_tasks


def test_tasks_are_cancelled_in_the_order_in_which_they_waited(
    ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, cancelled = [], []
    cancel = ray.cancel

    def note(reference: ray.ObjectRef) -> None:
        cancelled.append(reference)
        cancel(reference)

    def start(seconds: float) -> ray.ObjectRef:
        started.append(ray.remote(num_cpus=1)(lambda: time.sleep(seconds)).remote())
        return started[-1]

    monkeypatch.setattr(ray, "cancel", note)
    results = bounded_tasks.run_bounded(start, [0.0, 3600.0, 3600.0, 3600.0, 3600.0], 4)
    assert next(results) is None
    results.close()  # type: ignore[attr-defined]
    assert len(started) == 5 - 1
    assert cancelled == [*reversed(started[1:])]
    with pytest.raises(ray.exceptions.TaskCancelledError):
        ray.get(started[-1], timeout=300)
