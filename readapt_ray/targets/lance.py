"""Send rows to a LanceDB table: `lancedb:FOLDER/TABLE`, or `lancedb:s3://bucket/folder/TABLE`.

The payload keeps its Arrow types. The record is in the table `readapt_exports` of the same folder. No vector index is
built, so LanceDB searches exactly. Only one task writes at a time, since each file of vectors is one merge.
"""

import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from readapt_ray.targets import addresses
from readapt_ray.targets.target import Layout, Record, check_columns

VARIABLES = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_RECORDS = "readapt_exports"
_IDS_PER_DELETE = 1000


class LanceTarget:
    """A table of LanceDB."""

    max_writers = 1

    def __init__(self, address: addresses.Address) -> None:
        addresses.check_options(address, ())
        with addresses.client_of("lancedb"):
            import lancedb
        self._name = address.name
        self._database: Any = lancedb.connect(address.folder, storage_options=_storage_options(address.folder))

    def close(self) -> None:
        """Do nothing: there is no connection to close."""

    def check(self, layout: Layout) -> None:
        """Accept vectors of any dimension; refuse columns with a dot in their names."""
        check_columns(layout, lambda name: "." in name, "LanceDB")

    def record(self) -> Record | None:
        """Return the record of this table; None if the table does not exist, {} if readapt did not create it."""
        names = self._database.table_names(limit=1_000_000)
        if self._name not in names:
            return None
        rows = self._database.open_table(_RECORDS).to_arrow().to_pylist() if _RECORDS in names else []
        return next((dict(json.loads(row["record"])) for row in rows if row["name"] == self._name), {})

    def create(self, layout: Layout, record: Record) -> None:
        """Store the record, then create the table, so that a table never exists without its record."""
        self.set_record(record)
        self._database.create_table(self._name, schema=layout.schema)

    def set_record(self, record: Record) -> None:
        """Replace the record of this table in the table of records."""
        rows = pa.table({"name": [self._name], "record": [json.dumps(dict(record))]})
        _merge(self._database.create_table(_RECORDS, schema=rows.schema, exist_ok=True), "name", rows)

    def drop(self) -> None:
        """Drop the table. Its record stays in the table of records, until `create` replaces it."""
        self._database.drop_table(self._name)

    def write(self, part: str, batches: Iterable[pa.Table]) -> None:
        """Merge all rows of a file of vectors in one commit; without rows, do nothing. They are in memory at once."""
        del part
        tables = list(batches)
        if tables:
            table = self._database.open_table(self._name)
            _merge(table, "doc_id", pa.concat_tables(tables).cast(table.schema))

    def delete(self, doc_ids: Sequence[str]) -> None:
        """Delete the rows with these doc_ids, 1,000 per commit; missing ones are ignored."""
        table = self._database.open_table(self._name)
        for first in range(0, len(doc_ids), _IDS_PER_DELETE):
            quoted = ("'" + each.replace("'", "''") + "'" for each in doc_ids[first : first + _IDS_PER_DELETE])
            table.delete(f"doc_id IN ({', '.join(quoted)})")

    def finish(self) -> None:
        """Compact the many small files that the commits have written. No vector index is built."""
        self._database.open_table(self._name).optimize()

    def count(self) -> int:
        """Return the number of rows."""
        return int(self._database.open_table(self._name).count_rows())

    def search(self, vectors: NDArray[np.float32], top_k: int) -> list[list[str]]:
        """Return the doc_ids of the k nearest rows of each vector [Q, D], best first, with one request per vector.

        The search is exact, unless somebody added a vector index to the table.
        """
        table = self._database.open_table(self._name)
        answers = (
            table.search(each, vector_column_name="vector")
            .distance_type("dot")
            .limit(top_k)
            .select(["doc_id", "_distance"])
            .to_arrow()
            for each in vectors
        )
        return [answer["doc_id"].to_pylist() for answer in answers]


def _merge(table: Any, key: str, rows: pa.Table) -> None:
    table.merge_insert(key).when_matched_update_all().when_not_matched_insert_all().execute(rows)


def _storage_options(folder: str) -> dict[str, str] | None:
    """Return Lance's options for an object store other than Amazon's, or None; Lance reads credentials by itself."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not folder.startswith("s3://") or not endpoint:
        return None
    return {"aws_endpoint": endpoint, "allow_http": str(endpoint.startswith("http://")).lower()}
