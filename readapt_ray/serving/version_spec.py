"""Define the specification that the processes of a served version start from; Ray sends it to their nodes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from readapt_ray.artifacts import fingerprint
from readapt_ray.catalog.encoding import Encoding


@dataclass(frozen=True, kw_only=True)
class VersionSpec:
    """Everything that the processes of a version need to start."""

    name: str
    retriever: str
    encoding: Encoding | None
    dtype: str
    encoder_fingerprint: str | None = None
    """Fingerprint of the query encoder that the index or the bridge requires, so that a node with a different model
    folder is detected. None without an index."""
    bridge: str | None = None
    """URI of the bridge that maps queries to the vectors of the index; None if this retriever made these."""
    bridge_fingerprint: str | None = None
    new_vectors: str | None = None
    """URI of the folder in which `embed` writes vectors of this retriever, to which passages move; None without it."""
    index: str | None = None
    index_fingerprint: str | None = None
    index_encoder: str | None = None
    """Fingerprint of the encoder that made the vectors of the index."""
    slices: Mapping[str, int] = field(default_factory=dict)
    """Number of vectors in each deployment that holds a part of the index, by the deployment's name."""
    has_words: bool = False
    """Whether the index has BM25 scores."""
    is_split: bool = False
    """Whether passages are parts of documents."""
    corpus: str | None = None
    corpus_fingerprint: str | None = None
    batch_tokens: int | None
    num_slots: int
    num_threads: int | None
    """CPU threads per encoder process; None divides the cores of a node among the replicas."""
    processes: Mapping[str, Any]
    """Options of its processes: their number, threads, CPUs and GPUs."""
    base: str = ""
    """Pretrained model to which the factors of domains are added; empty for a version without domains."""
    bundles: tuple[str, ...] = ()
    """Factors of some domains; the retriever is read from the first that can be opened."""
    max_domain_bytes: int = 0
    """Maximum memory for the factors of all domains, in bytes."""

    def fingerprint(self, encoder: str) -> str:
        """Return the fingerprint of the version: a hash of its encoder, index, corpus, bridge and new vectors.

        Args:
            encoder: fingerprint of the encoder: model, encoding and dtype.
        """
        parts = {"encoder": encoder, "index": self.index_fingerprint, "corpus": self.corpus_fingerprint}
        parts |= {"bridge": self.bridge_fingerprint} if self.bridge else {}
        return fingerprint(parts | ({"new_vectors": self.new_vectors} if self.new_vectors else {}))
