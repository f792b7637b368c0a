"""Define the filters of a search, in the form of requests and API keys, and in the form that index slices apply."""

from dataclasses import dataclass, replace
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

from readapt_ray.retrieval.kept_columns import Condition

MAX_DOC_IDS = 10_000
MAX_VALUES = 1_000
MAX_COLUMNS = 32

_Text = Annotated[str, StringConstraints(strict=True)]
DocIds = Annotated[list[_Text], Field(fail_fast=True, min_length=1, max_length=MAX_DOC_IDS)]
_Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_Value = Annotated[bool, Field(strict=True)] | Annotated[int, Field(strict=True)] | _Number | _Text
_Comparable = Annotated[int, Field(strict=True)] | _Number | _Text


class KnownFields(BaseModel):
    """A body that refuses unknown fields."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _one_unknown_field(cls, values: Any) -> Any:
        """Keep only the first unknown field: pydantic makes one error per field, and a body can have a million."""
        if not isinstance(values, dict):
            return values
        unknown = [name for name in values if name not in cls.model_fields]
        known = {name: values[name] for name in cls.model_fields if name in values}
        return known | {name: values[name] for name in unknown[:1]}


class Bounds(KnownFields):
    """A range of values: all given bounds must hold. Dates are strings in ISO 8601."""

    gt: _Comparable | None = None
    gte: _Comparable | None = None
    lt: _Comparable | None = None
    lte: _Comparable | None = None

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if not self.model_fields_set or None in (getattr(self, name) for name in self.model_fields_set):
            raise ValueError("bounds need a value for gt, gte, lt or lte")
        return self


def _few(columns: Any) -> Any:
    """Refuse too many columns before their values are validated: one wrong value makes seven errors."""
    if isinstance(columns, dict) and len(columns) > MAX_COLUMNS:
        raise ValueError(f"a filter may name {MAX_COLUMNS} columns, not {len(columns):,}")
    return columns


Columns = Annotated[
    dict[_Text, _Value | Annotated[list[_Value], Field(fail_fast=True, min_length=1, max_length=MAX_VALUES)] | Bounds],
    Field(min_length=1, max_length=MAX_COLUMNS),
    BeforeValidator(_few),
]


class FilterFields(KnownFields):
    """Fields that restrict a search to some passages; a passage must meet all that are given."""

    doc_id_prefix: _Text | None = None
    """Search only passages whose doc_id begins with this text."""
    doc_ids: DocIds | None = None
    """Search only the passages with these ids, up to 10,000. If ingest split documents, the id of a document means all
    of its passages."""
    filter: Columns | None = None
    """Search only passages whose columns hold one of these values, or a value within bounds, such as
    `{"lang": ["en", "de"], "year": {"gte": 2020}}`. Passages without a value are left out. `columns` in
    `GET /v1/models` lists the columns."""

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if self.doc_ids is not None and self.doc_id_prefix is not None:
            raise ValueError("give 'doc_ids' or 'doc_id_prefix', not both")
        return self


@dataclass(frozen=True)
class DocFilter:
    """A filter of a search: a passage passes if it meets all conditions that are given."""

    prefix: str | None = None
    """Text that the doc_id must begin with; None for any."""
    doc_ids: tuple[str, ...] | None = None
    """Ids of the passages, or of their documents if ingest split documents; None for any."""
    conditions: tuple[Condition, ...] = ()
    """Conditions on columns; all must hold."""
    within: "DocFilter | None" = None
    """Filter of the API key, which a passage must pass as well."""
    is_exact: bool = False
    """Whether all passages that pass are compared one by one, even in an approximate index."""


def doc_filter(fields: FilterFields, within: DocFilter | None = None) -> DocFilter | None:
    """Make a filter from the fields of a request and the filter of its API key (`within`); None if both are empty.

    A passage must pass both. Columns are not checked here.
    """
    own = None
    if fields.doc_ids is not None or fields.doc_id_prefix is not None or fields.filter is not None:
        doc_ids = None if fields.doc_ids is None else tuple(fields.doc_ids)
        conditions = tuple(_condition(column, value) for column, value in (fields.filter or {}).items())
        own = DocFilter(fields.doc_id_prefix, doc_ids, conditions)
    return replace(own, within=within) if own and within else own or within


def _condition(column: str, value: Any) -> Condition:
    if isinstance(value, Bounds):
        bounds: dict[Any, Any] = value.model_dump(exclude_unset=True)
        return Condition(column, bounds=tuple(bounds.items()))
    return Condition(column, one_of=tuple(value) if isinstance(value, list) else (value,))
