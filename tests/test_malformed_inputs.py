"""Every kind of file that a command takes, cut short, empty, of another type, binary, and a folder: refused in one line."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from readapt_ray import cli
from tests import factories
from tests.serving.conftest import index_artifact
from tests.stages.test_index import vectors_artifact

MALFORMED: dict[str, Callable[[bytes], bytes | None]] = {
    "cut short": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "of another type": lambda content: b"[[3]]\n",
    "binary": lambda content: bytes(range(256)) * 3,
    "a folder": lambda content: None,
}
SEARCH = "search --retriever encoder --output out.trec --top-k 3"
MERGE = "merge --pretrained base --output out --encoding encoding.json"
EVALUATE = "evaluate --output out --measures nDCG@10"
PACK = "pack --pretrained base --corpus corpus --output out"
COMMANDS: dict[str, tuple[str, str]] = {
    "manifest of a corpus": ("corpus/manifest.json", PACK),
    "manifest of vectors": ("vectors/manifest.json", "index --vectors vectors --output out"),
    "manifest of an index": ("index/manifest.json", f"{SEARCH} --index index --queries queries.jsonl"),
    "config of a model": ("base/config.json", PACK),
    "tokenizer": ("base/tokenizer.json", PACK),
    "tokenizer's config": ("base/tokenizer_config.json", PACK),
    "weights": ("base/model.safetensors", f"{MERGE} --retriever full --adapter adapter"),
    "weights of a retriever": ("full/model.safetensors", f"{MERGE} --retriever full --adapter adapter"),
    "config of an adapter": ("adapter/adapter_config.json", f"{MERGE} --retriever full --adapter adapter"),
    "weights of an adapter": ("adapter/adapter_model.safetensors", f"{MERGE} --retriever full --adapter adapter"),
    "readapt.json": ("encoder/readapt.json", f"{SEARCH} --index index --queries queries.jsonl"),
    "list of modules": ("listed/modules.json", "encoding --model listed"),
    "config of a pooling": ("listed/1_Pooling/config.json", "encoding --model listed"),
    "encoding": ("encoding.json", f"{MERGE} --retriever full --adapter adapter"),
    "queries in JSONL": ("queries.jsonl", f"{SEARCH} --index index --queries queries.jsonl"),
    "queries in TSV": ("queries.tsv", f"{SEARCH} --index index --queries queries.tsv"),
    "queries in Parquet": ("queries.parquet", f"{SEARCH} --index index --queries queries.parquet"),
    "qrels in TSV": ("qrels.tsv", f"{EVALUATE} --runs a.trec --qrels qrels.tsv"),
    "qrels in JSONL": ("qrels.jsonl", f"{EVALUATE} --runs a.trec --qrels qrels.jsonl"),
    "qrels in Parquet": ("qrels.parquet", f"{EVALUATE} --runs a.trec --qrels qrels.parquet"),
    "qrels of TREC": ("qrels.txt", f"{EVALUATE} --runs a.trec --qrels qrels.txt"),
    "run": ("a.trec", f"{EVALUATE} --runs a.trec --qrels qrels.tsv"),
    "run file": ("run.yaml", "run --config run.yaml --root root"),
    "record of a run": ("begun/run.json", "run --config whole.yaml --root begun"),
    "generations": ("begun/refresh.json", "status --history --root begun"),
    "report": ("report/report.json", "serve --retriever encoder --index index --require-report report"),
    "list of passages": ("list.json", "train --pretrained base --corpus corpus --output out --exclude list.json"),
}
LEGAL = {
    ("queries in JSONL", "cut short"),
    ("queries in TSV", "cut short"),
    ("queries in TSV", "of another type"),
    ("qrels in TSV", "cut short"),
    ("qrels in JSONL", "cut short"),
    ("qrels of TREC", "cut short"),
    ("run", "cut short"),
    ("list of modules", "a folder"),
    ("list of passages", "cut short"),
    ("list of passages", "of another type"),
}
"""What is a whole file of its kind, too."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import pyarrow.parquet as pq

    from readapt_ray.catalog.models import open_model
    from readapt_ray.retrieval.encoder import Encoder

    root = tmp_path_factory.mktemp("world")
    passages = factories.small_corpus(30)
    queries, qrels = factories.small_queries(passages, 3)
    factories.ingest_artifact(root / "corpus", passages, queries, qrels)
    base = factories.tiny_decoder(root / "base")
    factories.full_retriever(root / "full", base)
    factories.dora_adapter(root / "adapter", base)
    factories.write_contract(factories.tiny_encoder(root / "encoder"), pooling="mean")
    listed = factories.tiny_encoder(root / "listed")
    modules = {"": "Transformer", "1_Pooling": "Pooling"}
    types = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in modules.items()]
    (listed / "modules.json").write_text(json.dumps(types))
    (listed / "1_Pooling").mkdir()
    (listed / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    (root / "encoding.json").write_text((root / "encoder/readapt.json").read_text())
    model = open_model(str(root / "encoder"))
    index_artifact(root / "index", Encoder.load(model), "encoder", passages)
    vectors_artifact(root / "vectors", np.eye(8, dtype=np.float32))
    rows = [{"_id": each.query_id, "text": each.text} for each in queries]
    (root / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "queries.tsv").write_text("".join(f"{each.query_id}\t{each.text}\n" for each in queries))
    shutil.copy(next((root / "corpus/queries").iterdir()), root / "queries.parquet")
    shutil.copy(next((root / "corpus/qrels").iterdir()), root / "qrels.parquet")
    judged = pq.read_table(root / "qrels.parquet").to_pylist()
    lines = [f"{each['query_id']}\t{each['doc_id']}\t{each['relevance']}\n" for each in judged]
    (root / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    (root / "qrels.jsonl").write_text("".join(json.dumps(each) + "\n" for each in judged))
    (root / "qrels.txt").write_text("".join(f"{each['query_id']} 0 {each['doc_id']} 1\n" for each in judged))
    (root / "a.trec").write_text("".join(f"{each['query_id']} Q0 {each['doc_id']} 1 1.0 a\n" for each in judged))
    run = f"source: corpus\npretrained: {root}/base\nretriever: {root}/full\n"
    (root / "run.yaml").write_text(run)
    (root / "whole.yaml").write_text(run)
    (root / "list.json").write_text(json.dumps([each.doc_id for each in passages[:4]]))
    (root / "begun").mkdir()
    (root / "begun/run.json").write_text(json.dumps({"config": {}, "steps": []}))
    (root / "begun/refresh.json").write_text(json.dumps({"format_version": 1, "generations": []}))
    (root / "report").mkdir()
    (root / "report/report.json").write_text("{}")
    return root


CASES = [(kind, how) for kind in COMMANDS for how in MALFORMED if (kind, how) not in LEGAL]


@pytest.mark.parametrize(("kind", "how"), CASES)
def test_a_malformed_file_is_named_in_one_line(
    *,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    how: str,
) -> None:
    monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("Ray started before the file was read"))
    name, command = COMMANDS[kind]
    here = tmp_path / "here"
    shutil.copytree(world, here, copy_function=os.link)
    monkeypatch.chdir(here)
    content = MALFORMED[how]((here / name).read_bytes())
    (here / name).unlink()
    (here / name).mkdir() if content is None else (here / name).write_bytes(content)
    code = cli.main(command.split())
    said = capsys.readouterr().err
    assert code == 2, said
    lines = said.rstrip().splitlines()
    [at] = [place for place, line in enumerate(lines) if line.startswith("readapt: error: ")]
    assert "Traceback" not in said, said
    if kind in ("run file", "record of a run"):  # a run lists all that is wrong
        assert any(name.split("/")[0] in line for line in lines[at:]), said
    else:
        assert at == len(lines) - 1 and name.split("/")[0] in lines[at], said
