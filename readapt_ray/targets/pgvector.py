"""Send rows to PostgreSQL with pgvector: `postgresql://user@host/db?table=passages`.

Title and text are columns of the table; other columns of a passage are in its JSON column `payload`. Vectors have the
type `vector`, or `halfvec` if they are float16 or the URI has `&type=halfvec`. An HNSW index for the inner product is
built after all rows are written. The record is stored as the comment of the table. The password is read from PGPASSWORD
or ~/.pgpass.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from readapt_ray.errors import InputError
from readapt_ray.targets import addresses
from readapt_ray.targets.target import SERVER_WRITERS, Layout, Record, matrix, payloads

VARIABLES = "PGPASSWORD"
_MOST = {"vector": 2_000, "halfvec": 4_000}
"""Maximum number of dimensions of an HNSW index, by type of the vectors."""
_PASSED_ON = ("host", "sslmode")
_COLUMNS = ("doc_id", "title", "text", "payload")


class PgvectorTarget:
    """A table of PostgreSQL."""

    max_writers = SERVER_WRITERS

    def __init__(self, address: addresses.Address) -> None:
        addresses.check_options(address, ("table", "type", *_PASSED_ON))
        options = address.options
        if not options.get("table") or options.get("type", "vector") not in _MOST:
            raise InputError(
                f"to = {address.uri!r} must name a table, and type is one of {', '.join(_MOST)}; "
                f"give postgresql://USER@HOST/DATABASE?table=TABLE"
            )
        with addresses.client_of("pgvector"):
            import psycopg
            from pgvector.psycopg import register_vector
        self._psycopg, self._register, self._asked = psycopg, register_vector, options.get("type")
        where = {"host": address.host, "port": address.port, "user": address.user, "dbname": address.name}
        where |= {name: options[name] for name in _PASSED_ON if name in options}
        self._connection: Any = psycopg.connect(**{name: value for name, value in where.items() if value is not None})
        self._table = psycopg.sql.Identifier(*options["table"].split("."))
        self._index_name = f"{options['table'].split('.')[-1]}_readapt_hnsw"
        self._is_registered = False

    def close(self) -> None:
        """Close the connection, and roll back what was not committed."""
        self._connection.close()

    def check(self, layout: Layout) -> None:
        """Refuse vectors with more dimensions than an HNSW index can have: 2,000 for `vector`, 4,000 for `halfvec`."""
        kind = self._kind(layout)
        if layout.dimension > _MOST[kind]:
            fits = "add &type=halfvec to the URI (16-bit numbers), or " if layout.dimension <= _MOST["halfvec"] else ""
            raise InputError(
                f"pgvector indexes at most {_MOST[kind]:,} dimensions of the type {kind}, and these vectors have "
                f"{layout.dimension:,}; {fits}embed with fewer --dimensions if the model was trained for it"
            )

    def record(self) -> Record | None:
        """Return the record in the comment of the table; None without a table, {} if readapt did not create it."""
        name = self._table.as_string(self._connection)
        found = self._run(
            "SELECT to_regclass(%s), obj_description(to_regclass(%s), 'pg_class')", [name, name]
        ).fetchone()
        self._connection.commit()
        if found[0] is None:
            return None
        try:
            values = json.loads(found[1] or "")
        except ValueError:
            return {}
        return dict(values) if isinstance(values, dict) and "export" in values else {}

    def create(self, layout: Layout, record: Record) -> None:
        """Create the table with its record, and the extension `vector` if it is missing, in one transaction.

        The table must not exist: `record` returned None, or it was dropped. The index is built by `finish`.
        """
        kind = self._psycopg.sql.SQL(f"{self._kind(layout)}({layout.dimension})")
        self._run("CREATE EXTENSION IF NOT EXISTS vector")
        self._run(
            "CREATE TABLE {table} (doc_id text PRIMARY KEY, title text, text text, payload jsonb, vector {kind} NOT NULL)",
            kind=kind,
        )
        self.set_record(record)

    def set_record(self, record: Record) -> None:
        """Replace the record in the comment of the table."""
        self._run("COMMENT ON TABLE {table} IS {comment}", comment=self._psycopg.sql.Literal(json.dumps(dict(record))))
        self._connection.commit()

    def drop(self) -> None:
        """Drop the table with its index and record."""
        self._run("DROP TABLE {table}")
        self._connection.commit()

    def write(self, part: str, batches: Iterable[pa.Table]) -> None:
        """Copy rows into a temporary table and merge them, all rows of a file in one transaction.

        NUL characters are removed from columns other than doc_id, title and text, since PostgreSQL cannot store them.
        """
        del part
        kind = self._stored_kind()
        self._run("CREATE TEMPORARY TABLE arriving (LIKE {table}) ON COMMIT DROP")
        columns = ", ".join((*_COLUMNS, "vector"))
        command = f"COPY arriving ({columns}) FROM STDIN WITH (FORMAT BINARY)"
        with self._connection.cursor() as cursor, cursor.copy(command) as copy:
            copy.set_types(["text", "text", "text", "jsonb", kind])
            for rows in batches:
                for row, vector in zip(payloads(rows), matrix(rows), strict=True):
                    copy.write_row((*self._values(row), _as_kind(vector, kind)))
        changes = ", ".join(f"{name} = EXCLUDED.{name}" for name in (*_COLUMNS[1:], "vector"))
        self._run(
            f"INSERT INTO {{table}} ({columns}) SELECT {columns} FROM arriving ORDER BY doc_id "
            f"ON CONFLICT (doc_id) DO UPDATE SET {changes}"
        )
        self._connection.commit()

    def delete(self, doc_ids: Sequence[str]) -> None:
        """Delete the rows with these doc_ids in one transaction; missing ones are ignored."""
        self._run("DELETE FROM {table} WHERE doc_id = ANY(%s)", [list(doc_ids)])
        self._connection.commit()

    def finish(self) -> None:
        """Build the HNSW index, unless it exists."""
        self._run(
            f"CREATE INDEX IF NOT EXISTS {{index}} ON {{table}} USING hnsw (vector {self._stored_kind()}_ip_ops)",
            index=self._psycopg.sql.Identifier(self._index_name),
        )
        self._connection.commit()

    def count(self) -> int:
        """Return the number of rows."""
        return int(self._run("SELECT count(*) FROM {table}").fetchone()[0])

    def search(self, vectors: NDArray[np.float32], top_k: int) -> list[list[str]]:
        """Return the doc_ids of the k nearest rows of each vector [Q, D], best first, with one query per vector.

        `<#>` is the negative inner product. The search is approximate if PostgreSQL uses the HNSW index.
        """
        kind = self._stored_kind()
        query = f"SELECT doc_id FROM {{table}} ORDER BY vector <#> %s::{kind} LIMIT %s"
        return [[row[0] for row in self._run(query, [_as_kind(each, kind), top_k]).fetchall()] for each in vectors]

    def _kind(self, layout: Layout) -> str:
        return self._asked or ("halfvec" if layout.vector_dtype == "float16" else "vector")

    def _stored_kind(self) -> str:
        """Return the type of the vector column, and register its conversion with the connection."""
        if not self._is_registered:
            self._register(self._connection)
            self._is_registered = True
        name = self._table.as_string(self._connection)
        query = "SELECT format_type(atttypid, NULL) FROM pg_attribute WHERE attrelid = to_regclass(%s) AND attname = 'vector'"
        return str(self._run(query, [name]).fetchone()[0]).rpartition(".")[2]

    def _values(self, row: dict[str, Any]) -> tuple[Any, ...]:
        from psycopg.types.json import Jsonb

        more = {name: _without_nul(value) for name, value in row.items() if name not in _COLUMNS[:3]}
        return (*(row.get(name) for name in _COLUMNS[:3]), Jsonb(more))

    def _run(self, text: str, values: Sequence[Any] = (), **parts: Any) -> Any:
        query = self._psycopg.sql.SQL(text).format(table=self._table, **parts)
        return self._connection.execute(query, values or None)


def _without_nul(value: Any) -> Any:
    """Return a JSON value without NUL characters, which PostgreSQL cannot store in text."""
    if isinstance(value, str):
        return value.replace("\x00", "")
    if isinstance(value, list):
        return [_without_nul(each) for each in value]
    if isinstance(value, dict):
        return {_without_nul(name): _without_nul(each) for name, each in value.items()}
    return value


def _as_kind(vector: NDArray[np.float32], kind: str) -> Any:
    if kind == "vector":
        return vector
    from pgvector import HalfVector

    return HalfVector(vector)
