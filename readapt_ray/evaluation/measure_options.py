"""Define the options that name measures, and how deep runs must be for them."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator

from readapt_ray.catalog.corpora import find_corpus
from readapt_ray.storage import Location

_LEAST_DEPTH = 100


def _one_measure(text: str) -> str:
    """Return the canonical name of a measure: `MRR@10` becomes `RR@10`."""
    from readapt_ray.evaluation.measures import parse_measures

    names = list(parse_measures(text))
    if len(names) != 1:
        raise ValueError("give one measure")
    return names[0]


MeasureOption = Annotated[str, AfterValidator(_one_measure)]
"""One measure, under its canonical name."""


def depth_of(measures: str | Sequence[str]) -> int:
    """Return how many results per query these measures need: the largest cutoff, and at least 100.

    Raises:
        InputError: a name is not known.
    """
    from readapt_ray.evaluation.measures import parse_measures

    cutoffs = [int(measure.params.get("cutoff", 0)) for measure in parse_measures(measures).values()]
    return max(_LEAST_DEPTH, *cutoffs)


def drops_self_hits(source: str | None) -> bool:
    """Return whether the catalog says of a corpus, by what it was ingested from, that its queries must not find themselves.

    As in `ingest`, a file or folder of that name is that file or folder, and not the catalog's corpus.
    """
    row = find_corpus(source) if source is not None else None
    return row is not None and row.drops_self_hits and not Location(str(source)).exists()
