"""Split a corpus by topic, and measure what adapters know of both halves: continuing an adapter against a new one.

    continuing.py split  --source WORK/cranfield/source --output WORK/cranfield/continuing
    continuing.py losses --output WORK/cranfield/continuing --pretrained WORK/pretrained --adapters old,continued,anew

`split` divides the passages at the median of the first component of their TF-IDF vectors (centered, of length 1). One half
is the old topic, the other the new one. Every tenth passage of each half is withheld. Written are the BEIR folders `old`
and `all` (both halves) without the withheld passages, and `withheld.json`. `losses` measures the language-model loss of the
withheld passages, in nats per token, with each adapter and without one, and prints and writes `losses.json`. Intervals are
95% over passages; differences between adapters are paired.
"""

import argparse
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))

import texts as study

_WITHHOLD_EVERY = 10
_LEAST_PASSAGES_PER_WORD = 3
_WORDS_SHOWN = 10
_NORMAL_95 = 1.96


def main() -> None:
    """Do one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["split", "losses"])
    parser.add_argument("--source", type=Path, help="BEIR folder to split")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--pretrained")
    parser.add_argument("--adapters", help="names, comma-separated; OUTPUT/adapter-NAME is each")
    options = parser.parse_args()
    if options.what == "split":
        split(options.source, options.output)
    else:
        measure(options.output, options.pretrained, options.adapters.split(","))


def split(source: Path, output: Path) -> None:
    """Write the folders and the withheld passages."""
    rows = list(study.read_lines(source / "corpus.jsonl"))
    topics, words = first_component([f"{row.get('title') or ''} {row['text']}" for row in rows])
    is_new = topics > np.median(topics)
    withheld: dict[str, list[str]] = {"old": [], "new": []}
    kept: list[tuple[str, dict[str, Any]]] = []
    for half, wanted in (("old", False), ("new", True)):
        for place, number in enumerate(np.flatnonzero(is_new == wanted)):
            if place % _WITHHOLD_EVERY == 0:
                withheld[half].append(f"{rows[number].get('title') or ''} {rows[number]['text']}".strip())
            else:
                kept.append((half, rows[number]))
    output.mkdir(parents=True, exist_ok=True)
    for name, wanted_halves in (("old", {"old"}), ("all", {"old", "new"})):
        (output / name).mkdir(exist_ok=True)
        study.write_lines(output / name / "corpus.jsonl", (row for half, row in kept if half in wanted_halves))
    counts = Counter(half for half, _ in kept)
    (output / "withheld.json").write_text(json.dumps({"words": words, "trained on": counts, **withheld}))
    print(json.dumps({"words": words, "trained on": counts, "withheld": {k: len(v) for k, v in withheld.items()}}))


def first_component(texts: list[str]) -> tuple[NDArray[np.float64], dict[str, list[str]]]:
    """Return each text's place along the first component of TF-IDF, float64 [N], and the words at both of its ends."""
    bags = [Counter(re.findall(r"[a-z]{3,}", text.lower())) for text in texts]
    in_texts = Counter(word for bag in bags for word in bag)
    words = sorted(word for word, count in in_texts.items() if count >= _LEAST_PASSAGES_PER_WORD)
    column = {word: number for number, word in enumerate(words)}
    table_NV = np.zeros((len(texts), len(words)))
    for row, bag in enumerate(bags):
        for word, count in bag.items():
            if word in column:
                table_NV[row, column[word]] = (1 + math.log(count)) * math.log(len(texts) / in_texts[word])
    table_NV /= np.maximum(np.linalg.norm(table_NV, axis=1, keepdims=True), 1e-12)
    table_NV -= table_NV.mean(axis=0)
    _, component_V = np.linalg.eigh(table_NV.T @ table_NV)
    component_V = component_V[:, -1]
    component_V *= np.sign(component_V[np.abs(component_V).argmax()])
    order = component_V.argsort()
    ends = {"old": [words[i] for i in order[:_WORDS_SHOWN]], "new": [words[i] for i in order[::-1][:_WORDS_SHOWN]]}
    return table_NV @ component_V, ends


def measure(output: Path, pretrained: str, adapters: list[str]) -> None:
    """Measure all on the withheld passages of both halves."""
    from readapt_ray import artifacts
    from readapt_ray.catalog import models
    from readapt_ray.cluster import connection
    from readapt_ray.cluster.loss_task import measure_losses

    connection.connect()
    withheld = json.loads((output / "withheld.json").read_text())
    passages, num_old = withheld["old"] + withheld["new"], len(withheld["old"])
    found: dict[str, NDArray[np.float64]] = {}
    made = {}
    for name in adapters:
        adapter = models.open_model(str(output / f"adapter-{name}"))
        manifest = artifacts.read_manifest(str(adapter.folder))
        assert manifest is not None
        before, found[name] = measure_losses(
            models.open_model(pretrained),
            adapter,
            passages,
            objective=manifest.config["objective"],
            max_tokens=study.MAX_PASSAGE_TOKENS,
            dtype=manifest.details["dtype"],
        )
        found.setdefault("pretrained", before)
        made[name] = {"num_steps": manifest.counts.get("num_steps"), "seconds": round(manifest.seconds)}
    halves = {"old": slice(None, num_old), "new": slice(num_old, None)}
    result = {
        "words": withheld["words"],
        "trained on": withheld["trained on"],
        "withheld": {half: len(withheld[half]) for half in halves},
        "training": made,
        "loss, nats per token": {
            name: {half: interval(losses[part]) for half, part in halves.items()} for name, losses in found.items()
        },
        "difference": {
            f"{name} - {base}": {half: interval(found[name][part] - found[base][part]) for half, part in halves.items()}
            for name, base in (("continued", "old"), ("continued", "anew"))
            if {name, base} <= set(found)
        },
    }
    (output / "losses.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def interval(values: NDArray[np.float64]) -> list[float]:
    """Return the mean and the ends of its 95% interval."""
    values = values[~np.isnan(values)]
    half = _NORMAL_95 * float(values.std(ddof=1)) / math.sqrt(len(values))
    return [round(float(values.mean()) + shift, 4) for shift in (0.0, -half, half)]


if __name__ == "__main__":
    main()
