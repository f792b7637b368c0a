"""Define the options of a domain, and parse them from the command line."""

import math

from pydantic import Field

from readapt_ray.config import Config
from readapt_ray.errors import InputError
from readapt_ray.storage import Location
from readapt_ray.yaml_files import options_of, read_yaml

_OF_A_DOMAIN = ("index", "corpus", "knowledge_scale")
VERSION_NAME = "domains"
"""Name of the version whose encoder all domains share."""


class DomainOptions(Config):
    """Options of one domain: its factors and, if it has them, index, corpus and scale."""

    factors: str
    """Output of `readapt merge --factors`."""
    index: str | None = None
    """Output of `readapt index`, of vectors that were made with these factors or the merged model."""
    corpus: str | None = None
    """Output of `readapt ingest`, for titles and texts."""
    knowledge_scale: float | None = Field(default=None, allow_inf_nan=False)
    """Scale of the knowledge; None for the scale of the merge. At 0 the index must have the retriever's own vectors."""


def parse_domains(value: object) -> object:
    """Parse `legal=FACTORS,index=INDEX,med=FACTORS`, or read a YAML file of domains by name.

    `index`, `corpus` and `knowledge_scale` belong to the domain before them. Values are not checked here.

    Args:
        value: text; without "=" it is the path of a YAML file. Anything else, such as a dict, is returned unchanged.

    Returns:
        The options of each domain by its name: {"legal": {"factors": ..., "index": ...}, ...}.

    Raises:
        InputError: an entry is not NAME=FACTORS, or a name is given twice.
    """
    if isinstance(value, str) and "=" not in value:
        return options_of(read_yaml(Location(value), "domains by name"), repr(value), "domains by name")
    if not isinstance(value, str):
        return value
    found: dict[str, dict[str, str]] = {}
    last: dict[str, str] | None = None
    for entry in value.split(","):
        name, _, folder = (part.strip() for part in entry.partition("="))
        if not (name and folder):
            raise InputError(f"domains: {entry!r} is not NAME=FACTORS, such as legal=run/legal-factors")
        if name in _OF_A_DOMAIN:
            if last is None or name in last:
                raise InputError(
                    f"domains: {entry!r} belongs to the domain before it; give it once, after NAME=FACTORS"
                )
            last[name] = folder
            continue
        if name in found:
            raise InputError(f"domains: {name!r} is given twice; give each domain a name of its own")
        last = found[name] = {"factors": folder}
    return found


def parse_scales(text: str | None) -> tuple[float, float] | None:
    """Parse `MIN..MAX` into (MIN, MAX); None, if requests cannot choose a scale, stays None.

    Raises:
        ValueError: the text is not a range of finite numbers, or MIN is over MAX.
    """
    if text is None:
        return None
    low, _, high = text.partition("..")
    try:
        least, most = float(low), float(high)
    except ValueError:
        least, most = math.nan, math.nan
    if not (math.isfinite(least) and math.isfinite(most) and least <= most):
        raise ValueError("give two numbers with .. between them, such as 0.0..1.0")
    return least, most
