"""Define filters of a search: as requests and API keys write them, and as the parts of an index apply them."""

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
    """A body whose unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _one_unknown_field(cls, values: Any) -> Any:
        """Keep only the first unknown field: each would be an error, and a body can hold a million."""
        if not isinstance(values, dict):
            return values
        unknown = [name for name in values if name not in cls.model_fields]
        known = {name: values[name] for name in cls.model_fields if name in values}
        return known | {name: values[name] for name in unknown[:1]}


class Bounds(KnownFields):
    """A range of values; dates are written as in ISO 8601."""

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
    """Refuse too many columns before their values are looked at: a wrong value makes seven errors."""
    if isinstance(columns, dict) and len(columns) > MAX_COLUMNS:
        raise ValueError(f"a filter may name {MAX_COLUMNS} columns, not {len(columns):,}")
    return columns


Columns = Annotated[
    dict[_Text, _Value | Annotated[list[_Value], Field(fail_fast=True, min_length=1, max_length=MAX_VALUES)] | Bounds],
    Field(min_length=1, max_length=MAX_COLUMNS),
    BeforeValidator(_few),
]


class FilterFields(KnownFields):
    """The fields that say which passages are searched; all of them must hold."""

    doc_id_prefix: _Text | None = None
    """Search only passages whose doc_id begins so."""
    doc_ids: DocIds | None = None
    """Search only these passages, up to 10,000. Where ingest split documents, a document's id names all of its passages."""
    filter: Columns | None = None
    """Search only passages whose columns hold one of these values, or a value within bounds, such as
    `{"lang": ["en", "de"], "year": {"gte": 2020}}`. Passages without a value are left out. `columns` in `GET /v1/models`
    says which there are."""

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if self.doc_ids is not None and self.doc_id_prefix is not None:
            raise ValueError("give 'doc_ids' or 'doc_id_prefix', not both")
        return self


@dataclass(frozen=True)
class DocFilter:
    """Restrict a search to passages for which all of this holds."""

    prefix: str | None = None
    doc_ids: tuple[str, ...] | None = None
    conditions: tuple[Condition, ...] = ()
    within: "DocFilter | None" = None
    """Another filter that must hold as well, from an API key."""
    is_exact: bool = False
    """Whether every passage that is left is compared, also in an approximate index."""


def doc_filter(fields: FilterFields, within: DocFilter | None = None) -> DocFilter | None:
    """Return the filter that fields write, within another one; None for none."""
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
