"""A run at the keyboard: a change makes again what it must, and status tells where a run is."""

import json
import shutil
from pathlib import Path

import pytest

import readapt_ray as ra
from readapt_ray import artifacts, cli, root_status
from readapt_ray.artifacts import Workspace
from readapt_ray.errors import (
    InputError,
)
from readapt_ray.recipes import chain, run_end, running
from readapt_ray.storage import Location
from tests import factories
from tests.recipes.desk import AFTER_TRAIN, ALL, Desk


def test_a_changed_option_is_refused_before_anything_runs_and_overwrite_makes_only_what_is_stale(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    assert desk.run() == 0
    assert desk.made == ALL
    assert desk.run() == 0
    assert desk.made == []
    assert set(desk.states().values()) == {"done"}
    capsys.readouterr()
    for arguments in ([], ["--set", "train.overwrite=true"]):
        assert desk.run("--set", "train.lora_rank=4", *arguments) == 2
        (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("readapt: error")]
        assert "train.lora_rank: 32 there, 4 now. Stale, with the time each took: adapter (" in said
        assert all(f"{name} (" in said for name in AFTER_TRAIN)
        assert "blocks (" not in said
        assert "--overwrite (or --from train), or give another --root" in said or "--from merge" in said
        assert desk.made == []
    assert desk.run("--set", "train.lora_rank=4", "--overwrite") == 0
    assert desk.made == AFTER_TRAIN
    assert desk.run("--set", "train.lora_rank=8", "--from", "train") == 0
    assert desk.made == AFTER_TRAIN
    assert desk.run("--from", "merge") == 2, "the rank of the file is 32 again, and train comes before merge"
    assert desk.made == []
    assert desk.run("--from", "mreg") == 2
    assert "--from 'mreg' is no stage of the run; did you mean 'merge'?" in capsys.readouterr().err


def test_a_root_of_a_release_without_an_option_is_not_stale_if_the_option_has_its_default(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    assert desk.run() == 0
    (desk.root / "run.json").unlink()
    file = desk.root / "corpus" / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["config"]["overlap"]
    file.write_text(json.dumps(manifest))
    assert desk.run() == 0, capsys.readouterr().err
    assert desk.run("--set", "ingest.split_tokens=64", "--set", "ingest.tokenizer=quickstart-retriever") == 2
    assert desk.run("--set", "ingest.max_text_bytes=7") == 2


def test_an_interrupted_overwriting_goes_on_and_status_tells_what_is_stale_and_what_failed(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    assert desk.run() == 0
    desk.broken = "adapted"
    assert desk.run("--set", "train.lora_rank=4", "--overwrite") == 2
    assert desk.made == ["adapter"]
    states = desk.states()
    assert states["adapted"] == "failed"
    assert desk.what("adapted").startswith("it broke (20")
    assert f"log: {desk.root / 'readapt-run.log'}" in desk.what("adapted")
    assert "ModelError: it broke" in (desk.root / "readapt-run.log").read_text()
    assert {name for name, state in states.items() if state == "stale"} == {"vectors/adapted", *AFTER_TRAIN[3:]} - {
        "adapted"
    }
    assert (
        desk.what("report")
        == "a run that did not end was about to make it again; made from runs/adapted.trec, which is stale"
    )
    desk.broken = ""
    assert desk.run("--set", "train.lora_rank=4", "--overwrite") == 0
    assert desk.made == AFTER_TRAIN[1:]
    assert set(desk.states().values()) == {"done"}


def test_another_model_under_the_same_name_is_found_before_anything_runs(
    desk: Desk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = shutil.copytree(desk.values["retriever"], tmp_path / "own")
    assert desk.run(retriever=str(own)) == 0
    factories.write_contract(own, query_template="ask: {text}")
    assert desk.run(retriever=str(own)) == 2
    said = capsys.readouterr().err
    assert "retriever: its content changed. Stale" in said
    assert "adapter (" not in said


def test_a_run_without_queries_ends_complete(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    desk.is_judged = False
    assert desk.run() == 0
    assert desk.made == [*ALL[:8], "drift"]
    said = capsys.readouterr()
    assert f"report: {desk.root}/drift/report.html" in said.out
    assert "--set queries=FILE --set qrels=FILE would give numbers" in said.err
    lines = [line.split() for line in said.out.splitlines()]
    (tune,) = (line for line in lines if line[:2] == ["readapt", "tune"])
    (serve,) = (line for line in lines if line[:2] == ["readapt", "serve"])
    assert tune[2:] == [
        *("--pretrained", desk.values["pretrained"], "--retriever", desk.values["retriever"]),
        *("--adapter", f"{desk.root}/adapter", "--corpus", f"{desk.root}/corpus", "--output", f"{desk.root}/scales"),
    ]
    places = {"retriever": "adapted", "index": "index/adapted", "corpus": "corpus"}
    assert serve[2:] == [word for name, place in places.items() for word in (f"--{name}", f"{desk.root}/{place}")]
    assert cli.main(["status", "--root", str(desk.root)]) == 0
    assert "9 of 9 done" in capsys.readouterr().out
    assert desk.run() == 0
    assert desk.made == []


def test_a_run_without_queries_withholds_some_passages_and_does_not_train_again_when_queries_come(desk: Desk) -> None:
    desk.is_judged, desk.num_passages = False, 60
    assert desk.run() == 0
    assert artifacts.open_artifact(str(desk.root / "blocks"), "pack").manifest.config["withhold"] == 3
    files = write_labels(desk.file.parent)
    assert desk.run("--set", f"queries={files['queries']}", "--set", f"qrels={files['qrels']}") == 0
    assert desk.made == ALL[8:]
    assert set(desk.states().values()) == {"done"}
    assert desk.run("--set", "train.withhold=7", "--overwrite") == 0
    assert desk.made[:2] == ["blocks", "adapter"]
    assert artifacts.open_artifact(str(desk.root / "blocks"), "pack").manifest.config["withhold"] == 7


def write_labels(folder: Path) -> dict[str, str]:
    """Write a query and its judgement; their files, by option."""
    (folder / "queries.tsv").write_text("q1\tan old question\n")
    (folder / "qrels.tsv").write_text("q1\t0\td1\t1\n")
    return {name: str(folder / f"{name}.tsv") for name in ("queries", "qrels")}


def test_columns_of_queries_and_qrels_are_told_before_the_training_and_are_those_of_ingest(
    desk: Desk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "topics.csv").write_text("topic,wording\n1,what makes the tide\n")
    (tmp_path / "judged.csv").write_text("topic,record,grade\n1,d1,1\n")
    (tmp_path / "source.jsonl").write_text('{"record": "d1", "text": "A passage."}\n')
    files = {"queries": str(tmp_path / "topics.csv"), "qrels": str(tmp_path / "judged.csv")}
    assert desk.run(**files) == 2
    said = capsys.readouterr().err
    assert "source.jsonl has no id column" in said, "both are said at once"
    assert "topics.csv has no column query_id" in said
    assert said.count("(in a run: ingest.columns)") == 2
    columns = {"query_id": "topic", "query": "wording", "doc_id": "record", "relevance": "grade"}
    assert desk.run(**files, ingest={"columns": columns}) == 0
    assert desk.made == ALL
    record = json.loads((desk.root / "run.json").read_text())["steps"]
    assert [each["options"]["columns"] for each in record if each["stage"] in ("search", "evaluate")] == [
        [f"{field}={columns[field]}" for field in sorted(columns)]
    ] * 3
    (tmp_path / "judged.csv").write_text("topic,record,grade\n2,d1,1\n")
    assert desk.run("--root", str(tmp_path / "other"), **files, ingest={"columns": columns}) == 2
    assert "give files that belong together" in capsys.readouterr().err


GENERAL = [
    *("general/vectors/retriever", "general/vectors/adapted", "general/runs/retriever.trec"),
    *("general/runs/adapted.trec", "general/report"),
]


def test_a_general_collection_is_measured_with_the_same_models(
    desk: Desk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "general.jsonl").write_text('{"id": "g1", "text": "A general passage."}\n')
    general = {"source": str(tmp_path / "general.jsonl")}
    assert desk.run() == 0
    assert desk.run(general=general) == 2, "the report has no general table yet"
    assert "general: it was not given before. Stale, with the time each took: report (" in capsys.readouterr().err
    assert desk.run("--overwrite", general=general) == 0
    assert desk.made == ["general/corpus", *GENERAL, "report"]
    assert set(desk.states().values()) == {"done"}
    assert desk.run(general=general) == 0
    assert desk.made == []

    assert desk.run("--set", "merge.knowledge_scale=0.25", "--from", "merge", general=general) == 0
    assert desk.made == [*AFTER_TRAIN[1:5], *(GENERAL[i] for i in (1, 3, 4)), "report"]
    assert desk.run("--set", "merge.knowledge_scale=0.25") == 2
    assert "general: it is not given any more" in capsys.readouterr().err


def test_general_steps_stand_in_the_order_in_which_they_fail_first(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "general.jsonl").write_text('{"id": "g1", "text": "A general passage."}\n')
    general = {"source": str(tmp_path / "general.jsonl")}
    assert desk.run(general=general) == 0
    assert desk.made == ["corpus", "general/corpus", *ALL[1:10], *GENERAL, "report"]


def test_a_general_collection_is_measured_also_where_ones_own_has_no_queries(
    desk: Desk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "general.jsonl").write_text('{"id": "g1", "text": "A general passage."}\n')
    general = {"source": str(tmp_path / "general.jsonl"), "queries": "absent.tsv", "qrels": "absent.tsv"}
    desk.is_judged = False
    assert desk.run(general={"source": general["source"]}) == 2
    assert desk.made == ["corpus", "general/corpus"], "it is told before the training"
    said = capsys.readouterr().err
    assert (
        "has no queries and no qrels of the split 'test'; give general.split, or general.queries and general.qrels"
        in said
    )
    assert desk.run(general=general) == 2
    assert "section 'general': queries = 'absent.tsv' is not there" in capsys.readouterr().err
    assert desk.run(general=general | write_labels(tmp_path)) == 0
    assert desk.made == [*ALL[1:8], *GENERAL, "drift"]
    assert f"report on general queries: {desk.root}/general/report/report.html" in capsys.readouterr().out


def test_what_is_required_of_a_corpus_without_queries_is_refused_before_the_training(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    desk.is_judged = False
    assert desk.run(evaluate={"require": "nDCG@10 >= base"}) == 2
    assert desk.made == ["corpus"]
    assert "require = 'nDCG@10 >= base', and the corpus has no queries and qrels" in capsys.readouterr().err


@pytest.mark.parametrize("holds", [True, False])
def test_a_version_that_a_requirement_stops_is_not_offered_to_be_served(desk: Desk, holds: bool) -> None:
    assert desk.run() == 0
    made = {
        name: artifacts.open_artifact(str(desk.root / name), "")
        for name in ("corpus", "adapted", "index/adapted", "report")
    }
    made["report"].manifest.details["requirements"] = [{"holds": True}, {"holds": holds}]
    assert ("readapt serve" in run_end.closing(chain.RunConfig.parse(desk.values), made)) == holds


@pytest.mark.parametrize(
    ("layers", "told"), [(None, ""), (["0-11=0.8", "12-23=0.2"], "--layer-scales 0-11=0.8,12-23=0.2")]
)
def test_scales_without_a_report_are_searched_for_as_the_model_was_merged(
    desk: Desk, layers: list[str] | None, told: str
) -> None:
    assert desk.run() == 0
    made = {name: artifacts.open_artifact(str(desk.root / name), "") for name in ("corpus", "adapter", "adapted")}
    if layers:
        made["adapted"].manifest.details["layer_scales"] = layers
    [line] = [
        line
        for line in run_end.closing(chain.RunConfig.parse(desk.values), made).splitlines()
        if "readapt tune" in line
    ]
    assert told in line and ("--layer-scales" in line) == bool(layers)


def test_what_is_wrong_with_a_general_collection_is_told_first(
    desk: Desk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert desk.run(general={"source": str(tmp_path / "absent"), "split": "test"}) == 2
    assert f"no corpus at '{tmp_path}/absent'" in capsys.readouterr().err
    assert desk.run(general={"sorce": "x"}) == 2
    assert "did you mean 'source'" in capsys.readouterr().err
    assert desk.run(evaluate={"require": "general nDCG@10 >= base"}) == 2
    assert (
        "no general collection is measured; give its report with --general, in a run its corpus"
        in capsys.readouterr().err
    )
    assert not desk.made


def test_a_bad_manifest_spoils_its_line_and_no_other(desk: Desk) -> None:
    assert desk.run() == 0
    for name, text in (("blocks", "{"), ("adapter", '{"stage": "trai'), ("adapted", '{"stage": 3}')):
        (desk.root / name / "manifest.json").write_text(text)
    states = desk.states()
    assert {name for name, state in states.items() if state == "unreadable"} == {"blocks", "adapter", "adapted"}
    assert states["corpus"] == "done"
    assert "is not a manifest" in desk.what("adapter")
    assert "unreadable" in repr(ra.status(desk.root))


def test_a_stage_that_fails_by_itself_is_failed_in_status(tmp_path: Path) -> None:
    from readapt_ray.stages.index import IndexConfig

    def work(workspace: Workspace) -> None:
        (workspace.location / "shards" / "00000.json").write_text("{}")
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError):
        artifacts.produce("index", IndexConfig(vectors="v", output=str(tmp_path / "index")), inputs={}, work=work)
    (row,) = root_status.rows(Location(str(tmp_path)))
    assert row["state"] == "failed"
    assert row["what"].startswith("no memory, ")


def test_what_cannot_be_a_run_json_of_ours_is_none(tmp_path: Path) -> None:
    assert running.read_record(Location(str(tmp_path))) == {}
    for text in ("{", "[]", '{"steps": 3}', '{"steps": [{"stage": "a"}]}'):
        (tmp_path / "run.json").write_text(text)
        assert running.read_record(Location(str(tmp_path))) == {}
    with pytest.raises(InputError, match="--from 'x' is no stage of the run; the stages are"):
        running._with_overwriting([], overwrite=False, from_stage="x")
