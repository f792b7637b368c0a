"""Check requirements that a run must meet before it ships, such as `nDCG@10 >= base - 0.005` or `nDCG@10 >= 0.3`.

In: requirements as text, the means of the runs, and their comparisons with the baseline (the first run). Out: for each
run and requirement, whether it holds. `base` makes a non-inferiority test: the lower end of the 95% interval of the
difference must reach the margin, so with too few queries it does not hold. Otherwise the mean is compared with the
number. The word `general` before a requirement applies it to the general collection.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from readapt_ray.config import meant
from readapt_ray.errors import InputError
from readapt_ray.evaluation.significance import Comparison
from readapt_ray.evaluation.tables import signed, value

_NUMBER = r"\d*\.?\d+(?:[eE][+-]?\d+)?"
_FORM = re.compile(
    r"(?P<general>general\s+)?(?P<measure>\S.*?)\s*>=\s*"
    rf"(?:(?P<base>base)(?:\s*(?P<sign>[+-])\s*(?P<margin>{_NUMBER}))?|(?P<floor>{_NUMBER}))"
)


class Requirement(NamedTuple):
    """A measure, and the least value or difference that it must reach."""

    text: str
    measure: str
    bound: float
    """Least difference from the baseline if `is_relative`, else least mean."""
    is_relative: bool
    is_general: bool = False
    """Whether it is for the general collection."""


def parse_requirement(text: str, measures: Sequence[str], general: Sequence[str] = ()) -> Requirement:
    """Parse a requirement, such as `nDCG@10 >= base - 0.005` or `general R@100 >= 0.3`.

    Args:
        text: as the user wrote it.
        measures: measures of the run.
        general: measures on the general collection; empty if none is measured.

    Raises:
        InputError: the text is no requirement, its measure is not measured, or it begins with `general` and no general
            collection is measured.
    """
    found = _FORM.fullmatch(text.strip())
    if found is None:
        raise InputError(
            f"require = {text!r}: must be MEASURE >= base - MARGIN, MEASURE >= base + MARGIN or MEASURE >= NUMBER, such as "
            f"'nDCG@10 >= base - 0.005', or one of these after the word general"
        )
    measure, is_general = found["measure"], bool(found["general"])
    if is_general and not general:
        raise InputError(
            f"require = {text!r}: no general collection is measured; give its report with --general, in a run its corpus "
            f"in section 'general', or leave the word general out"
        )
    measures = general if is_general else measures
    known = {_canonical(each): each for each in measures}
    measure = known.get(_canonical(measure), measure)
    if measure not in measures:
        hint = meant(measure, measures) or f"measured are {', '.join(measures)}; add it to the measures"
        raise InputError(f"require = {text!r}: {measure!r} is not measured; {hint}")
    if found["floor"]:
        return Requirement(text.strip(), measure, float(found["floor"]), is_relative=False, is_general=is_general)
    margin = float(found["margin"] or 0.0)
    bound = -margin if found["sign"] == "-" else margin
    return Requirement(text.strip(), measure, bound, is_relative=True, is_general=is_general)


def _canonical(measure: str) -> str:
    """Return the canonical name of a measure, such as RR@10 for MRR@10; other text unchanged."""
    from readapt_ray.evaluation.measures import parse_measures

    try:
        return next(iter(parse_measures([measure])))
    except InputError:
        return measure


def check_requirements(
    requirements: Iterable[Requirement], means: Mapping[str, Mapping[str, float]], comparisons: Sequence[Comparison]
) -> list[dict[str, Any]]:
    """Check each requirement for each run after the first, or for the first if there is no other.

    A requirement relative to `base` holds if the lower end of the 95% interval of the difference reaches it. It does
    not hold if there is no interval (one query only). Any other holds if the mean reaches it.

    Args:
        requirements: what must hold, all for the collection of `means`.
        means: by run and measure; the first run is the baseline.
        comparisons: of the other runs with the baseline.

    Returns:
        For each requirement and run: `text`, `run`, `holds`, the `outcome` with its figures, and all of it as a
        `sentence`.

    Raises:
        InputError: a requirement compares with the baseline, and there is no other run.
    """
    baseline, *others = means
    found = []
    for each in requirements:
        if each.is_relative and not others:
            raise InputError(
                f"require = {each.text!r} compares with the first run, and there is no other; give two runs"
            )
        for run in others or [baseline]:
            holds, figures = _relative(each, run, comparisons) if each.is_relative else _absolute(each, means[run])
            outcome = f"{'holds' if holds else 'does not hold'} ({figures})."
            sentence = f"{run}: {each.text} {outcome}"
            found.append({"text": each.text, "run": run, "holds": holds, "outcome": outcome, "sentence": sentence})
    return found


def _relative(required: Requirement, run: str, comparisons: Sequence[Comparison]) -> tuple[bool, str]:
    comparison = next(each for each in comparisons if (each.run, each.measure) == (run, required.measure))
    if comparison.interval is None:
        return False, comparison.note
    low, high = comparison.interval
    figures = f"difference {signed(comparison.difference)}, 95% interval {signed(low)} to {signed(high)}"
    return low >= required.bound, figures


def _absolute(required: Requirement, means: Mapping[str, float]) -> tuple[bool, str]:
    mean = means[required.measure]
    return mean >= required.bound, f"mean {value(mean)}"
