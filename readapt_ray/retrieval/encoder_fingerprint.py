"""Compute the fingerprint of an encoder without importing torch, so that a finished stage is recognised in a second."""

from readapt_ray.artifacts import fingerprint
from readapt_ray.catalog.encoding import Encoding
from readapt_ray.catalog.models import OpenModel


def encoder_fingerprint(model: OpenModel, encoding: Encoding, dtype: str) -> str:
    """Hash everything that decides a vector: weights (and those of an adapter's base), encoding, dtype."""
    return fingerprint_of(model.fingerprint, model.base.fingerprint if model.is_adapter else None, encoding, dtype)


def fingerprint_of(weights: str, base: str | None, encoding: Encoding, dtype: str) -> str:
    """Compute `encoder_fingerprint` from the fingerprints of a model and, for an adapter, its base (else None)."""
    return fingerprint({"weights": weights, "base": base, "encoding": encoding.model_dump(mode="json"), "dtype": dtype})
