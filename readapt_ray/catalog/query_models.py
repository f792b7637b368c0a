"""Read and write models for queries only: a folder whose readapt.json names another model, which encodes the passages.

`finetune --queries-only` and `merge --queries-only` write it. So vectors of passages stay as they are, and only queries
change. The entry `passages` of readapt.json holds the passages' model, its fingerprint, its base's if it is an
adapter, and its encoding.
"""

from dataclasses import dataclass
from typing import Any

from readapt_ray.catalog.encoding import Encoding
from readapt_ray.catalog.models import OpenModel, open_model, own_folder
from readapt_ray.errors import FingerprintMismatchError, ModelError
from readapt_ray.model_file_names import CONTRACT_NAME

_KEY = "passages"


@dataclass(frozen=True)
class PassagesModel:
    """The model that encodes the passages which a model for queries searches."""

    name: str
    weights: str
    """Its fingerprint."""
    base: str | None
    """Fingerprint of the base model, if it is an adapter."""
    encoding: Encoding

    def to_json(self) -> dict[str, Any]:
        """Return what readapt.json of the queries' model says of it."""
        values = {"model": self.name, "weights": self.weights, "base": self.base}
        return {_KEY: {**values, "encoding": self.encoding.model_dump(mode="json")}}

    def open(self) -> OpenModel:
        """Bring the model onto this machine's disk.

        Raises:
            ModelError: it is no longer where it was.
            FingerprintMismatchError: another model is there.
        """
        model = open_model(self.name)
        if _fingerprints(model) != (self.weights, self.base):
            raise FingerprintMismatchError(
                f"{self.name!r} is another model than the one whose passages are searched ({self.weights}); put that one back"
            )
        return model


def describe_passages(model: OpenModel, encoding: Encoding) -> PassagesModel:
    """Return what a model for queries says of the model of the passages."""
    folder = own_folder(model.name)
    return PassagesModel(str(folder) if folder else model.pinned_name, *_fingerprints(model), encoding)


def passages_model(model: OpenModel) -> PassagesModel | None:
    """Return the model of the passages, if this one is for queries alone."""
    contract = model.read_json(CONTRACT_NAME).get(_KEY)
    if contract is None:
        return None
    encoding = Encoding.parse(contract["encoding"], where=str(model.folder / CONTRACT_NAME))
    return PassagesModel(contract["model"], contract["weights"], contract["base"], encoding)


def refuse_query_model(model: OpenModel) -> None:
    """Refuse a retriever for queries alone where it would take the place of two models.

    Raises:
        ModelError: it is one.
    """
    if (passages := passages_model(model)) is not None:
        raise ModelError(
            f"{model.name!r} is for queries alone, and its passages are encoded by {passages.name!r}; give {passages.name!r}"
        )


def _fingerprints(model: OpenModel) -> tuple[str, str | None]:
    return model.fingerprint, model.base.fingerprint if model.is_adapter else None
