import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from readapt_ray.artifacts import open_artifact, produce
from readapt_ray.config import StageConfig
from readapt_ray.errors import ArtifactConflictError, ArtifactMissingError, CorpusError, InputError
from readapt_ray.evaluation.runs import write_run
from readapt_ray.records import Qrel, ScoredDoc
from readapt_ray.stages.evaluate import EvaluateConfig, evaluate
from tests.factories import ingest_artifact, small_corpus, small_queries


@pytest.fixture
def world(tmp_path):
    """Two runs of eight queries, the second with the answer at rank 1, the first at ranks 1 to 4."""
    passages = small_corpus(40)
    queries, qrels = small_queries(passages)
    ingest_artifact(tmp_path / "corpus", passages, queries, qrels)
    others = [passage.doc_id for passage in passages if passage.doc_id not in {qrel.doc_id for qrel in qrels}]

    def scored(rank_of):
        for number, qrel in enumerate(qrels):
            docs = others[:10]
            docs.insert(rank_of(number), qrel.doc_id)
            yield from (ScoredDoc(qrel.query_id, doc_id, 10.0 - rank) for rank, doc_id in enumerate(docs))

    write_run(str(tmp_path / "base.trec"), scored(lambda number: number % 4), tag="base")
    write_run(str(tmp_path / "adapted.trec"), scored(lambda number: 0), tag="adapted")
    return tmp_path


def _config(world, **changes):
    values = {
        "runs": f"{world}/base.trec,{world}/adapted.trec",
        "qrels": f"{world}/corpus/qrels/test.parquet",
        "output": f"{world}/evaluation",
        "num_permutations": 1000,
    }
    return EvaluateConfig.parse(values | changes)


def test_files_and_manifest_hold_the_same_figures(world):
    artifact = evaluate(_config(world, queries=f"{world}/corpus/queries", corpus=f"{world}/corpus"))
    details = artifact.manifest.details
    assert details["means"]["adapted"] == {"nDCG@10": 1.0, "R@100": 1.0, "RR@10": 1.0}
    assert details["means"]["base"]["RR@10"] == pytest.approx(np.mean([1, 1 / 2, 1 / 3, 1 / 4]))
    [first, *_] = details["comparisons"]
    assert (first["run"], first["baseline"], first["measure"], first["wins"], first["ties"]) == (
        "adapted",
        "base",
        "nDCG@10",
        6,
        2,
    )
    assert first["p_value"] == 2 * 2**2 / 2**8
    assert artifact.manifest.counts == {"num_runs": 2, "num_queries": 8}
    folder = artifact.location.local_path
    assert json.loads((folder / "measures.json").read_text())["means"] == details["means"]
    assert json.loads((folder / "report.json").read_text())["comparisons"] == json.loads(
        json.dumps(details["comparisons"])
    )
    assert "adapted" in (folder / "report.md").read_text()
    page = (folder / "report.html").read_text()
    assert "nobody judged" not in page
    shown = json.loads((folder / "report.json").read_text())["changes"][0]["gained"][0]["results"]["run"][0]
    passage = next(each for each in small_corpus(40) if each.doc_id == shown["doc_id"])
    assert shown["text"].startswith(passage.text[:40])
    assert passage.text[:40] in page
    table = pq.read_table(folder / "per_query.parquet")
    assert table.column_names == ["query_id", "run", "measure", "value"]
    assert table.num_rows == 8 * 2 * 3
    rows = [row["value"] for row in table.to_pylist() if row["run"] == "base" and row["measure"] == "RR@10"]
    assert sorted(rows) == pytest.approx(sorted([1, 1 / 2, 1 / 3, 1 / 4] * 2))


def test_judgements_of_passages_that_the_corpus_lacks_are_counted_and_named(world, caplog):
    queries, qrels = small_queries(small_corpus(40))
    more = [
        Qrel(queries[0].query_id, "gone", 1),
        Qrel(queries[1].query_id, "gone", 0),
        Qrel(queries[1].query_id, "lost", 2),
    ]
    lines = [f"{qrel.query_id}\t{qrel.doc_id}\t{qrel.relevance}" for qrel in [*qrels, *more]]
    (world / "more.tsv").write_text("\n".join(lines) + "\n")
    artifact = evaluate(_config(world, corpus=f"{world}/corpus", qrels=f"{world}/more.tsv"))
    said = [record.getMessage() for record in caplog.records if "no run can find" in record.getMessage()]
    assert said == [
        f"3 of {len(qrels) + 3} judgements are of 2 passages that {world}/corpus does not have, so no run can find them: gone, lost"
    ]
    assert artifact.manifest.details["qrels_of_unknown_passages"] == 3
    for name in ("report.md", "report.html"):
        said = (artifact.location / name).read_text()
        assert f"3 of {len(qrels) + 3} judgements are of passages that the corpus does not have" in said
    caplog.clear()
    artifact = evaluate(_config(world, corpus=f"{world}/corpus", overwrite=True))
    assert artifact.manifest.details["qrels_of_unknown_passages"] == 0
    assert not caplog.records


def test_the_same_again_does_nothing_and_another_is_refused(world):
    first = evaluate(_config(world))
    written = (world / "evaluation/report.html").stat().st_mtime_ns
    assert evaluate(_config(world)).fingerprint == first.fingerprint
    assert (world / "evaluation/report.html").stat().st_mtime_ns == written
    with pytest.raises(ArtifactConflictError, match="measures"):
        evaluate(_config(world, measures="AP"))
    with pytest.raises(ArtifactConflictError, match="names"):
        evaluate(_config(world, names="a,b"))
    again = evaluate(_config(world, measures="AP", overwrite=True))
    assert list(again.manifest.details["means"]["base"]) == ["AP"]
    assert open_artifact(f"{world}/evaluation", "evaluate").fingerprint == again.fingerprint


def test_a_run_that_changed_is_another_input(world):
    evaluate(_config(world))
    with (world / "base.trec").open("a") as file:
        file.write("q0000 Q0 extra 12 -5 base\n")
    with pytest.raises(ArtifactConflictError):
        evaluate(_config(world))


def test_a_run_of_other_making_is_another_input_even_if_its_content_is_the_same(world):
    def work(workspace):
        write_run(workspace.location.uri, [ScoredDoc("q0000", "d00000", 1.0)], tag="made")

    for retriever in ("cafe", "beef"):
        config = StageConfig(output=f"{world}/made.trec", overwrite=True)
        produce("search", config, inputs={"retriever": retriever}, work=work)
        if retriever == "cafe":
            evaluate(_config(world, runs=f"{world}/made.trec"))
    with pytest.raises(ArtifactConflictError):
        evaluate(_config(world, runs=f"{world}/made.trec"))


def test_the_report_tells_what_made_a_run(world):
    def work(workspace):
        write_run(workspace.location.uri, [ScoredDoc("q0000", "d00000", 1.0)], tag="made")
        workspace.details = {"encoder": {"fingerprint": "f00d"}}

    made = produce("search", StageConfig(output=f"{world}/made.trec"), inputs={"retriever": "cafe"}, work=work)
    evaluate(_config(world, runs=f"{world}/base.trec,{world}/made.trec"))
    report = json.loads((world / "evaluation/report.json").read_text())
    unknown, known = (run["provenance"] for run in report["runs"])
    assert "no manifest" in unknown["note"]
    assert known["fingerprint"] == made.fingerprint
    assert known["details"]["encoder"]["fingerprint"] == "f00d"
    assert "f00d" in (world / "evaluation/report.html").read_text()
    assert report["runs"][1]["without_results"] == [f"q{number:04d}" for number in range(1, 8)]


def test_runs_of_the_same_file_name_are_told_apart_by_their_folder(world):
    for folder in ("before", "after"):
        (world / folder).mkdir()
        (world / folder / "run.trec").write_bytes((world / "base.trec").read_bytes())
    artifact = evaluate(_config(world, runs=f"{world}/before/run.trec,{world}/after/run.trec"))
    assert list(artifact.manifest.details["means"]) == ["before/run", "after/run"]
    assert {each["p_value"] for each in artifact.manifest.details["comparisons"]} == {1.0}


def test_one_run_alone_is_measured(world):
    artifact = evaluate(_config(world, runs=f"{world}/base.trec", names="only"))
    assert list(artifact.manifest.details["means"]) == ["only"]
    assert artifact.manifest.details["comparisons"] == []


def test_one_query_says_that_no_test_is_possible(world):
    (world / "one.tsv").write_text("query-id\tcorpus-id\tscore\nq0001\td00003\t1\n")
    artifact = evaluate(_config(world, qrels=f"{world}/one.tsv"))
    assert "no test is possible" in artifact.manifest.details["verdicts"][0]
    assert "no test" in (world / "evaluation/report.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": ""}, "no run given"),
        ({"runs": "missing.trec"}, "no run at 'missing.trec'"),
        ({"qrels": "missing.tsv"}, "qrels = 'missing.tsv' does not exist"),
        ({"queries": "missing.tsv"}, "queries = 'missing.tsv' does not exist"),
        ({"measures": "nDCG@10,foo"}, "unknown measure 'foo'"),
        ({"names": "a"}, "1 name for 2 runs"),
        ({"names": "a,a"}, "two runs are called 'a'"),
        ({"num_permutations": 3}, "num_permutations = 3"),
        ({"num_permutations": "many"}, "num_permutations"),
        ({"seed": -1}, "seed = -1"),
        ({"colour": "red"}, "unknown option 'colour'"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(world, changes, message):
    with pytest.raises(InputError, match=message):
        evaluate(_config(world, **changes))
    assert not (world / "evaluation").exists()


def test_judgements_of_another_corpus_are_refused(world):
    (world / "other.tsv").write_text("".join(f"q{number:04d}\tMED-{number}\t1\n" for number in range(8)))
    with pytest.raises(
        CorpusError, match=r"no passage that .*other\.tsv' judges occurs .* MED-0, MED-1, MED-2; they have"
    ):
        evaluate(_config(world, qrels=f"{world}/other.tsv"))
    with pytest.raises(CorpusError, match="do they belong to one corpus"):
        evaluate(_config(world, qrels=f"{world}/other.tsv", corpus=f"{world}/corpus"))
    assert not (world / "evaluation").exists()


def test_runs_that_found_nothing_are_measured_where_the_corpus_has_what_is_judged(world):
    (world / "lost.tsv").write_text("q0000\td00039\t1\nq0001\td00038\t1\n")
    for name in ("base", "adapted"):
        lines = (world / f"{name}.trec").read_text().splitlines(keepends=True)
        (world / f"{name}.trec").write_text(
            "".join(line for line in lines if "d00039" not in line and "d00038" not in line)
        )
    artifact = evaluate(_config(world, qrels=f"{world}/lost.tsv", corpus=f"{world}/corpus"))
    assert artifact.manifest.details["means"]["adapted"]["R@100"] == 0.0


def test_bad_content_is_named_and_leaves_nothing(world):
    (world / "nan.trec").write_text("q0000 Q0 d1 1 nan t\n")
    (world / "strange.trec").write_text("zzz Q0 d1 1 1.0 t\n")
    for run, message in (
        ("nan", r"nan\.trec, line 1: .*not a finite number"),
        ("strange", r"strange\.trec: none of its 1 queries"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate(_config(world, runs=f"{world}/base.trec,{world}/{run}.trec"))
    with pytest.raises(ArtifactMissingError, match="corpus"):
        evaluate(_config(world, corpus=f"{world}/nothing/corpus"))
    assert not (world / "evaluation").exists()


def test_judgements_that_find_nothing_relevant_are_told(world, caplog):
    rows = pq.read_table(world / "corpus/qrels/test.parquet").to_pylist()
    (world / "zero.txt").write_text("".join(f"{row['query_id']} 0 {row['doc_id']} 0\n" for row in rows))
    evaluate(_config(world, qrels=f"{world}/zero.txt", output=f"{world}/zero"))
    (line,) = [each for each in caplog.messages if "above 0" in each]
    assert line.endswith("zero.txt' is above 0, so every measure is zero; check the column of relevance")


def test_the_report_has_the_gain_on_ones_own_beside_what_was_forgotten_on_general_queries(world):
    for name in ("base", "adapted"):
        (world / "general").mkdir(exist_ok=True)
        (world / "general" / f"{name}.trec").write_bytes((world / f"{name}.trec").read_bytes())
    # the adapted one is first on one's own, and last on the general collection
    general = evaluate(_config(world, runs=f"{world}/adapted.trec,{world}/base.trec", output=f"{world}/general/report"))
    require = "nDCG@10 >= base,general nDCG@10 >= base - 0.005,general RR@10 >= 0.1"
    made = evaluate(_config(world, general=general.uri, require=require))
    gain = next(each for each in made.manifest.details["comparisons"] if each["measure"] == "nDCG@10")
    report = json.loads((made.location / "report.json").read_text())["general"]
    assert report["num_queries"] == 8
    row = next(each for each in report["rows"] if each["measure"] == "nDCG@10")
    assert row["own"]["difference"] == gain["difference"] > 0
    assert row["general"]["difference"] == pytest.approx(-gain["difference"])
    assert (row["general"]["run"], row["general"]["baseline"]) == ("adapted", "base"), "names are those of one's own"
    assert [(each["text"], each["holds"]) for each in made.manifest.details["requirements"]] == [
        ("nDCG@10 >= base", True),
        ("general nDCG@10 >= base - 0.005", False),
        ("general RR@10 >= 0.1", True),
    ]
    figures = f"{gain['difference']:+.4f}"
    for name in ("report.md", "report.html"):
        said = (made.location / name).read_text()
        assert "Beside 8 general queries" in said
        assert figures in said and figures.replace("+", "−") in said
    assert made.manifest.inputs["general"] == general.manifest.fingerprint


@pytest.mark.parametrize(
    ("runs", "fingerprints", "message"),
    [
        ("base", ["a", "b"], "general = .* has 1 run and this report has 2"),
        ("base adapted", ["a", "c"], "measured another model as 'adapted' than 'adapted' is"),
    ],
)
def test_a_report_on_other_retrievers_is_no_general_one(world, runs, fingerprints, message):
    (world / "there").mkdir()
    for folder, models in ((world, ["a", "b"]), (world / "there", fingerprints)):
        for name, model in zip(("base", "adapted"), models, strict=True):
            content = (world / f"{name}.trec").read_bytes()

            def work(workspace, content=content, model=model):
                workspace.location.write_bytes(content)
                workspace.details = {"encoder": {"fingerprint": model}}

            produce(
                "search",
                StageConfig(output=f"{folder}/made-{name}.trec"),
                inputs={"retriever": model},
                work=work,
            )
    names = [f"{world}/there/made-{name}.trec" for name in runs.split()]
    general = evaluate(_config(world, runs=",".join(names), output=f"{world}/there/report"))
    own = f"{world}/made-base.trec,{world}/made-adapted.trec"
    with pytest.raises(
        InputError, match=message.replace("'adapted' than 'adapted'", "'made-adapted' than 'made-adapted'")
    ):
        evaluate(_config(world, runs=own, general=general.uri))
    assert not (world / "evaluation").exists()
