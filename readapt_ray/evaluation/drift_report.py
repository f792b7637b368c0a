"""Report what an adaptation changed, measured without queries, as Markdown and as one HTML page.

None of the figures says whether retrieval is better: that takes queries and judgements.
"""

from collections.abc import Mapping
from typing import Any

from readapt_ray.evaluation.report import page_template
from readapt_ray.retrieval.truncation import sentence

CAUTION = "None of this says whether the adapted retriever finds better; that takes queries and judgements."


def rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the lines of the report as pairs: what was measured, and the figures.

    Args:
        found: `loss`, `vectors` and `truncation` (as `retrieval.truncation` makes it, or None). `loss` has `before`,
            `after`, `difference` (after - before), the ends of its 95% interval `low` and `high`, and `num_passages`;
            or only a `note` why there is none. `vectors` has `mean_cosine`, `low_cosine` (5th percentile) and
            `num_passages`; with more than 10 passages also `neighbours_kept` and its `plus_minus`, as shares of 1.
    """
    loss, vectors = found["loss"], found["vectors"]
    told = loss.get("note", "")
    if not told:
        told = (
            f"{loss['before']:.4f} before, {loss['after']:.4f} after training ({loss['difference']:+.4f}, 95% interval "
            f"{loss['low']:+.4f} to {loss['high']:+.4f}; {loss['num_passages']:,} passages)"
        )
    lines = [
        ("Language-model loss per token on passages withheld from training", told),
        (
            "Cosine of a passage's vectors before and after",
            f"{vectors['mean_cosine']:.4f} on average, {vectors['low_cosine']:.4f} at the 5th percentile "
            f"({vectors['num_passages']:,} passages)",
        ),
    ]
    if "neighbours_kept" in vectors:
        kept = (
            f"{100 * vectors['neighbours_kept']:.1f}% (± {100 * vectors['plus_minus']:.1f}), within the same passages"
        )
        lines.append(("Of a passage's 10 nearest neighbours, the same before and after", kept))
    if found["truncation"]:
        lines.append(("Truncation in embedding", sentence(found["truncation"])))
    return lines


def to_markdown(found: Mapping[str, Any]) -> str:
    """Return the report as Markdown; `found` is as in `rows`."""
    lines = [f"- {what}: {figures}" for what, figures in rows(found)]
    return "\n".join(["# What the adaptation changed, without queries", "", *lines, "", CAUTION]) + "\n"


def to_html(found: Mapping[str, Any]) -> str:
    """Return the report as one self-contained HTML page; `found` is as in `rows`."""
    return page_template("drift.html").render(rows=rows(found), caution=CAUTION)
