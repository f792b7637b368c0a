"""Record which shards of vectors are written, with counts and times of each, so that a run can resume.

Each file of vectors is written whole, and its footer says what made it. `shards.parquet` (the ledger) beside them
repeats the footers, so that resuming takes one listing of the folder: only files that the ledger lacks are opened.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from readapt_ray import artifact_files
from readapt_ray.artifacts import Artifact
from readapt_ray.dead_rows import partly_name
from readapt_ray.errors import ArtifactConflictError, CorruptFileError
from readapt_ray.retrieval.footers import check_complete, map_in_threads, read_footers
from readapt_ray.retrieval.parquet_rows import ParquetRows
from readapt_ray.retrieval.shard_plan import DataShard, KeptFile, shard_name
from readapt_ray.retrieval.vector_files import read_footer
from readapt_ray.storage import Location

logger = logging.getLogger("readapt_ray")

LEDGER_NAME = "shards.parquet"
COUNTS = (
    "num_rows",
    "num_left_out",
    "num_bytes",
    "dimension",
    "num_encoded",
    "num_again",
    "num_copied",
    "num_tokens",
    "num_positions",
    "num_truncated",
    "num_lost",
    "num_dead",
)
"""Integer figures per file. num_copied: vectors taken from earlier ones; num_lost: tokens cut by truncation."""
SECONDS = ("encode_s", "wait_s")
"""Times per file: encoding, and waiting for input."""
_FIGURES = np.dtype([*((name, np.int64) for name in COUNTS), *((name, np.float64) for name in SECONDS)])
_SECONDS_KEY = b"seconds"
"""Times are kept in the metadata, so that two runs write equal rows."""
_ROWS_KEY = b"rows_per_shard"
_PLAN_KEY = b"plan"
_FILES = ("vectors/part-#.parquet", "vectors/part-#-partly.parquet", "vectors/_part-#-partly.dead", LEDGER_NAME)


class Origin(NamedTuple):
    """Where the vectors of a file come from: parts of the corpus, and perhaps an earlier file."""

    sources: tuple[str, ...]
    """Digests of the parts of the corpus that hold its passages; empty if unknown."""
    kept: str
    """Name that the file has in the earlier artifact that shares it; empty if the file was written anew."""


class ShardLedger:
    """The shards of a run, and the figures of those that are written.

    Call `begin`, then `find`: before that no shard counts as written. Memory: some 600 bytes per shard, twice that
    while saving.

    Args:
        shards: all shards of the run, numbered from 0.
        output: folder of the artifact.
        made_by: fingerprint of the encoder; a file made by another encoder counts as not written.
        rows_per_shard: passages per shard, stored for `begun_rows_per_shard`.
        plan: fingerprint of the plan that reuses earlier vectors; empty if it reuses none.
    """

    def __init__(
        self, shards: Sequence[DataShard], output: Location, *, made_by: str, rows_per_shard: int, plan: str = ""
    ) -> None:
        self.shards, self._plan = shards, plan
        self.figures: NDArray[Any] = np.zeros(len(shards), _FIGURES)
        self._output, self._made_by, self._rows_per_shard = output, made_by, rows_per_shard

    @property
    def pending(self) -> list[DataShard]:
        """Return the shards that are not written yet, as far as `find` and `record` know."""
        return [shard for shard in self.shards if not self.figures["num_bytes"][shard.number]]

    @property
    def num_vectors(self) -> int:
        """Return how many vectors are written, those of shared earlier files included."""
        return int(self.figures["num_rows"].sum())

    @property
    def num_done(self) -> int:
        """Return how many passages are done: with a vector written, or without a usable vector."""
        return self.num_vectors + int(self.figures["num_left_out"].sum())

    def begin(self, previous: str | None, *, may_clear: bool) -> None:
        """Store the plan before the first file is written. Nothing changes if the folder was begun with this plan.

        Under another plan, a file of the same number holds other passages, so files of another plan cannot be used.

        Args:
            previous: the earlier vectors, as the user named them; None without any. Used in the message.
            may_clear: remove files of another plan instead of refusing.

        Raises:
            ArtifactConflictError: there are files of another plan, and `may_clear` is False.
        """
        table = _read_ledger(self._output)
        begun = (table.schema.metadata or {}).get(_PLAN_KEY, b"").decode() if table is not None else ""
        if begun == self._plan:
            return
        if names := self._sizes():
            there = "on other earlier vectors, or these as they were then" if begun else "without --previous"
            if not may_clear:
                raise ArtifactConflictError(
                    f"{self._output} was begun {there}, and this run has previous = {previous!r}: {len(names):,} files hold other "
                    f"passages; resume it as it was begun, or add --overwrite to begin anew"
                )
            logger.warning("embed: %s was begun %s, and begins anew", self._output, there)
        artifact_files.clear(self._output, _FILES)
        self._write(np.zeros(0, np.int64))

    def find(self) -> None:
        """Load which shards are already written, with their figures, so that only the others are `pending`.

        It takes one listing, and opens the files that `shards.parquet` lacks. A file that is damaged, incomplete or of
        another encoder counts as not written.
        """
        sizes = self._sizes()
        self._load(sizes)
        unknown = [shard for shard in self.pending if shard.name in sizes]
        for shard, figures in zip(unknown, map_in_threads(self._read, unknown), strict=True):
            if figures is not None:
                self.record(shard.number, figures)

    def record(self, number: int, figures: Mapping[str, Any]) -> None:
        """Record the figures of a shard that is written, in memory only; `save` writes them.

        Args:
            number: number of the shard.
            figures: a value for each name in COUNTS and SECONDS.
        """
        self.figures[number] = tuple(figures[name] for name in _FIGURES.names or ())

    def save(self) -> None:
        """Write `shards.parquet` with the figures recorded so far, unless no shard is written yet."""
        numbers = np.flatnonzero(self.figures["num_bytes"])
        if len(numbers):
            self._write(numbers)

    def _write(self, numbers: NDArray[np.int64]) -> None:
        done = self.figures[numbers]
        shards = [self.shards[number] for number in numbers.tolist()]
        origins = {
            "sources": pa.array([list(each.sources) for each in shards], pa.list_(pa.string())),
            "kept": pa.array([each.kept.name if each.kept else "" for each in shards], pa.string()),
        }
        table = pa.table({"number": numbers, **{name: done[name] for name in COUNTS}, **origins})
        seconds = json.dumps({name: done[name].round(3).tolist() for name in SECONDS})
        said = {_SECONDS_KEY: seconds, b"encoder": self._made_by, _ROWS_KEY: str(self._rows_per_shard)}
        said |= {_PLAN_KEY: self._plan}
        with (self._output / LEDGER_NAME).open_output() as stream:
            pq.write_table(table.replace_schema_metadata(said), stream)

    def left_out(self) -> list[str]:
        """Return the doc_ids of passages without a usable vector. Only footers that name any are read."""
        files = [self._file(self.shards[number]) for number in np.flatnonzero(self.figures["num_left_out"]).tolist()]
        return [doc_id for footer in map_in_threads(read_footer, files) for doc_id in footer.left_out]

    def check_there(self) -> None:
        """Check that the file of every shard still exists. Takes one listing and opens no file.

        Raises:
            CorruptFileError: files that were written are gone.
        """
        sizes = self._sizes()
        lost = [shard.name for shard in self.shards if shard.name not in sizes]
        if lost:
            raise CorruptFileError(
                f"{len(lost)} files were written to {self._output / 'vectors'} and are not there, {lost[0]} first; see "
                f"what removes them, and run `readapt embed` again"
            )

    def _sizes(self) -> dict[str, int]:
        return {name: int(info.size) for name, info in (self._output / "vectors").listing(".parquet")}

    def _load(self, sizes: Mapping[str, int]) -> None:
        """Load the rows of `shards.parquet` that the listing confirms: the file has that name and size."""
        table = _read_ledger(self._output)
        said = (table.schema.metadata or {}) if table is not None else {}
        if table is None or said.get(b"encoder") != self._made_by.encode():
            return
        columns = _counts_of(table)
        columns |= {name: np.array(values) for name, values in json.loads(said[_SECONDS_KEY]).items()}
        for index, number in enumerate(table["number"].to_pylist()):
            figures = {name: values[index] for name, values in columns.items()}
            if number < len(self.shards) and self._confirms(self.shards[number], figures, sizes):
                self.record(number, figures)

    def _confirms(self, shard: DataShard, figures: Mapping[str, Any], sizes: Mapping[str, int]) -> bool:
        is_whole = len(shard) == figures["num_rows"] + figures["num_left_out"]
        return bool(is_whole and sizes.get(shard.name) == figures["num_bytes"])

    def _read(self, shard: DataShard) -> dict[str, Any] | None:
        figures = read_figures(self._file(shard), num_rows=len(shard), made_by=self._made_by)
        return figures and shared_figures(shard.kept, figures["dimension"]) if shard.kept else figures

    def _file(self, shard: DataShard) -> Location:
        return self._output / "vectors" / shard.name


def open_vectors(artifact: Artifact) -> ParquetRows:
    """Open the vectors that `embed` wrote; check that one encoder made them all and that none is missing.

    A file is not opened if `shards.parquet` and the listing agree on its size.

    Raises:
        CorruptFileError: a file was cut short or altered, is gone, or was made by another encoder than the manifest
            says.
    """
    folder, encoder = artifact.location / "vectors", artifact.manifest.details["encoder"]
    sizes = {name: int(info.size) for name, info in folder.listing(".parquet")}
    counts: dict[str, int] = {}
    table = _read_ledger(artifact.location)
    if table is not None and (table.schema.metadata or {}).get(b"encoder") == encoder["fingerprint"].encode():
        for name, figures in _by_name(table):
            if sizes.get(name) == figures["num_bytes"] and figures["dimension"] == encoder["dimension"]:
                counts[name] = figures["num_rows"]
    unknown = [name for name in sizes if name not in counts]
    for name, footer in zip(unknown, read_footers(folder, unknown), strict=True):
        made_by = footer.metadata.get("encoder", {}).get("fingerprint")
        if made_by != encoder["fingerprint"] or footer.dimension != encoder["dimension"]:
            raise CorruptFileError(
                f"{folder / name} was made by another encoder ({made_by}) than its manifest says "
                f"({encoder['fingerprint']}); remove that folder and run `readapt embed` again"
            )
        counts[name] = footer.num_rows
    vectors = ParquetRows(folder, tuple((name, counts[name]) for name in sizes))
    check_complete(artifact, vectors.num_rows, "vectors")
    return vectors


def file_counts(artifact: Location) -> dict[str, dict[str, int]]:
    """Return the counts of each file of vectors, by file name, from `shards.parquet`; empty if it cannot be read.

    The names of the counts are in COUNTS.
    """
    return counts_and_origins(artifact)[0]


def counts_and_origins(artifact: Location) -> tuple[dict[str, dict[str, int]], dict[str, Origin]]:
    """Return counts and origin of each file of vectors, by file name, from `shards.parquet`.

    Both are empty if it cannot be read; origins are empty if an older release wrote it.
    """
    table = _read_ledger(artifact)
    if table is None:
        return {}, {}
    counts = dict(_by_name(table))
    if "sources" not in table.column_names:  # written by an older release
        return counts, {}
    pairs = zip(table["sources"].to_pylist(), table["kept"].to_pylist(), strict=True)
    return counts, {name: Origin(tuple(sources), kept) for name, (sources, kept) in zip(counts, pairs, strict=True)}


def shared_files(artifact: Location) -> frozenset[str]:
    """Return the names of the vector files whose vectors were all copied from `previous`, so none was encoded.

    `previous` is the earlier artifact that `readapt embed` was given. All passages of such a file are unchanged, so a
    refresh samples unchanged passages from it. Read from `shards.parquet`; empty if that cannot be read.

    Args:
        artifact: output folder of embed.
    """
    return frozenset(
        name for name, figures in file_counts(artifact).items() if figures["num_copied"] == figures["num_rows"]
    )


def write_compacted(source: Location, target: Location) -> int:
    """Write the ledger of a compacted artifact, whose files are copies without dead rows; return their total bytes.

    Without a ledger in `source`, none is written.

    Args:
        source: the artifact before.
        target: the compacted artifact, whose files of vectors are already written.
    """
    table = _read_ledger(source)
    sizes = {name: int(info.size) for name, info in (target / "vectors").listing(".parquet")}
    if table is not None:
        counts = _counts_of(table)
        names = [shard_name(number) for number in table["number"].to_pylist()]
        counts |= {"num_bytes": np.array([sizes[name] for name in names]), "num_dead": 0 * counts["num_dead"]}
        written = pa.table({"number": table["number"], **counts})
        if "sources" in table.column_names:
            written = written.append_column("sources", table["sources"])
            written = written.append_column("kept", pa.array([""] * len(names), pa.string()))
        written = written.replace_schema_metadata(table.schema.metadata)
        with (target / LEDGER_NAME).open_output() as stream:
            pq.write_table(written, stream)
    return sum(sizes.values())


def _by_name(table: pa.Table) -> Iterator[tuple[str, dict[str, int]]]:
    """Yield name and counts of each file that is written."""
    columns = {name: values.tolist() for name, values in _counts_of(table).items()}
    for row, number in enumerate(table["number"].to_pylist()):
        figures = {name: values[row] for name, values in columns.items()}
        name = shard_name(number)
        yield partly_name(name) if figures["num_dead"] else name, figures


def _counts_of(table: pa.Table) -> dict[str, NDArray[np.int64]]:
    """Return the counts of a ledger; zeros for counts that an older release did not store."""
    none = np.zeros(table.num_rows, np.int64)
    return {name: table[name].to_numpy() if name in table.column_names else none for name in COUNTS}


def shared_figures(kept: KeptFile, dimension: int) -> dict[str, Any]:
    """Return the figures of a shard that shares an earlier file, so that nothing was encoded.

    Args:
        kept: the earlier file.
        dimension: numbers in a vector.
    """
    figures = dict.fromkeys(COUNTS, 0) | dict.fromkeys(SECONDS, 0.0)
    figures |= {name: getattr(kept, name) for name in ("num_rows", "num_bytes", "num_dead")}
    return figures | {"num_copied": kept.num_rows, "dimension": dimension}


def read_figures(file: Location, *, num_rows: int, made_by: str) -> dict[str, Any] | None:
    """Read the figures of a shard from its file; None if it is damaged, incomplete, or of another encoder.

    A warning is logged for a damaged file.

    Args:
        file: the file of vectors.
        num_rows: passages of the shard, with those without a usable vector.
        made_by: fingerprint of the encoder.
    """
    try:
        footer = read_footer(file)
    except CorruptFileError as error:
        logger.warning("%s; it is computed again", error)
        return None
    is_ours = footer.metadata.get("encoder", {}).get("fingerprint") == made_by
    if not is_ours or footer.num_rows + len(footer.left_out) != num_rows:
        return None
    figures: dict[str, Any] = {name: int(footer.metadata.get(name, 0)) for name in COUNTS}
    figures |= {name: float(footer.metadata.get(name, 0)) for name in SECONDS}
    figures |= {"num_rows": footer.num_rows, "num_left_out": len(footer.left_out), "num_dead": footer.num_dead}
    return figures | {"num_bytes": footer.num_bytes, "dimension": footer.dimension}


def begun_rows_per_shard(output: Location) -> int | None:
    """Return the passages per shard that an earlier run into this folder used; None if it left no ledger."""
    table = _read_ledger(output)
    return int(table.schema.metadata[_ROWS_KEY]) if table is not None else None


def _read_ledger(output: Location) -> pa.Table | None:
    """Read `shards.parquet`; None if it is missing or damaged, since the footers say the same."""
    try:
        with (output / LEDGER_NAME).open_input() as stream:
            return pq.read_table(stream)
    except (FileNotFoundError, pa.ArrowInvalid):
        return None
