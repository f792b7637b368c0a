"""Whether the versions can work, found out by encoding and searching, at most once per second."""

import asyncio
import logging
import time
from collections.abc import Mapping

from readapt_ray.serving import schema
from readapt_ray.serving.versions import PartsDownError, Version

logger = logging.getLogger("ray.serve")

_CHECK_S = 3.0
_CHECKED_FOR_S = 1.0


class ReadinessCheck:
    """Check the versions once for all who ask within a second."""

    def __init__(self, versions: Mapping[str, Version]) -> None:
        self._versions = versions
        self._task: asyncio.Task[schema.Readiness] | None = None
        self._checked_s = 0.0

    async def result(self) -> schema.Readiness:
        """Return the latest result, or check anew if it is older than a second."""
        if self._task is None or (self._task.done() and time.monotonic() > self._checked_s + _CHECKED_FOR_S):
            self._task = asyncio.get_running_loop().create_task(self._check_all())
        return await asyncio.shield(self._task)

    async def _check_all(self) -> schema.Readiness:
        found = await asyncio.gather(*map(_check, self._versions.values()))
        self._checked_s = time.monotonic()
        is_ready = bool(found) and all(each.ready for each in found)
        return schema.Readiness(ready=is_ready, versions=dict(zip(self._versions, found, strict=True)))


async def _check(version: Version) -> schema.CheckResult:
    try:
        async with asyncio.timeout(_CHECK_S):
            seconds = await version.backend.check()
    except TimeoutError:
        return schema.CheckResult(ready=False, reason=f"no answer within {_CHECK_S:.0f} s")
    except PartsDownError as error:
        return schema.CheckResult(ready=False, reason=str(error))
    except Exception as error:
        # Paths and tracebacks belong in the log, not in the answer.
        logger.warning("version %s is not ready: %s", version.info.fingerprint, error)
        return schema.CheckResult(ready=False, reason="its encoder or its index fails")
    return schema.CheckResult(ready=True, encode_s=round(seconds, 4), num_vectors=version.info.num_vectors)
