"""Read the options of domains as they stand on the command line."""

import math

from readapt_ray.errors import InputError
from readapt_ray.storage import Location
from readapt_ray.yaml_files import options_of, read_yaml

VERSION_NAME = "domains"
"""Name of the version whose encoder all domains share."""


def parse_domains(value: object) -> object:
    """Read `legal=FACTORS,med=FACTORS`, or a YAML file of the same.

    Raises:
        InputError: an entry is not NAME=FACTORS, or a name is given twice.
    """
    if isinstance(value, str) and "=" not in value:
        return options_of(read_yaml(Location(value), "domains by name"), repr(value), "domains by name")
    if not isinstance(value, str):
        return value
    found: dict[str, str] = {}
    for entry in value.split(","):
        name, _, folder = (part.strip() for part in entry.partition("="))
        if not (name and folder):
            raise InputError(f"domains: {entry!r} is not NAME=FACTORS, such as legal=run/legal-factors")
        if name in found:
            raise InputError(f"domains: {name!r} is given twice; give each domain a name of its own")
        found[name] = folder
    return found


def parse_scales(text: str | None) -> tuple[float, float] | None:
    """Read `MIN..MAX`; None if requests may not say their scale.

    Raises:
        ValueError: it is not a range of finite numbers.
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
