"""Make the versions of a gateway from what their processes report: tokenizer, queue and passage texts of each."""

import asyncio
import dataclasses
import functools
import logging
from collections.abc import Mapping

from readapt_ray.errors import first_line
from readapt_ray.retrieval.passage_store import PassageStore
from readapt_ray.serving.batching import Batcher
from readapt_ray.serving.domain_options import VERSION_NAME
from readapt_ray.serving.domains import DomainBackend
from readapt_ray.serving.options import Limits
from readapt_ray.serving.readiness import without_folders
from readapt_ray.serving.request_tokens import InputTokenizer
from readapt_ray.serving.telemetry import Telemetry
from readapt_ray.serving.versions import Backend, Registry, Routing, Version

logger = logging.getLogger("ray.serve")


async def next_registry(
    registry: Registry,
    backends: Mapping[str, Backend],
    routing: Routing,
    *,
    missing: Mapping[str, str],
    limits: Limits,
    telemetry: Telemetry,
    must_be_whole: bool = False,
) -> Registry:
    """Return the next state of a gateway. A version that cannot be served is left out, and does not stop the others.

    If it is the new default, the former versions and routing are kept too: requests that name no version would fail.

    Args:
        registry: the former state. Versions whose backend is the same are taken over.
        backends: versions that are up, by name.
        routing: the new routing, which may name missing versions.
        missing: for each other version, by name, why it is not up.
        limits: limits of the gateway.
        telemetry: metrics of the gateway.
        must_be_whole: raise the error of a version that cannot be served, instead of leaving it out.

    Raises:
        InputError: the routing names a version that is in neither `backends` nor `missing`.
        Exception: a version cannot be served and `must_be_whole` is set, or no version can be served.
    """
    routing.check([*backends, *missing])
    left_out, versions = dict(missing), dict[str, Version]()
    for number, (name, backend) in enumerate(backends.items(), start=1):
        kept = registry.versions.get(name)
        if kept is not None and kept.backend is backend:
            versions[name] = kept
            continue
        try:
            others = [*versions.values(), *registry.versions.values()]
            versions[name] = await _added(name, backend, others, limits, telemetry)
        except Exception as error:
            if must_be_whole or (number == len(backends) and not versions):
                raise
            logger.exception("version %s cannot be served", name)
            left_out[name] = without_folders(first_line(error))
    if routing.default not in versions and registry.routing.default in registry.versions:
        return Registry({**registry.versions, **versions}, registry.routing, left_out)
    return Registry(versions, routing.among(versions), left_out)


async def _added(name: str, backend: Backend, others: list[Version], limits: Limits, telemetry: Telemetry) -> Version:
    """Make a version. Domains that share an encoder share its queue and tokenizer too."""
    if not isinstance(backend, DomainBackend):
        return await asyncio.to_thread(_prepared, name, backend, others, limits, telemetry)
    for each in others:
        if isinstance(each.backend, DomainBackend) and each.backend.shared is backend.shared:
            store = await asyncio.to_thread(_store, backend, others)
            return dataclasses.replace(each, backend=backend, store=store)
    return await asyncio.to_thread(_prepared, VERSION_NAME, backend, others, limits, telemetry)


def _prepared(name: str, backend: Backend, others: list[Version], limits: Limits, telemetry: Telemetry) -> Version:
    info, store = backend.info, _store(backend, others)
    batcher = Batcher(
        backend.encode,
        batch_tokens=info.batch_tokens,
        wait_s=limits.batch_wait_s,
        max_queued_tokens=limits.max_queued_tokens,
        num_slots=info.num_slots,
        tokens_per_s=info.tokens_per_s,
        on_batch=functools.partial(telemetry.batch, name, info.batch_tokens),
    )
    return Version(backend, InputTokenizer(info.tokenizer, info.encoding), batcher, store)


def _store(backend: Backend, others: list[Version]) -> PassageStore | None:
    """Open the corpus of a version, or take it from a version that has the same one."""
    info = backend.info
    stores = {(each.info.corpus, each.info.corpus_fingerprint): each.store for each in others}
    store = stores.get((info.corpus, info.corpus_fingerprint))
    if store is None and info.corpus:
        store = PassageStore.open(info.corpus, info.corpus_fingerprint)
    return store
