"""Truncated passages are counted where tokens are made, and seen in every manifest after that and in the report."""

import importlib
import json

import pytest

from readapt_ray.catalog.models import open_model
from readapt_ray.stages.embed import EmbedConfig, embed
from readapt_ray.stages.evaluate import EvaluateConfig, evaluate
from readapt_ray.stages.index import IndexConfig, index
from readapt_ray.stages.pack import PackConfig, pack
from readapt_ray.stages.search import SearchConfig, search
from readapt_ray.storage import Location
from tests import factories

stage = importlib.import_module("readapt_ray.stages.pack")
pytestmark = pytest.mark.usefixtures("ray_session")

MAX_TOKENS = 24
LONG = 5
"""Passages of the corpus that are longer."""


@pytest.fixture
def corpus(tmp_path):
    passages = [each._replace(text="array shape", title="") for each in factories.small_corpus(20)]
    passages = [
        each._replace(text=f"array {number} shape")
        if number >= LONG
        else each._replace(text=f"{number}" + " axis dtype" * 30)
        for number, each in enumerate(passages)
    ]
    passages[19] = passages[0]._replace(doc_id=passages[19].doc_id)  # a duplicate is encoded, and counted, once
    queries, qrels = factories.small_queries(passages)
    factories.ingest_artifact(tmp_path / "corpus", passages, queries=queries, qrels=qrels, num_files=2)
    return tmp_path / "corpus", passages


def _lengths(model, passages):
    return [
        len(ids) for ids in model.tokenizer([each.text for each in passages], add_special_tokens=False)["input_ids"]
    ]


def test_truncation_is_in_the_lines_and_manifests_of_all_stages_and_in_the_report(tmp_path, corpus, caplog):
    caplog.set_level("INFO", logger="readapt_ray")
    folder, passages = corpus
    model = factories.tiny_decoder(tmp_path / "model", headless=True)
    factories.write_contract(model, max_passage_tokens=MAX_TOKENS, passage_template="{text}")
    vectors = embed(
        EmbedConfig(retriever=str(model), corpus=str(folder), output=str(tmp_path / "vectors"), num_workers=1)
    )
    found = vectors.manifest.details["truncation"]
    encoding = open_model(str(model)).encoding
    room = MAX_TOKENS - encoding.add_bos - encoding.add_eos
    lost = sum(length - room for length in _lengths(open_model(str(model)), passages[:LONG]))
    assert (found["num_texts"], found["num_truncated"], found["num_lost_tokens"]) == (19, LONG, lost)
    share = lost / (lost + vectors.manifest.counts["num_tokens"])
    assert found["lost_share"] == pytest.approx(share, abs=1e-4)
    told = f"5 of 19 passages truncated to 24 tokens, {100 * found['lost_share']:.1f}% of the tokens lost"
    (line,) = [each for each in caplog.messages if each.startswith("embed: encoded 19 texts")]
    assert line.endswith(told)
    (warning,) = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert warning.startswith(f"embed: {told}; raise max_passage_tokens")

    made = index(IndexConfig(vectors=vectors.uri, output=str(tmp_path / "index")))
    run = search(
        SearchConfig(
            retriever=str(model),
            index=made.uri,
            queries=str(folder / "queries"),
            output=str(tmp_path / "one.trec"),
            top_k=5,
        )
    )
    report = evaluate(EvaluateConfig(runs=(run.uri,), qrels=str(folder / "qrels"), output=str(tmp_path / "report")))
    assert json.loads((report.location / "report.json").read_text())["runs"][0]["truncation"] == told
    assert f"one: {told}" in (report.location / "report.md").read_text()
    assert f"one: {told}." in (report.location / "report.html").read_text()


@pytest.mark.parametrize("mode", ["passage", "packed"])
def test_pack_counts_what_it_truncates_and_not_what_just_fits(tmp_path, corpus, caplog, mode):
    folder, passages = corpus
    base = factories.tiny_decoder(tmp_path / "base")
    lengths = [2 + length for length in _lengths(open_model(str(base)), passages)]
    just = sorted(lengths)[0]
    config = PackConfig(
        pretrained=str(base), corpus=str(folder), output=str(tmp_path / "blocks"), block_tokens=max(8, just), mode=mode
    )
    limit = config.block_tokens
    longer = [length - limit for length in lengths if length > limit]
    made = pack(config)
    assert made.manifest.counts["num_truncated_passages"] == len(longer)
    assert made.manifest.details["truncation"]["num_lost_tokens"] == sum(longer)
    files = Location(config.output + "/blocks").files(".parquet")  # after a kill, their counts are read again
    assert sum(stage._read_counts(file)["num_lost_tokens"] for file in files) == sum(longer)
    assert "pack: " in caplog.text and "raise block_tokens" in caplog.text


def test_where_a_model_has_no_more_positions_only_shorter_passages_help(tmp_path, caplog):
    model = open_model(str(factories.tiny_decoder(tmp_path / "base")))
    positions = model.config["max_position_embeddings"]
    counts = {"num_passages": 9, "num_truncated_passages": 3, "num_tokens": 90, "num_lost_tokens": 30}
    stage._tell_truncation(counts, positions, model)
    assert "has no more positions: split long passages with ingest's split_tokens" in caplog.text
    assert "raise block_tokens" not in caplog.text
    stage._tell_truncation(counts, positions - 1, model)
    assert "raise block_tokens" in caplog.text
