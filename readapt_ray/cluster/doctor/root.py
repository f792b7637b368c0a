"""Check that every node can read and write the folder for all artifacts, and that it is the same folder."""

import time
import uuid

from readapt_ray.cluster.doctor import disks
from readapt_ray.cluster.doctor.findings import Finding, Problem, failed
from readapt_ray.errors import first_line
from readapt_ray.storage import Location

PROBE = ".seen-"
_CONTENT = b"readapt doctor\n"


class Probe:
    """A file that the driver writes into the root and every node should see. It is removed with the folders made for
    it.
    """

    def __init__(self, root: Location) -> None:
        self.root = root
        self._file = root / f"{PROBE}{uuid.uuid4().hex}"
        self._made: list[Location] = []
        self.name: str | None = None
        """Of the file; None until it is written."""

    def place(self) -> Finding:
        """Write the file.

        Raises:
            StorageError: the folder cannot be written.
        """
        self._made = _missing_folders(self.root)
        finding = check_root(self.root, None)
        if not finding.problems:
            self._file.write_bytes(_CONTENT)
            self.name = self._file.name
        return finding

    def remove(self) -> None:
        """Remove the file, and what was made for it."""
        if self.name is not None:
            self._file.delete()
        for folder in self._made:
            folder.remove_if_empty()


def check_root(root: Location, probe_name: str | None) -> Finding:
    """Look whether a folder can be used, and whether its disk has room.

    Args:
        root: the folder.
        probe_name: of a file that another node has written there; None for none.

    Raises:
        StorageError: the folder cannot be written.
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
    """Write a file, read, list and delete it, and return what is wrong. Folders that had to be made are removed again.

    Raises:
        StorageError: the folder cannot be written.
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
    """Return the folders that writing to a local root would make, the innermost first."""
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
