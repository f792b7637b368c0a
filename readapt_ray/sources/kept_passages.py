"""Find which passage was kept for a doc_id, after a parallel ingest dropped duplicates.

All answers come from one pass over the files of the exchange. In memory are one partition of ids, and the ids asked for.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq

from readapt_ray.sources import exchange
from readapt_ray.sources.duplicates import digest
from readapt_ray.sources.piece_job import Lists, PieceJob

_PLACE = (1 << exchange.ROW_BITS) - 1


@dataclass(frozen=True)
class KeptPassages:
    """Looks up kept passages, while the parts still hold all passages of all pieces."""

    job: PieceJob
    parts: Sequence[Mapping[str, int]]
    """Per piece, the number of rows of each of its parts, by name."""
    num_chunks: Sequence[int]
    """Number of digest files per piece."""
    lists: Lists

    def kept_ids(self, doc_ids: Sequence[str]) -> dict[str, str]:
        """Map each doc_id to the doc_id of its kept passage (itself, unless it was a duplicate). Unknown ids are left out."""
        rows = self._rows(doc_ids)
        kept = self.kept_rows(rows.values(), ("drop-contents", "drop-near"))
        names = self.doc_ids(kept.values())
        return {doc_id: names[kept[row]] if row in kept else doc_id for doc_id, row in rows.items()}

    def kept_rows(self, rows: Iterable[int], rounds: Sequence[str]) -> dict[int, int]:
        """Return the kept row of each row that was dropped. Rows that were not dropped are left out.

        Args:
            rows: the rows to look up (see `exchange.ROW_BITS`).
            rounds: the lists to follow, in this order: "drop-contents", "drop-near". A row that the second list drops
                may be the kept row of the first.
        """
        now = {row: row for row in rows}
        for what in rounds:
            wanted = np.fromiter(now.values(), np.uint64, len(now))
            found: dict[int, int] = {}
            for number, chunk in self.lists.get(what, ()):
                moves = exchange.read_records(self.job.file(what, number, chunk), self.job.num_pieces, exchange.MOVE)
                hit = moves[np.isin(moves["row"], wanted)]
                found.update(zip(hit["row"].tolist(), hit["kept"].tolist(), strict=True))
            now = {row: found.get(each, each) for row, each in now.items()}
        return {row: kept for row, kept in now.items() if kept != row}

    def doc_ids(self, rows: Iterable[int]) -> dict[int, str]:
        """Read the doc_ids of some rows, by row. The parts must still hold all passages."""
        found = {}
        by_part: dict[str, list[tuple[int, int]]] = {}
        for row in set(rows):
            place = row & _PLACE
            for name, num_rows in self.parts[row >> exchange.ROW_BITS].items():
                if place < num_rows:
                    by_part.setdefault(name, []).append((row, place))
                    break
                place -= num_rows
        for name, wanted in by_part.items():
            with (self.job.output / "passages" / name).open_input() as file:
                column = pq.read_table(file, columns=["doc_id"])["doc_id"]
            found.update({row: str(column[place].as_py()) for row, place in wanted})
        return found

    def _rows(self, doc_ids: Sequence[str]) -> dict[str, int]:
        """Return the first row of each doc_id. Unknown doc_ids are left out."""
        num = self.job.num_partitions
        digests = {digest(doc_id): doc_id for doc_id in doc_ids}
        keys = np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)
        found: dict[str, int] = {}
        files = self.job.chunk_files("ids", self.num_chunks)
        for partition in np.unique(exchange.partition_of(keys, num)).tolist():
            records = exchange.read_partition(files, partition, num, exchange.ID)
            for record in records[np.isin(records["key"][:, 0], keys[:, 0])]:
                doc_id = digests.get(record["key"].tobytes())
                if doc_id is not None:
                    found.setdefault(doc_id, int(record["row"]))
        return found
