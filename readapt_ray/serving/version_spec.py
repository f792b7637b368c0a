"""What the processes of one served version are started with; it is sent to their nodes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from readapt_ray.artifacts import fingerprint
from readapt_ray.catalog.encoding import Encoding


@dataclass(frozen=True, kw_only=True)
class VersionSpec:
    """What the processes of a version are started with."""

    name: str
    retriever: str
    encoding: Encoding | None
    dtype: str
    encoder_fingerprint: str | None = None
    """As the index or the bridge has it: a node whose model folder differs is found out. None without an index."""
    bridge: str | None = None
    """Maps queries to the vectors of the index, if another model made these."""
    bridge_fingerprint: str | None = None
    new_vectors: str | None = None
    """Folder in which `embed` writes the vectors of the retriever, to which passages move as they appear."""
    index: str | None = None
    index_fingerprint: str | None = None
    index_encoder: str | None = None
    """Fingerprint of what made the vectors of the index."""
    slices: Mapping[str, int] = field(default_factory=dict)
    """The deployments that hold the index, each with the number of its vectors, as the index's manifest has it."""
    has_words: bool = False
    """Whether the index has BM25 scores."""
    is_split: bool = False
    """Whether passages are parts of documents."""
    corpus: str | None = None
    corpus_fingerprint: str | None = None
    batch_tokens: int | None
    num_slots: int
    num_threads: int | None
    """None shares the cores of the node that a replica runs on."""
    processes: Mapping[str, Any]
    """The options of its processes: how many, with what."""
    base: str = ""
    """Model that domains are laid on; empty for a version that is a retriever."""
    bundles: tuple[str, ...] = ()
    """Factors of domains, of which one gives the retriever."""
    max_domain_bytes: int = 0
    """Memory of the factors of domains."""

    def fingerprint(self, encoder: str) -> str:
        """Return the fingerprint of the version, made from its encoder's."""
        parts = {"encoder": encoder, "index": self.index_fingerprint, "corpus": self.corpus_fingerprint}
        parts |= {"bridge": self.bridge_fingerprint} if self.bridge else {}
        return fingerprint(parts | ({"new_vectors": self.new_vectors} if self.new_vectors else {}))
