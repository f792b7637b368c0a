"""Share a file between two artifacts, without copying it if the storage allows that.

On a local disk the file gets a second name (a hard link). The disk frees it when the last artifact that has it is removed,
so no reference counts are needed. In an object store, the store copies the file and nothing passes through this machine.
Files of artifacts are never modified in place, so neither artifact can change the other's file.
"""

import contextlib
import os
import uuid
from pathlib import Path

from readapt_ray.storage import Location


def share(source: Location, target: Location) -> None:
    """Make a file also available at `target`, replacing what is there. The source stays.

    On one local disk it is a hard link; inside one object store the store copies it; else it is copied through this
    machine.
    """
    if source.is_local and target.is_local:
        with contextlib.suppress(OSError):  # another disk, or one without links
            _link(source.local_path, target.local_path)
            return
    elif source.filesystem.equals(target.filesystem):
        with contextlib.suppress(OSError):  # more than 5 GiB, which S3 does not copy in one request
            source.filesystem.copy_file(source.path, target.path)
            return
    source.copy_to(target)


def _link(source: Path, target: Path) -> None:
    """Make a hard link under a temporary name and rename it, so that an existing target is replaced atomically."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".tmp-{uuid.uuid4().hex[:12]}-{target.name}")
    os.link(source, temporary)
    os.replace(temporary, target)
    temporary.unlink(missing_ok=True)  # os.replace keeps it if the target was already the same file
