"""Measure the language-model loss of withheld passages in one Ray task, on a GPU if the cluster has one.

In: the models by name, and texts. Out: the loss of each text before and after training. The driver loads no model.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from readapt_ray.catalog import models
from readapt_ray.catalog.models import OpenModel
from readapt_ray.catalog.retrievers import Objective
from readapt_ray.cluster import autoscaling, connection, on_worker
from readapt_ray.cluster.placement import Placement, place_actors


def measure_losses(
    pretrained: OpenModel,
    trained: OpenModel,
    texts: Sequence[str],
    *,
    objective: Objective,
    max_tokens: int,
    dtype: str,
) -> NDArray[np.float64]:
    """Measure the loss per token of each text before and after training, in one Ray task.

    See `training/withheld_loss.py` for the loss. The task uses a GPU if the cluster has one.

    Args:
        pretrained: the model before training.
        trained: the model after training, or the adapter that was trained on it.
        texts: N texts.
        objective: next-token or masked-token loss.
        max_tokens: texts are truncated to this length.
        dtype: data type that the models compute in.

    Returns:
        float64 [2, N]: before, after. NaN for a text without a token to predict.

    Raises:
        PlacementError: the cluster has no CPU, or no GPU node came up in time.
        WorkerError: the task died, for example for lack of memory.
    """
    import ray

    _, num_cpus, num_gpus = place_actors(Placement(None, None), 1)
    names = {"pretrained": pretrained, "trained": trained}
    job = {
        **{name: (on_worker.model_name(model), model.fingerprint) for name, model in names.items()},
        "driver_node": on_worker.this_node(),
        "options": {"objective": objective, "max_tokens": max_tokens},
        "dtype": dtype,
    }
    task = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus)(_measure)
    try:
        with autoscaling.requested(1, {"CPU": num_cpus, "GPU": num_gpus}, least=1):
            found: NDArray[np.float64] = ray.get(task.remote(job, list(texts)))
    except ray.exceptions.RayError as error:
        raise connection.cause_of(error) from None
    return found


def _measure(job: dict[str, Any], texts: Sequence[str]) -> NDArray[np.float64]:
    import torch

    from readapt_ray.retrieval.encoder import DTYPES
    from readapt_ray.training import withheld_loss

    def opened(role: str) -> OpenModel:
        name, expected = job[role]
        model = models.open_model(name)
        on_worker.check_same_model(name, lambda: model.fingerprint, {expected}, driver_node=job["driver_node"])
        return model

    on_worker.check_node()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pretrained, trained = opened("pretrained"), opened("trained")
    return withheld_loss.losses(pretrained, trained, texts, dtype=DTYPES[job["dtype"]], device=device, **job["options"])
