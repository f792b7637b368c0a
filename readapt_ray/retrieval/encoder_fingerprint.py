"""Compute the fingerprint of an encoder without importing torch, so that a finished stage is recognised in a second."""

from readapt_ray.artifacts import fingerprint
from readapt_ray.catalog.encoding import Encoding
from readapt_ray.catalog.models import OpenModel


def encoder_fingerprint(model: OpenModel, encoding: Encoding, dtype: str) -> str:
    """Hash everything that decides a vector: weights (and those of an adapter's base), encoding, dtype.

    Args:
        model: the model; its files are read in full, unless a stage of ours wrote it.
        encoding: how it encodes texts.
        dtype: name of the dtype that it computes in, such as float32.
    """
    return fingerprint_of(model.fingerprint, model.base.fingerprint if model.is_adapter else None, encoding, dtype)


def fingerprint_of(weights: str, base: str | None, encoding: Encoding, dtype: str) -> str:
    """Compute `encoder_fingerprint` without the model.

    Args:
        weights: fingerprint of the model.
        base: fingerprint of its base model if it is an adapter, else None.
        encoding, dtype: as in `encoder_fingerprint`.
    """
    return fingerprint({"weights": weights, "base": base, "encoding": encoding.model_dump(mode="json"), "dtype": dtype})
