"""Follow `readapt embed` while it runs: read the files of vectors that it writes, and move passages to these vectors.

In: the output folder of `embed`, finished or still running. A file appears there only when it is complete. Out: moves
in a slice of an index (`serving/moving_slice.py`). The folder is listed every five seconds. Of each new file the
doc_ids are read, and the vectors only if some of the passages are in the slice. A file that is damaged, gone or made by
another encoder is logged once and tried again later; until then its passages are searched by their old vectors.
"""

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pyarrow as pa
from ray.util.metrics import Gauge

from readapt_ray.artifact_files import LEASE_NAME, MANIFEST_NAME
from readapt_ray.artifacts import open_artifact
from readapt_ray.damage import READ_ERRORS
from readapt_ray.errors import (
    ArtifactMissingError,
    CorruptFileError,
    FingerprintMismatchError,
    InputError,
    ReadaptError,
    first_line,
)
from readapt_ray.retrieval.bridge import Bridge
from readapt_ray.retrieval.parquet_rows import read_rows
from readapt_ray.retrieval.shard_plan import packed_hashes
from readapt_ray.retrieval.vector_files import VECTOR_COLUMNS, matrix_of, read_footer
from readapt_ray.retrieval.vector_index import VectorIndex
from readapt_ray.serving.index_slice import IndexSlice, gives_exact_vectors
from readapt_ray.serving.moving_slice import Located, MovingSlice
from readapt_ray.serving.options import VersionConfig
from readapt_ray.serving.version_spec import VersionSpec
from readapt_ray.storage import Location

logger = logging.getLogger("ray.serve")

POLL_S = 5.0
CHUNK_ROWS = 16_384
"""Number of vectors that are read and moved at once."""
_LONGEST_PAUSE_S = 600.0

R = TypeVar("R")
_State = tuple[int | None, int | None]


def check_new_vectors(name: str, config: VersionConfig) -> None:
    """Check that the passages of a version can move to the vectors in `new_vectors`; without that option, do nothing.

    Vectors of another corpus are only logged: passages with the same doc_id and content move.

    Raises:
        InputError: the version has no index or no bridge, or the bridge is of an older release.
        ArtifactMissingError: the folder has no vectors, and no `embed` writes any.
        FingerprintMismatchError: the vectors are made by another encoder than the bridge is for.
    """
    if not config.new_vectors:
        return
    if not (config.bridge and config.index):
        raise InputError(
            f"version {name!r} has new_vectors and no {'index' if config.bridge else 'bridge'}; give the index of the old "
            f"vectors and the bridge from {config.retriever!r} to them, or serve an index of the new vectors alone"
        )
    bridge, output = Bridge.open(config.bridge), Location(config.new_vectors)
    bridge.check_calibrated()
    expected = bridge.new_encoder
    if (output / MANIFEST_NAME).is_file():
        made = open_artifact(config.new_vectors, "embed")
        there = made.manifest.details["encoder"]["fingerprint"]
        if made.manifest.inputs["corpus"] != bridge.artifact.manifest.inputs.get("corpus"):
            logger.warning(
                "%s has the vectors of another corpus than the index of version %s: only passages of the same doc_id and "
                "content move",
                config.new_vectors,
                name,
            )
    else:
        files = (output / "vectors").files(".parquet")
        if not files and not (output / LEASE_NAME).is_file():
            raise ArtifactMissingError(
                f"new_vectors = {config.new_vectors!r} has no vectors, and nothing writes any there; start `readapt embed "
                f"--retriever {config.retriever} --output {config.new_vectors}` first"
            )
        there = _encoder_of(files)
    if there not in (None, expected["fingerprint"]):
        raise FingerprintMismatchError(
            f"new_vectors = {config.new_vectors!r} has vectors of another encoder ({there}) than the bridge "
            f"{config.bridge!r} is for ({expected['fingerprint']}, {expected['model']!r}); give what `readapt embed --retriever "
            f"{config.retriever}` writes, with the same encoding and dtype"
        )


def _encoder_of(files: Sequence[Location]) -> str | None:
    """Return the encoder's fingerprint in the first file that can be read; None if there is no such file."""
    for file in files:
        with contextlib.suppress(CorruptFileError):
            return str(read_footer(file).metadata.get("encoder", {}).get("fingerprint"))
    return None


def vector_factory(index: VectorIndex) -> str:
    """Return the FAISS factory string for new vectors: Flat (float32) if the index holds exact vectors, else SQfp16."""
    return "Flat" if all(gives_exact_vectors(each.factory) for each in index.records) else "SQfp16"


def follow(
    base: IndexSlice, spec: VersionSpec, index: VectorIndex, number: int, compute: Callable[..., Any]
) -> tuple[MovingSlice, "Follower"]:
    """Return a slice with all new vectors that exist by now, and the follower that adds later ones in its thread.

    Args:
        base: the slice with the old vectors.
        spec: specification of the version.
        index: the whole index.
        number: number of the slice, for its name in log and metrics.
        compute: runs a function between two searches, and waits for its result.

    Raises:
        FingerprintMismatchError: the bridge is not the one that the version was set up with.
    """
    bridge = Bridge.open(str(spec.bridge))
    if bridge.artifact.fingerprint != spec.bridge_fingerprint:
        raise FingerprintMismatchError(f"bridge {spec.bridge!r} is not the one that this version was set up with")
    moving = MovingSlice(base, bridge, vector_factory(index))
    follower = Follower(
        moving,
        Location(str(spec.new_vectors)) / "vectors",
        encoder=bridge.new_encoder,
        compute=compute,
        version=spec.name,
        part=f"index-{number}",
    )
    follower.poll()
    follower.start()
    return moving, follower


@dataclass
class _Failure:
    message: str
    pause_s: float = POLL_S
    until_s: float = field(default_factory=time.monotonic)


class Follower:
    """Watches a folder, and moves the passages of a slice as files of vectors appear in it.

    Args:
        moving: the slice.
        folder: folder with the files of vectors.
        encoder: `fingerprint` and `dimension` of the encoder that must have made the vectors.
        compute: runs a function between two searches, and waits for its result.
        version: name of the version, for log and metrics.
        part: name of the slice, for log and metrics.
    """

    def __init__(
        self,
        moving: MovingSlice,
        folder: Location,
        *,
        encoder: Mapping[str, Any],
        compute: Callable[..., Any],
        version: str,
        part: str,
    ) -> None:
        self._moving, self._folder, self._encoder, self._compute = moving, folder, encoder, compute
        self._who, self._tags = f"{part} of {version}", {"version": version, "part": part}
        self._listed: dict[str, _State] = {}
        self._done: dict[str, _State] = {}
        self._failures: dict[str, _Failure] = {}
        self._share = Gauge(
            "readapt_reembedded_share", "Share of passages that are searched by their new vectors.", ("version", "part")
        )
        self._stopped = threading.Event()

    def start(self) -> None:
        """Start a daemon thread that polls every five seconds, until all passages have moved or `stop` is called."""
        threading.Thread(target=self._run, name="new-vectors", daemon=True).start()

    def stop(self) -> None:
        """Stop polling; a poll in progress still ends."""
        self._stopped.set()

    def _run(self) -> None:
        while self._moving.num_reembedded < self._moving.num_vectors and not self._stopped.wait(POLL_S):
            self.poll()

    def poll(self) -> None:
        """Read the files that are new or changed, and move their passages; log failures and try them again later.

        It blocks until all these files are read, and updates the metric `readapt_reembedded_share`.
        """
        before, files = self._moving.num_reembedded, 0
        for name in self._attempt("", self._new_or_changed) or ():
            files += bool(self._attempt(name, functools.partial(self._take, name)))
        num_moved, size = self._moving.num_reembedded, self._moving.num_vectors
        self._share.set(num_moved / max(1, size), self._tags)
        if num_moved > before:
            logger.info(
                "%s: %s files of new vectors taken; %s of %s passages (%.0f%%) are searched by them",
                self._who,
                f"{files:,}",
                f"{num_moved:,}",
                f"{size:,}",
                100 * num_moved / size,
            )

    def _attempt(self, name: str, work: Callable[[], R]) -> R | None:
        """Do `work` for a file; return None if it failed. A failure is logged once, and retried after longer pauses."""
        try:
            done = work()
        except (ReadaptError, *READ_ERRORS) as error:
            failure = self._failures.setdefault(name, _Failure(""))
            if failure.message != (message := first_line(error)):
                logger.warning(
                    "%s: %s is not taken: %s", self._who, self._folder / name if name else self._folder, message
                )
            failure.message, failure.pause_s = message, min(2 * failure.pause_s, _LONGEST_PAUSE_S)
            failure.until_s = time.monotonic() + (failure.pause_s if name else 0)
            return None
        self._failures.pop(name, None)
        return done

    def _new_or_changed(self) -> list[str]:
        """List the folder, and return the files that are new or changed and may be tried now."""
        self._listed = {name: (info.size, info.mtime_ns) for name, info in self._folder.listing(".parquet")}
        return [name for name, state in self._listed.items() if self._done.get(name) != state and self._may_try(name)]

    def _may_try(self, name: str) -> bool:
        return name not in self._failures or time.monotonic() >= self._failures[name].until_s

    def _take(self, name: str) -> bool:
        """Move the passages of a file that are in this slice; return whether any are."""
        file = self._folder / name
        footer = read_footer(file)
        made_by = footer.metadata.get("encoder", {}).get("fingerprint")
        if (made_by, footer.dimension) != (self._encoder["fingerprint"], self._encoder["dimension"]):
            raise FingerprintMismatchError(
                f"it was made by another encoder ({made_by}, {footer.dimension} numbers) than this version's "
                f"({self._encoder['fingerprint']}, {self._encoder['dimension']})"
            )
        ids = read_rows(file, 0, footer.num_rows, ("doc_id", "content_hash"))
        hashes = packed_hashes(ids["content_hash"].to_pylist()) if "content_hash" in ids.column_names else b""
        located, num_changed = self._moving.locate(_whole(ids["doc_id"]), hashes)
        if num_changed:
            logger.warning(
                "%s: %s has %s passages whose content in the index is another; they are searched by their old vectors",
                self._who,
                file,
                f"{num_changed:,}",
            )
        for moves in self._moves(file, footer.num_rows, located):
            self._compute(self._moving.move, moves)
        self._done[name] = self._listed[name]
        return bool(located)

    def _moves(self, file: Location, num_rows: int, located: list[Located]) -> Iterator[Any]:
        for first in range(0, num_rows, CHUNK_ROWS):
            end = min(first + CHUNK_ROWS, num_rows)
            mine = [each for each in (each.within(first, end) for each in located) if len(each.rows)]
            if mine:
                _, vectors = matrix_of(read_rows(file, first, end - first, VECTOR_COLUMNS), file)
                yield self._moving.prepare(mine, vectors)


def _whole(column: pa.ChunkedArray) -> pa.Array:
    """Return a column as one array."""
    joined = column.combine_chunks()
    return joined.chunk(0) if isinstance(joined, pa.ChunkedArray) else joined
