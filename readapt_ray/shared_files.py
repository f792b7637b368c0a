"""Let an artifact hold a file of its predecessor without a second copy, where the storage can do that.

On a local disk the file gets a second name (a hard link), so its bytes go when the last artifact that names it goes; no
list of who refers to what is needed. Inside an object store it is copied by the store, and nothing passes this machine.
Files of artifacts are never changed in place, so nothing that happens to one name shows under the other.
"""

import contextlib
import os
import uuid
from pathlib import Path

from readapt_ray.storage import Location


def share(source: Location, target: Location) -> None:
    """Put a file under another name, too; it is copied through this machine where nothing else works."""
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
    """Link by a temporary name, so that an existing target is replaced at once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".tmp-{uuid.uuid4().hex[:12]}-{target.name}")
    os.link(source, temporary)
    os.replace(temporary, target)
    temporary.unlink(missing_ok=True)  # it stays where the target was the same file already
