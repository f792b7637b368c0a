"""The study of a real model (benchmarks/smollm): its texts, its adapters, its figures and its scripts, without the model."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from benchmarks.smollm import adapter, results, texts
from readapt_ray.catalog import models
from readapt_ray.training.dora import AdapterShape, adapted_layers, add_adapters
from tests import factories
from tests.test_clusters import shellcheck

STUDY = Path(__file__).parent.parent / "benchmarks" / "smollm"


def beir(folder: Path, passages: list[dict[str, str]], queries: dict[str, str], qrels: dict[str, list[str]]) -> Path:
    (folder / "qrels").mkdir(parents=True)
    texts.write_lines(folder / "corpus.jsonl", passages)
    texts.write_lines(folder / "queries.jsonl", ({"_id": name, "text": text} for name, text in queries.items()))
    for split, rows in qrels.items():
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *rows]) + "\n")
    return folder


def run(monkeypatch: pytest.MonkeyPatch, module: Any, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *options])
    module.main()


def test_passages_are_cut_to_what_the_model_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = factories.tiny_decoder(tmp_path / "model")
    long = " ".join(f"word{number}" for number in range(300))
    passages = [
        {"_id": "1", "title": "a title", "text": long},
        {"_id": "2", "title": "word0 word1", "text": long},
        {"_id": "3", "title": "t", "text": "short"},
    ]
    source = beir(tmp_path / "in", passages, {"q": "one", "unjudged": "two"}, {"test": ["q\t1\t1"]})
    run(
        monkeypatch,
        texts,
        "domain",
        "--source",
        str(source),
        "--tokenizer",
        str(model),
        "--output",
        str(tmp_path / "out"),
    )
    first, second, third = texts.read_lines(tmp_path / "out" / "corpus.jsonl")
    assert third == passages[2]
    tokenizer = AutoTokenizer.from_pretrained(model)

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    assert long.startswith(first["text"]) and second["title"] == ""
    assert tokens(f"passage: a title {first['text']}") == tokens(f"passage: a title {long}")[:128]
    assert tokens(f"passage: {second['text']}") == tokens(f"passage: {long}")[:128]
    assert [row["_id"] for row in texts.read_lines(tmp_path / "out" / "queries.jsonl")] == ["q"]


def test_a_pair_has_the_words_of_the_passage_that_its_question_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = factories.tiny_decoder(tmp_path / "model")
    filler = [f"w{number}" for number in range(100)]
    passages = [{"_id": f"p{number}", "title": "T", "text": f"passage {number}"} for number in range(5)]
    passages[0]["text"] = " ".join([*filler[:70], "the", "tide", "follows", "the", "moon", *filler[70:]])
    queries = {f"q{number}": f"what is passage {number}" for number in range(5)} | {"q0": "Which moon makes the tide?"}
    train = [f"q{number}\tp{number}\t1" for number in range(3)]
    dev = [f"q{number}\tp{number}\t1" for number in (3, 4)]
    source = beir(tmp_path / "in", passages, queries, {"train": train, "dev": dev})
    options = ("--words", "20", "--num-pairs", "9", "--num-dev", "1")
    run(
        monkeypatch, texts, "pairs", "--source", str(source), "--tokenizer", str(model), "--output",
        str(tmp_path / "out"), *options,
    )  # fmt: skip
    pairs = {row["query"]: row["positive"] for row in texts.read_lines(tmp_path / "out" / "pairs.jsonl")}
    assert len(pairs) == 3
    assert len(pairs[queries["q0"]].split()) == 20
    assert "tide follows the moon" in pairs[queries["q0"]]
    (passage,) = texts.read_lines(tmp_path / "out" / "dev" / "corpus.jsonl")
    assert passage["_id"] in ("p3", "p4")


def test_a_checkpoint_becomes_an_adapter_that_peft_and_readapt_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = factories.tiny_decoder(tmp_path / "base")
    trained = AutoModel.from_pretrained(base).eval()
    add_adapters(trained, AdapterShape(method="lora", rank=4, alpha=8, dropout=0.0, targets=adapter.TARGETS))
    for _, layer in adapted_layers(trained):
        torch.nn.init.normal_(layer.lora_B, std=0.2)
        layer.lora_A.data, layer.lora_B.data = layer.lora_A.half().float(), layer.lora_B.half().float()
    state = {name: each.detach() for name, each in trained.named_parameters() if each.requires_grad}
    save_file(
        state | {f"{name}@exp_avg": each.clone() for name, each in state.items()}, tmp_path / "step-7.safetensors"
    )
    made, copied = tmp_path / "made", tmp_path / "copied"
    checkpoint = str(tmp_path / "step-7.safetensors")
    run(monkeypatch, adapter, "--base", str(base), "--from", checkpoint, "--alpha", "8", "--output", str(made))
    run(monkeypatch, adapter, "--base", str(base), "--from", str(made), "--output", str(copied))
    assert {each.dtype for each in load_file(copied / "adapter_model.safetensors").values()} == {torch.float16}
    ids = torch.arange(10, 20)[None]
    theirs = PeftModel.from_pretrained(AutoModel.from_pretrained(base), copied).eval()
    with torch.no_grad():
        np.testing.assert_allclose(theirs(ids).last_hidden_state, trained(ids).last_hidden_state, atol=1e-5)
    opened = models.open_model(str(copied))
    assert (opened.encoding.pooling, opened.encoding.max_passage_tokens) == ("mean", 128)
    assert opened.base.folder == base


def test_figures_of_another_work_folder_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, lora = tmp_path / "smollm.json", tmp_path / "work" / "made" / "lora"
    output.write_text(json.dumps({"domains": {"cranfield": {"report-seed0": {"seed": 0}}}}))
    (lora / "metrics").mkdir(parents=True)
    row = {"num_steps": 9, "loss": 1.5, "seconds": 2.0, "tokens_per_s": 3.0, "peak_memory_bytes": 4}
    (lora / "metrics" / "step-2.jsonl").write_text("".join(json.dumps({"step": n, **row}) + "\n" for n in (1, 2)))
    texts.write_lines(lora.parent / "pairs.jsonl", [{"query": "q", "positive": "p"}])
    (lora / "building.json").write_text(
        json.dumps({"stage": "finetune", "owner": "o", "pid": 1, "heartbeat": 0, "config": {"output": str(lora)}})
    )
    (tmp_path / "work" / "nfcorpus" / "report-before").mkdir(parents=True)
    run(monkeypatch, results, "--work", str(tmp_path / "work"), "--output", str(output))
    found = json.loads(output.read_text())
    assert found["domains"] == {"cranfield": {"report-seed0": {"seed": 0}}}, (
        "a report without a manifest is not measured"
    )
    assert found["retriever"]["state"] == "stopped after step 2 of 9"
    assert found["retriever"]["options"] == {"output": "WORK/made/lora"}


@pytest.mark.parametrize("script", sorted(STUDY.glob("*.sh")), ids=lambda script: script.name)
def test_scripts_have_no_mistakes(script: Path) -> None:
    shellcheck(script.read_text())


def test_an_unknown_step_is_refused(tmp_path: Path) -> None:
    command = ["bash", str(STUDY / "run.sh"), "data", str(tmp_path), "modle"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "no step modle" in ended.stdout
