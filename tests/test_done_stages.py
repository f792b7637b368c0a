"""A command whose output is complete says so without importing what only its work needs."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from readapt_ray import artifacts, cli
from readapt_ray.artifact_files import MANIFEST_NAME, record_of
from readapt_ray.catalog.models import open_model
from readapt_ray.storage import Location
from tests import factories
from tests.serving.conftest import index_artifact
from tests.stages.test_index import vectors_artifact

COMMANDS = {
    "ingest": "--source corpus.jsonl --output corpus",
    "pack": "--pretrained base --corpus corpus --output blocks",
    "embed": "--retriever encoder --corpus corpus --output vectors",
    "index": "--vectors stored --output flat",
    "search": "--retriever encoder --index index --queries queries.jsonl --output base.trec",
    "evaluate": "--runs a.trec --qrels qrels.tsv --output report",
}
RUN = """
import sys
from readapt_ray import cli
code = cli.main(sys.argv[1:])
print([name for name in ("torch", "transformers", "ray", "faiss", "pandas") if name in sys.modules])
sys.exit(code)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and inputs of every stage, and outputs that say they are complete."""
    import numpy as np

    from readapt_ray.retrieval.encoder import Encoder

    root = tmp_path_factory.mktemp("world")
    passages = factories.small_corpus(30)
    rows = [{"_id": each.doc_id, "title": each.title, "text": each.text} for each in passages]
    (root / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = factories.tiny_decoder(root / "base")
    factories.write_contract(factories.full_retriever(root / "full", base))
    factories.dora_adapter(root / "adapter", base)
    factories.write_contract(factories.tiny_encoder(root / "encoder"), pooling="mean")
    index_artifact(root / "index", Encoder.load(open_model(str(root / "encoder"))), "encoder", passages)
    vectors_artifact(root / "stored", np.eye(8, dtype=np.float32))
    (root / "queries.jsonl").write_text('{"_id": "q1", "text": "rain"}\n')
    (root / "qrels.tsv").write_text(f"query-id\tcorpus-id\tscore\nq1\t{passages[0].doc_id}\t1\n")
    (root / "a.trec").write_text(f"q1 Q0 {passages[0].doc_id} 1 1.0 a\n")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(root)
        patched.setattr(artifacts, "_fill", _complete)
        assert [cli.main([name, *options.split()]) for name, options in COMMANDS.items()] == [0] * len(COMMANDS)
    return root


_FILL = artifacts._fill


def _complete(location: Location, ours: Mapping[str, Any], work: Any, **options: Any) -> artifacts.Manifest:
    """Write the manifest of a stage whose work is not done, except where it needs no Ray."""
    if ours["stage"] in ("ingest", "evaluate"):
        return _FILL(location, ours, work, **options)
    details = {"model_config": artifacts.fingerprint(open_model("base").config)} if ours["stage"] == "pack" else {}
    known = {name: ours[name] for name in ("stage", "fingerprint", "config", "inputs")}
    made = artifacts.Manifest(**known, counts={}, details=details, seconds=1.0, created="", versions={})
    record_of(location, MANIFEST_NAME).write_text(json.dumps(dataclasses.asdict(made)))
    return made


@pytest.mark.parametrize("stage", COMMANDS)
def test_a_finished_stage_imports_neither_torch_nor_ray(world: Path, stage: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN, stage, *COMMANDS[stage].split()],
        cwd=world,
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "already complete" in done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
