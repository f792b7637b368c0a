"""List the generations of a root: when each was made, what changed, how long it took, and whether it still exists."""

from typing import Any

from readapt_ray import generations
from readapt_ray.evaluation.tables import aligned_table
from readapt_ray.progress import duration
from readapt_ray.storage import Location

_COUNTS = ("added", "changed", "deleted", "kept")


def history(root: Location) -> list[dict[str, Any]]:
    """Return a row per generation, oldest first: number, state, counts of passages, seconds, advice, signals.

    The state is "present" (the last one), "freed" (`readapt clean` removed its artifacts) or "there".

    Raises:
        CorruptFileError: the list of generations was cut short or altered.
    """
    there = generations.read(root)
    return [
        {
            "generation": each.number,
            "what": each.what,
            "state": "present" if each is there[-1] else "freed" if each.freed else "there",
            "created": each.created,
            **{name: each.counts.get(name, 0) for name in _COUNTS},
            "seconds": each.seconds,
            "advice": each.advice,
            **each.signals,
        }
        for each in there
    ]


def as_text(root: Location) -> str:
    """Return the generations of a root as an aligned text table; a sentence if there are none."""
    rows = history(root)
    if not rows:
        return f"no generation under {root}; `readapt refresh` makes the first"
    lines = [("generation", "what", "state", "created", *_COUNTS, "time", "")]
    for row in rows:
        counts = (f"{row[name]:,}" for name in _COUNTS)
        texts = str(row["generation"]), row["what"], row["state"], row["created"]
        lines.append((*texts, *counts, duration(row["seconds"]), row["advice"]))
    return aligned_table(lines)
