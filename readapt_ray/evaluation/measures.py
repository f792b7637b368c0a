"""Compute measures of retrieval quality, by their usual names, through ir-measures.

In: a run and judgements. Out: the value of each measure for each judged query, and the mean. A judged query without
results counts as zero. A query without judgements is reported, but not part of the mean. Ten million results take some
seconds if every measure has a cutoff, since results below the deepest cutoff are skipped. Ties are in trec_eval's order
for every measure, whichever tool computes it.
"""

import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ir_measures import parse_measure, providers
from numpy.typing import NDArray

from readapt_ray.comma_lists import split_list
from readapt_ray.errors import InputError
from readapt_ray.evaluation.runs import Run, load_run
from readapt_ray.records import Qrel, ScoredDoc
from readapt_ray.sources.judgements import read_qrels

Judgements = Mapping[str, Mapping[str, int]]
"""Relevance by query_id and doc_id."""

_PROVIDERS = ("pytrec_eval", "msmarco", "judged", "compat")
_CUT_FAMILIES = frozenset({"nDCG", "R", "P", "RR", "AP", "Success"})
_DEEP = 500
_COUNTS = frozenset({"NumQ", "NumRel", "NumRet", "NumRelRet"})
_EXAMPLES = ("nDCG@10", "R@100", "RR@10", "P@5", "AP", "Success@5", "Rprec", "Bpref", "Judged@10")


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The values of the measures of one run, per query and on average."""

    query_ids: tuple[str, ...]
    """The judged queries, in the order of the values."""
    values: dict[str, NDArray[np.float64]]
    """float64 [Q] for each measure, by its canonical name."""
    without_results: tuple[str, ...]
    """Judged queries without any result in the run; they count as zero."""
    without_judgements: tuple[str, ...]
    """Queries of the run without judgements; they are left out."""

    @functools.cached_property
    def means(self) -> dict[str, float]:
        """Return the mean of each measure over the judged queries, by canonical name."""
        return {name: float(values.mean()) for name, values in self.values.items()}


def measure(
    run: str | os.PathLike[str] | Mapping[str, Mapping[str, float]],
    qrels: str | os.PathLike[str] | Mapping[str, Mapping[str, int]],
    measures: str | Sequence[str],
    columns: Sequence[str] = (),
) -> Measurement:
    """Compute measures of a run, such as nDCG@10, from a run and judgements.

        found = measure("run/results.trec", "run/corpus/qrels/test.parquet", "nDCG@10,R@100")
        found.means                               # {"nDCG@10": 0.31, "R@100": 0.27}
        dict(zip(found.query_ids, found.values["nDCG@10"]))   # the value of each query

    Args:
        run: a TREC run file, the artifact of a search, or scores by query_id and doc_id.
        qrels: a file of judgements in any format that `readapt evaluate` reads, or relevance by query_id and doc_id.
        measures: names such as `nDCG@10`, in a list or in one text with commas.
        columns: columns of the file of judgements, if they have other names than usual: `["query_id=key",
            "relevance=grade"]`.

    Returns:
        `query_ids` has the Q judged queries, `values` float64 [Q] for each measure, `means` their means. A judged query
        without results counts as zero. Equal scores are ranked as trec_eval ranks them.

    Raises:
        InputError: a file cannot be read, a measure is unknown, a score is not finite, the judgements are empty or
            contradict each other, or no query of the run is judged.
    """
    parsed = parse_measures(measures)
    judgements = group_judgements(
        (Qrel(query_id, *each) for query_id, judged in qrels.items() for each in judged.items())
        if isinstance(qrels, Mapping)
        else read_qrels(os.fspath(qrels), columns)
    )
    if not isinstance(run, Mapping):
        name = os.fspath(run)
        return measure_run(load_run(name), judgements, parsed, name=name)
    results = {
        query_id: [ScoredDoc(query_id, doc_id, score) for doc_id, score in scores.items()]
        for query_id, scores in run.items()
    }
    return measure_run(Run.of(results), judgements, parsed)


def parse_measures(names: str | Sequence[str]) -> dict[str, Any]:
    """Parse measures from their usual names: `nDCG@10`, `R@100`, `RR@10`, `AP(rel=2)`, ...

    Lower or upper case does not matter. A measure that is given twice counts once.

    Args:
        names: a list, or one text with commas between the names.

    Returns:
        ir-measures' object for each canonical name (`MRR@10` becomes `RR@10`), in the order given.

    Raises:
        InputError: no measure is given, one is unknown (the message lists the known ones), or its cutoff is not
            possible.
    """
    texts = split_list(names) if isinstance(names, str) else [part for name in names for part in split_list(name)]
    if not texts:
        raise InputError(f"no measure given; for example {','.join(_EXAMPLES[:3])}")
    found = [_parse(text) for text in texts]
    return {str(measure): measure for measure in found}


def describe_measures(names: str | Sequence[str]) -> dict[str, str]:
    """Return a sentence that says what each measure means, from ir-measures, by canonical name.

    Raises:
        InputError: as in `parse_measures`.
    """
    return {name: each.SHORT_DESC.rstrip(".") + "." for name, each in parse_measures(names).items()}


@functools.cache
def known_measures() -> tuple[str, ...]:
    """Return the sorted families of measures that can be computed here, without cutoffs: `AP`, `nDCG`, `R`, ..."""
    supported = {
        each.NAME
        for name in _PROVIDERS
        if providers.registry[name].is_available()
        for each in providers.registry[name].SUPPORTED_MEASURES
    }
    return tuple(sorted(supported - _COUNTS, key=str.casefold))


def group_judgements(qrels: Iterable[Qrel]) -> dict[str, dict[str, int]]:
    """Group judgements by query and passage: relevance by query_id and doc_id. A repeated judgement counts once.

    Raises:
        InputError: there are no judgements, or a passage has two different ones for one query.
    """
    grouped: dict[str, dict[str, int]] = {}
    for query_id, doc_id, relevance in qrels:
        judged = grouped.setdefault(query_id, {})
        if judged.setdefault(doc_id, relevance) != relevance:
            raise InputError(
                f"the judgements give passage {doc_id!r} relevance {judged[doc_id]} and {relevance} for query "
                f"{query_id!r}; keep one"
            )
    if not grouped:
        raise InputError("the judgements are empty; give a file with query_id, doc_id and relevance")
    return grouped


def of_documents(judgements: Judgements, document_of: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """Convert judgements of passages to judgements of documents: a document gets its passages' highest relevance.

    Args:
        judgements: relevance by query_id and doc_id of a passage.
        document_of: the document's id by the doc_id of a passage; it must have all judged passages.
    """
    merged: dict[str, dict[str, int]] = {}
    for query_id, judged in judgements.items():
        own = merged.setdefault(query_id, {})
        for doc_id, relevance in judged.items():
            document = document_of[doc_id]
            own[document] = max(relevance, own.get(document, relevance))
    return merged


def measure_run(run: Run, judgements: Judgements, measures: Mapping[str, Any], *, name: str = "run") -> Measurement:
    """Compute measures of a run for every judged query.

    A judged query without results counts as zero. Queries without judgements are left out.

    Args:
        run: the ranked results.
        judgements: from `group_judgements`.
        measures: from `parse_measures`.
        name: name of the run in errors.

    Raises:
        InputError: no query of the run is judged.
    """
    place = {query_id: index for index, query_id in enumerate(judgements)}
    judged_here = [query_id for query_id in run.query_ids if query_id in place]
    if not judged_here:
        raise InputError(
            f"{name}: none of its {len(run.query_ids):,} queries ({_some(run.query_ids)}) is among the "
            f"{len(place):,} judged ones ({_some(list(place))}); give the judgements of these queries"
        )
    values = {measure: np.zeros(len(place)) for measure in measures.values()}
    for cutoff, group in _by_cutoff(measures).items():
        evaluator = _provider().evaluator(group, judgements)
        for found in evaluator.iter_calc(_nested(run, place, cutoff)):
            values[found.measure][place[found.query_id]] = found.value
    present = set(judged_here)
    return Measurement(
        query_ids=tuple(place),
        values={label: values[measure] for label, measure in measures.items()},
        without_results=tuple(query_id for query_id in place if query_id not in present),
        without_judgements=tuple(query_id for query_id in run.query_ids if query_id not in place),
    )


def recall_curve(run: Run, judgements: Judgements, cutoffs: Sequence[int]) -> list[float]:
    """Return the mean R@k over the judged queries for each cutoff k; equal to the R@k of `measure_run`.

    A passage is relevant if its relevance is above 0. A query without relevant passages or without results counts as 0.
    """
    doc_codes = {doc_id: code for code, doc_id in enumerate(run.doc_ids)}
    query_codes = {query_id: index for index, query_id in enumerate(run.query_ids)}
    wanted, weights = [], []
    for query_id, judged in judgements.items():
        relevant = [doc_id for doc_id, relevance in judged.items() if relevance > 0]
        found = [doc_codes[doc_id] for doc_id in relevant if doc_id in doc_codes]
        if relevant and query_id in query_codes:
            wanted += [query_codes[query_id] * len(doc_codes) + code for code in found]
            weights += [1 / len(relevant)] * len(found)
    order = np.argsort(wanted)
    keys, shares = np.array(wanted, np.int64)[order], np.array(weights)[order]
    queries = np.repeat(np.arange(len(run.query_ids)), np.diff(run.offsets))
    at = np.searchsorted(keys, run_keys := queries * len(doc_codes) + run.codes)
    at[at == len(keys)] = 0
    hits = np.flatnonzero(keys[at] == run_keys) if len(keys) else np.array([], np.int64)
    ranks = hits - run.offsets[queries[hits]] + 1
    return [float(shares[at[hits]][ranks <= cutoff].sum() / len(judgements)) for cutoff in cutoffs]


def _parse(text: str) -> Any:
    family = text.partition("@")[0].partition("(")[0].strip()
    alike = [name for name in known_measures() if name.casefold() == family.casefold()]
    if len(alike) == 1:  # ndcg@10 is nDCG@10
        text, family = text.strip().replace(family, alike[0], 1), alike[0]
    try:
        measure = parse_measure(text)
        measure.validate_params()
    except (NameError, ValueError, SyntaxError, AssertionError, TypeError, KeyError):
        measure = None
    known = known_measures()
    examples = f"for example {', '.join(_EXAMPLES)}"
    if family not in known and (measure is None or measure.NAME not in known):
        raise InputError(
            f"unknown measure {text!r}; known are {', '.join(known)}, with a cutoff where they take one; {examples}"
        )
    if measure is None or measure.params.get("cutoff", 1) < 1 or not _provider().supports(measure):
        raise InputError(
            f"measure {text!r} cannot be computed; a cutoff is a whole number from 1 on, and R, P, Success and "
            f"Judged need one; {examples}"
        )
    return measure


def _provider() -> Any:
    return providers.FallbackProvider([providers.registry[each] for each in _PROVIDERS])


def _by_cutoff(measures: Mapping[str, Any]) -> dict[int | None, list[Any]]:
    """Group measures by how many results they look at; None for those that look at 500 or more, or at all."""
    groups: dict[int | None, list[Any]] = {}
    for measure in measures.values():
        cuts = measure.NAME in _CUT_FAMILIES and not measure.params.get("judged_only")
        cutoff = measure.params.get("cutoff", _DEEP) if cuts else _DEEP
        groups.setdefault(cutoff if cutoff < _DEEP else None, []).append(measure)
    return groups


def _nested(run: Run, wanted: Mapping[str, int], cutoff: int | None) -> dict[str, dict[str, float]]:
    """Return the results of wanted queries, at most `cutoff` each, with scores that encode our ranks.

    The tools would break ties of the real scores in different ways.
    """
    nested = {}
    for index, query_id in enumerate(run.query_ids):
        if query_id not in wanted:
            continue
        first, last = int(run.offsets[index]), int(run.offsets[index + 1])
        if cutoff is not None:
            last = min(last, first + cutoff)
        doc_ids = [run.doc_ids[code] for code in run.codes[first:last].tolist()]
        nested[query_id] = dict(zip(doc_ids, map(float, range(len(doc_ids), 0, -1)), strict=True))
    return nested


def _some(ids: Sequence[str]) -> str:
    return ", ".join(repr(each) for each in ids[:3]) + (", ..." if len(ids) > 3 else "") if ids else "none at all"
