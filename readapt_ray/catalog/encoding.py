"""Define how a retriever turns text into a vector: templates, special tokens, limits, pooling.

In: options, or a JSON file with them. Out: an `Encoding`. Vectors of different encodings cannot be compared, so
artifacts store it, and it is part of the fingerprint of every encoder.
"""

import json
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from readapt_ray.config import Config
from readapt_ray.errors import InputError
from readapt_ray.storage import Location

Pooling = Literal["last", "mean", "cls"]


class Encoding(Config):
    """The settings by which a retriever turns text into a vector."""

    query_template: str = "{text}"
    """Template of a query; `{text}` and, if the model has instructions, `{task}` are filled in."""
    passage_template: str = "{title} {text}"
    """Template of a passage; `{title}` and `{text}` are filled in. An empty title leaves no second space."""
    task: str = ""
    """The instruction that replaces `{task}`."""
    pooling: Pooling
    """Which hidden states become the vector: the last token's, the first token's (cls), or their mean."""
    normalize: bool = True
    """Whether vectors have length 1, so that the inner product is the cosine."""
    add_bos: bool
    """Whether the ids begin with the tokenizer's BOS (CLS for encoders)."""
    add_eos: bool
    """Whether the ids end with the tokenizer's EOS (SEP for encoders)."""
    max_query_tokens: int = 512
    """Longest query in tokens, special tokens included; a longer one is cut before the EOS."""
    max_passage_tokens: int = 512
    """Longest passage in tokens, special tokens included; a longer one is cut before the EOS."""
    lower_case: bool = False
    """Whether text is lower-cased before it is tokenised (a sentence-transformers setting)."""
    dimensions: int | None = Field(default=None, ge=1)
    """Number of leading dimensions to keep before normalising; by default all."""


def read_encoding(uri: str) -> Encoding:
    """Read an encoding from a JSON file: the options themselves, or an object with them under `encoding`.

    Raises:
        InputError: there is no such file, it is not JSON, or an option in it is wrong.
    """
    location = Location(uri)
    if not location.is_file():
        raise InputError(
            f"no file {uri!r}; give a JSON file with pooling, templates and special tokens, as `readapt encoding` shows it"
        )
    try:
        values = json.loads(location.read_text())
    except ValueError as error:
        raise InputError(f"{uri!r} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{uri!r} holds a {type(values).__name__}; it must be a JSON object of encoding options")
    return Encoding.parse(values.get("encoding", values), where=uri)


def _from_file(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return read_encoding(value)
    except InputError as error:
        raise ValueError(str(error)) from error  # so that pydantic lists it with the errors of other options


EncodingOption = Annotated[Encoding | None, BeforeValidator(_from_file)]
"""A field of a config: an encoding, the name of a JSON file that holds one, or None."""
