"""Read and write query models: models that encode only queries, while another model encodes the passages.

`finetune --queries-only` and `merge --queries-only` make them, so that the vectors of passages need not change. The
entry `passages` in the readapt.json of a query model names the passage model, with its fingerprint, the fingerprint of
its base if it is an adapter, and its encoding.
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
    """The passage model of a query model: the model that encodes the passages."""

    name: str
    """Absolute folder, or the name with its commit."""
    weights: str
    """Fingerprint of the passage model."""
    base: str | None
    """Fingerprint of its base model if it is an adapter, else None."""
    encoding: Encoding

    def to_json(self) -> dict[str, Any]:
        """Return the entry for the readapt.json of the query model: `{"passages": {...}}`."""
        values = {"model": self.name, "weights": self.weights, "base": self.base}
        return {_KEY: {**values, "encoding": self.encoding.model_dump(mode="json")}}

    def open(self) -> OpenModel:
        """Open the passage model, and fetch it if needed.

        Raises:
            ModelError: the model no longer exists under its name.
            FingerprintMismatchError: another model has its name now.
            ReadaptError: the hub could not be reached, or kept failing.
        """
        model = open_model(self.name)
        if _fingerprints(model) != (self.weights, self.base):
            raise FingerprintMismatchError(
                f"{self.name!r} is another model than the one whose passages are searched ({self.weights}); put that one back"
            )
        return model


def describe_passages(model: OpenModel, encoding: Encoding) -> PassagesModel:
    """Return the record of a passage model, to store in a query model.

    Args:
        model: the passage model.
        encoding: how it encoded the passages.
    """
    folder = own_folder(model.name)
    return PassagesModel(str(folder) if folder else model.pinned_name, *_fingerprints(model), encoding)


def passages_model(model: OpenModel) -> PassagesModel | None:
    """Return the passage model that a query model names; None for a model that encodes queries and passages."""
    contract = model.read_json(CONTRACT_NAME).get(_KEY)
    if contract is None:
        return None
    encoding = Encoding.parse(contract["encoding"], where=str(model.folder / CONTRACT_NAME))
    return PassagesModel(contract["model"], contract["weights"], contract["base"], encoding)


def refuse_query_model(model: OpenModel) -> None:
    """Refuse a query model where a model must encode queries and passages.

    Raises:
        ModelError: the model is a query model; the message names its passage model.
    """
    if (passages := passages_model(model)) is not None:
        raise ModelError(
            f"{model.name!r} is only for queries, and its passages are encoded by {passages.name!r}; give {passages.name!r}"
        )


def _fingerprints(model: OpenModel) -> tuple[str, str | None]:
    return model.fingerprint, model.base.fingerprint if model.is_adapter else None
