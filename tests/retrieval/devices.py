"""A stand-in for an encoder on a GPU."""

import torch

from readapt_ray.retrieval.encoder import Encoder


class OnCuda(Encoder):
    """An encoder that is told to be on a GPU, and computes on the CPU."""

    device = property(lambda _: torch.device("cuda"), lambda *_: None)  # type: ignore[assignment]
