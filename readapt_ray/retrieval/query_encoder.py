"""Choose how to encode queries for given vectors, and refuse a model whose queries do not fit them.

Queries can be encoded by the model that made the vectors; by a query model that was made for it; or by a new model, if
a bridge maps its queries to these vectors.
"""

from dataclasses import dataclass
from typing import Any

from readapt_ray.artifacts import Artifact
from readapt_ray.catalog.encoding import Encoding
from readapt_ray.catalog.models import OpenModel
from readapt_ray.catalog.query_models import PassagesModel, passages_model
from readapt_ray.errors import FingerprintMismatchError
from readapt_ray.retrieval.bridge import Bridge


@dataclass(frozen=True)
class QueryEncoder:
    """A model, its encoding and perhaps a bridge, that together encode queries for given vectors."""

    model: OpenModel
    encoding: Encoding
    description: dict[str, Any]
    """Fingerprint, model, dtype and encoding of the encoder, as in manifests."""
    bridge: Bridge | None = None

    @property
    def fingerprint(self) -> str:
        """Return a fingerprint of everything that decides the vector of a query, a bridge included."""
        return self.bridge.query_fingerprint if self.bridge else str(self.description["fingerprint"])


def describe_encoder(model: OpenModel, encoding: Encoding, dtype: str) -> dict[str, Any]:
    """Return the description of an encoder that vector files and manifests store.

    It has fingerprint, model (its name), dtype and encoding. The weights are hashed, unless the model has a manifest.
    """
    from readapt_ray.retrieval.encoder_fingerprint import encoder_fingerprint

    return {
        "fingerprint": encoder_fingerprint(model, encoding, dtype),
        "model": model.name,
        "dtype": dtype,
        "encoding": encoding.model_dump(mode="json"),
    }


def query_encoder(
    model: OpenModel, made: Artifact, *, encoding: Encoding | None = None, bridge: Bridge | None = None
) -> QueryEncoder:
    """Return the encoder of queries for given vectors, after checking that it fits them.

    Args:
        model: encodes the queries.
        made: the vectors, or an index of them.
        encoding: given by the user; None takes the one of the vectors, the query model or the bridge. Any other is
            refused, except with a query model.
        bridge: maps the queries, if another model made the vectors.

    Raises:
        FingerprintMismatchError: the model did not make these vectors, and is no query model for them; or the bridge
            does not belong to this model and these vectors.
    """
    recorded, passages = made.manifest.details["encoder"], passages_model(model)
    if bridge is not None:
        if passages is not None:
            raise FingerprintMismatchError(
                f"{model.name!r} is for queries over vectors of {passages.name!r}, and needs no bridge; leave it out"
            )
        bridge.check_vectors(made)
        recorded = bridge.new_encoder
        made = bridge.artifact
    elif passages is not None:
        return _of_query_model(model, passages, made, encoding)
    encoding = encoding or Encoding.parse(recorded["encoding"], where=made.uri)
    _check(model, encoding, recorded, made)
    return QueryEncoder(model, encoding, recorded, bridge)


def _of_query_model(
    model: OpenModel, passages: PassagesModel, made: Artifact, encoding: Encoding | None
) -> QueryEncoder:
    from readapt_ray.retrieval.encoder_fingerprint import fingerprint_of

    recorded = made.manifest.details["encoder"]
    cut = {"dimensions": recorded["encoding"].get("dimensions")}
    due = fingerprint_of(passages.weights, passages.base, passages.encoding.model_copy(update=cut), recorded["dtype"])
    if due != recorded["fingerprint"]:
        raise FingerprintMismatchError(
            f"{model.name!r} is for queries over vectors of {passages.name!r}, and {made.uri!r} was made by "
            f"{recorded['model']!r} with other weights or another encoding; search vectors that `readapt embed --retriever "
            f"{model.name}` makes"
        )
    encoding = encoding or model.encoding.model_copy(update=cut)
    return QueryEncoder(model, encoding, describe_encoder(model, encoding, recorded["dtype"]))


def _check(model: OpenModel, encoding: Encoding, recorded: dict[str, Any], made: Artifact) -> None:
    """Refuse vectors, an index or a bridge that another model or encoding made.

    Raises:
        FingerprintMismatchError: the fingerprints differ; the message says in what.
    """
    from readapt_ray.retrieval.encoder_fingerprint import encoder_fingerprint

    if encoder_fingerprint(model, encoding, recorded["dtype"]) == recorded["fingerprint"]:
        return
    wanted = encoding.model_dump(mode="json")
    differing = [
        f"{name} is {recorded['encoding'].get(name)!r} there and {value!r} here"
        for name, value in wanted.items()
        if recorded["encoding"].get(name) != value
    ]
    what = (
        "; ".join(differing)
        or f"the weights, tokenizer or configuration are not the ones that {recorded['model']!r} had then"
    )
    if made.manifest.stage == "bridge":
        raise FingerprintMismatchError(
            f"bridge {made.uri!r} is not for queries of {model.name!r} as it is now: {what}; search with the model and "
            f"encoding that it was fitted with, or run `readapt bridge` with this one into another output"
        )
    raise FingerprintMismatchError(
        f"{made.uri!r} was not made by {model.name!r} as it is now: {what}; search with the model and encoding "
        f"that made it, or run `readapt embed` with this one into another output"
    )
