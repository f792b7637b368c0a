"""What is known of the blocks files that were written: counts of each, in `blocks.parquet` beside their folder.

The files are their own ledger; this table repeats what they say, so that resuming takes one listing: only files that it does
not list with their size are opened again.
"""

import time
from collections import Counter
from collections.abc import Mapping

import pyarrow as pa
import pyarrow.parquet as pq

from readapt_ray.storage import Location

COUNTS = ("num_blocks", "num_passages", "num_tokens", "num_truncated_passages", "num_lost_tokens")
_COLUMNS = ("index", "num_bytes", *COUNTS)
_NAME = "blocks.parquet"
_SAVE_S = 60.0


def block_file(index: int) -> str:
    """Return the name of the blocks file of a passages file."""
    return f"part-{index:05d}.parquet"


class BlockLedger:
    """Blocks files of an artifact, by the number of their passages file."""

    def __init__(self, artifact: Location) -> None:
        self.done: dict[int, tuple[int, ...]] = {}
        self._artifact = artifact
        self._total: Counter[str] = Counter()
        self._saved_s = time.monotonic()

    def find(self) -> None:
        """Take from the table what one listing confirms."""
        try:
            with (self._artifact / _NAME).open_input() as stream:
                table = pq.read_table(stream)
        except (FileNotFoundError, pa.ArrowInvalid):
            return
        sizes = {name: int(info.size) for name, info in (self._artifact / "blocks").listing(".parquet")}
        for row in zip(*(table[name].to_pylist() for name in _COLUMNS), strict=True):
            if sizes.get(block_file(row[0])) == row[1]:
                self.record(dict(zip(_COLUMNS, row, strict=True)))

    def record(self, counts: Mapping[str, int]) -> None:
        """Note that a file is written; the table is saved once a minute."""
        self.done[counts["index"]] = tuple(counts[name] for name in _COLUMNS)
        self._total.update({name: counts[name] for name in COUNTS})
        if time.monotonic() - self._saved_s > _SAVE_S:
            self.save()

    def save(self) -> None:
        """Write the table, unless nothing is done yet."""
        if self.done:
            columns = dict(zip(_COLUMNS, map(list, zip(*sorted(self.done.values()), strict=True)), strict=True))
            with (self._artifact / _NAME).open_output() as stream:
                pq.write_table(pa.table(columns), stream)
        self._saved_s = time.monotonic()

    def total(self) -> dict[str, int]:
        """Return the counts of all files together."""
        return {name: self._total[name] for name in COUNTS}
