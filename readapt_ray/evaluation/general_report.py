"""Compare the report on the user's corpus with a report on a general collection: what was gained and what was lost.

In: the output of `readapt evaluate` on the general collection, and the provenance of the runs on the user's corpus.
Out: the comparisons of the general report, under the run names of the user's report.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from readapt_ray.artifacts import Artifact
from readapt_ray.errors import InputError
from readapt_ray.evaluation.significance import Comparison
from readapt_ray.evaluation.tables import difference_cells, markdown, markdown_table
from readapt_ray.progress import amount


@dataclasses.dataclass(frozen=True)
class GeneralReport:
    """Measures and comparisons of the user's retrievers on a general collection (a public one, such as MS MARCO)."""

    uri: str
    """Output of `readapt evaluate` on the general collection."""
    num_queries: int
    """Judged queries of the general collection."""
    means: Mapping[str, Mapping[str, float]]
    """By run, in the order of the runs on the user's corpus, and by measure."""
    comparisons: Sequence[Comparison]
    """Comparisons of the other runs with the first, under the run names of the user's report."""


def read_general(artifact: Artifact, own: Mapping[str, Mapping[str, Any]]) -> GeneralReport:
    """Read the report on a general collection, and check that it measured the same retrievers.

    Runs are matched by position, and get the names that they have on the user's corpus. Models are compared only if
    both provenances have fingerprints.

    Args:
        artifact: output of `readapt evaluate` on the general collection.
        own: provenance of the runs on the user's corpus, by name; the baseline first.

    Raises:
        InputError: the general report has another number of runs, other retrievers, or another order.
    """
    details = artifact.manifest.details
    runs = json.loads((artifact.location / "report.json").read_bytes())["runs"]
    if len(runs) != len(own):
        raise InputError(
            f"general = {artifact.uri!r} has {amount(len(runs), 'runs')} and this report has {len(own)}; evaluate the same "
            f"retrievers on both collections"
        )
    for run, (name, provenance) in zip(runs, own.items(), strict=True):
        there, here = _models(run["provenance"]), _models(provenance)
        if there and here and there != here:
            raise InputError(
                f"general = {artifact.uri!r} measured another model as {run['name']!r} than {name!r} is; evaluate the same "
                f"retrievers on both collections, in the same order"
            )
    names = dict(zip((run["name"] for run in runs), own, strict=True))
    comparisons = [Comparison(**each) for each in details["comparisons"]]
    return GeneralReport(
        uri=artifact.uri,
        num_queries=details["num_queries"],
        means={names[name]: means for name, means in details["means"].items()},
        comparisons=[
            dataclasses.replace(each, run=names[each.run], baseline=names[each.baseline]) for each in comparisons
        ],
    )


def _models(provenance: Mapping[str, Any]) -> list[str]:
    """Return the fingerprints of the encoders of passages and of queries; empty if the provenance is unknown."""
    details = provenance.get("details", {})
    found = [details.get("encoder", {}).get("fingerprint"), details.get("query_encoder", {}).get("query_fingerprint")]
    return [each for each in found if each]


def side_by_side(comparisons: Sequence[Comparison], general: GeneralReport) -> list[dict[str, Any]]:
    """Return a row per comparison that both reports have, in the order of `comparisons`.

    Args:
        comparisons: those on the user's queries.
        general: the general report, from `read_general`.

    Returns:
        Rows of `run`, `measure`, `own` and `general`: the last two are the comparisons as dicts.
    """
    there = {(each.run, each.measure): each for each in general.comparisons}
    return [
        {
            "run": each.run,
            "measure": each.measure,
            "own": dataclasses.asdict(each),
            "general": dataclasses.asdict(there[each.run, each.measure]),
        }
        for each in comparisons
        if (each.run, each.measure) in there
    ]


def general_markdown(general: Mapping[str, Any]) -> list[str]:
    """Return the section of a report about the general collection, as lines of Markdown.

    Args:
        general: the entry `general` of `report.build_report`, not None.
    """
    lines = ["", f"## Beside {amount(general['num_queries'], 'general queries')}", ""]
    header = ["run", "measure", "own: difference", "95% interval", "general: difference", "95% interval"]
    lines += markdown_table(
        header,
        [
            [row["run"], row["measure"], *(cell for side in ("own", "general") for cell in difference_cells(row[side]))]
            for row in general["rows"]
        ],
    )
    return lines + [line for each in general["verdicts"] for line in ("", f"General: {markdown(each['sentence'])}")]
