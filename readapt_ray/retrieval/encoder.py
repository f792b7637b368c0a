"""Encode texts to vectors on one device, without Ray.

`tokenization.py` fills templates and makes tokens. Identical texts are encoded once. Texts are sorted by length and
batched under a budget of tokens. A batch is packed without padding if the model's attention allows it
(`nn/attention.py`), else padded on the right. The vectors come back in the order of the texts.
all-MiniLM-L6-v2 on one CPU core with AMX, passages of 89 tokens: 50 per second in float32, 115 in bfloat16.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch

from readapt_ray import hardware
from readapt_ray.catalog.encoding import Encoding
from readapt_ray.catalog.models import OpenModel
from readapt_ray.catalog.shapes import measure_shape
from readapt_ray.errors import InputError, ModelError
from readapt_ray.nn import attention
from readapt_ray.retrieval.encoder_fingerprint import encoder_fingerprint
from readapt_ray.retrieval.encoder_sizes import CPU_BATCH_TOKENS, free_for_batches, gpu_batch_tokens
from readapt_ray.retrieval.forward_pass import ForwardPass
from readapt_ray.retrieval.pooling import normalized
from readapt_ray.retrieval.tokenization import Kind, TextTokenizer
from readapt_ray.retrieval.vector_files import is_usable
from readapt_ray.weights.dense import DenseHead, load_dense
from readapt_ray.weights.domain_layers import DomainUse
from readapt_ray.weights.domain_network import DomainNetwork
from readapt_ray.weights.loading import in_float32, is_out_of_memory, load_model

logger = logging.getLogger("readapt_ray")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

Tokens = Sequence[int] | np.ndarray
"""Token ids of one text."""


@dataclass(frozen=True)
class EncodedTokens:
    """Counts of what an encoder has computed so far."""

    num_tokens: int = 0
    num_positions: int = 0
    """Positions that were computed: tokens and padding."""
    num_again: int = 0
    """Texts that were encoded again in float32, since their vector was NaN, infinite or zero."""


class Encoder:
    """A loaded retriever that encodes texts.

    Args:
        network: headless transformers model in eval mode, on its device.
        tokenizer: its tokenizer.
        encoding: its prompts, special tokens, pooling and maximum lengths.
        identify: returns the fingerprint. It is called once, when the fingerprint is first read, since hashing
            the weights of a large model takes a while.
        batch_tokens: most tokens per batch, padding included; a longer text is a batch alone. By default 1,024 on a
            CPU; on a GPU it follows from the model's size and the free memory, see `gpu_batch_tokens`.
        packed: pack texts instead of padding them, if the model gives the same vectors so.
        gpu_share: part of the GPU's memory that this encoder may use, if several share a GPU; 1.0 is all of it.
        reserved_bytes: device memory to keep free for what is loaded later, such as adapters of domains.
        dense: linear layers that are applied to pooled vectors, on the same device.
        domains: holds `network` and the adapters of several domains; None if all texts are for one retriever.

    Raises:
        ModelError: the encoding asks for more tokens than the model has positions, or for more dimensions.
        InputError: `batch_tokens` is under 1, or a template of the encoding cannot be used.
    """

    def __init__(
        self,
        network: Any,
        tokenizer: Any,
        encoding: Encoding,
        *,
        identify: Callable[[], str],
        batch_tokens: int | None = None,
        packed: bool = False,
        gpu_share: float = 1.0,
        reserved_bytes: int = 0,
        dense: DenseHead | None = None,
        domains: DomainNetwork | None = None,
    ) -> None:
        self.network = network
        self._domains = domains
        self.encoding = encoding
        self.device = next(network.parameters()).device
        if batch_tokens is not None and batch_tokens < 1:
            raise InputError(f"batch_tokens = {batch_tokens}; it must be at least 1")
        self._identify = identify
        self._tokenizer = TextTokenizer(tokenizer, encoding)
        self._forward_pass = ForwardPass(network, encoding.pooling)
        self._dense = dense
        self._width = int(network.config.hidden_size) if dense is None else dense.width
        self._check_sizes(network.config)
        self.is_packed = packed and self._forward_pass.pack()
        """Whether texts are packed, without padding."""
        self.work = EncodedTokens()
        self.batch_tokens = batch_tokens or self._suitable_tokens(gpu_share, reserved_bytes)
        self.first_batch_tokens = self.batch_tokens
        """Tokens per batch before an out-of-memory error halved them."""

    @classmethod
    def load(
        cls,
        model: OpenModel,
        *,
        encoding: Encoding | None = None,
        dtype: str = "float32",
        device: str | None = None,
        batch_tokens: int | None = None,
        packed: bool | None = None,
        gpu_share: float = 1.0,
    ) -> Self:
        """Load a retriever from its folder.

        Args:
            model: full weights, or an adapter, which is applied to its base.
            encoding: prompts, pooling and lengths; by default what its folder or the catalog says.
            dtype: float32, float16 or bfloat16, of weights and computation.
            device: a torch device; by default cuda if the machine has a GPU, else cpu.
            batch_tokens: most tokens per batch; by default what suits the device and the model.
            packed: pack texts instead of padding them; by default if the device has a kernel for it.
            gpu_share: part of the GPU's memory that this encoder may use, if several share a GPU.

        Raises:
            ModelError: the model cannot be loaded, or does not fit the encoding.
            InputError: the dtype is unknown, or this machine does not have the device.
        """
        if dtype not in DTYPES:
            raise InputError(f"dtype = {dtype!r}; it must be one of {', '.join(DTYPES)}")
        encoding = encoding or model.encoding
        device = _checked_device(device or _device())
        return cls(
            load_model(model, dtype=DTYPES[dtype], device=device),
            model.tokenizer,
            encoding,
            identify=functools.partial(encoder_fingerprint, model, encoding, dtype),
            batch_tokens=batch_tokens,
            packed=attention.has_kernel(torch.device(device), DTYPES[dtype]) if packed is None else packed,
            gpu_share=gpu_share,
            dense=load_dense(model, device=device),
        )

    @property
    def dimension(self) -> int:
        """Return the numbers in a vector: `dimensions` of the encoding if set, else all that the model gives."""
        return self.encoding.dimensions or self._width

    @functools.cached_property
    def fingerprint(self) -> str:
        """Return a hash of everything that decides a vector; see `encoder_fingerprint`."""
        return self._identify()

    def encode(self, texts: Sequence[str], kind: Kind, titles: Sequence[str] | None = None) -> np.ndarray:
        """Encode texts to vectors.

        Args:
            texts: N texts.
            kind: query or passage; decides template and maximum length.
            titles: N titles of passages; an empty title adds nothing. None for queries.

        Returns:
            float32 [N, D], in the order of the texts, of length 1 if the encoding normalizes.

        Raises:
            InputError: a text is not a string or gives no token, or queries have titles.
        """
        return self.encode_ids(self.tokenize(texts, kind, titles))

    def tokenize(self, texts: Sequence[str], kind: Kind, titles: Sequence[str] | None = None) -> list[list[int]]:
        """Return the token ids of each text that `encode` would feed to the model, special tokens included.

        Arguments are as in `encode`. A text without any token gives an empty list, which `encode_ids` refuses.

        Raises:
            InputError: a text is not a string, or queries have titles.
        """
        return self._tokenizer.ids(texts, kind, titles)

    def tokenize_with_losses(
        self, texts: Sequence[str], kind: Kind, titles: Sequence[str] | None = None
    ) -> tuple[list[list[int]], list[int]]:
        """Tokenise like `tokenize`; also return how many tokens truncation cut from each text (0 for none)."""
        return self._tokenizer.ids_and_losses(texts, kind, titles)

    def encode_ids(self, rows: Sequence[Tokens], domains: Sequence[DomainUse | None] | None = None) -> np.ndarray:
        """Encode rows of token ids, as `tokenize` returns them, to vectors.

        Equal rows of the same domain are encoded once. If a batch does not fit the memory, the tokens per batch are
        halved, for later calls too.

        Args:
            rows: the token ids of N texts.
            domains: the domain of each text, if the encoder has domains; None encodes with the retriever itself.

        Returns:
            float32 [N, D], in the order of the rows, of length 1 if the encoding normalizes.

        Raises:
            InputError: a row is empty.
            ModelError: a single text does not fit the memory, or has a token id that the model does not know.
        """
        arrays = [np.asarray(row, np.int64) for row in rows]
        first_seen: dict[tuple[bytes, DomainUse | None], int] = {}
        asked = zip((row.tobytes() for row in arrays), domains or [None] * len(rows), strict=True)
        place = np.fromiter((first_seen.setdefault(each, len(first_seen)) for each in asked), np.int64, len(rows))
        distinct = [arrays[index] for index in np.unique(place, return_index=True)[1]]
        uses = [use for _, use in first_seen]
        if (index := next((index for index, row in enumerate(arrays) if not len(row)), None)) is not None:
            raise InputError(f"texts[{index}] gives no token, so it has no vector; leave it out")
        vectors = np.empty((len(distinct), self.dimension), dtype=np.float32)
        pending = token_batches([len(row) for row in distinct], self.batch_tokens)[::-1]
        started: list[tuple[np.ndarray, torch.Tensor]] = []
        while pending:
            batch = pending.pop()
            texts = [distinct[index] for index in batch]
            try:
                started.append((batch, self._forward(texts, [uses[index] for index in batch])))
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                self._halve_budget(texts)
                rest = np.concatenate([batch, *pending[::-1]])
                cut = token_batches([len(distinct[index]) for index in rest], self.batch_tokens)
                pending = [rest[each] for each in cut][::-1]
            # A GPU computes one batch while the next is built, so fetch a batch only after the next was started.
            while len(started) > bool(pending):
                done, found = started.pop(0)
                vectors[done] = found.cpu().numpy()
        return vectors[place]

    def encode_usable(self, rows: Sequence[Tokens]) -> np.ndarray:
        """Encode like `encode_ids`, and encode a text again in float32 if its vector is NaN, infinite or zero.

        Returns:
            float32 [N, D]. A vector that is unusable in float32 too, or of a model that is already float32 or cannot be
            converted, is returned as it is; `is_usable` finds it.
        """
        vectors = self.encode_ids(rows)
        unusable = np.flatnonzero(~is_usable(vectors))
        if not len(unusable) or next(self.network.parameters()).dtype == torch.float32:
            return vectors
        again = [rows[index] for index in unusable.tolist()]
        with in_float32(self.network) as is_possible:
            if not is_possible:
                return vectors
            vectors[unusable] = self.encode_ids(again)
        self.work = replace(self.work, num_again=self.work.num_again + len(again))
        logger.info("encoded again in float32, since their vectors were NaN, infinite or zero: %d texts", len(again))
        return vectors

    def _halve_budget(self, texts: Sequence[Tokens]) -> None:
        if len(texts) == 1:
            raise ModelError(
                f"a text of {len(texts[0])} tokens does not fit the memory of {self.device}; lower the maximum length in "
                f"the encoding, or use a device with more memory"
            )
        tried = len(texts) * max(map(len, texts))
        self.batch_tokens = max(1, min(self.batch_tokens, tried) // 2)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        logger.warning("out of memory with %d tokens in a batch; continuing with %d", tried, self.batch_tokens)

    @torch.inference_mode()
    def _forward(self, rows: Sequence[Tokens], uses: Sequence[DomainUse | None]) -> torch.Tensor:
        """Encode one batch to float32 [B, D] on the device. This does not wait for a GPU to finish."""
        if self._domains is None:
            vectors = self._forward_pass.pooled(rows)
        else:
            vectors = self._domains.pooled(self._forward_pass.pooled, rows, uses, is_packed=self.is_packed)
        if self._dense is not None:
            vectors = self._dense(vectors)
        vectors = vectors[:, : self.dimension]
        if self.encoding.normalize:
            vectors = normalized(vectors)
        width = 0 if self.is_packed else max(map(len, rows))
        num_tokens = sum(map(len, rows))
        self.work = replace(
            self.work,
            num_tokens=self.work.num_tokens + num_tokens,
            num_positions=self.work.num_positions + (width * len(rows) or num_tokens),
        )
        return vectors

    def _suitable_tokens(self, gpu_share: float, reserved_bytes: int) -> int:
        """Return the default tokens per batch: a constant on CPUs; on GPUs, by the model and the free memory."""
        if self.device.type != "cuda":
            return CPU_BATCH_TOKENS
        weights = list(self.network.parameters())
        held = sum(each.nbytes for each in weights) + reserved_bytes
        free, total = torch.cuda.mem_get_info(self.device)
        planned = free_for_batches(hardware.GPU_USABLE_SHARE * total * gpu_share, held)
        return gpu_batch_tokens(
            measure_shape(self.network, "the encoder"),
            min(planned, free - reserved_bytes),
            width=weights[0].itemsize,
            is_packed=self.is_packed,
        )

    def _check_sizes(self, config: Any) -> None:
        positions = getattr(config, "max_position_embeddings", None)
        wanted = max(self.encoding.max_query_tokens, self.encoding.max_passage_tokens)
        first = self._forward_pass.first_position
        if positions is not None and wanted > positions - first:
            raise ModelError(
                f"the encoding allows {wanted} tokens, but the model has {positions - first} positions; "
                f"lower max_query_tokens and max_passage_tokens"
            )
        if self.dimension > self._width:
            raise ModelError(
                f"dimensions = {self.dimension}, but the model's vectors have {self._width} numbers; give at most that"
            )


def suitable_dtype(device: str | None = None) -> str:
    """Return the name of the dtype, a key of DTYPES, that is fast on a device and precise enough.

    bfloat16 on GPUs that have it (float16 on older ones) and on CPUs with AMX or AVX512_BF16; float32 on
    other CPUs.

    Args:
        device: cpu or cuda; by default cuda if the machine has a GPU.
    """
    if (device or _device()).startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    return "bfloat16" if hardware.has_bfloat16_units() else "float32"


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _checked_device(device: str) -> str:
    """Return a device that torch can use.

    Raises:
        InputError: torch does not know it, or this machine does not have it.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        there = ["cpu", *(f"cuda:{each}" for each in range(torch.cuda.device_count()))]
        raise InputError(f"device = {device!r} is not on this machine; it must be one of {', '.join(there)}") from None
    return device


def token_batches(lengths: Sequence[int], batch_tokens: int) -> list[np.ndarray]:
    """Group texts into batches of similar length, longest first, so that memory peaks in the first batch.

    A batch holds at most `batch_tokens` tokens with its padding, or a single text. The batches hold indices of texts.

    With 12 tokens per batch, lengths 5 2 6 1 give a batch of 6 and 5 (2 * 6 = 12 with padding), then one of 2 and 1.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    batches = []
    start = 0
    while start < len(order):
        size = max(1, batch_tokens // max(1, lengths[order[start]]))
        batches.append(order[start : start + size])
        start += size
    return batches
