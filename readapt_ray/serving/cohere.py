"""Define the bodies of requests and answers in version 2 of Cohere's embeddings API (`POST /v2/embed`).

Unlike OpenAI's clients, Cohere's always say whether texts are queries or passages.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator

from readapt_ray.serving.answers import to_base64
from readapt_ray.serving.schema import MAX_INPUTS, EmbeddingsRequest, InputType, Text, Whole

EmbeddingType = Literal["float", "base64"]


class EmbedRequest(BaseModel):
    """The body of `POST /v2/embed`."""

    model_config = ConfigDict(extra="ignore", use_attribute_docstrings=True)

    model: Text | None = None
    """As for `/v1/embeddings`."""
    texts: Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=MAX_INPUTS)]
    """Up to 2,048 texts."""
    input_type: InputType | None = None
    """As for `/v1/embeddings`. Cohere's words are `search_query` and `search_document`."""
    truncate: Literal["END", "NONE"] = "END"
    """`END` cuts the end of a text that is too long; `NONE` refuses it."""
    embedding_types: Annotated[list[EmbeddingType], Field(fail_fast=True, min_length=1, max_length=2)] | None = None
    """`float`, the default, returns numbers; `base64` returns the bytes of little-endian float32 in base64. Both may be
    given."""
    output_dimension: Whole | None = None
    """As `dimensions` of `/v1/embeddings`."""

    @field_validator("truncate", mode="before")
    @classmethod
    def _null_is_the_default(cls, value: Any) -> Any:
        return "END" if value is None else value

    def as_embeddings_request(self) -> EmbeddingsRequest:
        """Return the same request in the form of OpenAI's API."""
        return EmbeddingsRequest(
            model=self.model,
            input=self.texts,
            input_type=self.input_type,
            truncate=self.truncate == "END",
            dimensions=self.output_dimension,
        )


class ApiVersion(BaseModel):
    """The version of Cohere's API that an answer follows."""

    version: Literal["2"] = "2"


class BilledUnits(BaseModel):
    """The tokens that Cohere would bill."""

    input_tokens: int
    """Number of tokens in the texts, template and special tokens included."""


class Meta(BaseModel):
    """Details of an answer."""

    api_version: ApiVersion = ApiVersion()
    billed_units: BilledUnits


class EmbedResponse(BaseModel):
    """The vectors by their type (`float`, `base64`), in the order of the texts."""

    id: str
    response_type: Literal["embeddings_by_type"] = "embeddings_by_type"
    embeddings: dict[EmbeddingType, list[list[float]] | list[str]]
    texts: list[str]
    meta: Meta


_WRITERS: dict[EmbeddingType, Callable[[NDArray[np.float32]], Any]] = {
    "float": np.ascontiguousarray,
    "base64": lambda vectors: [to_base64(each) for each in vectors],
}


def embed_json(vectors: NDArray[np.float32], body: EmbedRequest, request_id: str, num_tokens: int) -> bytes:
    """Write an `EmbedResponse` as JSON, with all `embedding_types` that the request asks for; float if it names none.

    Args:
        vectors: [N, D], in the order of the request's texts, which the answer repeats.
        body: the request.
        request_id: id of the request, for the answer's `id`.
        num_tokens: number of tokens in all texts.
    """
    meta = Meta(billed_units=BilledUnits(input_tokens=num_tokens))
    answer = {
        "id": request_id,
        "response_type": "embeddings_by_type",
        "embeddings": {each: _WRITERS[each](vectors) for each in body.embedding_types or ["float"]},
        "texts": body.texts,
        "meta": meta.model_dump(),
    }
    return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
