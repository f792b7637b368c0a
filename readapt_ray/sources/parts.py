"""Passages into numbered Parquet parts, each written whole or not at all.

A part is a pure function of the passages before it, so a part that an earlier process wrote is
compared and kept, and the writer continues after it. With parts of an earlier corpus, parts begin where those do, and one of
the same rows is shared with it instead of written. At most one part is in memory: `rows_per_file` rows, half as many again
with earlier parts, or 256 MB of text.
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
    """A part of an earlier corpus."""

    file: Location
    digest: str
    """Stands for its rows."""


class PartWriter:
    """Takes passages one by one. `num_rows` is how many it took."""

    def __init__(
        self,
        folder: Location,
        *,
        rows_per_file: int,
        prefix: str = "",
        kept: pa.Schema | None = None,
        earlier: Mapping[str, EarlierPart] | None = None,
    ) -> None:
        """Begin with no part.

        Args:
            folder: of the parts.
            rows_per_file: passages per part.
            prefix: comes before the numbers of the parts, in digits.
            kept: columns after a passage's own.
            earlier: parts of an earlier corpus by the doc_id of their first passage.
        """
        self._earlier = earlier or {}
        self._most_rows = rows_per_file + (rows_per_file // 2 if self._earlier else 0)
        self._schema = passage_schema(kept)
        self._name = re.compile(rf"part-{prefix}(\d{{5,}})\.parquet")
        self._prefix = prefix
        self.num_rows = 0
        self.shared: dict[str, str] = {}
        """Names of the earlier parts that are shared, by their names here."""
        self._folder, self._rows_per_file = folder, rows_per_file
        self._group: list[Passage] = []
        self._hashes: list[bytes] = []
        self._group_bytes = 0
        self._groups: list[pa.Table] = []
        self._part_bytes = 0
        self._starts = [0]

    def add(self, passage: Passage, num_bytes: int) -> bytes:
        """Take one passage of so many bytes; return the hash of its title and text."""
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
        """Write what is left. Parts behind the last, which only another stream could have left, go."""
        if self.num_rows > self._starts[-1]:
            self._close_part()
        self.remove_behind(len(self._starts) - 1)

    def remove_behind(self, num_parts: int) -> None:
        """Remove the parts behind so many."""
        for name, _ in self._folder.listing(".parquet"):
            found = self._name.fullmatch(name)
            if found and int(found[1]) >= num_parts:
                (self._folder / name).delete()

    def share(self, part: Location, number: int) -> str:
        """Share an earlier part as it is, under a number; return its name."""
        target = self._file(number)
        share(part, target)
        return target.name

    def doc_ids(self, rows: Iterable[int]) -> dict[int, str]:
        """Return the ids of some rows, counted from 0 over all parts; after `close`."""
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
        """Return how many rows each part has, by its name; after `close`."""
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
        """Share the earlier part that has these rows, or write them."""
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
    """Return the rows of a part with hashes in place of their texts."""
    found = hashlib.blake2b(digest_size=16)
    for group in groups:
        stream = pa.BufferOutputStream()
        with pa.ipc.new_stream(stream, group.drop_columns(["text"]).schema) as writer:
            writer.write_table(group.drop_columns(["text"]))
        found.update(stream.getvalue())
    return found.hexdigest()


def passage_schema(kept: pa.Schema | None = None) -> pa.Schema:
    """Return the columns of passages, with those that are kept behind them."""
    return pa.schema([*PASSAGE_SCHEMA, *(kept or ())])


def passage_table(passages: list[Passage], hashes: list[bytes], schema: pa.Schema = PASSAGE_SCHEMA) -> pa.Table:
    """Return passages as Arrow, with the hash of each one's title and text, and the kept columns of a schema."""
    own = [[passage[number] for passage in passages] for number in range(len(PASSAGE_SCHEMA) - 1)]
    kept = [[(passage.columns or {}).get(name) for passage in passages] for name in schema.names[len(PASSAGE_SCHEMA) :]]
    arrays = [pa.array(column, field.type) for column, field in zip([*own, hashes, *kept], schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)


def _holds(file: Location, groups: list[pa.Table]) -> bool:
    """Return whether a file is there with exactly these row groups."""
    if not file.exists():
        return False
    try:
        with file.open_input() as stream, pq.ParquetFile(stream) as parquet:
            return parquet.num_row_groups == len(groups) and all(
                parquet.read_row_group(number).equals(group) for number, group in enumerate(groups)
            )
    except (pa.ArrowException, OSError):
        return False
