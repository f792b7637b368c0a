"""A run file in a folder of its own, with stages that write manifests and nothing else; checks, records and messages are real."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from readapt_ray import artifacts, cli, root_status
from readapt_ray.artifacts import Artifact, Workspace
from readapt_ray.catalog.models import open_model
from readapt_ray.errors import (
    ModelError,
)
from readapt_ray.recipes import chain, run_checks, running
from readapt_ray.recipes.problems import Problems
from readapt_ray.storage import Location


class Desk:
    """A run file in a folder of its own, and stages that write manifests."""

    def __init__(self, folder: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = folder / "root"
        self.file = folder / "run.yaml"
        self.values: dict[str, Any] = {
            "source": str(folder / "source.jsonl"),
            "root": str(self.root),
            "pretrained": str(models / "base"),
            "retriever": str(models / "retriever"),
        }
        (folder / "source.jsonl").write_text('{"id": "d1", "text": "A passage."}\n')
        self.made: list[str] = []
        self.broken = ""
        self.is_judged, self.num_passages = True, 60
        monkeypatch.setattr(running, "run_stage", self._stage)
        monkeypatch.setattr(running, "_leaves_gpus_idle", lambda _: False)
        monkeypatch.setattr(cli, "_print_result", lambda _: None)

    def run(self, *arguments: str, **values: Any) -> int:
        """`readapt run` with these arguments, on the run file changed so."""
        self.file.write_text(yaml.safe_dump({**self.values, **values}))
        self.made.clear()
        return cli.main(["run", "--config", str(self.file), *arguments])

    def states(self) -> dict[str, str]:
        """The state of each artifact, as `readapt status` tells it."""
        return {row["artifact"]: row["state"] for row in root_status.rows(Location(str(self.root)))}

    def what(self, name: str) -> str:
        """What status says of an artifact."""
        return next(str(row["what"]) for row in root_status.rows(Location(str(self.root))) if row["artifact"] == name)

    def _stage(self, stage: str, config: Any) -> Artifact:
        def work(workspace: Workspace) -> None:
            name = str(Path(config.output).relative_to(self.root))
            if name == self.broken:
                raise ModelError("it broke\nhere")
            self.made.append(name)
            if stage == "ingest":
                workspace.counts = {"num_passages": self.num_passages, "num_bytes": 300 * self.num_passages}
            if stage == "search":
                workspace.location.write_text("")
            if stage == "ingest" and self.is_judged:
                (workspace.location / "queries" / "part-0.parquet").write_text("")
                (workspace.location / "qrels" / "test.parquet").write_text("")

        return artifacts.produce(stage, config, inputs=dict(self._inputs(stage, config)), work=work)

    def _inputs(self, stage: str, config: Any) -> Any:
        for name in config.inputs:
            value = getattr(config, name)
            if isinstance(value, tuple):
                yield name, artifacts.fingerprint([artifacts.read_manifest(each).fingerprint for each in value])  # type: ignore[union-attr]
            elif isinstance(value, str) and value and (manifest := artifacts.read_manifest(value)):
                yield name, manifest.fingerprint
            elif name in ("pretrained", "retriever"):
                model = open_model(value)
                yield name, model.tokenizer_fingerprint if stage == "pack" else model.fingerprint


ALL = [
    *("corpus", "blocks", "adapter", "adapted", "vectors/retriever", "index/retriever", "vectors/adapted"),
    *("index/adapted", "runs/retriever.trec", "runs/adapted.trec", "report"),
]
LENGTHS = {"max_query_tokens": 32, "max_passage_tokens": 64}
AFTER_TRAIN = ["adapter", "adapted", "vectors/adapted", "index/adapted", "runs/adapted.trec", "report"]


def written(desk: Desk) -> str:
    desk.file.write_text(yaml.safe_dump(desk.values))
    return str(desk.file)


def check(desk: Desk, **values: Any) -> None:
    config = chain.RunConfig.parse({**desk.values, **values})
    run_checks.check_run(config, chain.plan_run(config), [], Problems())
