"""Check the domains of a server before anything starts, and say what the encoder that they share is started with."""

from typing import TYPE_CHECKING

from readapt_ray.catalog.models import open_model, own_folder
from readapt_ray.cluster import on_worker
from readapt_ray.serving.options import DomainsConfig, ServeConfig
from readapt_ray.storage import Location

if TYPE_CHECKING:
    from readapt_ray.serving.version_spec import VersionSpec
    from readapt_ray.weights.domain_sources import DomainRecord


def domains_spec(name: str, config: DomainsConfig) -> "VersionSpec":
    """Return what the encoder of domains is started with, by names that mean the same on every node.

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
        dtype=config.dtype or "float32",
        batch_tokens=config.batch_tokens,
        num_slots=max(config.num_replicas, config.max_replicas or 1),
        num_threads=config.num_threads,
        processes=config.processes(),
        base=base if folder is None else str(folder),
        bundles=tuple(on_worker.absolute(Location(each)).uri for each in config.bundles),
        max_domain_bytes=config.max_domain_bytes,
    )


def check_domain_encoder(name: str, config: DomainsConfig) -> str:
    """Return the fingerprint of the version whose encoder domains share.

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
    """Read what each domain was made of, and check that all belong to one retriever of the base; none without domains.

    Raises:
        ModelError: the factors are not there, or unfinished.
        WeightMismatchError: one was made of another base, retriever or tokenizer.
    """
    if not config.domains:
        return []
    from readapt_ray.weights.domain_sources import check_domains, read_domains

    places = {name: on_worker.absolute(Location(folder)).uri for name, folder in config.domains.items()}
    records = read_domains(places)
    check_domains(records, open_model(config.base or _named_base(next(iter(places.values())))))
    return records


def _named_base(bundle: str) -> str:
    """Return the base that a bundle names."""
    from readapt_ray.weights.bundle import read_bundle

    return str(read_bundle(Location(bundle), bundle)["sources"]["pretrained"]["name"])
