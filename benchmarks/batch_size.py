"""Measure what a large packed batch costs in quality: loss on withheld passages after equal tokens, by size of the step.

    python benchmarks/batch_size.py --root /tmp/batch --seeds 3

The quickstart's pretrained model is trained on the documentation of torch, every tenth passage withheld: with the paper's
setting (one passage a block, 4 a step), with the default of the files in jobs/ (packed, batch_size auto), and with packed
steps of 16,384 tokens, as eight GPUs take 131,072. Each arm sees each passage once. The loss is computed by transformers
and PEFT alone. Writes JSON to --output.
"""

import argparse
import datetime
import json
import logging
import statistics
from pathlib import Path
from typing import Any, Final

import peft
import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM

import readapt_ray as ra
from readapt_ray import hardware
from readapt_ray.artifacts import Artifact
from readapt_ray.catalog import models
from readapt_ray.recipes import quickstart
from readapt_ray.training.packing import passage_ids

BLOCK_TOKENS: Final = 128
LEARNING_RATE: Final = 5e-4
"""The quickstart's, for a model of 5 million parameters; the paper's 2e-4 is for 7 billion."""
WITHHELD_ONE_IN: Final = 10
EVALUATED_AT_ONCE: Final = 64
ARMS: Final[dict[str, dict[str, Any]]] = {
    "paper: 4 passages": {"mode": "passage", "batch_size": 4},
    "packed, auto": {"mode": "packed", "batch_size": "auto", "warmup_fraction": 0.03},
    "packed, 16,384 tokens": {"mode": "packed", "batch_size": 16_384 // BLOCK_TOKENS, "warmup_fraction": 0.03},
    "packed, 16,384 tokens, rate x 5": {
        "mode": "packed",
        "batch_size": 16_384 // BLOCK_TOKENS,
        "warmup_fraction": 0.03,
        "learning_rate": 5 * LEARNING_RATE,
    },
}


def main() -> None:
    """Train every arm with every seed, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="folder of the artifacts")
    parser.add_argument("--seeds", type=int, default=3, help="adapters per arm (default: %(default)s)")
    parser.add_argument("--passages", type=int, help="train on so many passages alone, to try the script")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/batch_size.json"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    recipe = quickstart.recipe(options.root)
    corpus = ra.ingest(ra.IngestConfig(source=recipe.source, output=f"{options.root}/corpus"))
    withheld, only = split(corpus, Path(options.root) / "trained-on.txt", options.passages)
    setting: dict[str, Any] = {"pretrained": recipe.pretrained, "corpus": corpus, "only": only, "withheld": withheld}
    arms = {name: [arm(name, seed, **setting) for seed in range(options.seeds)] for name in ARMS}
    result = {
        "command": f"python benchmarks/batch_size.py --seeds {options.seeds}",
        "date": datetime.date.today().isoformat(),
        "machine": hardware.machine_info(),
        "versions": corpus.manifest.versions,
        "num_withheld": len(withheld),
        "loss_before": withheld_loss(recipe.pretrained, None, withheld),
        "mean_loss": {name: statistics.mean(run["loss"] for run in runs) for name, runs in arms.items()},
        "runs": arms,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: result[key] for key in ("loss_before", "mean_loss")}, indent=2))


def split(corpus: Artifact, only: Path, num_passages: int | None) -> tuple[list[str], Path]:
    """Return the texts of the withheld passages, and a file with the ids of those to train on."""
    rows = [
        row
        for file in (corpus.location / "passages").files(".parquet")
        for row in pq.read_table(str(file.local_path), columns=["doc_id", "title", "text"]).to_pylist()
    ]
    withheld = [f"{row['title']} {row['text']}".strip() for row in rows[::WITHHELD_ONE_IN]]
    trained = [row["doc_id"] for number, row in enumerate(rows) if number % WITHHELD_ONE_IN][:num_passages]
    only.write_text("".join(f"{doc_id}\n" for doc_id in trained))
    return withheld[:num_passages], only


def arm(name: str, seed: int, *, pretrained: str, corpus: Artifact, only: Path, withheld: list[str]) -> dict[str, Any]:
    """Train one adapter, and measure it."""
    folder = "".join(character if character.isalnum() else "-" for character in name)
    options = {
        "block_tokens": BLOCK_TOKENS,
        "learning_rate": LEARNING_RATE,
        "num_workers": 1,
        "num_cpus_per_worker": 1,
        "only": str(only),
        "seed": seed,
        **ARMS[name],
    }
    adapter = ra.train(
        ra.TrainConfig.model_validate(
            {**options, "pretrained": pretrained, "corpus": corpus.uri, "output": f"{only.parent}/{folder}-{seed}"}
        )
    )
    manifest = adapter.manifest
    return {
        "seed": seed,
        "loss": withheld_loss(pretrained, adapter, withheld),
        "num_tokens": manifest.counts["num_tokens"],
        "num_steps": manifest.counts["num_steps"],
        "batch_size": manifest.details["batch_size"],
        "learning_rate": manifest.details["learning_rate"],
        "seconds": manifest.seconds,
    }


def withheld_loss(pretrained: str, adapter: Artifact | None, texts: list[str]) -> float:
    """Return the mean loss per predicted token, in nats, each passage cut as in training and padded at its end."""
    found = models.open_model(pretrained)
    model = AutoModelForCausalLM.from_pretrained(str(found.folder), dtype=torch.float32)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, str(adapter.location.local_path))
    model.eval()
    rows, _ = passage_ids(found.tokenizer, texts, max_tokens=BLOCK_TOKENS)
    total, count = 0.0, 0
    for first in range(0, len(rows), EVALUATED_AT_ONCE):
        batch = [torch.tensor(row) for row in rows[first : first + EVALUATED_AT_ONCE]]
        ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
        lengths = torch.tensor([len(row) for row in batch])
        mask = torch.arange(ids.shape[1])[None] < lengths[:, None]
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask.long()).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        total += float(losses[mask[:, 1:].flatten()].sum())
        count += int(mask[:, 1:].sum())
    return total / count


if __name__ == "__main__":
    main()
