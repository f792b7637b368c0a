"""Check that every node can read and write the folder of all artifacts, and that all nodes see the same folder."""

import time
import uuid

from readapt_ray.cluster.doctor import disks
from readapt_ray.cluster.doctor.findings import Finding, Problem, failed
from readapt_ray.errors import first_line
from readapt_ray.storage import Location

PROBE = ".seen-"
_CONTENT = b"readapt doctor\n"


class Probe:
    """A file that the driver writes into the root, and that every node should see.

    Args:
        root: folder of all artifacts.
    """

    def __init__(self, root: Location) -> None:
        self.root = root
        self._file = root / f"{PROBE}{uuid.uuid4().hex}"
        self._made: list[Location] = []
        self.name: str | None = None
        """Name of the file; None until it is written."""

    def place(self) -> Finding:
        """Check the root and write the file into it, unless the check finds a problem; return the finding.

        Raises:
            StorageError: the disk is full, or the folder may not be written.
        """
        self._made = _missing_folders(self.root)
        finding = check_root(self.root, None)
        if not finding.problems:
            self._file.write_bytes(_CONTENT)
            self.name = self._file.name
        return finding

    def remove(self) -> None:
        """Remove the file if it was written, and the folders that were created for it if they are empty."""
        if self.name is not None:
            self._file.delete()
        for folder in self._made:
            folder.remove_if_empty()


def check_root(root: Location, probe_name: str | None) -> Finding:
    """Check that a folder can be written, read and listed, and that the disk of a local folder has free space.

    A small file is written, read and deleted; folders that are made for it are removed again, so the folder need not
    exist. All other failures than the errors below, also low space and a missing probe, are problems of the returned
    finding.

    Args:
        root: folder or URI of all artifacts.
        probe_name: name of a file that the driver wrote there, to check that this node sees the same folder; None to
            skip that.

    Raises:
        StorageError: the disk is full, or the folder may not be written.
    """
    started_s = time.monotonic()
    if probe_name is not None and not (root / probe_name).is_file():
        return failed(
            f"{root} is not on a disk that all nodes share: this one does not see what the driver wrote; give a URI (s3://, "
            f"gs://), or a folder of a shared filesystem that is mounted here"
        )
    if wrong := why_unusable(root):
        return failed(wrong)
    space: tuple[Problem, ...] = ()
    if root.is_local:  # the folder itself may not be there
        path = root.local_path.absolute()
        space = disks.space_problems(next(each for each in (path, *path.parents) if each.is_dir()))
    return Finding(f"ok, {time.monotonic() - started_s:.1f} s", space)


def why_unusable(root: Location) -> str:
    """Test a folder by writing, reading, listing and deleting a file; return what is wrong, or an empty text.

    Folders that had to be created are removed again.

    Raises:
        StorageError: the disk is full, or the folder may not be written. Other errors of the filesystem are returned.
    """
    made = _missing_folders(root)
    file = root / f"{PROBE}{uuid.uuid4().hex}"
    try:
        file.write_bytes(_CONTENT)
        is_read = file.read_bytes() == _CONTENT
        is_listed = file.name in root.children()[0]
        file.delete()
    except OSError as error:
        return f"{root} cannot be used: {first_line(error)}; {_advice(root)}"
    finally:
        for folder in made:
            folder.remove_if_empty()
    if not (is_read and is_listed):
        return f"{root} does not give back what was written; use a filesystem that shows new files at once"
    return ""


def _missing_folders(root: Location) -> list[Location]:
    """Return the folders that a write to a local root would create, innermost first."""
    if not root.is_local:
        return []
    path = root.local_path
    return [Location(str(each)) for each in (path, *path.parents) if not each.exists()]


def _advice(root: Location) -> str:
    if root.is_local:
        return "give a folder that this user may read and write"
    return (
        "check the name of the bucket, and give the nodes' role (or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY) the right to "
        "list, read, write and delete there"
    )
