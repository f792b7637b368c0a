"""Find the configurations of a data set, such as one per language. They must not be read together as one corpus.

Configurations are listed under `configs` in the front matter of the data set's README.md. Without that list, each folder
with its own corpus is a configuration. If all folders (or files) have names of languages, each of them is one.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from readapt_ray.sources.documents import split_front_matter
from readapt_ray.sources.labelled import PART, ROLES
from readapt_ray.sources.lines import plain_name

_LANGUAGE: Final = re.compile(r"(?:\d{8}\.)?(?:[a-z]{2}(?:[-_][A-Za-z]{2,4})?|[a-z]{3}[-_][A-Z][a-z]{3})")
"""`de`, `pt-br`, `zh_Hans`, `deu_Latn`, and `20231101.de` of Wikipedia."""


def in_card(readme: str) -> dict[str, list[str]]:
    """Return the configurations that a data set's card (README.md) lists, each with the patterns of its files.

    Empty if the card lists none, or if one is called `corpus`: then the data set is one corpus in parts. `de-corpus`
    and `de-queries` are parts of the configuration `de`, which then has no patterns.
    """
    fields, _ = split_front_matter(readme)
    configs = fields.get("configs")
    found: dict[str, list[str]] = {}
    for each in configs if isinstance(configs, list) else []:
        name = str(each.get("config_name", "")) if isinstance(each, Mapping) else ""
        part = PART.fullmatch(name)
        if part and not part[1] and part[2] == "corpus":
            return {}
        if name and not part:
            found.setdefault(name, []).extend(_patterns(each.get("data_files")))
        elif part and part[1]:
            found.setdefault(part[1], [])
    return found


def _patterns(data_files: Any) -> list[str]:
    if isinstance(data_files, str):
        return [data_files]
    if isinstance(data_files, Mapping):
        return _patterns(data_files["path"] if "path" in data_files else list(data_files.values()))
    return [pattern for each in data_files or () for pattern in _patterns(each)]


def in_names(names: Iterable[str]) -> list[str]:
    """Find configurations by the relative names of a folder's data files, sorted. Empty if the files are one corpus.

    Example:
        in_names(["de/train.parquet", "fr/train.parquet"]) == ["de", "fr"]
    """
    paths = [plain_name(name).split("/") if "/" not in name else name.split("/") for name in names]
    if paths and all(path[0] == "data" and len(path) > 2 for path in paths):
        paths = [path[1:] for path in paths]
    parts = [PART.fullmatch(path[0].split(".", 1)[0] if len(path) == 1 else path[0]) for path in paths]
    if any(part and part[2] == "corpus" for part in parts):
        own = {part[1] or "" for part in parts if part and part[2] == "corpus"}
        return [] if "" in own else sorted(own)
    inner = {path[0] for path in paths if len(path) > 1 and path[1].split(".", 1)[0] in ROLES[:1]}
    if inner:
        return sorted(inner)
    units = {path[0] if len(path) > 1 else path[0].split(".", 1)[0] for path in paths}
    return sorted(units) if len(units) > 1 and all(map(_LANGUAGE.fullmatch, units)) else []
