"""The paper's tables and the baselines that it lacks, at small scale: the quickstart's pair on two BEIR sets and two
docstring domains, three seeds.

    python benchmarks/recipes.py --root /tmp/recipes --data DIR

DIR holds the BEIR folders `nfcorpus` and `scifact`, and `msmarco-5000.jsonl`, any five thousand passages of a general
domain, whose adapter table3 uses everywhere. 87 adapters are trained on 20 million tokens in all, one CPU at a time: three
hours. Killed, it resumes where it stopped; what is done so far is written to --output after each experiment.
"""

import argparse
import json
import logging
import shutil
from pathlib import Path
from typing import Any

from readapt_ray import artifacts, hardware
from readapt_ray.recipes.paper import experiments
from readapt_ray.recipes.paper.options import PaperConfig
from readapt_ray.recipes.paper.variants import EXPERIMENTS

TRAIN = {
    "mode": "packed",
    "block_tokens": 128,
    "batch_size": 32,
    "learning_rate": 3e-4,
    "micro_batch_tokens": 2048,
    "num_workers": 1,
    "num_cpus_per_worker": 1,
    "checkpoint_every_s": 60,
}


MEASURES = ("nDCG@10", "R@100")
"""Of the same runs; the second, of more passages a query, tells smaller differences apart."""


def main() -> None:
    """Run the experiments one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="folder of the artifacts")
    parser.add_argument("--data", required=True, help="folder of the BEIR folders and of the general passages")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/recipes.json"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    found: dict[str, dict[str, Any]] = {}
    for experiment in EXPERIMENTS:
        found[experiment] = {}
        for measure in MEASURES:
            experiments.run(study(options, experiment, measure))
            found[experiment][measure] = json.loads(Path(options.root, f"{experiment}.json").read_text())
            shutil.copy(Path(options.root, f"{experiment}.md"), Path(options.root, f"{experiment}-{measure}.md"))
        write(options, found)


def study(options: argparse.Namespace, experiment: str, measure: str) -> PaperConfig:
    """One experiment."""
    return PaperConfig(
        root=options.root,
        experiments=(experiment,),
        retriever="quickstart-retriever",
        corpora=(
            "nfcorpus",
            "scifact",
            "deepspeed=python-docs:deepspeed",
            "huggingface_hub=python-docs:huggingface_hub",
        ),
        general=f"msmarco-sample={options.data}/msmarco-5000.jsonl",
        data=options.data,
        sizes=(250, 1000),
        seeds=tuple(range(options.seeds)),
        measure=measure,
        train=TRAIN,
        embed={"dtype": "bfloat16", "num_workers": 1},
    )


def write(options: argparse.Namespace, found: dict[str, Any]) -> None:
    """What is done so far, with what made it."""
    manifest = artifacts.read_manifest(f"{options.root}/nfcorpus/corpus")
    result = {
        "command": f"python benchmarks/recipes.py --seeds {options.seeds}",
        "hardware": hardware.machine_info()["driver"],
        "versions": manifest.versions if manifest else {},
        "experiments": found,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2).replace(options.data, "DIR") + "\n")


if __name__ == "__main__":
    main()
