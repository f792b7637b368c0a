"""Fingerprint all that decides a vector, without torch, so that a finished stage is known in a second."""

from readapt_ray.artifacts import fingerprint
from readapt_ray.catalog.encoding import Encoding
from readapt_ray.catalog.models import OpenModel


def encoder_fingerprint(model: OpenModel, encoding: Encoding, dtype: str) -> str:
    """Hash all that decides a vector: weights (of an adapter's base too), encoding, dtype."""
    return fingerprint_of(model.fingerprint, model.base.fingerprint if model.is_adapter else None, encoding, dtype)


def fingerprint_of(weights: str, base: str | None, encoding: Encoding, dtype: str) -> str:
    """Return `encoder_fingerprint` from the fingerprints of a model and, for an adapter, of its base."""
    return fingerprint({"weights": weights, "base": base, "encoding": encoding.model_dump(mode="json"), "dtype": dtype})
