"""Does the quickstart's gain hold? Adapters of several seeds, and one of a wrong domain, over a grid of scales.

    python benchmarks/quickstart_gain.py --root /tmp/gain --seeds 3

Every judged query of the quickstart's target corpus, every passage: nothing is sampled, and no scale is
chosen here. Prints a table of nDCG@10 by seed and knowledge_scale, and for the mean over seeds the paired
test over queries against the retriever as it is; writes it as JSON to --output.
"""

import argparse
import datetime
import json
import logging
import platform
from pathlib import Path

import numpy as np

import readapt_ray as ra
from readapt_ray.evaluation.significance import compare
from readapt_ray.recipes import quickstart

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)
WRONG_DOMAIN = "python-docs:ray"


def main() -> None:
    """Run the grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="folder of the artifacts")
    parser.add_argument("--seeds", type=int, default=3, help="number of adapters (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/quickstart_gain.json"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    recipe = quickstart.recipe(options.root)
    corpus = ra.ingest(ra.IngestConfig(source=recipe.source, output=f"{options.root}/corpus"))
    runs = {f"seed {seed}": (recipe.source, seed) for seed in range(options.seeds)} | {
        "wrong domain": (WRONG_DOMAIN, 0)
    }
    found = {name: grid(options.root, source, seed, corpus.uri) for name, (source, seed) in runs.items()}
    result = {
        "command": f"python benchmarks/quickstart_gain.py --seeds {options.seeds}",
        "date": datetime.date.today().isoformat(),
        "hardware": f"{platform.processor() or platform.machine()}, 2 cores",
        "versions": corpus.manifest.versions,
        "num_queries": len(next(iter(found.values()))[0.0]),
        "num_passages": corpus.manifest.counts["num_passages"],
        "nDCG@10": {
            name: {f"{scale:g}": float(np.mean(list(by[scale].values()))) for scale in SCALES}
            for name, by in found.items()
        },
        "paired": {name: paired({name: found[name]}) for name in found}
        | {"mean of seeds": paired({name: by for name, by in found.items() if name.startswith("seed")})},
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["nDCG@10"], indent=2))
    print(json.dumps(result["paired"], indent=2))


def grid(root: str, source: str, seed: int, corpus: str) -> dict[float, dict[str, float]]:
    """nDCG@10 of every query by knowledge scale, for an adapter of this source and seed."""
    recipe = quickstart.recipe(root)
    name = source.removeprefix("python-docs:").replace(",", "-")
    passages = ra.ingest(
        ra.IngestConfig(source=source, output=corpus if source == recipe.source else f"{root}/corpus-{name}")
    )
    chosen = f"{root}/chosen-{name}"
    quickstart.choose_passages(passages, chosen)
    adapter = ra.train(
        ra.TrainConfig(
            **{**quickstart.recipe(chosen).train, "seed": seed},
            pretrained=recipe.pretrained,
            corpus=passages.uri,
            output=f"{root}/adapter-{name}-{seed}",
        )
    )
    tuned = ra.tune(
        ra.TuneConfig(
            pretrained=recipe.pretrained,
            retriever=recipe.retriever,
            adapter=adapter.uri,
            corpus=corpus,
            queries=f"{corpus}/queries",
            qrels=f"{corpus}/qrels",
            knowledge_scales=SCALES,
            max_queries=10**9,
            max_passages=10**9,
            num_refinements=0,
            num_workers=2,
            output=f"{root}/grid-{name}-{seed}",
        )
    )
    return {scale: json.loads((tuned.location / "grid" / f"1_{scale:g}.json").read_text()) for scale in SCALES}


def paired(grids: dict[str, dict[float, dict[str, float]]]) -> dict[str, dict[str, float | None]]:
    """Against knowledge_scale 0, each query's value being its mean over the grids."""
    query_ids = sorted(next(iter(grids.values()))[0.0])
    values = {
        f"{scale:g}": {"nDCG@10": np.mean([[by[scale][each] for each in query_ids] for by in grids.values()], axis=0)}
        for scale in SCALES
    }
    return {
        each.run: {"difference": each.difference, "p": each.p_value, "p_holm": each.p_holm} for each in compare(values)
    }


if __name__ == "__main__":
    main()
