"""Check only this machine, without Ray."""

import platform

from readapt_ray.cluster.doctor.machine import CheckOptions, check_machine
from readapt_ray.cluster.doctor.report import Report


def check_here(root: str | None, models: tuple[str, ...]) -> Report:
    """Check this machine, without Ray; return a report with one row.

    Args:
        root: folder or URI that a run will write to; None to skip this check.
        models: models that this machine must have or be able to fetch.
    """
    report = Report()
    report.add(platform.node() or "this machine", check_machine(CheckOptions(root=root, models=models)))
    return report
