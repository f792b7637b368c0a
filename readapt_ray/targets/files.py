"""Write rows as plain files for any other program: `files:FOLDER`, a local folder or a URI.

`NAME.parquet` holds all columns, and `NAME.npy` the same vectors as float32 [N, D] in the same order. If a row changes,
its old file is written again without it. The record is in `readapt_export.json`. Only one task writes at a time.
"""

import io
import json
import re
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from readapt_ray.storage import Location, name_when_whole
from readapt_ray.targets.target import Layout, Record, matrix

VARIABLES = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_RECORD = "readapt_export.json"
_OURS = re.compile(r"part-\d+-[0-9a-f]{8}\.parquet")


class FilesTarget:
    """A folder of Parquet and NumPy files."""

    max_writers = 1

    def __init__(self, folder: str) -> None:
        self._folder = Location(folder)

    def close(self) -> None:
        """Do nothing: there is no connection."""

    def check(self, layout: Layout) -> None:
        """Accept vectors of any dimension, and columns of any name."""

    def record(self) -> Record | None:
        """Return the record in its file; without that, None if the folder is missing or has no file, else {}.

        Temporary files, which a killed export leaves, do not count.
        """
        if (self._folder / _RECORD).is_file():
            return dict(json.loads((self._folder / _RECORD).read_text()))
        return {} if self._folder.files(recursive=True) else None

    def create(self, layout: Layout, record: Record) -> None:
        """Write the record; files of rows come with `write`."""
        del layout
        self.set_record(record)

    def set_record(self, record: Record) -> None:
        """Replace the export record `readapt_export.json` in the folder, or write it for the first time."""
        (self._folder / _RECORD).write_text(json.dumps(dict(record), indent=2) + "\n")

    def drop(self) -> None:
        """Delete all files that exports have written; other files in the folder stay."""
        for file in self._files():
            file.delete()
            _numbers_of(file).delete()
        (self._folder / _RECORD).delete()

    def write(self, part: str, batches: Iterable[pa.Table]) -> None:
        """Write rows to `part`.parquet and `part`.npy, and remove their doc_ids from the files of earlier exports.

        Files of the same part are replaced. All rows are held in memory at once. Without rows, nothing is written.

        Args:
            part: such as `part-00000-1a2b3c4d`; files that end with the same 8 digits belong to this export.
            batches: the rows.
        """
        tables = list(batches)
        if not tables:
            return
        rows = pa.concat_tables(tables)
        own = f"{part}.parquet"
        export = part.rpartition("-")[2]
        self._remove(rows["doc_id"], [file for file in self._files() if not file.name.endswith(f"-{export}.parquet")])
        _write(self._folder / own, rows)

    def delete(self, doc_ids: Sequence[str]) -> None:
        """Remove the rows with these doc_ids, by writing their files again; other doc_ids are ignored."""
        self._remove(pa.array(doc_ids, pa.string()), self._files())

    def finish(self) -> None:
        """Remove the temporary files that killed exports left, since they may hold deleted passages."""
        for name in self._folder.entries(recursive=False)[0]:
            final = name_when_whole(name) or ""
            if final == _RECORD or _OURS.fullmatch(f"{final.rpartition('.')[0]}.parquet"):
                (self._folder / name).delete()

    def count(self) -> int:
        """Count the rows in the Parquet files that exports wrote to the folder, from their footers.

        Other files in the folder do not count.
        """
        total = 0
        for file in self._files():
            with file.open_input() as stream, pq.ParquetFile(stream) as opened:
                total += opened.metadata.num_rows
        return total

    def search(self, vectors: NDArray[np.float32], top_k: int) -> list[list[str]]:
        """Return the doc_ids of the k nearest rows of each vector [Q, D], best first, ties by doc_id.

        All rows are compared (inner product), with one file in memory at a time.
        """
        best: list[list[tuple[float, str]]] = [[] for _ in vectors]
        for file in self._files():
            with file.open_input() as stream:
                doc_ids = pq.read_table(stream, columns=["doc_id"])["doc_id"].to_pylist()
            numbers = np.load(io.BytesIO(_numbers_of(file).read_bytes()), allow_pickle=False)
            for query, scores in enumerate((vectors @ numbers.T).tolist()):
                best[query] = sorted(
                    [*best[query], *((-score, name) for score, name in zip(scores, doc_ids, strict=True))]
                )[:top_k]
        return [[name for _, name in found] for found in best]

    def _files(self) -> list[Location]:
        return [file for file in self._folder.files(".parquet") if _OURS.fullmatch(file.name)]

    def _remove(self, doc_ids: pa.Array, files: Sequence[Location]) -> None:
        for file in files:
            with file.open_input() as stream:
                there = pq.read_table(stream, columns=["doc_id"])["doc_id"]
            kept = pc.invert(pc.is_in(there, value_set=doc_ids))
            if pc.all(kept).as_py():
                continue
            with file.open_input() as stream:
                _write(file, pq.read_table(stream).filter(kept))


def _write(file: Location, rows: pa.Table) -> None:
    """Write both files of some rows; the Parquet file last, so that it never exists without the other."""
    buffer = io.BytesIO()
    np.save(buffer, matrix(rows))
    _numbers_of(file).write_bytes(buffer.getvalue())
    with file.open_output() as stream:
        pq.write_table(rows, stream, compression="zstd")


def _numbers_of(file: Location) -> Location:
    return Location(f"{file.uri.removesuffix('.parquet')}.npy")
