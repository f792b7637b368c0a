"""Choose the columns of a source: which hold doc_id, title and text, and which are kept besides.

In: the column names of a file, and the options `--columns` and `--keep`. Out: `Columns`, with which a reader makes rows,
and the type of each kept column. Without `--columns`, well-known names are used, in upper or lower case and with `_`, `-`
or space between words.
"""

import datetime
import json
import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any, Final

import pyarrow as pa
from pydantic import BeforeValidator

from readapt_ray.config import meant
from readapt_ray.errors import CorpusError, InputError
from readapt_ray.sources.source import MISSING, Row, Unreadable

ID_NAMES: Final = (*("doc_id", "_id", "id", "pid", "passage_id", "docid", "document_id", "docno", "corpus_id", "url"),)
TITLE_NAMES: Final = ("title", "headline", "doc_title", "page_title")
TEXT_NAMES: Final = ("text", "contents", "content", "body", "passage", "passage_text", "segment")
FIELDS: Final = ("doc_id", "title", "text")
LABEL_FIELDS: Final = ("query_id", "query", "relevance")
"""Fields of queries and judgements. Judgements also have a doc_id."""
OWN_COLUMNS: Final = frozenset({*FIELDS, "content_hash", "parent_id", "vector", "scale"})
"""Names that a kept column cannot have, because passages or vectors have columns with these names."""
TYPES: Final[dict[str, pa.DataType]] = {
    "string": pa.string(),
    "int64": pa.int64(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
}
"""Types that `--keep NAME:TYPE` can name."""
_SEPARATORS = re.compile(r"[\s_-]+")


@dataclass(frozen=True, kw_only=True)
class ColumnChoice:
    """The columns that a user chose with `--columns` and `--keep`."""

    fields: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Given fields (doc_id, title, text, query_id, query, relevance), each with its columns."""
    keep: tuple[tuple[str, str | None], ...] = ()
    """Columns to keep, each with the name of its type; None if no type was given."""

    def of(self, fields: Collection[str]) -> dict[str, tuple[str, ...]]:
        """Return the user's columns for those of `fields` that the user set; others are left out.

        A title or text may have several columns, which are joined.
        """
        return {field: names for field, names in self.fields if field in fields}

    @classmethod
    def parse(cls, columns: Sequence[str], keep: Sequence[str]) -> "ColumnChoice":
        """Parse the items of `--columns` and `--keep`.

        Args:
            columns: items FIELD=COLUMN, such as "doc_id=docid". For title and text, several columns:
                "text=abstract+body".
            keep: items NAME or NAME:TYPE, such as "year:int64" (see `TYPES`).

        Raises:
            InputError: an item is not FIELD=COLUMN, a field is unknown or given twice, or a kept column's name is
                not allowed.
        """
        fields = dict(_field(each) for each in columns)
        if len(fields) < len(columns):
            raise InputError(f"columns = {','.join(columns)!r} sets a field twice; join columns with +: text=a+b")
        return cls(fields=tuple(fields.items()), keep=tuple(dict(_kept(each) for each in keep).items()))


def _as_items(columns: Any) -> Any:
    """Convert a section of a YAML file, {doc_id: docid, text: [abstract, body]}, to items FIELD=COLUMN."""
    if not isinstance(columns, dict):
        return columns
    names = {field: name if isinstance(name, list | tuple) else [name] for field, name in columns.items()}
    return [f"{field}={'+'.join(map(str, each))}" for field, each in names.items()]


ColumnsOption = Annotated[tuple[str, ...], BeforeValidator(_as_items)]
"""Type of a config field that takes items FIELD=COLUMN."""


def _field(item: str) -> tuple[str, tuple[str, ...]]:
    field, _, names = item.partition("=")
    field, columns = field.strip(), tuple(filter(None, (name.strip() for name in names.split("+"))))
    known = (*FIELDS, *LABEL_FIELDS)
    if field in known and "=" in item and not columns:
        raise InputError(f"columns = {item!r} names no column: write {field}=COLUMN")
    if field not in known or not columns:
        hint = f"; {meant(field, known)}" if meant(field, known) else ""
        raise InputError(
            f"columns = {item!r}: write FIELD=COLUMN, where the field is {', '.join(known)}, such as "
            f"doc_id=docid,text=abstract+body{hint}"
        )
    if field not in ("title", "text") and len(columns) > 1:
        raise InputError(f"columns = {item!r}: {field} is one column; name one")
    return field, columns


def _kept(item: str) -> tuple[str, str | None]:
    name, _, kind = item.rpartition(":") if item.rpartition(":")[2] in TYPES else (item, "", "")
    if name in OWN_COLUMNS:
        raise InputError(f"keep = {item!r}: a passage has a column of its own with this name; keep another one")
    return name, kind or None


def kept_value(raw: object, kind: pa.DataType) -> Any:
    """Convert a raw value to the type of a kept column. Null, NaN and missing values become None.

    For a text column, numbers become text, and lists, objects and booleans become JSON. For other columns, text is
    parsed ("7", "true"), and blank text becomes None.

    Raises:
        ValueError: the value does not fit the type, or its text cannot be written as UTF-8.
    """
    if is_absent(raw):
        return None
    if isinstance(raw, Unreadable):
        raise ValueError(raw.text)
    if pa.types.is_string(kind):
        text = raw if isinstance(raw, str) else _as_text(raw)
        text.encode("utf-8")  # JSON can hold half of a surrogate pair: UnicodeEncodeError is a ValueError
        return text
    if isinstance(raw, str) and not raw.strip():
        return None
    try:
        value = pa.scalar(_number(raw, kind), kind).as_py()
        return None if is_absent(value) else value  # the text "nan"
    except (pa.ArrowException, OverflowError, TypeError) as error:
        raise ValueError(str(raw)) from error


def _as_text(raw: object) -> str:
    if isinstance(raw, (dict, list, bool)):
        return json.dumps(raw, ensure_ascii=False, default=str)
    return number_text(raw) or str(raw)


def _number(raw: object, kind: pa.DataType) -> object:
    """Convert text to a number or boolean, and a float without fraction to an integer, if the column has that type."""
    if isinstance(raw, str) and "_" in raw and not pa.types.is_boolean(kind):
        raise ValueError(raw)  # Python reads 1_000 as 1000
    if isinstance(raw, bool):
        if not pa.types.is_boolean(kind):
            raise ValueError(raw)
        return raw
    if pa.types.is_boolean(kind) and isinstance(raw, str):
        return {"true": True, "false": False}.get(raw.strip().lower(), raw)
    if pa.types.is_integer(kind):
        return int(raw) if isinstance(raw, str) or (isinstance(raw, float) and raw.is_integer()) else raw
    return float(raw) if pa.types.is_floating(kind) and isinstance(raw, (str, int)) else raw


def number_text(value: object) -> str | None:
    """Return a number as text, such as "7" for 7.0; None for NaN, infinity, booleans and all other values."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)):
        return None
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        return None
    return str(int(value)) if value == int(value) else str(value)


def is_absent(value: object) -> bool:
    """Return whether a value is None, NaN (pandas writes null as NaN) or MISSING (the row does not have the field)."""
    return value is None or value is MISSING or (isinstance(value, float) and math.isnan(value))


@dataclass(frozen=True)
class Columns:
    """The names of the columns of a file from which a row is made."""

    doc_id: str
    title: tuple[str, ...]
    text: tuple[str, ...]
    kept: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All columns, in the order in which `row` takes their values. A column may occur twice."""
        return (self.doc_id, *self.title, *self.text, *self.kept)

    def row(self, place: str, values: Sequence[object]) -> Row:
        """Make a row from values in the order of `names`. `place` is file and line.

        Several title columns are joined by a space, several text columns by a line break.
        """
        text_at = 1 + len(self.title)
        kept_at = text_at + len(self.text)
        title = _joined(values[1:text_at], " ") if self.title else None
        title = None if title is MISSING else title
        return Row(place, values[0], title, _joined(values[text_at:kept_at], "\n"), tuple(values[kept_at:]))


def _joined(values: Sequence[object], between: str) -> object:
    """Join the texts and numbers of several columns. A single value, or a value that is neither, is returned unchanged."""
    if len(values) == 1:
        return values[0]
    parts = []
    for value in values:
        part = value if isinstance(value, str) else number_text(value)
        if part is None and not is_absent(value):
            return value
        if part and part.strip():
            parts.append(part)
    return between.join(parts) if parts else values[0]


def first_of(wanted: Sequence[str], found: Iterable[str]) -> str | None:
    """Return the name in `found` that matches the first possible one of `wanted`; None if none matches.

    Exact matches of any wanted name come first. Then case, white space, `_` and `-` are ignored: "Doc-ID" matches
    "docid".
    """
    present = {str(name): name for name in found}
    exact = next((present[name] for name in wanted if name in present), None)
    if exact is not None:
        return exact
    plain: dict[str, str] = {}
    for name in present.values():
        plain.setdefault(_plain(name), name)
    return next((plain[_plain(name)] for name in wanted if _plain(name) in plain), None)


def _plain(name: str) -> str:
    return _SEPARATORS.sub("", str(name).lower())


def passage_columns(found: Sequence[str], label: str, choice: ColumnChoice, *, is_sample: bool = False) -> Columns:
    """Choose the columns for doc_id, title, text and kept values. Without a title column, `title` is empty.

    Args:
        found: column names of the file.
        label: name of the file in errors.
        choice: columns that the user gave. For fields that it lacks, well-known names are tried.
        is_sample: whether `found` comes only from the first rows. Then a kept column with a given type may be missing.

    Raises:
        CorpusError: there is no id or text column, or a given column is missing. The message lists the columns found.
    """
    given = choice.of(FIELDS)
    chosen = {field: tuple(_found(name, found, label, field) for name in names) for field, names in given.items()}
    missing = []
    for field, names, what in (("text", TEXT_NAMES, "text"), ("title", TITLE_NAMES, ""), ("doc_id", ID_NAMES, "id")):
        if field in chosen:
            continue
        taken = {name for columns in chosen.values() for name in columns}
        column = first_of(names, [name for name in found if name not in taken])
        if column is None and what:
            missing.append(f"no {what} column ({' or '.join(names)})")
        chosen[field] = () if column is None else (column,)
    if missing:
        options = ",".join(f"{field}=COLUMN" for field in ("doc_id", "text") if not chosen[field])
        raise CorpusError(
            f"{label} has {' and '.join(missing)}; its columns are {_listed(found)}: say which one it is with --columns {options} (in a run: ingest.columns)"
        )
    kept = tuple(
        name if is_sample and kind and name not in found else _found(name, found, label, None)
        for name, kind in choice.keep
    )
    return Columns(chosen["doc_id"][0], chosen["title"], chosen["text"], kept)


def _found(name: str, found: Sequence[str], label: str, field: str | None) -> str:
    if name in found:
        return name
    column = first_of((name,), found)
    if column is not None:
        return column
    hint = meant(name, found)
    column, _, kind = name.rpartition(":")
    if not field and first_of((column,), found):
        hint = f"{kind} is no type; the types are {', '.join(TYPES)}"
    option = (
        f"--columns {field}=COLUMN"
        if field
        else "--keep (with its type, --keep NAME:string, if only later rows have it)"
    )
    raise CorpusError(
        f"{label} has no column {name!r}; its columns are {_listed(found)}{f' ({hint})' if hint else ''}: give another with "
        f"{option}"
    )


def _listed(found: Sequence[str]) -> str:
    return ", ".join(map(str, found)) or "none"


def kept_schema(choice: ColumnChoice, types: Sequence[pa.DataType]) -> pa.Schema:
    """Return the schema in which kept columns are stored: with the user's types, else as `stored_type` says.

    Args:
        choice: the user's choice of columns.
        types: the type of each kept column in the file, in the order of `choice.keep`.
    """
    return pa.schema(
        (name, TYPES[kind] if kind else stored_type(found))
        for (name, kind), found in zip(choice.keep, types, strict=True)
    )


def stored_type(kind: pa.DataType) -> pa.DataType:
    """Return the type in which a column is stored: its own type if searches can filter by it, else text.

    Searches filter by numbers, booleans, dates, times (stored in microseconds), texts, and lists of one of these.
    Objects and other values are stored as text (JSON).
    """
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inner = stored_type(kind.value_type)
        return pa.list_(inner) if inner == kind.value_type or pa.types.is_string(inner) else pa.string()
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind) or pa.types.is_date(kind):
        return kind
    if pa.types.is_timestamp(kind):
        return pa.timestamp("us", kind.tz)
    return pa.string()


def type_of_values(values: Iterable[object]) -> pa.DataType:
    """Return the Arrow type for JSON values: numbers, booleans, dates, texts or lists of one of these.

    Null and missing values are ignored. Integers and floats together are float64. Other mixtures, objects and no value
    at all are text.
    """
    there = [value for value in values if not is_absent(value)]
    if there and all(isinstance(value, list) for value in there):
        inner = type_of_values(each for value in there if isinstance(value, list) for each in value)
        return pa.list_(inner)
    kinds = {type(value) for value in there}
    if kinds == {bool}:
        return pa.bool_()
    if kinds == {int}:
        return pa.int64()
    if kinds == {datetime.date}:
        return pa.date32()
    return pa.float64() if kinds and kinds <= {int, float} else pa.string()


def type_of_texts(texts: Iterable[object]) -> pa.DataType:
    """Return the type of a CSV or TSV column: int64, float64 or text. `007` is text. Blank fields are ignored.

    A column with only blank fields is text.
    """
    there = [str(text).strip() for text in texts if text is not None and str(text).strip()]
    if there and all(re.fullmatch(r"-?(0|[1-9]\d{0,17})", text) for text in there):
        return pa.int64()
    if there and all(re.fullmatch(r"-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?", text) for text in there):
        return pa.float64()
    return pa.string()
