"""Encode texts of many domains with one retriever in memory, and load and evict the factors of domains.

In: token ids, each text with its domain. Out: the vectors that the merged model of that domain would give. Factors are
read when they are first needed. When they exceed the memory limit, the least recently used domains are evicted.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import torch

from readapt_ray.artifacts import fingerprint
from readapt_ray.catalog.encoding import Encoding
from readapt_ray.catalog.models import OpenModel
from readapt_ray.errors import InputError
from readapt_ray.retrieval.encoder import DTYPES, Encoder
from readapt_ray.retrieval.encoder_fingerprint import fingerprint_of
from readapt_ray.weights.adapter import Adapter
from readapt_ray.weights.bundle import open_bundle
from readapt_ray.weights.dense import load_dense
from readapt_ray.weights.domain_layers import Domain
from readapt_ray.weights.domain_network import DomainNetwork
from readapt_ray.weights.domain_sources import DomainSource
from readapt_ray.weights.weight_files import Checkpoint


class DomainEncoder:
    """A retriever and the domains that are in memory.

    Args:
        bundle: factors of any domain (output of `readapt merge --factors`); the retriever is read from it.
        base: the base model of these factors.
        retriever_fingerprint: fingerprint of that retriever, see `DomainRecord`.
        dtype: float32, float16 or bfloat16.
        max_bytes: most memory of the factors of all domains.
        encoding: how texts are encoded; by default as the bundle says.
        batch_tokens: most tokens per batch; by default what suits the device and the model.
        packed: pack texts instead of padding them, if the model gives the same vectors so.
        gpu_share: part of the GPU's memory that this encoder may use, if several share a GPU.

    Raises:
        ModelError, WeightMismatchError: the base and the bundle cannot be read or do not fit.
    """

    def __init__(
        self,
        bundle: OpenModel,
        base: OpenModel,
        *,
        retriever_fingerprint: str,
        dtype: str,
        max_bytes: int,
        encoding: Encoding | None = None,
        batch_tokens: int | None = None,
        packed: bool = True,
        gpu_share: float = 1.0,
    ) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        opened = open_bundle(bundle)
        encoding = encoding or opened.encoding
        identity = encoder_of_domains(retriever_fingerprint, encoding, dtype)
        self.network = DomainNetwork(opened, base, dtype=DTYPES[dtype], device=device)
        self.max_bytes = max_bytes
        self.encoder = Encoder(
            self.network.module,
            bundle.tokenizer,
            encoding,
            identify=lambda: identity,
            batch_tokens=batch_tokens,
            packed=packed,
            gpu_share=gpu_share,
            reserved_bytes=max_bytes,
            dense=load_dense(bundle, device=device),
            domains=self.network,
        )
        self._domains: OrderedDict[str, Domain] = OrderedDict()

    @property
    def base(self) -> Checkpoint:
        """Return the weights of the base model."""
        return self.network.base

    @property
    def num_bytes(self) -> int:
        """Return the bytes that the factors in memory take."""
        return sum(each.num_bytes for each in tuple(self._domains.values()))

    def find(self, source: DomainSource) -> Domain | None:
        """Return a domain if it is in memory, and mark it as used; else None. It never loads.

        Another thread may load meanwhile.
        """
        domain = self._domains.get(source.fingerprint)
        if domain is not None:
            with contextlib.suppress(KeyError):  # another thread has just evicted it
                self._domains.move_to_end(source.fingerprint)
        return domain

    def load(self, source: DomainSource, adapters: Sequence[Adapter]) -> Iterator[None]:
        """Load a domain into memory, layer by layer, and evict the least recently used ones if memory is short.

        Iterate to the end: only then does `find` return the domain, and only then are others evicted. It yields after
        each layer, so that the caller can encode in between.

        Args:
            source: the domain.
            adapters: its knowledge adapters, bound to `base`.

        Raises:
            ModelError: its factors hold NaN, or do not fit the architecture.
            InputError: its factors alone exceed `max_bytes`.
        """
        for domain in self.network.load(source.name, adapters, self.encoder.encode_ids, source.layers):
            if domain is None:
                yield
                continue
            if domain.num_bytes > self.max_bytes:
                raise InputError(
                    f"the factors of domain {source.name!r} take {domain.num_bytes:,} bytes, and all domains may take "
                    f"{self.max_bytes:,}; raise --max-domain-bytes"
                )
            # Evict before adding: otherwise domains used meanwhile move behind the new one, and it would be evicted.
            self._domains.pop(source.fingerprint, None)
            while self.num_bytes + domain.num_bytes > self.max_bytes:
                self._domains.popitem(last=False)
            self._domains[source.fingerprint] = domain


def encoder_of_domains(retriever_fingerprint: str, encoding: Encoding, dtype: str) -> str:
    """Return the fingerprint of an encoder that several domains share.

    Args:
        retriever_fingerprint: fingerprint of the retriever in their bundles.
        encoding: encoding of the encoder.
        dtype: dtype that it computes in.
    """
    return fingerprint(
        {"retriever": retriever_fingerprint, "encoding": encoding.model_dump(mode="json"), "dtype": dtype}
    )


def domain_fingerprint(
    encoder: str, source: DomainSource, scales: Sequence[float], encoding: Encoding, dtype: str
) -> str:
    """Return a fingerprint of everything that decides the vectors of a domain.

    At the scales of the merge it equals `encoder_fingerprint` of the merged model. If all scales are 0, it equals that
    of the retriever, unless the bundle truncated or scaled the retriever.

    Args:
        encoder: fingerprint of the encoder that the domains share.
        source: the domain.
        scales: knowledge_scale of each of its adapters.
        encoding: encoding of the encoder.
        dtype: dtype that the encoder computes in.
    """
    if (weights := source.weights_at(scales)) is not None:
        return fingerprint_of(*weights, encoding, dtype)
    return fingerprint({"encoder": encoder, "domain": source.fingerprint, "knowledge": list(scales)})
