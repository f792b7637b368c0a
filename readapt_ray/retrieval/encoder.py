"""From text to vectors, on one device, without Ray.

Texts are tokenised by hand (`templates`), identical ones encoded once, sorted by length, and
batched under a budget of tokens, so that little is padded; the vectors come back in the order of
the texts. all-MiniLM-L6-v2 on two CPU cores: about 80 passages of 250 words a second.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
import torch

from readapt_ray.artifacts import fingerprint
from readapt_ray.catalog.models import Model, encoding_of, load_tokenizer
from readapt_ray.catalog.retrievers import Encoding
from readapt_ray.errors import InputError, ModelError
from readapt_ray.retrieval.pooling import normalized, pool
from readapt_ray.retrieval.templates import Kind, TextTokenizer
from readapt_ray.weights.loading import load_model

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CPU_BATCH_TOKENS = 1024
GPU_BATCH_TOKENS = 16384


class Encoder:
    """A retriever ready to encode.

    Args:
        network: headless transformers model in eval mode, on its device.
        tokenizer: its tokenizer.
        encoding: how it wants its text.
        identify: gives the fingerprint; called once, when it is first asked for, since hashing
            the weights of a large model takes a while.
        batch_tokens: tokens in a batch at most, padding included; one text may exceed it.

    Raises:
        ModelError: the encoding asks for more tokens than the model has positions.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        tokenizer: Any,
        encoding: Encoding,
        *,
        identify: Callable[[], str],
        batch_tokens: int | None = None,
    ) -> None:
        self.network = network
        self.encoding = encoding
        self.device = next(network.parameters()).device
        self.batch_tokens = batch_tokens or (GPU_BATCH_TOKENS if self.device.type == "cuda" else CPU_BATCH_TOKENS)
        if self.batch_tokens < 1:
            raise InputError(f"batch_tokens = {batch_tokens}; it must be at least 1")
        self._identify = identify
        self._tokenizer = TextTokenizer(tokenizer, encoding)
        self._config: Any = network.config
        self._first_position = _first_position(network)
        self._accepted = frozenset(inspect.signature(network.forward).parameters)
        self._num_embeddings = int(network.get_input_embeddings().num_embeddings)  # type: ignore[operator]
        self._check_positions()

    @classmethod
    def load(
        cls,
        model: Model,
        *,
        encoding: Encoding | None = None,
        dtype: str = "float32",
        device: str | None = None,
        batch_tokens: int | None = None,
    ) -> Self:
        """Load a retriever from its folder.

        Args:
            model: full weights, or an adapter that is laid on its base.
            encoding: how it wants its text; by default what its folder or the catalog says.
            dtype: float32, float16 or bfloat16, of weights and computation.
            device: a torch device; by default cuda where there is one, else cpu.
            batch_tokens: tokens in a batch at most; by default what suits the device.

        Raises:
            ModelError: the model cannot be loaded, or does not fit the encoding.
            InputError: the dtype is unknown.
        """
        if dtype not in DTYPES:
            raise InputError(f"dtype = {dtype!r}; it must be one of {', '.join(DTYPES)}")
        encoding = encoding or encoding_of(model)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(
            load_model(model, dtype=DTYPES[dtype], device=device),
            load_tokenizer(model),
            encoding,
            identify=functools.partial(encoder_fingerprint, model, encoding, dtype),
            batch_tokens=batch_tokens,
        )

    @property
    def dimension(self) -> int:
        """Numbers in a vector."""
        return int(self._config.hidden_size)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Stands for all that decides a vector; see `encoder_fingerprint`."""
        return self._identify()

    def encode(self, texts: Sequence[str], kind: Kind, titles: Sequence[str] | None = None) -> np.ndarray:
        """The vectors of texts.

        Args:
            texts: N texts.
            kind: query or passage; decides template and maximum length.
            titles: N titles of passages; empty ones leave no trace.

        Returns:
            float32 [N, D], in the order of the texts.

        Raises:
            InputError: a text is not a string, or gives no token at all.
        """
        return self.encode_ids(self.tokenize(texts, kind, titles))

    def tokenize(self, texts: Sequence[str], kind: Kind, titles: Sequence[str] | None = None) -> list[list[int]]:
        """The token ids that `encode` would feed to the model, specials included."""
        return self._tokenizer.ids(texts, kind, titles)

    def encode_ids(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """The vectors of token ids as `tokenize` gives them: float32 [N, D].

        Raises:
            InputError: a row is empty.
        """
        first_seen: dict[tuple[int, ...], int] = {}
        place = np.fromiter((first_seen.setdefault(tuple(row), len(first_seen)) for row in rows), np.int64, len(rows))
        distinct = list(first_seen)
        if () in first_seen:
            index = int(np.flatnonzero(place == first_seen[()])[0])
            raise InputError(f"texts[{index}] gives no token, so it has no vector; leave it out")
        vectors = np.empty((len(distinct), self.dimension), dtype=np.float32)
        for batch in token_batches([len(row) for row in distinct], self.batch_tokens):
            vectors[batch] = self._forward([distinct[index] for index in batch])
        return vectors[place]

    @torch.inference_mode()
    def _forward(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """One batch, padded on the right: float32 [B, D]."""
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        ids = np.zeros((len(rows), int(lengths.max())), dtype=np.int64)
        for row, tokens in zip(ids, rows, strict=True):
            row[: len(tokens)] = tokens
        self._check_ids(ids)
        positions = np.arange(ids.shape[1])
        mask = torch.from_numpy((positions < lengths[:, None]).astype(np.int64)).to(self.device)
        given = {
            "input_ids": torch.from_numpy(ids).to(self.device),
            "attention_mask": mask,
            "position_ids": torch.from_numpy(positions + self._first_position).expand(ids.shape).to(self.device),
            "use_cache": False,
        }
        hidden = self.network(**{name: value for name, value in given.items() if name in self._accepted})
        vectors = pool(hidden.last_hidden_state, mask, self.encoding.pooling)
        if self.encoding.normalize:
            vectors = normalized(vectors)
        return vectors.cpu().numpy()

    def _check_ids(self, ids: np.ndarray) -> None:
        highest = int(ids.max())
        if highest >= self._num_embeddings:
            raise ModelError(
                f"the tokenizer gives the id {highest}, but the model has {self._num_embeddings} token embeddings; "
                f"take the tokenizer that belongs to the model"
            )

    def _check_positions(self) -> None:
        positions = getattr(self._config, "max_position_embeddings", None)
        wanted = max(self.encoding.max_query_tokens, self.encoding.max_passage_tokens)
        if positions is not None and wanted > positions - self._first_position:
            raise ModelError(
                f"the encoding allows {wanted} tokens, but the model has {positions - self._first_position} positions; "
                f"lower max_query_tokens and max_passage_tokens"
            )


def encoder_fingerprint(model: Model, encoding: Encoding, dtype: str) -> str:
    """Stands for all that decides a vector: weights (those of an adapter's base too), encoding, dtype."""
    return fingerprint(
        {
            "weights": model.fingerprint(),
            "base": model.base().fingerprint() if model.is_adapter else None,
            "encoding": encoding.model_dump(mode="json"),
            "dtype": dtype,
        }
    )


def token_batches(lengths: Sequence[int], batch_tokens: int) -> list[np.ndarray]:
    """Indices in batches of like length, longest first, so that memory is at its peak at once.

    A batch holds at most `batch_tokens` tokens with its padding, or a single text.

    With a budget of 12, lengths 5 2 6 1 give [6 5], since 2 * 6 = 12, then [2 1].
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    batches = []
    start = 0
    while start < len(order):
        size = max(1, batch_tokens // max(1, lengths[order[start]]))
        batches.append(order[start : start + size])
        start += size
    return batches


def _first_position(network: torch.nn.Module) -> int:
    """The position id of the first token: 0, but after the padding's own for the RoBERTa family."""
    embeddings = getattr(network, "embeddings", None)
    padding = getattr(getattr(embeddings, "position_embeddings", None), "padding_idx", None)
    return 0 if padding is None else int(padding) + 1
