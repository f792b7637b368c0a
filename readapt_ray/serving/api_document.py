"""Add to the OpenAPI document the rules for requests that the types of their fields do not express."""

from typing import Any

_NULL = {"type": "null"}
_GIVEN = {"not": _NULL}
_NOT_BLANK = r"[^\s\u001c-\u001f\u0085]"
"""Matches a character that is white space neither in ECMAScript (`\\s`) nor in Python."""
_TEXTS = (
    ("EmbeddingsRequest", "input"),
    ("SearchRequest", "query"),
    ("EmbedRequest", "texts"),
    ("TokenizeRequest", "prompt"),
)


def complete(document: dict[str, Any]) -> None:
    """Complete the document that FastAPI made, in place. It loses status 422: wrong requests get 400 here."""
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    schemas = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for name, field in _TEXTS:
        _refuse_blank(schemas[name]["properties"][field])
    search = schemas["SearchRequest"]
    search["oneOf"] = [
        {"required": ["query"], "properties": {"query": _GIVEN, "vector": _NULL}},
        {
            "required": ["vector", "fingerprint"],
            "properties": {
                "vector": _GIVEN,
                "fingerprint": _GIVEN,
                "query": _NULL,
                "mode": {"enum": ["dense", None]},
                "knowledge_scale": _NULL,
            },
        },
    ]
    search["not"] = {
        "required": ["doc_ids", "doc_id_prefix"],
        "properties": {"doc_ids": _GIVEN, "doc_id_prefix": _GIVEN},
    }
    for field in ("mode", "top_k", "with_text", "truncate"):
        _take_null(search["properties"][field])
    _take_null(schemas["EmbedRequest"]["properties"]["truncate"])
    bounds = schemas["Bounds"]
    bounds["minProperties"] = 1
    for each in bounds["properties"].values():
        each["anyOf"] = [kind for kind in each["anyOf"] if kind != _NULL]


def _take_null(schema: dict[str, Any]) -> None:
    """Allow null for a field with a default; null means the same as leaving the field out."""
    kind = {name: schema.pop(name) for name in set(schema) - {"title", "description", "default"}}
    schema["anyOf"] = [kind, _NULL]


def _refuse_blank(schema: dict[str, Any]) -> None:
    """Require that each string in a schema has more than white space."""
    if schema.get("type") == "string":
        schema["pattern"] = _NOT_BLANK
    for inner in (*schema.get("anyOf", ()), *filter(None, [schema.get("items")])):
        _refuse_blank(inner)
