"""What goes over HTTP: OpenAI's embeddings and errors, and a search beside them."""

import base64
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

MAX_INPUTS = 2048
"""Texts in a request at most, as OpenAI has it."""
MAX_TOP_K = 1000

Text = Annotated[str, StringConstraints(strict=True)]
Texts = Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS)]


class _Request(BaseModel):
    # Clients send options that mean nothing here (`user`); OpenAI's own server lets them pass too.
    model_config = ConfigDict(extra="ignore", use_attribute_docstrings=True)


class EmbeddingsRequest(_Request):
    """`POST /v1/embeddings`."""

    input: Texts
    """A text, or a list of up to 2,048 texts."""
    model: str | None = None
    """The served model's name, as `GET /v1/models` gives it; may be left out."""
    encoding_format: Literal["float", "base64"] = "float"
    """Numbers, or the bytes of little-endian float32 in base64."""
    dimensions: int | None = None
    """Length of the vectors; only the model's own is accepted."""
    input_type: Literal["query", "passage"] = "query"
    """Which of the model's templates the texts are put into. Not in OpenAI's API."""
    truncate: bool = False
    """Cut a text that is too long, instead of refusing it. Not in OpenAI's API."""


class SearchRequest(_Request):
    """`POST /v1/search`."""

    query: Texts
    """A query, or a list of up to 2,048 queries."""
    top_k: int = Field(default=10, ge=1, le=MAX_TOP_K, strict=True)
    """Passages for each query; over the number of passages it gives all of them."""
    model: str | None = None
    """The served model's name; may be left out."""
    truncate: bool = True
    """Cut a query that is too long, as `readapt search` does; false refuses it."""


class Usage(BaseModel):
    """Tokens of the texts, template and specials included."""

    prompt_tokens: int
    total_tokens: int


class Embedding(BaseModel):
    """The vector of the text at place `index`."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingsResponse(BaseModel):
    """The vectors, in the order of the texts."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage


class Hit(BaseModel):
    """A passage that was found. Without a corpus there is no title and no text."""

    rank: int
    doc_id: str
    score: float
    title: str | None = None
    text: str | None = None


class SearchResult(BaseModel):
    """What was found for the query at place `index`, best first."""

    object: Literal["search_result"] = "search_result"
    index: int
    hits: list[Hit]


class SearchResponse(BaseModel):
    """The results, in the order of the queries."""

    object: Literal["list"] = "list"
    data: list[SearchResult]
    model: str
    usage: Usage


class ServedModel(BaseModel):
    """The model that is served, in OpenAI's words."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "readapt_ray"
    dimension: int
    fingerprint: str
    max_query_tokens: int
    max_passage_tokens: int


class ModelList(BaseModel):
    """`GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ServedModel]


class Health(BaseModel):
    """`GET /healthz`."""

    status: Literal["ok"] = "ok"
    model: str
    fingerprint: str
    num_vectors: int


class RequestError(Exception):
    """A request that cannot be answered, as an HTTP status and OpenAI's error."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = error_body(message, status=status, param=param, code=code)


def error_body(
    message: str, *, status: int = 400, param: str | None = None, code: str | None = None
) -> dict[str, dict[str, str | None]]:
    """An error as OpenAI's clients read it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


_EXPECTED = {
    "input": f"must be a string, or a list of 1 to {MAX_INPUTS:,} strings",
    "query": f"must be a string, or a list of 1 to {MAX_INPUTS:,} strings",
    "encoding_format": "must be 'float' or 'base64'",
    "input_type": "must be 'query' or 'passage'",
    "top_k": f"must be a whole number from 1 to {MAX_TOP_K:,}",
    "dimensions": "must be a whole number",
    "model": "must be a string",
    "truncate": "must be true or false",
}


def describe_validation(errors: list[dict[str, Any]]) -> dict[str, dict[str, str | None]]:
    """What pydantic found wrong with a body, as one error that names the first wrong field."""
    first = errors[0]
    place = [part for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid" or not place or not isinstance(place[0], str):
        return error_body("the body must be a JSON object")
    param = place[0]
    if first["type"] == "missing":
        return error_body(
            f"'{param}' is required: it {_EXPECTED[param]}", param=param, code="missing_required_parameter"
        )
    return error_body(f"'{param}' {_EXPECTED.get(param, 'cannot be used')}", param=param, code="invalid_value")


def to_base64(vector: NDArray[np.float32]) -> str:
    """The bytes of little-endian float32, as OpenAI's clients decode them."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
