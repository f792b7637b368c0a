"""Read numbers as Kubernetes writes them."""

from typing import Any, Final

from readapt_ray.errors import InputError

_SUFFIXES: Final = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12} | {
    suffix: float(1 << 10 * power) for power, suffix in enumerate(("Ki", "Mi", "Gi", "Ti"), 1)
}


def quantity(value: Any) -> float:
    """Parse a Kubernetes quantity (4, 500m, 16Gi) to a number.

    Raises:
        InputError: it is none.
    """
    text = str(value).strip()
    for suffix in sorted(_SUFFIXES, key=len, reverse=True):
        if text.endswith(suffix):
            return float(text[: -len(suffix)]) * _SUFFIXES[suffix]
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{value!r} is not a Kubernetes quantity, such as 4, 500m or 16Gi") from None
