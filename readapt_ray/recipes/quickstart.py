"""Run the quickstart: adapt a small retriever to the docstrings of the installed package torch, in minutes on a CPU.

It runs the same stages as a cluster does, on a local Ray. The small pretrained model and its retriever have never seen
the documentation of torch. The retriever is adapted to it without labelled queries, then measured, indexed and served.
Nothing is downloaded.
"""

import contextlib
import json
import logging
import os
import socket
import urllib.request
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from readapt_ray import artifacts, outputs
from readapt_ray.artifacts import Artifact
from readapt_ray.cluster import connection
from readapt_ray.errors import ArtifactConflictError
from readapt_ray.progress import duration
from readapt_ray.recipes import chain, running
from readapt_ray.recipes.chain import RunConfig
from readapt_ray.stages.ingest import IngestConfig, ingest
from readapt_ray.storage import Location

logger = logging.getLogger("readapt_ray")

TARGET = "python-docs:torch"
_QUESTION = "split a tensor into parts along a dimension"
_SHOWN_QUERIES = 3
_NUM_CPUS = 2
_ANSWER_NAME = "answer.json"
_TRAINED_ON = "trained-on.txt"
_ONE_PASSAGE_IN = 3


def recipe(root: str) -> RunConfig:
    """Return the options of the quickstart's run.

    They differ from the paper's, so that the run takes only minutes on two cores: packed blocks as short as the passages
    that the retriever reads, a higher learning rate for a model of 5 million parameters, and training on only every third
    passage. benchmarks/results/quickstart_trials.md says how they were chosen.
    """
    return RunConfig(
        root=root,
        source=TARGET,
        pretrained="quickstart-pretrained",
        retriever="quickstart-retriever",
        train={
            "mode": "packed",
            "only": (Location(root) / _TRAINED_ON).uri,
            "block_tokens": 128,
            "batch_size": 32,
            "num_epochs": 1,
            "learning_rate": 3e-4,
            "micro_batch_tokens": 4096,
            "num_workers": 2,
            "num_cpus_per_worker": 1,
            "checkpoint_every_s": 20,
        },
        merge={"readapter_scale": 1.0, "knowledge_scale": 0.5},
        evaluate={"measures": "nDCG@10,R@100"},
    )


def run(root: str) -> None:
    """Run the quickstart, and print the measures, changed answers and an answer over HTTP.

    All output goes to the local folder `root`. It uses two CPUs (READAPT_NUM_CPUS is set to 2 unless it is set
    already). A second run reuses all results.

    Raises:
        ArtifactConflictError: the folder holds files that readapt did not write.
    """
    os.environ.setdefault("READAPT_NUM_CPUS", str(_NUM_CPUS))
    outputs.refuse_foreign_results(Location(root) / _ANSWER_NAME, {"index", "question"})
    outputs.refuse_foreign_results(Location(root) / chain.RUN_NAME, {"config", "steps"})
    logger.info(
        "Adapting a small retriever to the documentation of torch, which it has never seen. First time: some minutes."
    )
    config = recipe(root)
    is_new = artifacts.read_manifest(f"{root}/corpus") is None
    with connection.connecting_ahead() if is_new else contextlib.nullcontext():
        choose_passages(ingest(IngestConfig(source=config.source, output=f"{root}/corpus")), root)
    made = running.run(config)
    answer = _answer(root, made)
    console = Console(width=min(110, Console().width) if Console().is_terminal else 110, highlight=False)
    _print_measures(console, made)
    _print_changes(console, made)
    _print_answer(console, answer)
    _print_places(console, made)


def choose_passages(corpus: Artifact, root: str) -> None:
    """Write the doc_ids of the training passages (every third one) to the file `trained-on.txt` under the root.

    Raises:
        ArtifactConflictError: another program wrote a file with this name.
    """
    doc_ids = [
        doc_id
        for file in (corpus.location / "passages").files(".parquet")
        for doc_id in pq.read_table(file.local_path, columns=["doc_id"])["doc_id"].to_pylist()
    ]
    file = Location(root) / _TRAINED_ON
    text = "\n".join(doc_ids[::_ONE_PASSAGE_IN]) + "\n"
    if file.exists() and not _is_listed(file, root) and file.read_bytes() != text.encode():
        raise ArtifactConflictError(
            f"{file} is there, and readapt did not write it; move it away, or give another folder"
        )
    file.write_text(text)


def _is_listed(file: Location, root: str) -> bool:
    """Return whether `run.json` names this list of passages. If so, we wrote it, perhaps for an earlier corpus."""
    record = Location(root) / chain.RUN_NAME
    values = json.loads(record.read_bytes()) if record.is_file() else {}
    return bool(values.get("config", {}).get("train", {}).get("only") == file.uri)


def _answer(root: str, made: dict[str, Artifact]) -> dict[str, Any]:
    """Return the served retriever's answer. It is saved with its index's fingerprint, so a second quickstart reuses it."""
    index = made[f"index/{chain.ADAPTED}"].fingerprint
    kept = Location(root) / _ANSWER_NAME
    if kept.is_file():
        answer: dict[str, Any] = json.loads(kept.read_text())
        if answer["index"] == index and answer["question"] == _QUESTION:
            return answer
    answer = {"index": index, **_ask_over_http(root, _QUESTION)}
    kept.write_text(json.dumps(answer, indent=2) + "\n")
    return answer


def _ask_over_http(root: str, question: str) -> dict[str, Any]:
    """Serve the adapted retriever with its index, ask one question over HTTP, and stop the server."""
    from readapt_ray.serving.local_http import open_url
    from readapt_ray.serving.options import ServeConfig
    from readapt_ray.serving.server import serve, stop

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logger.info("[serve] one question over HTTP to the adapted retriever")
    url = serve(
        ServeConfig(
            retriever=f"{root}/{chain.ADAPTED}",
            index=f"{root}/index/{chain.ADAPTED}",
            corpus=f"{root}/corpus",
            port=port,
        ),
        blocking=False,
    )
    try:
        body = json.dumps({"query": question, "top_k": 3}).encode()
        request = urllib.request.Request(f"{url}/v1/search", body, {"Content-Type": "application/json"})
        with open_url(request, timeout=60) as response:
            return {"question": question, "url": url, **json.load(response)}
    finally:
        stop()


def _print_measures(console: Console, made: dict[str, Artifact]) -> None:
    details = made["report"].manifest.details
    before, after = details["means"][chain.BASE], details["means"][chain.ADAPTED]
    by_measure = {each["measure"]: each for each in details["comparisons"]}
    table = Table(
        title=f"{details['num_queries']:,} queries, {made['corpus'].manifest.counts['num_passages']:,} passages of {TARGET}"
    )
    for header in ("measure", "before", "adapted", "difference", "95% interval", "p"):
        table.add_column(header, justify="left" if header == "measure" else "right")
    for measure, value in before.items():
        comparison = by_measure[measure]
        low, high = comparison["interval"]
        table.add_row(
            measure,
            f"{value:.4f}",
            f"{after[measure]:.4f}",
            f"{comparison['difference']:+.4f}",
            f"{low:+.4f} to {high:+.4f}",
            f"{comparison['p_value']:.4f}" if comparison["p_value"] >= 0.0001 else "< 0.0001",
        )
    console.print()
    console.print(table)
    for sentence in details["verdicts"]:
        console.print(sentence, soft_wrap=True)


def _print_changes(console: Console, made: dict[str, Artifact]) -> None:
    report = json.loads((made["report"].location / "report.json").read_text())
    change = report["changes"][0]
    shown = change["gained"][:2] + change["lost"][:1] if change["lost"] else change["gained"][:_SHOWN_QUERIES]
    console.print(f"\n{len(shown)} queries whose answers changed:")
    for each in shown:
        first = {side: (docs[0]["doc_id"] if docs else "nothing") for side, docs in each["results"].items()}
        console.print(f"  {each['text']}", style="bold", markup=False)
        console.print(
            f"    before : {first['baseline']}  (nDCG@10 {each['baseline_value']:.2f})", markup=False, soft_wrap=True
        )
        console.print(f"    adapted: {first['run']}  (nDCG@10 {each['value']:.2f})", markup=False, soft_wrap=True)


def _print_answer(console: Console, answer: dict[str, Any]) -> None:
    console.print(f'\nOver HTTP, POST {answer["url"]}/v1/search {{"query": "{answer["question"]}"}}:', markup=False)
    for result in answer["data"][0]["hits"]:
        console.print(f"  {result['score']:.3f}  {result['doc_id']}", markup=False)


def _print_places(console: Console, made: dict[str, Artifact]) -> None:
    seconds = sum(artifact.manifest.seconds for artifact in made.values())
    report = (made["report"].location / "report.html").local_path
    root = made["corpus"].location.local_path.parent
    console.print(
        f"\nThe stages took {duration(seconds)} in all. Everything is under {root}; the report: {report}",
        soft_wrap=True,
        markup=False,
    )
    console.print(
        "\nYour own corpus and model, in three commands:\n"
        "  readapt run --config jobs/e5-mistral.yaml --set source=my-corpus.jsonl --root s3://my-bucket/run\n"
        "  readapt status --root s3://my-bucket/run\n"
        "  readapt serve --retriever s3://my-bucket/run/adapted --index s3://my-bucket/run/index/adapted "
        "--corpus s3://my-bucket/run/corpus",
        soft_wrap=True,
        markup=False,
    )
