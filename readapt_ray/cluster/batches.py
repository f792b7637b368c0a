"""Make sure that each worker gets a part of each batch: choose the batch size if it is auto, else check it early."""

import logging
from typing import TYPE_CHECKING, TypeVar

from readapt_ray.cluster import placement
from readapt_ray.cluster.optimization import OptimizationConfig
from readapt_ray.errors import PlacementError
from readapt_ray.storage import Location

if TYPE_CHECKING:
    from readapt_ray.training.step_size import PackedSize

logger = logging.getLogger("readapt_ray")

BATCH_ADVICE = "give batch_size {num_workers} or more, or num_workers {batch_size} or fewer"
_BATCH_NAME = "batch_size"
C = TypeVar("C", bound=OptimizationConfig)


def with_batch_size(config: C, size: "PackedSize", output: Location) -> C:
    """Return a copy of the config with a number for `batch_size: auto`, and workers and learning rate that fit it.

    The batch size is chosen once per output and stored there (file `batch_size`), so that a run that resumes with other
    workers takes the same steps. `num_workers` becomes the number that this batch keeps busy, `min_workers` is at most
    that, and `learning_rate` is multiplied by a factor.

    Args:
        config: options with `batch_size: auto`.
        size: size of the packed corpus.
        output: folder of the artifact.

    Raises:
        PlacementError: the nodes of the cluster did not come up in time.
    """
    from readapt_ray.training.step_size import choose_step_size

    offered = placement.num_training_workers(config.num_workers, config.num_cpus_per_worker)
    begun = output / _BATCH_NAME
    chosen = choose_step_size(
        size,
        num_workers=offered,
        least_workers=least_workers(config, offered),
        batch_size=int(begun.read_text()) if begun.is_file() else None,
    )
    begun.write_text(str(chosen.batch_size))
    logger.info("train: %s", chosen.describe(offered))
    return config.model_copy(
        update={
            "batch_size": chosen.batch_size,
            "num_workers": chosen.num_workers,
            "min_workers": config.min_workers and min(config.min_workers, chosen.num_workers),
            "learning_rate": config.learning_rate * chosen.rate_factor,
        }
    )


def least_workers(config: OptimizationConfig, offered: int) -> int:
    """Return the fewest workers that train, even on a tiny corpus.

    All offered workers if `num_workers` or `zero_stage` is set, else 1.

    Args:
        config: options of training.
        offered: number of workers that the cluster has room for.
    """
    return offered if config.num_workers or config.zero_stage else 1


def check_batch_feeds(config: OptimizationConfig, batch_size: int, unit: str) -> None:
    """Check that each worker gets a part of each batch; connect to Ray to count the workers.

    Args:
        config: options with the number of workers; if omitted, it is chosen as training does.
        batch_size: size of a batch over all workers.
        unit: name of the items of a batch, such as "blocks".

    Raises:
        PlacementError: a worker would get nothing, or the nodes of the cluster did not come up in time.
    """
    num_workers = placement.num_training_workers(config.num_workers, config.num_cpus_per_worker)
    check_feeds(num_workers, batch_size, unit)


def check_feeds(num_workers: int, batch_size: int, unit: str) -> None:
    """Check that each of `num_workers` workers gets a part of each batch; see `check_batch_feeds`.

    Raises:
        PlacementError: a worker would get nothing.
    """
    if batch_size < num_workers:
        raise PlacementError(
            f"batch_size = {batch_size} {unit} cannot feed {num_workers} workers: "
            + BATCH_ADVICE.format(num_workers=num_workers, batch_size=batch_size)
        )
