"""Encode texts and search an index in this process, without Ray.

The model and the whole index are held in memory. With a corpus, hits have titles and texts.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from readapt_ray.artifacts import Artifact, open_artifact
from readapt_ray.catalog.encoding import Encoding, read_encoding
from readapt_ray.catalog.models import open_model
from readapt_ray.errors import InputError
from readapt_ray.hardware import limit_threads
from readapt_ray.progress import amount
from readapt_ray.python.signatures import check_arguments
from readapt_ray.records import Passage, ScoredDoc
from readapt_ray.sources.splitting import parent_of

if TYPE_CHECKING:
    from readapt_ray.retrieval.exact import Hits
    from readapt_ray.serving.doc_filter import DocFilter
    from readapt_ray.serving.index_slice import IndexSlice

Kind = Literal["query", "passage"]
Dtype = Literal["float32", "float16", "bfloat16"]
Place = str | Path | Artifact
"""A model, index or corpus: its name, path or URI, or the artifact that a stage returned."""
_SHOWN = 80
"""Most characters of a text in the repr of a hit."""


class Hit(NamedTuple):
    """A passage that was found, or the best passage of a document that ingest split.

    Title and text are empty if no corpus was given, or if the corpus lacks the passage.
    """

    doc_id: str
    """Id of the passage; of its document, if ingest split documents."""
    score: float
    """Inner product of query (with a bridge, the mapped one) and passage; approximate if the index is compressed."""
    title: str
    text: str
    columns: Mapping[str, Any] | None = None
    """Values of the columns that ingest kept, by name; None without a corpus or without such columns."""
    passage_id: str | None = None
    """Id of the document's best passage; None unless ingest split documents."""

    def __repr__(self) -> str:
        """Return the fields with a shortened text, so that a notebook shows a list of hits in a few lines."""
        text = self.text if len(self.text) <= _SHOWN else f"{self.text[:_SHOWN]}..."
        shown = self._asdict() | {"score": float(f"{self.score:.4g}"), "text": text}
        return f"Hit({', '.join(f'{name}={value!r}' for name, value in shown.items() if value is not None)})"


class Encoder:
    """A retriever that turns texts into vectors.

    Args:
        retriever: a catalog name, a folder, a URI, a hub id, or the artifact of `ra.merge` or `ra.finetune`.
        encoding: prompts, special tokens, pooling and maximum length: an `Encoding`, its options as a dict, or a JSON
            file. If omitted, the encoding of the model's folder or of the catalog.
        dtype: data type of weights and computation.
        device: a torch device. If omitted, cuda if there is a GPU, else cpu.
        batch_tokens: most tokens per batch. If omitted, chosen by device and model.

    Raises:
        InputError: the model cannot be found or loaded, or its encoding is not known.
    """

    @check_arguments
    def __init__(
        self,
        retriever: Place,
        *,
        encoding: Encoding | Mapping[str, Any] | str | Path | None = None,
        dtype: Dtype = "float32",
        device: str | None = None,
        batch_tokens: int | None = None,
    ) -> None:
        from readapt_ray.retrieval import encoder

        limit_threads()
        if isinstance(encoding, Mapping):
            encoding = Encoding.parse(dict(encoding), where="encoding")
        elif isinstance(encoding, str | Path):
            encoding = read_encoding(str(encoding))
        self._encoder = encoder.Encoder.load(
            open_model(_named(retriever)), encoding=encoding, dtype=dtype, device=device, batch_tokens=batch_tokens
        )
        self._name = _named(retriever)

    @property
    def encoding(self) -> Encoding:
        """Return how the retriever takes text: templates, special tokens, pooling, maximum length."""
        return self._encoder.encoding

    @property
    def dimension(self) -> int:
        """Return the dimension of its vectors."""
        return self._encoder.dimension

    @property
    def fingerprint(self) -> str:
        """Return the hash of everything that decides a vector: model, encoding and dtype.

        The first call hashes the weights, which takes a while for a large model.
        """
        return self._encoder.fingerprint

    @check_arguments
    def encode(
        self, texts: str | Sequence[str], kind: Kind, *, titles: Sequence[str] | None = None
    ) -> NDArray[np.float32]:
        """Encode texts to vectors.

        Args:
            texts: N texts, or a single text.
            kind: "query" or "passage"; retrievers encode them differently.
            titles: N titles of passages, each added to its text by the model's template; None for no titles.

        Returns:
            float32 [N, D] in the order of the texts; [D] for a single text. Longer texts are cut. Vectors are
            normalized if the encoding says so.

        Raises:
            InputError: the kind is wrong, a text is not a string or gives no token, titles are given for queries, or
                their number differs.
        """
        if isinstance(texts, str):
            vector: NDArray[np.float32] = self._encoder.encode([texts], kind, titles)[0]
            return vector
        return self._encoder.encode(list(texts), kind, titles)

    def __repr__(self) -> str:
        """Return the name of the retriever, its dimension and its device."""
        return f"Encoder({self._name!r}): {self.dimension} dimensions, {self._encoder.device}"


class Retriever:
    """A retriever that searches an index held in memory.

    Args:
        retriever: the model that made the vectors; with a bridge, the new model that the bridge maps from.
        index: the output of `ra.index`, or its folder. All of it is read into memory.
        corpus: the output of `ra.ingest`, or its folder; needed for titles and texts of hits, and for filters.
        bridge: the output of `ra.bridge`, or its folder; needed if an older model made the vectors.
        device: a torch device. If omitted, cuda if there is a GPU, else cpu.

    Raises:
        InputError: an input cannot be found, or the index was made with another model.
    """

    @check_arguments
    def __init__(
        self,
        *,
        retriever: Place,
        index: Place,
        corpus: Place | None = None,
        bridge: Place | None = None,
        device: str | None = None,
    ) -> None:
        from readapt_ray.retrieval.bridge import Bridge
        from readapt_ray.retrieval.index_shard import merged
        from readapt_ray.retrieval.passage_store import PassageStore
        from readapt_ray.retrieval.query_encoder import query_encoder
        from readapt_ray.retrieval.vector_index import VectorIndex

        opened = VectorIndex.open(_named(index))
        self._corpus = None if corpus is None else _named(corpus)
        self._passages = None if self._corpus is None else PassageStore.open(self._corpus)
        self._bridge = None if bridge is None else Bridge.open(_named(bridge))
        for_queries = query_encoder(open_model(_named(retriever)), opened.artifact, bridge=self._bridge)
        self._encoder = Encoder(
            retriever, encoding=for_queries.encoding, dtype=for_queries.description["dtype"], device=device
        )
        self._shards = merged(opened.shards())
        self._num_vectors = opened.num_vectors
        self._is_split = bool(opened.artifact.manifest.details.get("is_split"))
        self._index = _named(index)

    @check_arguments
    def search(self, query: str, top_k: int = 10, *, filter: Mapping[str, Any] | None = None) -> list[Hit]:
        """Return the best passages for a query, best first; fewer than `top_k` if the index or the filter has fewer.

        If ingest split documents into passages, each hit is another document, with its best passage.

        Args:
            query: one query; `search_all` takes several.
            top_k: most passages (or documents) to return.
            filter: conditions on columns that ingest kept: a value, a list of allowed values, or bounds, such as
                {"lang": ["en", "de"], "year": {"gte": 2020}}. It needs a corpus.

        Raises:
            InputError: top_k is under 1, the query is not a string or gives no token, a filter is given without a
                corpus, or the corpus has no such column.
        """
        return self.search_all([query], top_k, filter=filter)[0]

    @check_arguments
    def search_all(
        self, queries: Sequence[str], top_k: int = 10, *, filter: Mapping[str, Any] | None = None
    ) -> list[list[Hit]]:
        """Return the best passages for each query, in the order of the queries; [] without queries. See `search`.

        All queries share `top_k` and `filter`.
        """
        from readapt_ray.retrieval.parents import first_of_each

        wanted = None if filter is None else self._wanted(filter)
        if not len(queries):
            return []
        vectors = self._encoder.encode(queries, "query")
        vectors = self._bridge.query_map(vectors) if self._bridge else vectors
        depth = top_k
        while True:
            hits = self._hits(vectors, depth, wanted)
            found = [hits.of_query(place, "") for place in range(len(queries))]
            if not self._is_split:
                break
            best = [[own[at] for at in first_of_each((each.doc_id for each in own), top_k)] for own in found]
            if depth >= self._num_vectors or min(map(len, best)) == top_k:
                found = best
                break
            depth = min(3 * depth, self._num_vectors)
        passages = self._passages.find({each.doc_id for scored in found for each in scored}) if self._passages else {}
        return [[_hit(each, passages.get(each.doc_id), self._is_split) for each in scored] for scored in found]

    def _wanted(self, filter: Mapping[str, Any]) -> "DocFilter | None":
        import pydantic

        from readapt_ray.serving.doc_filter import FilterFields, doc_filter

        if self._corpus is None:
            raise InputError("a filter needs the corpus, whose columns it names; give corpus to ra.Retriever")
        try:
            return doc_filter(FilterFields(filter=dict(filter)))
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"][1:])) or "all"
            raise InputError(
                f"ra.Retriever.search_all: filter = {dict(filter)!r}: {place}: {first['msg']}; write a value, a list of values or "
                f"bounds per column, such as {{'lang': ['en', 'de'], 'year': {{'gte': 2020}}}}"
            ) from None

    def _hits(self, vectors: NDArray[np.float32], top_k: int, wanted: "DocFilter | None") -> "Hits":
        from readapt_ray.retrieval.index_shard import search_shards

        if wanted is None:
            return search_shards(self._shards, vectors, top_k)
        return self._filtered.search(vectors, top_k, wanted)

    @functools.cached_property
    def _filtered(self) -> "IndexSlice":
        """The index with the columns of its passages, which are read when the first filter is used."""
        from readapt_ray.serving.index_slice import IndexSlice

        folder = open_artifact(str(self._corpus), "ingest").location / "passages"
        return IndexSlice.of(self._shards, folder.files(".parquet"), is_split=self._is_split)

    def __repr__(self) -> str:
        """Return the number of passages, the index and the encoder."""
        return f"Retriever of {amount(self._num_vectors, 'passages')} in {self._index!r} by {self._encoder!r}"


def _hit(scored: ScoredDoc, passage: Passage | None, is_split: bool) -> Hit:
    doc_id, passage_id = (parent_of(scored.doc_id), scored.doc_id) if is_split else (scored.doc_id, None)
    if passage is None:
        return Hit(doc_id, scored.score, "", "", None, passage_id)
    return Hit(doc_id, scored.score, passage.title, passage.text, passage.columns, passage_id)


def _named(place: Place) -> str:
    """Return the name, path or URI of a model, an index or a corpus as text."""
    return place.uri if isinstance(place, Artifact) else str(place)
