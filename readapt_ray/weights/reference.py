"""Compute the equation of RE-AdaptIR for one weight, as the paper writes it.

This is the reference. `merging.py` computes the same a slice of rows at a time, from low-rank factors, without
storing a dense difference; its tests compare the two.
"""

import torch

from readapt_ray.errors import WeightMismatchError


def readapted_weight(
    name: str,
    pretrained_OI: torch.Tensor,
    retriever_OI: torch.Tensor,
    knowledge_OI: torch.Tensor,
    *,
    readapter_scale: float,
    knowledge_scale: float,
) -> torch.Tensor:
    """Merge one weight: add both scaled changes to the pretrained weight (RE-AdaptIR, section 2.2).

    Args:
        name: tensor name; used only in the error.
        pretrained_OI: the weight before any tuning. O = output rows, I = input columns.
        retriever_OI: the same weight in the published retriever.
        knowledge_OI: tuned minus pretrained, dense.
        readapter_scale: share of the retrieval skill kept; 1.0 keeps all.
        knowledge_scale: share of the new domain added; the paper uses 0.5.

    Returns:
        float32 [O, I], or float64 where an input is float64. Only the writer casts, so bfloat16 rounds once.

    Raises:
        WeightMismatchError: the shapes differ.
    """
    shapes = [list(each.shape) for each in (pretrained_OI, retriever_OI, knowledge_OI)]
    if shapes[1:] != shapes[:-1]:
        raise WeightMismatchError(f"{name!r} has different shapes in its three inputs: {shapes}")
    inputs = (pretrained_OI, retriever_OI, knowledge_OI)
    dtype = torch.float64 if any(each.dtype == torch.float64 for each in inputs) else torch.float32
    pretrained, retriever, knowledge = (each.to(dtype) for each in inputs)
    return pretrained + readapter_scale * (retriever - pretrained) + knowledge_scale * knowledge
