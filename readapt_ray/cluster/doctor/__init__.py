"""Find what will fail on this machine or cluster before a run, within a minute (`readapt doctor`)."""

from typing import ClassVar

from readapt_ray import environment
from readapt_ray.cluster.doctor.report import Report
from readapt_ray.config import Config
from readapt_ray.errors import InputError


class DoctorConfig(Config):
    """Options of `readapt doctor`."""

    cluster: bool = False
    """Check every node of the cluster at RAY_ADDRESS (in a submitted job: the job's cluster), and the network between
    them."""
    gpus: bool = False
    """Start the GPU nodes that the cluster may grow to (READAPT_NUM_GPUS) and check them too. They cost money until
    the autoscaler ends them as idle."""
    root: str | None = None
    """Folder or URI that a run will write to."""
    models: tuple[str, ...] = ()
    """Models that a run will use: catalog names, folders, URIs or hub ids. Their weights are not downloaded."""

    inputs: ClassVar[frozenset[str]] = frozenset({"cluster", "models"})


def examine(config: DoctorConfig) -> Report:
    """Check this machine, or with `cluster` all nodes of a cluster; return the report.

    Problems that are found are in the report; they do not raise.

    Raises:
        InputError: `gpus` is set without `cluster`, or READAPT_NUM_GPUS is not set.
        PlacementError: with `cluster`: the nodes did not come up in time.
    """
    from readapt_ray.cluster.doctor import cluster, here

    if config.gpus and not (config.cluster and environment.num_gpus()):
        raise InputError(
            "readapt doctor: --gpus starts the GPU nodes that READAPT_NUM_GPUS allows; give it with --cluster, and set that "
            "variable on the head"
        )
    if config.cluster:
        return cluster.check_cluster(config.root, config.models, starts_gpus=config.gpus)
    return here.check_here(config.root, config.models)
