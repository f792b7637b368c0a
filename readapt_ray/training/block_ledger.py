"""Keep a table of finished blocks files and their counts, in `blocks.parquet` beside their folder.

The counts can also be read from the files themselves. With the table a resumed run needs only one listing of the
folder: it opens only files that the table lacks or lists with another size.
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
    """Return the name of the blocks file for the passages file with this number from 0: part-00007.parquet for 7."""
    return f"part-{index:05d}.parquet"


class BlockLedger:
    """The finished blocks files of an artifact. `done` has their counts by the number of their passages file.

    Args:
        artifact: output folder of pack. Nothing is read before `find`.
    """

    def __init__(self, artifact: Location) -> None:
        self.done: dict[int, tuple[int, ...]] = {}
        self._artifact = artifact
        self._total: Counter[str] = Counter()
        self._saved_s = time.monotonic()

    def find(self) -> None:
        """Read the saved table, and record the rows whose file exists with the same size.

        Without a table, or if it cannot be read, nothing is recorded. Call it once, before `record`.
        """
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
        """Record the counts of a written file; the table is saved at most once a minute, so call `save` at the end.

        Args:
            counts: `index` (number of the passages file), `num_bytes` (size of the file) and all of COUNTS.
        """
        self.done[counts["index"]] = tuple(counts[name] for name in _COLUMNS)
        self._total.update({name: counts[name] for name in COUNTS})
        if time.monotonic() - self._saved_s > _SAVE_S:
            self.save()

    def save(self) -> None:
        """Write the table of all recorded files, which replaces the old one; write nothing if none is recorded."""
        if self.done:
            columns = dict(zip(_COLUMNS, map(list, zip(*sorted(self.done.values()), strict=True)), strict=True))
            with (self._artifact / _NAME).open_output() as stream:
                pq.write_table(pa.table(columns), stream)
        self._saved_s = time.monotonic()

    def total(self) -> dict[str, int]:
        """Return each of COUNTS, summed over all recorded files."""
        return {name: self._total[name] for name in COUNTS}
