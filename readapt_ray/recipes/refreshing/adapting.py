"""Measure whether a retriever's adapter fits new passages as well as old ones, and say how to train it further.

In: the retriever that a refresh embeds with, and texts of new and of kept passages. Out: the adapter's language-model loss
on each kind, and how much less it improves the loss on the new ones. One Ray task loads the pretrained model, on a GPU if
there is one, and runs two forward passes per text of at most 256 tokens.
"""

import logging
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from readapt_ray import artifacts
from readapt_ray.artifacts import Artifact
from readapt_ray.catalog import models
from readapt_ray.cluster import loss_task
from readapt_ray.errors import ReadaptError, first_line
from readapt_ray.generations import CORPUS, Generation
from readapt_ray.made_of import open_input
from readapt_ray.storage import Location

logger = logging.getLogger("readapt_ray")

MAX_TOKENS = 256
_NORMAL_95 = 1.96


@dataclass(frozen=True)
class AdapterLoss:
    """Language-model losses of an adapter on new and on kept passages, in nats per token."""

    new: float
    """The adapter's loss on new passages."""
    kept: float
    """The adapter's loss on kept passages."""
    gap: float
    """By how much the adapter lowers the pretrained model's loss on kept passages, minus the same on new passages. If new
    texts are harder for every model, this cancels out."""
    plus_minus: float
    """Half the width of the 95% interval of the gap."""


def adapter_of(retriever: str) -> Artifact | None:
    """Return the adapter that was merged into a retriever.

    None if the retriever was not made by merge, if several adapters were merged, or if the adapter is missing or has
    changed since.

    Args:
        retriever: the model, by any name that `open_model` takes.
    """
    folder = Location(str(models.open_model(retriever).folder))
    merged = artifacts.read_manifest(folder)
    if merged is None or merged.stage != "merge" or not isinstance(merged.config.get("adapter"), str):
        return None
    try:
        adapter = open_input(Artifact(folder, merged), "adapter", "train")
    except (ReadaptError, OSError):
        return None
    return adapter if adapter.fingerprint == merged.inputs.get("adapter") else None


def adapter_loss(retriever: str, new: list[str], kept: list[str]) -> AdapterLoss | None:
    """Measure the loss of a retriever's adapter on new and on kept texts.

    None if the adapter is missing, a model cannot be loaded (a warning is logged), or there are too few texts.
    """
    adapter = adapter_of(retriever)
    if adapter is None or not new or not kept:
        return None
    try:
        losses = loss_task.measure_losses(
            models.open_model(adapter.manifest.config["pretrained"]),
            models.open_model(adapter.uri),
            [*new, *kept],
            objective=adapter.manifest.config["objective"],
            max_tokens=MAX_TOKENS,
            dtype=adapter.manifest.details["dtype"],
        )
    except ReadaptError as error:
        logger.warning("refresh: the language-model loss of %s was not measured: %s", adapter.uri, first_line(error))
        return None
    return compared(losses[:, : len(new)], losses[:, len(new) :])


def compared(new: NDArray[np.float64], kept: NDArray[np.float64]) -> AdapterLoss | None:
    """Compare the losses of two samples of texts. None if a sample has fewer than two texts with a loss.

    Args:
        new: float64 [2, N]: losses of new texts without and with the adapter, in nats per token. NaN where a text has
            no loss.
        kept: the same for kept texts.
    """
    new, kept = (losses[:, ~np.isnan(losses).any(axis=0)] for losses in (new, kept))
    if min(new.shape[1], kept.shape[1]) < 2:
        return None
    gains = [losses[0] - losses[1] for losses in (new, kept)]
    return AdapterLoss(
        new=float(new[1].mean()),
        kept=float(kept[1].mean()),
        gap=float(gains[1].mean() - gains[0].mean()),
        plus_minus=_NORMAL_95 * math.sqrt(sum(float(each.var(ddof=1)) / len(each) for each in gains)),
    )


def command_to_adapt(root: Location, there: Sequence[Generation]) -> str:
    """Return the command that trains the adapter further, on passages that are new since its retriever was first used.

    The passages are compared with the corpus of the first of the latest generations that all use the present retriever.
    If `readapt clean` removed it, with the oldest of these that is left.

    Args:
        root: folder of all artifacts.
        there: all generations, oldest first, at least one; the last one is the present one.

    Returns:
        A command for a shell. Empty if the adapter is missing, or the corpus did not change since then.
    """
    present, since = there[-1], there[-1]
    for each in reversed(there):
        if each.settings["retriever"] != present.settings["retriever"]:
            break
        since = since if each.freed else each
    adapter = adapter_of(present.settings["retriever"])
    if adapter is None or since.artifacts[CORPUS] == present.artifacts[CORPUS]:
        return ""
    options = {
        "pretrained": adapter.manifest.config["pretrained"],
        "continue-from": adapter.uri,
        "corpus": present.folder(root, CORPUS),
        "new-since": since.folder(root, CORPUS),
        "output": (root / f"adapter-{present.number}").uri,
    }
    return " ".join(["readapt train", *(f"--{name} {shlex.quote(value)}" for name, value in options.items())])
