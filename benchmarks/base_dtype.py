"""Measure what a quantized frozen base costs in quality: loss on withheld passages after equal tokens, by base_dtype.

    python benchmarks/base_dtype.py --root /tmp/base-dtype

DoRA adapters of the quickstart's pretrained model are trained on the documentation of torch, with the frozen weights in
float32, bfloat16, int8, fp8 and nf4, on the same passages in the same order, by the model, loss and layers of `train` in one
process. Products are in bfloat16, in float32 for the first. Each adapter is then added to the model in full precision, and
the loss is that of withheld passages in float32. Goal: at most 1% above bfloat16. Writes JSON to --output.
"""

import argparse
import datetime
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow.parquet as pq
import torch

import readapt_ray as ra
from readapt_ray import hardware
from readapt_ray.catalog import models, retrievers
from readapt_ray.nn.precision import products_in
from readapt_ray.recipes import quickstart
from readapt_ray.storage import Location
from readapt_ray.training import dora, objectives, packing, trainable
from readapt_ray.training.withheld_loss import losses

BLOCK_TOKENS: Final = 128
STEP_PASSAGES: Final = 8
LEARNING_RATE: Final = 5e-4
ARMS: Final[dict[str, tuple[torch.dtype, Any]]] = {
    "float32": (torch.float32, "auto"),
    "bfloat16": (torch.bfloat16, "auto"),
    "int8": (torch.bfloat16, "int8"),
    "fp8": (torch.bfloat16, "fp8"),
    "nf4": (torch.bfloat16, "nf4"),
}
CPU: Final = torch.device("cpu")


def main() -> None:
    """Train every arm, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder of the artifacts")
    parser.add_argument("--passages", type=int, default=1000, help="to train on (default: %(default)s)")
    parser.add_argument("--withheld", type=int, default=200, help="to measure on (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/base_dtype.json"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    recipe = quickstart.recipe(str(options.root))
    corpus = ra.ingest(ra.IngestConfig(source=recipe.source, output=f"{options.root}/corpus"))
    texts, withheld = split_texts(corpus, options.passages, options.withheld)
    model = models.open_model(recipe.pretrained)
    arms = {}
    for name in ARMS:
        arms[name] = train(model, texts, name, options.root / name)
        arms[name] |= withheld_losses(model, options.root / name, withheld)
        logging.info("%s: %s", name, arms[name])
    result = {
        "command": "python benchmarks/base_dtype.py",
        "date": datetime.date.today().isoformat(),
        "hardware": hardware.machine_info()["driver"],
        "versions": corpus.manifest.versions,
        "num_passages": len(texts),
        "num_withheld": len(withheld),
        "more_than_bfloat16": {name: each["loss"] / arms["bfloat16"]["loss"] - 1 for name, each in arms.items()},
        "runs": arms,
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({name: each["loss"] for name, each in arms.items()}, indent=2))


def split_texts(corpus: ra.Artifact, num_passages: int, num_withheld: int) -> tuple[list[str], list[str]]:
    """Return texts to train on, and others to measure on, in an order of chance."""
    tables = [
        pq.read_table(str(file.local_path), columns=["title", "text"])
        for file in (corpus.location / "passages").files(".parquet")
    ]
    texts = [f"{row['title']} {row['text']}".strip() for table in tables for row in table.to_pylist()]
    texts = np.random.default_rng(0).permutation(texts)[: num_passages + num_withheld].tolist()
    withheld = [texts.pop() for _ in range(num_withheld)]
    return texts, withheld


def withheld_losses(model: models.OpenModel, adapter: Path, withheld: list[str]) -> dict[str, float]:
    """Return the mean loss of a model without and with an adapter, in float32."""
    before, after = losses(
        model,
        models.open_model(str(adapter)),
        withheld,
        objective="causal_lm",
        max_tokens=BLOCK_TOKENS,
        dtype=torch.float32,
        device=CPU,
    )
    return {"loss_before": float(np.nanmean(before)), "loss": float(np.nanmean(after))}


def train(
    source: models.OpenModel,
    texts: list[str],
    name: str,
    output: Path,
    *,
    seed: int = 0,
    change: Callable[[torch.nn.Module], None] | None = None,
) -> dict[str, Any]:
    """Train one adapter, write it, and return what it took.

    Args:
        source: the model underneath.
        texts: to train on, in this order.
        name: of the arm.
        output: folder of the adapter.
        seed: of its first weights and dropout.
        change: what is changed on the model with its adapters.
    """
    dtype, base_dtype = ARMS[name]
    model = trainable.load_for_training(
        source, objective="causal_lm", dtype=dtype, device=CPU, zero_stage=0, base_dtype=base_dtype
    )
    targets = retrievers.target_modules(str(source.config["model_type"]))
    shape = dora.AdapterShape(method="dora", rank=32, alpha=64.0, dropout=0.05, targets=targets)
    torch.manual_seed(seed)
    trainable.make_trainable(model, shape)
    if change is not None:
        change(model)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], weight_decay=0.0)
    ids, _ = packing.passage_ids(source.tokenizer, texts, max_tokens=BLOCK_TOKENS)
    blocks = [packing.Block(np.asarray(each, np.int32), (len(each),), (n,)) for n, each in enumerate(ids)]
    steps = [blocks[first : first + STEP_PASSAGES] for first in range(0, len(blocks), STEP_PASSAGES)]
    step_losses = []
    for number, step in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - number / len(steps))
        batch = packing.collate(step, pad_id=packing.end_id(source.tokenizer) or 0)
        with products_in(dtype, model, "cpu"):
            loss = objectives.loss_sum(model, batch) / sum(each.num_labels(None) for each in step)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        dora.refresh(model)
        step_losses.append(float(loss.detach()))
    output.mkdir(parents=True, exist_ok=True)
    state = dora.adapter_state(model)
    dora.save_adapter(Location(str(output)), state, shape, base=str(source.folder), task_type="CAUSAL_LM")
    tail = max(1, len(steps) // 10)
    return {
        "num_tokens": sum(map(len, ids)),
        "num_steps": len(steps),
        "first_losses": float(np.mean(step_losses[:tail])),
        "last_losses": float(np.mean(step_losses[-tail:])),
        "base_bytes": base_bytes(model),
    }


def base_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of the frozen linear layers."""
    return sum(
        each.nbytes
        for _, layer in dora.adapted_layers(model)
        for each in (*layer.base.parameters(), *layer.base.buffers())
    )


if __name__ == "__main__":
    main()
