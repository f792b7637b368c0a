"""Measure what a quantized frozen base costs in quality: loss on withheld passages after equal tokens, by base_dtype.

    python benchmarks/base_dtype.py --root /tmp/base-dtype

The quickstart's pretrained model is trained on the documentation of torch, in packed steps of 8 blocks of 128 tokens, its
frozen weights in float32, bfloat16, int8 and nf4. Products are in bfloat16, but in float32 for the first. Every arm sees the same
passages in the same order. The adapter is then laid on the model in float32 by PEFT, and the loss is computed by
transformers and PEFT alone. Goal: at most 1% above bfloat16. Writes JSON to --output.
"""

import argparse
import datetime
import json
import logging
from pathlib import Path
from typing import Any, Final

import batch_size

import readapt_ray as ra
from readapt_ray import hardware
from readapt_ray.recipes import quickstart

STEP: Final[dict[str, Any]] = {"mode": "packed", "batch_size": 8, "num_cpus_per_worker": 1}
ARMS: Final[dict[str, dict[str, Any]]] = {
    "float32": {**STEP, "dtype": "float32"},
    "bfloat16": {**STEP, "dtype": "bfloat16"},
    "int8": {**STEP, "dtype": "bfloat16", "base_dtype": "int8"},
    "nf4": {**STEP, "dtype": "bfloat16", "base_dtype": "nf4"},
}


def main() -> None:
    """Train every arm, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="folder of the artifacts")
    parser.add_argument("--passages", type=int, default=1000, help="to train on (default: %(default)s)")
    parser.add_argument("--withheld", type=int, default=100, help="to measure on (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/base_dtype.json"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    recipe = quickstart.recipe(options.root)
    corpus = ra.ingest(ra.IngestConfig(source=recipe.source, output=f"{options.root}/corpus"))
    withheld, only = batch_size.split(corpus, Path(options.root) / "trained-on.txt", options.passages)
    withheld = withheld[: options.withheld]
    setting: dict[str, Any] = {"pretrained": recipe.pretrained, "corpus": corpus, "only": only, "withheld": withheld}
    arms = {name: batch_size.arm(name, 0, changed, **setting) for name, changed in ARMS.items()}
    result = {
        "command": "python benchmarks/base_dtype.py",
        "date": datetime.date.today().isoformat(),
        "hardware": hardware.machine_info()["driver"],
        "versions": corpus.manifest.versions,
        "num_withheld": len(withheld),
        "loss_before": batch_size.withheld_loss(recipe.pretrained, None, withheld),
        "more_than_bfloat16": {name: each["loss"] / arms["bfloat16"]["loss"] - 1 for name, each in arms.items()},
        "runs": arms,
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({name: each["loss"] for name, each in arms.items()}, indent=2))


if __name__ == "__main__":
    main()
