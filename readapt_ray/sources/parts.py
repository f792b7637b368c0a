"""Write passages to numbered Parquet parts. Each part is written atomically.

The parts depend only on the sequence of passages. So if a killed process already wrote a part, it is compared and kept. With
the parts of an earlier corpus, new parts begin with the same passages where possible, and a part with the same rows is
shared, not written. At most one part is in memory: `rows_per_file` rows (1.5 times as many with earlier parts), or 256 MB
of text.
"""

import bisect
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from readapt_ray.records import PASSAGE_SCHEMA, Passage, content_hash
from readapt_ray.shared_files import share
from readapt_ray.storage import Location

ROW_GROUP_ROWS = 4096
_ROW_GROUP_BYTES = 32 << 20
_PART_BYTES = 256 << 20


METADATA_KEY = b"readapt"
FIRST_ID, DIGEST = "first_doc_id", "rows_digest"


class EarlierPart(NamedTuple):
    """A part of an earlier corpus, which may be shared."""

    file: Location
    digest: str
    """Digest of its rows. Parts with equal digests have the same rows."""


class PartWriter:
    """Writes passages, added one by one, to Parquet parts. `num_rows` is the number of added passages."""

    def __init__(
        self,
        folder: Location,
        *,
        rows_per_file: int,
        prefix: str = "",
        kept: pa.Schema | None = None,
        earlier: Mapping[str, EarlierPart] | None = None,
    ) -> None:
        """Make a writer that has written no part yet.

        Args:
            folder: folder of the parts.
            rows_per_file: number of passages per part.
            prefix: digits in front of the part's number in its name, so that several writers can share a folder.
            kept: schema of the kept columns, which follow the columns of every passage. None means there are none.
            earlier: parts of an earlier corpus, by the doc_id of their first passage. None or empty: nothing is shared.
        """
        self._earlier = earlier or {}
        self._most_rows = rows_per_file + (rows_per_file // 2 if self._earlier else 0)
        self._schema = passage_schema(kept)
        self._name = re.compile(rf"part-{prefix}(\d{{5,}})\.parquet")
        self._prefix = prefix
        self.num_rows = 0
        self.shared: dict[str, str] = {}
        """Shared parts: the name of the earlier part, by its new name."""
        self._folder, self._rows_per_file = folder, rows_per_file
        self._group: list[Passage] = []
        self._hashes: list[bytes] = []
        self._group_bytes = 0
        self._groups: list[pa.Table] = []
        self._part_bytes = 0
        self._starts = [0]

    def add(self, passage: Passage, num_bytes: int) -> bytes:
        """Add a passage, and return the hash of its title and text. This writes a part when one is full.

        Args:
            passage: the next passage. Its `columns` are stored in the kept columns; missing ones become null.
            num_bytes: the size of title and text in UTF-8.
        """
        if passage.doc_id in self._earlier and self.num_rows - self._starts[-1] >= max(1, self._rows_per_file // 2):
            self._close_part()
        hashed = content_hash(passage.title, passage.text)
        self._group.append(passage)
        self._hashes.append(hashed)
        self._group_bytes += num_bytes
        self.num_rows += 1
        if len(self._group) == ROW_GROUP_ROWS or self._group_bytes >= _ROW_GROUP_BYTES:
            self._close_group()
        if self.num_rows - self._starts[-1] == self._most_rows or self._part_bytes >= _PART_BYTES:
            self._close_part()
        return hashed

    def close(self) -> None:
        """Write the last part, and delete parts with higher numbers, which an earlier run has left. Call it once."""
        if self.num_rows > self._starts[-1]:
            self._close_part()
        self.remove_behind(len(self._starts) - 1)

    def remove_behind(self, num_parts: int) -> None:
        """Delete the part files numbered `num_parts` and above, left by an earlier run, of this writer's prefix."""
        for name, _ in self._folder.listing(".parquet"):
            found = self._name.fullmatch(name)
            if found and int(found[1]) >= num_parts:
                (self._folder / name).delete()

    def share(self, part: Location, number: int) -> str:
        """Share an unchanged earlier part under a new number, and return its new name. An existing part is replaced."""
        target = self._file(number)
        share(part, target)
        return target.name

    def doc_ids(self, rows: Iterable[int]) -> dict[int, str]:
        """Return the doc_ids of some rows, which are counted from 0 over all parts. Call it after `close`."""
        by_part: dict[int, list[int]] = {}
        for row in set(rows):
            by_part.setdefault(bisect.bisect_right(self._starts, row) - 1, []).append(row)
        found = {}
        for part, wanted in by_part.items():
            with self._file(part).open_input() as file:
                column = pq.read_table(file, columns=["doc_id"])["doc_id"]
            found.update({row: column[row - self._starts[part]].as_py() for row in wanted})
        return found

    def rows_by_file(self) -> dict[str, int]:
        """Return the number of rows of each part, by its name. Call it after `close`."""
        ends = zip(self._starts, self._starts[1:], strict=False)
        return {self._file(part).name: end - start for part, (start, end) in enumerate(ends)}

    def _file(self, part: int) -> Location:
        return self._folder / f"part-{self._prefix}{part:05d}.parquet"

    def _close_group(self) -> None:
        self._groups.append(passage_table(self._group, self._hashes, self._schema))
        self._part_bytes += self._group_bytes
        self._group, self._hashes, self._group_bytes = [], [], 0

    def _close_part(self) -> None:
        if self._group:
            self._close_group()
        target = self._file(len(self._starts) - 1)
        if not _holds(target, self._groups):
            self._write(target)
        self._starts.append(self.num_rows)
        self._groups, self._part_bytes = [], 0

    def _write(self, target: Location) -> None:
        """Share the earlier part with the same rows if there is one; else write the rows."""
        first, digest = self._groups[0]["doc_id"][0].as_py(), _digest(self._groups)
        if first in self._earlier and self._earlier[first].digest == digest:
            share(self._earlier[first].file, target)
            self.shared[target.name] = self._earlier[first].file.name
            return
        schema = self._schema.with_metadata({METADATA_KEY: json.dumps({FIRST_ID: first, DIGEST: digest})})
        with target.open_output() as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
            for group in self._groups:
                writer.write_table(group)


def _digest(groups: Iterable[pa.Table]) -> str:
    """Return a digest of the rows of a part. Texts are represented by their content hashes."""
    found = hashlib.blake2b(digest_size=16)
    for group in groups:
        stream = pa.BufferOutputStream()
        with pa.ipc.new_stream(stream, group.drop_columns(["text"]).schema) as writer:
            writer.write_table(group.drop_columns(["text"]))
        found.update(stream.getvalue())
    return found.hexdigest()


def passage_schema(kept: pa.Schema | None = None) -> pa.Schema:
    """Return the Arrow schema of passages, followed by the kept columns."""
    return pa.schema([*PASSAGE_SCHEMA, *(kept or ())])


def passage_table(passages: list[Passage], hashes: list[bytes], schema: pa.Schema = PASSAGE_SCHEMA) -> pa.Table:
    """Return passages as an Arrow table, in the same order.

    Args:
        passages: the passages. A kept column that a passage lacks is null.
        hashes: the content hash (16 bytes) of each passage.
        schema: the schema of `passage_schema`, with kept columns.
    """
    own = [[passage[number] for passage in passages] for number in range(len(PASSAGE_SCHEMA) - 1)]
    kept = [[(passage.columns or {}).get(name) for passage in passages] for name in schema.names[len(PASSAGE_SCHEMA) :]]
    arrays = [pa.array(column, field.type) for column, field in zip([*own, hashes, *kept], schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)


def _holds(file: Location, groups: list[pa.Table]) -> bool:
    """Return whether a file exists and has exactly these row groups."""
    if not file.exists():
        return False
    try:
        with file.open_input() as stream, pq.ParquetFile(stream) as parquet:
            return parquet.num_row_groups == len(groups) and all(
                parquet.read_row_group(number).equals(group) for number, group in enumerate(groups)
            )
    except (pa.ArrowException, OSError):
        return False
