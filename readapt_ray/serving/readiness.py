"""Test whether the versions work by encoding and searching, at most once per second."""

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Generic, TypeVar

from pydantic import BaseModel

from readapt_ray.serving.versions import PartsDownError, Version

logger = logging.getLogger("ray.serve")

_CHECK_S = 3.0
_RECENT_S = 1.0

R = TypeVar("R")


class CheckResult(BaseModel):
    """Whether a version can encode and search its whole index now."""

    ready: bool
    reason: str = ""
    """What does not work; empty if the version is ready."""
    encode_s: float | None = None
    """Seconds that the encoder took for a sentence, with the wait for its batch; null if the version is not ready."""
    num_vectors: int | None = None
    """Number of vectors in its index, 0 without one; null if the version is not ready."""
    num_reembedded: int | None = None
    """Number of passages that are searched by new vectors; null if passages of the version do not move."""


class Readiness(BaseModel):
    """The answer of `GET /readyz`: whether every version encodes and searches."""

    ready: bool
    versions: dict[str, CheckResult]


class CachedCall(Generic[R]):
    """Caches the result of an async function for one second; callers share a call that is still running.

    Args:
        make: the function.
    """

    def __init__(self, make: Callable[[], Awaitable[R]]) -> None:
        self._make = make
        self._task: asyncio.Task[R] | None = None
        self._made_s = 0.0

    async def result(self) -> R:
        """Return the latest result, or raise its exception; call the function again if it is older than one second.

        A caller that is cancelled does not cancel the call that others share.
        """
        if self._task is None or (self._task.done() and time.monotonic() > self._made_s + _RECENT_S):
            self._task = asyncio.get_running_loop().create_task(self._made())
        return await asyncio.shield(self._task)

    async def _made(self) -> R:
        try:
            return await self._make()
        finally:
            self._made_s = time.monotonic()


async def check_versions(versions: Mapping[str, Version], missing: Mapping[str, str]) -> Readiness:
    """Test each version by encoding and searching, all at once, for at most 3 s; return the results.

    `ready` is true if every version works; false without any version.

    Args:
        versions: versions that are up, by name.
        missing: for each other version, by name, why it is not up.
    """
    found = await asyncio.gather(*map(_check, versions.values()))
    results = dict(zip(versions, found, strict=True))
    results |= {name: CheckResult(ready=False, reason=f"not up: {cause}") for name, cause in missing.items()}
    is_ready = bool(results) and all(each.ready for each in results.values())
    return Readiness(ready=is_ready, versions=results)


async def _check(version: Version) -> CheckResult:
    try:
        async with asyncio.timeout(_CHECK_S):
            seconds = await version.backend.check()
            moved = await version.backend.num_reembedded()
    except TimeoutError:
        return CheckResult(ready=False, reason=f"no answer within {_CHECK_S:.0f} s")
    except PartsDownError as error:
        return CheckResult(ready=False, reason=str(error))
    except Exception as error:
        # Paths and tracebacks belong in the log, not in the answer.
        logger.warning("version %s is not ready: %s", version.info.fingerprint, error)
        return CheckResult(ready=False, reason="its encoder or its index fails")
    size = version.info.num_vectors
    return CheckResult(ready=True, encode_s=round(seconds, 4), num_vectors=size, num_reembedded=moved)


def without_folders(cause: str) -> str:
    """Remove the folders of paths from a message: "no file /data/run/a.bin" gives "no file a.bin".

    /readyz needs no API key, so anybody can read its messages.
    """
    return re.sub(r"[^\s'\"(]*/", "", cause)
