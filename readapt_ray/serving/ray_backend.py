"""Call the processes of a version through Ray Serve: retry when a replica dies, and decide what a lost part means."""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from readapt_ray.errors import WorkerError, first_line
from readapt_ray.serving import rollout
from readapt_ray.serving.doc_filter import DocFilter
from readapt_ray.serving.domains import DomainUnavailableError
from readapt_ray.serving.names import ENCODER_DEPLOYMENT
from readapt_ray.serving.readiness import without_folders
from readapt_ray.serving.schema import RequestError
from readapt_ray.serving.versions import (
    Found,
    LossPolicy,
    PartsDownError,
    Ranked,
    VersionInfo,
    in_thread_if_large,
    merge_ranked,
)
from readapt_ray.weights.domain_sources import DomainSource

logger = logging.getLogger("ray.serve")

_RETRY_S = 0.1
_CHECK_S = 2.5
"""Maximum seconds for the check of one part; less than the check of a whole version may take."""


class RayBackend:
    """The encoder and the index slices of a version, called through Ray Serve handles.

    Args:
        info: description that the encoder reports.
        encoder: handle of `EncoderReplica`.
        slices: handles of `IndexReplica`, by the names of the slices.
        policy: what to do if a slice does not answer.
    """

    def __init__(self, info: VersionInfo, encoder: Any, slices: Mapping[str, Any], policy: LossPolicy) -> None:
        self.info = info
        self._encoder = encoder
        self._slices = dict(slices)
        self.policy = policy

    def with_index(self, info: VersionInfo, slices: Mapping[str, Any], policy: LossPolicy) -> "RayBackend":
        """Return a new backend with the same encoder and another index.

        Args:
            info: description of the encoder, with the fields of that index.
            slices: handles of its `IndexReplica` deployments, by the names of the slices.
            policy: what to do if a slice does not answer.
        """
        return RayBackend(info, self._encoder, slices, policy)

    async def encode(self, rows: list[Sequence[int]]) -> NDArray[np.float32]:
        """Return the vectors [N, D] of N rows of token ids, from any replica that is alive.

        It retries while replicas die, so the caller must set a deadline.

        Raises:
            FingerprintMismatchError: the replicas hold another version by now.
            RequestError: with status 503: the version was removed, or cannot be started.
        """
        vectors: NDArray[np.float32] = await _persistently(self._encoder.encode, self.info.fingerprint, rows)
        return vectors

    async def prepare(self, source: DomainSource) -> None:
        """Load the factors of a domain into the memory of one replica, unless they are there.

        Another replica that encodes the rows later loads them too.

        Raises:
            DomainUnavailableError: its factors cannot be used.
            RequestError: with status 503: the version was removed, or cannot be started.
        """
        problem = await _persistently(self._encoder.prepare, self.info.fingerprint, source)
        if problem:
            raise DomainUnavailableError(problem)

    async def search(self, vectors: NDArray[np.float32], top_k: int, wanted: DocFilter | None) -> Found:
        """Return the k best passages per query [Q, D], best first, and the slices that did not answer.

        With the policy `wait` it waits for a lost slice without a limit, so the caller must set a deadline.

        Args:
            vectors: the queries.
            top_k: k.
            wanted: filter that passages must pass; None for all passages.

        Raises:
            FingerprintMismatchError: a slice holds another version by now.
            InputError: the index cannot be filtered, or lacks a column of the filter.
            RequestError: a slice is lost and the policy is `error`, or all are lost; or a slice was removed and the
                policy is not `partial`.
        """
        return await self._searched("search", vectors, top_k, wanted)

    async def search_words(self, texts: Sequence[str], top_k: int, wanted: DocFilter | None) -> Found:
        """Return the k best passages per text by BM25, best first, and the slices that did not answer; as `search`.

        Raises:
            FingerprintMismatchError: a slice holds another version by now.
            InputError: the corpus lacks a column of the filter.
            RequestError: as in `search`.
        """
        return await self._searched("search_words", texts, top_k, wanted)

    async def _searched(self, method: str, queries: Any, top_k: int, wanted: DocFilter | None) -> Found:
        names = list(self._slices)
        answers = await asyncio.gather(*(self._search_slice(name, method, queries, top_k, wanted) for name in names))
        missing = [name for name, answer in zip(names, answers, strict=True) if answer is None]
        if missing and (self.policy.lost_shards == "error" or len(missing) == len(names)):
            message = f"{len(missing)} of {len(names)} parts of the index do not answer; try again"
            raise RequestError(message, status=503, code="index_incomplete", retry_after_s=1)
        parts = [answer for answer in answers if answer is not None]
        num_hits = len(queries) * top_k * len(parts)
        return Found(await in_thread_if_large(num_hits, merge_ranked, parts, len(queries), top_k), missing)

    async def _search_slice(
        self, name: str, method: str, queries: Any, top_k: int, wanted: DocFilter | None
    ) -> list[list[Ranked]] | None:
        """Search one slice; return None if it is lost."""
        limit_s = None if self.policy.lost_shards == "wait" else self.policy.shard_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                found: list[list[Ranked]] = await _persistently(
                    getattr(self._slices[name], method), self.info.fingerprint, queries, top_k, wanted
                )
                return found
        except TimeoutError:
            logger.warning("%s of version %s did not answer within %s s", name, self.info.fingerprint, limit_s)
            return None
        except RequestError:
            if self.policy.lost_shards == "partial":
                return None
            raise

    async def check(self) -> float:
        """Test encoder and slices by encoding and searching; return the seconds that the encoder took.

        A part that does not answer within 2.5 s counts as failed.

        Raises:
            PartsDownError: some parts do not answer or fail; the log says why.
            WorkerError: a slice has another number of vectors than the version.
        """
        handles = {ENCODER_DEPLOYMENT: self._encoder, **self._slices}
        answers = await asyncio.gather(*(_check(each, self.info.fingerprint) for each in handles.values()))
        failed = {name: answer for name, answer in zip(handles, answers, strict=True) if isinstance(answer, str)}
        if failed:
            causes = await asyncio.to_thread(_causes, self._encoder)
            failed = {name: causes.get(name) or answer for name, answer in sorted(failed.items())}
            for name, answer in failed.items():
                logger.warning("%s of %s is down: %s", name, self._encoder.app_name, answer)
            raise PartsDownError({name: without_folders(answer) for name, answer in failed.items()})
        seconds, *sizes = answers
        if dict(zip(self._slices, sizes, strict=True)) != dict(self.info.slices):
            raise WorkerError(f"the index has {sum(sizes):,} vectors; it had {self.info.num_vectors:,}")
        return float(seconds)

    async def num_reembedded(self) -> int | None:
        """Count the passages that have moved to new vectors; None if passages of this version do not move."""
        if not self.info.is_moving:
            return None
        each = (_persistently(each.num_reembedded, self.info.fingerprint) for each in self._slices.values())
        return sum(map(int, await asyncio.gather(*each)))


async def _check(handle: Any, fingerprint: str) -> Any:
    """Check one part; return its answer, or a string that says what is wrong."""
    try:
        async with asyncio.timeout(_CHECK_S):
            return await handle.check.remote(fingerprint)
    except TimeoutError:
        return f"no answer within {_CHECK_S:g} s"
    except Exception as error:
        return first_line(error) or type(error).__name__


def _causes(encoder: Any) -> dict[str, str]:
    """Return the last line of Ray Serve's message about each part of a version that has one."""
    from ray import serve

    try:
        deployments = serve.status().applications[encoder.app_name].deployments
    except Exception as error:  # the controller may be what is down
        logger.debug("no status of %s: %s", encoder.app_name, error)
        return {}
    return rollout.last_lines(deployments)


async def _persistently(method: Any, *given: Any) -> Any:
    """Call a deployment, and retry until a replica answers. A call changes nothing, so it may run twice.

    The caller must set a deadline.

    Raises:
        RequestError: Ray Serve has removed the deployment, or no longer tries to start it.
    """
    from ray.exceptions import RayActorError
    from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError

    while True:
        try:
            return await method.remote(*given)
        except (RayActorError, ReplicaUnavailableError) as error:
            logger.warning("a replica was lost under way, asking another: %s", type(error).__name__)
            await asyncio.sleep(_RETRY_S)
        except DeploymentUnavailableError as error:
            logger.warning("deployment is unavailable: %s", error)
            message = "this version, or a part of it, was removed or cannot be started; try again"
            raise RequestError(message, status=503, code="version_down", retry_after_s=1) from None
