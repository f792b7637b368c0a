"""Whether the versions can work, found out by encoding and searching, at most once per second."""

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
    encode_s: float | None = None
    num_vectors: int | None = None
    num_reembedded: int | None = None
    """Passages that are searched by new vectors, in a version whose passages move to these."""


class Readiness(BaseModel):
    """The answer of `GET /readyz`: whether every version encodes and searches."""

    ready: bool
    versions: dict[str, CheckResult]


class Recent(Generic[R]):
    """Make something once for all who ask while it is made, and within a second after.

    Args:
        make: makes it.
    """

    def __init__(self, make: Callable[[], Awaitable[R]]) -> None:
        self._make = make
        self._task: asyncio.Task[R] | None = None
        self._made_s = 0.0

    async def result(self) -> R:
        """Return the latest result, or make another if it is older than a second."""
        if self._task is None or (self._task.done() and time.monotonic() > self._made_s + _RECENT_S):
            self._task = asyncio.get_running_loop().create_task(self._made())
        return await asyncio.shield(self._task)

    async def _made(self) -> R:
        try:
            return await self._make()
        finally:
            self._made_s = time.monotonic()


async def checked(versions: Mapping[str, Version], missing: Mapping[str, str]) -> Readiness:
    """Check whether versions encode and search.

    Args:
        versions: those that are up.
        missing: why each of the others is not.
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
    """Leave out the paths of files, which are not for everybody who asks whether the server is ready."""
    return re.sub(r"[^\s'\"(]*/", "", cause)
