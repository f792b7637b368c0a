"""What a bridge finds on a real pair of models, and what a server finds while the passages move to their new vectors.

    bash benchmarks/smollm/run.sh DATA WORK model domain:cranfield
    python benchmarks/bridging.py --root WORK/cranfield --new adapted-seed0 --sample 720 --name "SmolLM2, Cranfield" --work DIR
    readapt quickstart --root ROOT
    python benchmarks/bridging.py --root ROOT --new adapted --sample 1281 --name "quickstart, torch" --work DIR

A pair is what `readapt run` leaves: `corpus` with queries and qrels, the new model, and `vectors` and `index` of `retriever` and of the
new model. Other pairs stay in the results. Reported are, on the corpus's queries:

- `bridge`: recall at 10 as `readapt bridge` measures it on withheld passages and on queries, with 95% intervals.
- `means`, `comparisons`: quality of the old model among its vectors, of bridged queries among these (`search --bridge`), and of the
  new model among its own vectors, which is the baseline of the differences.
- `moving`: what a slice of a server with `--new-vectors` finds once a share of the passages has moved, those of the bridge's
  sample first: top-10 overlap with a full re-embedding, nDCG@10, and which part of the way it is from the old model among its
  vectors. "without a bridge" is the overlap where old vectors are searched by the old model, and scores compared as they are.
- `orders`: overlap by what is re-embedded first, as `benchmarks/reembedding.py` measures it.
"""

import argparse
import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from reembedding import Matrix, best, measured, vectors_of

from readapt_ray import hardware
from readapt_ray.artifacts import open_artifact
from readapt_ray.catalog.models import open_model
from readapt_ray.evaluation.measures import group_judgements, measure_run, parse_measures
from readapt_ray.evaluation.runs import Run
from readapt_ray.evaluation.significance import bootstrap_interval
from readapt_ray.records import Query, ScoredDoc
from readapt_ray.retrieval.bridge import Bridge
from readapt_ray.retrieval.encoder import Encoder
from readapt_ray.retrieval.neighbours import overlaps
from readapt_ray.retrieval.vector_index import VectorIndex
from readapt_ray.serving.index_slice import IndexSlice
from readapt_ray.serving.moving_slice import MovingSlice
from readapt_ray.sources.judgements import read_qrels, read_queries
from readapt_ray.stages.bridge import BridgeConfig, bridge
from readapt_ray.stages.evaluate import EvaluateConfig, evaluate
from readapt_ray.stages.search import SearchConfig, search

SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)
DEPTH, MAX_QUERIES = 10, 1000
NDCG = parse_measures(f"nDCG@{DEPTH}")


def main() -> None:
    """Measure a pair, and write it into the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="root of the run")
    parser.add_argument("--new", required=True, help="name of the new model's folders under the root")
    parser.add_argument("--sample", type=int, required=True, help="passages that fit the bridge")
    parser.add_argument("--name", required=True, help="of the pair in the results")
    parser.add_argument("--work", type=Path, required=True, help="folder for the bridge, runs and report")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/bridging.json")
    options = parser.parse_args()
    root, work = options.root, options.work
    found = json.loads(options.output.read_text()) if options.output.is_file() else {}
    made = bridge(
        BridgeConfig(
            old_vectors=str(root / "vectors/retriever"),
            corpus=str(root / "corpus"),
            retriever=str(root / options.new),
            sample=options.sample,
            output=str(work / "bridge"),
        )
    )
    details = made.manifest.details
    pair = Pair.read(root, options.new, Bridge.open(made.uri))
    found[options.name] = {
        "command": f"python benchmarks/bridging.py --root ROOT --new {options.new} --sample {options.sample} --name {options.name!r}",
        "date": datetime.date.today().isoformat(),
        "machine": hardware.machine_info(),
        "versions": {each: version(each) for each in ("torch", "faiss-cpu")},
        "num_passages": len(pair.old),
        "num_sample": made.manifest.counts["num_passages"],
        "num_queries": len(pair.queries),
        "bridge": {"map": details["map"], "recall_of_maps": details["recall_of_maps"], **details["recall_at_10"]},
        **quality(root, options.new, work, made.uri),
        "moving": pair.moving(),
        "orders": measured(
            pair.old,
            pair.new,
            pair.new_queries,
            num_sample=options.sample,
            num_queries=2 * len(pair.queries) // 3,
        )["overlap_at_10"],
    }
    options.output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found[options.name], indent=1))


def quality(root: Path, new: str, work: Path, bridge_uri: str) -> dict[str, Any]:
    """Search with the old model, through the bridge and with the new model; compare the first two with the last."""
    qrels = str(root / "corpus/qrels")
    arms = {
        new: (root / new, new, None),
        "bridged": (root / new, "retriever", bridge_uri),
        "retriever": (model_of(root, "retriever"), "retriever", None),
    }
    for name, (model, index, through) in arms.items():
        search(
            SearchConfig(
                retriever=str(model),
                index=str(root / "index" / index),
                bridge=through,
                queries=str(root / "corpus/queries"),
                qrels=qrels,
                output=str(work / f"{name}.trec"),
            )
        )
    runs = tuple(str(work / f"{name}.trec") for name in arms)
    report = evaluate(EvaluateConfig(runs=runs, qrels=qrels, output=str(work / "report")))
    return {name: report.manifest.details[name] for name in ("means", "comparisons")}


def model_of(root: Path, name: str) -> str:
    """Return the model that made vectors."""
    return str(open_artifact(str(root / "vectors" / name), "embed").manifest.details["encoder"]["model"])


@dataclass(frozen=True)
class Pair:
    """Vectors of the same passages and queries by two models."""

    bridge: Bridge
    base: IndexSlice
    """The index of the old vectors, as a server loads it."""
    doc_ids: list[str]
    old: Matrix
    new: Matrix
    queries: Sequence[Query]
    old_queries: Matrix
    new_queries: Matrix
    judgements: dict[str, dict[str, int]]

    @classmethod
    def read(cls, root: Path, new: str, made: Bridge) -> "Pair":
        """Read the vectors, and encode the queries with both models."""
        doc_ids, old = vectors_of(root / "vectors/retriever")
        its_ids, its = vectors_of(root / "vectors" / new)
        place = {doc_id: row for row, doc_id in enumerate(its_ids)}
        index = VectorIndex.open(str(root / "index/retriever"))
        judgements = group_judgements(read_qrels(str(root / "corpus/qrels")))
        queries = [each for each in read_queries(str(root / "corpus")) if each.query_id in judgements]
        chosen = np.sort(np.random.default_rng(0).permutation(len(queries))[:MAX_QUERIES])
        queries = [queries[number] for number in chosen]
        texts = [each.text for each in queries]
        encoders = [
            Encoder.load(open_model(model), dtype=made.new_encoder["dtype"])
            for model in (model_of(root, "retriever"), str(root / new))
        ]
        return cls(
            made,
            IndexSlice(index.folder, index.records),
            doc_ids,
            old,
            its[[place[doc_id] for doc_id in doc_ids]],
            queries,
            *(each.encode(texts, "query") for each in encoders),
            {each.query_id: judgements[each.query_id] for each in queries},
        )

    def moving(self) -> dict[str, Any]:
        """Return what is found before anything, through the bridge, and once each share of the passages has moved."""
        truth = best(self.new_queries @ self.new.T, DEPTH)
        before = self.found(best(self.old_queries @ self.old.T, DEPTH), self.old_queries @ self.old.T, truth)
        order = self.order()
        results = {"old model": before | {"share": 0.0}}
        slice_, done = MovingSlice(self.base, self.bridge), 0
        sample = self.bridge.artifact.manifest.counts["num_passages"]
        marks = {"bridge alone": 0, "bridge and its sample": sample}
        marks |= {f"{share:.0%}": round(share * len(order)) for share in SHARES if share * len(order) > sample}
        marks |= {"all": len(order)}
        for name, size in marks.items():
            self.move(slice_, order[done:size])
            done = size
            results[name] = self.served(slice_, truth) | {"share": round(size / len(order), 3)}
            mixed = self.without_bridge(order[:size])
            results[name]["without a bridge"] = self.found(best(mixed, DEPTH), mixed, truth)["overlap_at_10"]["mean"]
        first = before["overlap_at_10"]["mean"]
        for each in results.values():
            each["part_of_the_way"] = round((each["overlap_at_10"]["mean"] - first) / (1 - first), 3)
        return results

    def order(self) -> NDArray[np.int64]:
        """Return the passages in the order in which they move: the bridge's sample, then the others at random."""
        files = sorted((Path(str(self.bridge.artifact.location)) / "vectors").glob("*.parquet"))
        sample = {doc_id for file in files for doc_id in pq.read_table(file, columns=["doc_id"])["doc_id"].to_pylist()}
        random = np.random.default_rng(0).permutation(len(self.doc_ids))
        is_first = np.array([self.doc_ids[row] in sample for row in random])
        return np.concatenate([random[is_first], random[~is_first]])

    def move(self, slice_: MovingSlice, rows: NDArray[np.int64]) -> None:
        """Move passages as a file with them would."""
        located, _ = slice_.locate(pa.array([self.doc_ids[row] for row in rows], pa.string()), b"")
        slice_.move(slice_.prepare(located, self.new[rows]))

    def without_bridge(self, moved: NDArray[np.int64]) -> Matrix:
        """Return the scores of a search of old vectors by the old model and of new ones by the new model."""
        scores = self.old_queries @ self.old.T
        scores[:, moved] = self.new_queries @ self.new[moved].T
        return scores

    def served(self, slice_: MovingSlice, truth: NDArray[np.int64]) -> dict[str, Any]:
        """Search as a server does."""
        hits = slice_.search(self.new_queries, DEPTH)
        place = {doc_id: row for row, doc_id in enumerate(self.doc_ids)}
        rows = np.array([[place[doc_id] for doc_id in each] for each in hits.doc_ids.tolist()])
        return self.compared(rows, hits.scores, truth)

    def found(self, rows: NDArray[np.int64], scores: Matrix, truth: NDArray[np.int64]) -> dict[str, Any]:
        """Compare the best by scores of all passages."""
        return self.compared(rows, np.take_along_axis(scores, rows, axis=1), truth)

    def compared(self, rows: NDArray[np.int64], scores: Matrix, truth: NDArray[np.int64]) -> dict[str, Any]:
        """Return the overlap with a full re-embedding, and nDCG.

        Args:
            rows: [Q, 10], passages that were found.
            scores: [Q, 10].
            truth: [Q, 10], what a full re-embedding finds.
        """
        shared = overlaps(rows, truth)
        ends = bootstrap_interval(shared[:, None])[:, 0]
        results = {
            each.query_id: [
                ScoredDoc(each.query_id, self.doc_ids[row], float(score)) for row, score in zip(mine, its, strict=True)
            ]
            for each, mine, its in zip(self.queries, rows.tolist(), scores, strict=True)
        }
        (ndcg,) = measure_run(Run.of(results), self.judgements, NDCG).means.values()
        overlap = {"mean": round(float(shared.mean()), 4), "interval": [round(float(end), 4) for end in ends]}
        return {"overlap_at_10": overlap, "nDCG@10": round(ndcg, 4)}


if __name__ == "__main__":
    main()
