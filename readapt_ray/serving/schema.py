"""Define the bodies of HTTP requests and answers: OpenAI's embeddings, models and errors, and our own search."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, field_validator, model_validator

from readapt_ray.serving.doc_filter import MAX_COLUMNS, MAX_DOC_IDS, MAX_VALUES, FilterFields

MAX_INPUTS = 2048
"""Maximum number of texts per request, as in OpenAI's API."""
MAX_TOKEN_IDS = 1 << 17
"""Maximum number of token ids per text; no supported model reads more."""
MAX_DIMENSION = 1 << 16
"""Maximum number of dimensions of a vector."""
MAX_TOP_K = 1000
MAX_HITS = 50_000
"""Maximum number of passages per request, over all of its queries."""
NOT_AN_OBJECT = "the body must be a JSON object, sent as application/json"
DEFAULT_MODEL = "default"
"""Model name that always means the default version."""
SHOWN_OF_ENCODING = ("max_query_tokens", "max_passage_tokens", "query_template", "passage_template")

Text = Annotated[str, StringConstraints(strict=True)]
TokenId = Annotated[int, Field(strict=True, ge=0, lt=1 << 31)]
# Without fail_fast, pydantic makes one error per wrong element: a body with a million of them takes half a minute.
TokenIds = Annotated[list[TokenId], Field(fail_fast=True, min_length=1, max_length=MAX_TOKEN_IDS)]
Number = Annotated[float, Field(allow_inf_nan=False, strict=True)]
Vector = Annotated[list[Number], Field(fail_fast=True, min_length=1, max_length=MAX_DIMENSION)]
Texts = Text | Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=MAX_INPUTS)]
Inputs = Texts | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1, max_length=MAX_INPUTS)]
Vectors = Vector | Annotated[list[Vector], Field(fail_fast=True, min_length=1, max_length=MAX_INPUTS)]
Kind = Literal["query", "passage", "raw"]
"""Which of the model's templates is applied to a text; `raw` for none."""
InputType = Literal["query", "passage", "raw", "search_query", "search_document", "document"]
KIND_OF_INPUT_TYPE: dict[InputType, Kind] = {
    "query": "query",
    "search_query": "query",
    "passage": "passage",
    "search_document": "passage",
    "document": "passage",
    "raw": "raw",
}
Mode = Literal["dense", "bm25", "hybrid"]
"""Search by vectors, by words, or by both."""
Switch = Annotated[bool, Field(strict=True)]
_whole = BeforeValidator(lambda each: int(each) if isinstance(each, float) and each.is_integer() else each)
Whole = Annotated[int, Field(ge=1, strict=True), _whole]
"""Integer of 1 or more. 10.0 is accepted too, since JSON has only one type of number."""


class _Request(BaseModel):
    # Clients send options that this server does not have; it ignores them, as OpenAI's server does.
    model_config = ConfigDict(extra="ignore", use_attribute_docstrings=True)

    model: Text | None = None
    """Name of the version that answers, from `GET /v1/models`; `default`, or nothing, means the default version.
    `NAME-passage` applies the template of passages to the texts, and `NAME-raw` none."""
    timeout_s: float | None = Field(default=None, gt=0, allow_inf_nan=False, strict=True)
    """Seconds after which the request is given up with 504. The server's own limit applies too. Not in OpenAI's API."""


class EmbeddingsRequest(_Request):
    """The body of `POST /v1/embeddings`."""

    input: Inputs
    """A text, a list of up to 2,048 texts, or token ids of the model's own tokenizer in place of each text (they are
    decoded). Token ids need `fingerprint`, or a server that was started with --accept-token-ids."""
    fingerprint: Text | None = None
    """The `encoder_fingerprint` of the model whose tokenizer made the token ids. Not in OpenAI's API."""
    encoding_format: Literal["float", "base64"] | None = None
    """`float`, the default, returns numbers; `base64` returns the bytes of little-endian float32 in base64."""
    knowledge_scale: Number | None = None
    """Scale of the domain's knowledge, in the range of the server's --knowledge-scale; 0 gives the retriever's own
    vectors. If omitted, the scale that the domain is served with. Not in OpenAI's API."""
    dimensions: Whole | None = None
    """Number of dimensions to keep, from the first one. If the model normalizes its vectors, the shorter ones are
    normalized again. Use it with models that were trained for it: `matryoshka` in `GET /v1/models`."""
    input_type: InputType | None = None
    """Which of the model's templates is applied to the texts; `raw` for none. If omitted, `query`, unless the name in
    `model` ends in -passage or -raw. Not in OpenAI's API."""
    truncate: Switch | None = None
    """Cut texts that are too long; false refuses them. If omitted, the server's --truncate decides. Not in OpenAI's
    API."""


class SearchRequest(FilterFields, _Request):
    """The body of `POST /v1/search`: `query`, or `vector` with `fingerprint`. Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    query: Texts | None = None
    """A query, or a list of up to 2,048 queries."""
    vector: Vectors | None = None
    """A query's vector, or a list of them, instead of texts."""
    fingerprint: Text | None = None
    """The `encoder_fingerprint` of the model that made the vectors. Only an index with the same one is searched."""
    mode: Mode = "dense"
    """Search by vectors (`dense`), words (`bm25`), or both (`hybrid`). `modes` in `GET /v1/models` lists what the index
    supports."""
    top_k: Whole = Field(default=10, le=MAX_TOP_K)
    """Number of passages per query; fewer are returned if fewer are found. All queries together may ask for 50,000."""
    with_text: Switch = True
    """Return title and text of each passage, if the server has the corpus."""
    truncate: Switch = True
    """Cut a query that is too long, as `readapt search` does; false refuses it."""
    knowledge_scale: Number | None = None
    """Scale of the domain's knowledge. Queries and passages must have the same one, so the server must have an index
    at this scale."""
    user: Text | None = None
    """Name of the user. If searches that name no `model` are split among versions, the same user always gets the same
    version."""

    @field_validator("mode", "top_k", "with_text", "truncate", mode="before")
    @classmethod
    def _null_is_the_default(cls, value: Any, info: Any) -> Any:
        return cls.model_fields[info.field_name].default if value is None else value

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        if (self.query is None) == (self.vector is None):
            raise ValueError("give either 'query' or 'vector'")
        if self.query is None and self.mode != "dense":
            raise ValueError(f"'mode' {self.mode!r} searches for words, so it needs 'query'")
        if self.vector is not None and self.fingerprint is None:
            raise ValueError("a 'vector' needs the 'fingerprint' of what made it, as /v1/models has it")
        if self.query is None and self.knowledge_scale is not None:
            raise ValueError("'knowledge_scale' needs 'query'; the 'fingerprint' of a 'vector' says its scale")
        return self

    @model_validator(mode="after")
    def _answer_is_bounded(self) -> Self:
        given = self.query if self.vector is None else self.vector
        num_queries = len(given) if isinstance(given, list) and not isinstance(given[0], float) else 1
        if num_queries * self.top_k > MAX_HITS:
            asked = f"{num_queries:,} queries with 'top_k' {self.top_k:,} ask for {num_queries * self.top_k:,} passages"
            advice = "send fewer queries at a time, or a lower 'top_k'"
            raise ValueError(f"{asked}; a request may ask for {MAX_HITS:,}: {advice}")
        return self


class Usage(BaseModel):
    """Number of tokens in the texts, template and special tokens included."""

    prompt_tokens: int
    total_tokens: int


class Embedding(BaseModel):
    """The vector of the text at position `index`, from 0."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingsResponse(BaseModel):
    """The vectors, in the order of the texts."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage
    fingerprint: str
    """Fingerprint of the encoder that made the vectors."""


class Hit(BaseModel):
    """A passage that was found. Title, text and columns need a corpus; `columns` are the ones that ingest kept."""

    rank: int
    doc_id: str
    score: float
    title: str | None = None
    text: str | None = None
    columns: dict[str, Any] | None = None
    passage_id: str | None = None
    """Id of the best passage of the document, if ingest split documents. Title and text are this passage's."""


class SearchResult(BaseModel):
    """Results for the query at position `index`, from 0; best first."""

    object: Literal["search_result"] = "search_result"
    index: int
    hits: list[Hit]


class SearchResponse(BaseModel):
    """The results, in the order of the queries."""

    object: Literal["list"] = "list"
    data: list[SearchResult]
    model: str
    usage: Usage
    fingerprint: str
    """Fingerprint of the version: encoder, index and corpus."""
    partial: bool = False
    """Whether a part of the index did not answer, so that passages may be missing."""
    missing: list[str] = Field(default_factory=list)
    """The parts that did not answer."""


class ServedModel(BaseModel):
    """A served version for one kind of text, in the form of OpenAI's API."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "readapt_ray"
    default: bool
    """Whether it answers requests that name no model."""
    version: str
    """Name of the version."""
    input_type: Kind
    """Which template is applied to the texts, unless the request says otherwise."""
    dimension: int
    matryoshka: bool
    """Whether the model was trained for fewer `dimensions`, as its own config says."""
    fingerprint: str
    """Fingerprint of encoder, index and corpus together."""
    encoder_fingerprint: str
    """Fingerprint of the encoder of queries. Only vectors with the same one can be compared."""
    passages_by: str
    """Name of the model that encoded the passages, if this version encodes only queries; else empty."""
    knowledge_scales: list[float]
    """Scale of each knowledge adapter of a domain; empty if this is no domain."""
    num_vectors: int
    """Number of vectors in its index; 0 without one."""
    columns: dict[str, str]
    """Columns that searches can be filtered by, with their types."""
    modes: list[Mode]
    """Search modes that it supports; empty without an index."""
    max_query_tokens: int
    max_passage_tokens: int
    query_template: str
    passage_template: str


class ModelList(BaseModel):
    """The answer of `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ServedModel]


class TokenizeRequest(_Request):
    """The body of `POST /tokenize`, as in vLLM."""

    prompt: Text
    """The text to tokenize."""
    input_type: InputType | None = None
    """As for `/v1/embeddings`."""


class TokenizeResponse(BaseModel):
    """The token ids of a whole text, template and special tokens included; nothing is cut."""

    count: int
    max_model_len: int
    """Maximum length of a text of this kind, in tokens."""
    tokens: list[int]


class ServerInfo(BaseModel):
    """The answer of `GET /info`: default version and limits, with the field names of text-embeddings-inference."""

    version: str
    """Version of readapt_ray."""
    model_id: str
    model_sha: str
    """The `encoder_fingerprint`."""
    max_input_length: int
    """Maximum length of a text, in tokens."""
    max_client_batch_size: int
    """Maximum number of texts per request."""
    max_concurrent_requests: int
    """Maximum number of requests in progress per gateway."""
    auto_truncate: bool
    """Whether a text that is too long is cut unless the request says otherwise."""


class Health(BaseModel):
    """The answer of `GET /healthz`: this process answers."""

    status: Literal["ok"] = "ok"


class ErrorBody(BaseModel):
    """An error in OpenAI's form."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """The body of every answer with a status of 400 or more."""

    error: ErrorBody


class RequestError(Exception):
    """A request that cannot be answered: an HTTP status, and an error in OpenAI's form (see `error_body`)."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s
        self.body = error_body(message, status=status, param=param, code=code)

    @property
    def headers(self) -> dict[str, str]:
        """Return the extra headers of the answer: Retry-After, and with 401 the kind of authentication."""
        headers = {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}
        return headers | {"www-authenticate": "Bearer"} if self.status == 401 else headers


def invalid(message: str, param: str) -> RequestError:
    """Return the error for a field whose value cannot be used (status 400, code `invalid_value`); `param` names it."""
    return RequestError(message, param=param, code="invalid_value")


_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def error_body(
    message: str, *, status: int = 400, param: str | None = None, code: str | None = None
) -> dict[str, dict[str, str | None]]:
    """Return the JSON body of an error in the form that OpenAI's clients read; its type follows from the status.

    Args:
        message: text for the user.
        status: HTTP status.
        param: name of the request's field that is wrong; None if it is no field.
        code: short name of the error for programs, such as "invalid_value".
    """
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


_LISTED = f"a string, or a list of 1 to {MAX_INPUTS:,} strings"
_EXPECTED = {
    "input": f"must be {_LISTED}, or up to {MAX_TOKEN_IDS:,} token ids in place of a string",
    "query": f"must be {_LISTED}",
    "vector": f"must be a list of up to {MAX_DIMENSION:,} finite numbers, or 1 to {MAX_INPUTS:,} such lists",
    "fingerprint": "must be a string",
    "encoding_format": "must be 'float' or 'base64'",
    "input_type": "must be 'query' (or 'search_query'), 'passage' (or 'search_document', 'document') or 'raw'",
    "mode": "must be 'dense', 'bm25' or 'hybrid'",
    "top_k": f"must be a whole number from 1 to {MAX_TOP_K:,}",
    "knowledge_scale": "must be a finite number",
    "dimensions": "must be a whole number from 1 to the model's own",
    "doc_ids": f"must be a list of 1 to {MAX_DOC_IDS:,} strings",
    "doc_id_prefix": "must be a string",
    "filter": f"must be an object of up to {MAX_COLUMNS} columns, each with a value, up to {MAX_VALUES:,} values, or bounds ('gte', 'lt' ...)",
    "model": "must be a string",
    "user": "must be a string",
    "truncate": "must be true or false",
    "with_text": "must be true or false",
    "timeout_s": "must be a number over 0",
    "texts": f"must be a list of 1 to {MAX_INPUTS:,} strings",
    "embedding_types": "must be a list of 'float' or 'base64'",
    "output_dimension": "must be a whole number from 1 to the model's own",
    "prompt": "must be a string",
}


def describe_validation(first: Mapping[str, Any]) -> dict[str, dict[str, str | None]]:
    """Return the body of an error in OpenAI's form, with the name of the wrong field.

    Args:
        first: first item of `errors()` of pydantic's exception.
    """
    place = [part for part in first["loc"] if part != "body"]
    if first["type"] == "value_error" and place[:1] != ["filter"]:
        return error_body(first["msg"].removeprefix("Value error, "), code="invalid_value")
    if first["type"] == "json_invalid" or not place or not isinstance(place[0], str):
        return error_body(NOT_AN_OBJECT)
    param = place[0]
    if first["type"] == "extra_forbidden":
        said = f"{param[:100]!r} is no field of a search; it takes {', '.join(SearchRequest.model_fields)}"
        return error_body(said, param=param[:100], code="unknown_field")
    if first["type"] == "missing":
        said = f"'{param}' is required: it {_EXPECTED[param]}"
        return error_body(said, param=param, code="missing_required_parameter")
    expected = _EXPECTED.get(param, "cannot be used")
    if first["type"] == "literal_error" and param == "truncate":  # Cohere's field, which is no boolean
        expected = f"must be {first['ctx']['expected']}"
    return error_body(f"'{param}' {expected}", param=param, code="invalid_value")
