"""Several retrievers over one corpus: the table, and what it is made of."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from readapt_ray import cli
from readapt_ray.artifacts import Artifact, open_artifact
from readapt_ray.catalog import models, retrievers
from readapt_ray.errors import InputError, ModelError
from readapt_ray.evaluation.runs import read_run
from readapt_ray.recipes import compare
from readapt_ray.recipes.chain import stage_parts
from readapt_ray.recipes.compare import to_markdown
from readapt_ray.recipes.compare_plan import CompareConfig, Plan, file_name
from readapt_ray.storage import Location
from tests import factories
from tests.chat_endpoint import Endpoint

TRAINING = {"batch_size": 8, "num_workers": 1, "num_cpus_per_worker": 1}


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus with test and train qrels, a base, a whole retriever, another one, and one that is an adapter."""
    folder = tmp_path_factory.mktemp("compare")
    base = factories.tiny_decoder(folder / "base")
    factories.write_contract(factories.full_retriever(folder / "first", base))
    factories.write_contract(factories.full_retriever(folder / "second", base, seed=9))
    factories.write_contract(factories.full_retriever(folder / "first-finetune", base, seed=8))
    (folder / "first-BM25").symlink_to(folder / "first-finetune")
    factories.write_contract(factories.lora_adapter(folder / "lora", base))
    passages = factories.small_corpus(60)
    queries, qrels = factories.small_queries(passages, 16)
    factories.ingest_artifact(folder / "corpus", passages, queries, qrels[:8])
    (folder / "corpus/qrels/train.parquet").write_bytes((folder / "corpus/qrels/test.parquet").read_bytes())
    return folder


def config(pieces: Path, **changes: Any) -> CompareConfig:
    values = {
        "retrievers": [str(pieces / "first"), str(pieces / "second")],
        "corpus": str(pieces / "corpus"),
        "output": str(pieces / "out"),
    }
    return CompareConfig.parse(values | changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"retrievers": ["{}/first", "{}/out/first"]}, InputError, "each with another last part"),
        ({"retrievers": []}, InputError, "at least one"),
        ({"retrievers": ["{}/absent"]}, InputError, "absent"),
        ({"corpus": "{}/base"}, InputError, "base"),
        ({"measures": ["nDGC@10"]}, InputError, "unknown measure"),
        ({"queries": "{}/absent.tsv"}, InputError, "no queries at .*absent.tsv'; give --queries$"),
        (
            {"queries": "{}/absent.tsv", "qrels": "{}/none.tsv"},
            InputError,
            "no queries at .* and no qrels at .*; give --queries and --qrels$",
        ),
        ({"retrievers": ["{}/lora"], "finetune": True}, ModelError, "is an adapter, and finetune starts from whole"),
        ({"embed_options": {"sample": "1%"}}, InputError, "embed_options: sample = '1%' is refused: .*;"),
        ({"embed_options": {"previous": "x"}}, InputError, "embed_options: previous = 'x' is refused: .*;"),
        ({"embed_options": {"encoding": "x"}}, InputError, "embed_options sets encoding, which the comparison itself"),
        ({"embed_options": {"dtyp": "x"}}, InputError, "embed_options: unknown option 'dtyp'"),
        ({"train_options": {"pretrained": "x"}}, InputError, "train_options sets pretrained, which"),
        ({"train_options": {"only": "{}/absent"}}, InputError, "train_options: only = .*absent' is not there"),
        ({"merge_options": {"factors": True}}, InputError, "merge_options: factors = True is refused: .*;"),
        ({"merge_options": {"knowledge_scale": [0.5, 1]}}, InputError, "merge_options: knowledge_scale = .*one number"),
        ({"finetune_options": {"encoding": "x"}}, InputError, "finetune_options: encoding = 'x' is refused: .*;"),
        ({"finetune": True, "finetune_options": {"split": "dev"}}, InputError, "no judgements at .*dev.parquet'"),
        ({"synthesize_options": {"num_passages": 5}}, InputError, "does nothing without synthesize"),
        (
            {"synthesize": "w", "synthesize_options": {"vectors": "x"}},
            InputError,
            "synthesize_options sets vectors, which",
        ),
        (
            {"bm25": True, "retrievers": ["{}/first", "{}/first-BM25"]},
            InputError,
            "'first . BM25' and 'first-BM25' would both be written to .*runs/first-BM25.trec'; rename the folder",
        ),
        ({"bridge": True}, InputError, "bridge does nothing without readapt, finetune or synthesize"),
        ({"retrievers": ["{}/lora"], "synthesize": "w"}, ModelError, "is an adapter, and finetune starts from whole"),
        (
            {"finetune": True, "finetune_options": {"split": "test"}},
            InputError,
            "would train on .*test.parquet', by which the comparison is measured; set another split",
        ),
        (
            {"finetune": True, "qrels": "{}/corpus/qrels/train.parquet"},
            InputError,
            "would train on .*train.parquet', by which the comparison is measured",
        ),
        (
            {"finetune": True, "retrievers": ["{}/first", "{}/first-finetune"]},
            InputError,
            "'first . finetune' and 'first-finetune' would both be written to .*vectors/first-finetune'; rename the folder",
        ),
    ],
)
def test_bad_input_is_named_before_anything_is_encoded(
    pieces: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    filled = json.loads(json.dumps(changes).replace("{}", str(pieces)))
    with pytest.raises(error, match=message):
        compare.compare(config(pieces, **filled, output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("source", "asked", "drops"), [("arguana", None, True), ("/x", None, False), ("/x", True, True)]
)
def test_runs_are_as_deep_as_the_measures_and_without_self_hits_where_the_corpus_wants_it(
    pieces: Path, source: str, asked: bool | None, drops: bool
) -> None:
    corpus: Any = SimpleNamespace(
        uri="corpus", location=Location("corpus"), manifest=SimpleNamespace(config={"source": source})
    )
    plan = Plan(config(pieces, measures=["nDCG@10", "R@200"], drop_self_hits=asked), corpus)
    searches: Any = [each.search.config for each in plan.candidates()]
    assert [(each.top_k, each.drop_self_hits) for each in searches] == [(200, drops)] * 2


def test_queries_of_other_columns_are_searched_measured_and_so_many_timed(
    pieces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "asked.tsv").write_text("topic\twording\nq1\tone thing\nq2\tanother\nq3\ta third\n")
    (tmp_path / "judged.tsv").write_text("topic\tpaper\tgrade\nq1\td00001\t1\n")
    columns = ("query_id=topic", "query=wording", "doc_id=paper", "relevance=grade")
    files = {"queries": str(tmp_path / "asked.tsv"), "qrels": str(tmp_path / "judged.tsv")}
    asked = config(pieces, **files, columns=",".join(columns), num_timed_queries=2)
    plan = Plan(asked, open_artifact(f"{pieces}/corpus", "ingest"))
    first, *others = plan.candidates()
    for step in (first.search, *(each.search for each in others), plan.evaluate([first, *others])):
        given: Any = step.config
        assert (given.columns, given.queries, given.qrels) == (columns, files["queries"], files["qrels"])
    timed: list[str] = []
    monkeypatch.setattr(compare, "_costs_of_vectors", lambda _, texts: timed.extend(texts) or {})
    compare._costs(asked, first, plan.queries, [])
    assert timed == ["one thing", "another"]


def known_as_tiny(monkeypatch: pytest.MonkeyPatch, pieces: Path, folder: str) -> None:
    """Give the catalog a row `tiny` whose model comes with the package."""
    row = retrievers.retriever("repllama").model_copy(
        update={
            "name": "tiny",
            "hub_id": f"builtin:{pieces / folder}",
            "pretrained": str(pieces / "base"),
            "encoding": models.open_model(str(pieces / folder)).encoding,
        }
    )
    monkeypatch.setattr(retrievers, "RETRIEVERS", (*retrievers.RETRIEVERS, row))


def test_what_is_readapted_is_the_model_that_was_named(
    pieces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known_as_tiny(monkeypatch, pieces, "first")
    name = f"builtin:{pieces}/first"
    plan = Plan(config(pieces, retrievers=[name], readapt=True), open_artifact(f"{pieces}/corpus", "ingest"))
    merges: Any = [step.config for each in plan.candidates() for step in each.making if step.stage == "merge"]
    assert [each.retriever for each in merges] == [name, name]  # not `tiny`, which may be a folder here
    monkeypatch.chdir(tmp_path)
    factories.write_contract(factories.tiny_decoder(tmp_path / "tiny"))
    plan = Plan(config(pieces, retrievers=["tiny"], readapt=True), open_artifact(f"{pieces}/corpus", "ingest"))
    assert not [step for each in plan.candidates() for step in each.making]  # a folder, of which nothing is known


def test_layers_that_the_model_lacks_are_refused_before_an_adapter_is_trained(
    pieces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known_as_tiny(monkeypatch, pieces, "first")
    asked = {"retrievers": ["tiny"], "readapt": True, "merge_options": {"layer_scales": "0-7=0.5"}}
    with pytest.raises(InputError, match=r"layer_scales = '0-7=0.5': the model has the layers 0 to 1"):
        compare.compare(config(pieces, **asked, output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_everything_is_under_a_store_whose_address_has_options(pieces: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`s3://bucket/folder?endpoint_override=HOST`, as MinIO needs it: the options stay behind the names of files."""
    options = "?scheme=http&endpoint_override=127.0.0.1:9000"
    corpus = Artifact(
        Location(f"s3://bucket/corpus{options}"), open_artifact(str(pieces / "corpus"), "ingest").manifest
    )
    retrievers_ = [f"s3://bucket/{name}{options}" for name in ("first", "second")]
    opened = models.open_model(str(pieces / "first"))
    monkeypatch.setattr(models, "open_model", lambda name: opened)
    given = config(pieces, retrievers=retrievers_, output=f"s3://bucket/out{options}", queries_only=True, finetune=True)
    monkeypatch.setattr(models, "find_row", lambda name: None)
    plan = Plan(given, corpus)
    candidates = list(plan.candidates())
    assert [each.name for each in candidates] == [
        *("first", "first + finetune", "first + finetune + queries-only"),
        *("second", "second + finetune", "second + finetune + queries-only"),
    ]
    places = {step.config.output for each in candidates for step in each.stages} | {plan.queries}
    assert all(place.endswith(options) and place.count("?") == 1 for place in places)
    paths = {place.removesuffix(options) for place in places}
    assert {"s3://bucket/corpus/queries", "s3://bucket/out/models/first-finetuned-queries"} < paths
    assert candidates[0].search.config.qrels == f"s3://bucket/corpus/qrels/test.parquet{options}"


def test_rows_for_queries_alone_and_behind_a_bridge_search_the_vectors_of_the_retriever(
    pieces: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known_as_tiny(monkeypatch, pieces, "first")
    asked = {"retrievers": ["tiny"], "readapt": True, "finetune": True, "queries_only": True, "bridge": True}
    plan = Plan(config(pieces, **asked), open_artifact(f"{pieces}/corpus", "ingest"))
    found: Any = {each.name: each for each in plan.candidates()}
    made = ["tiny + RE-AdaptIR", "tiny + finetune"]
    rows = [f"{name}{each}" for name in made for each in ("", " + queries-only", " + bridge")]
    assert list(found) == ["tiny", *rows, "tiny + RE-AdaptIR + finetune"]
    old = found["tiny"].embed.config.output
    for name in made:
        model, alone, bridged = (found[f"{name}{each}"] for each in ("", " + queries-only", " + bridge"))
        assert alone.making[-1].config.queries_only
        assert alone.search.config.retriever == alone.making[-1].config.output != model.model
        assert bridged.search.config.retriever == bridged.making[-1].config.retriever == model.model
        assert bridged.search.config.bridge == bridged.making[-1].config.output
        assert bridged.making[-1].config.old_vectors == old
        assert {alone.search.config.vectors, bridged.search.config.vectors} == {old} != {model.search.config.vectors}
    runs = [each.search.config.output for each in found.values()]
    assert len(set(runs)) == len(runs)


def test_rows_for_written_queries_are_made_of_one_set_that_the_first_retriever_tried(
    pieces: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known_as_tiny(monkeypatch, pieces, "first")
    options = {"endpoint": "http://host/v1", "num_passages": 7}
    asked = {"retrievers": ["tiny", str(pieces / "second")], "readapt": True, "synthesize": "writer"}
    labelled = {"split": "train", "negatives": "run.trec", "num_epochs": 2}
    plan = Plan(
        config(pieces, **asked, synthesize_options=options, finetune_options=labelled, bridge=True),
        open_artifact(f"{pieces}/corpus", "ingest"),
    )
    found: Any = {each.name: each for each in plan.candidates()}
    plan.check_outputs(list(found.values()))
    rows = [
        "tiny",
        "tiny + RE-AdaptIR",
        "tiny + RE-AdaptIR + bridge",
        "tiny + synthesize",
        "tiny + synthesize + bridge",
    ]
    rows += ["tiny + RE-AdaptIR + synthesize", "second", "second + synthesize", "second + synthesize + bridge"]
    assert list(found) == rows
    for name in ("tiny + synthesize", "tiny + RE-AdaptIR + synthesize", "second + synthesize"):
        written, tuned = (step.config for step in found[name].making)
        assert (written.model, written.endpoint, written.num_passages) == ("writer", "http://host/v1", 7)
        assert written.vectors == found["tiny"].embed.config.output and written.corpus == str(pieces / "corpus")
        assert tuned.corpus == written.output and (tuned.negatives, tuned.num_epochs) == (None, 2)
        assert found[name].embed.config.retriever == tuned.output
    assert found["tiny + RE-AdaptIR + synthesize"].making[1].config.model == found["tiny + RE-AdaptIR"].model


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_retriever_is_compared_after_queries_that_an_endpoint_wrote(ray_session: None, pieces: Path) -> None:
    server = Endpoint()
    words = [each.text.split() for each in factories.small_corpus(60)]
    server.answer = lambda number, _: (200, " ".join(words[number % 60][:9][::-1]) + "?")
    asked = {"retrievers": [str(pieces / "first")], "output": str(pieces / "written"), "synthesize": "writer"}
    options = {"endpoint": server.url, "num_passages": 60}
    try:
        result = compare.compare(config(pieces, **asked, synthesize_options=options, finetune_options=TRAINING))
    finally:
        server.server.shutdown()
        server.server.server_close()
    assert [row["retriever"] for row in result["rows"]] == ["first", "first + synthesize"]
    queries = open_artifact(f"{pieces}/written/queries", "synthesize")
    assert queries.manifest.counts["num_queries"] >= 8 and len(server.requests) == 60
    tuned = open_artifact(f"{pieces}/written/models/first-synthesized", "finetune")
    assert tuned.manifest.inputs["corpus"] == queries.fingerprint


def test_every_option_of_pack_reaches_pack_and_train(pieces: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known_as_tiny(monkeypatch, pieces, "first")
    listed = str(pieces / "corpus/qrels/test.parquet")
    options = {"mode": "packed", "block_tokens": 64, "exclude": listed, "only": listed, "overwrite": True}
    plan = Plan(
        config(pieces, retrievers=["tiny"], readapt=True, train_options=options),
        open_artifact(f"{pieces}/corpus", "ingest"),
    )
    made: Any = {step.stage: step.config for each in plan.candidates() for step in each.making}
    for stage in ("pack", "train"):
        assert {name: getattr(made[stage], name) for name in options} == options
        assert isinstance(made[stage], stage_parts(stage)[0])


def test_the_table_says_quality_time_and_bytes() -> None:
    comparison = {"difference": -0.0125, "p_holm": 0.25}
    costs = {
        "encode_ms": 3.14,
        "search_ms": 0.5,
        "dimension": 384,
        "num_bytes": 5_580_000,
        "num_parameters": 22_700_000,
    }
    rows = [
        {"retriever": "a|b", "means": {"nDCG@10": 0.3159}, "comparison": None, **costs},
        {"retriever": "c", "means": {"nDCG@10": 0.3034}, "comparison": comparison, **costs},
        {"retriever": "BM25", "means": {"nDCG@10": 0.5}, "comparison": comparison, **costs, "dimension": 0},
    ]
    text = to_markdown({"corpus": "x", "num_passages": 3633, "num_queries": 323, "measures": ["nDCG@10"], "rows": rows})
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines[2] == r"| a\|b | 0.3159 |  |  | 3.1 + 0.5 | 384 | 5.6 MB | 22.7 M |"
    assert lines[3] == "| c | 0.3034 | −0.0125 | 0.2500 | 3.1 + 0.5 | 384 | 5.6 MB | 22.7 M |"
    assert lines[4] == "| BM25 | 0.5000 | −0.0125 | 0.2500 | 3.1 + 0.5 |  | 5.6 MB |  |"
    assert "323 queries, 3,633 passages" in text


def test_one_command_compares_and_the_same_again_encodes_nothing(
    ray_session: None, pieces: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["compare", "--retrievers", f"{pieces}/first,{pieces}/second", "--corpus", f"{pieces}/corpus"]
    arguments += ["--output", f"{pieces}/out", "--measures", "nDCG@10,R@10", "--config", f"{pieces}/compare.yaml"]
    (pieces / "compare.yaml").write_text("embed_options: {dimensions: 16}")  # search must ask for as many
    assert cli.main(arguments) == 0
    assert "| second |" in capsys.readouterr().out
    result = json.loads((pieces / "out" / "compare.json").read_text())
    assert [row["retriever"] for row in result["rows"]] == ["first", "second"]
    measures = json.loads((pieces / "out" / "report" / "measures.json").read_text())
    for row in result["rows"]:
        assert row["means"] == measures["means"][row["retriever"]]
        assert row["dimension"] == 16
        assert row["num_bytes"] > 60 * 16 * 4
        assert row["encode_ms"] > 0
        assert row["search_ms"] > 0
    assert result["rows"][1]["comparison"]["measure"] == "nDCG@10"
    manifests = [*(pieces / "out/vectors").rglob("manifest.json"), *(pieces / "out/runs").glob("*.manifest.json")]
    before = {path: path.stat().st_mtime_ns for path in manifests}
    assert len(before) == 4
    assert cli.main(arguments) == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_rows_of_bm25_are_the_modes_of_search_over_one_index_of_each_models_vectors(
    pieces: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known_as_tiny(monkeypatch, pieces, "first")
    asked = {"retrievers": ["tiny", str(pieces / "second")], "readapt": True, "queries_only": True, "bm25": True}
    plan = Plan(config(pieces, **asked), open_artifact(f"{pieces}/corpus", "ingest"))
    found: Any = {each.name: each for each in plan.candidates()}
    plan.check_outputs(list(found.values()))
    models_of = ["tiny", "tiny + RE-AdaptIR", "tiny + RE-AdaptIR + queries-only", "second"]
    rows = [row for name in models_of for row in (name, f"{name} + BM25")]
    assert list(found) == [rows[0], "BM25", *rows[1:]]
    assert plan.evaluate(list(found.values())).config.runs[1].endswith("/runs/BM25.trec")
    for name in models_of:
        dense, fused = found[name], found[f"{name} + BM25"]
        index = fused.index.config
        assert index.bm25 and index.kind == "flat" and index.vectors == dense.search.config.vectors
        assert (fused.search.config.mode, fused.search.config.index) == ("hybrid", index.output)
        same = {"retriever", "queries", "qrels", "top_k", "drop_self_hits", "columns"}
        assert [getattr(fused.search.config, each) for each in same] == [
            getattr(dense.search.config, each) for each in same
        ]
        assert dense.index is None and fused.making == ()
    assert found["BM25"].search.config.mode == "bm25" and found["BM25"].index == found["tiny + BM25"].index
    only = found["tiny + RE-AdaptIR + queries-only + BM25"]
    assert only.index == found["tiny + BM25"].index and only.search.config.retriever != "tiny"


def test_bm25_and_what_is_fused_with_it_stand_beside_each_retriever(ray_session: None, pieces: Path) -> None:
    names = ["first", "BM25", "first + BM25", "second", "second + BM25"]
    output = str(pieces / "with-words")
    result = compare.compare(config(pieces, output=output, bm25=True, measures=["nDCG@10", "R@5"]))
    rows = {row["retriever"]: row for row in result["rows"]}
    assert list(rows) == names
    measures = json.loads((pieces / "with-words/report/measures.json").read_text())
    assert {name: row["means"] for name, row in rows.items()} == measures["means"]
    assert all(name in (pieces / "with-words/report/report.html").read_text() for name in names)
    assert [row["comparison"] is None for row in rows.values()] == [True, False, False, False, False]
    runs = {}
    for each in names:  # equal scores are fused in the order of doc_ids
        run = read_run(f"{output}/runs/{file_name(each)}.trec")
        runs[each] = {
            query_id: [hit.doc_id for hit in sorted(hits, key=lambda hit: (-hit.score, hit.doc_id))]
            for query_id, hits in run.items()
        }
    for query_id, found in runs["second + BM25"].items():  # by hand, from the runs that were fused
        scores: dict[str, float] = {}
        for each in ("second", "BM25"):
            for place, hit in enumerate(runs[each].get(query_id, [])):
                scores[hit] = scores.get(hit, 0) + 1 / (61 + place)
        best = sorted(scores, key=lambda hit: (-scores[hit], hit))[: len(found)]
        assert found == best
    words, dense, both = (rows[each] for each in ("BM25", "second", "second + BM25"))
    assert words["encode_ms"] == 0 and words["search_ms"] > 0 and words["num_bytes"] > 60 * 8
    assert both["num_bytes"] == dense["num_bytes"] + words["num_bytes"]
    assert both["search_ms"] == pytest.approx(dense["search_ms"] + words["search_ms"], abs=0.011)
    assert (
        compare.compare(config(pieces, output=output, bm25=False, measures=["nDCG@10", "R@5"]))["rows"][1]["retriever"]
        == "second"
    )


def test_bm25_without_its_library_is_refused_before_anything_is_encoded(
    pieces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(InputError, match=r"pip install 'readapt-ray\[bm25\]'"):
        compare.compare(config(pieces, bm25=True, output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_query_is_timed_alone_against_every_vector() -> None:
    from readapt_ray.evaluation.latency import query_latency, words_latency

    seen = []

    class Slow:
        def encode(self, texts: list[str], kind: str) -> np.ndarray:
            import time

            seen.append((tuple(texts), kind))
            time.sleep(0.02)
            return np.ones((len(texts), 4), np.float32)

    latency = query_latency(Slow(), ["a", "b", "c"], ["d1", "d2"], np.eye(2, 4, dtype=np.float32))  # type: ignore[arg-type]
    assert seen == [(("a",), "query"), (("a",), "query"), (("b",), "query"), (("c",), "query")]
    assert latency.encode_ms >= 20
    assert latency.search_ms > 0
    with pytest.raises(InputError, match="no query to time"):
        query_latency(Slow(), [], ["d1"], np.ones((1, 4), np.float32))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no query to time"):
        words_latency([], np.array([], object), [])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_supervised_tuning_readaptir_and_both_stand_side_by_side(
    ray_session: None, pieces: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known_as_tiny(monkeypatch, pieces, "lora")
    result = compare.compare(
        config(
            pieces,
            retrievers=[f"builtin:{pieces}/lora"],  # workers do not know `tiny`
            output=str(pieces / "all"),
            finetune=True,
            readapt=True,
            train_options={**TRAINING, "block_tokens": 64},
            finetune_options=TRAINING,
        )
    )
    names = ["lora", "lora + RE-AdaptIR", "lora + finetune", "lora + RE-AdaptIR + finetune"]
    assert [row["retriever"] for row in result["rows"]] == names
    means = {row["retriever"]: row["means"]["nDCG@10"] for row in result["rows"]}
    assert means["lora + finetune"] > means["lora"]
