"""Choose the 100 queries with which the recall of an index is measured.

They are queries of the corpus. If it has fewer than 100, the rest are pieces of up to eight words of its passages.
Vectors of the index itself would measure a recall that is too high: a graph finds the vectors best that it was built
from.
"""

import logging
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from readapt_ray.artifacts import Artifact
from readapt_ray.catalog.models import open_model
from readapt_ray.cluster import connection
from readapt_ray.cluster.query_vectors import encode_queries
from readapt_ray.errors import FingerprintMismatchError, ReadaptError
from readapt_ray.made_of import open_input
from readapt_ray.retrieval.footers import read_footers, row_counts
from readapt_ray.retrieval.parquet_rows import ParquetRows
from readapt_ray.retrieval.query_encoder import QueryEncoder, query_encoder
from readapt_ray.seeds import random_generator

logger = logging.getLogger("readapt_ray")

NUM_QUERIES = 100
_MAX_FILES = 4
_MAX_WORDS = 8
_CHARACTERS_A_WORD = 6
"""Length of a piece per word, for texts without spaces between words."""


def recall_queries(vectors: Artifact) -> NDArray[np.float32] | None:
    """Encode the recall queries; return float32 [100, D], or None if that is not possible.

    The reason is logged as a warning: the corpus or the model is no longer there or is another one, or encoding failed.

    Args:
        vectors: the output of the embed stage. Its manifest names the corpus and the retriever.
    """
    from ray.exceptions import RayError

    try:
        encoder = query_encoder_of(vectors)
        texts = recall_texts(corpus_of(vectors))
        pieces = encode_queries(texts, encoder.model, encoder.encoding, encoder.description)
    except (ReadaptError, RayError, KeyError) as error:
        logger.warning(
            "index: recall is measured with vectors of the index itself, and may be lower for queries: there is no query to "
            "measure with (%s)",
            connection.cause_of(error),
        )
        return None
    import ray

    return np.concatenate(ray.get(pieces))


def corpus_of(vectors: Artifact) -> Artifact:
    """Open the corpus that vectors were made from, at the path in their manifest or relative to the vectors.

    Raises:
        ArtifactMissingError: the corpus is no longer there.
        FingerprintMismatchError: another corpus is there.
    """
    corpus = open_input(vectors, "corpus", "ingest")
    if corpus.fingerprint != vectors.manifest.inputs["corpus"]:
        raise FingerprintMismatchError(
            f"{corpus.uri!r} is not the corpus that {vectors.uri!r} was made of; embed it again"
        )
    return corpus


def query_encoder_of(vectors: Artifact) -> QueryEncoder:
    """Open the retriever that vectors were made with, to encode queries.

    Raises:
        ReadaptError: the retriever is no longer there, or another one is there.
    """
    made_with = vectors.manifest.config  # the options of embed: a retriever, or a domain
    model = open_model(made_with.get("domain") or made_with["retriever"], base=made_with.get("base"))
    return query_encoder(model, vectors)


def recall_texts(corpus: Artifact) -> list[str]:
    """Return the texts of 100 queries, always the same for the same corpus.

    They are random queries of the corpus; if it has fewer than 100, pieces of one to eight words of its passages
    follow.
    """
    from readapt_ray.sources.judgements import read_queries

    random = random_generator(0, "recall queries")
    own = [each.text for each in read_queries(corpus.uri)] if (corpus.location / "queries").is_folder() else []
    chosen = random.choice(len(own), min(NUM_QUERIES, len(own)), replace=False)
    texts = [own[place] for place in sorted(chosen.tolist())]
    passages = _some_passages(corpus, NUM_QUERIES - len(texts), random)
    return texts + [_piece(each, random) for each in passages]


def _some_passages(corpus: Artifact, number: int, random: np.random.Generator) -> Sequence[str]:
    """Return the texts of random passages from at most four files, since a corpus may have thousands of files."""
    folder = corpus.location / "passages"
    names = [name for name, _ in folder.listing(".parquet")]
    names = [names[place] for place in random.permutation(len(names))[:_MAX_FILES]]
    rows = ParquetRows(folder, row_counts(dict(zip(names, read_footers(folder, names), strict=True))))
    table = rows.take(np.sort(random.integers(0, rows.num_rows, number)), ("title", "text"))
    return [text or title for title, text in zip(*(each.to_pylist() for each in table.columns), strict=True)]


def _piece(text: str, random: np.random.Generator) -> str:
    """Return one to eight consecutive words of a text; without spaces, about as many characters."""
    length = int(random.integers(1, _MAX_WORDS + 1))
    words = text.split()
    if len(text) > 2 * _CHARACTERS_A_WORD * len(words):
        start = int(random.integers(0, max(1, len(text) - length * _CHARACTERS_A_WORD)))
        return text[start : start + length * _CHARACTERS_A_WORD].strip() or text
    start = int(random.integers(0, max(1, len(words) - length + 1)))
    return " ".join(words[start : start + length])
