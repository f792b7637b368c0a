"""Write answers as JSON without pydantic, which would spend more time on millions of numbers than the encoder."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from readapt_ray.records import Passage
from readapt_ray.sources.splitting import parent_of


def to_base64(vector: NDArray[np.float32]) -> str:
    """Return the bytes of a vector as little-endian float32 in base64, which OpenAI's clients decode."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")


def embeddings_json(
    vectors: NDArray[np.float32], *, as_base64: bool, model: str, fingerprint: str, num_tokens: int
) -> bytes:
    """Write an `EmbeddingsResponse` as JSON, from vectors [N, D].

    Args:
        vectors: one per text, in the order of the texts.
        as_base64: write each vector as base64 text (`to_base64`), not as a list of numbers.
        model: name of the version.
        fingerprint: fingerprint of the encoder.
        num_tokens: number of tokens in all texts.
    """
    data = [
        {"object": "embedding", "index": index, "embedding": to_base64(vector) if as_base64 else vector}
        for index, vector in enumerate(vectors)
    ]
    return orjson.dumps(_answer(data, model, fingerprint, num_tokens), option=orjson.OPT_SERIALIZE_NUMPY)


def search_json(
    ranked: Sequence[Sequence[tuple[str, float]]],
    passages: Mapping[str, Passage],
    *,
    model: str,
    fingerprint: str,
    num_tokens: int,
    missing: Sequence[str],
    is_split: bool = False,
) -> bytes:
    """Write a `SearchResponse` as JSON.

    Args:
        ranked: id and score of each hit per query, best first. If `is_split`, these are ids of passages, and each hit
            gets the id of its document as well.
        passages: title, text and columns by id; hits without an entry have none.
        model: name of the version.
        fingerprint: fingerprint of the version.
        num_tokens: number of tokens in the queries.
        missing: parts of the index that did not answer.
        is_split: whether passages are parts of documents.
    """
    data = [
        {
            "object": "search_result",
            "index": index,
            "hits": [_hit(rank, *hit, passages.get(hit[0]), is_split) for rank, hit in enumerate(hits, start=1)],
        }
        for index, hits in enumerate(ranked)
    ]
    body = _answer(data, model, fingerprint, num_tokens)
    return orjson.dumps(body | {"partial": bool(missing), "missing": list(missing)}, default=str)


def _answer(data: list[dict[str, Any]], model: str, fingerprint: str, num_tokens: int) -> dict[str, Any]:
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage, "fingerprint": fingerprint}


def _hit(rank: int, passage_id: str, score: float, passage: Passage | None, is_split: bool) -> dict[str, Any]:
    title, text, columns = (passage.title, passage.text, passage.columns) if passage else (None, None, None)
    doc_id, of_document = (parent_of(passage_id), passage_id) if is_split else (passage_id, None)
    found = {"rank": rank, "doc_id": doc_id, "score": score, "title": title, "text": text}
    return {**found, "columns": columns, "passage_id": of_document}
