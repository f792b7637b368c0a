"""Does `tune` choose as well without labels as with them? One grid of scales, by judged queries and by pseudo-queries.

    python benchmarks/label_free.py --root /tmp/label-free --data DIR

DIR holds the BEIR folders `nfcorpus` and `scifact`. The quickstart's pair, an adapter of each corpus and seed, every
passage, every judged query of every split (nothing here is trained on them), and as many pseudo-queries as `tune` makes by
default; readapter_scale 1. Half of the judged queries choose the labelled knowledge_scale, half of the pseudo-queries the
label-free one, both as `tune` does; both choices are then measured on the other half of the judged queries. Half an hour on
two idle cores; killed, it resumes where it stopped. A root of `benchmarks/recipes.py` spares the
training: the artifacts have the same names there.
"""

import argparse
import datetime
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from recipes import TRAIN
from scipy.stats import spearmanr

import readapt_ray as ra
from readapt_ray import hardware
from readapt_ray.artifacts import Artifact
from readapt_ray.catalog import retrievers
from readapt_ray.evaluation.scale_search import RETRIEVER, ScalePair, best_pair, halves
from readapt_ray.evaluation.significance import compare

CORPORA = ("nfcorpus", "scifact")
KNOWLEDGE_SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""As `tune` has them by default."""
MEASURE = "nDCG@10"
NUM_SPLITS = 200

Values = dict[ScalePair, dict[str, float]]


def main() -> None:
    """Run corpus after corpus and seed after seed; what is done so far is written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="folder of the artifacts")
    parser.add_argument("--data", required=True, help="folder of the BEIR folders")
    parser.add_argument("--seeds", type=int, default=2, help="number of adapters of a corpus (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/label_free.json"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    found: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        for name in CORPORA:
            root = f"{options.root}/{name}"
            corpus = ra.ingest(ra.IngestConfig(source=f"{options.data}/{name}", output=f"{root}/corpus"))
            made = adapter(root, corpus, seed)
            labelled = grid(root, corpus, made, seed, by_labels=True)
            label_free = grid(root, corpus, made, seed, by_labels=False)
            found.append({"corpus": name, "seed": seed, **agreement(labelled, label_free)})
            write(options, found, corpus.manifest.versions)


def adapter(root: str, corpus: Artifact, seed: int) -> Artifact:
    """The knowledge adapter of a corpus, as `benchmarks/recipes.py` trains it."""
    row = retrievers.retriever("quickstart-retriever")
    name = f"all-dora-seed{seed}"
    blocks = ra.pack(
        ra.PackConfig(
            pretrained=str(row.pretrained),
            corpus=corpus.uri,
            mode=TRAIN["mode"],
            block_tokens=TRAIN["block_tokens"],
            output=f"{root}/blocks/{name}",
        )
    )
    return ra.train(
        ra.TrainConfig(
            **{**TRAIN, "target_modules": row.dora_targets, "seed": seed},
            pretrained=str(row.pretrained),
            corpus=blocks.uri,
            output=f"{root}/adapters/{name}",
        )
    )


def grid(root: str, corpus: Artifact, knowledge: Artifact, seed: int, *, by_labels: bool) -> Values:
    """The measure of every query with every pair of scales, by `tune`."""
    every = {"queries": f"{corpus.uri}/queries", "qrels": f"{corpus.uri}/qrels", "max_queries": 10**9}
    tuned = ra.tune(
        ra.TuneConfig(
            pretrained="quickstart-pretrained",
            retriever="quickstart-retriever",
            adapter=knowledge.uri,
            corpus=corpus.uri,
            knowledge_scales=KNOWLEDGE_SCALES,
            num_refinements=0,
            measure=MEASURE,
            dtype="bfloat16",
            num_workers=1,
            output=f"{root}/tuned/{'labelled' if by_labels else 'label-free'}-seed{seed}",
            **(every if by_labels else {}),
        )
    )
    cells = {scale: tuned.location / "grid" / f"1_{scale:g}.json" for scale in KNOWLEDGE_SCALES}
    return {(1.0, scale): json.loads(cell.read_text()) for scale, cell in cells.items()}


def agreement(labelled: Values, label_free: Values) -> dict[str, Any]:
    """Both curves, how alike they are, and what choosing by the label-free one costs in the labelled measure."""
    chosen = {"labelled": best_pair(labelled, 0), "label_free": best_pair(label_free, 0)}
    curves = [
        {"readapter_scale": pair[0], "knowledge_scale": pair[1]}
        | {
            f"{kind}_{half}": float(in_half(values, pair, 0)[index].mean())
            for kind, values in (("labelled", labelled), ("pseudo", label_free))
            for index, half in enumerate(("tuning", "reporting"))
        }
        for pair in labelled
    ]
    (against_labelled,) = compared(labelled, chosen["labelled"], chosen["label_free"])
    (against_retriever,) = compared(labelled, RETRIEVER, chosen["label_free"])
    regrets = [
        float(np.mean(in_half(labelled, best_pair(labelled, split), split)[1]))
        - float(np.mean(in_half(labelled, chosen["label_free"], split)[1]))
        for split in range(NUM_SPLITS)
    ]
    return {
        "num_judged_queries": len(labelled[RETRIEVER]),
        "num_pseudo_queries": len(label_free[RETRIEVER]),
        "grid": curves,
        "rank_correlation": correlation(labelled, label_free),
        "chosen": chosen,
        "regret": -against_labelled["difference"],
        "label_free_against_labelled": against_labelled,
        "label_free_against_retriever": against_retriever,
        "regret_over_splits": {
            "num_splits": NUM_SPLITS,
            "mean": float(np.mean(regrets)),
            "percentiles_5_95": np.percentile(regrets, [5, 95]).tolist(),
        },
    }


def in_half(values: Values, pair: ScalePair, split: int) -> tuple[np.ndarray, np.ndarray]:
    """The values of a pair: of the half that chooses, and of the half that reports."""
    query_ids = sorted(values[RETRIEVER])
    row = np.array([values[pair][each] for each in query_ids])
    tuning, reporting = halves(query_ids, split)
    return row[tuning], row[reporting]


def compared(values: Values, baseline: ScalePair, pair: ScalePair) -> list[dict[str, Any]]:
    """Two pairs of scales on the reporting half."""
    names = {"baseline": baseline, "pair": pair}
    return [asdict(each) for each in compare({n: {MEASURE: in_half(values, p, 0)[1]} for n, p in names.items()})]


def correlation(labelled: Values, label_free: Values) -> float:
    """Spearman's rank correlation of the two curves, each over all of its queries."""
    curves = [[float(np.mean(list(values[pair].values()))) for pair in labelled] for values in (labelled, label_free)]
    return float(spearmanr(*curves).statistic)


def write(options: argparse.Namespace, found: list[dict[str, Any]], versions: dict[str, str]) -> None:
    """What is done so far, with what made it."""
    result = {
        "command": f"python benchmarks/label_free.py --seeds {options.seeds}",
        "date": datetime.date.today().isoformat(),
        "hardware": hardware.machine_info()["driver"],
        "versions": versions,
        "measure": MEASURE,
        "found": found,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
