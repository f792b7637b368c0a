"""Make sure that a batch feeds every worker: choose the batch size if it is auto, else check it before anything starts."""

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
    """Return the config with `batch_size: auto` replaced by a number, with as many workers as it feeds and their
    learning rate.

    The batch size of an output is chosen once, and kept in it: a run that resumes with other workers takes the same steps.

    Raises:
        PlacementError: the cluster does not have the workers asked for.
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
    """Return how many workers train however small the corpus is: those asked for, and all that ZeRO shares a model
    over.
    """
    return offered if config.num_workers or config.zero_stage else 1


def check_batch_feeds(config: OptimizationConfig, batch_size: int, unit: str) -> None:
    """Check that each worker gets a part of each batch.

    Args:
        config: how many workers were asked for.
        batch_size: over all workers.
        unit: what a batch is made of, such as "blocks".

    Raises:
        PlacementError: some would get none, or the cluster does not have the workers asked for.
    """
    num_workers = placement.num_training_workers(config.num_workers, config.num_cpus_per_worker)
    check_feeds(num_workers, batch_size, unit)


def check_feeds(num_workers: int, batch_size: int, unit: str) -> None:
    """Check that each of these workers gets a part of each batch, as `check_batch_feeds` does.

    Raises:
        PlacementError: some would get none.
    """
    if batch_size < num_workers:
        raise PlacementError(
            f"batch_size = {batch_size} {unit} cannot feed {num_workers} workers: "
            + BATCH_ADVICE.format(num_workers=num_workers, batch_size=batch_size)
        )
