"""Open the target that a URI names."""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from readapt_ray.config import meant
from readapt_ray.errors import InputError, ReadaptError, TargetError, first_line
from readapt_ray.filesystems import refuse_credentials
from readapt_ray.targets import addresses, files, lance, milvus, opensearch, pgvector, qdrant
from readapt_ray.targets.target import Target

_SHOWN = 400
"""Maximum number of characters of a client's error that are shown: some clients repeat everything that was sent."""


class Kind(NamedTuple):
    """A row of `TARGETS`: one kind of target, and how to open it."""

    make: Callable[[addresses.Address], Target]
    variables: str
    """Environment variables that hold the credentials."""
    example: str
    has_server: bool
    is_embedded: bool
    """Whether `SCHEME:FOLDER/NAME` is allowed: a database that runs inside the client, or plain files."""


TARGETS: dict[str, Kind] = {
    "qdrant": Kind(qdrant.QdrantTarget, qdrant.VARIABLES, "qdrant://HOST:6333/COLLECTION", True, True),
    "lancedb": Kind(lance.LanceTarget, lance.VARIABLES, "lancedb:FOLDER/TABLE", False, True),
    "postgresql": Kind(
        pgvector.PgvectorTarget, pgvector.VARIABLES, "postgresql://USER@HOST/DATABASE?table=TABLE", True, False
    ),
    "opensearch": Kind(opensearch.OpenSearchTarget, opensearch.VARIABLES, "opensearch://HOST:9200/INDEX", True, False),
    "milvus": Kind(milvus.MilvusTarget, milvus.VARIABLES, "milvus://HOST:19530/COLLECTION", True, True),
    "files": Kind(lambda address: files.FilesTarget(address.folder), files.VARIABLES, "files:FOLDER", False, True),
}
"""The kinds of targets, by URI scheme. README.md in this folder describes them."""


def parse(uri: str) -> addresses.Address:
    """Check the scheme of a target's URI, and parse it into its parts. Nothing is connected.

    Of `files:FOLDER` the folder is the whole path, and the name is empty.

    Raises:
        InputError: no target has this scheme, the URI holds credentials, or it lacks a part.
    """
    scheme, _, rest = uri.partition(":")
    kind = TARGETS.get(scheme)
    if kind is None:
        known = ", ".join(each.example for each in TARGETS.values())
        raise InputError(f"to = {uri!r} is no target; {meant(scheme, TARGETS) or f'give one of {known}'}")
    is_server = rest.startswith("//")
    if not rest or (is_server and not kind.has_server) or (not is_server and not kind.is_embedded):
        raise InputError(f"to = {uri!r} is no target; give {kind.example}")
    if scheme == "files":
        refuse_credentials(rest)
        return addresses.Address(scheme, "", folder=addresses.absolute(rest))
    return addresses.parse(uri, variables=kind.variables)


@contextlib.contextmanager
def open_target(address: addresses.Address) -> Iterator[Target]:
    """Open a target during the block, and close it after. The collection is not created.

    Every exception of the block that is not a ReadaptError becomes a `TargetError`: it may come from the client.

    Args:
        address: from `parse`; a scheme that `TARGETS` lacks raises a TargetError.

    Raises:
        InputError: the client is not installed, or the URI has an unknown option.
        TargetError: the database cannot be reached or refuses what was sent.
    """
    try:
        with contextlib.closing(TARGETS[address.scheme].make(address)) as target:
            yield target
    except ReadaptError:
        raise
    except Exception as error:
        raise TargetError(f"{address.uri}: {type(error).__name__}: {first_line(error)[:_SHOWN]}") from error
