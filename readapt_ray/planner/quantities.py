"""Parse quantities in the notation of Kubernetes, such as 500m or 16Gi."""

from typing import Any, Final

from readapt_ray.errors import InputError

_SUFFIXES: Final = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12} | {
    suffix: float(1 << 10 * power) for power, suffix in enumerate(("Ki", "Mi", "Gi", "Ti"), 1)
}


def quantity(value: Any, where: str = "") -> float:
    """Parse a Kubernetes quantity to a number: 4 is 4.0, 500m is 0.5, 16Gi is 16 * 2^30.

    Args:
        value: text or number, without a suffix or with m, k, M, G, T, Ki, Mi, Gi or Ti.
        where: its place, for the error message; may be empty.

    Raises:
        InputError: the value is not a quantity.
    """
    text = str(value).strip()
    suffix = next((each for each in sorted(_SUFFIXES, key=len, reverse=True) if text.endswith(each)), "")
    try:
        return float(text.removesuffix(suffix)) * _SUFFIXES.get(suffix, 1.0)
    except ValueError:
        place = where and f"{where}: "
        raise InputError(f"{place}{value!r} is not a Kubernetes quantity, such as 4, 500m or 16Gi") from None
