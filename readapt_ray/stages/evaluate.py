"""The evaluate stage: measure runs against judgements, test differences for significance, and write a report.

In: TREC runs, of which the first is the baseline, and qrels. Out: `measures.json`, `per_query.parquet` (query_id, run,
measure, value), `report.json`, `report.md` and `report.html`. It works in this process, without Ray. A run of 10,000
queries with 1,000 results each takes about ten seconds.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from readapt_ray.artifacts import Artifact, Workspace, fingerprint, open_artifact, produce, read_manifest
from readapt_ray.config import StageConfig
from readapt_ray.errors import CorpusError, InputError
from readapt_ray.evaluation import measures as measuring
from readapt_ray.evaluation import report as reporting
from readapt_ray.evaluation.general_report import GeneralReport, read_general
from readapt_ray.evaluation.requirements import Requirement, check_requirements, parse_requirement
from readapt_ray.evaluation.runs import Run, load_run
from readapt_ray.evaluation.significance import Comparison, compare
from readapt_ray.evaluation.tables import named
from readapt_ray.progress import amount
from readapt_ray.records import ScoredDoc
from readapt_ray.retrieval.passage_files import PassageFiles
from readapt_ray.sources.columns import ColumnsOption
from readapt_ray.sources.judgements import read_qrels, read_queries
from readapt_ray.sources.splitting import parent_of
from readapt_ray.storage import Location

logger = logging.getLogger("readapt_ray")

_PEEKED_IDS = 1000


class EvaluateConfig(StageConfig):
    """The options of `readapt evaluate`."""

    runs: tuple[str, ...]
    """TREC run files, separated by commas. The first is the baseline of the comparison."""
    qrels: str
    """Judgements: a file (TREC, .jsonl, .csv, .tsv, .parquet, .json, .arrow) or a folder of them."""
    measures: tuple[str, ...] = ("nDCG@10", "R@100", "RR@10")
    """Measures, separated by commas: nDCG@10 (gain of the first 10 results, discounted by rank), R@100 (share of the
    relevant passages among the first 100), RR@10 (1 / rank of the first relevant passage) and others of ir-measures.
    The first one orders the list of changed queries."""
    names: tuple[str, ...] = ()
    """Names of the runs in the report, separated by commas. If omitted, the names of their files."""
    queries: str = ""
    """Queries, to show their texts in the report: a file or folder."""
    columns: ColumnsOption = ()
    """Columns of queries and qrels, if they are not called as usual: query_id=key,query=question,doc_id=docno,relevance=grade."""
    corpus: str = ""
    """Output of `readapt ingest`, to show titles and texts in the report."""
    general: str = ""
    """Output of `readapt evaluate` for the same retrievers on a general collection. The report then also shows what
    adapting lost there."""
    require: tuple[str, ...] = ()
    """Conditions on each run after the first, separated by commas; if one fails, the exit code is 1. In
    "nDCG@10 >= base - 0.005" base is the first run: the whole 95% interval of the difference must be above -0.005.
    "nDCG@10 >= 0.3" is about the mean. "general nDCG@10 >= base - 0.005" uses the measures of `general`."""
    num_permutations: int = Field(default=10_000, ge=100, le=10_000_000)
    """Number of random permutations in the significance test, and of bootstrap samples in the intervals."""
    seed: int = Field(default=0, ge=0)
    """Random seed for the significance test and the intervals."""

    inputs: ClassVar[frozenset[str]] = frozenset({"runs", "qrels", "queries", "corpus", "general"})


@dataclass(frozen=True)
class _Loaded:
    """The runs, judgements and texts of an evaluation, loaded and checked to fit each other."""

    runs: dict[str, Run]
    measurements: dict[str, measuring.Measurement]
    judgements: dict[str, dict[str, int]]
    query_texts: dict[str, str]
    corpus: PassageFiles | None
    num_unknown: int
    """Number of judgements of passages that the corpus does not have."""
    provenance: dict[str, dict[str, Any]]
    """How each run was made, by the run's name."""
    general: GeneralReport | None


def evaluate(config: EvaluateConfig) -> Artifact:
    """Measure runs, compare each with the first one, and write a report.

    A requirement (`require`) that fails raises nothing; the manifest's `requirements` say so. Does nothing if the
    output holds a report of the same options and inputs.

    Raises:
        InputError: a run, the judgements, a measure, a requirement or a name cannot be used.
        ArtifactMissingError: `corpus` or `general` is not the output of its stage.
        CorpusError: the runs and the judgements belong to different corpora: no judged passage is in any run.
        ArtifactConflictError: the output holds something else, or a result of other options and `overwrite` is not set.
    """
    measures = measuring.parse_measures(config.measures)
    general = open_artifact(config.general, "evaluate") if config.general else None
    also = list(next(iter(general.manifest.details["means"].values()))) if general else []
    required = [parse_requirement(each, list(measures), also) for each in config.require]
    files = dict(zip(_names(config), config.runs, strict=True))
    inputs = _fingerprints(config, files)
    # Load before `produce`, so that bad input is found before the output folder is touched; skip a finished output.
    is_new = config.overwrite or read_manifest(config.output) is None
    loaded = _load(config, files, measures) if is_new else None

    def work(workspace: Workspace) -> None:
        _write(workspace, config, files, loaded or _load(config, files, measures), required)

    return produce("evaluate", config, inputs=inputs, work=work, identity={"names": list(files)})


def _names(config: EvaluateConfig) -> list[str]:
    """Return a name for each run: the given one, or its file's, with the folder if two files have one name."""
    if not config.runs:
        raise InputError("no run given; give --runs FILE.trec, or several with commas between them")
    names = list(config.names)
    if names and len(names) != len(config.runs):
        raise InputError(
            f"{amount(len(names), 'names')} for {amount(len(config.runs), 'runs')}; give one name for each run, or none"
        )
    if not names:
        paths = [PurePosixPath(uri.split("?")[0]) for uri in config.runs]
        names = [path.stem for path in paths]
        if len(set(names)) < len(names):
            names = [f"{path.parent.name}/{path.stem}" for path in paths]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"two runs are called {twice[0]!r}; give a different name to each with --names")
    return names


def _fingerprints(config: EvaluateConfig, files: Mapping[str, str]) -> dict[str, str]:
    for uri in files.values():
        if not Location(uri).is_file():
            raise InputError(f"no run at {uri!r}: no such file; give a TREC run, such as one of `readapt search`")
    known = {"runs": fingerprint([_run_identity(uri) for uri in files.values()])}
    for option, uri in (("qrels", config.qrels), ("queries", config.queries)):
        if uri:
            if not Location(uri).exists():
                raise InputError(f"{option} = {uri!r} does not exist; give a file, or a folder of them")
            known[option] = fingerprint(Location(uri).content_fingerprint())
    if config.corpus:
        known["corpus"] = open_artifact(config.corpus, "ingest").fingerprint
    if config.general:
        known["general"] = open_artifact(config.general, "evaluate").fingerprint
    return known


def _run_identity(uri: str) -> list[Any]:
    """Return what identifies a run: a hash of its file, and its manifest's fingerprint, since the report shows that."""
    manifest = read_manifest(uri)
    return [list(Location(uri).content_fingerprint().values()), manifest.fingerprint if manifest else ""]


def _load(config: EvaluateConfig, files: Mapping[str, str], measures: Mapping[str, Any]) -> _Loaded:
    judgements = measuring.group_judgements(read_qrels(config.qrels, config.columns))
    if all(relevance <= 0 for judged in judgements.values() for relevance in judged.values()):
        logger.warning(
            "no judgement of %r is above 0, so every measure is zero; check the column of relevance", config.qrels
        )
    queries = read_queries(config.queries, config.columns) if config.queries else []
    texts = {query.query_id: query.text for query in queries}
    corpus = PassageFiles.open(config.corpus) if config.corpus else None
    if corpus is not None and corpus.is_split:
        documents = corpus.documents_of(doc_id for judged in judgements.values() for doc_id in judged)
        judgements = measuring.of_documents(judgements, documents)
    runs, measurements = {}, {}
    for name, uri in files.items():
        runs[name] = _of_documents(load_run(uri), judgements, corpus, name)
        measurements[name] = measuring.measure_run(runs[name], judgements, measures, name=uri)
        _warn(name, measurements[name])
    num_unknown = _num_unknown(judgements, corpus, config.corpus) if corpus is not None else 0
    is_of_corpus = corpus is not None and num_unknown < sum(map(len, judgements.values()))
    if not is_of_corpus:
        _check_one_corpus(judgements, runs, config)
    provenance = {name: _provenance(uri) for name, uri in files.items()}
    general = read_general(open_artifact(config.general, "evaluate"), provenance) if config.general else None
    return _Loaded(runs, measurements, judgements, texts, corpus, num_unknown, provenance, general)


def _of_documents(run: Run, judgements: measuring.Judgements, corpus: PassageFiles | None, name: str) -> Run:
    """Merge results that are passages of split documents to these documents, by their best passages.

    Without the corpus, results are taken for passages if the judgements name more of their documents than of the
    results themselves.
    """
    if corpus is not None:
        parts = [doc_id for doc_id in run.doc_ids if doc_id != parent_of(doc_id)][:_PEEKED_IDS]
        is_of_passages = corpus.is_split and corpus.has_any(parts)
    else:
        judged = {doc_id for each in judgements.values() for doc_id in each}
        is_of_passages = len(judged.intersection(map(parent_of, run.doc_ids))) > len(judged.intersection(run.doc_ids))
    if not is_of_passages:
        return run
    merged: dict[str, list[ScoredDoc]] = {}
    for index, query_id in enumerate(run.query_ids):
        best: dict[str, ScoredDoc] = {}
        for each in run.top(index):
            best.setdefault(parent_of(each.doc_id), each._replace(doc_id=parent_of(each.doc_id)))
        merged[query_id] = list(best.values())
    logger.info("%s: passages are merged to their documents, by the best of each", name)
    return Run.of(merged, name=name)


def _check_one_corpus(judgements: measuring.Judgements, runs: Mapping[str, Run], config: EvaluateConfig) -> None:
    """Refuse judgements that belong to another corpus than the runs, since every measure would be zero.

    Raises:
        CorpusError: no run has any judged passage.
    """
    judged = {doc_id for each in judgements.values() for doc_id in each}
    if any(not judged.isdisjoint(run.doc_ids) for run in runs.values()):
        return
    found = next((run.doc_ids for run in runs.values() if run.doc_ids), ())
    raise CorpusError(
        f"no passage that {config.qrels!r} judges occurs in any of the runs (it judges {named(sorted(judged)[:3])}; "
        f"they have {named(list(found)[:3])}); do they belong to one corpus?"
    )


def _num_unknown(judgements: measuring.Judgements, corpus: PassageFiles, name: str) -> int:
    """Count the judgements of passages that the corpus does not have; warn and name the passages."""
    missing = corpus.missing(doc_id for judged in judgements.values() for doc_id in judged)
    lost = set(missing)
    count = sum(doc_id in lost for judged in judgements.values() for doc_id in judged)
    if count:
        logger.warning(
            "%d of %d judgements are of %d passages that %s does not have, so no run can find them: %s",
            count,
            sum(map(len, judgements.values())),
            len(missing),
            name,
            named(missing),
        )
    return count


def _warn(name: str, measurement: measuring.Measurement) -> None:
    if missing := measurement.without_results:
        logger.warning(
            "%s has no results for %d of %d judged queries, which count as zero: %s",
            name,
            len(missing),
            len(measurement.query_ids),
            named(missing),
        )
    if unjudged := measurement.without_judgements:
        logger.warning("%s: %d queries without judgements are left out: %s", name, len(unjudged), named(unjudged))


def _write(
    workspace: Workspace,
    config: EvaluateConfig,
    files: Mapping[str, str],
    loaded: _Loaded,
    required: Sequence[Requirement],
) -> None:
    measurements = loaded.measurements
    comparisons = compare(
        {name: each.values for name, each in measurements.items()},
        num_permutations=config.num_permutations,
        num_resamples=config.num_permutations,
        seed=config.seed,
    )
    means = {name: each.means for name, each in measurements.items()}
    requirements = check_requirements([each for each in required if not each.is_general], means, comparisons)
    if general := loaded.general:
        also = [each for each in required if each.is_general]
        requirements += check_requirements(also, general.means, general.comparisons)
    report = reporting.build_report(
        loaded.runs,
        measurements,
        comparisons,
        loaded.judgements,
        query_texts=loaded.query_texts,
        find_passages=loaded.corpus.find if loaded.corpus is not None else lambda _: {},
        provenance=loaded.provenance,
        num_permutations=config.num_permutations,
        seed=config.seed,
        requirements=requirements,
        general=general,
        num_unknown=loaded.num_unknown,
    )
    folder = workspace.location
    _write_per_query(folder / "per_query.parquet", measurements)
    summary = _summary(measurements, comparisons)
    (folder / "measures.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    (folder / "report.json").write_text(reporting.to_json(report))
    (folder / "report.md").write_text(reporting.to_markdown(report))
    (folder / "report.html").write_text(reporting.to_html(report))
    workspace.counts = {"num_runs": len(files), "num_queries": summary["num_queries"]}
    workspace.details = {**summary, "verdicts": [each["sentence"] for each in report["verdicts"]]}
    workspace.details["requirements"] = requirements
    if loaded.corpus is not None:
        workspace.details["qrels_of_unknown_passages"] = loaded.num_unknown


def _summary(measurements: Mapping[str, measuring.Measurement], comparisons: list[Comparison]) -> dict[str, Any]:
    return {
        "num_queries": len(next(iter(measurements.values())).query_ids),
        "means": {name: each.means for name, each in measurements.items()},
        "comparisons": [asdict(each) for each in comparisons],
        "num_without_results": {name: len(each.without_results) for name, each in measurements.items()},
        "num_without_judgements": {name: len(each.without_judgements) for name, each in measurements.items()},
    }


def _write_per_query(file: Location, measurements: Mapping[str, measuring.Measurement]) -> None:
    blocks = [
        pa.table(
            {
                "query_id": list(each.query_ids),
                "run": [name] * len(each.query_ids),
                "measure": [measure] * len(each.query_ids),
                "value": np.asarray(values),
            }
        )
        for name, each in measurements.items()
        for measure, values in each.values.items()
    ]
    with file.open_output() as stream:
        pq.write_table(pa.concat_tables(blocks), stream)


def _provenance(uri: str) -> dict[str, Any]:
    """Return how a run file was made: a hash of its content, and the fields of its manifest if it has one."""
    manifest = read_manifest(uri)
    known: dict[str, Any] = {"file": uri, "content": next(iter(Location(uri).content_fingerprint().values()))}
    if manifest is None:
        return known | {"note": "there is no manifest beside this file, so nothing is known of the model that made it"}
    return known | {
        "stage": manifest.stage,
        "fingerprint": manifest.fingerprint,
        "created": manifest.created,
        "config": manifest.config,
        "inputs": manifest.inputs,
        "counts": manifest.counts,
        "details": manifest.details,
        "versions": manifest.versions,
    }
