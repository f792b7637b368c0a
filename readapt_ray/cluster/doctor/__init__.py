"""`readapt doctor`: find what will fail on this machine or cluster, within a minute, before a run."""

from typing import ClassVar

from readapt_ray.cluster.doctor.report import Report
from readapt_ray.config import Config


class DoctorConfig(Config):
    """Options of `readapt doctor`."""

    cluster: bool = False
    """Check every node of the cluster of RAY_ADDRESS (as a submitted job: its own), and the network between them."""
    root: str | None = None
    """Folder or URI that a run will write to."""
    models: tuple[str, ...] = ()
    """Models that a run will use: catalog names, folders, URIs or hub ids. Their weights are not fetched."""

    inputs: ClassVar[frozenset[str]] = frozenset({"cluster", "models"})


def examine(config: DoctorConfig) -> Report:
    """Check this machine, or all nodes of a cluster."""
    from readapt_ray.cluster.doctor import cluster, here

    check = cluster.check_cluster if config.cluster else here.check_here
    return check(config.root, config.models)
