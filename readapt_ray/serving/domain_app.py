"""Check the domains of a server before anything starts, and make the specifications of their encoder and indexes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from readapt_ray.artifacts import fingerprint, open_artifact
from readapt_ray.catalog.encoding import Encoding
from readapt_ray.catalog.models import open_model, own_folder
from readapt_ray.cluster import on_worker
from readapt_ray.errors import FingerprintMismatchError
from readapt_ray.serving.domain_options import VERSION_NAME
from readapt_ray.serving.names import GATEWAY_APP
from readapt_ray.serving.options import DomainIndexConfig, DomainsConfig, ServeConfig
from readapt_ray.storage import Location

if TYPE_CHECKING:
    from readapt_ray.serving.domains import DomainIndex
    from readapt_ray.serving.version_spec import VersionSpec
    from readapt_ray.weights.domain_sources import DomainRecord


def domains_spec(name: str, config: DomainsConfig) -> "VersionSpec":
    """Return the specification that the shared encoder starts from, with paths that are valid on every node.

    Without a data type in the options, it has the type of the first domain's index, or float32 without an index.

    Args:
        name: name of the version that the domains share.
        config: its options. Bundles are factors (outputs of `readapt merge --factors`).

    Raises:
        ModelError: no base is given, and the first bundle cannot be read.
    """
    from readapt_ray.serving.version_spec import VersionSpec

    base = config.base or _named_base(config.bundles[0])
    folder = own_folder(base)
    return VersionSpec(
        name=name,
        retriever="",
        encoding=config.encoding,
        dtype=config.dtype or _dtype_of(config.indexes),
        batch_tokens=config.batch_tokens,
        num_slots=max(config.num_replicas, config.max_replicas or 1),
        num_threads=config.num_threads,
        processes=config.processes(),
        base=base if folder is None else str(folder),
        bundles=tuple(on_worker.absolute(Location(each)).uri for each in config.bundles),
        max_domain_bytes=config.max_domain_bytes,
    )


def check_domain_encoder(name: str, config: DomainsConfig) -> str:
    """Check that the first bundle (factors of a domain) can be read; return the fingerprint of the shared version.

    The shared version is the one whose encoder all domains share. Its weights are not loaded.

    Raises:
        ModelError: the first bundle cannot be read.
    """
    from readapt_ray.retrieval.domain_encoder import encoder_of_domains
    from readapt_ray.weights.bundle import open_bundle
    from readapt_ray.weights.domain_sources import read_domains

    spec = domains_spec(name, config)
    (first,) = read_domains({name: config.bundles[0]})
    encoding = config.encoding or open_bundle(open_model(config.bundles[0], with_weights=False)).encoding
    return spec.fingerprint(encoder_of_domains(first.retriever_fingerprint, encoding, spec.dtype))


def domain_records(config: ServeConfig) -> "list[DomainRecord]":
    """Read the record of each domain, and check that all have the same base, retriever and tokenizer.

    Returns:
        The records, with the scales that the domains are served at; [] without domains.

    Raises:
        ModelError: the factors are missing or unfinished.
        WeightMismatchError: one was made of another base, retriever or tokenizer.
    """
    if not config.domains:
        return []
    from readapt_ray.weights.domain_sources import check_domains, read_domains

    domains = config.each_domain()
    places = {name: on_worker.absolute(Location(each.factors)).uri for name, each in domains.items()}
    records = [_at(each, domains[each.source.name].knowledge_scale) for each in read_domains(places)]
    check_domains(records, open_model(config.base or _named_base(next(iter(places.values())))))
    return records


def _at(record: "DomainRecord", scale: float | None) -> "DomainRecord":
    """Return a record with this scale of the knowledge; None keeps the scale of the merge."""
    if scale is None:
        return record
    return replace(record, source=replace(record.source, scales=(scale,) * len(record.source.scales)))


def _dtype_of(indexes: Sequence[str]) -> str:
    """Return the data type in which the vectors of the first index were computed; float32 without an index."""
    for each in indexes:
        return str(open_artifact(each, "index").manifest.details["encoder"]["dtype"])
    return "float32"


def index_spec(config: DomainIndexConfig) -> "VersionSpec":
    """Return the specification that the processes of a domain's index start from, with paths valid on every node.

    Raises:
        ArtifactMissingError: the index or the corpus is not complete.
    """
    from readapt_ray.serving.slice_plan import planned_slices
    from readapt_ray.serving.version_spec import VersionSpec

    index = open_artifact(str(config.index), "index")
    corpus = open_artifact(config.corpus, "ingest") if config.corpus else None
    details = index.manifest.details
    return VersionSpec(
        name=config.domain,
        retriever=config.retriever,
        encoding=Encoding.parse(details["encoder"]["encoding"], where=str(config.index)),
        dtype=details["encoder"]["dtype"],
        encoder_fingerprint=details["encoder"]["fingerprint"],
        index=on_worker.absolute(index.location).uri,
        index_fingerprint=index.fingerprint,
        index_encoder=details["encoder"]["fingerprint"],
        slices={part.deployment: part.num_vectors for part in planned_slices(config)},
        has_words="bm25" in details,
        is_split=bool(details.get("is_split")),
        corpus=on_worker.absolute(corpus.location).uri if corpus else None,
        corpus_fingerprint=corpus.fingerprint if corpus else None,
        batch_tokens=None,
        num_slots=0,
        num_threads=config.num_threads,
        processes=config.processes(),
    )


def index_app_name(config: DomainIndexConfig, spec: "VersionSpec") -> str:
    """Return the name of the Ray Serve application of a domain's index, such as readapt-index-legal-1a2b3c4d.

    It ends with a hash of the index, the corpus, their locations, and the options of the processes. If one of them
    changes, the name does too, so an update starts the new index beside the served one.

    Args:
        config: options of the index.
        spec: specification from `index_spec`.
    """
    made_of = fingerprint(
        [spec.fingerprint(str(spec.encoder_fingerprint)), spec.index, spec.corpus, config.processes()]
    )
    return f"{GATEWAY_APP}-index-{config.domain}-{made_of[:8]}"


def check_indexes(config: ServeConfig, records: "Sequence[DomainRecord]") -> None:
    """Check that the index of each domain was made with the model, encoding and dtype that encode its queries.

    Domains without an index are not checked.

    Args:
        config: options of the server.
        records: from `domain_records`.

    Raises:
        ArtifactMissingError: an index or a corpus is not complete.
        FingerprintMismatchError: an index was made with another model, encoding or dtype.
    """
    from readapt_ray.retrieval.encoder_fingerprint import fingerprint_of

    indexes = config.domain_indexes()
    if not indexes:
        return
    (shared,) = config.each_version().values()
    assert isinstance(shared, DomainsConfig)
    spec = domains_spec(VERSION_NAME, shared)
    for record in records:
        name = record.source.name
        if name not in indexes:
            continue
        index = index_spec(indexes[name])
        encoding = shared.encoding or Encoding.parse(record.content["encoding"], where=record.source.folder)
        weights = record.source.weights_at(record.source.scales)
        if weights is None or index.index_encoder != fingerprint_of(*weights, encoding, spec.dtype):
            is_same = weights is not None and (encoding, spec.dtype) != (index.encoding, index.dtype)
            raise FingerprintMismatchError(
                f"the index of domain {name!r} ({indexes[name].index}) has the vectors of another {'encoding or dtype' if is_same else 'model'} "
                f"than its factors in {spec.dtype}; {_advice(record)}"
            )


def _advice(record: "DomainRecord") -> str:
    """Return advice for an error message: which index fits a domain."""
    source = record.source
    if source.scales == source.merged_scales:
        return f"give the index of vectors that `readapt embed --domain {source.folder}` makes with these options"
    if source.weights_at(source.scales) is not None:
        retriever = record.content["sources"]["retriever"]["name"]
        return f"give the index of vectors that `readapt embed --retriever {retriever}` makes with these options"
    return (
        f"no model makes those of knowledge_scale {source.scales[0]:g}: leave it out, or give factors merged with this scale (at 0 "
        f"they are the retriever's own, if the merge has readapter_scale 1 and no low_rank)"
    )


def domain_indexes(config: ServeConfig) -> "dict[str, DomainIndex]":
    """Return the description of each domain's index for the gateway, by domain; domains without one are left out."""
    from readapt_ray.serving.domains import DomainIndex

    found = {}
    for name, each in config.domain_indexes().items():
        spec = index_spec(each)
        found[name] = DomainIndex(
            app=index_app_name(each, spec),
            fingerprint=spec.fingerprint(str(spec.encoder_fingerprint)),
            encoder_fingerprint=str(spec.encoder_fingerprint),
            slices=dict(spec.slices),
            has_words=spec.has_words,
            is_split=spec.is_split,
            corpus=spec.corpus,
            corpus_fingerprint=spec.corpus_fingerprint,
        )
    return found


def _named_base(bundle: str) -> str:
    """Return the name of the pretrained model in the manifest of a bundle."""
    from readapt_ray.weights.bundle import read_bundle

    return str(read_bundle(Location(bundle), bundle)["sources"]["pretrained"]["name"])
