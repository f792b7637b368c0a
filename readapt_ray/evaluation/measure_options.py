"""Define the options that name measures, and how deep runs must be for them."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator

from readapt_ray.catalog.corpora import find_corpus
from readapt_ray.errors import InputError
from readapt_ray.storage import Location

_LEAST_DEPTH = 100
_DEPTH_WITHOUT_CUTOFF = 1000
"""Results per query for measures that look at all results, such as AP; TREC uses this depth too."""


def _one_measure(text: str) -> str:
    """Return the canonical name of a measure: `MRR@10` becomes `RR@10`."""
    from readapt_ray.evaluation.measures import parse_measures

    try:
        names = list(parse_measures(text))
    except InputError as error:
        raise ValueError(str(error)) from error
    if len(names) != 1:
        raise ValueError("give one measure")
    return names[0]


MeasureOption = Annotated[str, AfterValidator(_one_measure)]
"""One measure, under its canonical name."""


def depth_of(measures: str | Sequence[str]) -> int:
    """Return how many results per query measures need: their largest cutoff, but at least 100.

    If a measure has no cutoff, at least 1,000. So `nDCG@10` gives 100, `R@200` 200 and `AP` 1,000.

    Args:
        measures: a list of names, or one text with commas.

    Raises:
        InputError: a measure is unknown.
    """
    found = cutoffs(measures).values()
    return max(_LEAST_DEPTH if all(found) else _DEPTH_WITHOUT_CUTOFF, *found)


def cutoffs(measures: str | Sequence[str]) -> dict[str, int]:
    """Return the cutoff of each measure, by canonical name: how many results per query it looks at; 0 for all.

    Raises:
        InputError: a measure is unknown.
    """
    from readapt_ray.evaluation.measures import parse_measures

    return {name: int(each.params.get("cutoff", 0)) for name, each in parse_measures(measures).items()}


def drops_self_hits(source: str | None) -> bool:
    """Return whether the queries of a catalog corpus are passages too, so that none may find itself.

    False if the source is None, unknown, or not in the catalog.

    Args:
        source: what the corpus was ingested from; None if unknown. As in `ingest`, an existing file or folder of that
            name is not the catalog's corpus.
    """
    row = find_corpus(source) if source is not None else None
    return row is not None and row.drops_self_hits and not Location(str(source)).exists()
