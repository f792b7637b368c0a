"""A pair of models that can find things, made and RE-adapted on one GPU: does the paper's gain appear at 30 to 100 million parameters?

    python benchmarks/pair.py --work /dev/shm/pair --data DIR        # again until it says that all is done
    python benchmarks/pair.py --work /tmp/pair --data DIR --layers 2 --width 64 --max-passages 200 --seeds 1   # to try it

DIR holds the BEIR folders `squad11`, `msmarco_dl1920_pool`, `cranfield`, `nfcorpus` and `scifact`. In order: `train --method
full` of a fresh Llama on the docstrings of the installed packages and the passages of the first three; `finetune` of all its
weights on squad11's training questions; the paper's table 1 and baselines on NFCorpus and SciFact, which neither has seen; and
for each corpus and seed `tune`, whose scales are chosen on one half of the test queries and reported on the other. Every
step is a stage: killed or out of time, it resumes where it stopped, and what is done is in --output.
"""

import argparse
import datetime
import functools
import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import quickstart_pair

import readapt_ray as ra
from readapt_ray import hardware
from readapt_ray.artifacts import Artifact
from readapt_ray.catalog import retrievers
from readapt_ray.recipes.paper import experiments
from readapt_ray.recipes.paper.options import PaperConfig

GENERAL = ("squad11", "msmarco_dl1920_pool", "cranfield")
TARGETS = ("nfcorpus", "scifact")
EXPERIMENTS = ("table1", "baselines")
PACKAGES = "stdlib,numpy,pandas,scipy,sympy,networkx,sklearn,matplotlib,skimage,statsmodels,jax,seaborn,PIL,numba,h5py"


def main() -> None:
    """All steps; those that are done are passed over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the artifacts")
    parser.add_argument("--data", type=Path, required=True, help="folder of the BEIR folders")
    parser.add_argument("--layers", type=int, default=12, help="of the model (default: %(default)s)")
    parser.add_argument("--width", type=int, default=640, help="of the model, in 64s (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=4, help="of pretraining (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="number of adapters of a corpus (default: %(default)s)")
    parser.add_argument("--max-passages", type=int, help="of each source, to try the script; default all")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gpu_pair.json"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    options.work.mkdir(parents=True, exist_ok=True)
    pretrained = pretrain(options)
    retriever = finetune(options, pretrained)
    found: dict[str, Any] = {}
    save = functools.partial(write, options, pretrained, retriever, found)
    for experiment in EXPERIMENTS:
        experiments.run(study(options, experiment, pretrained, retriever))
        found[experiment] = json.loads((options.work / f"paper/{experiment}.json").read_text())
        save()
    found["tuned"] = []
    for name in TARGETS:
        for seed in range(options.seeds):
            found["tuned"].append({"corpus": name, "seed": seed, **tuned(options, pretrained, retriever, name, seed)})
            save()
    print(f"all done: {options.output}")


def pretrain(options: argparse.Namespace) -> Artifact:
    """A language model on all text at hand but the targets'."""
    text = options.work / "text.jsonl"
    if not text.is_file():
        write_text(options, text)
    corpus = ra.ingest(ra.IngestConfig(source=str(text), output=str(options.work / "text")))
    fresh = options.work / "fresh"
    if not (fresh / "tokenizer.json").is_file():
        quickstart_pair.make_fresh_model(
            Path(corpus.location.path),
            fresh,
            layers=options.layers,
            width=options.width,
            inner=options.width * 11 // 4,
            heads=options.width // 64,
        )
    config = ra.TrainConfig(
        pretrained=str(fresh),
        corpus=corpus.uri,
        output=str(options.work / "pretrained"),
        method="full",
        mode="packed",
        block_tokens=512,
        batch_size=128,
        num_epochs=options.epochs,
        learning_rate=1e-3,
        weight_decay=0.1,
        warmup_fraction=0.03,
        micro_batch_tokens=16_384,
        num_workers=1,
        checkpoint_every_s=60,
    )
    return ra.train(config)


def write_text(options: argparse.Namespace, file: Path) -> None:
    """Docstrings and passages, a line each."""
    packages = [each for each in PACKAGES.split(",") if each == "stdlib" or importlib.util.find_spec(each)]
    docstrings = file.with_suffix(".docstrings")
    quickstart_pair.write_whole_docstrings(docstrings, ",".join(packages))
    parts = [docstrings, *(options.data / name / "corpus.jsonl" for name in GENERAL)]
    with file.with_suffix(".tmp").open("w") as lines:
        for number, part in enumerate(parts):
            with part.open() as rows:
                for place, line in enumerate(rows):
                    if options.max_passages is not None and place >= options.max_passages:
                        break
                    row = json.loads(line)
                    lines.write(json.dumps({**row, "_id": f"{number}-{row['_id']}"}) + "\n")
    file.with_suffix(".tmp").rename(file)


def finetune(options: argparse.Namespace, pretrained: Artifact) -> Artifact:
    """A retriever of a general domain, all weights trained."""
    corpus = ra.ingest(ra.IngestConfig(source=str(options.data / "squad11"), output=str(options.work / "squad11")))
    encoding = retrievers.retriever("quickstart-retriever").encoding
    return ra.finetune(
        ra.FinetuneConfig(
            model=pretrained.uri,
            corpus=corpus.uri,
            split="train",
            output=str(options.work / "retriever"),
            method="full",
            encoding=encoding,
            batch_size=512 if options.max_passages is None else 8_192,
            num_epochs=2 if options.max_passages is None else 1,
            learning_rate=2e-4,
            both_directions=True,
            micro_batch_tokens=16_384,
            num_workers=1,
            checkpoint_every_s=60,
        )
    )


def study(options: argparse.Namespace, experiment: str, pretrained: Artifact, retriever: Artifact) -> PaperConfig:
    """The paper's settings, but its batches: passages of a few hundred tokens, packed."""
    return PaperConfig(
        root=str(options.work / "paper"),
        experiments=(experiment,),
        pretrained=pretrained.uri,
        retriever=retriever.uri,
        corpora=TARGETS,
        data=str(options.data),
        seeds=tuple(range(options.seeds)),
        train={
            "mode": "packed",
            "block_tokens": 512,
            "batch_size": 8,
            "micro_batch_tokens": 8_192,
            "num_workers": 1,
            "num_epochs": 1,
        },
    )


def tuned(
    options: argparse.Namespace, pretrained: Artifact, retriever: Artifact, name: str, seed: int
) -> dict[str, Any]:
    """The scales of one adapter: chosen on one half of the judged queries, reported on the other."""
    root = f"{options.work}/paper/{name}"
    made = ra.tune(
        ra.TuneConfig(
            pretrained=pretrained.uri,
            retriever=retriever.uri,
            adapter=f"{root}/adapters/all-dora-seed{seed}",
            corpus=f"{root}/corpus",
            queries=f"{root}/corpus/queries",
            qrels=f"{root}/corpus/qrels/test.parquet",
            output=f"{root}/tuned-seed{seed}",
            seed=seed,
        )
    )
    outcome: dict[str, Any] = json.loads((made.location / "tune.json").read_text())
    return {each: outcome[each] for each in ("best", "num_tuning", "num_reporting", "reported")}


def write(options: argparse.Namespace, pretrained: Artifact, retriever: Artifact, found: dict[str, Any]) -> None:
    """What is done so far, with what made it."""
    result = {
        "command": f"python benchmarks/pair.py --layers {options.layers} --width {options.width} --seeds {options.seeds}",
        "date": datetime.date.today().isoformat(),
        "hardware": hardware.machine_info(),
        "versions": pretrained.manifest.versions,
        "made": {
            name: {"counts": each.manifest.counts, "seconds": each.manifest.seconds}
            for name, each in (("pretrained", pretrained), ("retriever", retriever))
        },
        **found,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
