"""Find the factors of domains, check that they belong to one retriever, and fetch their adapters when needed.

In: folders or URIs that `readapt merge --factors` wrote. Out: a record of what each was made from (two small files per
domain, read in threads), and the knowledge adapters of a domain when it is needed. The retriever's part of a bundle is
not read here: it may be as large as the model, and one bundle's is enough for all.
"""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from readapt_ray.artifacts import fingerprint, read_manifest
from readapt_ray.catalog.models import OpenModel, refuse_other_base
from readapt_ray.errors import FingerprintMismatchError, ModelError, WeightMismatchError
from readapt_ray.model_file_names import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, TOKENIZER_FILES
from readapt_ray.storage import Location
from readapt_ray.weights.adapter import Adapter
from readapt_ray.weights.bundle import read_bundle
from readapt_ray.weights.scale_options import LayerScale, layer_scales
from readapt_ray.weights.weight_files import Checkpoint

_NUM_THREADS = 16


@dataclass(frozen=True, kw_only=True)
class DomainSource:
    """Where the factors of a domain are stored, and its scales. It can be sent to another machine."""

    name: str
    folder: str
    """Folder or URI."""
    fingerprint: str
    """Fingerprint of the bundle."""
    model_fingerprint: str
    """Fingerprint of the model that a merge of the bundle writes."""
    merged_scales: tuple[float, ...]
    """Scale of each knowledge adapter in the merged model."""
    scales: tuple[float, ...]
    """Scale of each knowledge adapter unless a request says otherwise."""
    retriever: tuple[str, str | None] | None
    """Fingerprints of the retriever, and of its base if it is an adapter; None if the bundle truncated or scaled it."""
    layers: tuple[LayerScale, ...] = ()
    """Factors in ranges of layers; they multiply `scales`, or the scales of a request."""

    def weights_at(self, scales: Sequence[float]) -> tuple[str, str | None] | None:
        """Return the fingerprints of the model on disk that makes the same vectors at these scales, and of its base.

        With the merged scales it is the merged model, with all scales 0 the retriever, if the bundle holds it
        unchanged. For other scales the result is None. The base is None unless the model is an adapter.

        Args:
            scales: a scale per knowledge adapter.
        """
        if tuple(scales) == self.merged_scales:
            return self.model_fingerprint, None
        return None if any(scales) else self.retriever


@dataclass(frozen=True, kw_only=True)
class DomainRecord:
    """A domain, with the record in its bundle of what it was made from."""

    source: DomainSource
    content: Mapping[str, Any]
    """Content of bundle.json."""

    @property
    def base_fingerprint(self) -> str:
        """The fingerprint of the base model."""
        return str(self.content["sources"]["pretrained"]["fingerprint"])

    @property
    def retriever_fingerprint(self) -> str:
        """A hash of what domains in one encoder must share: base, retriever with its scale and truncation, encoding."""
        shared = {name: self.content[name] for name in ("readapter_scale", "low_rank", "encoding")}
        retriever = self.content["sources"]["retriever"]["fingerprint"]
        return fingerprint({"base": self.base_fingerprint, "retriever": retriever, **shared})


def read_domains(folders: Mapping[str, str]) -> list[DomainRecord]:
    """Read what the bundle of each domain was made from (base model, retriever, adapters, scales), in threads.

    Args:
        folders: folder or URI of each domain's bundle (the output of `readapt merge --factors`), by the domain's
            name.

    Returns:
        One record per domain, in the order of `folders`.

    Raises:
        ModelError: a folder is not a finished bundle.
    """
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return list(pool.map(_read, folders, folders.values()))


def _read(name: str, folder: str) -> DomainRecord:
    manifest = read_manifest(folder)
    if manifest is None:
        raise ModelError(f"domain {name!r}: {folder!r} is not a finished output of `readapt merge --factors`")
    content = read_bundle(Location(folder), f"{name}={folder}")
    scales = tuple(map(float, content["knowledge_scale"]))
    source = DomainSource(
        name=name,
        folder=folder,
        fingerprint=manifest.fingerprint,
        model_fingerprint=str(content["model_fingerprint"]),
        merged_scales=scales,
        scales=scales,
        retriever=_retriever(content),
        layers=layer_scales(content.get("layer_scales", ())),
    )
    return DomainRecord(source=source, content=content)


def _retriever(content: Mapping[str, Any]) -> tuple[str, str | None] | None:
    """Return the fingerprints of the retriever and its base; None if the bundle truncates or scales the retriever."""
    if content["low_rank"] is not None or content["readapter_scale"] != 1.0:
        return None
    retriever, base = content["sources"]["retriever"], content["sources"]["pretrained"]["fingerprint"]
    return str(retriever["fingerprint"]), str(base) if ADAPTER_CONFIG_NAME in retriever["files"] else None


def check_domains(records: Sequence[DomainRecord], base: OpenModel) -> None:
    """Check that all domains were made from this base and with one retriever, by fingerprints.

    Args:
        records: the domains, at least one, from `read_domains`.
        base: the base model; its files are hashed.

    Raises:
        WeightMismatchError: a domain was not; the error names it.
    """
    first = records[0]
    for each in records:
        name = each.source.name
        advice = "leave it out, or serve that base with it"
        refuse_other_base(f"domain {name!r}", each.content["sources"]["pretrained"], base, advice)
        if each.retriever_fingerprint != first.retriever_fingerprint:
            raise WeightMismatchError(
                f"domains {first.source.name!r} and {name!r} cannot share an encoder: {_difference(first, each)}; merge one of "
                f"them again with the retriever and the options of the other"
            )


def _difference(one: DomainRecord, other: DomainRecord) -> str:
    """Say in what two domains with different retrievers differ, for an error message."""
    for option in ("readapter_scale", "low_rank", "encoding"):
        values = one.content[option], other.content[option]
        if values[0] != values[1]:
            return f"{option} is {values[0]!r} for one and {values[1]!r} for the other"
    made_of = [each.content["sources"]["retriever"] for each in (one, other)]
    tokenizers = [{file: each["files"].get(file) for file in TOKENIZER_FILES} for each in made_of]
    what = "tokenizers" if tokenizers[0] != tokenizers[1] else "weights"
    return f"their retrievers {made_of[0]['name']!r} and {made_of[1]['name']!r} have other {what}"


@contextlib.contextmanager
def fetched_adapters(source: DomainSource, base: Checkpoint) -> Iterator[list[Adapter]]:
    """Fetch the knowledge adapters of a domain for use in a `with` block; copies of remote files are removed after it.

    Args:
        source: where the domain's bundle is. A local bundle is read in its place, without a copy.
        base: weights of the model that the adapters are applied to.

    Yields:
        The opened adapters, in the order of `source.scales`.

    Raises:
        ModelError: the files are damaged, or the knowledge is stored as whole weights instead of adapters.
        FingerprintMismatchError: the bundle is gone, or another one has replaced it.
        WeightMismatchError: the adapters do not fit the base.
    """
    manifest = read_manifest(source.folder)
    if manifest is None or manifest.fingerprint != source.fingerprint:
        raise FingerprintMismatchError(
            f"the factors of domain {source.name!r} are gone, or have been replaced by others"
        )
    folder = Location(source.folder)
    with tempfile.TemporaryDirectory(prefix="readapt-domain-") as copies:
        adapters = []
        for number in range(1, 1 + len(source.scales)):
            part = folder / f"knowledge-{number}"
            if not (part / ADAPTER_CONFIG_NAME).is_file():
                raise ModelError(
                    f"domain {source.name!r} keeps its knowledge as whole weights, and a shared encoder takes adapters; "
                    f"give the output of `readapt train` to `readapt merge --factors`"
                )
            adapters.append(Adapter(_local(part, Path(copies) / str(number)), base, name=f"{source.name}/{number}"))
        yield adapters


def _local(folder: Location, copy: Path) -> Path:
    """Return the folder, or a copy on this machine."""
    if folder.is_local:
        return folder.local_path
    for name in (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME):
        (folder / name).copy_to(Location(str(copy / name)))
    return copy
