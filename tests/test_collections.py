"""The main job on real test collections with the quickstart's own pair, measured again by hand from its run files."""

import json
import math
import statistics
from collections import defaultdict
from pathlib import Path

import pytest
import yaml

from readapt_ray import cli
from tests import data

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.parametrize(("name", "num_queries", "num_passages"), [("nfcorpus", 323, 3633), ("scifact", 300, 5183)])
def test_a_run_gives_the_measures_that_its_run_files_give(
    ray_session: None, tmp_path: Path, name: str, num_queries: int, num_passages: int
) -> None:
    folder = data.collection(name)
    values = {
        "source": str(folder),
        "pretrained": "quickstart-pretrained",
        "retriever": "quickstart-retriever",
        "train": {
            "mode": "packed",
            "block_tokens": 128,
            "batch_size": 32,
            "learning_rate": 1e-3,
            "num_workers": 1,
            "num_cpus_per_worker": 1,
        },
        "evaluate": {"measures": "nDCG@10,R@100"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    assert cli.main(["run", "--config", str(tmp_path / "run.yaml"), "--root", str(tmp_path / "root")]) == 0

    report = json.loads((tmp_path / "root" / "report" / "measures.json").read_text())
    judged = read_qrels(folder / "qrels" / "test.tsv")
    assert len(judged) == num_queries
    manifest = json.loads((tmp_path / "root" / "corpus" / "manifest.json").read_text())
    assert manifest["counts"]["num_passages"] == num_passages
    for run in ("retriever", "adapted"):
        ranked = read_run(tmp_path / "root" / "runs" / f"{run}.trec")
        means = report["means"][run]
        print(name, run, means)
        assert means["nDCG@10"] == pytest.approx(
            statistics.fmean(ndcg(ranked[q], judged[q], 10) for q in judged), abs=1e-9
        )
        assert means["R@100"] == pytest.approx(
            statistics.fmean(recall(ranked[q], judged[q], 100) for q in judged), abs=1e-9
        )
    assert report["means"]["retriever"] != report["means"]["adapted"]


def read_qrels(file: Path) -> dict[str, dict[str, int]]:
    """Relevance by query and document; queries that have a relevant one."""
    judged: dict[str, dict[str, int]] = defaultdict(dict)
    for line in file.read_text().splitlines()[1:]:
        query_id, doc_id, relevance = line.split("\t")
        judged[query_id][doc_id] = int(relevance)
    return judged


def read_run(file: Path) -> dict[str, list[str]]:
    """Documents of each query, best first; as trec_eval does it, ties go to the greater doc_id."""
    scored: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for line in file.read_text().splitlines():
        query_id, _, doc_id, _, score, _ = line.split()
        scored[query_id].append((float(score), doc_id))
    return {query_id: [doc_id for _, doc_id in sorted(found, reverse=True)] for query_id, found in scored.items()}


def ndcg(ranked: list[str], judged: dict[str, int], depth: int) -> float:
    """Normalised discounted cumulative gain, the gain being the relevance itself."""
    gain = sum(judged.get(doc_id, 0) / math.log2(rank + 1) for rank, doc_id in enumerate(ranked[:depth], 1))
    ideal = sorted(judged.values(), reverse=True)[:depth]
    return gain / sum(relevance / math.log2(rank + 1) for rank, relevance in enumerate(ideal, 1))


def recall(ranked: list[str], judged: dict[str, int], depth: int) -> float:
    """Share of the relevant documents among the first."""
    relevant = {doc_id for doc_id, relevance in judged.items() if relevance > 0}
    return len(relevant & set(ranked[:depth])) / len(relevant)
